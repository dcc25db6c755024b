package notifier

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/btree"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// hits counts how often it is told.
type hits struct {
	Interval
	n int
}

func (h *hits) Invalidate(_ *Invalidation, seq uint64) bool {
	h.SetSeq(seq)
	h.n++
	return true
}

// manyIntervals returns n neighbouring intervals of 16 pages, in random order,
// and the range of each.
func manyIntervals(n int) ([]hits, []addr.HVARange) {
	intervals, ranges := make([]hits, n), make([]addr.HVARange, n)
	for i := range ranges {
		ranges[i] = pageRange(16*i, 16)
	}
	r := rand.New(rand.NewPCG(1, uint64(n)))
	r.Shuffle(n, func(i, j int) { ranges[i], ranges[j] = ranges[j], ranges[i] })
	return intervals, ranges
}

func insertAll(tb testing.TB, as *AddressSpace, intervals []hits, ranges []addr.HVARange) {
	tb.Helper()
	for i := range intervals {
		if err := as.Insert(context.Background(), &intervals[i], ranges[i].Start, ranges[i].Bytes()); err != nil {
			tb.Fatal(err)
		}
	}
}

// stormBrackets returns places to be invalidated: a page of each of some of the
// ranges, which hits one interval.
func stormBrackets(ranges []addr.HVARange) []Invalidation {
	r := rand.New(rand.NewPCG(2, uint64(len(ranges))))
	invs := make([]Invalidation, 1<<16)
	for i := range invs {
		at := ranges[r.IntN(len(ranges))].Start + addr.HVA(r.IntN(16))*addr.PageSize
		invs[i] = Invalidation{Range: addr.HVAs(at, addr.PageSize), Event: Clear}
	}
	return invs
}

// BenchmarkStab times a bracket, both ends of it, that hits one of n intervals,
// at a random place. impl=notifier is an address space; tree what its tree of
// intervals takes of that; nohit a bracket that the tree has nothing for, and
// empty one with no intervals any more. scan and btree are an address space's
// stormBrackets with another collection: a slice, and an ordered map, which finds the
// predecessor of an address, and so only works if intervals are disjoint.
func BenchmarkStab(b *testing.B) {
	for _, size := range []struct {
		name string
		n    int
	}{{"1e3", 1e3}, {"1e5", 1e5}, {"1e6", 1e6}} {
		intervals, ranges := manyIntervals(size.n)
		invs := stormBrackets(ranges)
		as := New(Options{})
		insertAll(b, as, intervals, ranges)
		run := func(impl string, bracket func(inv *Invalidation)) {
			b.Run(fmt.Sprintf("n=%s/impl=%s", size.name, impl), func(b *testing.B) {
				as.Lock()
				defer as.Unlock()
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					bracket(&invs[i%len(invs)])
				}
			})
		}
		startEnd := func(inv *Invalidation) {
			if as.InvalidateRangeStart(inv) == nil {
				as.InvalidateRangeEnd(inv)
			}
		}
		run("notifier", startEnd)
		tree := &as.subs.Load().tree
		run("tree", func(inv *Invalidation) {
			first, last := closed(inv.Range, sound)
			if tree.Overlaps(first, last) {
				for i := range tree.Overlapping(first, last) {
					i.sub.Invalidate(inv, 1)
				}
			}
		})
		miss := &Invalidation{Range: pageRange(16*size.n, 1), Event: Clear}
		run("nohit", func(*Invalidation) { startEnd(miss) })

		var others otherIntervals
		places := make([]place, size.n)
		ordered := btree.NewG(32, func(a, b place) bool { return a.first < b.first })
		for i := range intervals {
			places[i] = place{intervals[i].first, intervals[i].last, &intervals[i].Interval}
			ordered.ReplaceOrInsert(places[i])
		}
		run("btree", func(inv *Invalidation) {
			others.bracket(inv, func(first, last uint64) {
				ordered.DescendLessOrEqual(place{first: last}, func(p place) bool {
					if p.last < first {
						return false
					}
					others.hit = append(others.hit, p.i)
					return true
				})
			})
		})
		if size.n < 1e6 { // there it takes several milliseconds
			run("scan", func(inv *Invalidation) {
				others.bracket(inv, func(first, last uint64) {
					for i := range places {
						if p := &places[i]; p.first <= last && first <= p.last {
							others.hit = append(others.hit, p.i)
						}
					}
				})
			})
		}
		for i := range intervals {
			intervals[i].Remove()
		}
		run("empty", startEnd)
	}
}

// place is what other collections of intervals hold.
type place struct {
	first, last uint64
	i           *Interval
}

// otherIntervals does what an address space with intervals does in a bracket,
// with somebody else to find them.
type otherIntervals struct {
	mu  sync.Mutex
	seq uint64
	hit []*Interval
}

// bracket opens and closes one; find appends to hit.
func (o *otherIntervals) bracket(inv *Invalidation, find func(first, last uint64)) {
	first, last := closed(inv.Range, sound)
	o.mu.Lock()
	o.seq |= 1
	seq := o.seq
	o.hit = o.hit[:0]
	find(first, last)
	o.mu.Unlock()
	for _, i := range o.hit {
		i.sub.Invalidate(inv, seq)
	}
	o.mu.Lock()
	o.seq++
	o.mu.Unlock()
}

// A bracket that hits an interval does not allocate, and neither does a look.
func TestIntervalsAllocateNothing(t *testing.T) {
	if lockorder.Enabled {
		gvmtest.OtherBuild(t, "a debug build keeps a record of locks")
	}
	as := New(Options{})
	intervals, ranges := manyIntervals(1000)
	insertAll(t, as, intervals, ranges)
	invs := stormBrackets(ranges)
	as.Lock()
	next := 0
	for name, f := range map[string]func(){
		"a bracket": func() {
			inv := &invs[next]
			next++
			if as.InvalidateRangeStart(inv) == nil {
				as.InvalidateRangeEnd(inv)
			}
		},
		"a look": func() {
			i := &intervals[next]
			i.ReadRetry(i.ReadBegin())
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: got %v allocations, want 0", name, n)
		}
	}
	as.Unlock()
	for i := range intervals {
		intervals[i].Remove()
	}
}

// BenchmarkReadBegin times a look at an interval that nobody invalidates.
func BenchmarkReadBegin(b *testing.B) {
	as := New(Options{})
	intervals, ranges := manyIntervals(2)
	insertAll(b, as, intervals, ranges)
	b.Run("goroutines=1", func(b *testing.B) {
		for b.Loop() {
			if intervals[0].ReadRetry(intervals[0].ReadBegin()) {
				b.Fatal("it was invalidated")
			}
		}
	})
	b.Run("goroutines=P", func(b *testing.B) { // intervals of their own, and one lock
		b.RunParallel(func(pb *testing.PB) {
			i := new(hits)
			if err := as.Insert(context.Background(), i, page.Start, 1); err != nil {
				b.Error(err)
				return
			}
			defer i.Remove()
			for pb.Next() {
				if i.ReadRetry(i.ReadBegin()) {
					b.Error("it was invalidated")
				}
			}
		})
	})
}

// BenchmarkInsertRemove times the insertion of one more interval beside n, and
// its removal, both together.
func BenchmarkInsertRemove(b *testing.B) {
	for _, size := range []struct {
		name string
		n    int
	}{{"0", 0}, {"1e3", 1e3}, {"1e5", 1e5}, {"1e6", 1e6}} {
		b.Run("n="+size.name, func(b *testing.B) {
			as := New(Options{})
			intervals, ranges := manyIntervals(size.n + 1)
			insertAll(b, as, intervals, ranges)
			b.ReportAllocs()
			b.ResetTimer()
			for n := 0; b.Loop(); n++ {
				i := n % len(intervals)
				intervals[i].Remove()
				if err := as.Insert(context.Background(), &intervals[i], ranges[i].Start, ranges[i].Bytes()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRegisterUnderStorm times a registration and its end, each on its own,
// while two goroutines run brackets, each with the mapping lock held: of the same
// address space, which registration has to wait for, and of another one. The
// median, the 99th percentile and the longest are reported in microseconds.
func BenchmarkRegisterUnderStorm(b *testing.B) {
	for _, storm := range []string{"none", "same", "other"} {
		b.Run("storm="+storm, func(b *testing.B) {
			as := New(Options{})
			busy := as
			if storm == "other" {
				busy = New(Options{})
			}
			resident := new(silent)
			if err := busy.Register(context.Background(), resident); err != nil {
				b.Fatal(err)
			}
			var stop atomic.Bool
			var brackets sync.WaitGroup
			if storm != "none" {
				for range 2 {
					brackets.Go(func() {
						inv := &Invalidation{Range: page, Event: Clear}
						for !stop.Load() {
							busy.Lock()
							if busy.InvalidateRangeStart(inv) == nil {
								busy.InvalidateRangeEnd(inv)
							}
							busy.Unlock()
						}
					})
				}
			}
			var register, unregister []time.Duration
			s := new(silent)
			for b.Loop() {
				begin := time.Now()
				if err := as.Register(context.Background(), s); err != nil {
					b.Fatal(err)
				}
				register = append(register, time.Since(begin))
				begin = time.Now()
				s.Unregister()
				unregister = append(unregister, time.Since(begin))
			}
			stop.Store(true)
			brackets.Wait()
			resident.Unregister()
			reportLatencies(b, "register", register)
			reportLatencies(b, "unregister", unregister)
		})
	}
}

func reportLatencies(b *testing.B, of string, took []time.Duration) {
	slices.Sort(took)
	for _, q := range []struct {
		name string
		i    int
	}{{"p50", len(took) / 2}, {"p99", len(took) * 99 / 100}, {"max", len(took) - 1}} {
		b.ReportMetric(float64(took[q.i].Nanoseconds())/1e3, fmt.Sprintf("%s-%s-us", of, q.name))
	}
}
