package shadow

import (
	"errors"
	"fmt"
	"iter"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/interval"
)

// Slots is an immutable set of windows and of the slots installed for them. It is
// what KVM has as struct kvm_memslots. Sets share what they have in common, so
// that a new one takes time and memory by the logarithm of their size.
type Slots struct {
	generation uint64
	updating   bool
	slots      index[Slot]
	windows    index[Window]
	changed    chan struct{} // closed when a set that is different has been published
}

// Generation is the number of the set: every set that is published after it was
// changed has a larger one than the set before it.
func (s *Slots) Generation() uint64 { return s.generation }

// Updating reports that the slots are about to become those of the next set:
// what is found here is still true, and is not to be remembered.
func (s *Slots) Updating() bool { return s.updating }

// Changed returns a channel that is closed when the set is no longer the current
// one of those to whom it belongs.
func (s *Slots) Changed() <-chan struct{} { return s.changed }

// Len returns the number of slots.
func (s *Slots) Len() int { return s.slots.byGFN.Len() }

// All yields the slots in the order of their frames.
func (s *Slots) All() iter.Seq[Slot] { return values(s.slots.inGFNs(allGFNs)) }

// Windows yields the windows in the order of their frames.
func (s *Slots) Windows() iter.Seq[Window] { return values(s.windows.inGFNs(allGFNs)) }

// Lookup returns the slot of gfn, if it has one.
func (s *Slots) Lookup(gfn addr.GFN) (Slot, bool) { return found(s.slots.find(gfn)) }

// InGFNs yields the slots that have a frame in r, in the order of their frames.
func (s *Slots) InGFNs(r addr.GFNRange) iter.Seq[Slot] { return values(s.slots.inGFNs(r)) }

// InHVAs yields the slots that show a byte of r, in the order of the addresses at
// which they begin. A page that is shown at several frames is in several slots.
func (s *Slots) InHVAs(r addr.HVARange) iter.Seq[Slot] { return values(s.slots.inHVAs(r)) }

// HVA returns the host address that gpa is shown from, and whether gpa is guest
// RAM at all. It need not be backed: that is for Lookup to say.
func (s *Slots) HVA(gpa addr.GPA) (addr.HVA, bool) {
	w := s.windows.find(gpa.GFN())
	if w == nil {
		return 0, false
	}
	return w.hva(gpa.GFN()) + addr.HVA(gpa.Offset()), true
}

// Check returns an error for every invariant of the set that does not hold,
// joined, or nil: what is promised of Slot and Window, that no frame is in two of
// either, and that numbers are unique. It takes O(n log n).
func (s *Slots) Check() error {
	errs := []error{s.slots.check(), s.windows.check()}
	report := func(format string, args ...any) { errs = append(errs, fmt.Errorf("shadow: "+format, args...)) }
	ids := map[uint32]bool{}
	for o := range s.All() {
		switch {
		case o.NPages == 0 || o.HVA&addr.PageMask != 0 || o.HVAs().NPages() != o.NPages:
			report("%v is empty, not page aligned, or wraps", o)
		case o.Access != addr.Read && o.Access != addr.ReadWrite:
			report("%v allows neither reading nor reading and writing", o)
		case ids[o.ID]:
			report("%v has the number of another slot", o)
		}
		ids[o.ID] = true
	}
	return errors.Join(errs...)
}

// checkWindows is Check for what a Tracker promises: each slot shows what its window
// does.
func (s *Slots) checkWindows() error {
	var errs []error
	for o := range s.All() {
		for gfn := o.GFN; gfn < o.GFNs().End; {
			w := s.windows.find(gfn)
			if w == nil || w.hva(gfn) != o.hva(gfn) {
				errs = append(errs, fmt.Errorf("shadow: %v is in no window that shows %v there", o, o.hva(gfn)))
				break
			}
			gfn = w.GFNs().End
		}
	}
	return errors.Join(errs...)
}

var allGFNs = addr.GFNRange{Start: 0, End: ^addr.GFN(0)}

// pages is a run of frames and the host addresses that they show.
type pages interface {
	comparable
	GFNs() addr.GFNRange
	HVAs() addr.HVARange
}

// index is an immutable set of runs, no two of which have a frame in common. Host
// addresses they may have in common.
type index[T pages] struct {
	byGFN, byHVA *interval.Tree[*T]
}

func newIndex[T pages]() index[T] {
	return index[T]{new(interval.Tree[*T]), new(interval.Tree[*T])}
}

// change returns the set without del and with add.
func (x index[T]) change(del, add []T) index[T] {
	if len(del)+len(add) == 0 {
		return x
	}
	y := index[T]{x.byGFN.Clone(), x.byHVA.Clone()}
	for _, v := range del {
		p := y.find(v.GFNs().Start)
		if p == nil || *p != v {
			panic(fmt.Sprintf("shadow: %v is not in the set that it is taken from", v))
		}
		first, last := closedGFNs(v.GFNs())
		y.byGFN.Delete(first, last, p)
		first, last = closedHVAs(v.HVAs())
		y.byHVA.Delete(first, last, p)
	}
	for _, v := range add {
		first, last := closedGFNs(v.GFNs())
		y.byGFN.Insert(first, last, &v)
		first, last = closedHVAs(v.HVAs())
		y.byHVA.Insert(first, last, &v)
	}
	return y
}

// find returns the run that has gfn, or nil.
func (x index[T]) find(gfn addr.GFN) *T {
	for p := range x.byGFN.Overlapping(uint64(gfn), uint64(gfn)) {
		return p
	}
	return nil
}

// inGFNs yields the runs that have a frame in r, in order. A loop over the result
// allocates nothing, nor does one over that of inHVAs.
func (x index[T]) inGFNs(r addr.GFNRange) iter.Seq[*T] {
	return x.byGFN.Overlapping(closedGFNs(r))
}

// inHVAs yields the runs that show a byte of r.
func (x index[T]) inHVAs(r addr.HVARange) iter.Seq[*T] {
	return x.byHVA.Overlapping(closedHVAs(r))
}

func (x index[T]) check() error {
	errs := []error{x.byGFN.Check(), x.byHVA.Check()}
	if g, h := x.byGFN.Len(), x.byHVA.Len(); g != h {
		errs = append(errs, fmt.Errorf("shadow: %d runs are found by frame and %d by address", g, h))
	}
	var last addr.GFN
	for p := range x.inGFNs(allGFNs) {
		if r := (*p).GFNs(); r.Start < last {
			errs = append(errs, fmt.Errorf("shadow: %v has frames of the one before it", *p))
		} else {
			last = r.End
		}
		same := false
		for q := range x.inHVAs((*p).HVAs()) {
			same = same || q == p
		}
		if !same {
			errs = append(errs, fmt.Errorf("shadow: %v is not found by its addresses", *p))
		}
	}
	return errors.Join(errs...)
}

// closedGFNs and closedHVAs return a range as an interval that has its last number,
// which for an empty range is less than the first.
func closedGFNs(r addr.GFNRange) (first, last uint64) { return closed(uint64(r.Start), uint64(r.End)) }
func closedHVAs(r addr.HVARange) (first, last uint64) { return closed(uint64(r.Start), uint64(r.End)) }

func closed(start, end uint64) (first, last uint64) {
	if end <= start {
		return 1, 0
	}
	return start, end - 1
}

func values[T any](seq iter.Seq[*T]) iter.Seq[T] {
	return func(yield func(T) bool) {
		for p := range seq {
			if !yield(*p) {
				return
			}
		}
	}
}

func found[T any](p *T) (v T, ok bool) {
	if p == nil {
		return v, false
	}
	return *p, true
}
