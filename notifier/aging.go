package notifier

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
)

// ClearFlushYoung clears the accessed bits that subscribers have for r, and
// reports whether one was set. All that have such bits are asked, a
// [FlushYounger] in that way, others by ClearYoung. It does not sleep, so it may
// be called with the locks of page tables held. A range that is empty or not
// page aligned is reported, and false.
func (as *AddressSpace) ClearFlushYoung(r addr.HVARange) bool {
	return as.age("ClearFlushYoung", r, (*Notifier).callClearFlushYoung)
}

// ClearYoung is ClearFlushYoung for a caller who does not mind that accesses
// through TLBs are missed: a [YoungClearer] need not flush. Others are asked by
// ClearFlushYoung.
func (as *AddressSpace) ClearYoung(r addr.HVARange) bool {
	return as.age("ClearYoung", r, (*Notifier).callClearYoung)
}

func (as *AddressSpace) age(method string, r addr.HVARange, call func(*Notifier, *AddressSpace, addr.HVARange) bool) (young bool) {
	s := as.forRange(method, r)
	if s == nil {
		return false
	}
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if n.m.flushYounger != nil || n.m.youngClearer != nil {
			young = call(n, as, r) || young
		}
	}
	return young
}

// forRange returns the subscriptions, or nil if there are none or r is not a
// range to tell them of.
func (as *AddressSpace) forRange(method string, r addr.HVARange) *subscriptions {
	if err := check(r); err != nil {
		as.report(nil, method, fmt.Errorf("%v: %w", r, err))
		return nil
	}
	s := as.subs.Load()
	if s == nil || s.first.Load() == nil {
		return nil
	}
	return s
}

func (n *Notifier) callClearFlushYoung(as *AddressSpace, r addr.HVARange) bool {
	var err error
	if n.m.flushYounger == nil {
		defer as.contain(n.sub, "ClearYoung", &err)
		return n.m.youngClearer.ClearYoung(r)
	}
	defer as.contain(n.sub, "ClearFlushYoung", &err)
	return n.m.flushYounger.ClearFlushYoung(r)
}

func (n *Notifier) callClearYoung(as *AddressSpace, r addr.HVARange) bool {
	if n.m.youngClearer == nil {
		return n.callClearFlushYoung(as, r)
	}
	var err error
	defer as.contain(n.sub, "ClearYoung", &err)
	return n.m.youngClearer.ClearYoung(r)
}

// TestYoung reports whether a subscriber has the accessed bit set of the page
// that starts at hva. It asks until one has. It does not sleep.
func (as *AddressSpace) TestYoung(hva addr.HVA) bool {
	s := as.forRange("TestYoung", addr.HVAs(hva, addr.PageSize))
	if s == nil {
		return false
	}
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if n.m.youngTester != nil && n.callTestYoung(as, hva) {
			return true
		}
	}
	return false
}

func (n *Notifier) callTestYoung(as *AddressSpace, hva addr.HVA) bool {
	var err error
	defer as.contain(n.sub, "TestYoung", &err)
	return n.m.youngTester.TestYoung(hva)
}

// InvalidateSecondaryTLBs tells every [SecondaryTLB] that entries of r were
// cleared. The caller still holds the lock under which it cleared them if their
// pages can be freed before the end of the bracket, or others have taken their
// place; if permissions were taken away, or the same content has moved, it may
// wait until the end. It does not sleep.
func (as *AddressSpace) InvalidateSecondaryTLBs(r addr.HVARange) {
	s := as.forRange("InvalidateSecondaryTLBs", r)
	if s == nil {
		return
	}
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if n.m.secondaryTLB != nil {
			n.callInvalidateSecondaryTLBs(as, r)
		}
	}
}

func (n *Notifier) callInvalidateSecondaryTLBs(as *AddressSpace, r addr.HVARange) {
	var err error
	defer as.contain(n.sub, "InvalidateSecondaryTLBs", &err)
	n.m.secondaryTLB.InvalidateSecondaryTLBs(r)
}
