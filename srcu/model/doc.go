// Package model explores the counter protocol of package srcu exhaustively: a few
// readers and updaters, in every order of their steps that an x86 processor
// permits. What it finds is a proof for small cases, or a counterexample.
//
// It is a model and not the Go code. A thread is a list of steps, each of which
// stands for a line of srcu and is named after it, so that code and model can be
// laid side by side.
//
// # Machine
//
// Memory is a handful of bytes. A processor has registers, a program counter and
// a store buffer: its own stores wait there, in order, for an arbitrary time, and
// until they arrive in memory nobody else sees them. Loads are executed in order,
// and look into the thread's own buffer first. That is TSO, the memory model of
// x86: the one thing that it reorders is a store with later loads of other
// places, which is the very thing that makes readers without fences difficult.
// A fence, and an instruction with a LOCK prefix, waits for the buffer to be empty.
//
// A step is an access to memory by a thread, together with what the thread does
// by itself before and after. Accesses that nobody can come between share a
// step: under a mutex, or of a word that has one writer. The arrival of a store
// in memory is a move of its own. A membarrier is a fence on each thread, each at
// a moment of its own during the call and in any order; that is less than a fence
// on all of them at one instant, and all that the kernel promises.
//
// A state is memory, processors, and what the properties have to remember of the
// past. [Explore] visits all that can be reached, each once, shortest way first.
// A scan that waits goes round in a finite circle of states, so nothing is cut
// off: programs are finite, or endless with counters of a few bits.
//
// # Properties
//
// Safety is looked at in every state; see [Property]. A wait that does not end is
// a cycle of states, which counts only if it is fair: every thread takes steps in
// it, or has none to take, and no store stays in a buffer for ever.
//
// # What is found
//
// Both flavours of the protocol have all properties in all cases. In particular,
// one membarrier for a grace period is enough, before the first scan: a section
// that was counted before it is in memory from there on, and one that was not
// sees whatever was written before. A membarrier between the scans is not enough:
// a reader that fetched idx before the last flip is counted in the rank of the
// first scan.
//
// The fence after the flip, and a second membarrier there, have to do with the
// width of the counters and nothing else. A reader can be counted in the retired
// rank once more after its last look at idx; without the fence, any number of
// times; and without the membarrier, as often as its store buffer has room for.
// If that happens between the two sums, and as often as a counter has values, the
// sums are equal when they should not be. Counters of two bits show it. With 64
// bits no store buffer is large enough.
//
// Two things look harmless and are not. The caller of Synchronize needs a fence
// between its stores and its look at seq, in both flavours: otherwise it may share
// a grace period whose membarrier has fenced a reader before those stores arrive
// and the caller after. And the list of registered readers is loaded once for
// both sums of a pass: a reader that leaves it in between has its closed sections
// counted and its opened ones not, which makes up for a section that is open.
//
// On TSO the fence before unlock is not needed, as stores are executed after
// earlier loads and arrive after earlier stores.
//
// # What is not covered
//
// Architectures other than x86, and compilers: that the accesses of a Go function
// are executed in the order in which they are written is assumed. So is that a
// counter has one writer at a time; what happens otherwise is shown. How the
// updater sleeps between two passes of a scan, Barrier, the queue of callbacks
// beyond one of each thread, and Cleanup are left to the tests of srcu.
package model
