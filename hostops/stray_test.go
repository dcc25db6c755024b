package hostops

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
)

// TestStrays makes changes of every kind that there is for a backing, and wants each told
// of once, by the operation that it is like; and all memory back in the end.
func TestStrays(t *testing.T) {
	gvmtest.Need(t, gvmtest.UFFD)
	as := map[Kind]mm.Op{
		Discard: mm.OpStrayRemove, Free: mm.OpStrayRemove, Remove: mm.OpStrayRemove,
		Unmap: mm.OpStrayUnmap, Map: mm.OpStrayUnmap, Remap: mm.OpStrayRemap,
	}
	for backing, want := range map[mm.Backing][]Kind{
		mm.Anonymous:       {Discard, Free, Unmap, Map, Remap},
		mm.Memfd:           {Discard, Remove, Unmap, Map, Remap},
		mm.SharedAnonymous: {Discard, Remove, Unmap, Map, Remap},
		mm.MemfdPrivate:    {Discard, Unmap, Map, Remap},
	} {
		t.Run(backing.String(), func(t *testing.T) {
			g := newGuest(t, guestConfig{backing: backing})
			reports := make(chan mm.Stray, 100)
			w, err := g.Memory.WatchEvents(mm.EventConfig{Report: func(s mm.Stray) { reports <- s }})
			if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EPERM) {
				gvmtest.Lack(t, gvmtest.UFFD, err)
			} else if err != nil {
				t.Fatal(err)
			}
			var made []StrayRecord
			s, err := NewStrays(StrayConfig{
				Target: g.Target, Seed: gvmtest.Seed(t), Own: Range{12, 16}, Any: Range{0, 12}, Events: true,
				Made: func(r StrayRecord) { made = append(made, r) },
			})
			if err != nil {
				t.Fatal(err)
			}
			kinds, steps := map[Kind]int{}, 400
			if testing.Short() {
				steps = 120
			}
			for range steps {
				if err := s.Step(t.Context()); err != nil {
					t.Fatal(err)
				}
				g.Memory.Follow()
				var told []mm.Stray
				for len(reports) > 0 {
					told = append(told, <-reports)
				}
				for _, r := range made {
					if !r.Told() {
						continue
					}
					kinds[r.Kind]++
					if len(told) != 1 || told[0].Range != r.Range || told[0].Op != as[r.Kind] || told[0].Err != nil {
						t.Fatalf("after %v told is %v", r, told)
					}
					told = nil
				}
				if made = nil; told != nil {
					t.Fatalf("told is %v, of what nobody has made", told)
				}
			}
			for _, k := range want {
				if kinds[k] == 0 {
					t.Errorf("of %d changes none is a %s: %v", steps, k, kinds)
				}
			}
			if len(kinds) != len(want) {
				t.Errorf("changes are %v, want %v", kinds, want)
			}
			if err := s.Restore(t.Context()); err != nil {
				t.Error(err)
			}
			for _, x := range g.Memory.Extents(g.RAM.Range) {
				if !x.Mapped || x.Access != addr.ReadWrite {
					t.Errorf("in the end there is %v", x)
				}
			}
			if err := errors.Join(w.Close(), g.tracker.Check()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestNewStrays wants memory that is watched, and pages that there are.
func TestNewStrays(t *testing.T) {
	g := newGuest(t, guestConfig{})
	for name, c := range map[string]StrayConfig{
		"not watched":    {Own: Range{0, 1}, Any: Range{0, 1}},
		"no pages":       {Events: true, Own: Range{0, 1}},
		"too many pages": {Events: true, Own: Range{0, 17}, Any: Range{0, 1}},
	} {
		c.Target = g.Target
		if _, err := NewStrays(c); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v, want EINVAL", name, err)
		}
	}
	if r := (StrayRecord{Kind: PageOut}); r.Told() || slices.Contains([]Kind{strayFork, strayCompact}, Discard) {
		t.Errorf("a watch by events tells of %v", r)
	}
}
