package hmm

import (
	"fmt"
	"syscall"

	"github.com/secondmmu/gvm/addr"
)

// Error is a look at page tables that failed. errors.Is finds Errno in it, and
// what Err wraps.
type Error struct {
	Op    string        // what was tried: "snapshot", "fault", "populate"
	Range addr.HVARange // on what
	At    addr.HVA      // where it failed; Range.Start if nowhere in particular
	Why   string
	Errno syscall.Errno
	Err   error // what the page tables, the context or the address space said, or nil

	// Unlocked: the mapping lock has been given back, which the caller of
	// Range.Fault held, because a fault would have blocked and was not to. So
	// what it waits for can be done by somebody who needs the lock. Linux does
	// the same, and tells by EAGAIN alone, which can mean two things.
	Unlocked bool
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s %v: at %v: %s: %v", e.Op, e.Range, e.At, e.Why, e.Errno)
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	return s
}

func (e *Error) Unwrap() []error {
	if e.Err != nil {
		return []error{e.Errno, e.Err}
	}
	return []error{e.Errno}
}

// errnoError is an error of this package that is also an errno.
type errnoError struct {
	text  string
	errno syscall.Errno
}

func (e *errnoError) Error() string { return e.text }
func (e *errnoError) Unwrap() error { return e.errno }
