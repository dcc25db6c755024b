package hmm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/srcu"
)

// chains is the domain in whose read sections the chains of address spaces are
// walked. An HMM is freed after one of its grace periods.
var chains = srcu.Default()

// HMM is what an address space has once for all its mirrors and ranges: Linux's
// struct hmm. It is made by the first Mirror.Register, and lives as long as
// somebody has a reference to it.
type HMM struct {
	reg *registry
	as  *notifier.AddressSpace

	// The two places on the chain. The gate comes first in a walk.
	gate   gate
	syncer syncer

	refs   atomic.Int64            // 0: the last one has been put
	owners [numOwners]atomic.Int64 // who has them
	freed  atomic.Bool             // a grace period has passed since
	head   srcu.Head               // of the callback that frees it

	mirrorsLock sync.RWMutex // for its place in the lock order see the package comment
	mirrors     []*Mirror    // those that are told, the oldest first; protected by mirrorsLock

	mu      sync.Mutex // protects what follows
	active  int        // open brackets
	ranges  map[*Range]struct{}
	dead    bool          // the address space exits
	changed chan struct{} // closed, and replaced, when ranges may have become valid, and when dead is set
}

// owner is what a reference is for.
type owner uint8

const (
	byMirror   owner = iota // from Register to Unregister
	byRange                 // from Begin to Done
	byHolder                // from Lookup or Get to Put
	byCallback              // while a method of a subscriber runs
	numOwners
)

// registry finds the HMM of an address space. It keeps none of them.
type registry struct {
	mu   sync.Mutex // a leaf
	hmms map[*notifier.AddressSpace]*HMM

	mutant mutant                    // a defect, in tests of the tests; none otherwise
	step   func(name string, h *HMM) // called at each step of what may be raced with, in tests
	free   func(h *HMM)              // called when one is freed, in tests
}

var hmms = newRegistry()

func newRegistry() *registry { return &registry{hmms: map[*notifier.AddressSpace]*HMM{}} }

func (reg *registry) lock() {
	lockorder.Acquire(lockorder.Chain)
	reg.mu.Lock()
}

func (reg *registry) unlock() {
	reg.mu.Unlock()
	lockorder.Release(lockorder.Chain)
}

// at tells a test where somebody is.
func (reg *registry) at(step string, h *HMM) {
	if reg.step != nil {
		reg.step(step, h)
	}
}

// Lookup returns the HMM of the address space with a reference, which goes to Put.
// It returns nil if there is none; one whose last reference is being put counts as
// none. It is the patch's hmm_get, and has the name that its author then proposed,
// mm_get_hmm, in so far as that says what is looked up in what.
func Lookup(as *notifier.AddressSpace) *HMM { return hmms.lookup(as, byHolder) }

// lookup finds the HMM of as and takes a reference. The table is locked meanwhile:
// whoever puts the last reference takes the HMM out of it before it is freed.
func (reg *registry) lookup(as *notifier.AddressSpace, by owner) *HMM {
	reg.lock()
	defer reg.unlock()
	h := reg.hmms[as]
	switch {
	case h == nil:
		return nil
	case reg.mutant == getAlways:
		h.owners[by].Add(1)
		h.refs.Add(1)
		return h
	case !h.tryGet(by):
		return nil
	}
	return h
}

// tryGet takes a reference unless there is none left.
func (h *HMM) tryGet(by owner) bool {
	for {
		n := h.refs.Load()
		if n == 0 {
			return false
		}
		if h.refs.CompareAndSwap(n, n+1) {
			h.owners[by].Add(1)
			return true
		}
	}
}

// Get takes another reference, for a caller who has one. It goes to Put.
func (h *HMM) Get() {
	h.held("Get")
	h.owners[byHolder].Add(1)
	h.refs.Add(1)
}

// Put gives a reference of Lookup or Get back. It does not block, and may be called
// with any lock held but those of class Chain. After it the caller does not use h.
// More Puts than there were references to give back are a mistake that panics.
func (h *HMM) Put() {
	h.held("Put")
	if h.owners[byHolder].Load() <= 0 {
		panic("hmm: Put of an HMM to which the caller has no reference of Lookup or Get")
	}
	h.put(byHolder)
}

// put gives a reference back. The last one ends the HMM: in this order, so that
// nobody finds it who is not waited for before it is freed.
func (h *HMM) put(by owner) {
	h.owners[by].Add(-1)
	switch n := h.refs.Add(-1); {
	case n > 0:
		return
	case n < 0:
		panic("hmm: a reference to an HMM was put twice")
	}
	h.reg.at("zero", h)
	h.syncer.UnregisterNoRelease()
	h.gate.UnregisterNoRelease()
	h.reg.at("detached", h)
	h.reg.forget(h)
	if h.reg.mutant == freeAtOnce || h.reg.mutant == testForNil {
		h.release()
		return
	}
	notifier.Call(&h.head, func(*srcu.Head) { h.release() })
}

// forget takes h out of the table, unless it is a successor that is in it: one may
// have been made as soon as h could not be found any more.
func (reg *registry) forget(h *HMM) {
	reg.lock()
	defer reg.unlock()
	if reg.hmms[h.as] == h || reg.mutant == forgetAnybody {
		delete(reg.hmms, h.as)
	}
}

// release is where an HMM is freed. Go's collector does the rest, and would hide
// that somebody uses it after this; hence the mark.
func (h *HMM) release() {
	if h.freed.Swap(true) {
		panic("hmm: an HMM is freed twice")
	}
	if h.reg.free != nil {
		h.reg.free(h)
	}
}

// held panics if nobody has a reference to h: not even the caller then.
func (h *HMM) held(what string) {
	if h.freed.Load() {
		panic(fmt.Sprintf("hmm: %s of an HMM that has been freed", what))
	}
	if h.refs.Load() <= 0 {
		panic(fmt.Sprintf("hmm: %s of an HMM to which nobody has a reference", what))
	}
}

// obtain returns the HMM of as with a reference for a mirror, and makes it if there
// is none. Several may find none and then meet at the mapping lock; the first makes
// it, and the others find that. In the patch they allocate first, and whoever loses
// is told that there was no memory.
func (reg *registry) obtain(ctx context.Context, as *notifier.AddressSpace) (*HMM, error) {
	if h := reg.lookup(as, byMirror); h != nil {
		return h, nil
	}
	reg.at("absent", nil)
	if err := as.LockContext(ctx); err != nil {
		return nil, err
	}
	defer as.Unlock()
	if reg.mutant == createAgain {
		return reg.create(ctx, as)
	}
	if h := reg.lookup(as, byMirror); h != nil {
		if reg.mutant != sound {
			return reg.secondMutant(h)
		}
		return h, nil
	}
	return reg.create(ctx, as)
}

// create makes the HMM of as and registers its notifiers, and only then lets it be
// found. The caller holds the mapping lock for writing, so nobody else is at it.
func (reg *registry) create(ctx context.Context, as *notifier.AddressSpace) (*HMM, error) {
	h := &HMM{reg: reg, as: as, ranges: map[*Range]struct{}{}, changed: make(chan struct{})}
	h.gate.h, h.syncer.h = h, h
	h.owners[byMirror].Store(1)
	h.refs.Store(1)
	if reg.mutant == publishEarly {
		reg.install(h)
	}
	reg.at("allocated", h)
	if err := as.RegisterLocked(ctx, &h.syncer); err != nil {
		h.abandon()
		h.release()
		return nil, err
	}
	reg.at("half registered", h)
	if err := as.RegisterLocked(ctx, &h.gate); err != nil {
		h.abandon()
		h.syncer.UnregisterNoRelease()
		notifier.Call(&h.head, func(*srcu.Head) { h.release() })
		return nil, err
	}
	reg.at("registered", h)
	reg.install(h)
	return h, nil
}

// install lets h be found, in the place of a predecessor if that is still there.
func (reg *registry) install(h *HMM) {
	reg.lock()
	defer reg.unlock()
	reg.hmms[h.as] = h
}

// abandon takes the only reference of an HMM that nobody has found.
func (h *HMM) abandon() {
	h.owners[byMirror].Store(0)
	h.refs.Store(0)
}

func (h *HMM) lock() {
	lockorder.Acquire(lockorder.Chain)
	h.mu.Lock()
}

func (h *HMM) unlock() {
	h.mu.Unlock()
	lockorder.Release(lockorder.Chain)
}

func (h *HMM) lockMirrors() {
	lockorder.Acquire(lockorder.Mirrors)
	h.mirrorsLock.Lock()
}

func (h *HMM) unlockMirrors() {
	h.mirrorsLock.Unlock()
	lockorder.Release(lockorder.Mirrors)
}

// rlockMirrors takes mirrorsLock for reading. It reports false if it would have to
// wait, and may not.
func (h *HMM) rlockMirrors(mayWait bool) bool {
	lockorder.Acquire(lockorder.Mirrors)
	if mayWait {
		h.mirrorsLock.RLock()
		return true
	}
	if h.mirrorsLock.TryRLock() {
		return true
	}
	lockorder.Release(lockorder.Mirrors)
	return false
}

func (h *HMM) runlockMirrors() {
	h.mirrorsLock.RUnlock()
	lockorder.Release(lockorder.Mirrors)
}

// open counts a bracket, and the ranges that it overlaps as changed.
func (h *HMM) open(changing addr.HVARange) {
	h.lock()
	defer h.unlock()
	h.active++
	for r := range h.ranges {
		if r.Range.Overlaps(changing) && h.reg.mutant == sound || h.reg.mutant.overlap(r.Range, changing) {
			r.hits++
			r.changing = true
		}
	}
}

// close counts the end of a bracket. Ranges are usable again when it was the last:
// which of the brackets overlapped which of them has not been kept.
func (h *HMM) close(failed bool) {
	h.lock()
	defer h.unlock()
	if failed && h.reg.mutant == refusalStaysOpen {
		return
	}
	if h.active--; h.active > 0 && h.reg.mutant != anyEndWillDo {
		return
	}
	for r := range h.ranges {
		r.changing = false
	}
	h.wake()
}

// kill marks the address space as exited: nothing is valid from now on.
func (h *HMM) kill() {
	h.lock()
	defer h.unlock()
	h.dead = true
	if h.reg.mutant != deadWakesNobody {
		h.wake()
	}
}

// wake wakes whoever waits for a range to become valid. The caller holds h.mu.
func (h *HMM) wake() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// isDead reports whether the address space has exited.
func (h *HMM) isDead() bool {
	h.lock()
	defer h.unlock()
	return h.dead
}

// Stats is the state of an HMM.
type Stats struct {
	Refs    int64 // those of the mirrors, of ranges, of whoever called Lookup and Get, of callbacks
	Mirrors int   // that are told of changes
	Ranges  int   // between Begin and Done
	Active  int   // open brackets that it was told of
	Exited  bool  // the address space has exited
}

// Stats returns the state of the HMM, which is not taken at one instant. The caller
// has a reference.
func (h *HMM) Stats() Stats {
	h.held("Stats")
	h.rlockMirrors(true)
	st := Stats{Refs: h.refs.Load(), Mirrors: len(h.mirrors)}
	h.runlockMirrors()
	h.lock()
	defer h.unlock()
	st.Ranges, st.Active, st.Exited = len(h.ranges), h.active, h.dead
	return st
}

// Check returns every invariant of the HMM that does not hold. It is called by
// somebody with a reference while nobody else uses the HMM, its mirrors and its
// ranges, and no bracket of the address space is open.
func (h *HMM) Check() error {
	h.held("Check")
	var wrong []error
	errorf := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }

	var sum int64
	for i := range h.owners {
		n := h.owners[i].Load()
		if n < 0 {
			errorf("owners of kind %d have %d references", i, n)
		}
		sum += n
	}
	if refs := h.refs.Load(); refs != sum {
		errorf("there are %d references, and owners have %d", refs, sum)
	}
	if n := h.owners[byCallback].Load(); n != 0 {
		errorf("%d methods that have returned still have a reference", n)
	}

	h.reg.lock()
	found := h.reg.hmms[h.as]
	h.reg.unlock()
	h.rlockMirrors(true)
	defer h.runlockMirrors()
	h.lock()
	defer h.unlock()
	switch n := h.owners[byMirror].Load(); {
	case h.dead && len(h.mirrors) != 0:
		errorf("the address space has exited, and %d mirrors are still told", len(h.mirrors))
	case !h.dead && n != int64(len(h.mirrors)):
		errorf("%d mirrors are told, and mirrors have %d references", len(h.mirrors), n)
	}
	for _, m := range h.mirrors {
		if m.hmm.Load() != h {
			errorf("a mirror of %T is told that is not registered here", m.driver)
		}
	}
	if n := h.owners[byRange].Load(); n != int64(len(h.ranges)) {
		errorf("there are %d ranges, and ranges have %d references", len(h.ranges), n)
	}
	for r := range h.ranges {
		if r.h != h {
			errorf("the range %v is linked, but not begun here", r.Range)
		}
		if r.changing && h.active == 0 && !h.dead {
			errorf("the range %v is taken to be changing, and no bracket is open", r.Range)
		}
	}
	if h.active != 0 && !h.dead {
		errorf("%d brackets are taken to be open", h.active)
	}
	if found != h {
		errorf("another one is found for the address space: %p, want %p", found, h)
	}
	return errors.Join(wrong...)
}
