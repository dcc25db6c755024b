package mm

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// AccessError is a use of guest memory by the host that its mappings do not
// allow.
type AccessError struct {
	Access addr.Access   // what was wanted
	Range  addr.HVARange // of which bytes
	Why    string        // the first place that does not allow it
	Err    error         // unix.EFAULT, or os.ErrClosed
}

func (e *AccessError) Error() string {
	return fmt.Sprintf("%v access to %v: %s: %v", e.Access, e.Range, e.Why, e.Err)
}

func (e *AccessError) Unwrap() error { return e.Err }

// ReadAt copies len(p) bytes of guest memory from hva to p. It holds the mapping
// lock for reading. Memory that is not mapped, or was unmapped behind our back,
// gives an *AccessError; p may have been written in part.
func (m *Memory) ReadAt(p []byte, hva addr.HVA) error {
	return m.access(addr.Read, addr.HVAs(hva, uint64(len(p))), func() { copy(p, bytesAt(hva, len(p))) })
}

// WriteAt copies p to guest memory at hva, as ReadAt does the other way round.
func (m *Memory) WriteAt(p []byte, hva addr.HVA) error {
	return m.access(addr.ReadWrite, addr.HVAs(hva, uint64(len(p))), func() { copy(bytesAt(hva, len(p)), p) })
}

// Load64 reads the 8 bytes at hva, which is a multiple of 8, as one atomic
// access, sequentially consistent with the guest's.
func (m *Memory) Load64(hva addr.HVA) (v uint64, err error) {
	err = m.access(addr.Read, addr.HVAs(hva, 8), func() { v = load64(hva) })
	return v, err
}

// Store64 writes the 8 bytes at hva, which is a multiple of 8, as one atomic
// access, sequentially consistent with the guest's.
func (m *Memory) Store64(hva addr.HVA, v uint64) error {
	return m.access(addr.ReadWrite, addr.HVAs(hva, 8), func() { store64(hva, v) })
}

// access calls use, which touches exactly the bytes of r, with the mapping lock
// held. A fault in use is an error, not the end of the process: a mapping can
// be changed by code that knows nothing of this package.
func (m *Memory) access(want addr.Access, r addr.HVARange, use func()) (err error) {
	if r.Empty() {
		return nil
	}
	m.as.RLock()
	defer m.as.RUnlock()
	if m.closed {
		return &AccessError{Access: want, Range: r, Why: "guest memory", Err: os.ErrClosed}
	}
	at := r.Start
	for x := range m.extents.in(r) {
		if x.Range.Start > at {
			break
		}
		if x.Access&want != want {
			return &AccessError{Access: want, Range: r, Why: x.String(), Err: unix.EFAULT}
		}
		at = x.Range.End
	}
	if at < r.End {
		return &AccessError{Access: want, Range: r, Why: fmt.Sprintf("%v is not guest memory", at), Err: unix.EFAULT}
	}

	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch p := recover().(type) {
		case nil:
		case interface {
			error
			Addr() uintptr
		}:
			err = &AccessError{Access: want, Range: r, Why: fmt.Sprintf("%v faulted although it was mapped here", addr.HVA(p.Addr())), Err: errors.Join(unix.EFAULT, p)}
		default:
			panic(p)
		}
	}()
	use()
	return nil
}
