package kvm

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// fd is a descriptor, with a count of the calls that are using it so that it is
// not closed, and its number not reused, under any of them. The zero fd is
// closed.
//
// state is organized as follows:
//
//	bit 0   open: while it is clear, acquire fails
//	rest    references: calls under way
//
// Whoever takes state to zero, and so finds the descriptor closed and unused,
// destroys it. That is the only time at which raw, mem and ring change hands:
//
//	call                     close
//	acquire: +ref if open
//	                         clear open, +ref
//	the request
//	release: -ref            release: -ref
//
// The two releases may come in either order and the second destroys. Because
// state is one word, an acquire comes either before the clearing of open, and is
// then counted, or after it, and then fails.
type fd struct {
	state atomic.Uint64
	raw   int
	mem   []byte // mapping of the descriptor that goes with it; nil if none
	ring  []byte // another: of a vCPU that has mapped its dirty ring, set once by a call
}

const (
	fdOpen = 1 << 0
	fdRef  = 1 << 1
)

// init opens f on descriptor raw, before anybody else can see f.
func (f *fd) init(raw int, mem []byte) {
	f.raw, f.mem = raw, mem
	f.state.Store(fdOpen)
}

// acquire takes a reference, to be given back by release. It reports false, and
// takes none, if f is closed.
func (f *fd) acquire() bool {
	for {
		old := f.state.Load()
		if old&fdOpen == 0 {
			return false
		}
		if f.state.CompareAndSwap(old, old+fdRef) {
			return true
		}
	}
}

func (f *fd) release() error {
	if f.state.Add(^uint64(fdRef-1)) != 0 {
		return nil
	}
	return f.destroy()
}

// close marks f as closed and drops it. The error is that of close(2) and
// munmap(2) if no call was using f.
func (f *fd) close() error {
	for {
		old := f.state.Load()
		if old&fdOpen == 0 {
			return closedError("close")
		}
		if f.state.CompareAndSwap(old, old-fdOpen+fdRef) {
			return f.release()
		}
	}
}

func (f *fd) destroy() error {
	var first error
	note := func(op string, err error) {
		if err != nil && first == nil {
			first = &Error{Op: op, Errno: errnoOf(err)}
		}
	}
	for _, mem := range [...][]byte{f.mem, f.ring} {
		if mem != nil {
			note("munmap", unix.Munmap(mem))
		}
	}
	note("close", unix.Close(f.raw))
	return first
}
