package trace

import "time"

// mutant is a defect that tests switch on in a log, to see that they notice.
type mutant uint8

const (
	sound            mutant = iota
	clockBeforeClaim        // a writer looks at the clock before the reader can see that an event is coming
	dropUnowned             // a writer that finds the ring full takes the oldest cell, whoever has it
	refusalUncounted        // an event that finds the oldest cell in use is not counted
	pendingUnawaited        // a reader leaves an event that is being written for later
	unheld                  // a reader returns what is newer than its look at the clock
	firstOpStays            // a touch belongs to the operation that had to do with the page first
	toldIsWhen              // a fault that is told of late belongs to the operation that came last until then
)

// point is a place at which a test may want to do something.
type point uint8

const (
	claiming point = iota // a writer has looked at the clock, with clockBeforeClaim
	writing               // a writer has a cell, and has not handed it over
	reading               // a reader has a cell, and has not copied it
	looked                // a reader has looked at the clock, and not at the rings
)

// testpoint is what a test does to a log.
type testpoint struct {
	mutant mutant
	hook   func(point)
}

func (t *testpoint) reach(p point) {
	if t.hook != nil {
		t.hook(p)
	}
}

// early returns what the clock says before a writer has a cell, for clockBeforeClaim.
func (t *testpoint) early(r *ring) time.Duration {
	if t == nil || t.mutant != clockBeforeClaim {
		return 0
	}
	now := time.Since(r.start)
	t.reach(claiming)
	return now
}

// write is called by a writer who has written e.
func (t *testpoint) write(e *Event, early time.Duration) {
	if early != 0 {
		e.Time = early
	}
	t.reach(writing)
}
