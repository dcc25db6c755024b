package notifier

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// IntervalSubscriber is told of the changes that overlap its one range. Its type
// embeds Interval.
type IntervalSubscriber interface {
	// Invalidate is told at the start of a bracket that overlaps the interval,
	// and when the address space exits. It takes the lock under which the
	// subscriber establishes what it derives from the mappings, calls
	// SetSeq(seq), even if nothing was established, drops what lies in the
	// range, and returns true. Only if inv.NonBlockable may it return false,
	// without having done any of it: it would have had to sleep.
	Invalidate(inv *Invalidation, seq uint64) bool

	interval() *Interval
}

// Interval is a subscription to changes of one range: Linux's
// mmu_interval_notifier. It is embedded in the type of the subscriber. The zero
// Interval is ready for use, again after Remove. It must not be copied while it
// is inserted.
//
// What it is for is to look mappings up without keeping them from changing:
//
//	for {
//		seq := s.ReadBegin()
//		p := lookUp(range)           may sleep, may cause invalidations
//		s.mu.Lock()
//		if s.ReadRetry(seq) {
//			s.mu.Unlock()
//			continue                 it changed meanwhile
//		}
//		establish(p)
//		s.mu.Unlock()
//	}
//
// where s.mu is the lock that Invalidate takes. The caller bounds the number of
// tries: it may be that the range changes all the time.
type Interval struct {
	// seq is that of the address space during the last invalidation that hit
	// the interval, and so odd. It is written by SetSeq and by insert.
	seq atomic.Uint64

	as          *AddressSpace
	sub         IntervalSubscriber
	first, last uint64 // closed
	where       where  // protected by the lock of the subscriptions
}

// where is where an interval is.
type where uint8

const (
	out        where = iota // not inserted
	inTree                  // in the tree
	willInsert              // not in the tree; inserted into it when it may change
	willRemove              // in the tree; removed from it when it may change
)

func (i *Interval) interval() *Interval { return i }

// While seq is odd some interval is being invalidated, and the tree does not
// change, so that it can be walked without the lock. What is inserted and
// removed meanwhile is put off to the end of the last bracket.

// firstSeq is even, and such that no interval, whose seq is odd, has it.
const firstSeq = 2

func (s *subscriptions) invalidating() bool { return s.seq&1 != 0 }

// closed returns r as a closed interval.
func closed(r addr.HVARange, mutant mutant) (first, last uint64) {
	if mutant == endInclusive {
		return uint64(r.Start), uint64(r.End)
	}
	return uint64(r.Start), uint64(r.End - 1)
}

var (
	errInserted error = &errnoError{"it is inserted already", syscall.EBUSY}
	errLength   error = &errnoError{"it is empty, or wraps", syscall.EOVERFLOW}
)

// Insert subscribes s to changes of the n bytes from start. The caller is a user
// of the address space, and holds no lock of the order. Before it establishes
// anything it calls ReadBegin: an invalidation of the range may be under way.
//
// The error is EOVERFLOW if n is 0 or the range wraps, EBUSY if s is inserted
// already, ErrExited, or EINTR: the first insertion of an address space waits
// as Register does, unless ctx is done. Nothing has changed then.
func (as *AddressSpace) Insert(ctx context.Context, s IntervalSubscriber, start addr.HVA, n uint64) error {
	fail := func(err error) error { return fmt.Errorf("insert %T at %v, %d bytes: %w", s, start, n, err) }
	last := uint64(start) + n - 1
	if n == 0 || last < uint64(start) {
		return fail(errLength)
	}
	if as.users.Load() == 0 {
		return fail(ErrExited)
	}
	subs := as.subs.Load()
	if subs == nil || !subs.used.Load() {
		if err := as.firstInterval(ctx); err != nil {
			return fail(err)
		}
		subs = as.subs.Load()
	}
	i := s.interval()
	subs.lock()
	defer subs.unlock()
	if i.where != out {
		return fail(errInserted)
	}
	i.as, i.sub, i.first, i.last = as, s, uint64(start), last
	as.Grab()
	subs.insert(i, as.mutant)
	return nil
}

func (as *AddressSpace) firstInterval(ctx context.Context) error {
	if err := as.LockContext(ctx); err != nil {
		return err
	}
	defer as.Unlock()
	return as.register(ctx, nil, nil)
}

// insert puts i into the tree, now or when that may change. The caller holds the
// lock.
//
// The seq that i begins with tells ReadBegin whether i is to be taken as hit by
// the brackets that are open. If there are some and none has hit anything, they
// are all taken to have hit i, which was not there to be found.
func (s *subscriptions) insert(i *Interval, mutant mutant) {
	s.inserted++
	switch {
	case s.active == 0:
		i.seq.Store(s.seq - 1)
	case s.invalidating() && mutant != insertAtOnce:
		i.seq.Store(s.seq)
		i.where = willInsert
		s.deferred = append(s.deferred, i)
		return
	default:
		s.seq |= 1
		i.seq.Store(s.seq)
	}
	if mutant == insertWithZero {
		i.seq.Store(0)
	}
	i.where = inTree
	s.tree.Insert(i.first, i.last, i)
}

// Remove ends the subscription. When it returns, no method of the subscriber
// runs or will run. It cannot fail, and blocks until the invalidations in flight
// have ended, if there are some; so it is called by no method and with no lock
// held that a method takes. An interval that is not inserted is reported, and
// nothing is done.
func (i *Interval) Remove() {
	as := i.as
	if as == nil {
		panic("notifier: Remove of an interval that was not inserted")
	}
	lockorder.Wait(lockorder.Section)
	s := as.subs.Load()
	if s == nil || !s.remove(i, as.mutant) {
		as.report(i.sub, "Remove", errNotRegistered)
		return
	}
	as.Drop()
}

func (s *subscriptions) remove(i *Interval, mutant mutant) bool {
	s.lock()
	defer s.unlock()
	switch {
	case i.where == willInsert:
		s.deferred = slices.DeleteFunc(s.deferred, func(o *Interval) bool { return o == i })
		i.where = out
	case i.where != inTree:
		return false
	case !s.invalidating():
		s.takeOut(i)
	default:
		i.where = willRemove
		s.deferred = append(s.deferred, i)
		if mutant != removeDoesNotWait {
			s.wait(s.seq)
		}
	}
	s.inserted--
	return true
}

// takeOut takes i out of the tree. The caller holds the lock.
func (s *subscriptions) takeOut(i *Interval) {
	if !s.tree.Delete(i.first, i.last, i) {
		panic("notifier: an interval is not in the tree that it was inserted into")
	}
	i.where = out
}

// wait returns when seq is no longer that of an invalidation. The caller holds
// the lock, which is given back meanwhile.
func (s *subscriptions) wait(seq uint64) {
	for s.seq == seq {
		s.changed.Wait()
	}
}

// startIntervals opens a bracket for the intervals, and tells those that overlap
// its range. With an error the bracket has been closed for them again.
func (s *subscriptions) startIntervals(as *AddressSpace, inv *Invalidation) error {
	first, last := closed(inv.Range, as.mutant)
	s.lock()
	s.active++
	if as.mutant == activeIsBoolean {
		s.active = 1
	}
	hit := s.tree.Overlaps(first, last)
	if hit {
		if as.mutant == seqAtEveryStart {
			s.seq++
		} else {
			s.seq |= 1
		}
	}
	seq := s.seq
	s.unlock()
	if !hit {
		return nil
	}
	if i := s.tell(as, inv, first, last, seq); i != nil {
		s.endIntervals(as)
		return fmt.Errorf("invalidate %v: %T: %w", inv.Range, i.sub, ErrWouldBlock)
	}
	return nil
}

// tell calls Invalidate of the intervals that overlap [first, last], and returns
// the first one that could not have it and may say so. The tree does not change
// meanwhile, because seq is odd until endIntervals.
func (s *subscriptions) tell(as *AddressSpace, inv *Invalidation, first, last, seq uint64) *Interval {
	for i := range s.tree.Overlapping(first, last) {
		ok, panicked := i.callInvalidate(as, inv, seq)
		switch {
		case ok:
		case inv.NonBlockable:
			return i
		case !panicked:
			as.report(i.sub, "Invalidate", errMustNotFail)
		}
	}
	return nil
}

func (i *Interval) callInvalidate(as *AddressSpace, inv *Invalidation, seq uint64) (ok, panicked bool) {
	var err error
	defer func() { panicked = err != nil }()
	defer as.contain(i.sub, "Invalidate", &err)
	return i.sub.Invalidate(inv, seq), false
}

// endIntervals closes a bracket for the intervals.
func (s *subscriptions) endIntervals(as *AddressSpace) {
	s.lock()
	defer s.unlock()
	if s.active--; as.mutant == activeIsBoolean {
		s.active = 0
	}
	if s.active > 0 || !s.invalidating() {
		return
	}
	s.seq++
	for _, i := range s.deferred {
		if i.where == willRemove {
			s.takeOut(i)
		} else {
			i.where = inTree
			s.tree.Insert(i.first, i.last, i)
		}
	}
	clear(s.deferred)
	s.deferred = s.deferred[:0]
	s.changed.Broadcast()
}

// exitIntervals tells every interval that nothing is mapped any more.
func (s *subscriptions) exitIntervals(as *AddressSpace) {
	if !s.used.Load() {
		return
	}
	inv := &Invalidation{Range: addr.HVARange{Start: 0, End: ^addr.HVA(0)}, Event: Released}
	s.lock()
	s.active++
	s.seq |= 1
	seq := s.seq
	s.unlock()
	s.tell(as, inv, 0, ^uint64(0), seq)
	s.endIntervals(as)
}

// ReadBegin begins a look at the mappings of the interval, and returns what
// ReadRetry needs at its end. If the interval is being invalidated it blocks
// until that has ended; others that are do not matter. It is called with no lock
// held that Invalidate takes, and in no bracket. A look that it begins may be in
// vain all the same.
func (i *Interval) ReadBegin() (seq uint64) {
	lockorder.Wait(lockorder.Section)
	s := i.as.subs.Load()
	if i.as.mutant == beginUnlocked {
		return i.seq.Load()
	}
	s.lock()
	defer s.unlock()
	seq = i.seq.Load()
	if i.as.mutant == beginUntilEven {
		for s.invalidating() {
			s.changed.Wait()
		}
		return seq
	}
	s.wait(seq)
	return seq
}

// ReadRetry reports whether the interval was invalidated since ReadBegin
// returned seq. The caller holds the lock that Invalidate takes, and if false
// may establish what it has looked up before it gives that back.
func (i *Interval) ReadRetry(seq uint64) bool { return i.seq.Load() != seq }

// CheckRetry is ReadRetry for a caller who does not hold the lock: true is
// certain and saves the rest of the look, false is not.
func (i *Interval) CheckRetry(seq uint64) bool { return i.seq.Load() != seq }

// SetSeq is called by Invalidate with what it was given, with the lock held under
// which ReadRetry is called.
func (i *Interval) SetSeq(seq uint64) { i.seq.Store(seq) }
