// Package srcu is sleepable read-copy-update: readers announce sections that
// may block for any time, and an updater can wait until every section that was
// open when it began to wait has ended.
//
// It follows the counter protocol of the kernel's SRCU (kernel/rcu/srcutree.c).
// A reader is counted in one of two ranks. An updater flips the rank that new
// readers use and waits for the other one to drain, so that a stream of short
// readers cannot hold it up for ever.
//
// In the terms of the Go memory model, the end of a read section that
// Synchronize waited for is synchronized before the return of Synchronize, and
// the call of Synchronize is synchronized before the begin of every section
// that it did not wait for.
package srcu

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// Domain is one set of readers and the updaters that wait for them. Domains are
// independent of each other. The zero Domain is ready for use; a Domain must
// not be copied after first use.
type Domain struct {
	idx   atomic.Uint64 // its low bit is the rank that new readers enter
	ranks [2]rank

	gp sync.Mutex // one grace period at a time: idx must stand still during a scan
}

// rank counts the sections that were ever opened and closed in it. Two counters
// that only grow, not one that goes up and down, because a scan cannot read
// several counters at one instant; see drained.
type rank struct {
	locks, unlocks atomic.Uint64
	_              [112]byte // both counters of a rank share a line; the ranks do not
}

// ReadLock opens a read section and returns its token, which goes to ReadUnlock
// once. It never blocks and never allocates. Sections nest, and the goroutine
// may block inside one; it must not call Synchronize on the same domain there,
// nor wait for a lock whose holder may be in Synchronize.
func (d *Domain) ReadLock() (idx int) {
	i := d.idx.Load() & 1
	d.ranks[i].locks.Add(1) // sequentially consistent: pairs with the loads of drained
	return int(i)
}

// ReadUnlock closes the section that ReadLock opened with the token idx. It may
// be called on another thread than ReadLock was.
func (d *Domain) ReadUnlock(idx int) {
	d.ranks[idx].unlocks.Add(1)
}

// Synchronize returns once every read section of d that was open when it was
// called has been closed. It blocks for as long as they last.
func (d *Domain) Synchronize() {
	d.gp.Lock()
	defer d.gp.Unlock()

	// A reader may have fetched idx before the last flip and counted itself in
	// only after that grace period's scan: it sits in the rank that is not in use.
	d.drain(1 - d.idx.Load()&1)
	d.idx.Add(1)
	d.drain(1 - d.idx.Load()&1)
}

// drain waits until no section is open in rank i.
func (d *Domain) drain(i uint64) {
	const spins = 16
	for n, pause := 0, 10*time.Microsecond; !d.drained(i); n++ {
		if n < spins {
			runtime.Gosched()
			continue
		}
		time.Sleep(pause)
		pause = min(2*pause, time.Millisecond)
	}
}

// drained reports whether there was an instant during the call at which every
// section opened in rank i before the call had been closed.
//
// The unlocks are read first. A section whose unlock was counted has its lock
// counted too; the other order could count the unlock of a section that began
// after the locks were read, and let it stand for one that is still open.
func (d *Domain) drained(i uint64) bool {
	unlocks := d.ranks[i].unlocks.Load()
	return unlocks == d.ranks[i].locks.Load()
}
