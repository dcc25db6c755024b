package kvm

import (
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

// The slot whose writes are logged. Nothing but what a test stores is in it: the
// guest's code and page tables are in slot 0.
const (
	logSlot  = 1
	logGPA   = addr.GPA(0x200000)
	logPages = 3*64 + 7 // the last word of the bitmap is not whole
)

// logMachine is a machine whose guest stores to pages of a slot that is logged.
type logMachine struct {
	*machine
	log    []byte       // the slot's memory
	region MemoryRegion // the slot, with its log on
}

// storeCode adds one to rcx words from rdi, rsi bytes apart and going round from
// rdx to rbx, and exits by an access to MMIO.
var storeCode = []byte{
	0x48, 0xff, 0x07, // incq (%rdi)
	0x48, 0x01, 0xf7, // add %rsi, %rdi
	0x48, 0x39, 0xd7, // cmp %rdx, %rdi
	0x72, 0x03, // jb over
	0x48, 0x89, 0xdf, // mov %rbx, %rdi
	0x48, 0xff, 0xc9, // over: dec %rcx
	0x75, 0xed, // jnz start
	0x89, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, // mov %eax, mmio
}

// newLogMachine returns a machine with a logged slot of npages, on a VM of newVM.
func newLogMachine(t testing.TB, npages int, newVM func(testing.TB) *VM) *logMachine {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	log := newRAM(t, npages*addr.PageSize)
	if err := unix.Madvise(log, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
	m := &logMachine{
		machine: newMachineOn(t, newVM, storeCode...),
		log:     log,
		region:  MemoryRegion{Slot: logSlot, Flags: MemLogDirtyPages, GPA: logGPA, Size: uint64(len(log)), HVA: hvaOf(log)},
	}
	m.enterUserMode(t)
	const largeUser = 0x87
	for i := 1; i < 512; i++ { // the identity map goes on to 1 GiB
		*word(m.ram, tablesAt[2]+8*i) = uint32(i)<<21 | largeUser
	}
	m.setSlot(t, m.region)
	return m
}

func (m *logMachine) setSlot(t testing.TB, r MemoryRegion) {
	t.Helper()
	if err := m.SetMemoryRegion(r); err != nil {
		t.Fatal(err)
	}
}

func (m *logMachine) npages() int { return len(m.log) / addr.PageSize }

// start makes the guest about to store to n pages, from first on and stride apart.
func (m *logMachine) start(t testing.TB, first, n, stride int) {
	t.Helper()
	begin := uint64(m.region.GPA)
	if err := m.vcpu.SetRegs(Regs{
		Rip: codeAt, Rflags: 2,
		Rdi: begin + uint64(first)<<addr.PageShift, Rsi: uint64(stride) << addr.PageShift, Rcx: uint64(n),
		Rbx: begin, Rdx: begin + uint64(len(m.log)),
	}); err != nil {
		t.Fatal(err)
	}
}

// checkEnd fails the test if exit is not the one by which the guest ends.
func (m *logMachine) checkEnd(t testing.TB, exit Exit) {
	t.Helper()
	if e, ok := exit.(*MMIOExit); !ok || e.GPA != mmio || !e.Write {
		t.Fatalf("the guest ended with %v, want a write to %v", exit, addr.GPA(mmio))
	}
}

// store has the guest store to n pages, from first on and stride apart.
func (m *logMachine) store(t testing.TB, first, n, stride int) {
	t.Helper()
	m.start(t, first, n, stride)
	m.checkEnd(t, run(t, m.vcpu))
}

// counter returns how often the guest has stored to a page.
func (m *logMachine) counter(page uint64) uint32 {
	return atomic.LoadUint32(word(m.log, int(page)<<addr.PageShift))
}

func (m *logMachine) bitmap() []uint64 { return make([]uint64, DirtyLogWords(uint64(m.npages()))) }

// get returns the pages that GetDirtyLog says are dirty.
func (m *logMachine) get(t testing.TB) []uint64 {
	t.Helper()
	b := m.bitmap()
	if err := m.GetDirtyLog(logSlot, b); err != nil {
		t.Fatal(err)
	}
	return pagesIn(b)
}

func (m *logMachine) wantLog(t testing.TB, when string, want ...uint64) {
	t.Helper()
	if got := m.get(t); !slices.Equal(got, want) {
		t.Errorf("%s the log has %v, want %v", when, got, want)
	}
}

// clear clears the given pages, all in one word's run of the bitmap.
func (m *logMachine) clear(t testing.TB, pages ...uint64) {
	t.Helper()
	b := m.bitmap()
	for _, p := range pages {
		b[p/64] |= 1 << (p % 64)
	}
	if err := m.ClearDirtyLog(logSlot, 0, uint32(m.npages()), b); err != nil {
		t.Fatal(err)
	}
}

func pagesIn(bitmap []uint64) (pages []uint64) {
	for i, w := range bitmap {
		for ; w != 0; w &= w - 1 {
			pages = append(pages, uint64(64*i+bits.TrailingZeros64(w)))
		}
	}
	return pages
}

// logVM returns what makes a VM whose bitmaps work as flags say.
func logVM(flags DirtyLogFlags) func(testing.TB) *VM {
	return func(t testing.TB) *VM {
		t.Helper()
		vm := newVM(t)
		if flags == 0 {
			return vm
		}
		n, err := vm.CheckExtension(CapManualDirtyLogProtect2)
		if err != nil {
			t.Fatal(err)
		}
		if DirtyLogFlags(n)&flags != flags {
			gvmtest.Lack(t, gvmtest.KVMCaps, fmt.Errorf("%v has %v; this needs %v", CapManualDirtyLogProtect2, DirtyLogFlags(n), flags))
		}
		if err := vm.EnableManualDirtyLogProtect(flags); err != nil {
			t.Fatal(err)
		}
		return vm
	}
}

func TestDirtyLogFlagsString(t *testing.T) {
	for flags, want := range map[DirtyLogFlags]string{
		0:                     "0",
		DirtyLogManualProtect: "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE",
		DirtyLogManualProtect | DirtyLogInitiallySet: "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE|KVM_DIRTY_LOG_INITIALLY_SET",
		DirtyLogInitiallySet | 1<<40:                 "KVM_DIRTY_LOG_INITIALLY_SET|0x10000000000",
	} {
		if got := flags.String(); got != want {
			t.Errorf("DirtyLogFlags(%d) = %q, want %q", uint64(flags), got, want)
		}
	}
}

func TestDirtyLogWords(t *testing.T) {
	for npages, want := range map[uint64]int{0: 0, 1: 1, 63: 1, 64: 1, 65: 2, 1<<31 - 1: 1 << 25} {
		if got := DirtyLogWords(npages); got != want {
			t.Errorf("DirtyLogWords(%d) = %d, want %d", npages, got, want)
		}
	}
}

// TestDirtyBitmapLength: a bitmap that is not as long as the VM knows the slot to be
// is refused before the kernel is asked, whatever was done to the slot before.
func TestDirtyBitmapLength(t *testing.T) {
	_, vm, c, _ := onDescriptor(t, 1<<30) // whatever gets to the kernel is EBADF
	t.Cleanup(func() { unix.Munmap(c.fd.mem) })
	size := func(npages uint64) {
		vm.slotsMu.Lock()
		defer vm.slotsMu.Unlock()
		vm.noteSlotLocked(MemoryRegion{Slot: 1 << 16, Size: npages << addr.PageShift})
	}
	for name, tt := range map[string]struct {
		npages []uint64 // the slot's lengths, one after the other
		words  int
		want   unix.Errno
	}{
		"as long as the slot":    {[]uint64{65}, 2, unix.EBADF},
		"too short":              {[]uint64{65}, 1, unix.EINVAL},
		"too long":               {[]uint64{65}, 3, unix.EINVAL},
		"none":                   {[]uint64{1}, 0, unix.EINVAL},
		"grown":                  {[]uint64{64, 0, 65}, 1, unix.EINVAL},
		"shrunk":                 {[]uint64{65, 0, 64}, 1, unix.EBADF},
		"deleted, and not known": {[]uint64{65, 0}, 1, unix.EBADF},
	} {
		t.Run(name, func(t *testing.T) {
			for _, n := range tt.npages {
				size(n)
			}
			if err := vm.GetDirtyLog(1<<16, make([]uint64, tt.words)); !errors.Is(err, tt.want) {
				t.Errorf("GetDirtyLog = %v, want %v", err, tt.want)
			}
		})
	}
	for words, want := range map[int]unix.Errno{0: unix.EINVAL, 1: unix.EINVAL, 2: unix.EBADF, 3: unix.EINVAL} {
		if err := vm.ClearDirtyLog(1<<16, 0, 65, make([]uint64, words)); !errors.Is(err, want) {
			t.Errorf("ClearDirtyLog of 65 pages with %d words = %v, want %v", words, err, want)
		}
	}
	const want = "KVM_GET_DIRTY_LOG: slot 65536, 65 pages, bitmap of 1 words: invalid argument"
	size(65)
	if err := vm.GetDirtyLog(1<<16, make([]uint64, 1)); err == nil || err.Error() != want {
		t.Errorf("GetDirtyLog = %v\nwant %s", err, want)
	}
}

// TestDirtyClassic: the log has the pages stored to, and once.
func TestDirtyClassic(t *testing.T) {
	m := newLogMachine(t, logPages, logVM(0))
	m.wantLog(t, "before any store")
	m.store(t, 3, 4, 50)
	m.store(t, logPages-1, 1, 1)
	m.store(t, 53, 1, 1)
	m.wantLog(t, "after the stores", 3, 53, 103, 153, logPages-1)
	m.wantLog(t, "when it was just read")
	m.store(t, 53, 1, 1)
	m.wantLog(t, "after another store", 53)
	if got := m.counter(53); got != 3 {
		t.Errorf("page 53 counts %d stores, want 3", got)
	}

	b := make([]uint64, DirtyLogWords(logPages)+2)
	b[0], b[len(b)-1] = ^uint64(0), ^uint64(0)
	m.store(t, 0, logPages, 1)
	if err := m.GetDirtyLog(logSlot, b[1:len(b)-1]); err != nil {
		t.Fatal(err)
	}
	if got := len(pagesIn(b[1 : len(b)-1])); got != logPages || b[0] != ^uint64(0) || b[len(b)-1] != ^uint64(0) {
		t.Errorf("the log of all pages has %d of %d, beside it are %#x and %#x", got, logPages, b[0], b[len(b)-1])
	}
}

// TestDirtyManual: only ClearDirtyLog clears, and only what it is given.
func TestDirtyManual(t *testing.T) {
	m := newLogMachine(t, logPages, logVM(DirtyLogManualProtect))
	m.store(t, 3, 4, 50)
	m.wantLog(t, "after the stores", 3, 53, 103, 153)
	m.wantLog(t, "when it was just read", 3, 53, 103, 153)
	m.clear(t, 53, 54, 153)
	m.wantLog(t, "with 53 and 153 cleared", 3, 103)
	m.store(t, 53, 2, 1)
	m.wantLog(t, "with 53 and 54 stored to", 3, 53, 54, 103)

	ones := []uint64{^uint64(0), ^uint64(0)}
	if err := m.ClearDirtyLog(logSlot, 64, 64, ones[:1]); err != nil {
		t.Fatal(err)
	}
	m.wantLog(t, "with its second word cleared", 3, 53, 54)
	m.store(t, 190, 4, 1)
	if err := m.ClearDirtyLog(logSlot, 192, logPages-192, ones[:1]); err != nil {
		t.Fatal(err)
	}
	m.wantLog(t, "with its last word cleared", 3, 53, 54, 190, 191)
	for name, tt := range map[string]struct {
		first  uint64
		npages uint32
	}{
		"part of a word":         {0, 7},
		"from the middle":        {1, 64},
		"beyond the slot":        {192, 64},
		"far beyond the slot":    {1 << 40, 64},
		"short of the slot":      {192, logPages - 192 - 1},
		"more than the slot has": {64, 192},
	} {
		b := make([]uint64, DirtyLogWords(uint64(tt.npages)))
		if err := m.ClearDirtyLog(logSlot, tt.first, tt.npages, b); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: ClearDirtyLog of %d pages from %d = %v, want EINVAL", name, tt.npages, tt.first, err)
		}
	}
	m.wantLog(t, "after what was refused", 3, 53, 54, 190, 191)

	if err := m.EnableManualDirtyLogProtect(0); err != nil {
		t.Fatal(err)
	}
	m.wantLog(t, "back in the classic way", 3, 53, 54, 190, 191)
	m.wantLog(t, "read the classic way")
}

// TestDirtyInitiallySet: at first all pages are dirty, and a page is logged when
// it has been cleared.
func TestDirtyInitiallySet(t *testing.T) {
	m := newLogMachine(t, logPages, logVM(DirtyLogManualProtect|DirtyLogInitiallySet))
	all := make([]uint64, logPages)
	for p := range all {
		all[p] = uint64(p)
	}
	m.wantLog(t, "at first", all...)
	m.store(t, 7, 1, 1)
	m.wantLog(t, "after a store", all...)
	m.clear(t, all...)
	m.wantLog(t, "with all cleared")
	m.store(t, 7, 2, 1)
	m.wantLog(t, "after stores", 7, 8)
}

func TestDirtyLogErrors(t *testing.T) {
	m := newLogMachine(t, logPages, logVM(0))
	one := make([]uint64, 1)
	for name, tt := range map[string]struct {
		slot   uint32
		bitmap []uint64
		want   unix.Errno
	}{
		"slot without a log":      {0, make([]uint64, DirtyLogWords(ramEnd>>addr.PageShift)), unix.ENOENT},
		"no slot":                 {2, one, unix.ENOENT},
		"no such slot":            {0xffff, one, unix.EINVAL},
		"no such address space":   {9 << 16, one, unix.EINVAL},
		"bitmap for another slot": {logSlot, one, unix.EINVAL},
	} {
		var e *Error
		if err := m.GetDirtyLog(tt.slot, tt.bitmap); !errors.As(err, &e) || e.Errno != tt.want || e.Op != "KVM_GET_DIRTY_LOG" {
			t.Errorf("%s: GetDirtyLog = %v, want %v", name, err, tt.want)
		}
	}
	for name, tt := range map[string]struct {
		slot uint32
		want unix.Errno
	}{
		"slot without a log":    {0, unix.ENOENT},
		"no slot":               {2, unix.ENOENT},
		"no such slot":          {0xffff, unix.EINVAL},
		"no such address space": {9 << 16, unix.EINVAL},
	} {
		want := fmt.Sprintf("KVM_CLEAR_DIRTY_LOG: slot %d, pages [0, 64): %v", tt.slot, tt.want)
		if err := m.ClearDirtyLog(tt.slot, 0, 64, one); err == nil || err.Error() != want {
			t.Errorf("%s: ClearDirtyLog = %v, want %s", name, err, want)
		}
	}
	const want = "KVM_ENABLE_CAP: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET: invalid argument"
	if err := m.EnableManualDirtyLogProtect(DirtyLogInitiallySet); err == nil || err.Error() != want {
		t.Errorf("EnableManualDirtyLogProtect = %v, want %s", err, want)
	}
}

// TestDirtySlotChanges: what becomes of a bitmap that has not been read. Each row
// but the last two is why a slot is read before it is changed.
func TestDirtySlotChanges(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(r MemoryRegion) []MemoryRegion
		want   []uint64
	}{
		"delete and create": {func(r MemoryRegion) []MemoryRegion {
			gone := r
			gone.Size = 0
			return []MemoryRegion{gone, r}
		}, nil},
		"log off and on": {func(r MemoryRegion) []MemoryRegion {
			off := r
			off.Flags = 0
			return []MemoryRegion{off, r}
		}, nil},
		"nothing new": {func(r MemoryRegion) []MemoryRegion { return []MemoryRegion{r} }, []uint64{5, 6}},
		"move": {func(r MemoryRegion) []MemoryRegion {
			r.GPA *= 2
			return []MemoryRegion{r}
		}, []uint64{5, 6}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newLogMachine(t, logPages, logVM(0))
			m.store(t, 5, 2, 1)
			for _, r := range tt.change(m.region) {
				m.setSlot(t, r)
				m.region = r
			}
			m.wantLog(t, "after the change", tt.want...)
			m.store(t, 9, 1, 1)
			m.wantLog(t, "after a store", 9)
		})
	}
	t.Run("delete", func(t *testing.T) {
		m := newLogMachine(t, logPages, logVM(0))
		m.store(t, 5, 2, 1)
		gone := m.region
		gone.Size = 0
		m.setSlot(t, gone)
		if err := m.GetDirtyLog(logSlot, m.bitmap()); !errors.Is(err, unix.ENOENT) {
			t.Errorf("GetDirtyLog of a deleted slot = %v, want ENOENT", err)
		}
	})
	t.Run("longer than before", func(t *testing.T) {
		m := newLogMachine(t, logPages, logVM(0))
		short := m.region
		short.Size = 64 << addr.PageShift
		m.setSlot(t, MemoryRegion{Slot: logSlot})
		m.setSlot(t, short)
		if err := m.GetDirtyLog(logSlot, m.bitmap()); !errors.Is(err, unix.EINVAL) {
			t.Errorf("GetDirtyLog with the bitmap of a longer slot = %v, want EINVAL", err)
		}
		m.setSlot(t, MemoryRegion{Slot: logSlot})
		m.setSlot(t, m.region)
		if err := m.GetDirtyLog(logSlot, make([]uint64, 1)); !errors.Is(err, unix.EINVAL) {
			t.Errorf("GetDirtyLog with the bitmap of a shorter slot = %v, want EINVAL", err)
		}
	})
}

// TestDirtyEnableLate: the log of a slot in use begins with the next store, also to
// a page that the guest could write before.
func TestDirtyEnableLate(t *testing.T) {
	m := newLogMachine(t, logPages, logVM(0))
	off := m.region
	off.Flags = 0
	m.setSlot(t, off)
	m.store(t, 0, logPages, 1)
	m.setSlot(t, m.region)
	m.wantLog(t, "when it begins")
	m.store(t, 17, 2, 100)
	m.wantLog(t, "after stores", 17, 117)
}

// TestDirtyAlias: two slots of the same memory have a log each, of what was stored
// through them.
func TestDirtyAlias(t *testing.T) {
	m := newLogMachine(t, logPages, logVM(0))
	alias := m.region
	alias.Slot, alias.GPA = logSlot+1, 2*logGPA
	m.setSlot(t, alias)
	m.region.GPA = alias.GPA
	m.store(t, 5, 1, 1)
	m.wantLog(t, "after a store through the alias")
	b := m.bitmap()
	if err := m.GetDirtyLog(alias.Slot, b); err != nil || !slices.Equal(pagesIn(b), []uint64{5}) {
		t.Errorf("the alias's log has %v, %v; want page 5", pagesIn(b), err)
	}
}

// logMode is a way of logging, with the order of calls that loses nothing.
type logMode struct {
	newVM func(testing.TB) *VM

	// collect adds the pages that were written to set. Between the part that reads
	// the log and the part that protects the pages again it calls between, if there
	// are two parts.
	collect func(t testing.TB, m *logMachine, set map[uint64]bool, between func())
}

func collectClassic(t testing.TB, m *logMachine, set map[uint64]bool, _ func()) {
	for _, p := range m.get(t) {
		set[p] = true
	}
}

func collectManual(t testing.TB, m *logMachine, set map[uint64]bool, between func()) {
	b := m.bitmap()
	if err := m.GetDirtyLog(logSlot, b); err != nil {
		t.Error(err)
	}
	between()
	if err := m.ClearDirtyLog(logSlot, 0, uint32(m.npages()), b); err != nil {
		t.Error(err)
	}
	for _, p := range pagesIn(b) {
		set[p] = true
	}
}

func collectRing(t testing.TB, m *logMachine, set map[uint64]bool, between func()) {
	n, err := m.ring(t).Harvest(func(_ uint32, offset uint64) { set[offset] = true })
	if err != nil {
		t.Error(err)
	}
	between()
	m.resetRings(t, n)
}

var logModes = map[string]logMode{
	"classic":       {newVM: logVM(0), collect: collectClassic},
	"manual":        {newVM: logVM(DirtyLogManualProtect), collect: collectManual},
	"initially set": {newVM: logVM(DirtyLogManualProtect | DirtyLogInitiallySet), collect: collectManual},
	"ring":          {newVM: ringVM(ringEntries), collect: collectRing},
}

// TestDirtyHostStores: a store of the host is in no log (K20).
func TestDirtyHostStores(t *testing.T) {
	for name, mode := range logModes {
		t.Run(name, func(t *testing.T) {
			m := newLogMachine(t, logPages, mode.newVM)
			m.store(t, 0, 1, 1)
			set := map[uint64]bool{}
			mode.collect(t, m, set, func() {})
			clear(set)
			m.log[0], m.log[5<<addr.PageShift] = 99, 99 // the guest has the one mapped, and not the other
			mode.collect(t, m, set, func() {})
			if len(set) != 0 {
				t.Errorf("after stores of the host to pages 0 and 5 the log has %v", slices.Sorted(maps.Keys(set)))
			}
			m.store(t, 5, 1, 1)
			if got := m.counter(5); got != 100 {
				t.Errorf("the guest made %d of 99", got)
			}
		})
	}
}

// TestDirtyV10: a copy of the guest's memory to which the pages of every log are
// copied, while the guest runs, is the guest's memory once the guest has stopped
// and the log was read a last time.
func TestDirtyV10(t *testing.T) {
	for name, mode := range logModes {
		t.Run(name, func(t *testing.T) {
			m := newLogMachine(t, logPages, mode.newVM)
			var (
				copied  = make([]uint32, logPages)
				set     = map[uint64]bool{}
				logs    int
				reports int
			)
			refresh := func() {
				clear(set)
				mode.collect(t, m, set, func() {})
				for p := range set {
					copied[p] = m.counter(p)
				}
				logs++
				reports += len(set)
			}
			stores := func() (sum uint32) {
				for p := range uint64(logPages) {
					sum += m.counter(p)
				}
				return sum
			}
			for round := range 60 {
				var stopped atomic.Bool
				m.start(t, round, 2*logPages, 2*round+1)
				harvester := gvmtest.Background(func() {
					for next := stores(); !stopped.Load(); runtime.Gosched() {
						if now := stores(); now >= next { // on some hosts the guest gets nowhere without
							refresh()
							next = now + 3
						}
					}
				})
				exit := run(t, m.vcpu)
				for exit.Reason() == ReasonDirtyRingFull {
					runtime.Gosched()
					exit = run(t, m.vcpu)
				}
				stopped.Store(true)
				<-harvester
				m.checkEnd(t, exit)
				refresh()
				for p := range uint64(logPages) {
					if got := m.counter(p); copied[p] != got {
						t.Fatalf("round %d: page %d counts %d stores, its copy %d (after %d logs)", round, p, got, copied[p], logs)
					}
				}
			}
			t.Logf("%d logs with %d pages", logs, reports)
		})
	}
}

// TestDirtyShortenedOrder: a copy made between the two parts of the order lacks a
// store that no log has (V13). The log may have it all the same if the host has
// changed its mapping of the page meanwhile; so it is tried some times.
func TestDirtyShortenedOrder(t *testing.T) {
	for _, name := range []string{"manual", "ring"} {
		t.Run(name, func(t *testing.T) {
			mode := logModes[name]
			m := newLogMachine(t, logPages, mode.newVM)
			for range 10 {
				m.store(t, 5, 1, 1)
				var copied uint32
				first, later := map[uint64]bool{}, map[uint64]bool{}
				mode.collect(t, m, first, func() {
					copied = m.counter(5)
					m.store(t, 5, 1, 1)
				})
				mode.collect(t, m, later, func() {})
				if !first[5] {
					t.Fatalf("the log does not have page 5, but %v", first)
				}
				if !later[5] && copied != m.counter(5) {
					return
				}
			}
			t.Error("ten copies that were made too early lacked nothing")
		})
	}
}

// TestDirtyAllocations: what is done for every log leaves nothing to collect.
func TestDirtyAllocations(t *testing.T) {
	ring := newLogMachine(t, logPages, ringVM(ringEntries))
	ring.store(t, 0, 30, 1)
	r := ring.ring(t)
	m := newLogMachine(t, logPages, logVM(0))
	b := m.bitmap()
	allocates := func(what string, f func()) {
		t.Helper()
		if n := testing.AllocsPerRun(20, f); n != 0 {
			t.Errorf("%s allocates %v times", what, n)
		}
	}
	allocates("GetDirtyLog", func() {
		if err := m.GetDirtyLog(logSlot, b); err != nil {
			t.Error(err)
		}
	})
	allocates("Harvest and ResetDirtyRings", func() {
		if _, err := r.Harvest(func(uint32, uint64) {}); err != nil {
			t.Error(err)
		}
		if _, err := ring.ResetDirtyRings(); err != nil {
			t.Error(err)
		}
	})
	allocates("ClearDirtyLog", func() {
		if err := m.ClearDirtyLog(logSlot, 0, logPages, b); err != nil {
			t.Error(err)
		}
	})
}

// TestDirtyHarvestAllocations is TestDirtyAllocations for what needs no KVM.
func TestDirtyHarvestAllocations(t *testing.T) {
	k, reader := newModel(8, 1, 0)
	var f fd
	f.init(-1, nil)
	r := &DirtyRing{fd: &f, reader: *reader}
	var sum uint64
	if n := testing.AllocsPerRun(20, func() {
		k.push()
		if n, err := r.Harvest(func(_ uint32, offset uint64) { sum += offset }); n != 1 || err != nil {
			t.Errorf("Harvest = %d, %v; want 1", n, err)
		}
		k.takeBack()
	}); n != 0 {
		t.Errorf("Harvest allocates %v times", n)
	}
}

// BenchmarkDirtyLog times what it takes to learn which pages of 64 MiB were written
// and to have the next writes logged, with the guest stopped: the three ways of it
// beside one another.
func BenchmarkDirtyLog(b *testing.B) {
	const pages = 64 << 20 >> addr.PageShift
	for _, way := range []struct {
		log   string
		newVM func(testing.TB) *VM
	}{{"classic", logVM(0)}, {"manual", logVM(DirtyLogManualProtect)}, {"ring", ringVM(2 * pages)}} {
		for _, dirty := range []struct {
			name string
			n    int
		}{{"none", 0}, {"1%", pages / 100}, {"all", pages}} {
			b.Run(fmt.Sprintf("log=%s/dirty=%s", way.log, dirty.name), func(b *testing.B) {
				m := newLogMachine(b, pages, way.newVM)
				if err := unix.Madvise(m.log, unix.MADV_POPULATE_WRITE); err != nil && !errors.Is(err, unix.EINVAL) {
					b.Fatal(err)
				}
				bitmap := m.bitmap()
				var collect func() int
				if way.log == "ring" {
					ring := m.ring(b)
					collect = func() int {
						n, err := ring.Harvest(func(uint32, uint64) {})
						if err != nil {
							b.Fatal(err)
						}
						m.resetRings(b, n)
						return n
					}
				} else {
					collect = func() (n int) {
						if err := m.GetDirtyLog(logSlot, bitmap); err != nil {
							b.Fatal(err)
						}
						if way.log == "manual" {
							if err := m.ClearDirtyLog(logSlot, 0, pages, bitmap); err != nil {
								b.Fatal(err)
							}
						}
						return -1
					}
				}
				b.ReportAllocs()
				for b.Loop() {
					b.StopTimer()
					if dirty.n > 0 {
						m.store(b, 0, dirty.n, pages/dirty.n)
					}
					b.StartTimer()
					if n := collect(); n >= 0 && n < dirty.n {
						b.Fatalf("%d pages are dirty, want %d", n, dirty.n)
					}
				}
			})
		}
	}
}
