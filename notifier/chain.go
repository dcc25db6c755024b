package notifier

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/secondmmu/gvm/internal/interval"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/srcu"
)

// subscriptions is who is told of changes of an address space.
type subscriptions struct {
	// first is the chain, newest first. It is walked in read sections of
	// chains, and changed with mu held. A notifier that was unlinked keeps its
	// next until a grace period has passed, for those who stand on it.
	first atomic.Pointer[Notifier]

	used atomic.Bool // an interval was inserted at some time; set with all locks held

	mu sync.Mutex // protects what follows; a leaf

	// The intervals. While seq is odd one of them is being invalidated, and
	// the tree does not change, so that it can be walked without the lock.
	// What is inserted and removed meanwhile is put off to the end of the last
	// bracket.
	tree     interval.Tree[*Interval]
	seq      uint64
	active   int         // open brackets
	deferred []*Interval // insertions and removals that are put off
	inserted int         // by Insert, and not yet by Remove
	changed  sync.Cond   // signalled when seq becomes even
}

func newSubscriptions() *subscriptions {
	s := &subscriptions{seq: firstSeq}
	s.changed.L = &s.mu
	return s
}

func (s *subscriptions) lock() {
	lockorder.Acquire(lockorder.Chain)
	s.mu.Lock()
}

func (s *subscriptions) unlock() {
	s.mu.Unlock()
	lockorder.Release(lockorder.Chain)
}

// empty reports whether the chain is. Whoever unlinks holds the lock until it is
// done.
func (s *subscriptions) empty() bool {
	s.lock()
	defer s.unlock()
	return s.first.Load() == nil
}

// The phases of a registration.
//
//	idle ── registering ── live ── releasing ── released     release was called
//	                        └───── detached                  it was not, and will not be
//
// Beside the phase there is the bit ended: one of Unregister, UnregisterNoRelease
// and the last Put has been called, and a second call is a mistake. A notifier
// that has ended becomes idle when a grace period has passed since it was
// unlinked.
const (
	idle = iota
	registering
	live
	releasing
	released
	detached

	phase = 1<<3 - 1
	ended = 1 << 3
)

// Notifier is a subscriber's place on the chain of an address space: Linux's
// mmu_notifier. It is embedded in the type of the subscriber. The zero Notifier
// is ready for use; it can be registered again after its registration was ended
// and, unless by Unregister, a grace period has passed. It must not be copied
// while it is registered.
type Notifier struct {
	next atomic.Pointer[Notifier]
	prev *Notifier // protected by the lock of the subscriptions, as are linked, unlinked and users
	m    methods

	state    atomic.Uint32
	linked   bool
	unlinked srcu.Cookie // for the end of the grace period after it was unlinked
	users    int         // by Get, if kind is not nil

	sub  Subscriber
	as   *AddressSpace
	kind any // the *Kind it belongs to, or nil
	head srcu.Head
}

func (n *Notifier) notifier() *Notifier { return n }

// AddressSpace returns the address space that n was last registered with. It may
// be used while the registration lasts: the structure, that is; for its
// mappings see TryGetUser.
func (n *Notifier) AddressSpace() *AddressSpace { return n.as }

// Register adds s to the chain. The caller is a user of the address space, and
// holds no lock of the order. It waits until no bracket is in flight, so that s
// is never given an end without its start.
//
// The error is EINTR if ctx is done before that; EINVAL if the methods of s
// contradict each other; ErrExited; EBUSY if s is registered already, or still
// in use after UnregisterNoRelease. Nothing has changed then.
func (as *AddressSpace) Register(ctx context.Context, s Subscriber) error {
	if err := as.LockContext(ctx); err != nil {
		return fmt.Errorf("register %T: %w", s, err)
	}
	defer as.Unlock()
	return as.RegisterLocked(ctx, s)
}

// RegisterLocked is Register for a caller who holds the mapping lock for writing.
func (as *AddressSpace) RegisterLocked(ctx context.Context, s Subscriber) error {
	if err := as.register(ctx, s, nil); err != nil {
		return fmt.Errorf("register %T: %w", s, err)
	}
	return nil
}

var (
	errTwoWays    error = &errnoError{"a secondary TLB is told when an entry was cleared and has no use for brackets", syscall.EINVAL}
	errRegistered error = &errnoError{"it is registered already", syscall.EBUSY}
	errInUse      error = &errnoError{"its methods may still run: a grace period has to pass since its registration was ended", syscall.EBUSY}
)

// register is RegisterLocked, and without a subscriber what the first interval
// needs.
//
// The state of the subscriptions is allocated if there is none, which is exact:
// all who set it hold the mapping lock for writing. It is not allocated with
// all locks held, because what an allocator does to get memory may need those.
func (as *AddressSpace) register(ctx context.Context, s Subscriber, kind any) error {
	if as.users.Load() == 0 {
		return ErrExited
	}
	var m methods
	var n *Notifier
	if s != nil {
		if m = methodsOf(s); m.secondaryTLB != nil && (m.rangeStarter != nil || m.rangeEnder != nil) {
			return errTwoWays
		}
		n = s.notifier()
		if err := n.reserve(); err != nil {
			return err
		}
	}
	fresh := as.subs.Load()
	if fresh == nil && as.mutant != allocInsideAllLocks || as.mutant == allocAlways {
		fresh = as.allocate()
	}
	if as.mutant == countBeforeAllLocks {
		as.Grab()
	}
	if as.mutant == publishBeforeAllLocks {
		as.subs.Store(fresh)
	}
	if as.mutant != noAllLocks {
		if err := as.takeAllLocks(ctx); err != nil {
			if n != nil {
				n.state.Store(idle)
			}
			return err
		}
	}
	as.at("all locks")
	if as.mutant == allocInsideAllLocks && fresh == nil {
		fresh = as.allocate()
	}
	if as.subs.Load() == nil {
		as.subs.Store(fresh)
	}
	subs := as.subs.Load()
	if n != nil {
		if as.mutant != countBeforeAllLocks {
			as.Grab()
		}
		if as.mutant == pinUsers {
			as.users.Add(1)
		}
		n.m, n.sub, n.as, n.kind, n.users = m, s, as, kind, 1
		subs.lock()
		subs.link(n)
		subs.unlock()
	} else {
		subs.used.Store(true)
	}
	as.at("linked")
	if as.mutant != noAllLocks {
		as.dropAllLocks()
	}
	return nil
}

func (as *AddressSpace) allocate() *subscriptions {
	as.at("allocate")
	return newSubscriptions()
}

// at tells a test where a registration is.
func (as *AddressSpace) at(step string) {
	if as.step != nil {
		as.step(step)
	}
}

// reserve takes n for a registration, if it is free.
func (n *Notifier) reserve() error {
	st := n.state.Load()
	switch {
	case st == idle:
	case st&ended != 0 && st&phase != releasing && chains.Poll(n.unlinked):
	case st&ended != 0:
		chains.StartPoll() // so that it passes although nobody else asks for it
		return errInUse
	default:
		return errRegistered
	}
	if !n.state.CompareAndSwap(st, registering) {
		return errRegistered
	}
	return nil
}

// claim reports whether the caller is the one to release n, now. It is called in
// a read section, which stays open until the caller has unlinked n: so a grace
// period that begins after somebody else found n claimed waits for that.
func (n *Notifier) claim() bool {
	for {
		st := n.state.Load()
		if st&phase != live {
			return false
		}
		if n.state.CompareAndSwap(st, st&^phase|releasing) {
			return true
		}
	}
}

// end marks the registration as ended, unless it is not one or was ended before.
func (n *Notifier) end() bool {
	for {
		st := n.state.Load()
		if st&ended != 0 || st < live {
			return false
		}
		if n.state.CompareAndSwap(st, st|ended) {
			return true
		}
	}
}

// setPhase changes the phase and keeps the rest.
func (n *Notifier) setPhase(p uint32) {
	for {
		st := n.state.Load()
		if n.state.CompareAndSwap(st, st&^phase|p) {
			return
		}
	}
}

// link puts n at the head of the chain. The caller holds the lock.
func (s *subscriptions) link(n *Notifier) {
	old := s.first.Load()
	n.next.Store(old)
	n.prev = nil
	if old != nil {
		old.prev = n
	}
	n.linked = true
	n.state.Store(live)
	s.first.Store(n)
}

// unlink takes n off the chain. The caller holds the lock.
func (s *subscriptions) unlink(n *Notifier, mutant mutant) {
	if !n.linked {
		return
	}
	next := n.next.Load()
	if n.prev == nil {
		s.first.Store(next)
	} else {
		n.prev.next.Store(next)
	}
	if next != nil {
		next.prev = n.prev
	}
	n.linked = false
	if mutant == unlinkClearsNext {
		n.next.Store(nil)
	}
	n.unlinked = chains.GetState()
}

// release calls Release and unlinks n, if nobody else has begun to, and reports
// whether it did. The caller is in a read section.
func (n *Notifier) release(s *subscriptions) bool {
	if n.claim() || n.as.mutant == claimByLink && n.isLinked(s) {
		n.releaseClaimed(s)
		return true
	}
	return false
}

func (n *Notifier) releaseClaimed(s *subscriptions) {
	if n.as.mutant == unlinkBeforeRelease {
		s.lock()
		s.unlink(n, sound)
		s.unlock()
	}
	n.callRelease(n.as)
	s.lock()
	defer s.unlock()
	s.unlink(n, n.as.mutant)
	n.setPhase(released)
}

func (n *Notifier) callRelease(as *AddressSpace) {
	var err error
	defer as.contain(n.sub, "Release", &err)
	n.sub.Release()
}

// exitNotifiers releases all that nobody else has claimed, and reports whether
// there were others: they stay linked until their claimers unlink them.
//
// The section is open across the unlinking too: a subscriber that has ended its
// own subscription in Release may be freed as soon as it closes.
func (s *subscriptions) exitNotifiers(as *AddressSpace) (others bool) {
	if as.mutant == exitUnlinksOutside {
		s.exitMutant()
		return false
	}
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if !n.release(s) {
			others = true
		}
	}
	if as.mutant == exitSweeps {
		s.sweep()
	}
	return others
}

var errNotRegistered = errors.New("it is not registered, or its registration was ended before")

// Unregister ends the registration. It calls Release, unless the address space
// exits or has exited, which calls it then; either way it has returned. It
// cannot fail, and blocks until no method of the subscriber runs. It is called
// with no lock of the order held, without any that a method takes, and from no
// method. Afterwards the subscriber can be registered again, or freed.
//
// A notifier whose registration was ended before is reported, and nothing is
// done. One that never was registered has nobody to report to: that panics.
func (n *Notifier) Unregister() {
	if n.kind != nil || !n.end() {
		n.misused("Unregister")
		return
	}
	lockorder.Wait(lockorder.MmapLock)
	as := n.as
	if as.mutant == sound {
		n.unregister(as)
	} else {
		n.unregisterMutant(as)
	}
	as.Drop()
	n.state.Store(idle)
}

func (n *Notifier) unregister(as *AddressSpace) {
	s := as.subs.Load()
	func() {
		idx := chains.ReadLock()
		defer chains.ReadUnlock(idx)
		n.release(s)
	}()
	as.synchronize()
	// If the exit had claimed n, it unlinked n at some time during this grace
	// period, which waited for its section but not for walks that began later and
	// still found n.
	if as.mutant != loserWaitsOnce && !n.quiet(s) {
		as.synchronize()
	}
}

// quiet reports whether a grace period has passed since n was unlinked, so that
// nobody walks over it.
//
// Preconditions: n has been unlinked.
func (n *Notifier) quiet(s *subscriptions) bool {
	s.lock()
	defer s.unlock()
	return chains.Poll(n.unlinked)
}

// UnregisterNoRelease ends the registration without calling Release, and does
// not wait: methods may run until a grace period has passed. The subscriber is
// freed, if at all, by a function passed to [Call], which must not use the
// address space unless the caller has a count of its own. It may be called with
// any lock held, and by Release itself when the address space exits.
//
// If the notifier is not registered it does what Unregister does then.
func (n *Notifier) UnregisterNoRelease() {
	if n.kind != nil || !n.end() {
		n.misused("UnregisterNoRelease")
		return
	}
	as := n.as
	s := as.subs.Load()
	s.lock()
	n.detachLocked(s, as.mutant)
	s.unlock()
	if as.mutant == detachReleases {
		n.callRelease(as)
	}
	as.Drop()
}

// detachLocked unlinks n, also while somebody is releasing it. That is no earlier
// than it may be, although Release has not returned: whoever ends a registration
// in this way says that nothing is left that a bracket would have to drop. And it
// is no later: the grace period after which n is freed may begin as soon as the
// caller lets go of the lock, and does not wait for walks that begin after it.
//
// Preconditions: the lock is held, so nobody finds n claimed by this and linked.
func (n *Notifier) detachLocked(s *subscriptions, mutant mutant) {
	claimed := n.claim()
	if !claimed && mutant == detachLeavesLinked {
		return
	}
	s.unlink(n, mutant)
	if claimed {
		n.setPhase(detached)
	}
}

func (n *Notifier) misused(what string) {
	err := errNotRegistered
	if n.kind != nil {
		err = errors.New("it is shared, and given back by Put of its Kind")
	}
	r := &Report{Subscriber: n.sub, Method: what, Err: err}
	if n.as == nil {
		panic(r.Error())
	}
	n.as.reporter(r)
}

// Call has fn called with h when every method that runs now, of any subscriber
// of any address space, has returned. A subscriber that was taken off its chain
// before can be freed then. It is Linux's mmu_notifier_call_srcu; see
// [srcu.Domain.Call] for what fn may do.
func Call(h *srcu.Head, fn func(*srcu.Head)) { chains.Call(h, fn) }

// Synchronize returns when all functions passed to Call before have returned,
// and those that free shared subscribers after their last Put. It is called
// before what they use goes away, with no lock of the order held. It is Linux's
// mmu_notifier_synchronize with the barrier that it was introduced with.
func Synchronize() {
	lockorder.Wait(lockorder.MmapLock)
	chains.Barrier()
}
