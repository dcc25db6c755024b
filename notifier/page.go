package notifier

import (
	"errors"
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// InvalidatePage tells of a single page, the one that starts at hva, that was
// taken away without a bracket, as callers did in Linux 2.6.27 to 4.13. It is
// here to study them: between the change and this call a subscriber may derive
// from the old page again, which brackets are there to prevent.
//
// A subscriber that is no [PageInvalidator] is given what it has of the start
// and the end of a bracket of the page, or is told as a [SecondaryTLB];
// intervals that hold the page are told as in a bracket. It may sleep, and is
// called with the locks of a bracket held.
func (as *AddressSpace) InvalidatePage(hva addr.HVA) {
	inv := &Invalidation{Range: addr.HVAs(hva, addr.PageSize), Event: Clear, After: addr.ReadWrite}
	if err := check(inv.Range); err != nil {
		as.report(nil, "InvalidatePage", fmt.Errorf("%v: %w", inv.Range, err))
		return
	}
	lockorder.Covered()
	lockorder.Acquire(lockorder.Section)
	defer lockorder.Release(lockorder.Section)
	s := as.subs.Load()
	if s == nil {
		return
	}
	if s.used.Load() {
		_ = s.startIntervals(as, inv) // it may block, so they cannot refuse
		defer s.endIntervals(as)
	}
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		switch {
		case n.m.pageInvalidator != nil:
			n.callInvalidatePage(as, hva)
		case n.m.secondaryTLB != nil:
			n.callInvalidateSecondaryTLBs(as, inv.Range)
		default:
			if n.m.rangeStarter != nil {
				if err := n.callStart(as, inv); err != nil {
					_ = n.mayFail(as, inv, err) // reports it
				}
			}
			if n.m.rangeEnder != nil {
				n.callEnd(as, inv)
			}
		}
	}
}

func (n *Notifier) callInvalidatePage(as *AddressSpace, hva addr.HVA) {
	var err error
	defer as.contain(n.sub, "InvalidatePage", &err)
	n.m.pageInvalidator.InvalidatePage(hva)
}

// ChangePTE tells that in the bracket inv, which is open and holds the page that
// starts at hva, that page is pfn from now on. A [PTEChanger] follows it. A
// subscriber that is none, but a [PageInvalidator], is told to drop the page; any
// other has dropped it at the start of the bracket and is not told again. It
// does not sleep. It was last called in Linux 6.9.
//
// If the bracket is not open or does not hold the page, that is reported, and
// nobody is told.
func (as *AddressSpace) ChangePTE(inv *Invalidation, hva addr.HVA, pfn addr.PFN) {
	page := addr.HVAs(hva, addr.PageSize)
	if check(page) != nil || !inv.opened.Contains(page) {
		as.report(nil, "ChangePTE", fmt.Errorf("%v: %w", page, errNoBracket))
		return
	}
	s := as.subs.Load()
	if s == nil {
		return
	}
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		switch {
		case n.m.pteChanger != nil:
			n.callChangePTE(as, hva, pfn)
		case n.m.pageInvalidator != nil:
			n.callInvalidatePage(as, hva)
		}
	}
}

var errNoBracket = errors.New("there is no open bracket of the page")

func (n *Notifier) callChangePTE(as *AddressSpace, hva addr.HVA, pfn addr.PFN) {
	var err error
	defer as.contain(n.sub, "ChangePTE", &err)
	n.m.pteChanger.ChangePTE(hva, pfn)
}
