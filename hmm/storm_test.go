package hmm

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

const stormPages = 16

// mutator changes page tables at random, in brackets.
type mutator struct {
	w   *world
	rng *rand.Rand
}

// change makes one change. Most are made under the lock of the file, and so meet looks
// that hold the mapping lock.
func (u *mutator) change() {
	first := u.rng.Uint64N(stormPages)
	r := at(first, 1+u.rng.Uint64N(min(4, stormPages-first)))
	inv := &notifier.Invalidation{Range: r, Event: notifier.Clear, NonBlockable: u.rng.IntN(8) == 0}
	if u.rng.IntN(4) == 0 {
		u.w.Lock()
		defer u.w.Unlock()
		if u.w.InvalidateRangeStart(inv) == nil {
			u.w.tables.setRegions(u.regions(r)...)
			u.w.tables.set(r, 0)
			u.w.InvalidateRangeEnd(inv)
		}
		return
	}
	// With NonBlockable it may be refused.
	_ = u.w.invalidate(inv, func() {
		u.pages(r)
		if u.rng.IntN(4) == 0 {
			runtime.Gosched()
		}
	})
}

// regions returns the regions with r as another kind, or all as they were at first.
func (u *mutator) regions(r addr.HVARange) []region {
	whole := plain(0, stormPages)
	middle := region{r: r, access: addr.ReadWrite, attrs: RegionMapped}
	switch u.rng.IntN(8) {
	case 0:
		middle.access = addr.NoAccess
	case 1:
		middle.access = addr.Read
	case 2:
		middle.attrs |= RegionSpecial
	case 3:
		middle.attrs = 0
	default:
		return []region{whole}
	}
	regions := []region{
		{addr.HVARange{Start: whole.r.Start, End: r.Start}, addr.ReadWrite, RegionMapped},
		{addr.HVARange{Start: r.End, End: whole.r.End}, addr.ReadWrite, RegionMapped},
	}
	if middle.attrs == 0 {
		return regions
	}
	return []region{regions[0], middle, regions[1]}
}

// pages changes the pages of r, which a bracket is open for.
func (u *mutator) pages(r addr.HVARange) {
	t := u.w.tables
	t.mu.Lock()
	defer t.mu.Unlock()
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		one := addr.HVAs(hva, addr.PageSize)
		p := t.pages[hva]
		if g := t.region(hva); g.access != addr.ReadWrite || g.attrs != RegionMapped {
			continue
		}
		switch u.rng.IntN(9) {
		case 0:
			t.setLocked(one, 0)
		case 1:
			t.setLocked(one, PTESwapped)
		case 2:
			t.setLocked(one, PTEPresent|PTEWritable)
		case 3:
			t.setLocked(one, PTEDevice|PTEWritable)
		case 4:
			t.pages[hva] = page{PTEPresent, zeroFrame}
		case 5:
			t.setLocked(one, PTEMigrating)
		case 6:
			t.setLocked(one, PTEForeign)
		case 7:
			if p.pte&PTEPresent != 0 {
				t.pages[hva] = page{p.pte &^ PTEWritable, p.frame}
			}
		case 8:
			if p.pte&PTEPresent != 0 {
				t.pages[hva] = page{p.pte | PTEHinted, p.frame}
			}
		}
	}
}

// TestM8StormIsCoherent: while page tables change, whatever a mirror shows is what the
// page tables have, at every moment that its driver holds the lock. It ends with an exit
// that meets all of it: M7.
func TestM8StormIsCoherent(t *testing.T) {
	seed := gvmtest.Seed(t)
	rounds := 4
	for round := range rounds {
		stormRound(t, seed+uint64(round), gvmtest.StormLasts(240*time.Millisecond)/time.Duration(rounds))
		if t.Failed() {
			return
		}
	}
}

func stormRound(t *testing.T, seed uint64, lasts time.Duration) {
	w := newWorld(sound, plain(0, stormPages))
	stream := uint64(0)
	source := func() *rand.Rand { stream++; return rand.New(rand.NewPCG(seed, stream)) }
	over := make(chan struct{})
	running := func() bool { return !gvmtest.Closed(over) && !w.broken() }
	var all sync.WaitGroup
	for range 3 {
		u := &mutator{w, source()}
		all.Go(func() {
			for running() {
				u.change()
				// Were changes not paced, no look would ever succeed.
				for range u.rng.IntN(32) {
					runtime.Gosched()
				}
			}
		})
	}
	var installed, refused, tries atomic.Int64
	// use looks at random ranges until the storm is over or the address space has exited,
	// by populate, which installs what it finds, and checks the mirror in between.
	use := func(d *device, rng *rand.Rand, populate func(ctx context.Context, r addr.HVARange, entries []Entry) error) {
		for running() {
			first := rng.Uint64N(stormPages)
			r := at(first, 1+rng.Uint64N(min(6, stormPages-first)))
			entries := make([]Entry, r.NPages())
			for i := range entries {
				entries[i] = Entry(rng.Uint64N(4)) << 62 // nothing, to write alone, to read, to write
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
			err := populate(ctx, r, entries)
			cancel()
			tries.Add(1)
			switch {
			case err == nil:
				installed.Add(1)
			case errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.EFAULT), errors.Is(err, syscall.EPERM):
				refused.Add(1)
			default:
				w.errorf("Populate of %v: %w", r, err)
			}
			w.must(d.check())
		}
	}
	for range 2 {
		d, rng := newDevice(w.tables), source()
		d.onSync = func(inv *notifier.Invalidation) error {
			if inv.NonBlockable && d.mu.TryLock() {
				d.mu.Unlock()
			} else if inv.NonBlockable {
				return syscall.EAGAIN
			}
			return nil
		}
		w.register(d)
		all.Go(func() {
			defer d.Unregister()
			use(d, rng, func(ctx context.Context, r addr.HVARange, entries []Entry) error {
				x := &Range{Range: r, Tables: w.tables, Entries: entries, Mask: askedWrite, Owner: theDevice}
				return w.reg.populate(ctx, x, w.AddressSpace, d, func(entries []Entry) error { return d.install(r, entries) })
			})
		})
	}
	for i := range 2 {
		d, rng := w.newInterval(at(0, stormPages)), source()
		all.Go(func() {
			defer d.Remove()
			use(d, rng, func(ctx context.Context, r addr.HVARange, entries []Entry) error {
				q := w.newRequest(d, r, 0)
				q.Entries, q.Mask, q.DropLock = entries, askedWrite, i == 1
				return q.Populate(ctx, d, func(entries []Entry) error { return d.install(r, entries) })
			})
		})
	}
	time.Sleep(lasts / 2) // a storm lasts some time
	exited := w.background(w.exit)
	if !gvmtest.ClosedWithin(exited, gvmtest.Limit) {
		t.Fatal("the exit does not end")
	}
	time.Sleep(lasts / 2)
	close(over)
	all.Wait()
	if err := w.finish(); err != nil {
		t.Errorf("with -seed %d: %v", seed, err)
	}
	if installed.Load() == 0 {
		t.Errorf("with -seed %d: of %d looks none succeeded", seed, tries.Load())
	}
	t.Logf("%d looks installed, %d refused", installed.Load(), refused.Load())
}

// TestM3StormOfRegistrations: HMMs are made and freed while others look for them, changes
// are told, and mirrors are unregistered by two at a time, until the address space exits.
func TestM3StormOfRegistrations(t *testing.T) {
	w := newWorld(sound, plain(0, stormPages))
	var all sync.WaitGroup
	var made atomic.Int64
	over := make(chan struct{})
	work := func(round func()) {
		all.Go(func() {
			for !gvmtest.Closed(over) {
				round()
			}
		})
	}
	w.reg.step = func(name string, _ *HMM) {
		if name == "allocated" {
			made.Add(1)
		}
	}
	for range 2 {
		d := newDevice(w.tables)
		work(func() {
			err := w.reg.register(context.Background(), &d.Mirror, w.AddressSpace, d)
			if err != nil && !errors.Is(err, syscall.ESRCH) {
				w.must(err)
			}
			var both sync.WaitGroup
			both.Go(d.Unregister)
			d.Unregister()
			both.Wait()
			if d.hmm.Load() != nil {
				w.errorf("a mirror is registered after Unregister")
			}
		})
	}
	work(func() { w.bracket(at(0, 1), runtime.Gosched) })
	work(func() {
		if h := w.reg.lookup(w.AddressSpace, byHolder); h != nil {
			h.Get()
			h.Put()
			h.Put()
		}
		r := w.newRange(at(0, 1), 0)
		if err := w.reg.begin(r, w.AddressSpace); err == nil {
			r.Done()
		}
	})
	lasts := gvmtest.StormLasts(160 * time.Millisecond)
	time.Sleep(lasts / 2) // a storm lasts some time
	w.exit()
	time.Sleep(lasts / 2)
	close(over)
	all.Wait()
	if err := w.finish(); err != nil {
		t.Error(err)
	}
	if n := w.freed(); int64(n) != made.Load() {
		t.Errorf("%d HMMs were made, and %d freed", made.Load(), n)
	}
	t.Logf("%d HMMs were made", made.Load())
}

// FuzzWalk makes regions, pages and requests of bytes, looks at them in each way, and
// compares each page with what it would be alone. A hole does not have what is asked of
// one of its pages done to that page alone, so there is none in these page tables.
func FuzzWalk(f *testing.F) {
	f.Add([]byte{0, 11, 12, 12, 9, 1, 0x33, 0x00, 0x12, 0x01, 0x10, 0x20})
	f.Add([]byte{3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11})
	f.Fuzz(func(t *testing.T, data []byte) {
		next := func() (b byte) {
			if len(data) > 0 {
				b, data = data[0], data[1:]
			}
			return b
		}
		all := [...]Entry{0, ReqFault, ReqWrite, ReqFault | ReqWrite}
		setup := next()
		def, mask := all[setup&3], all[setup>>2&3]
		l := look(setup >> 4 % byte(numLooks))
		npages := int(1 + next()%8)
		w := newWorld(sound)
		w.tables.bracket = nil
		var regions []region
		states := make([]pageState, npages)
		kinds := make([]string, npages)
		entries := make([]Entry, npages)
		for i := range npages {
			b := next()
			states[i] = pageStates[1+int(b)%(len(pageStates)-1)] // not absent
			entries[i] = all[b>>6]
			kinds[i] = [...]string{"plain", "read-only", "none", "special", "closed", "writeonly", "plain", "plain"}[next()%8]
			if kinds[i] == "read-only" && (states[i].found|states[i].faultGet)&EntryWrite != 0 {
				kinds[i] = "plain"
			}
			if g := regionKinds[kinds[i]]; kinds[i] != "none" {
				regions = append(regions, region{at(uint64(i), 1), g.access, g.attrs})
			}
			states[i].set(w.tables, at(uint64(i), 1))
		}
		w.tables.setRegions(regions...)
		var want outcome
		found := make([]Entry, npages)
		for i := range npages {
			var errno syscall.Errno
			errno, found[i] = algebra(l, kinds[i], states[i], def, mask, entries[i])
			if errno != 0 {
				want.Errno = errno
				if errno == syscall.EPERM && l != request && kinds[i] != "read-only" {
					clear(found) // not readable: all entries are cleared
				}
				// Nothing behind the place is found. A gap is one place.
				for j := i + 1; j < npages && (kinds[i] == "none" && kinds[j] == "none"); j++ {
					found[j] = EntryError
				}
				break
			}
		}
		want.Entries = flags(found)
		d, mirror := w.newInterval(at(0, 8)), w.newMirror()
		before := append([]Entry(nil), entries...)
		if got := l.run(w, d, at(0, uint64(npages)), def, mask, 0, entries); got != want {
			t.Errorf("%v of %v in %v, default %v, mask %v, entries %v:\ngot  %v\nwant %v", l, names(states), kinds, def, mask, before, got, want)
		}
		mirror.Unregister()
		d.Remove()
		if err := w.finish(); err != nil {
			t.Error(err)
		}
	})
}

func names(states []pageState) (all []string) {
	for _, s := range states {
		all = append(all, s.name)
	}
	return all
}
