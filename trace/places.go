package trace

import (
	"slices"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// places is which host operation last had to do with which frames. The zero value
// is none.
type places struct {
	list []place // in the order of their frames; no two meet
	late []place // the newest zaps, for events that are told of late; zap n is at n % lateZaps
	n    int     // zaps so far
}

// lateZaps is how many zaps are remembered: a kernel event is told of some milliseconds
// late.
const lateZaps = 1024

type place struct {
	addr.GFNRange
	op    uint64
	since time.Duration
}

// tie learns from e, or gives it its operation. Events come in their order.
func (p *places) tie(e *Event, test *testpoint) {
	switch {
	case e.Kind == Zap && e.Op != 0:
		p.set(place{e.GFN, e.Op, e.When()}, test)
	case e.met() && e.Op == 0 && !e.GFN.Empty():
		when := e.When()
		if test != nil && test.mutant == toldIsWhen {
			when = e.Time
		}
		e.Op = p.last(e.GFN.Start, when)
	}
}

// set makes n.op the last of all frames of n.
func (p *places) set(n place, test *testpoint) {
	if n.Empty() || test != nil && test.mutant == firstOpStays && p.last(n.Start, n.since) != 0 {
		return
	}
	if len(p.late) < lateZaps {
		p.late = append(p.late, n)
	} else {
		p.late[p.n%lateZaps] = n
	}
	p.n++
	i := p.search(n.Start)
	j := i
	for j < len(p.list) && p.list[j].Start < n.End {
		j++
	}
	var instead []place // of list[i:j]
	if i < j && p.list[i].Start < n.Start {
		rest := p.list[i]
		rest.End = n.Start
		instead = append(instead, rest)
	}
	instead = append(instead, n)
	if i < j && n.End < p.list[j-1].End {
		rest := p.list[j-1]
		rest.Start = n.End
		instead = append(instead, rest)
	}
	p.list = slices.Replace(p.list, i, j, instead...)
}

// last returns the last operation of a frame at a time, or 0 if there was none, or so many
// since that it is not known.
func (p *places) last(gfn addr.GFN, when time.Duration) uint64 {
	i := p.search(gfn)
	switch {
	case i == len(p.list) || !p.list[i].Contains(gfn):
		return 0
	case p.list[i].since <= when:
		return p.list[i].op
	}
	for n := p.n - 1; n >= max(0, p.n-lateZaps); n-- {
		if z := &p.late[n%lateZaps]; z.since <= when && z.Contains(gfn) {
			return z.op
		}
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
