package trace

import (
	"slices"

	"github.com/secondmmu/gvm/addr"
)

// places is which host operation last had to do with which frames. The zero value
// is none.
type places struct {
	list []place       // in the order of their frames; no two meet
	op   uint64        // the operation in progress, if it has a range; or 0
	hvas addr.HVARange // its
}

type place struct {
	addr.GFNRange
	op uint64
}

// tie learns from e, or gives it its operation. Events come in their order.
func (p *places) tie(e *Event, test *testpoint) {
	switch {
	case e.Kind == Zap && e.Op != 0:
		p.set(place{e.GFN, e.Op}, test)
	case e.Kind == HostOp:
		p.op, p.hvas = e.Op, e.HVA
	case e.Kind == HostOpEnd && e.Op == p.op:
		p.op = 0
	case e.Kind == Kernel && e.Op == 0 && p.op != 0 && e.HVA.Overlaps(p.hvas):
		e.Op = p.op
	case e.Kind.Lane() == LaneVCPU && e.Op == 0 && !e.GFN.Empty():
		e.Op = p.last(e.GFN.Start)
	}
}

// set makes op the last of all frames of n.
func (p *places) set(n place, test *testpoint) {
	if n.Empty() || test != nil && test.mutant == firstOpStays && p.last(n.Start) != 0 {
		return
	}
	i := p.search(n.Start)
	j := i
	for j < len(p.list) && p.list[j].Start < n.End {
		j++
	}
	var instead []place // of list[i:j]
	if i < j && p.list[i].Start < n.Start {
		instead = append(instead, place{addr.GFNRange{Start: p.list[i].Start, End: n.Start}, p.list[i].op})
	}
	instead = append(instead, n)
	if i < j && n.End < p.list[j-1].End {
		instead = append(instead, place{addr.GFNRange{Start: n.End, End: p.list[j-1].End}, p.list[j-1].op})
	}
	p.list = slices.Replace(p.list, i, j, instead...)
}

// last returns the last operation of a frame, or 0.
func (p *places) last(gfn addr.GFN) uint64 {
	if i := p.search(gfn); i < len(p.list) && p.list[i].Contains(gfn) {
		return p.list[i].op
	}
	return 0
}

// search returns the index of the first place that ends behind gfn.
func (p *places) search(gfn addr.GFN) int {
	i, _ := slices.BinarySearchFunc(p.list, gfn, func(o place, gfn addr.GFN) int {
		if o.End <= gfn {
			return -1
		}
		return 1
	})
	return i
}
