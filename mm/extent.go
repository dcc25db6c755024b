package mm

import (
	"fmt"
	"iter"
	"os"
	"slices"
	"sort"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// Change is one operation on mappings that was carried out.
type Change struct {
	Op    Op            `json:"op"`
	Range addr.HVARange `json:"range"`
	To    addr.HVA      `json:"to,omitempty"` // for a remap of either kind: where Range.Start went
	Seq   uint64        `json:"seq"`          // position among all changes of the memory, from 1
	Time  time.Time     `json:"time"`
}

func (c Change) String() string {
	if c.moves() {
		return fmt.Sprintf("change %d, %s of %v to %v", c.Seq, c.Op, c.Range, c.To)
	}
	return fmt.Sprintf("change %d, %s of %v", c.Seq, c.Op, c.Range)
}

func (c Change) moves() bool { return c.Op == OpRemap || c.Op == OpRemapKeep }

// Extent is a run of addresses of one kind.
type Extent struct {
	Range  addr.HVARange
	Mapped bool        // false: a reservation without memory
	Access addr.Access // NoAccess where nothing is mapped
	Why    *Change     // what took permissions away; nil where all are there, or none ever were

	object  *object // what is mapped at Range.Start, or nil for private anonymous memory
	offset  int64   // and at which offset, in bytes; 0 without an object
	private bool    // a store makes a copy of the object's page, which only this mapping shows
	foreign bool    // not mapped as far as guests are concerned, but others have mapped something there

	// Access and Why follow from these; see settled.
	access addr.Access // what the mapping allows by itself
	since  *Change     // what took permissions from it, or nil
	guard  *Change     // what put guards into all of its pages, or nil
	ended  *Change     // what ended the file before Range.Start, or nil
}

// object is memory that there is apart from its mappings: more than one may show it.
type object struct {
	id fileID // of its file

	// What follows is protected by the mapping lock.
	file     *os.File // a region's descriptor of it; nil for shared anonymous memory, whose file has none
	writable bool     // that is open for writing
	size     int64    // in bytes, whole pages; nothing backs a mapping from there on
	ended    *Change  // the newest that made it smaller, or nil
}

func (x Extent) String() string {
	s := fmt.Sprintf("%v %v", x.Range, x.Access)
	switch {
	case x.foreign:
		s = fmt.Sprintf("%v not the guest's: others have mapped something there", x.Range)
	case !x.Mapped:
		s = fmt.Sprintf("%v not mapped", x.Range)
	}
	if x.Why != nil {
		s += fmt.Sprintf(" since %v", *x.Why)
	}
	return s
}

// Foreign reports whether others have mapped something at an extent that is not Mapped: see
// EventWatch.
func (x Extent) Foreign() bool { return x.foreign }

// Shared reports whether the content of x is seen through other mappings too, as that of
// a file that is not mapped privately.
func (x Extent) Shared() bool { return x.object != nil && !x.private }

// Anonymous reports whether x is mapped, and private anonymous memory.
func (x Extent) Anonymous() bool { return x.Mapped && x.object == nil }

// settled returns x with the Access and Why that its mapping, guards and the end of
// its file leave it, of which the kernel asks in the opposite order.
func (x Extent) settled() Extent {
	x.Access, x.Why = x.access, x.since
	for _, none := range []*Change{x.ended, x.guard} {
		if none != nil {
			x.Access, x.Why = addr.NoAccess, none
		}
	}
	return x
}

// cut returns the part of x that lies in r.
func (x Extent) cut(r addr.HVARange) Extent {
	was := x.Range.Start
	x.Range = x.Range.Intersect(r)
	if x.object != nil {
		x.offset += int64(x.Range.Start - was)
	}
	return x
}

// continues reports whether y goes on where x ends, as one extent.
func (x Extent) continues(y Extent) bool {
	return x.Range.End == y.Range.Start && x.Mapped == y.Mapped && x.foreign == y.foreign && x.Access == y.Access && x.Why == y.Why &&
		x.object == y.object && x.private == y.private && (x.object == nil || x.offset+int64(x.Range.Bytes()) == y.offset) &&
		x.access == y.access && x.since == y.since && x.ended == y.ended // Why has the guard
}

// extents is a set of extents that do not overlap, in the order of their
// addresses, with no two that could be one.
type extents []Extent

// find returns the index of the first extent that ends above hva.
func (s extents) find(hva addr.HVA) int {
	return sort.Search(len(s), func(i int) bool { return s[i].Range.End > hva })
}

// in yields the parts of the extents that lie in r.
func (s extents) in(r addr.HVARange) iter.Seq[Extent] {
	return func(yield func(Extent) bool) {
		for _, x := range s[s.find(r.Start):] {
			if x.Range.Start >= r.End || !yield(x.cut(r)) {
				return
			}
		}
	}
}

// around returns the access at hva, and the part of within around hva in which it is
// the same.
func (s extents) around(hva addr.HVA, within addr.HVARange) (run addr.HVARange, access addr.Access) {
	i := s.find(hva)
	if i == len(s) || hva < s[i].Range.Start {
		run = within
		if i > 0 {
			run.Start = max(run.Start, s[i-1].Range.End)
		}
		if i < len(s) {
			run.End = min(run.End, s[i].Range.Start)
		}
		return run, addr.NoAccess
	}
	run, access = s[i].Range, s[i].Access
	for j := i - 1; j >= 0 && within.Start < run.Start && s[j].Range.End == run.Start && s[j].Access == access; j-- {
		run.Start = s[j].Range.Start
	}
	for j := i + 1; j < len(s) && run.End < within.End && s[j].Range.Start == run.End && s[j].Access == access; j++ {
		run.End = s[j].Range.End
	}
	return run.Intersect(within), access
}

// set makes x what its range is.
func (s *extents) set(x Extent) {
	old := *s
	i, j := old.find(x.Range.Start), old.find(x.Range.End-1)
	if j < len(old) && old[j].Range.Start < x.Range.End {
		j++
	}
	// old[i:j] are the extents that overlap x.
	repl := make([]Extent, 0, 3)
	if i < j {
		if head := old[i].cut(addr.HVARange{Start: old[i].Range.Start, End: x.Range.Start}); !head.Range.Empty() {
			repl = append(repl, head)
		}
	}
	repl = append(repl, x)
	if i < j {
		if tail := old[j-1].cut(addr.HVARange{Start: x.Range.End, End: old[j-1].Range.End}); !tail.Range.Empty() {
			repl = append(repl, tail)
		}
	}
	// Take the neighbours in, so that what can be one becomes one.
	if i > 0 {
		i--
		repl = slices.Insert(repl, 0, old[i])
	}
	if j < len(old) {
		repl = append(repl, old[j])
		j++
	}
	merged := repl[:1]
	for _, y := range repl[1:] {
		if last := &merged[len(merged)-1]; last.continues(y) {
			last.Range.End = y.Range.End
		} else {
			merged = append(merged, y)
		}
	}
	*s = slices.Replace(old, i, j, merged...)
}

// historyLen is how many changes are remembered for LastChange.
const historyLen = 256

// history is the newest changes.
type history struct {
	ring []Change // change seq is at (seq-1) % historyLen
	n    uint64   // sequence number of the newest
}

// add remembers the change that follows the newest.
func (h *history) add(c Change) {
	h.n = c.Seq
	if len(h.ring) < historyLen {
		h.ring = append(h.ring, c)
	} else {
		h.ring[(h.n-1)%historyLen] = c
	}
}

// last returns the newest change that is remembered and touched r.
func (h *history) last(r addr.HVARange) (Change, bool) {
	for seq := h.n; seq > 0 && seq+historyLen > h.n; seq-- {
		c := h.ring[(seq-1)%historyLen]
		if c.Range.Overlaps(r) || c.moves() && addr.HVAs(c.To, c.Range.Bytes()).Overlaps(r) {
			return c, true
		}
	}
	return Change{}, false
}
