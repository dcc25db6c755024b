// Package audit runs guests of several kinds under random operations of the host, and
// compares every view of their memory with every other one: a soak for the whole machine.
//
// A round is one machine: its guest, vCPUs, backing, dirty source, slot policy, watches
// and operations all follow from the seed and the number of the round, so a round can be run
// again by itself. The machine itself stores to its memory all the time. In some rounds all of
// RAM is shown at two places. In those that have a watch,
// code that knows nothing of the machine changes its memory by system calls, from threads of
// its own, and forks it: see [hostops.Strays].
//
// A round has epochs (see package epoch). In each, with operations stopped, and what others
// did followed, these are compared:
//
//	with the guest paused
//	dirty      a copy that learns of changes by harvests alone, with memory
//	tracker    the slots and translations, with their own invariants
//	slots      the slots, with what package mm says is mapped, page by page
//	maps       what package mm says is mapped, with /proc/self/maps
//	pagemap    the same, with what the kernel's page tables have of each page
//	content    each page as the machine's table reads it, with /proc/self/mem
//	fork       each page, with a child that was forked at that moment
//	kvm        how many pages KVM has mapped for the guest, with how many slots show
//	strays     what the watches reported, with what others did: each change once
//	kernel     each range that KVM dropped, by its tracepoint, with what operations and
//	           reports say: somebody has to account for it; in rounds with a TraceWatch
//
//	with the guest running
//	guest      words that the guest loads, with the same words as the table reads them;
//	           and words that it stores
//
// The guest's loads are the judge of what a guest sees; that takes the guest probe, which
// every other round has. A difference is a [Divergence], with the trace of the page.
//
// # What it can find
//
// An audit that finds nothing proves something only if it would. The build with the tag
// gvm_defects breaks one rule at a time, by Config.Defect, and a test wants each found.
package audit
