package shadow

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
)

// Slot is a memslot: the host memory [HVA, HVA+NPages*PageSize) that backs the
// guest frames [GFN, GFN+NPages).
type Slot struct {
	ID       uint32
	GFN      addr.GFN
	NPages   uint64
	HVA      addr.HVA
	Access   addr.Access // Read or ReadWrite
	LogDirty bool        // the backend records which pages the guest writes
}

// GFNs returns the frames of s.
func (s Slot) GFNs() addr.GFNRange { return frames(s.GFN, s.NPages) }

// HVAs returns the host addresses of s.
func (s Slot) HVAs() addr.HVARange { return addr.HVAs(s.HVA, s.NPages<<addr.PageShift) }

func (s Slot) String() string {
	text := fmt.Sprintf("slot %d %v -> %v %v", s.ID, s.GFNs(), s.HVAs(), s.Access)
	if s.LogDirty {
		text += ", logged"
	}
	return text
}

// hva returns the host address of the page that shows gfn, which is one of s's.
func (s Slot) hva(gfn addr.GFN) addr.HVA { return s.HVA + addr.HVA(gfn-s.GFN)<<addr.PageShift }

// gfn returns the frame that shows the host page at hva, which is one of s's.
func (s Slot) gfn(hva addr.HVA) addr.GFN { return s.GFN + addr.GFN((hva-s.HVA)>>addr.PageShift) }

// sameMapping reports whether s and o differ in nothing but their numbers.
func (s Slot) sameMapping(o Slot) bool {
	s.ID = o.ID
	return s == o
}

// sameBacking reports whether what the frames that s and o have in common show,
// and what may be done with it, is the same in both.
func (s Slot) sameBacking(o Slot) bool {
	return s.HVA-addr.HVA(s.GFN.GPA()) == o.HVA-addr.HVA(o.GFN.GPA()) && s.Access == o.Access && s.LogDirty == o.LogDirty
}

// continues reports whether o goes on where s ends, as one slot.
func (s Slot) continues(o Slot) bool { return s.GFNs().End == o.GFN && s.sameBacking(o) }

// cut returns the part of s in r, which has frames of s.
func (s Slot) cut(r addr.GFNRange) Slot {
	r = r.Intersect(s.GFNs())
	s.GFN, s.NPages, s.HVA = r.Start, r.NPages(), s.hva(r.Start)
	return s
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
func (w Window) GFNs() addr.GFNRange { return frames(w.GFN, w.NPages) }

// HVAs returns the host addresses of w.
func (w Window) HVAs() addr.HVARange { return addr.HVAs(w.HVA, w.NPages<<addr.PageShift) }

// hva returns the host address of the page that shows gfn, which is one of w's.
func (w Window) hva(gfn addr.GFN) addr.HVA { return w.HVA + addr.HVA(gfn-w.GFN)<<addr.PageShift }

// gfn returns the frame that shows the host page at hva, which is one of w's.
func (w Window) gfn(hva addr.HVA) addr.GFN { return w.GFN + addr.GFN((hva-w.HVA)>>addr.PageShift) }

// continues reports whether o goes on where w ends, as one window.
func (w Window) continues(o Window) bool {
	return w.Name == o.Name && w.GFNs().End == o.GFN && w.HVAs().End == o.HVA
}

// frames returns the range of n frames from gfn. It saturates where gfn+n would
// wrap.
func frames(gfn addr.GFN, n uint64) addr.GFNRange {
	end := gfn + addr.GFN(n)
	if end < gfn {
		end = ^addr.GFN(0)
	}
	return addr.GFNRange{Start: gfn, End: end}
}
