// Package srcu is sleepable read-copy-update: readers open sections in which
// they may block for any time, and an updater waits until every section that
// was open when it began to wait has been closed.
//
// An updater unlinks an object, so that new readers cannot find it, waits for a
// grace period, and then reuses or frees it:
//
//	reader                        updater
//	idx := d.ReadLock()
//	o := shared.Load()            old := shared.Swap(new)
//	use(o)                        d.Synchronize()
//	d.ReadUnlock(idx)             free(old)
//
// It is the kernel's SRCU (kernel/rcu/srcutree.c) for goroutines: readers of
// one [Domain] do not disturb each other, and domains do not wait for each
// other.
//
// # Guarantee
//
// For a grace period and a read section of its domain, in the terms of the Go
// memory model: either the end of the section is synchronized before the end of
// the grace period, or the begin of the grace period is synchronized before the
// begin of the section. The begin of a grace period is not earlier than the call
// of [Domain.Synchronize], [Domain.Call], [Domain.GetState] or [Domain.StartPoll]
// that it serves; its end is not later than the return of Synchronize, the call
// of the callback, or the [Domain.Poll] that reports true.
//
// Shared pointers are loaded and stored with sync/atomic, as always in Go.
//
// # Protocol
//
// A section is counted in one of two ranks: the low bit of idx says which one
// new sections enter. Each counter only grows, and there are two, of sections
// opened and of sections closed, because the counters are read one after the
// other: a single one that went up and down could miss a section that is opened
// on a shard already read and closed on one yet to be read. For the same reason
// closed sections are summed first: a section whose end is counted has its
// begin counted too.
//
// A grace period waits for the rank that is not in use to be empty, flips idx,
// and waits for the other rank. The flip is there so that a stream of short
// sections cannot hold up a grace period for ever. The first wait is there for
// readers that fetched idx before the last flip and were counted only after it.
//
// # Why there is no fence in a section
//
// A section that the sums miss has to see what was written before the grace
// period began. With ordinary counters that takes a full fence between counting
// the section and its first load, which costs more than all the rest. Here, on
// Linux and amd64, the counters are incremented by plain stores, and the updater
// issues the fences, once for a grace period: membarrier(2) makes every running
// thread of the process execute one.
//
//	reader                        updater
//	                              write
//	count the section  \          membarrier
//	first load         /          sum
//
// The reader's fence falls before the counting, and then its first load sees the
// write; or after the counting, and then the sum sees the section. On this
// architecture stores are not reordered with earlier loads and stores, so the
// end of a section needs no fence at all. Package model explores the protocol on
// small cases exhaustively, store buffers included.
//
// A plain increment is safe because nobody else increments that counter: a
// shard belongs to a P of the Go scheduler, to which the goroutine is pinned for
// the few instructions, and a [Reader] to one goroutine at a time. A goroutine
// that moves to another thread is moved by synchronization that orders its
// stores.
//
// Where membarrier is refused, on other architectures, with the build tag
// srcu_fenced, and under the race detector the increments are atomic additions
// instead, which are fences, and membarrier is not used. What the race detector
// checks is thus the same protocol with its orderings spelled out, not a part of
// it left out: the two differ in how a counter is incremented, in lock, unlock, inc
// and Reader.ReadUnlock, and in the membarrier that pairs with it. Which of them it
// is, is decided before the first section and does not change.
//
// # Misuse
//
// What can be seen at once is a panic that changes nothing: a token that ReadLock
// does not give, a [Head] that is queued already, a [Reader] that is closed inside
// a section, use after [Domain.Cleanup].
//
// A section that was closed twice, or never opened, is seen by the next grace
// period that waits for its rank, which panics. It has not ended, and the domain
// is as it was: the next Synchronize waits as this one did and finds the same,
// Stats and Cleanup answer, other domains go on. But the counts stay wrong. From
// then on a section that is open can make up for the one too many and be missed:
// such a domain guarantees nothing any more. Where the grace period is run for
// callbacks or StartPoll, there is nobody to recover, and the panic ends the
// process.
//
// A section that is never closed, such as one that waits for itself in
// Synchronize, is a stall, and is reported; see [Domain.OnStall].
//
// With the build tag gvm_debug every section is recorded. A token that is used
// twice, in another domain or by another goroutine is then a panic at once, and so
// is Synchronize or Barrier inside a section of the same goroutine. They say where
// the section was opened, and so does the report of a stall.
//
// # Cost
//
// A domain made by [New] has a shard of [ShardSize] bytes for each CPU, of which
// 32 are counters. The default domain serves everybody who would not gain by
// one of their own: a domain for each of ten thousand address spaces would take
// many megabytes. The price is that a section that sleeps long delays the grace
// periods of all; [Domain.Stats] tells how long one has been waited for.
package srcu
