package trace

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// vcpuRings is how many vCPUs have a ring of their own. Others share theirs, which
// costs time when they write at once, and nothing else.
const vcpuRings = 64

// Log is a record in progress. It keeps the newest events. Its methods may be called
// from any goroutine. Record and NewOp neither wait nor allocate, but for the first event of
// each ring, which makes it. A nil *Log keeps nothing.
type Log struct {
	size  int       // events that are kept; immutable
	start time.Time // immutable
	test  *testpoint

	ops    atomic.Uint64 // operations begun
	host   atomic.Pointer[ring]
	kernel atomic.Pointer[ring]
	vcpus  [vcpuRings]atomic.Pointer[ring]

	mu     sync.Mutex // of readers; protects what follows; a leaf of the lock order
	held   []Event    // taken out of the rings, and too new to be numbered
	kept   []Event    // numbered, in order; the newest size of them are what the log has
	next   uint64     // number of the newest
	lost   [vcpuRings + 2]uint64
	places places
}

// NewLog returns a log that keeps at least the newest n events that nobody has read,
// of each ring, and the newest n of all that a reader has put in order; n is at least 1.
// An event takes 128 bytes of a ring, and a ring is made with its first event.
func NewLog(n int) *Log { return newLog(n, nil) }

func newLog(n int, test *testpoint) *Log {
	return &Log{size: max(n, 1), start: time.Now(), test: test}
}

// Start returns when the log was made: the time that events count from.
func (l *Log) Start() time.Time { return l.start }

// NewOp returns a number that ties the events of one host operation together.
func (l *Log) NewOp() uint64 {
	if l == nil {
		return 0
	}
	return l.ops.Add(1)
}

// Record adds e, with the time of now. The strings of e are kept, so they are
// constants, or made for this event; the fields are those that its kind has. Seq and Time are
// ignored, and At if it is not before now. The order is that of recording, whatever At says.
//
// Events that one goroutine records stay in their order, and so do those of
// several that wait for each other in between.
func (l *Log) Record(e Event) {
	if l == nil {
		return
	}
	p := l.ringOf(&e)
	r := p.Load()
	if r == nil {
		r = l.makeRing(p)
	}
	r.put(&e)
}

func (l *Log) ringOf(e *Event) *atomic.Pointer[ring] {
	switch e.Kind.Lane() {
	case LaneVCPU:
		return &l.vcpus[uint(e.VCPU)%vcpuRings]
	case LaneKernel:
		return &l.kernel
	}
	return &l.host
}

// makeRing is Record's slow path.
func (l *Log) makeRing(p *atomic.Pointer[ring]) *ring {
	p.CompareAndSwap(nil, newRing(l.size, l.start, l.test))
	return p.Load()
}

// Len returns the number of the newest event: how many were recorded so far, kept or not.
// It waits for writers and readers that are in the middle of an event.
func (l *Log) Len() uint64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.merge()
	return l.next
}

// Since returns the events with numbers above seq, oldest first, and how many of them
// are missing because newer ones took their place. Every event is among the two that was
// recorded before Since was called, and no later call returns one that comes before
// these. It waits like Len.
func (l *Log) Since(seq uint64) (events []Event, lost uint64) {
	if l == nil {
		return nil, 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.merge()
	if seq >= l.next {
		return nil, 0
	}
	kept := l.kept[max(0, len(l.kept)-l.size):]
	i, _ := slices.BinarySearchFunc(kept, seq+1, func(e Event, seq uint64) int { return cmp.Compare(e.Seq, seq) })
	events = slices.Clone(kept[i:])
	return events, l.next - seq - uint64(len(events))
}

// merge takes the events out of all rings, orders them by their times and numbers them.
//
//	reader                           writer
//	now := clock
//	                                 tail++
//	                                 time := clock
//	takes up to tail                 hands the event over
//
// A writer looks at the clock after it has moved tail. So an event that the reader does
// not find, and does not wait for, is not older than now: all that are, the reader has,
// and can number. What is newer is held for the next time.
//
// Preconditions: l.mu is held.
func (l *Log) merge() {
	now := time.Since(l.start)
	if l.test != nil {
		l.test.reach(looked)
	}
	batch := l.held
	missing := uint64(0)
	take := func(i int, p *atomic.Pointer[ring]) {
		r := p.Load()
		if r == nil {
			return
		}
		batch = r.take(batch)
		lost := r.lost()
		missing += lost - l.lost[i]
		l.lost[i] = lost
	}
	take(0, &l.host)
	take(1, &l.kernel)
	for i := range l.vcpus {
		take(2+i, &l.vcpus[i])
	}
	// Events of one ring that have the same time stay in their order.
	slices.SortStableFunc(batch, func(a, b Event) int { return cmp.Compare(a.Time, b.Time) })
	n, _ := slices.BinarySearchFunc(batch, now, func(e Event, now time.Duration) int {
		if e.Time <= now {
			return -1
		}
		return 1
	})
	if l.test != nil && l.test.mutant == unheld {
		n = len(batch)
	}
	l.next += missing
	for i := range batch[:n] {
		e := &batch[i]
		l.next++
		e.Seq = l.next
		l.places.tie(e, l.test)
	}
	l.kept = append(l.kept, batch[:n]...)
	if len(l.kept) >= 2*l.size {
		l.kept = append(l.kept[:0], l.kept[len(l.kept)-l.size:]...)
	}
	l.held = append([]Event(nil), batch[n:]...)
}
