// Package hostmem loads from and stores to memory by host address: memory that is
// mapped outside the Go heap, and that may be gone when it is used.
//
// Whoever uses an address keeps it mapped meanwhile. That is up to the process as
// a whole, though, and one stray munmap breaks it; so a fault is an error here,
// not the end of the process.
//
// The functions do not allocate unless they fail, and hold no lock. Words are
// naturally aligned, and their accesses are sequentially consistent with each
// other and with those of a guest that the memory is mapped into.
package hostmem

import (
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// Fault is an access to memory that is not mapped, or not in that way, or behind
// which a file has ended. It is EFAULT for errors.Is.
type Fault struct {
	HVA addr.HVA // the address, in bytes; of a copy, that of the byte which could not be accessed
	Err error    // what the runtime says
}

func (e *Fault) Error() string { return fmt.Sprintf("access to %v faulted: %v", e.HVA, e.Err) }

func (e *Fault) Unwrap() []error { return []error{unix.EFAULT, e.Err} }

// ReadAt copies len(p) bytes from hva to p. With an error, p may have been written
// in part.
func ReadAt(p []byte, hva addr.HVA) (err error) {
	g := guard{was: debug.SetPanicOnFault(true)}
	defer g.catch(&err)
	copy(p, Bytes(hva, len(p)))
	g.done = true
	return nil
}

// WriteAt copies p to hva. With an error, the memory may have been written in
// part.
func WriteAt(p []byte, hva addr.HVA) (err error) {
	g := guard{was: debug.SetPanicOnFault(true)}
	defer g.catch(&err)
	copy(Bytes(hva, len(p)), p)
	g.done = true
	return nil
}

// Load64 returns the 8 bytes at hva.
func Load64(hva addr.HVA) (v uint64, err error) {
	g := guard{was: debug.SetPanicOnFault(true)}
	defer g.catch(&err)
	v = atomic.LoadUint64((*uint64)(pointer(hva)))
	g.done = true
	return v, nil
}

// Store64 writes the 8 bytes at hva.
func Store64(hva addr.HVA, v uint64) (err error) {
	g := guard{was: debug.SetPanicOnFault(true)}
	defer g.catch(&err)
	atomic.StoreUint64((*uint64)(pointer(hva)), v)
	g.done = true
	return nil
}

// Load32 returns the 4 bytes at hva.
func Load32(hva addr.HVA) (v uint32, err error) {
	g := guard{was: debug.SetPanicOnFault(true)}
	defer g.catch(&err)
	v = atomic.LoadUint32((*uint32)(pointer(hva)))
	g.done = true
	return v, nil
}

// Store32 writes the 4 bytes at hva.
func Store32(hva addr.HVA, v uint32) (err error) {
	g := guard{was: debug.SetPanicOnFault(true)}
	defer g.catch(&err)
	atomic.StoreUint32((*uint32)(pointer(hva)), v)
	g.done = true
	return nil
}

// CompareAndSwap64 writes v to the 8 bytes at hva if they are old, and reports
// whether they were.
func CompareAndSwap64(hva addr.HVA, old, v uint64) (swapped bool, err error) {
	g := guard{was: debug.SetPanicOnFault(true)}
	defer g.catch(&err)
	swapped = atomic.CompareAndSwapUint64((*uint64)(pointer(hva)), old, v)
	g.done = true
	return swapped, nil
}

// Use calls fn with the n bytes at hva. A fault in its use of them is an error, and
// fn has not returned then; any other panic is passed on.
func Use(hva addr.HVA, n int, fn func([]byte) error) (err error) {
	g := guard{was: debug.SetPanicOnFault(true), within: addr.HVAs(hva, uint64(n))}
	defer g.catch(&err)
	err = fn(Bytes(hva, n))
	g.done = true
	return err
}

// guard makes an error of a fault in an access.
type guard struct {
	was    bool          // whether a fault was a panic before
	done   bool          // the access has been made; this saves asking for a panic each time
	within addr.HVARange // where a fault is one of the access; empty: anywhere
}

// catch is deferred around an access. It passes on any panic but a fault.
func (g *guard) catch(err *error) {
	debug.SetPanicOnFault(g.was)
	if g.done {
		return
	}
	switch p := recover().(type) {
	case interface {
		error
		Addr() uintptr
	}:
		at := addr.HVA(p.Addr())
		if w := g.within; !w.Empty() && (at < w.Start || at >= w.End) {
			panic(p)
		}
		*err = &Fault{at, p}
	default:
		panic(p)
	}
}

// Bytes returns the n bytes at hva, for use as long as they are mapped. A fault
// in their use is the user's.
func Bytes(hva addr.HVA, n int) []byte {
	return unsafe.Slice((*byte)(pointer(hva)), n)
}

// pointer converts an address outside the Go heap, which the collector does not
// look at. It goes through memory because go vet takes a direct conversion for
// the misuse that it would be inside the heap.
func pointer(hva addr.HVA) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&hva)) }
