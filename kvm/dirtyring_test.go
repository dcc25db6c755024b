package kvm

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

// modelKVM is KVM's side of a dirty ring in memory, as the kernel's documentation
// has it. Each page that it pushes has a number of its own.
type modelKVM struct {
	ring         []dirtyGfn
	dirty, reset uint32
	limit        uint32 // a vCPU runs only while fewer entries are used
	pushed       uint64
}

func newModel(size, reserved int, start uint32) (*modelKVM, *ringReader) {
	k := &modelKVM{ring: make([]dirtyGfn, size), dirty: start, reset: start, limit: uint32(size - reserved)}
	return k, &ringReader{entries: k.ring, fetch: start}
}

func (k *modelKVM) at(i uint32) *dirtyGfn { return &k.ring[i&uint32(len(k.ring)-1)] }
func (k *modelKVM) used() uint32          { return k.dirty - k.reset }
func (k *modelKVM) full() bool            { return k.used() >= k.limit }

// slotOf makes an entry's slot a function of its offset, so that a mixture of two
// entries shows.
func slotOf(offset uint64) uint32 { return uint32(offset)*7 + 1 }

// push logs a page. The reserve is there for it even if the vCPU may not run.
func (k *modelKVM) push() {
	if k.used() == uint32(len(k.ring)) {
		return
	}
	e := k.at(k.dirty)
	e.slot, e.offset = slotOf(k.pushed), k.pushed
	atomic.StoreUint32(&e.flags, gfnDirty)
	k.dirty++
	k.pushed++
}

// takeBack is KVM_RESET_DIRTY_RINGS.
func (k *modelKVM) takeBack() (n int) {
	for ; atomic.LoadUint32(&k.at(k.reset).flags)&gfnReset != 0; n++ {
		atomic.StoreUint32(&k.at(k.reset).flags, 0)
		k.reset++
	}
	return n
}

// judge receives what a reader delivers, and compares it with what was pushed.
type judge struct {
	next uint64 // the page that comes next
	err  error
}

func (j *judge) take(slot uint32, offset uint64) {
	if j.err == nil && (offset != j.next || slot != slotOf(j.next)) {
		j.err = fmt.Errorf("got slot %d page %d, want slot %d page %d", slot, offset, slotOf(j.next), j.next)
	}
	j.next++
}

// checkStates compares the state of every entry with the place of its index: those
// from reset to fetch are harvested, those from fetch to dirty are dirty, the rest
// is free.
func (k *modelKVM) checkStates(fetch uint32) error {
	for i := range uint32(len(k.ring)) {
		want := uint32(0)
		switch {
		case i < fetch-k.reset:
			want = gfnReset
		case i < k.used():
			want = gfnDirty
		}
		if got := k.at(k.reset + i).flags; got != want {
			return fmt.Errorf("entry %d from reset has flags %02b, want %02b (reset %d, fetch %d, dirty %d)", i, got, want, k.reset, fetch, k.dirty)
		}
	}
	return nil
}

// ringStarts are where the indices begin: at zero, and so that they wrap.
var ringStarts = []uint32{0, math.MaxUint32 - 2}

// checkRingModel takes a ring of four entries, of which one is reserved, through
// all sequences of steps, and looks at everything after each.
func checkRingModel(m mutant) error {
	const steps = 8
	names := [...]string{"push", "harvest", "harvest during a push", "reset"}
	for _, start := range ringStarts {
		for seq := range 1 << (2 * steps) {
			var trace []string
			k, r := newModel(4, 1, start)
			r.mutant = m
			var j judge
			for i := range steps {
				op := seq >> (2 * i) & 3
				trace = append(trace, names[op])
				used, before, taken := k.used(), j.next, 0
				switch op {
				case 0:
					k.push()
				case 1:
					taken = r.harvest(j.take)
				case 2:
					more := true
					taken = r.harvest(func(slot uint32, offset uint64) {
						j.take(slot, offset)
						if more {
							k.push()
						}
						more = false
					})
				case 3:
					if n := k.takeBack(); uint32(n) != used-k.used() {
						return fmt.Errorf("%v from %d: reset %d, used went from %d to %d", trace, start, n, used, k.used())
					}
				}
				if j.err == nil {
					j.err = k.checkStates(start + uint32(j.next))
				}
				if op == 1 && j.err == nil && (j.next != k.pushed || k.used() != used) {
					j.err = fmt.Errorf("a harvest left %d of %d pages, and %d of %d entries used", k.pushed-j.next, k.pushed, k.used(), used)
				}
				if j.err == nil && uint64(taken) != j.next-before {
					j.err = fmt.Errorf("Harvest says %d, and came with %d", taken, j.next-before)
				}
				if j.err != nil {
					return fmt.Errorf("%v from %d: %w", trace, start, j.err)
				}
			}
		}
	}
	return nil
}

// checkFullRing drives a ring over the limit: the vCPU is held until a reset, to
// which nothing is left but what the harvest gave it.
func checkFullRing(m mutant) error {
	for _, start := range ringStarts {
		k, r := newModel(8, 2, start)
		r.mutant = m
		var j judge
		for lap := range 5 {
			for !k.full() {
				k.push()
			}
			if n := k.takeBack(); n != 0 || !k.full() {
				return fmt.Errorf("lap %d: %d entries reset that nobody harvested", lap, n)
			}
			k.push() // the CPU's own buffer
			if n := r.harvest(j.take); n != 7 || j.err != nil {
				return fmt.Errorf("lap %d: harvest of 7 entries = %d, %v", lap, n, j.err)
			}
			if !k.full() {
				return fmt.Errorf("lap %d: the vCPU may run although nothing was reset", lap)
			}
			if n := k.takeBack(); n != 7 || k.full() {
				return fmt.Errorf("lap %d: reset of 7 harvested entries = %d, full %v", lap, n, k.full())
			}
		}
	}
	return nil
}

// checkPlacements has KVM do each thing that it can do at each point of a harvest
// at which an entry has been looked at half.
func checkPlacements(m mutant) error {
	for _, start := range ringStarts {
		for filled := range 5 {
			for point := range 5 {
				for what, do := range map[string]func(k *modelKVM){
					"a push":                func(k *modelKVM) { k.push() },
					"a reset":               func(k *modelKVM) { k.takeBack() },
					"a reset and four more": func(k *modelKVM) { k.takeBack(); k.push(); k.push(); k.push(); k.push() },
				} {
					k, r := newModel(4, 1, start)
					r.mutant = m
					for range filled {
						k.push()
					}
					reached := 0
					r.hook = func() {
						if reached == point {
							do(k)
						}
						reached++
					}
					var j judge
					r.harvest(j.take)
					r.hook = nil
					r.harvest(j.take)
					if j.err == nil && j.next != k.pushed {
						j.err = fmt.Errorf("%d of %d pages came", j.next, k.pushed)
					}
					if j.err != nil {
						return fmt.Errorf("%d entries, %s at point %d: %w", filled, what, point, j.err)
					}
				}
			}
		}
	}
	return nil
}

// checkHarvestEnds harvests a ring that is filled as fast as it is read.
func checkHarvestEnds(m mutant) error {
	k, r := newModel(4, 1, 0)
	r.mutant = m
	var j judge
	k.push()
	n := r.harvest(func(slot uint32, offset uint64) {
		j.take(slot, offset)
		k.takeBack()
		k.push()
	})
	if n != len(k.ring) || j.err != nil {
		return fmt.Errorf("harvest of a ring of %d that fills up again = %d, %v", len(k.ring), n, j.err)
	}
	return nil
}

var ringMutants = []gvmtest.Mutant[mutant]{
	{ID: "VM12-15", By: "V10 over KVM", NA: "they are of KVM's bitmap: TestDirtyClassic, Manual, InitiallySet and V10"},
	{ID: "VM16", Defect: readBeforeFlags, What: "an entry is read before its flags", By: "V12 every placement", Check: checkPlacements},
	{ID: "VM16", Defect: skipUnpublished, What: "an entry that is not dirty is passed over", By: "V12 every sequence", Check: checkRingModel},
	{ID: "VM16", Defect: handBackFirst, What: "an entry is handed back, then read", By: "V12 every placement", Check: checkPlacements},
	{ID: "VM16", Defect: handBackNothing, What: "an entry is not handed back", By: "V12 full ring", Check: checkFullRing},
	{ID: "VM16", NA: "KVM publishes before it fills, or resets what was not harvested: TestDirtyRing and V10, over KVM"},
	{ID: "VM17", Defect: freeAtOnce, What: "a harvest makes entries free", By: "V12 full ring", Check: checkFullRing},
	{ID: "VM17", NA: "KVM counts only what was not harvested: TestDirtyRingFull, over KVM"},
	{ID: "VM18", NA: "KVM resets without a flush, or for another slot: V10 and TestDirtyRingSlotChanges, over KVM"},
	{ID: "K21", Defect: takeHarvested, What: "a harvested entry is taken again", By: "V12 every sequence", Check: checkRingModel},
	{ID: "K21", Defect: restartAtZero, What: "a harvest begins at the ring's start", By: "V12 every sequence", Check: checkRingModel},
	{ID: "K21", Defect: harvestWithoutEnd, What: "a harvest goes on as long as KVM does", By: "V12 a harvest ends", Check: checkHarvestEnds},
	{ID: "V12", Defect: indexSticks, What: "the index does not wrap", By: "V12 every sequence", Check: checkRingModel},
}

// TestMutants has each check find the defect that it is there for, and find
// nothing without it.
func TestMutants(t *testing.T) { gvmtest.RunMutants(t, ringMutants) }

// TestMutantsAreAllThere: every defect that a reader can have is in the table.
func TestMutantsAreAllThere(t *testing.T) { gvmtest.EveryMutant(t, harvestWithoutEnd, ringMutants) }

// TestDirtyRingModel is V12.
func TestDirtyRingModel(t *testing.T) {
	for name, check := range map[string]func(mutant) error{
		"every sequence": checkRingModel, "full ring": checkFullRing,
		"every placement": checkPlacements, "a harvest ends": checkHarvestEnds,
	} {
		t.Run(name, func(t *testing.T) {
			if err := check(sound); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDirtyRingConcurrent has a vCPU and a reader on a ring at once, across the
// wrap of its indices. The race detector sees that each entry has one owner.
func TestDirtyRingConcurrent(t *testing.T) {
	const pages = 200_000
	k, r := newModel(64, 4, math.MaxUint32-pages/2)
	vcpu := gvmtest.Background(func() {
		for k.pushed < pages {
			if k.full() {
				if k.takeBack() == 0 {
					runtime.Gosched()
				}
				continue
			}
			k.push()
		}
	})
	var j judge
	for j.next < pages && j.err == nil {
		if r.harvest(j.take) == 0 {
			runtime.Gosched()
		}
	}
	if j.err != nil {
		t.Fatal(j.err) // the vCPU would wait for ever
	}
	<-vcpu
	if n := k.takeBack(); k.used() != 0 {
		t.Errorf("%d entries are used after the last reset, of %d", k.used(), n)
	}
}

// TestDirtyRingPanic: a page that the caller did not get comes again.
func TestDirtyRingPanic(t *testing.T) {
	k, reader := newModel(4, 1, 0)
	var f fd
	f.init(-1, nil)
	r := &DirtyRing{fd: &f, reader: *reader}
	for range 3 {
		k.push()
	}
	var j judge
	gvmtest.Panics(func() {
		_, _ = r.Harvest(func(slot uint32, offset uint64) {
			if offset == 1 {
				panic("of the caller")
			}
			j.take(slot, offset)
		})
	})
	if n, err := r.Harvest(j.take); n != 2 || err != nil || j.err != nil || j.next != 3 {
		t.Errorf("Harvest = %d, %v; %d pages came, %v; want 2 and 3 pages", n, err, j.next, j.err)
	}
	if got := f.state.Load(); got != fdOpen {
		t.Errorf("the descriptor's state is %#x, want %#x", got, fdOpen)
	}
}

func TestDirtyRingSizeDoesNotWrap(t *testing.T) {
	vm := newVM(t)
	needRing(t, vm)
	const entries = 1<<28 + 256 // as many bytes as 256 entries, to whoever looks at 32 bits
	if err := vm.EnableDirtyRing(entries); !errors.Is(err, unix.E2BIG) {
		t.Errorf("EnableDirtyRing(%d) = %v, want E2BIG", entries, err)
	}
}

// needRing skips the test if KVM has no dirty rings.
func needRing(t testing.TB, vm *VM) {
	t.Helper()
	for _, c := range []Cap{CapDirtyLogRingAcqRel, CapDirtyLogRing} {
		n, err := vm.CheckExtension(c)
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			return
		}
	}
	if err := vm.EnableDirtyRing(256); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("EnableDirtyRing without rings = %v, want %v", err, errors.ErrUnsupported)
	}
	gvmtest.Lack(t, gvmtest.KVMCaps, errors.New("KVM has no dirty rings"))
}

// ringVM returns what makes a VM with rings of so many entries.
func ringVM(entries uint32) func(testing.TB) *VM {
	return func(t testing.TB) *VM {
		t.Helper()
		vm := newVM(t)
		needRing(t, vm)
		if err := vm.EnableDirtyRing(entries); err != nil {
			t.Fatal(err)
		}
		return vm
	}
}

func (m *logMachine) ring(t testing.TB) *DirtyRing {
	t.Helper()
	r, err := m.vcpu.DirtyRing()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type slotPage struct {
	slot   uint32
	offset uint64
}

// harvest returns what Harvest comes with.
func (m *logMachine) harvest(t testing.TB) (list []slotPage) {
	t.Helper()
	n, err := m.ring(t).Harvest(func(slot uint32, offset uint64) { list = append(list, slotPage{slot, offset}) })
	if err != nil || n != len(list) {
		t.Fatalf("Harvest = %d, %v; came with %d", n, err, len(list))
	}
	return list
}

// resetRings resets until n entries are reset, and no more are left.
func (m *logMachine) resetRings(t testing.TB, n int) {
	t.Helper()
	for {
		got, err := m.ResetDirtyRings()
		if err != nil {
			t.Fatal(err)
		}
		if n -= got; n <= 0 {
			break
		}
		runtime.Gosched()
	}
	if n < 0 {
		t.Fatalf("%d more entries were reset than harvested", -n)
	}
}

// pagesOf returns the pages that entries name, in the order of the slot: in the ring
// they are in that of the CPU's buffer, which KVM may have emptied from its end.
func pagesOf(t testing.TB, list []slotPage) []uint64 {
	t.Helper()
	var pages []uint64
	for _, e := range list {
		if e.slot != logSlot {
			t.Errorf("entry of slot %d, want %d", e.slot, logSlot)
		}
		pages = append(pages, e.offset)
	}
	slices.Sort(pages)
	return pages
}

// TestDirtyRing: the ring has each page that was written once until it is reset, and
// again after that.
func TestDirtyRing(t *testing.T) {
	m := newLogMachine(t, logPages, ringVM(ringEntries))
	if got := m.harvest(t); len(got) != 0 {
		t.Fatalf("a new ring has %v", got)
	}
	m.store(t, 3, 4, 50)
	want := []uint64{3, 53, 103, 153}
	first := m.harvest(t)
	if got := pagesOf(t, first); !slices.Equal(got, want) {
		t.Errorf("after stores to %v the ring has %v", want, got)
	}
	if got := m.harvest(t); len(got) != 0 {
		t.Errorf("a second harvest has %v", got)
	}
	m.resetRings(t, len(first))
	if n, err := m.ResetDirtyRings(); n != 0 || err != nil {
		t.Errorf("a second reset = %d, %v; want 0", n, err)
	}
	m.store(t, 53, 1, 1)
	if got := pagesOf(t, m.harvest(t)); !slices.Equal(got, []uint64{53}) {
		t.Errorf("after a reset and a store to page 53 the ring has %v", got)
	}
	again, err := m.vcpu.DirtyRing()
	if err != nil || again != m.ring(t) {
		t.Errorf("DirtyRing again = %p, %v; want the same", again, err)
	}
	if err := m.GetDirtyLog(logSlot, m.bitmap()); !errors.Is(err, unix.ENXIO) {
		t.Errorf("GetDirtyLog with rings = %v, want ENXIO", err)
	}
	if err := m.ClearDirtyLog(logSlot, 0, 64, make([]uint64, 1)); !errors.Is(err, unix.ENXIO) {
		t.Errorf("ClearDirtyLog with rings = %v, want ENXIO", err)
	}
}

// ringEntries is the smallest ring that every host accepts, also one with
// page-modification logging.
const ringEntries = 1024

// reservedEntries returns what KVM holds back of a ring: 64, and as much as the
// CPU's page-modification log has, which it may come with at once.
func reservedEntries() (reserved, atOnce int) {
	if pml, err := os.ReadFile("/sys/module/kvm_intel/parameters/pml"); err == nil && len(pml) > 0 && (pml[0] == 'Y' || pml[0] == '1') {
		return 64 + 512, 512
	}
	return 64, 0
}

// TestDirtyRingFull fills a ring: the vCPU is held at the reserve until there is a
// reset, and not by a harvest; and then does the rest.
func TestDirtyRingFull(t *testing.T) {
	const pages = ringEntries + 100
	m := newLogMachine(t, pages, ringVM(ringEntries))
	reserved, atOnce := reservedEntries()
	m.start(t, 0, pages, 1)
	var all []uint64
	full := 0
	for {
		exit := run(t, m.vcpu)
		if exit.Reason() != ReasonDirtyRingFull {
			m.checkEnd(t, exit)
			break
		}
		full++
		if exit := run(t, m.vcpu); exit.Reason() != ReasonDirtyRingFull {
			t.Fatalf("a second run on a full ring: %v", exit)
		}
		if n, err := m.ResetDirtyRings(); n != 0 || err != nil {
			t.Fatalf("reset of what was not harvested = %d, %v; want 0", n, err)
		}
		got := pagesOf(t, m.harvest(t))
		if n := len(got); n < ringEntries-reserved || n > ringEntries-reserved+atOnce {
			t.Errorf("full with %d of %d entries, want %d to %d", n, ringEntries, ringEntries-reserved, ringEntries-reserved+atOnce)
		}
		if exit := run(t, m.vcpu); exit.Reason() != ReasonDirtyRingFull {
			t.Fatalf("a run after the harvest and before the reset: %v", exit)
		}
		m.resetRings(t, len(got))
		all = append(all, got...)
	}
	all = append(all, pagesOf(t, m.harvest(t))...)
	if full == 0 {
		t.Errorf("the ring was never full")
	}
	slices.Sort(all)
	if got := len(slices.Compact(all)); got != pages {
		t.Errorf("%d of %d pages are in the ring", got, pages)
	}
	for p := range uint64(pages) {
		if got := m.counter(p); got != 1 {
			t.Fatalf("page %d was stored to %d times, want once", p, got)
		}
	}
}

func TestDirtyRingErrors(t *testing.T) {
	vm := newVM(t)
	needRing(t, vm)
	most, err := vm.CheckExtension(CapDirtyLogRingAcqRel)
	if most == 0 && err == nil {
		most, err = vm.CheckExtension(CapDirtyLogRing)
	}
	if err != nil || most%int(sizeofDirtyGfn) != 0 {
		t.Fatalf("the largest ring has %d bytes, %v", most, err)
	}
	if n, err := vm.ResetDirtyRings(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("ResetDirtyRings without rings = %d, %v; want EINVAL", n, err)
	}
	refuse := func(what string, entries uint32, want unix.Errno) {
		t.Helper()
		if err := vm.EnableDirtyRing(entries); !errors.Is(err, want) {
			t.Errorf("EnableDirtyRing(%d), %s = %v, want %v", entries, what, err, want)
		}
	}
	refuse("none", 0, unix.EINVAL)
	refuse("less than a page", 128, unix.EINVAL)
	refuse("no power of two", ringEntries+1, unix.EINVAL)
	refuse("too many", uint32(most)/uint32(sizeofDirtyGfn)*2, unix.E2BIG)
	if err := vm.EnableDirtyRing(ringEntries); err != nil {
		t.Fatal(err)
	}
	refuse("twice", ringEntries, unix.EINVAL)

	vm = newVM(t)
	c := newTestVCPU(t, vm)
	refuse("after a vCPU", ringEntries, unix.EINVAL)
	if r, err := c.DirtyRing(); r != nil || !errors.Is(err, unix.ENXIO) {
		t.Errorf("DirtyRing without rings = %v, %v; want ENXIO", r, err)
	}
}

// TestDirtyRingClosed: the ring goes with its vCPU, and not while it is harvested.
func TestDirtyRingClosed(t *testing.T) {
	m := newLogMachine(t, logPages, ringVM(ringEntries))
	m.store(t, 0, 3, 1)
	r := m.ring(t)
	n, err := r.Harvest(func(uint32, uint64) {
		if err := m.vcpu.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	if n != 3 || err != nil {
		t.Errorf("Harvest that closes the vCPU = %d, %v; want 3", n, err)
	}
	if n, err := r.Harvest(func(uint32, uint64) {}); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("Harvest after Close = %d, %v; want os.ErrClosed", n, err)
	}
	if r, err := m.vcpu.DirtyRing(); r != nil || !errors.Is(err, os.ErrClosed) {
		t.Errorf("DirtyRing after Close = %v, %v; want os.ErrClosed", r, err)
	}
	if left := openFDs(t); len(left) != 1 { // that of the VM
		t.Errorf("descriptors left: %v", left)
	}
}

// TestDirtyRingSlotChanges: entries outlive their slot, are attributed to the next
// of its number, and are dropped by a reset.
func TestDirtyRingSlotChanges(t *testing.T) {
	deleted := func(r MemoryRegion) MemoryRegion { r.Size = 0; return r }
	t.Run("delete", func(t *testing.T) {
		m := newLogMachine(t, logPages, ringVM(ringEntries))
		m.store(t, 5, 2, 1)
		m.setSlot(t, deleted(m.region))
		got := m.harvest(t)
		if pages := pagesOf(t, got); !slices.Equal(pages, []uint64{5, 6}) {
			t.Errorf("after the slot has gone the ring has %v, want pages 5 and 6", pages)
		}
		m.resetRings(t, len(got))
	})
	t.Run("delete and create", func(t *testing.T) {
		m := newLogMachine(t, logPages, ringVM(ringEntries))
		m.store(t, 5, 2, 1)
		m.setSlot(t, deleted(m.region))
		m.setSlot(t, m.region)
		m.store(t, 9, 1, 1)
		got := m.harvest(t)
		if pages := pagesOf(t, got); !slices.Equal(pages, []uint64{5, 6, 9}) {
			t.Errorf("the ring has %v, want the old slot's 5 and 6, and the new one's 9", pages)
		}
		m.resetRings(t, len(got))
	})
	t.Run("delete and create a shorter one", func(t *testing.T) {
		m := newLogMachine(t, logPages, ringVM(ringEntries))
		m.store(t, logPages-1, 1, 1)
		got := m.harvest(t)
		m.setSlot(t, deleted(m.region))
		short := m.region
		short.Size = 64 << addr.PageShift
		m.setSlot(t, short)
		m.resetRings(t, len(got))
	})
	t.Run("move", func(t *testing.T) {
		m := newLogMachine(t, logPages, ringVM(ringEntries))
		m.store(t, 5, 2, 1)
		m.region.GPA *= 2
		m.setSlot(t, m.region)
		m.store(t, 9, 1, 1)
		if pages := pagesOf(t, m.harvest(t)); !slices.Equal(pages, []uint64{5, 6, 9}) {
			t.Errorf("the ring has %v, want pages 5, 6 and 9", pages)
		}
	})
	t.Run("log off", func(t *testing.T) {
		m := newLogMachine(t, logPages, ringVM(ringEntries))
		m.store(t, 5, 2, 1)
		off := m.region
		off.Flags = 0
		m.setSlot(t, off)
		m.store(t, 9, 1, 1)
		if pages := pagesOf(t, m.harvest(t)); !slices.Equal(pages, []uint64{5, 6}) {
			t.Errorf("the ring has %v, want pages 5 and 6", pages)
		}
	})
}

// TestDirtyRingInitiallySet is why DirtyLogInitiallySet is not for rings: a page that
// the guest could write before the log began is neither set, nor protected, nor
// pushed.
func TestDirtyRingInitiallySet(t *testing.T) {
	m := newLogMachine(t, logPages, func(t testing.TB) *VM {
		vm := logVM(DirtyLogManualProtect | DirtyLogInitiallySet)(t)
		needRing(t, vm)
		if err := vm.EnableDirtyRing(ringEntries); err != nil {
			t.Fatal(err)
		}
		return vm
	})
	off := m.region
	off.Flags = 0
	m.setSlot(t, off)
	m.store(t, 5, 2, 1)
	m.setSlot(t, m.region)
	m.store(t, 5, 1, 1)
	if pages := pagesOf(t, m.harvest(t)); len(pages) != 0 {
		gvmtest.Lack(t, gvmtest.KVMCaps, fmt.Errorf("this KVM logs them all the same: %v", pages))
	}
	m.store(t, 5, 1, 1)
	if pages := pagesOf(t, m.harvest(t)); len(pages) != 0 {
		t.Errorf("a page that was not logged once is logged later: %v", pages)
	}
}

// BenchmarkHarvest times the reading of a ring whose entries are all dirty, beside
// a plain loop over them. The figure is of one entry.
func BenchmarkHarvest(b *testing.B) {
	const entries = 1 << 16
	k, r := newModel(entries, 64, 0)
	fill := func(b *testing.B) {
		b.StopTimer()
		for i := range k.ring {
			k.ring[i].flags = gfnDirty
		}
		b.StartTimer()
	}
	report := func(b *testing.B) {
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/entries, "ns/entry")
	}
	var sum uint64
	b.Run("impl=harvest", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			fill(b)
			if n := r.harvest(func(_ uint32, offset uint64) { sum += offset }); n != entries {
				b.Fatalf("harvested %d of %d", n, entries)
			}
		}
		report(b)
	})
	b.Run("impl=plain", func(b *testing.B) {
		for b.Loop() {
			fill(b)
			for i := range k.ring {
				if e := &k.ring[i]; e.flags == gfnDirty {
					sum += e.offset
					e.flags = gfnReset
				}
			}
		}
		report(b)
	})
}
