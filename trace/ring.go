package trace

import (
	"runtime"
	"sync/atomic"
	"time"
)

// ring is a bounded queue of events: many may put one in and many take one out, none
// of whom waits for a lock. It is Vyukov's, with one thing more: who finds it full
// takes the place of the oldest event, which is lost. What has gone from the ring and
// was not taken by a reader is the count of those.
//
// Each cell says by its turn whose it is. The event of position pos is in cell pos
// modulo the size n:
//
//	turn      the cell
//	pos       is free for the event of pos; whoever moves tail to pos+1 may write it
//	pos+1     has that event; whoever moves head to pos+1 may read it, or write that of pos+n
//	pos+n     is free for the event of pos+n
//
// The store of a turn hands the cell over: what was done to it before is seen by
// whoever loads the turn. Between the two stores of a turn one goroutine owns the
// cell, so no event is torn.
//
// A writer that finds the ring full and the oldest event in somebody's hands, in the
// middle of being written or read, does not wait: its own event is the one that is
// lost.
type ring struct {
	cells []cell // a power of two of them
	mask  uint64
	start time.Time  // of the log
	test  *testpoint // nil: this is no test

	taken uint64 // events that readers took; belongs to whoever is the reader

	_       [64]byte // writers of one ring do not share a cache line with others
	tail    atomic.Uint64
	head    atomic.Uint64
	refused atomic.Uint64 // events that found the ring full, and its oldest cell in use
	_       [40]byte
}

// cell is two cache lines.
type cell struct {
	turn atomic.Uint64
	e    Event // belongs to whoever turn says
}

// newRing returns a ring of n events, rounded up to a power of two.
func newRing(n int, start time.Time, test *testpoint) *ring {
	size := 2 // with one cell, pos+1 and pos+n would be the same turn
	for size < n {
		size *= 2
	}
	r := &ring{cells: make([]cell, size), mask: uint64(size - 1), start: start, test: test}
	for i := range r.cells {
		r.cells[i].turn.Store(uint64(i))
	}
	return r
}

// put adds e, with the time of now, or counts it as lost. It does not wait: it tries
// again only when another writer has got on.
func (r *ring) put(e *Event) {
	early := r.test.early(r)
	for {
		pos := r.tail.Load()
		c := &r.cells[pos&r.mask]
		switch turn := c.turn.Load(); {
		case turn == pos:
			if !r.tail.CompareAndSwap(pos, pos+1) {
				continue
			}
		case r.tail.Load() != pos:
			continue // another writer has been faster
		case r.drop(pos-uint64(len(r.cells)), turn):
			// Nobody else can move tail: the cell of pos was not free.
			r.tail.Store(pos + 1)
		default:
			if r.test == nil || r.test.mutant != refusalUncounted {
				r.refused.Add(1)
			}
			return
		}
		// The clock is read after tail has moved: for why, see Log.merge.
		c.e = *e
		c.e.Time = time.Since(r.start)
		if c.e.At >= c.e.Time {
			c.e.At = 0 // it is just now: the two clocks differ by a little
		}
		if r.test != nil {
			r.test.write(&c.e, early)
		}
		c.turn.Store(pos + 1)
		return
	}
}

// drop takes the event of pos out, the oldest of a full ring, whose cell says turn, and
// keeps the cell. It reports false if somebody else has it.
func (r *ring) drop(pos, turn uint64) bool {
	if r.test != nil && r.test.mutant == dropUnowned {
		r.head.CompareAndSwap(pos, pos+1)
		return true
	}
	return turn == pos+1 && r.head.CompareAndSwap(pos, pos+1)
}

// lost returns how many events were dropped or refused so far. One reader at a time
// takes events, and calls it.
func (r *ring) lost() uint64 { return r.head.Load() - r.taken + r.refused.Load() }

// take moves the events that are in the ring, or in the middle of being put there, to
// events. It waits for those who are putting one, for as long as they take to copy it.
func (r *ring) take(events []Event) []Event {
	n := uint64(len(r.cells))
	// Add and not Load: no processor begins it before what precedes it is done, which is
	// to look at the clock.
	for end := r.tail.Add(0); ; {
		pos := r.head.Load()
		if int64(end-pos) <= 0 {
			return events
		}
		c := &r.cells[pos&r.mask]
		if c.turn.Load() != pos+1 {
			if r.test != nil && r.test.mutant == pendingUnawaited && r.head.Load() == pos {
				return events
			}
			runtime.Gosched() // somebody is writing it, or has dropped it
			continue
		}
		if !r.head.CompareAndSwap(pos, pos+1) {
			continue
		}
		if r.test != nil {
			r.test.reach(reading)
		}
		events = append(events, c.e)
		r.taken++
		c.turn.Store(pos + n)
	}
}
