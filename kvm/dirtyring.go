package kvm

import (
	"fmt"
	"math"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// EnableDirtyRing has KVM log the pages that a vCPU writes in a ring of that vCPU,
// of so many entries, and not in the bitmaps of slots: GetDirtyLog and
// ClearDirtyLog fail with ENXIO from then on. Which slots are logged still is what
// MemLogDirtyPages says. It is called once, and returns before the first vCPU is
// created.
//
// The entries are a power of two: a page of them at the least, which is 256, and as
// many as KVM reserves, which is 64 and with page-modification logging another 512.
// The most is what CapDirtyLogRingAcqRel answers, in bytes of which an entry has 16.
// The error is EINVAL if they are too few or no power of two, if the VM has rings
// already, and if it has a vCPU; it is E2BIG if they are too many, and an
// [*UnsupportedError] if KVM has no rings.
//
// EnableDirtyRing wraps KVM_ENABLE_CAP of KVM_CAP_DIRTY_LOG_RING_ACQ_REL, and on a
// kernel without it of KVM_CAP_DIRTY_LOG_RING, which is the same on x86.
func (vm *VM) EnableDirtyRing(entries uint32) error {
	c := CapDirtyLogRingAcqRel
	most, err := vm.CheckExtension(c)
	if err == nil && most == 0 {
		c = CapDirtyLogRing
		most, err = vm.CheckExtension(c)
	}
	if err != nil {
		return err
	}
	if most == 0 {
		return &UnsupportedError{Cap: c}
	}
	detail := fmt.Sprintf("%v, %d entries", c, entries)
	size := uint64(entries) * sizeofDirtyGfn
	if size > math.MaxUint32 { // KVM would look at the lower half
		return &Error{Op: reqEnableCap.name, Detail: detail, Errno: unix.E2BIG}
	}
	if err := vm.EnableCap(c, 0, size); err != nil {
		return about(err, detail)
	}
	vm.ringSize.Store(uint32(size))
	return nil
}

// ResetDirtyRings gives the harvested entries of all rings back to KVM, which
// write-protects their pages again before ResetDirtyRings returns, and returns how
// many they were. In each ring it stops at the first entry that has not been
// harvested. Entries that name no page of a slot that there is are given back too.
//
// The answer may be less than what was harvested if a signal is pending, such as
// the Go runtime's own. What is left is for the next call: a harvest is done when
// the answers add up to it.
//
// ResetDirtyRings wraps KVM_RESET_DIRTY_RINGS. It allocates nothing, unless it
// fails.
func (vm *VM) ResetDirtyRings() (int, error) { return call(&vm.fd, reqResetDirtyRings, 0) }

// dirtyLogPageOffset is where in a vCPU's file the ring is, in pages.
const dirtyLogPageOffset = 64

// Flags of an entry: see ringReader.
const (
	gfnDirty = 1 << 0
	gfnReset = 1 << 1
)

// ringReader is the side of a dirty ring that is not KVM's. Who may touch an entry,
// and what he makes of it, is in its flags:
//
//	flags  state      owner
//	00     free       KVM, which fills it and publishes it: 01
//	01     dirty      the reader, who uses it and hands it back: 1x
//	1x     harvested  KVM, which protects the page, at a reset: 00
//
// The store to flags that hands an entry over is a release and the load that finds
// it is an acquire, on both sides:
//
//	KVM                        reader
//	slot, offset = ...
//	flags = 01
//	                           flags == 01
//	                           slot, offset are those (required)
//	                           flags = 10
//	flags == 1x
//	the reader is done with slot and offset (required)
//
// KVM fills the entries in order and takes them back in order. Three indices follow
// one another round the ring, modulo 2^32: dirty, KVM's, of the entry to fill
// next; fetch; and reset, KVM's, of the entry to take back next. KVM lets the vCPU
// run only while dirty-reset is below a limit, so that it is reset that counts, and
// not fetch.
type ringReader struct {
	entries []dirtyGfn // a power of two of them
	fetch   uint32

	mutant mutant
	hook   func() // for tests: called with an entry found dirty and not read
}

// harvest takes the dirty entries in order until there is none, or a whole ring of
// them, and returns their number. An entry is handed back when fn returns.
func (r *ringReader) harvest(fn func(slot uint32, offset uint64)) (n int) {
	if r.mutant != sound {
		return r.harvestMutant(fn)
	}
	for mask := uint32(len(r.entries) - 1); n < len(r.entries); n++ {
		e := &r.entries[r.fetch&mask]
		if atomic.LoadUint32(&e.flags)&(gfnDirty|gfnReset) != gfnDirty {
			break
		}
		if r.hook != nil {
			r.hook()
		}
		fn(e.slot, e.offset)
		atomic.StoreUint32(&e.flags, gfnReset)
		r.fetch++
	}
	return n
}

// DirtyRing is the ring in which KVM logs the pages that a vCPU writes. It is
// mapped until the vCPU is closed, and what has not been harvested by then is lost.
// It belongs to one goroutine at a time, which need not be the vCPU's.
//
// The order that loses nothing is
//
//	harvest all rings, ResetDirtyRings, copy the pages
//
// because a page is protected again by the reset: what the guest stores to it
// before that is in no log, and a copy made before that may lack it. An entry names
// a slot and not a page: entries stay in the ring when the slot is deleted, and if
// another is created with its number they seem to be the new one's. Before that all
// rings are harvested, with the guest stopped.
//
// Harvested entries use up the ring until they are reset. When no more than the
// reserve is left, VCPU.Run returns a [*DirtyRingFullExit], at once and every time,
// until a reset lets it enter the guest; to harvest is not enough.
//
// A CPU may buffer what it logs until it leaves the guest. What a vCPU has written
// is in its ring when Run has returned, and not before.
type DirtyRing struct {
	fd     *fd // of the vCPU, which the entries of reader are mapped with
	reader ringReader
}

// Harvest calls fn for each page that was logged since the last Harvest, in order,
// and returns how many there were. The slot has its address space in bits 16 and
// up, the offset is in pages of the slot. A page may come several times. fn may not
// harvest; a page for which it panics comes again.
//
// After a whole ring of pages it returns, though there may be more if rings are
// reset meanwhile. After the vCPU's Close there is nothing to harvest, and
// errors.Is finds [os.ErrClosed]. Harvest allocates nothing and makes no system
// call.
func (r *DirtyRing) Harvest(fn func(slot uint32, offset uint64)) (int, error) {
	if !r.fd.acquire() {
		return 0, closedError("dirty ring")
	}
	defer r.fd.release()
	return r.reader.harvest(fn), nil
}

// DirtyRing returns the vCPU's dirty ring, which it maps the first time; there is
// one, and it goes on where it was. It may be called from any goroutine. Without
// VM.EnableDirtyRing the error is ENXIO.
func (c *VCPU) DirtyRing() (*DirtyRing, error) {
	if !c.fd.acquire() {
		return nil, closedError("mmap")
	}
	defer c.fd.release()
	c.ringMu.Lock()
	defer c.ringMu.Unlock()
	if c.ring != nil {
		return c.ring, nil
	}
	if c.ringSize == 0 {
		return nil, &Error{Op: "mmap", Detail: "dirty ring of a VM without", Errno: unix.ENXIO}
	}
	mem, err := unix.Mmap(c.fd.raw, dirtyLogPageOffset<<addr.PageShift, int(c.ringSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, &Error{Op: "mmap", Detail: "dirty ring", Errno: errnoOf(err)}
	}
	c.fd.ring = mem
	c.ring = &DirtyRing{fd: &c.fd, reader: ringReader{entries: dirtyGfnsOf(mem)}}
	return c.ring, nil
}
