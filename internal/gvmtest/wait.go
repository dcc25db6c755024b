package gvmtest

import (
	"runtime"
	"time"
)

const (
	// Limit is how long what has to happen soon may take: a test that meets it has
	// met something that never ends.
	Limit = 20 * time.Second
	// Grace is how long what must not happen is given to happen all the same.
	Grace = time.Millisecond
)

// LimitFor is Limit for a check of a [Mutant]. One that has a defect to find expects
// to meet it.
func LimitFor[M comparable](defect M) time.Duration {
	var sound M
	if defect == sound {
		return Limit
	}
	return 100 * time.Millisecond
}

// GraceFor is Grace for a check of a [Mutant]. One that has a defect to find gives
// more, which on a busy machine it needs.
func GraceFor[M comparable](defect M) time.Duration {
	var sound M
	if defect == sound {
		return Grace
	}
	return 100 * time.Millisecond
}

// Closed reports whether c, on which nothing is sent, is closed.
func Closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// ClosedWithin waits for c to be closed, but not for longer than d, and reports whether
// it was.
func ClosedWithin(c <-chan struct{}, d time.Duration) bool {
	select {
	case <-c:
		return true
	case <-time.After(d):
		return false
	}
}

// Eventually waits for a condition that is about to come true, and reports whether it
// did within [Limit]. It does not sleep.
func Eventually(cond func() bool) bool {
	for deadline := time.Now().Add(Limit); !cond(); runtime.Gosched() {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// Background starts f and returns a channel that is closed when it has returned.
func Background(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	return done
}
