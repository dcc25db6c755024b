// Package notifier models the host address space of a VMM process and tells
// subscribers of every change to its mappings before and after the change: the
// mechanism of Linux's MMU notifiers (mm/mmu_notifier.c), for the views of
// memory that a process keeps for itself.
//
// A change to the mappings of a range is bracketed:
//
//	InvalidateRangeStart   every page of the range is still mapped as it was
//	the system call
//	InvalidateRangeEnd     what the range is now can be looked at
//
// Between the two calls a subscriber must not establish anything new that
// relies on the mappings of the range.
//
// # Invariants
//
//   - A subscriber that is given an end was given its start: registration takes
//     the mapping lock for writing, and every bracket runs with that lock held.
//   - Release of a subscriber runs exactly once, from Exit or from Unregister,
//     and has returned before either of them does.
//   - After Unregister returned, no method of the subscriber runs or will run.
//
// # Lock order
//
//	AddressSpace.mmapLock        the mapping lock
//	    srcu read section        the walk of the chain
//	        locks of subscribers
//	            AddressSpace.mu  the chain; a leaf
//
// Unregister and Exit wait for read sections. They are called with none of
// these held.
package notifier

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/srcu"
)

// Event says why the mappings of a range change.
type Event uint8

// The events. A subscriber treats one that it does not know as Clear.
const (
	Unmap   Event = iota + 1 // the mappings go away, or others take their place
	Clear                    // the pages are dropped; the mappings stay, and may fault in others
	Protect                  // the mappings stay, with other permissions
	Remap                    // the pages move to another address
	Map                      // where nothing was mapped, something will be
)

func (e Event) String() string {
	switch e {
	case Unmap:
		return "unmap"
	case Clear:
		return "clear"
	case Protect:
		return "protect"
	case Remap:
		return "remap"
	case Map:
		return "map"
	}
	return fmt.Sprintf("event(%d)", uint8(e))
}

// Invalidation describes one bracketed change. Nothing but Failed differs
// between the start and the end of its bracket.
type Invalidation struct {
	Range  addr.HVARange // page aligned, not empty
	Event  Event
	After  addr.Access // the most that the mappings of Range will allow once the change is done
	To     addr.HVA    // for Remap: where the page at Range.Start goes
	Op     uint64      // the host operation, for the trace
	Failed bool        // at the end: the change was not made
}

// Subscriber is told of changes. Its methods may sleep; they are called with the
// mapping lock held and must not take it, and must not register or unregister.
type Subscriber interface {
	// InvalidateRangeStart is called before the change. With an error the
	// subscriber refuses it: the change is not made, and every subscriber,
	// this one included, is given the end.
	InvalidateRangeStart(*Invalidation) error

	// InvalidateRangeEnd is called after the change, or after the attempt.
	InvalidateRangeEnd(*Invalidation)

	// Release is called once, before the address space gives up its mappings
	// or when the subscriber is unregistered. The subscriber drops what it
	// derived from them and establishes nothing new.
	Release()
}

// ErrExited is returned where an address space is no longer in use.
var ErrExited = errors.New("the address space has exited")

// chains is the domain in whose read sections every chain is walked. All
// address spaces share one, as in Linux: a domain for each would cost memory by
// the address space, and grace periods are rare.
var chains = srcu.Default()

// AddressSpace is the host address space that guest memory is mapped in, as far
// as subscribers need to know it.
type AddressSpace struct {
	// mmapLock is held for writing by whoever changes mappings, and for reading
	// by whoever relies on their standing still.
	mmapLock sync.RWMutex

	mu     sync.Mutex // protects writing chain, and exited
	exited bool

	// chain is the subscribers, newest first, never changed once stored. It is
	// loaded inside a read section of chains, so that after a grace period
	// nobody walks a chain that has been replaced.
	chain atomic.Pointer[[]*Subscription]
}

// Subscription is one registration of a subscriber.
type Subscription struct {
	as  *AddressSpace
	sub Subscriber

	// claimed decides between Exit and Unregister which of them calls Release.
	// It is set inside a read section, so the loser's grace period waits for
	// the winner's call to return.
	claimed atomic.Bool
}

// New returns an address space without subscribers.
func New() *AddressSpace { return new(AddressSpace) }

// Lock takes the mapping lock for writing: the caller is about to change
// mappings. It blocks until nobody else holds the lock.
func (as *AddressSpace) Lock() { as.mmapLock.Lock() }

// Unlock gives the mapping lock back after Lock.
func (as *AddressSpace) Unlock() { as.mmapLock.Unlock() }

// RLock takes the mapping lock for reading: mappings do not change until
// RUnlock. It must not be taken again inside, nor in a subscriber's method.
func (as *AddressSpace) RLock() { as.mmapLock.RLock() }

// RUnlock gives the mapping lock back after RLock.
func (as *AddressSpace) RUnlock() { as.mmapLock.RUnlock() }

// Register adds s to the chain. It waits for the bracket in flight, if there is
// one, so that s is never given an end without its start. The error is
// ErrExited, or nil.
func (as *AddressSpace) Register(s Subscriber) (*Subscription, error) {
	as.mmapLock.Lock()
	defer as.mmapLock.Unlock()
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.exited {
		return nil, fmt.Errorf("register a subscriber: %w", ErrExited)
	}
	sub := &Subscription{as: as, sub: s}
	chain := []*Subscription{sub}
	if old := as.chain.Load(); old != nil {
		chain = append(chain, *old...)
	}
	as.chain.Store(&chain)
	return sub, nil
}

// Unregister takes the subscriber off the chain, after its Release if Exit has
// not called that. It cannot fail; a second call does nothing. It blocks until
// no method of the subscriber runs, so it is called without the mapping lock
// and from none of those methods.
func (s *Subscription) Unregister() {
	s.release()
	chains.Synchronize()
}

// release calls Release and unlinks s, unless somebody else has begun to.
//
// The subscriber stays on the chain until Release has returned: were it taken
// off before, a change in between would pass it by while it still relies on the
// old mappings.
func (s *Subscription) release() {
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	if !s.claimed.CompareAndSwap(false, true) {
		return
	}
	s.sub.Release()
	s.as.mu.Lock()
	defer s.as.mu.Unlock()
	chain := slices.DeleteFunc(slices.Clone(*s.as.chain.Load()), func(o *Subscription) bool { return o == s })
	s.as.chain.Store(&chain)
}

// Exit ends the use of the address space: every subscriber is released, and
// when Exit returns the mappings may go. Register fails from now on. A second
// call does nothing but wait. It is called without the mapping lock.
func (as *AddressSpace) Exit() {
	as.mu.Lock()
	as.exited = true
	as.mu.Unlock()

	if chain := as.chain.Load(); chain != nil {
		for _, s := range *chain {
			s.release()
		}
	}
	chains.Synchronize()
}

// InvalidateRangeStart opens a bracket: it calls the subscribers' method of that
// name, newest subscriber first. The caller holds the mapping lock for writing,
// and changes no mapping before the call returned nil.
//
// If a subscriber refuses, every subscriber is given the start and then the end
// all the same, and the joined errors are returned: the caller does not make
// the change and does not call InvalidateRangeEnd.
func (as *AddressSpace) InvalidateRangeStart(inv *Invalidation) error {
	chain := as.chain.Load()
	if chain == nil {
		return nil
	}
	var errs []error
	idx := chains.ReadLock()
	for _, s := range *as.chain.Load() {
		if err := s.sub.InvalidateRangeStart(inv); err != nil {
			errs = append(errs, err)
		}
	}
	chains.ReadUnlock(idx)
	if errs == nil {
		return nil
	}
	inv.Failed = true
	as.InvalidateRangeEnd(inv)
	return errors.Join(errs...)
}

// InvalidateRangeEnd closes the bracket that InvalidateRangeStart opened with
// inv, whether the change was made or failed.
func (as *AddressSpace) InvalidateRangeEnd(inv *Invalidation) {
	if as.chain.Load() == nil {
		return
	}
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for _, s := range *as.chain.Load() {
		s.sub.InvalidateRangeEnd(inv)
	}
}
