package hmm

import (
	"context"
	"fmt"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// flat is page tables without locks or maps, so that what is timed is the walk: each
// page is present, or each is a run of its own.
type flat struct {
	r    addr.HVARange
	ptes []uint32
	runs bool // one run for each page; otherwise one for all
}

func (f *flat) Region(addr.HVA) (addr.HVARange, addr.Access, uint32) {
	return f.r, addr.ReadWrite, RegionMapped
}

func (f *flat) Walk(r addr.HVARange, _ any, fn func(addr.HVARange, addr.PFN, uint32) bool) error {
	if !f.runs {
		fn(r, 1, f.ptes[(r.Start-f.r.Start)>>addr.PageShift])
		return nil
	}
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		i := (hva - f.r.Start) >> addr.PageShift
		if !fn(addr.HVAs(hva, addr.PageSize), addr.PFN(1+i), f.ptes[i]) {
			return nil
		}
	}
	return nil
}

func (f *flat) Fault(r addr.HVARange, write, nonblocking bool) error {
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		f.ptes[(hva-f.r.Start)>>addr.PageShift] = PTEPresent | PTEWritable
	}
	return nil
}

const benchPages = 512

func newFlat(runs bool, pte uint32) *flat {
	f := &flat{r: at(0, benchPages), ptes: make([]uint32, benchPages), runs: runs}
	f.fill(pte)
	return f
}

func (f *flat) fill(pte uint32) {
	for i := range f.ptes {
		f.ptes[i] = pte
	}
}

// perPage reports the time of a page; each iteration has had benchPages.
func perPage(b *testing.B) {
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/benchPages, "ns/page")
}

// BenchmarkLook times a look at 512 pages that are all there: of a Range, of a Request,
// and of a loop that does nothing but read the same page tables into entries. runs=page is
// page tables of which each page is a run; runs=one has one run.
func BenchmarkLook(b *testing.B) {
	for _, runs := range []bool{false, true} {
		name := map[bool]string{false: "runs=one", true: "runs=page"}[runs]
		f := newFlat(runs, PTEPresent|PTEWritable)
		w := newWorld(sound)
		mirror, d := w.newMirror(), w.newInterval(f.r)
		r := &Range{Range: f.r, Tables: f, Entries: make([]Entry, benchPages)}
		if err := w.reg.begin(r, w.AddressSpace); err != nil {
			b.Fatal(err)
		}
		q := w.newRequest(d, f.r, ReqFault)
		q.Tables, q.Seq = f, d.ReadBegin()
		entries := make([]Entry, benchPages)
		for _, bb := range []struct {
			impl string
			look func() error
		}{
			{"snapshot", func() error { _, err := r.Snapshot(); return err }},
			{"request", func() error { return RangeFault(q) }},
			{"copy", func() error {
				return f.Walk(f.r, nil, func(run addr.HVARange, pfn addr.PFN, pte uint32) bool {
					for hva := run.Start; hva < run.End; hva += addr.PageSize {
						entries[(hva-f.r.Start)>>addr.PageShift] = EntryValid | Entry(pfn)
						pfn++
					}
					return true
				})
			}},
		} {
			b.Run(name+"/impl="+bb.impl, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := bb.look(); err != nil {
						b.Fatal(err)
					}
				}
				perPage(b)
			})
		}
		r.Done()
		mirror.Unregister()
		d.Remove()
	}
}

// BenchmarkFault times a look at 512 pages that are absent, in one hole and as single
// pages that are swapped out. The page tables are emptied in between, which is timed too
// and is what impl=empty does alone.
func BenchmarkFault(b *testing.B) {
	for _, bb := range []struct {
		name string
		runs bool
		pte  uint32
	}{{"pages=hole", false, 0}, {"pages=swapped", true, PTESwapped}} {
		f := newFlat(bb.runs, bb.pte)
		w := newWorld(sound)
		d := w.newInterval(f.r)
		q := w.newRequest(d, f.r, ReqFault)
		q.Tables, q.Seq = f, d.ReadBegin()
		b.Run(bb.name+"/impl=request", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f.fill(bb.pte)
				if err := RangeFault(q); err != nil {
					b.Fatal(err)
				}
			}
			perPage(b)
		})
		b.Run(bb.name+"/impl=empty", func(b *testing.B) {
			for b.Loop() {
				f.fill(bb.pte)
			}
			perPage(b)
		})
		d.Remove()
	}
}

// BenchmarkLoop times what a look costs beside the walk, with one page: the whole of
// Populate in each way, ReadBegin and ReadRetry alone, and the mutex and the mapping lock
// that a driver without a sequence would hold throughout.
func BenchmarkLoop(b *testing.B) {
	f := newFlat(false, PTEPresent|PTEWritable)
	w := newWorld(sound)
	mirror, d := w.newMirror(), w.newInterval(f.r)
	page := at(0, 1)
	ctx := context.Background()
	install := func([]Entry) error { return nil }
	r := &Range{Range: page, Tables: f, Entries: make([]Entry, 1)}
	q := w.newRequest(d, page, ReqFault)
	q.Tables = f
	for _, bb := range []struct {
		impl string
		loop func() error
	}{
		{"range", func() error { return w.reg.populate(ctx, r, w.AddressSpace, mirror, install) }},
		{"request", func() error { return q.Populate(ctx, d, install) }},
		{"sequence", func() error {
			seq := d.ReadBegin()
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.ReadRetry(seq) {
				return fmt.Errorf("nothing changes, and %d is not current", seq)
			}
			return nil
		}},
		{"locks", func() error {
			w.RLock()
			defer w.RUnlock()
			d.mu.Lock()
			defer d.mu.Unlock()
			return f.Walk(page, nil, func(addr.HVARange, addr.PFN, uint32) bool { return true })
		}},
	} {
		b.Run("impl="+bb.impl, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := bb.loop(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	mirror.Unregister()
	d.Remove()
}

// BenchmarkBracket times one start and end for a driver with so many ranges begun, next to
// an interval and to an address space that nobody has subscribed to.
func BenchmarkBracket(b *testing.B) {
	inv := &notifier.Invalidation{Range: at(0, 1), Event: notifier.Clear}
	bracket := func(b *testing.B, w *world) {
		w.Lock()
		defer w.Unlock()
		for b.Loop() {
			if w.InvalidateRangeStart(inv) == nil {
				w.InvalidateRangeEnd(inv)
			}
		}
	}
	for _, n := range []int{0, 1, 16} {
		b.Run(fmt.Sprintf("impl=mirror/ranges=%d", n), func(b *testing.B) {
			w := newWorld(sound)
			mirror := w.newMirror()
			defer mirror.Unregister()
			for range n {
				r := w.begun(at(0, 1), 0)
				defer r.Done()
			}
			bracket(b, w)
		})
	}
	b.Run("impl=interval", func(b *testing.B) {
		w := newWorld(sound)
		d := w.newInterval(at(0, 1))
		defer d.Remove()
		bracket(b, w)
	})
	b.Run("impl=none", func(b *testing.B) { bracket(b, newWorld(sound)) })
}
