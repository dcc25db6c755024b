package notifier

import (
	"context"
	"time"
)

// mutant is a defect that tests switch on in an address space, to see that they
// notice. The names in comments are those that the tests report; NM16, 26, 27 and
// 32 are defects of those who use the package.
type mutant uint8

const (
	sound                 mutant = iota
	allocAlways                  // NM1: the subscriptions are allocated whether there are some or not
	allocInsideAllLocks          // NM2: they are allocated with all locks held
	noAllLocks                   // NM3: a notifier is linked while brackets are in flight
	publishBeforeAllLocks        // NM4: the subscriptions stay although all locks could not be taken
	countBeforeAllLocks          // NM5: the count is taken before a step that can fail
	noAllLocksMutex              // NM6: two address spaces take all locks at a time
	lockMapTwice                 // NM6: a reverse map of two regions is locked twice
	unregisterAllLocks           // NM7: Unregister takes all locks, and may fail
	claimByLink                  // NM8: whoever finds a notifier linked calls Release
	unlinkBeforeRelease          // NM9: a notifier is unlinked before Release
	exitSweeps                   // NM9: the exit unlinks notifiers that Unregister has claimed
	claimOutside                 // NM10: the claim is made before the read section is entered
	exitUnlinksOutside           // NM11: the exit unlinks after its section has closed
	loserWaitsOnce               // NM10: one grace period for the claimer, and none for walks that found the notifier meanwhile
	exitDoesNotWait              // NM12: the exit does not wait for a grace period
	dropBeforeWait               // NM13: Unregister drops its count before it waits
	detachReleases               // NM14: UnregisterNoRelease calls Release
	detachLeavesLinked           // NM14: a notifier that is being released stays linked though it may be freed
	unlinkClearsNext             // NM15: a notifier that is unlinked leads nowhere
	pinUsers                     // NM17: a notifier is a user
	putFreesAtOnce               // NM18: the last Put frees without a grace period
	putReleases                  // NM18: the last Put calls Release
	compareKindsByType           // NM19: kinds of the same type are the same
	shareUnlinked                // NM19: Get finds a notifier that its last user has given back
	stopAtFirst                  // NM20: the walk ends at the first subscriber that fails
	undoTellsNobody              // NM20: after a failure nobody is given the end
	undoTellsEarlier             // NM20: after a failure only those before it are given the end
	endAnything                  // NM21: an end without an open bracket is passed on
	undoForgetsIntervals         // NM22: after a failure on the chain intervals are left invalidating
	activeIsBoolean              // NM23: the first end closes all brackets
	seqAtEveryStart              // NM24: every start that hits adds to the sequence
	beginUnlocked                // NM25: ReadBegin compares without the lock
	beginUntilEven               // NM25: ReadBegin waits until nothing is invalidated at all
	insertAtOnce                 // NM28: an insertion changes the tree that is being walked
	removeDoesNotWait            // NM29: Remove does not wait for the invalidation
	insertWithZero               // NM30: an interval begins with the sequence 0
	endInclusive                 // NM31: a half-open end goes into the tree as if it were closed
)

// isLinked reports whether n is on the chain.
func (n *Notifier) isLinked(s *subscriptions) bool {
	s.lock()
	defer s.unlock()
	return n.linked
}

// sweep unlinks everybody.
func (s *subscriptions) sweep() {
	s.lock()
	defer s.unlock()
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		s.unlink(n, sound)
	}
}

// unregisterMutant is unregister with a defect.
func (n *Notifier) unregisterMutant(as *AddressSpace) {
	s := as.subs.Load()
	switch as.mutant {
	case unregisterAllLocks:
		as.Lock()
		defer as.Unlock()
		if as.takeAllLocks(context.Background()) == nil {
			defer as.dropAllLocks()
		}
		n.unregister(as)
	case claimOutside:
		claimed := n.claim()
		time.Sleep(time.Millisecond)
		idx := chains.ReadLock()
		if claimed {
			n.releaseClaimed(s)
		}
		chains.ReadUnlock(idx)
		as.synchronize()
	case dropBeforeWait:
		as.Drop()
		n.unregister(as)
		as.Grab()
	default:
		n.unregister(as)
	}
}

// exitMutant is exitNotifiers, but unlinks after the section.
func (s *subscriptions) exitMutant() {
	var mine []*Notifier
	idx := chains.ReadLock()
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if n.claim() {
			n.callRelease(n.as)
			mine = append(mine, n)
		}
	}
	chains.ReadUnlock(idx)
	time.Sleep(time.Millisecond)
	s.lock()
	defer s.unlock()
	for _, n := range mine {
		s.unlink(n, sound)
		n.setPhase(released)
	}
}

// endEarlier gives the end to those before the first that fails.
func (s *subscriptions) endEarlier(as *AddressSpace, inv *Invalidation) {
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if n.m.rangeEnder == nil && n.m.rangeStarter != nil && n.m.rangeStarter.InvalidateRangeStart(inv) != nil {
			return
		}
		if n.m.rangeEnder != nil {
			n.callEnd(as, inv)
		}
	}
}
