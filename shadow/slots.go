package shadow

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"sort"

	"github.com/secondmmu/gvm/addr"
)

// Slot is a memslot: the host memory [HVA, HVA+NPages*PageSize) that backs the
// guest frames [GFN, GFN+NPages).
type Slot struct {
	ID     uint32
	GFN    addr.GFN
	NPages uint64
	HVA    addr.HVA
	Access addr.Access // Read or ReadWrite
}

// GFNs returns the frames of s.
func (s Slot) GFNs() addr.GFNRange {
	return addr.GFNRange{Start: s.GFN, End: s.GFN + addr.GFN(s.NPages)}
}

// HVAs returns the host addresses of s.
func (s Slot) HVAs() addr.HVARange { return addr.HVAs(s.HVA, s.NPages<<addr.PageShift) }

func (s Slot) String() string {
	return fmt.Sprintf("slot %d %v -> %v %v", s.ID, s.GFNs(), s.HVAs(), s.Access)
}

// sameMapping reports whether s and o differ in nothing but their numbers.
func (s Slot) sameMapping(o Slot) bool {
	s.ID = o.ID
	return s == o
}

// Window is guest RAM as the guest was promised it: frames, and the host
// addresses whose memory they show. The slots of a window cover those of its
// frames that the host can back at the moment.
type Window struct {
	Name   string
	GFN    addr.GFN
	NPages uint64
	HVA    addr.HVA
}

// GFNs returns the frames of w.
func (w Window) GFNs() addr.GFNRange {
	return addr.GFNRange{Start: w.GFN, End: w.GFN + addr.GFN(w.NPages)}
}

// HVAs returns the host addresses of w.
func (w Window) HVAs() addr.HVARange { return addr.HVAs(w.HVA, w.NPages<<addr.PageShift) }

// gfn returns the frame that shows the host page at hva, which is one of w's.
func (w Window) gfn(hva addr.HVA) addr.GFN { return w.GFN + addr.GFN((hva-w.HVA)>>addr.PageShift) }

// Slots is an immutable set of windows and of the slots installed for them.
type Slots struct {
	generation uint64
	windows    []Window // by GFN; they do not overlap
	slots      []Slot   // by GFN; they do not overlap
}

// Generation is the number of the set: every set that a tracker publishes has a
// larger one than the set before it.
func (s *Slots) Generation() uint64 { return s.generation }

// Len returns the number of slots.
func (s *Slots) Len() int { return len(s.slots) }

// All yields the slots in the order of their frames.
func (s *Slots) All() iter.Seq[Slot] { return slices.Values(s.slots) }

// Windows yields the windows in the order of their frames.
func (s *Slots) Windows() iter.Seq[Window] { return slices.Values(s.windows) }

// Lookup returns the slot of gfn, if it has one.
func (s *Slots) Lookup(gfn addr.GFN) (Slot, bool) {
	i := sort.Search(len(s.slots), func(i int) bool { return s.slots[i].GFNs().End > gfn })
	if i == len(s.slots) || !s.slots[i].GFNs().Contains(gfn) {
		return Slot{}, false
	}
	return s.slots[i], true
}

// HVA returns the host address that gpa is shown from, and whether gpa is guest
// RAM at all. It need not be backed: that is for Lookup to say.
func (s *Slots) HVA(gpa addr.GPA) (addr.HVA, bool) {
	gfn := gpa.GFN()
	i := sort.Search(len(s.windows), func(i int) bool { return s.windows[i].GFNs().End > gfn })
	if i == len(s.windows) || !s.windows[i].GFNs().Contains(gfn) {
		return 0, false
	}
	w := s.windows[i]
	return w.HVA + addr.HVA(gpa-w.GFN.GPA()), true
}

func compareSlots(a, b Slot) int     { return cmp.Compare(a.GFN, b.GFN) }
func compareWindows(a, b Window) int { return cmp.Compare(a.GFN, b.GFN) }
