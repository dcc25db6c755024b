package srcu

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
)

// The sequence word: grace periods ended above, the state below.
const (
	seqShift = 2
	seqState = 1<<seqShift - 1
	idle     = 0
	scan1    = 1 // waiting for the rank that was not in use
	scan2    = 2 // waiting for the rank that was retired
)

// Cookie stands for a grace period that begins after it was taken.
type Cookie uint64

// CompletedState is a cookie for which Poll always reports true.
const CompletedState Cookie = 0

// SameState reports whether two cookies stand for the same grace period.
func SameState(a, b Cookie) bool { return a == b }

// snapshot returns the number of grace periods that have to have ended for one
// to have begun after this call and ended. One that is under way does not count:
// it may have looked at readers before the caller's last write.
func (d *Domain) snapshot() uint64 {
	// A full fence, so that a grace period that the load below does not see
	// begun finds the caller's writes in memory.
	d.requests.Add(1)
	seq := d.seq.Load()
	if seq&seqState == idle || d.mutant == joinRunning {
		return seq>>seqShift + 1
	}
	return seq>>seqShift + 2
}

// ended reports whether n grace periods have ended, allowing for wrap.
func (d *Domain) ended(n uint64) bool {
	now := d.seq.Load() >> seqShift
	if d.mutant == pollExactly {
		return now == n
	}
	return int64((now-n)<<seqShift) >= 0
}

// Synchronize returns once every read section of d that was open when it was
// called has been closed. It blocks for as long as they last. Calls at the same
// time share grace periods. It says nothing of callbacks: for those see Barrier.
//
// It panics if it finds that more sections were closed than opened; for what that
// means see Misuse in the package comment.
func (d *Domain) Synchronize() { d.synchronize("Synchronize") }

// SynchronizeExpedited is Synchronize at the cost of more processor time: it
// does not sleep while it waits, nor does a grace period that it waits behind.
func (d *Domain) SynchronizeExpedited() {
	d.rush.Add(1)
	defer d.rush.Add(-1)
	d.synchronize("SynchronizeExpedited")
}

func (d *Domain) synchronize(what string) {
	d.alive(what)
	if debug {
		d.notInside(what)
	}
	d.runUntil(d.snapshot())
}

// runUntil returns when n grace periods have ended, and runs those that nobody
// else does.
func (d *Domain) runUntil(n uint64) {
	if d.mutant != noMutex {
		d.gp.Lock()
		defer d.gp.Unlock()
	}
	for !d.ended(n) {
		d.gracePeriod()
	}
}

// gracePeriod runs one grace period. If it panics, none has ended: seq is what it
// was, and whoever took a cookie meanwhile waits for one more than he has to.
//
// Preconditions: d.gp is held.
func (d *Domain) gracePeriod() {
	before, start := d.seq.Load(), time.Since(epoch)
	ended := false
	defer func() {
		if !ended {
			d.seq.Store(before)
		}
		d.gpStart.Store(0)
	}()
	d.gpStart.Store(int64(start))
	d.seq.Add(scan1 - idle)
	watch := watchdog{start: start}

	// From here on every section that is not yet counted sees what was written
	// before this grace period was asked for; see the package comment.
	if asymmetric && d.mutant != noMembarrier {
		membarrier()
	}
	unused := 1 - d.idx.Load()&1
	if d.mutant == flipFirst {
		d.idx.Add(1)
	}
	if d.mutant != noScan1 {
		d.drain(unused, &watch)
	}
	d.seq.Add(scan2 - scan1)
	if d.mutant != noFlip && d.mutant != flipFirst {
		d.idx.Add(1)
	}
	d.drain(1-d.idx.Load()&1, &watch)

	d.seq.Add(1<<seqShift - scan2)
	ended = true
	if took := time.Since(epoch) - start; int64(took) > d.longest.Load() {
		d.longest.Store(int64(took))
	}
}

// drain waits until no section is open in rank i. It looks again and again, so
// readers have nobody to wake: at first at once, later after sleeping, longer
// and longer unless somebody is in a hurry.
func (d *Domain) drain(i uint64, watch *watchdog) {
	const (
		spins, spinsInHurry = 32, 4096
		shortest, longest   = 20 * time.Microsecond, time.Millisecond
	)
	pause := shortest
	for n := 0; !d.drained(i); n++ {
		hurry := d.rush.Load() > 0
		if n < spins || hurry && n < spinsInHurry {
			runtime.Gosched()
			continue
		}
		watch.look(d, i)
		time.Sleep(pause)
		if pause = min(2*pause, longest); hurry {
			pause = shortest
		}
	}
}

// drained reports whether there was an instant during the call at which every
// section that had been opened in rank i before the call was closed.
//
// It panics if more sections were closed than opened, unless as many are open, which
// looks the same as none.
//
// Both sums are over the same readers: the closed sections of one that closes in
// between must not stand for the open section of another. One that registers
// after the list is loaded has its first section after the grace period's begin.
func (d *Domain) drained(i uint64) bool {
	readers := d.readers()
	if d.mutant == locksFirst {
		locks := d.sum(readers, i, (*cell).openedIn)
		return locks == d.sum(readers, i, (*cell).closedIn)
	}
	unlocks := d.sum(readers, i, (*cell).closedIn)
	if d.mutant == listPerSum {
		readers = d.readers()
	}
	locks := d.sum(readers, i, (*cell).openedIn)
	if d.mutant == unlocksAtLeast {
		return unlocks >= locks
	}
	if int64(locks-unlocks) < 0 {
		panic(fmt.Sprintf("srcu: %d more sections were closed than opened in rank %d: ReadUnlock was called without ReadLock, or twice", unlocks-locks, i))
	}
	return unlocks == locks
}

func (c *cell) openedIn(i uint64) uint64 { return atomic.LoadUint64(&c.locks[i]) }
func (c *cell) closedIn(i uint64) uint64 { return atomic.LoadUint64(&c.unlocks[i]) }

// readers returns the registered readers.
func (d *Domain) readers() []*Reader {
	if list := d.handles.Load(); list != nil {
		return *list
	}
	return nil
}

// sum adds up one counter of rank i over everybody who counts.
func (d *Domain) sum(readers []*Reader, i uint64, counter func(*cell, uint64) uint64) (n uint64) {
	for s := range d.shards {
		n += counter(&d.shards[s].cell, i)
	}
	if d.mutant != missRest {
		n += counter(&d.rest, i)
	}
	for _, r := range readers {
		n += counter(&r.cell, i)
	}
	return n
}

// GetState returns a cookie for a grace period that begins after the call. It
// starts none: unless somebody else does, Poll of the cookie stays false.
func (d *Domain) GetState() Cookie {
	d.alive("GetState")
	return cookie(d.snapshot())
}

// StartPoll returns a cookie as GetState does, and sees to it that the grace
// period is run. It does not block, and may be called in a read section.
func (d *Domain) StartPoll() Cookie {
	d.alive("StartPoll")
	n := d.snapshot()
	d.callbacks.need(d, n)
	return cookie(n)
}

// Poll reports whether the grace period of a cookie has ended. Once it has
// reported true for a cookie it always does.
func (d *Domain) Poll(c Cookie) bool {
	d.alive("Poll")
	return c == CompletedState || d.ended(uint64(c>>seqShift))
}

// cookie makes n distinct from CompletedState. It drops the bits of n that the
// sequence word has not, in which one number may differ from itself after a wrap.
func cookie(n uint64) Cookie { return Cookie(n<<seqShift | 1) }
