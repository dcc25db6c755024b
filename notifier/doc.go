// Package notifier models the host address space of a VMM process and tells
// subscribers of every change to its mappings before and after the change: the
// mechanism of Linux's MMU notifiers (mm/mmu_notifier.c), for the views of
// memory that a process keeps for itself.
//
// A change to the mappings of a range is bracketed:
//
//	InvalidateRangeStart   every page of the range is still mapped as it was
//	the system call
//	InvalidateRangeEnd     what the range is now can be looked at
//
// Between the two calls a subscriber must not establish anything that relies on
// the mappings of the range. Brackets overlap and nest freely, for the same
// bytes too, so a subscriber counts them. The range may be larger than what was
// asked of the caller.
//
// # Two ways to subscribe
//
// A [Subscriber] is told of every bracket of its address space. It embeds a
// [Notifier], which is its place on the chain, and implements what it wants to
// be told of:
//
//	Subscriber             Release: the mappings are about to go (required)
//	RangeStarter           before a change
//	RangeEnder             after it
//	SecondaryTLB           instead of both, for hardware that walks the host's page tables
//	FlushYounger           test and clear the accessed bit, with a flush
//	YoungClearer           the same without one
//	YoungTester            test it
//	PTEChanger             a page takes another's place inside a bracket; by default InvalidatePage
//	PageInvalidator        one page without a bracket; by default a bracket of that page
//
// An [IntervalSubscriber] is told of the brackets that overlap its one range, and
// can tell without a lock of everybody's whether what it looked up in the range
// still stands. It embeds an [Interval]; see there.
//
// # Two lifetimes
//
// An [AddressSpace] has users, who rely on its mappings, and a count, which keeps
// the structure. All users together own one count. When the last user goes, the
// address space exits: subscribers are released, and then the mappings go. A
// subscription owns a count, never a user: with a user it would keep the
// mappings from ever going, and so its own release from being called.
//
// # Three ways to end a subscription
//
//	Unregister            calls Release, unless the exit has, and waits until no method runs
//	UnregisterNoRelease   neither; the subscriber is freed with Call, or later
//	Kind.Put              UnregisterNoRelease for the last of those that share it; then it is freed
//
// Whoever frees what the methods themselves need, such as a plugin that is
// unloaded, ends its subscriptions, calls [Synchronize], and then frees it.
//
// # What is guaranteed
//
//   - A subscriber that is given an end was given its start: registration holds
//     every lock that a bracket of the address space can run under.
//   - Registration that fails has changed nothing.
//   - Release of a subscription runs at most once, whoever ends it, and exactly
//     once if it is ended by Unregister or by the exit. It has returned before
//     Unregister returns, and before the exit gives up the first page.
//   - After Unregister returned, no method of the subscriber runs or will run.
//   - A subscriber that panics is reported with its name and the method; the
//     others are told all the same.
//
// # Why release runs once
//
// Exit and Unregister may meet. Both walk in a read section of the same srcu
// domain, and the one that claims the subscription inside its section calls
// Release and then unlinks. The other one, having seen the claim, waits for a
// grace period: the claimer's section was open when that wait began, so when it
// ends Release has returned. The subscription stays linked until then. Were it
// unlinked before, a bracket in between would pass it by, and the page would be
// freed while the subscriber still shows it.
//
// # Locks
//
// Package internal/lockorder has the order. Brackets run with the mapping lock
// held, or with the lock of a reverse map of the pages: [ReverseMap] says for
// whom the latter is. A method of a subscriber takes neither, and does not
// register or unregister, save as its documentation says; it may sleep, except
// where the bracket says otherwise. Unregister and the exit wait for methods of
// all address spaces, because these share one domain, [srcu.Default]: one of
// their own would cost each of them memory by the CPU, and grace periods are
// rare. A method that sleeps for long therefore delays every Unregister, but
// nobody's brackets.
//
// The errors of this package wrap a syscall.Errno, the one that Linux gives in
// the same place.
package notifier
