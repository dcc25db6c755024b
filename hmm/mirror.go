package hmm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/notifier"
)

// Driver is what drives a device that has a mirror. What else it implements of the
// interfaces below is found out once, when the mirror is registered.
type Driver interface {
	// Sync is told of a change before it is made. It takes the lock under which
	// the driver installs entries, drops those of inv.Range, and returns nil when
	// the device does not use them any more. Only if inv.NonBlockable, where it
	// must not sleep, it may return EAGAIN instead, having dropped some or none.
	//
	// It waits for no other change, and does not register or unregister mirrors.
	// If inv.Event is Migrate or Exclusive and inv.Owner is the device itself, it
	// may keep its entries.
	Sync(inv *notifier.Invalidation) error
}

// Releaser is a driver that has something to do when the address space exits.
type Releaser interface {
	// Release drops every entry; the pages go when it has returned. Until then
	// Sync may still be called. It may sleep, wait for what causes changes, and
	// unregister the mirror.
	Release()
}

// Mirror is a device's copy of an address space: Linux's struct hmm_mirror. The zero
// Mirror is ready for use, again after Unregister. It must not be copied while it is
// registered.
type Mirror struct {
	// hmm is nil while the mirror is not registered. It is written with the
	// mirrorsLock of the HMM held that it points to, or pointed to.
	hmm  atomic.Pointer[HMM]
	busy atomic.Bool // registered, or about to be, or not quite unregistered

	driver   Driver
	releaser Releaser // the driver, or nil
}

var (
	errNil        error = &errnoError{"the mirror, the address space or the driver is nil", syscall.EINVAL}
	errRegistered error = &errnoError{"the mirror is registered already", syscall.EBUSY}
	errExited     error = &errnoError{"the address space has exited", syscall.ESRCH}
)

// Register has d told of every change of the address space from now on. The caller
// is a user of the address space, and holds no lock of the order. It waits until no
// bracket is in flight if the address space has no HMM yet.
//
// The error is EINVAL if something is nil; EBUSY if the mirror is registered; ESRCH if
// the address space has exited; EINTR if ctx is done before the locks were had. The
// mirror is then not registered, and no reference is left. Each Register that succeeds
// is followed by an Unregister, also after the address space has exited.
func (m *Mirror) Register(ctx context.Context, as *notifier.AddressSpace, d Driver) error {
	return hmms.register(ctx, m, as, d)
}

func (reg *registry) register(ctx context.Context, m *Mirror, as *notifier.AddressSpace, d Driver) error {
	fail := func(err error) error { return fmt.Errorf("register a mirror for %T: %w", d, err) }
	if m == nil || as == nil || d == nil {
		return fail(errNil)
	}
	if !m.busy.CompareAndSwap(false, true) {
		return fail(errRegistered)
	}
	h, err := reg.obtain(ctx, as)
	switch {
	case errors.Is(err, notifier.ErrExited):
		err = errExited
	case err == nil:
		m.driver = d
		m.releaser, _ = d.(Releaser)
		if err = h.link(m); err != nil {
			h.put(byMirror)
		}
	}
	if err != nil {
		m.busy.Store(false)
		return fail(err)
	}
	return nil
}

// link adds m to those who are told. After the exit has begun to release them it
// does not, because nobody would release m.
func (h *HMM) link(m *Mirror) error {
	lockorder.Wait(lockorder.Section)
	h.lockMirrors()
	defer h.unlockMirrors()
	if h.isDead() {
		return errExited
	}
	h.mirrors = append(h.mirrors, m)
	m.hmm.Store(h)
	return nil
}

// unlink takes m off the list, if it is on it. The caller holds mirrorsLock.
func (h *HMM) unlink(m *Mirror) {
	h.mirrors = slices.DeleteFunc(h.mirrors, func(o *Mirror) bool { return o == m })
}

// Unregister ends the registration. When it returns, Sync does not run and will not
// be called, and the reference is put. A mirror that is not registered, also because
// somebody else has just unregistered it, is left alone.
//
// It blocks while drivers of the address space are told of a change, so it is called
// with no lock held that Sync takes, and not in Sync. It may be called in the driver's
// Release. Called elsewhere while the address space exits, it does not wait for
// Release, which may be waiting for the caller: who frees the driver then sees to it
// that Release has returned.
func (m *Mirror) Unregister() {
	lockorder.Wait(lockorder.Section)
	h := m.disown()
	if h == nil {
		return
	}
	h.put(byMirror)
	m.busy.Store(false)
}

// disown unlinks m and returns the HMM whose reference it had, to one of those who
// call it at a time.
//
// Its section keeps the HMM from being freed between the load and the lock: a caller
// who has overtaken this one may put the last reference there. The patch loads the
// pointer and believes it, and of two callers both put a reference.
func (m *Mirror) disown() *HMM {
	idx := chains.ReadLock()
	defer func() { chains.ReadUnlock(idx) }()
	h := m.hmm.Load()
	if h == nil {
		return nil
	}
	if h.reg.mutant == loadOutside {
		chains.ReadUnlock(idx)
		defer func() { idx = chains.ReadLock() }()
	}
	h.reg.at("loaded", h)
	if h.freed.Load() {
		panic("hmm: Unregister uses an HMM that has been freed")
	}
	h.lockMirrors()
	defer h.unlockMirrors()
	if m.hmm.Load() != h && h.reg.mutant != testOutside {
		return nil
	}
	m.hmm.Store(nil)
	h.unlink(m)
	return h
}
