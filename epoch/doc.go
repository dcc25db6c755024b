// Package epoch runs a guest in epochs and says of each which pages were dirty, what it
// cost to find out, and, if asked to, whether any was missed.
//
// A run has one machine with one dirty source, see vm.DirtySource. In every epoch the
// guest runs for a while, the host carries out operations on its memory, if there are
// any to carry out, and then a checkpoint is taken as a snapshot would take it: harvests
// while the guest goes on, and a last one while it is paused.
//
// # Verification
//
// A verified run keeps a copy of the guest's memory that learns of changes by harvests
// alone: what is dirty is copied, what is discarded reads zero. With the guest paused and
// no operation in progress, the copy is compared with memory, page by page. A page that
// differs is missing: somebody who restored the copy would run on stale data. One that
// was reported, and is what it was, is spurious, which costs time and loses nothing.
//
// In some epochs the snapshot fails, by the copy's refusal, and the harvest is aborted.
// What it had must come again.
//
// A page that has no memory when it is compared has no content, and is left out; what is
// mapped there later is content that is new, which must be reported.
//
// # Sensitivity
//
// A verifier that never finds a page proves nothing. The build with tag gvm_defects has
// Config.Defect, by which one rule at a time is broken: see Defects.
package epoch
