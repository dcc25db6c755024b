package notifier

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/srcu"
)

// ErrExited is returned where an address space has no users any more. It is
// EINVAL for errors.Is.
var ErrExited error = &errnoError{"the address space has exited", syscall.EINVAL}

// errnoError is an error of this package that is also an errno.
type errnoError struct {
	text  string
	errno syscall.Errno
}

func (e *errnoError) Error() string { return e.text }
func (e *errnoError) Unwrap() error { return e.errno }

// chains is the domain in whose read sections every chain is walked.
var chains = srcu.Default()

// AddressSpace is the host address space that guest memory is mapped in, as far
// as subscribers need to know it: Linux's mm_struct. It is made by New.
type AddressSpace struct {
	users    atomic.Int64 // who rely on the mappings; at 0 the address space exits
	count    atomic.Int64 // who keep the structure; all users together are one
	teardown func() error // immutable
	reporter func(error)  // immutable

	// mmapLock is held for writing by whoever changes mappings, and for reading
	// by whoever relies on their standing still.
	mmapLock rwLock
	regions  []*Region // protected by mmapLock

	// subs is nil until the first registration. It is set once, with all locks
	// held, and then stays until count is 0. Whoever holds mmapLock for
	// writing reads it exactly; others, who hold a user or a count, may find it
	// nil while it is being set, which is before the registration is visible.
	subs atomic.Pointer[subscriptions]

	waits waits

	mutant mutant            // a defect, in tests of the tests; none otherwise
	step   func(name string) // called at each step of a registration, in tests
}

// Options are what an address space is made with.
type Options struct {
	// Teardown gives up the mappings. It is called once, by the PutUser of the
	// last user, when every subscriber has been released and no method runs.
	// It may take the mapping lock.
	Teardown func() error

	// Report is told what somebody did against the rules, as an error of type
	// *Report: a subscriber that panics or fails where it must not, a
	// subscription that is ended twice. It must not block for long: it is
	// called where that happens, with whatever locks are held there. nil logs
	// with package slog.
	Report func(error)
}

// New returns an address space with one user, the caller, and no subscribers.
func New(o Options) *AddressSpace {
	if o.Report == nil {
		o.Report = func(err error) { slog.Error(err.Error()) }
	}
	as := &AddressSpace{mmapLock: newRWLock(lockorder.MmapLock), teardown: o.Teardown, reporter: o.Report}
	as.users.Store(1)
	as.count.Store(1)
	return as
}

// Report is something that somebody did against the rules of this package.
type Report struct {
	Subscriber any    // who did it, if it was a subscriber
	Method     string // in which of its methods, or the function that was called wrongly
	Err        error  // what it was; a *PanicError for a panic
}

func (r *Report) Error() string {
	if r.Subscriber == nil {
		return fmt.Sprintf("notifier: %s: %v", r.Method, r.Err)
	}
	return fmt.Sprintf("notifier: %s of subscriber %T: %v", r.Method, r.Subscriber, r.Err)
}

func (r *Report) Unwrap() error { return r.Err }

// PanicError is a panic in a method of a subscriber. If the value is an error,
// errors.Is finds it.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v\n%s", e.Value, e.Stack) }

func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

func (as *AddressSpace) report(subscriber any, method string, err error) {
	as.reporter(&Report{subscriber, method, err})
}

// Lock takes the mapping lock for writing: the caller is about to change
// mappings. It blocks until nobody else holds the lock.
func (as *AddressSpace) Lock() { _ = as.mmapLock.lock(context.Background()) }

// LockContext is Lock, unless ctx is done before the lock was taken; then it
// returns an error that is EINTR and the cause.
func (as *AddressSpace) LockContext(ctx context.Context) error {
	return interrupted("wait for the mapping lock", as.mmapLock.lock(ctx))
}

// Unlock gives the mapping lock back after Lock.
func (as *AddressSpace) Unlock() { as.mmapLock.unlock() }

// RLock takes the mapping lock for reading: mappings do not change until
// RUnlock. It must not be taken again inside, nor in a subscriber's method.
func (as *AddressSpace) RLock() { _ = as.mmapLock.rlock(context.Background()) }

// RLockContext is RLock, unless ctx is done before the lock was taken; then it
// returns an error that is EINTR and the cause.
func (as *AddressSpace) RLockContext(ctx context.Context) error {
	return interrupted("wait for the mapping lock", as.mmapLock.rlock(ctx))
}

// RUnlock gives the mapping lock back after RLock.
func (as *AddressSpace) RUnlock() { as.mmapLock.runlock() }

// interrupted returns the error of what a context kept from being done, or nil.
func interrupted(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w: %w", what, syscall.EINTR, err)
}

// TryGetUser makes the caller a user, unless there is none any more. A user is
// held for as long as the caller needs the mappings, which should be short; the
// address space does not exit before it is put back.
func (as *AddressSpace) TryGetUser() bool {
	for {
		n := as.users.Load()
		if n == 0 {
			return false
		}
		if as.users.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// PutUser gives a user back. The last one makes the address space exit, which
// blocks until every subscriber has been released and the mappings have been
// given up, and returns the error of Options.Teardown. It is called without any
// lock that a subscriber takes, and by no subscriber's method.
func (as *AddressSpace) PutUser() error {
	switch n, ok := putUser(&as.users); {
	case !ok:
		as.report(nil, "PutUser", errors.New("the address space has no users"))
		return nil
	case n > 0:
		return nil
	}
	lockorder.Wait(lockorder.MmapLock)
	as.exit()
	var err error
	if as.teardown != nil {
		err = as.teardown()
	}
	as.Drop()
	return err
}

// putUser takes 1 from n, unless that is 0, and returns what is left.
func putUser(n *atomic.Int64) (left int64, ok bool) {
	for {
		old := n.Load()
		if old == 0 {
			return 0, false
		}
		if n.CompareAndSwap(old, old-1) {
			return old - 1, true
		}
	}
}

// Grab adds to the count that keeps the structure, for a caller who holds a user
// or a count already.
func (as *AddressSpace) Grab() { as.count.Add(1) }

// Drop takes from the count. It does not block, so a callback of [Call] may do
// it. After the last Drop nothing of the address space may be used.
func (as *AddressSpace) Drop() {
	switch n := as.count.Add(-1); {
	case n < 0:
		as.count.Add(1)
		as.report(nil, "Drop", errors.New("the count is 0 already"))
	case n == 0:
		if s := as.subs.Load(); s != nil {
			if !s.empty() || s.inserted != 0 {
				as.report(nil, "Drop", errors.New("the count is 0, but there are subscriptions"))
			}
			as.subs.Store(nil)
		}
	}
}

// exit releases every subscriber. There are no users, so nobody registers.
func (as *AddressSpace) exit() {
	s := as.subs.Load()
	if s == nil {
		return
	}
	s.exitIntervals(as)
	others := s.exitNotifiers(as)
	if as.mutant != exitDoesNotWait {
		as.synchronize()
		if others && as.mutant != loserWaitsOnce {
			as.synchronize() // as in Notifier.unregister
		}
	}
	if !s.empty() {
		as.report(nil, "exit", errors.New("a subscriber is left on the chain"))
	}
}

// waits counts the grace periods that Unregister and the exit waited for.
type waits struct {
	n              atomic.Uint64
	total, longest atomic.Int64 // nanoseconds
}

// synchronize waits until every read section in which this or any other chain
// is walked has ended.
func (as *AddressSpace) synchronize() {
	begin := time.Now()
	chains.Synchronize()
	took := int64(time.Since(begin))
	as.waits.n.Add(1)
	as.waits.total.Add(took)
	for old := as.waits.longest.Load(); took > old && !as.waits.longest.CompareAndSwap(old, took); old = as.waits.longest.Load() {
	}
}

// Stats is the state of an address space.
type Stats struct {
	Users, Count int64
	Notifiers    int // on the chain
	Intervals    int // inserted, including those that wait for an invalidation to end
	Invalidating int // brackets that are open; counted once an interval was inserted

	// Waits is how often Unregister and the exit waited for the methods of
	// subscribers, of any address space, to return; Waited and Longest for
	// how long in all, and at most.
	Waits           uint64
	Waited, Longest time.Duration
}

// Stats returns the state of the address space, which is not taken at one
// instant.
func (as *AddressSpace) Stats() Stats {
	st := Stats{
		Users: as.users.Load(), Count: as.count.Load(), Waits: as.waits.n.Load(),
		Waited: time.Duration(as.waits.total.Load()), Longest: time.Duration(as.waits.longest.Load()),
	}
	if s := as.subs.Load(); s != nil {
		s.lock()
		defer s.unlock()
		for n := s.first.Load(); n != nil; n = n.next.Load() {
			st.Notifiers++
		}
		st.Intervals, st.Invalidating = s.inserted, s.active
	}
	return st
}
