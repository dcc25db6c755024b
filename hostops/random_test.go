package hostops

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
)

// take returns the first n steps of a stream.
func take(c RandomConfig, n int) (steps [][]Op) {
	for g := NewRandom(c); len(steps) < n; {
		steps = append(steps, g.Next())
	}
	return steps
}

func TestRandomIsRepeatable(t *testing.T) {
	c := RandomConfig{Seed: gvmtest.Seed(t), Pages: 16, Spare: 2, Missing: 3, Backing: mm.Memfd}
	first := take(c, 500)
	if diff := cmp.Diff(first, take(c, 500)); diff != "" {
		t.Errorf("one seed has two streams (-first +second):\n%s", diff)
	}
	c.Seed++
	if cmp.Equal(first, take(c, 500)) {
		t.Errorf("seeds %d and %d have the same stream", c.Seed-1, c.Seed)
	}
}

// TestRandomKinds: the stream has all kinds that there are for the backing, and no others.
func TestRandomKinds(t *testing.T) {
	for backing, not := range map[mm.Backing][]Kind{
		mm.Anonymous:       {Punch, Remove, Truncate},
		mm.Memfd:           {Free},
		mm.SharedAnonymous: {Free, Punch, Truncate},
		mm.MemfdPrivate:    {Free, Remove},
		mm.File:            {Free, Truncate},
		mm.FilePrivate:     {Free, Punch, Remove, Truncate},
	} {
		want := map[Kind]bool{}
		for _, k := range kinds {
			want[k] = true
		}
		for _, k := range not {
			delete(want, k)
		}
		got := map[Kind]bool{}
		for _, ops := range take(RandomConfig{Seed: 1, Pages: 2 * hugePages, Spare: 1, Backing: backing, Missing: 1}, 2000) {
			for _, o := range ops {
				got[o.Kind] = true
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", backing, diff)
		}
	}
	for _, ops := range take(RandomConfig{Seed: 1, Pages: 1}, 2000) {
		for _, o := range ops {
			if o.Kind == Remap || o.Kind == RemapKeep || o.Kind == Collapse {
				t.Fatalf("without a spare region and huge pages there is %v", o)
			}
		}
	}
}

// mayLack is what the kernel, or the file system of a file, may not have.
var mayLack = []Kind{Collapse, Guard, Unguard, Punch, Remove}

// TestRandomStream carries streams out for all backings, compares what is remembered of each
// page with what was done, and gives back what is missing.
func TestRandomStream(t *testing.T) {
	steps := 200
	if gvmtest.Debug || gvmtest.Race {
		steps = 60
	}
	for _, backing := range backings {
		for _, missing := range []int{0, 1, 5} {
			for _, pages := range []uint64{1, 16, hugePages + 3} {
				t.Run(fmt.Sprintf("backing=%v/missing=%d/pages=%d", backing, missing, pages), func(t *testing.T) {
					g := newGuest(t, guestConfig{backing: backing, pages: pages, spare: 1})
					last := map[uint64]Record{}
					since := make([]int, pages) // for how many steps each page has been missing
					var n uint64
					r := mustRunner(t, Config{
						Target: g.Target,
						Random: NewRandom(RandomConfig{Seed: gvmtest.Seed(t), Pages: pages, Spare: 1, Backing: backing, Missing: missing}),
						OnOp: func(rec Record) {
							if n++; rec.N != n {
								t.Errorf("%v comes after op %d", rec, n-1)
							}
							for page := rec.Range.Start; page < rec.Range.End && !rec.Skipped; page++ {
								last[page] = rec
								since[page] = 0 // nothing is done to pages that are missing, but to give them back
							}
						},
					})
					for step := range steps {
						if err := r.Step(context.Background()); err != nil {
							t.Fatalf("step %d: %v", step, err)
						}
						there := g.there(t)
						for page := range pages {
							if since[page]++; there[page] {
								since[page] = 0
							}
							if since[page] > missing {
								t.Fatalf("after step %d page %d has been missing for %d steps", step, page, since[page])
							}
						}
					}
					for page := range pages {
						want, ok := last[page]
						got, known := r.Last(page)
						if diff := cmp.Diff(want, got); diff != "" || ok != known {
							t.Errorf("last of page %d, %v (-want +got):\n%s", page, known, diff)
						}
					}
					stats := r.Stats()
					for k, c := range stats.Kinds {
						if n -= c.Done + c.Skipped; c.Failed != 0 || c.Skipped > 0 && !slices.Contains(mayLack, k) {
							t.Errorf("%s: %+v", k, c)
						}
					}
					if n != 0 {
						t.Errorf("%d operations are not in %+v", n, stats)
					}
					mustRestore(t, r, g)
				})
			}
		}
	}
}

// there says of each page whether it is at home and may be read and written.
func (g *guest) there(t *testing.T) []bool {
	all := make([]bool, g.pages())
	ps, err := g.pieces(Range{0, g.pages()})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		for _, x := range g.Memory.Extents(p.hvas) {
			part := p.cut(x.Range)
			for page := part.pages.Start; page < part.pages.End; page++ {
				all[page] = x.Access == addr.ReadWrite && !g.inSpare(x.Range)
			}
		}
	}
	return all
}

// TestRandomSkips: what a region refuses is skipped, and neither an error nor remembered.
func TestRandomSkips(t *testing.T) {
	g := newGuest(t, guestConfig{})
	pinned, err := g.Memory.NewRegion(mm.RegionConfig{Name: "pinned", Size: 4 * addr.PageSize, Pinned: true})
	if err != nil {
		t.Fatal(err)
	}
	target := g.Target
	target.RAM, target.Spare = pinned, nil
	target.HVA = func(page uint64) (addr.HVA, bool) { return pinned.Range.Start + addr.HVA(page*addr.PageSize), true }
	r := mustRunner(t, Config{Target: target, Random: NewRandom(RandomConfig{Seed: 1, Pages: 4}), OnOp: func(rec Record) {
		if allowed := rec.Kind == Store || rec.Kind == Fill || rec.Kind == Populate; rec.Skipped == allowed || rec.Skipped != (rec.Err != "") {
			t.Errorf("%v: skipped: %v, %s", rec, rec.Skipped, rec.Err)
		}
	}})
	for range 100 {
		if err := r.Step(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	for page := range uint64(4) {
		if rec, _ := r.Last(page); rec.Skipped {
			t.Errorf("the last of page %d is %v, which was skipped", page, rec)
		}
	}
}
