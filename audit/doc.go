// Package audit runs guests of several kinds under random operations of the host, and
// compares every view of their memory with every other one: a soak for the whole machine.
//
// A round is one machine: its guest, vCPUs, backing, dirty source, slot policy and
// operations all follow from the seed and the number of the round, so a round can be run
// again by itself. It has epochs (see package epoch). In each, with operations stopped,
// these are compared:
//
//	with the guest paused
//	dirty      a copy that learns of changes by harvests alone, with memory
//	tracker    the slots and translations, with their own invariants
//	slots      the slots, with what package mm says is mapped, page by page
//	maps       what package mm says is mapped, with /proc/self/maps
//	content    each page as the machine's table reads it, with /proc/self/mem
//	fork       each page, with a child that was forked at that moment
//	kvm        how many pages KVM has mapped for the guest, with how many slots show
//
//	with the guest running
//	guest      words that the guest loads, with the same words as the table reads them;
//	           and words that it stores
//
// The guest's loads are the judge of what a guest sees; that takes the guest probe, which
// every other round has. A difference is a [Divergence].
//
// What is compared stands still only because all changes of the mappings are the runner's
// own. Changes by others are not part of an audit.
package audit
