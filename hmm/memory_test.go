package hmm_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/hmm"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/notifier"
)

// These tests mirror real memory, as package mm maps it and the kernel shows it.

const pages = 16

// memory is a memory of one region, and its page tables.
type memory struct {
	*mm.Memory
	tables *mm.PageTables
	region addr.HVARange
}

// newMemory skips the test where the kernel does not show its page tables.
func newMemory(t *testing.T, backing mm.Backing) *memory {
	t.Helper()
	m := mm.New(nil)
	r, err := m.NewRegion(mm.RegionConfig{Name: "shared", Size: pages * addr.PageSize, Backing: backing})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	tables, err := m.PageTables()
	if errors.Is(err, syscall.ENOTTY) {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	return &memory{m, tables, r.Range}
}

// part returns n pages from page i.
func (m *memory) part(i, n uint64) addr.HVARange {
	return addr.HVAs(m.region.Start+addr.HVA(i*addr.PageSize), n*addr.PageSize)
}

// shows is a device in user space: what it maps are host addresses. It has a mirror and
// an interval, so that one type does for both layers.
type shows struct {
	notifier.Interval
	hmm.Mirror
	sync.Mutex
	entries map[addr.HVA]hmm.Entry
}

func (s *shows) drop(r addr.HVARange) {
	for hva := range s.entries {
		if hva >= r.Start && hva < r.End {
			delete(s.entries, hva)
		}
	}
}

func (s *shows) Sync(inv *notifier.Invalidation) error {
	s.Lock()
	defer s.Unlock()
	s.drop(inv.Range)
	return nil
}

func (s *shows) Invalidate(inv *notifier.Invalidation, seq uint64) bool {
	s.Lock()
	defer s.Unlock()
	s.SetSeq(seq)
	s.drop(inv.Range)
	return true
}

func (s *shows) install(r addr.HVARange, entries []hmm.Entry) error {
	for i, e := range entries {
		if e.Access() != addr.NoAccess {
			s.entries[r.Start+addr.HVA(i*addr.PageSize)] = e
		}
	}
	return nil
}

// access describes entries by a word for each: "-" nothing, "r", "rw", "E" for an error.
func access(entries []hmm.Entry) string {
	var s []byte
	for _, e := range entries {
		switch {
		case e&hmm.EntryError != 0:
			s = append(s, 'E')
		case e.Access() == addr.ReadWrite:
			s = append(s, 'w')
		case e.Access() == addr.Read:
			s = append(s, 'r')
		default:
			s = append(s, '-')
		}
	}
	return string(s)
}

// TestBitsAgree: the page tables of package mm speak of the same bits.
func TestBitsAgree(t *testing.T) {
	var _ hmm.PageTables = (*mm.PageTables)(nil)
	type bits struct{ Mapped, Present, Writable, Swapped, Huge uint32 }
	want := bits{hmm.RegionMapped, hmm.PTEPresent, hmm.PTEWritable, hmm.PTESwapped, 9 << hmm.OrderShift}
	got := bits{mm.RegionMapped, mm.PTEPresent, mm.PTEWritable, mm.PTESwapped, mm.PTEHuge}
	if got != want {
		t.Errorf("package mm has %+v, want %+v", got, want)
	}
}

// TestRealMemory looks at memory after each of a few operations, and asks for pages.
func TestRealMemory(t *testing.T) {
	for _, backing := range []mm.Backing{mm.Anonymous, mm.Memfd} {
		t.Run(backing.String(), func(t *testing.T) {
			m := newMemory(t, backing)
			ctx := context.Background()
			dev := &shows{entries: map[addr.HVA]hmm.Entry{}}
			if err := m.AddressSpace().Insert(ctx, dev, m.region.Start, m.region.Bytes()); err != nil {
				t.Fatal(err)
			}
			defer dev.Remove()
			q := &hmm.Request{Tables: m.tables, AddressSpace: m.AddressSpace(), Interval: dev}
			look := func(r addr.HVARange, ask hmm.Entry) (string, error) {
				q.Range, q.Default, q.Entries = r, ask, make([]hmm.Entry, r.NPages())
				err := q.Populate(ctx, dev, func(entries []hmm.Entry) error { return dev.install(r, entries) })
				return access(q.Entries), err
			}
			for _, step := range []struct {
				name string
				do   func() error
				r    addr.HVARange
				ask  hmm.Entry
				want string
				err  error
			}{
				{name: "nothing is touched", r: m.region, want: "----------------"},
				{name: "two are written", do: func() error { return errors.Join(m.Store64(m.part(1, 1).Start, 1), m.Store64(m.part(2, 1).Start, 1)) }, r: m.part(0, 4), want: "-ww-"},
				{name: "the next is asked for", r: m.part(2, 2), ask: hmm.ReqFault | hmm.ReqWrite, want: "ww"},
				{name: "a look changes nothing", r: m.part(0, 6), want: "-www--"},
				{name: "discarded", do: func() error { return m.Discard(m.part(1, 1)) }, r: m.part(0, 4), want: "--ww"},
				{name: "protected", do: func() error { return m.Protect(m.part(3, 2), addr.Read) }, r: m.part(2, 3), want: "wr-"},
				{name: "asked for to read", r: m.part(3, 2), ask: hmm.ReqFault, want: "rr"},
				{name: "asked for to write", r: m.part(2, 3), ask: hmm.ReqFault | hmm.ReqWrite, want: "w--", err: syscall.EPERM},
				{name: "protected from all", do: func() error { return m.Protect(m.part(3, 1), addr.NoAccess) }, r: m.part(2, 3), want: "wEr"},
				{name: "that is asked for", r: m.part(2, 3), ask: hmm.ReqFault, want: "wE-", err: syscall.EFAULT},
				{name: "unmapped", do: func() error { return m.Unmap(m.part(5, 2)) }, r: m.part(4, 4), want: "rEE-"},
				{name: "that is asked for too", r: m.part(4, 4), ask: hmm.ReqFault, want: "rEE-", err: syscall.EFAULT},
				{name: "mapped again", do: func() error { return m.Map(m.part(3, 4)) }, r: m.part(3, 4), ask: hmm.ReqFault | hmm.ReqWrite, want: "wwww"},
				{name: "outside", r: addr.HVAs(m.region.End, addr.PageSize), want: "E"},
			} {
				if step.do != nil {
					if err := step.do(); err != nil {
						t.Fatalf("%s: %v", step.name, err)
					}
				}
				got, err := look(step.r, step.ask)
				if got != step.want || !errors.Is(err, step.err) || (err == nil) != (step.err == nil) {
					t.Errorf("%s: the pages are %q, %v; want %q, %v", step.name, got, err, step.want, step.err)
				}
			}
			if got := len(dev.entries); got == 0 {
				t.Error("nothing is installed at the end")
			}
		})
	}
}

// TestRealMemoryIsCoherent mirrors memory, by a mirror and by an interval, while its
// mappings change: whatever a mirror shows is present, and writable if it says so. At the
// end the memory is closed under the mirrors.
func TestRealMemoryIsCoherent(t *testing.T) {
	for _, backing := range []mm.Backing{mm.Anonymous, mm.Memfd} {
		t.Run(backing.String(), func(t *testing.T) { coherent(t, backing) })
	}
}

func coherent(t *testing.T, backing mm.Backing) {
	seed := gvmtest.Seed(t)
	m := newMemory(t, backing)
	as, ctx := m.AddressSpace(), context.Background()
	byMirror, byInterval := &shows{entries: map[addr.HVA]hmm.Entry{}}, &shows{entries: map[addr.HVA]hmm.Entry{}}
	if err := errors.Join(byMirror.Register(ctx, as, byMirror), as.Insert(ctx, byInterval, m.region.Start, m.region.Bytes())); err != nil {
		t.Fatal(err)
	}
	over, failed := make(chan struct{}), atomic.Bool{}
	running := func() bool { return !gvmtest.Closed(over) && !failed.Load() }
	errorf := func(format string, args ...any) {
		if !failed.Swap(true) {
			t.Errorf(format, args...)
		}
	}
	var all sync.WaitGroup
	var looks atomic.Int64
	// check compares what a mirror shows with what the kernel has, which does not change
	// while the mapping lock is held. Nothing of it can be reclaimed: there is no swap in
	// a test that runs so short a time on 16 pages.
	check := func(s *shows) {
		as.RLock()
		defer as.RUnlock()
		s.Lock()
		defer s.Unlock()
		for hva, e := range s.entries {
			_, region, attrs := m.tables.Region(hva)
			var pte uint32
			err := m.tables.Walk(addr.HVAs(hva, addr.PageSize), nil, func(_ addr.HVARange, _ addr.PFN, found uint32) bool {
				pte = found
				return true
			})
			if err != nil || attrs == 0 || e.Access()&^region != 0 || pte&hmm.PTEPresent == 0 || e.Access() == addr.ReadWrite && pte&hmm.PTEWritable == 0 {
				errorf("%v is shown as %v, and is %v with pte %#x, %v", hva, e.Access(), region, pte, err)
			}
		}
	}
	use := func(s *shows, rng *rand.Rand, populate func(ctx context.Context, r addr.HVARange, entries []hmm.Entry) error) {
		for running() {
			first := rng.Uint64N(pages)
			r := m.part(first, 1+rng.Uint64N(min(6, pages-first)))
			entries := make([]hmm.Entry, r.NPages())
			for i := range entries {
				entries[i] = hmm.Entry(rng.Uint64N(4)) << 62
			}
			ctx, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
			err := populate(ctx, r, entries)
			cancel()
			switch {
			case err == nil:
				looks.Add(1)
			case errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.EFAULT), errors.Is(err, syscall.EPERM):
			default:
				errorf("%v", err)
			}
			check(s)
		}
	}
	const mask = hmm.ReqFault | hmm.ReqWrite
	all.Go(func() {
		use(byMirror, rand.New(rand.NewPCG(seed, 1)), func(ctx context.Context, r addr.HVARange, entries []hmm.Entry) error {
			x := &hmm.Range{Range: r, Tables: m.tables, Entries: entries, Mask: mask}
			return x.Populate(ctx, as, byMirror, func(entries []hmm.Entry) error { return byMirror.install(r, entries) })
		})
	})
	all.Go(func() {
		use(byInterval, rand.New(rand.NewPCG(seed, 2)), func(ctx context.Context, r addr.HVARange, entries []hmm.Entry) error {
			q := &hmm.Request{Range: r, Tables: m.tables, AddressSpace: as, Interval: byInterval, Entries: entries, Mask: mask, DropLock: true}
			return q.Populate(ctx, byInterval, func(entries []hmm.Entry) error { return byInterval.install(r, entries) })
		})
	})
	all.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 3))
		for running() {
			first := rng.Uint64N(pages)
			r := m.part(first, 1+rng.Uint64N(min(4, pages-first)))
			_ = []func() error{ // what is not mapped cannot be protected or discarded
				func() error { return m.Discard(r) },
				func() error { return m.Unmap(r) },
				func() error { return m.Map(r) },
				func() error { return m.Map(r) },
				func() error { return m.Protect(r, addr.Read) },
				func() error { return m.Protect(r, addr.NoAccess) },
				func() error { return m.Protect(r, addr.ReadWrite) },
			}[rng.IntN(7)]()
			seen := looks.Load()
			for i := 0; i < 100 && looks.Load() == seen && running(); i++ {
				time.Sleep(10 * time.Microsecond) // unpaced, changes leave no look any time
			}
		}
	})
	lasts := 150 * time.Millisecond
	if testing.Short() {
		lasts /= 4
	}
	time.Sleep(lasts) // a storm lasts some time
	close(over)
	all.Wait()
	if looks.Load() == 0 {
		t.Error("no look has succeeded")
	}
	t.Logf("%d looks", looks.Load())
	h := hmm.Lookup(as)
	if h == nil {
		t.Fatal("the memory has no HMM")
	}
	if err := h.Check(); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() { // before the memory is closed
		h.Put()
		byMirror.Unregister()
		byInterval.Remove()
		notifier.Synchronize()
		if n := as.Stats().Count; n != 1 {
			t.Errorf("the count of the address space is %d", n)
		}
	})
}

// TestMirrorOutlivesRealMemory closes the memory under a mirror and a range.
func TestMirrorOutlivesRealMemory(t *testing.T) {
	m := mm.New(nil)
	region, err := m.NewRegion(mm.RegionConfig{Name: "closed", Size: 4 * addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	as, ctx := m.AddressSpace(), context.Background()
	tables, err := m.PageTables()
	if errors.Is(err, syscall.ENOTTY) {
		m.Close()
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	dev := &shows{entries: map[addr.HVA]hmm.Entry{}}
	if err := dev.Register(ctx, as, dev); err != nil {
		t.Fatal(err)
	}
	r := &hmm.Range{Range: region.Range, Tables: tables, Entries: make([]hmm.Entry, 4), Default: hmm.ReqFault}
	if err := r.Begin(as); err != nil {
		t.Fatal(err)
	}
	as.RLock()
	n, err := r.Fault(false)
	as.RUnlock()
	if n != 4 || err != nil || !r.Valid() || slices.Contains(r.Entries, 0) {
		t.Errorf("Fault returned %d, %v, and found %v", n, err, r.Entries)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	h := hmm.Lookup(as)
	want := hmm.Stats{Refs: 3, Ranges: 1, Exited: true}
	if diff := cmp.Diff(want, h.Stats()); diff != "" {
		t.Errorf("the state after the exit (-want +got):\n%s", diff)
	}
	if err := h.Check(); err != nil {
		t.Error(err)
	}
	h.Put()
	if r.Valid() || r.WaitValid(ctx) || r.Done() {
		t.Error("the range is valid after the memory is closed")
	}
	dev.Unregister()
	notifier.Synchronize()
	if hmm.Lookup(as) != nil || as.Stats().Count != 0 {
		t.Errorf("an HMM is found, or the count of the address space is %d", as.Stats().Count)
	}
}
