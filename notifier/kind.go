package notifier

import (
	"context"
	"errors"
	"fmt"
	"math"
	"syscall"

	"github.com/secondmmu/gvm/srcu"
)

// Kind is a kind of subscriber of which an address space needs one, however many
// want it: the first Get makes it, and the last Put has it freed. It is Linux's
// mmu_notifier_get and mmu_notifier_put. What tells kinds apart is the pointer.
type Kind[S Subscriber] struct {
	alloc func(*AddressSpace) (S, error)
	free  func(S)
}

// NewKind returns a kind whose subscribers are made by alloc and freed by free.
//
// alloc is called with the mapping lock held for writing, and free as a callback
// of [Call], when no method of the subscriber runs or will run: it is short and
// does not block. free is called for whatever alloc returned without error, once.
func NewKind[S Subscriber](alloc func(*AddressSpace) (S, error), free func(S)) *Kind[S] {
	return &Kind[S]{alloc, free}
}

// errTooMany is for a subscriber with as many users as can be counted.
var errTooMany error = &errnoError{"it is shared too often", syscall.EOVERFLOW}

// maxUsers is how often a subscriber can be shared.
const maxUsers = math.MaxInt32

// Get returns the subscriber of kind k of the address space, which it makes and
// registers if there is none. Each Get is followed by one Put. For the caller's
// duties and the errors see [AddressSpace.Register]; an error of alloc is
// returned wrapped.
func (k *Kind[S]) Get(ctx context.Context, as *AddressSpace) (S, error) {
	if err := as.LockContext(ctx); err != nil {
		var none S
		return none, fmt.Errorf("get a %T: %w", none, err)
	}
	defer as.Unlock()
	return k.GetLocked(ctx, as)
}

// GetLocked is Get for a caller who holds the mapping lock for writing.
func (k *Kind[S]) GetLocked(ctx context.Context, as *AddressSpace) (S, error) {
	var none S
	if as.users.Load() == 0 {
		return none, fmt.Errorf("get a %T: %w", none, ErrExited)
	}
	switch n, err := k.share(as); {
	case err != nil:
		return none, fmt.Errorf("get a %T: %w", none, err)
	case n != nil:
		return n.sub.(S), nil
	}
	s, err := k.alloc(as)
	if err != nil {
		return none, fmt.Errorf("get a %T: allocate it: %w", none, err)
	}
	if err := as.register(ctx, s, k); err != nil {
		k.free(s)
		return none, fmt.Errorf("get a %T: %w", none, err)
	}
	return s, nil
}

// share adds a user to the notifier of kind k that is on the chain, and returns
// it, or nil if there is none. One that was given back by its last user is not
// on the chain any more, though it may not have been freed yet.
func (k *Kind[S]) share(as *AddressSpace) (*Notifier, error) {
	s := as.subs.Load()
	if s == nil {
		return nil, nil
	}
	s.lock()
	defer s.unlock()
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if !same(n.kind, k, as.mutant) {
			continue
		}
		if n.users == maxUsers {
			return nil, errTooMany
		}
		n.users++
		return n, nil
	}
	return nil, nil
}

// same reports whether a notifier's kind is k.
func same[S Subscriber](kind any, k *Kind[S], mutant mutant) bool {
	if mutant == compareKindsByType {
		_, ok := kind.(*Kind[S])
		return ok
	}
	return kind == any(k)
}

// Put gives back what Get returned. It does not block, and may be called in
// Release and with any lock held. The last Put takes the subscriber off the
// chain, without Release, and has it freed when no method runs: before it the
// owner has dropped what the subscriber derived from mappings. More Puts than
// Gets are reported, and nothing is done.
func (k *Kind[S]) Put(s S) {
	n := s.notifier()
	as := n.as
	if as == nil {
		panic(fmt.Sprintf("notifier: Put of a %T that Get did not return", s))
	}
	if kind := n.kind; kind != any(k) {
		as.report(s, "Put", errors.New("it is not of this kind"))
		return
	}
	last, ok := n.putUser(as.subs.Load(), as.mutant)
	if !ok {
		as.report(s, "Put", errors.New("there were more Puts than Gets"))
		return
	}
	if !last {
		return
	}
	switch as.mutant {
	case putReleases:
		n.callRelease(as)
	case putFreesAtOnce:
		k.free(s)
		as.Drop()
		return
	}
	Call(&n.head, func(*srcu.Head) {
		k.free(s)
		as.Drop()
	})
}

// putUser takes a user from n, and n off the chain if it was the last: in one
// step, because Get could find it in between.
func (n *Notifier) putUser(s *subscriptions, mutant mutant) (last, ok bool) {
	if s == nil {
		return false, false
	}
	s.lock()
	defer s.unlock()
	if n.users == 0 {
		return false, false
	}
	if n.users--; n.users > 0 {
		return false, true
	}
	n.end()
	if mutant != shareUnlinked {
		n.detachLocked(s, mutant)
	}
	return true, true
}
