package vm

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
)

// DirtySource is how a machine learns which pages its guest has written. Each one
// is complete as Harvest sees it: what a source does not see is recorded by the table,
// for the machine's own stores, and by the policy, for changes of mappings.
type DirtySource uint8

const (
	// Bitmap is KVM's bitmap of each slot, which is read and cleared at once.
	Bitmap DirtySource = iota

	// Manual is the bitmap, read first and then cleared in pieces, of those pages that
	// it has: KVM's own lock is not held for the whole of a large slot.
	Manual

	// ManualAllSet is Manual where a log begins with all pages in it, so that nothing is
	// write-protected when it begins. It reports all pages of a slot once, and again
	// whenever the slot is made anew: when a hole is cut into it, for one.
	ManualAllSet

	// Ring is a ring of each vCPU, of Config.RingEntries, in which KVM records the
	// pages in the order in which they are first written. A harvest costs as much as
	// there are dirty pages, not as there is memory. A vCPU whose ring is full waits
	// until it has been emptied, which its own thread does.
	Ring

	// WriteProtect is an asynchronous userfaultfd, which write-protects the host's pages,
	// and a scan of the host's page tables. It sees stores of the host as well.
	WriteProtect
)

var sources = [...]struct {
	name string
	sees Sees
}{
	Bitmap:       {"bitmap", Sees{Guest: true}},
	Manual:       {"manual", Sees{Guest: true}},
	ManualAllSet: {"manual-all-set", Sees{Guest: true}},
	Ring:         {"ring", Sees{Guest: true}},
	WriteProtect: {"wp", Sees{Guest: true, Host: true}},
}

// ringEntries is what Config.RingEntries is if it says nothing: 64 KiB a vCPU, and room
// for 16 MiB of memory written between two harvests.
const ringEntries = 4096

// DirtySources returns all of them.
func DirtySources() []DirtySource {
	all := make([]DirtySource, len(sources))
	for i := range all {
		all[i] = DirtySource(i)
	}
	return all
}

func (s DirtySource) String() string {
	if int(s) < len(sources) {
		return sources[s].name
	}
	return fmt.Sprintf("dirty-source(%d)", uint8(s))
}

// Sees says whose stores a source reports. Stores by another mapping of the same memory,
// and writes to the file under it, are seen by none; nor is what a change of mappings
// does to content.
type Sees struct {
	Guest bool `json:"guest"` // a vCPU's, and KVM's for it
	Host  bool `json:"host"`  // those of this process, or of the kernel for it, to the addresses that the guest's memory is shown from
}

func (s Sees) String() string {
	if s.Host {
		return "stores of the guest and of the host"
	}
	return "stores of the guest"
}

// Sees returns what the source declares that it reports by itself.
func (s DirtySource) Sees() Sees { return sources[s].sees }

// source is a DirtySource at work. Its methods are called with the tracker's lock held,
// so by one goroutine at a time.
type source interface {
	// slotFlags are the flags of slots that are logged.
	slotFlags() kvm.MemFlags

	// begin is called when a slot that there was is logged from now on, with all vCPUs
	// out of the guest. Slots that are made anew are collected from without it.
	begin(s shadow.Slot) error

	// collect is shadow.Backend.DirtyLog.
	collect(slots []shadow.Slot, written *dirty.Set) error

	close() error
}

// openSource prepares the machine's VM, which has no vCPUs yet.
func (m *Machine) openSource() (source, error) {
	switch m.config.Dirty {
	case Manual:
		return m.openManual(kvm.DirtyLogManualProtect)
	case ManualAllSet:
		return m.openManual(kvm.DirtyLogManualProtect | kvm.DirtyLogInitiallySet)
	case Ring:
		err := m.vm.EnableDirtyRing(m.config.RingEntries)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.E2BIG) {
			err = fmt.Errorf("%w: %w", ErrConfig, err)
		}
		m.rings = &rings{m: m, pending: make(map[uint32]*dirty.Set)}
		return m.rings, err
	case WriteProtect:
		log, err := mm.NewWriteLog(m.config.Backing)
		return &writeProtect{log}, err
	}
	return &bitmapLog{vm: m.vm}, nil
}

func (m *Machine) openManual(flags kvm.DirtyLogFlags) (source, error) {
	has, err := m.vm.CheckExtension(kvm.CapManualDirtyLogProtect2)
	if err != nil {
		return nil, err
	}
	if kvm.DirtyLogFlags(has)&flags != flags {
		return nil, &kvm.UnsupportedError{Cap: kvm.CapManualDirtyLogProtect2}
	}
	return &manualLog{bitmapLog{vm: m.vm}}, m.vm.EnableManualDirtyLogProtect(flags)
}

// bitmapLog is KVM's classic bitmap.
type bitmapLog struct {
	vm     *kvm.VM
	bitmap []uint64 // between calls it is scratch
}

func (l *bitmapLog) slotFlags() kvm.MemFlags { return kvm.MemLogDirtyPages }
func (l *bitmapLog) begin(shadow.Slot) error { return nil }
func (l *bitmapLog) close() error            { return nil }

func (l *bitmapLog) collect(slots []shadow.Slot, written *dirty.Set) error {
	for _, s := range slots {
		bitmap := scratch(&l.bitmap, s.NPages)
		if err := l.vm.GetDirtyLog(s.ID, bitmap); err != nil {
			return err
		}
		written.AddBitmap(s.GFN, bitmap)
	}
	return nil
}

// scratch returns a bitmap of npages pages in the memory of *words.
func scratch(words *[]uint64, npages uint64) []uint64 {
	n := kvm.DirtyLogWords(npages)
	if n > cap(*words) {
		*words = make([]uint64, n)
	}
	return (*words)[:n]
}

// manualLog is the bitmap with manual protection.
type manualLog struct{ bitmapLog }

// clearWords is how much of a bitmap is cleared by one request: 64 MiB of memory. KVM
// holds the lock of its page tables for that long, and vCPUs that fault wait for it.
const clearWords = 256

// collect reads a bitmap and then clears what it has read. A page whose bit is set in
// between has been in the bitmap or is not cleared, so no store is between the two.
func (l *manualLog) collect(slots []shadow.Slot, written *dirty.Set) error {
	for _, s := range slots {
		bitmap := scratch(&l.bitmap, s.NPages)
		if err := l.vm.GetDirtyLog(s.ID, bitmap); err != nil {
			return err
		}
		written.AddBitmap(s.GFN, bitmap)
		for first := 0; first < len(bitmap); first += clearWords {
			some := bitmap[first:min(first+clearWords, len(bitmap))]
			if !anySet(some) {
				continue
			}
			page := uint64(first) * 64
			n := min(uint64(len(some))*64, s.NPages-page)
			if err := l.vm.ClearDirtyLog(s.ID, page, uint32(n), some); err != nil {
				return err
			}
		}
	}
	return nil
}

func anySet(words []uint64) bool {
	for _, w := range words {
		if w != 0 {
			return true
		}
	}
	return false
}

// rings is the dirty rings of all vCPUs. An entry names a slot by its number, so all
// rings are emptied, with the vCPUs out, before a slot goes: by the collect that comes
// before each deletion. What a vCPU's thread empties because its ring is full is kept
// until the next collect.
type rings struct {
	m *Machine

	mu      sync.Mutex            // a leaf; protects the rings of all vCPUs, and what follows
	pending map[uint32]*dirty.Set // pages of the slot of that number, from 0, that have been taken out of rings
	full    uint64                // how often a vCPU had to wait for room
}

func (r *rings) slotFlags() kvm.MemFlags { return kvm.MemLogDirtyPages }
func (r *rings) begin(shadow.Slot) error { return nil }
func (r *rings) close() error            { return nil }

func (r *rings) collect(slots []shadow.Slot, written *dirty.Set) error {
	// A CPU may have more for a ring until it leaves the guest.
	r.m.gate.flush()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.drainLocked(); err != nil {
		return err
	}
	for _, s := range slots {
		pages := r.pending[s.ID]
		if pages == nil {
			continue
		}
		delete(r.pending, s.ID)
		for run := range pages.Runs() {
			written.AddRange(addr.GFNRange{Start: s.GFN + run.Start, End: s.GFN + run.End})
		}
	}
	return nil
}

// makeRoom empties the rings, for a vCPU that may not enter the guest before.
func (r *rings) makeRoom() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.full++
	return r.drainLocked()
}

// drainLocked takes all entries out of the rings and has their pages protected again:
// a page is copied after that.
func (r *rings) drainLocked() error {
	taken := 0
	var failed error
	take := func(slot uint32, page uint64) {
		if r.pending[slot] == nil {
			r.pending[slot] = new(dirty.Set)
		}
		r.pending[slot].Add(addr.GFN(page))
	}
	for _, v := range r.m.vcpus {
		ring, err := v.cpu.DirtyRing()
		if err == nil {
			var n int
			n, err = ring.Harvest(take)
			taken += n
		}
		failed = errors.Join(failed, err)
	}
	// A signal can end a reset early. It takes entries back in order, so it gets on.
	for taken > 0 {
		n, err := r.m.vm.ResetDirtyRings()
		if err != nil {
			return errors.Join(failed, err)
		}
		taken -= n
	}
	return failed
}

// writeProtect is a log of the host's pages, of which the guest's faults are some of
// many.
type writeProtect struct{ log *mm.WriteLog }

func (w *writeProtect) slotFlags() kvm.MemFlags   { return 0 }
func (w *writeProtect) begin(s shadow.Slot) error { return w.log.Begin(s.HVAs()) }
func (w *writeProtect) close() error              { return w.log.Close() }

func (w *writeProtect) collect(slots []shadow.Slot, written *dirty.Set) error {
	for _, s := range slots {
		err := w.log.Take(s.HVAs(), func(r addr.HVARange) {
			gfn := s.GFN + addr.GFN((r.Start-s.HVA)>>addr.PageShift)
			written.AddRange(addr.GFNRange{Start: gfn, End: gfn + addr.GFN(r.NPages())})
		})
		if err != nil {
			return err
		}
	}
	return nil
}
