package notifier

import (
	"fmt"
	"runtime/debug"

	"github.com/secondmmu/gvm/addr"
)

// Subscriber is told of all changes of an address space. Its type embeds
// Notifier. What else it implements of the interfaces below is found out once,
// when it is registered.
//
// Methods may run on several goroutines at a time, and until the subscription
// has ended. They may sleep unless the interface says otherwise.
type Subscriber interface {
	// Release is called before the address space gives up its mappings, or by
	// Unregister. The subscriber drops what it derived from them and
	// establishes nothing any more; changes may still be announced to it, and
	// one that was may go without its end. Release may sleep. When the address
	// space exits it may also end its own subscription, by UnregisterNoRelease
	// or Put; never by Unregister, which would wait for itself.
	Release()

	notifier() *Notifier
}

// RangeStarter is told of a change before it is made.
type RangeStarter interface {
	// InvalidateRangeStart drops what was derived from the mappings of the
	// range, and returns nil. Only if inv.NonBlockable, where it must not
	// sleep, it may return an error, EAGAIN: for that it would have to. A
	// subscriber that does implements no RangeEnder, because the ends that it
	// is given do not tell whether it was its own start that failed.
	InvalidateRangeStart(inv *Invalidation) error
}

// RangeEnder is told of a change after it was made, or was not.
type RangeEnder interface {
	InvalidateRangeEnd(inv *Invalidation)
}

// SecondaryTLB is hardware that walks the host's page tables and caches what it
// finds. It implements neither RangeStarter nor RangeEnder: the entry that is
// announced is gone already.
type SecondaryTLB interface {
	// InvalidateSecondaryTLBs drops what is cached of r. It must not sleep.
	InvalidateSecondaryTLBs(r addr.HVARange)
}

// FlushYounger has accessed bits, and a TLB to flush when they are cleared.
type FlushYounger interface {
	// ClearFlushYoung clears the accessed bits of r, flushes, and reports
	// whether one was set. It must not sleep.
	ClearFlushYoung(r addr.HVARange) bool
}

// YoungClearer has accessed bits.
type YoungClearer interface {
	// ClearYoung is ClearFlushYoung, but the flush may be left out: accesses
	// through a cached entry are then not seen. It must not sleep.
	ClearYoung(r addr.HVARange) bool
}

// YoungTester has accessed bits.
type YoungTester interface {
	// TestYoung reports whether the accessed bit of the page at hva is set. It
	// must not sleep.
	TestYoung(hva addr.HVA) bool
}

// PageInvalidator is told of single pages that were taken away without a
// bracket, as it was done before there were brackets.
type PageInvalidator interface {
	// InvalidatePage drops what was derived from the page at hva, whose mapping
	// has gone. It may sleep.
	InvalidatePage(hva addr.HVA)
}

// PTEChanger follows a page that takes the place of another, instead of having
// it dropped and found again.
type PTEChanger interface {
	// ChangePTE is called inside a bracket that holds the page at hva, which
	// is pfn now. A subscriber whose start found nothing there may ignore it.
	// It must not sleep.
	ChangePTE(hva addr.HVA, pfn addr.PFN)
}

// methods are those of a subscriber, nil where it does not have them.
type methods struct {
	rangeStarter    RangeStarter
	rangeEnder      RangeEnder
	secondaryTLB    SecondaryTLB
	flushYounger    FlushYounger
	youngClearer    YoungClearer
	youngTester     YoungTester
	pageInvalidator PageInvalidator
	pteChanger      PTEChanger
}

func methodsOf(s Subscriber) (m methods) {
	m.rangeStarter, _ = s.(RangeStarter)
	m.rangeEnder, _ = s.(RangeEnder)
	m.secondaryTLB, _ = s.(SecondaryTLB)
	m.flushYounger, _ = s.(FlushYounger)
	m.youngClearer, _ = s.(YoungClearer)
	m.youngTester, _ = s.(YoungTester)
	m.pageInvalidator, _ = s.(PageInvalidator)
	m.pteChanger, _ = s.(PTEChanger)
	return m
}

// contain is deferred around each method of a subscriber: it reports a panic, so
// that the subscriber's fault does not keep others from being told.
func (as *AddressSpace) contain(subscriber any, method string, failed *error) {
	if p := recover(); p != nil {
		err := &PanicError{p, debug.Stack()}
		as.report(subscriber, method, err)
		*failed = fmt.Errorf("%s of %T: %w", method, subscriber, err)
	}
}
