package hmm

import (
	"errors"
	"fmt"
	"runtime/debug"
	"syscall"

	"github.com/secondmmu/gvm/notifier"
)

// An HMM is on the chain twice, because a subscriber that can refuse a bracket must
// not be told of ends, and the count of open brackets needs them:
//
//	gate     start: count the bracket and the ranges    end: count back     cannot refuse
//	syncer   start: have the drivers drop their entries                     may refuse
//
// If the syncer refuses, or any other subscriber, the gate is given the end of the
// bracket as everybody is, and that restores the count. Linux had one notifier for
// both and counted back by hand, since no end followed a refusal then.
//
// The gate is registered second and so comes first in a walk. Were it the other way
// round, a driver could drop its entries, find a range of it still valid and install
// them again, and nobody would tell it to drop those.

// gate knows which ranges are changing.
type gate struct {
	notifier.Notifier
	h *HMM
}

// syncer tells the drivers.
type syncer struct {
	notifier.Notifier
	h *HMM
}

// enter begins a method of a subscriber: it takes a reference, or reports that the
// HMM is being freed, and there is nothing left to do. The method was found on the
// chain and not by the address space, whose HMM may be another one by now, or none.
func (h *HMM) enter(method string) bool {
	h.reg.at(method, h)
	switch h.reg.mutant {
	case findByAddressSpace:
		found := h.reg.lookup(h.as, byCallback)
		if found == nil {
			panic("hmm: a method of a subscriber finds no HMM")
		}
		return true
	case testForNil:
		if h.as == nil {
			return false
		}
		h.reg.at("tested", h)
		h.held(method)
		return true
	}
	return h.tryGet(byCallback)
}

// leave ends a method.
func (h *HMM) leave() {
	if h.reg.mutant != testForNil {
		h.put(byCallback)
	}
}

// InvalidateRangeStart counts the bracket. It takes a lock for a few instructions,
// so it does not sleep.
func (g *gate) InvalidateRangeStart(inv *notifier.Invalidation) error {
	h := g.h
	if !h.enter("gate start") {
		return nil
	}
	defer h.leave()
	h.open(inv.Range)
	return nil
}

// InvalidateRangeEnd counts back, also where the bracket was refused.
func (g *gate) InvalidateRangeEnd(inv *notifier.Invalidation) {
	h := g.h
	if !h.enter("gate end") {
		return
	}
	defer h.leave()
	h.close(inv.Failed)
}

// Release ends the validity of all ranges, for good.
func (g *gate) Release() {
	h := g.h
	if !h.enter("gate release") {
		return
	}
	defer h.leave()
	h.kill()
}

var errSyncing error = &errnoError{"mirrors are being registered or unregistered", syscall.EAGAIN}

// InvalidateRangeStart has every driver drop what it has in the range.
func (s *syncer) InvalidateRangeStart(inv *notifier.Invalidation) error {
	h := s.h
	if !h.enter("syncer start") {
		return nil
	}
	if !h.rlockMirrors(!inv.NonBlockable) {
		if h.reg.mutant != refusalKeepsReference {
			h.leave()
		}
		return errSyncing
	}
	defer h.leave()
	defer h.runlockMirrors()
	var errs []error
	for _, m := range h.mirrors {
		if err := m.sync(inv); err != nil {
			errs = append(errs, err)
			if inv.NonBlockable {
				break // nothing will change
			}
		}
	}
	return errors.Join(errs...)
}

// Release has every driver drop everything. A driver is released with no lock held,
// so that it can wait for work that causes changes, and can unregister its mirror.
// Linux takes the mirror off the list before; here it stays on it until its driver's
// Release has returned, because a change that somebody else makes meanwhile, by a
// reverse map, must still reach it.
func (s *syncer) Release() {
	h := s.h
	if !h.enter("syncer release") {
		return
	}
	defer h.leave()
	var errs []error
	for {
		m, d := h.releasing()
		if m == nil {
			break
		}
		if err := release(d); err != nil {
			errs = append(errs, err)
		}
		if h.reg.mutant == releaseInside {
			h.unlockMirrors()
		}
		h.lockMirrors()
		h.unlink(m)
		h.unlockMirrors()
	}
	if err := errors.Join(errs...); err != nil {
		panic(err)
	}
}

// releasing returns the oldest mirror that is left, or nil, and its driver if that is
// to be released. No mirror is added any more: the gate has been released before.
func (h *HMM) releasing() (*Mirror, Releaser) {
	h.lockMirrors()
	if len(h.mirrors) == 0 {
		h.unlockMirrors()
		return nil, nil
	}
	m := h.mirrors[0]
	switch h.reg.mutant {
	case releaseInside:
		return m, m.releaser
	case unlinkBeforeRelease:
		h.unlink(m)
	}
	d := m.releaser
	h.unlockMirrors()
	return m, d
}

// sync calls the driver's Sync. If that panics the error says so, and other drivers
// are told all the same.
func (m *Mirror) sync(inv *notifier.Invalidation) (err error) {
	defer contain("Sync", m.driver, &err)
	if err := m.driver.Sync(inv); err != nil {
		return fmt.Errorf("%T: %w", m.driver, err)
	}
	return nil
}

// release calls Release of d, unless that is nil.
func release(d Releaser) (err error) {
	if d == nil {
		return nil
	}
	defer contain("Release", d, &err)
	d.Release()
	return nil
}

// contain is deferred around a method of a driver and makes an error of a panic.
func contain(method string, d any, err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%s of %T: panic: %v\n%s", method, d, p, debug.Stack())
	}
}
