package perf

import (
	"time"

	"golang.org/x/sys/unix"
)

// Now returns the time as records have it: nanoseconds of CLOCK_MONOTONIC.
func Now() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0 // it does not fail for this clock
	}
	return uint64(ts.Nano())
}

// Clock converts the time of records to the time since some moment.
type Clock struct{ zero int64 } // nanoseconds of CLOCK_MONOTONIC at that moment

// NewClock returns that of a time of this process. Go counts time by CLOCK_MONOTONIC, from a
// zero of its own, so the difference of the two never changes. It is between what a look
// at the one clock before and another after one at the other say, and so between the closest
// of several.
func NewClock(start time.Time) Clock {
	least, most := int64(-1<<63), int64(1<<63-1)
	for range 16 {
		before := time.Since(start)
		ns := int64(Now())
		after := time.Since(start)
		least, most = max(least, ns-int64(after)), min(most, ns-int64(before))
	}
	return Clock{least + (most-least)/2}
}

// Since returns how long after the moment it was, by the time of a record. It is negative
// before.
func (c Clock) Since(ns uint64) time.Duration { return time.Duration(int64(ns) - c.zero) }
