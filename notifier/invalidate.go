package notifier

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// Event says why the mappings of a range change.
type Event uint8

// The events. A subscriber treats one that it does not know as Clear. The first
// eight are Linux's; Remap and Map are changes that KVM need not be told of, but
// the owner of its memory slots does. Linux announces a remap as Unmap.
const (
	Unmap       Event = iota + 1 // the mappings go away, or others take their place
	Clear                        // the pages are dropped; the mappings stay, and may fault in others
	Protect                      // the mappings stay, with other permissions
	ProtectPage                  // the same page by page: what they are can be looked up at the end
	SoftDirty                    // the same pages with the same permissions, to be marked as clean
	Released                     // the address space exits; for intervals only
	Migrate                      // the pages move to or from the device of the owner, which may ignore it
	Exclusive                    // the owner's device gets the pages for itself; it may ignore it
	Remap                        // the pages move to another address
	Map                          // where nothing was mapped, something will be
)

var events = [...]string{
	Unmap: "unmap", Clear: "clear", Protect: "protect", ProtectPage: "protect-page", SoftDirty: "soft-dirty",
	Released: "release", Migrate: "migrate", Exclusive: "exclusive", Remap: "remap", Map: "map",
}

func (e Event) String() string {
	if int(e) < len(events) && events[e] != "" {
		return events[e]
	}
	return fmt.Sprintf("event(%d)", uint8(e))
}

// Content says what a change does to what is read through the mappings of its range.
// A subscriber that keeps track of content takes one that it does not know as
// Changed.
type Content uint8

const (
	Changed Content = iota // it may be anything afterwards; who does not say otherwise says this
	Kept                   // it is the same
	Zeroed                 // it is zero
	Gone                   // there is none: nothing is mapped
)

var contents = [...]string{Changed: "changed", Kept: "kept", Zeroed: "zeroed", Gone: "gone"}

func (c Content) String() string {
	if int(c) < len(contents) {
		return contents[c]
	}
	return fmt.Sprintf("content(%d)", uint8(c))
}

// Invalidation describes one bracketed change. From the start to the end of its
// bracket nothing of it changes but Failed, and it is not copied.
type Invalidation struct {
	Range addr.HVARange // page aligned, not empty; it may be larger than what was asked of the caller
	Event Event

	// NonBlockable: the caller, such as one who frees memory because there is
	// none, cannot wait for anybody who may wait for it.
	NonBlockable bool

	After   addr.Access // the most that the mappings of Range will allow once the change is done
	Content Content     // what it does to what is read there; for Remap, to what is read at To
	To      addr.HVA    // for Remap: where the page at Range.Start goes
	Owner   any         // for Migrate and Exclusive: whose device it is
	Op      uint64      // the host operation, for the trace
	Failed  bool        // at the end: the change was not made

	opened addr.HVARange // Range, while the bracket is open; otherwise empty
}

// ErrWouldBlock is why a bracket was not opened: a subscriber would have had to
// sleep for it, and NonBlockable did not let it. It is EAGAIN for errors.Is.
var ErrWouldBlock error = &errnoError{"a subscriber would have to sleep", syscall.EAGAIN}

var (
	errRange error = &errnoError{"the range is empty or not page aligned", syscall.EINVAL}
	errOpen  error = &errnoError{"its bracket is open already", syscall.EINVAL}
)

// check reports what is wrong with a range.
func check(r addr.HVARange) error {
	if r.Empty() || !r.Aligned() {
		return errRange
	}
	return nil
}

// InvalidateRangeStart opens a bracket: intervals that overlap the range are told,
// and then subscribers, newest first. The caller holds the mapping lock, or the
// lock of the reverse map of the pages, until the end; it changes no mapping
// before the call has returned nil, and then calls InvalidateRangeEnd with the
// same inv on the same goroutine.
//
// The error is EINVAL if the range is empty or not page aligned, and nobody has
// been told. With inv.NonBlockable it may be ErrWouldBlock: whoever was told of
// the start has been told of the end, and the caller neither makes the change
// nor calls InvalidateRangeEnd. Otherwise subscribers cannot refuse.
//
// With no subscriptions it costs one load. It does not allocate, and blocks for
// as long as subscribers do.
func (as *AddressSpace) InvalidateRangeStart(inv *Invalidation) error {
	if inv.Range.Empty() || !inv.Range.Aligned() || !inv.opened.Empty() {
		return inv.refused()
	}
	lockorder.Covered()
	lockorder.Acquire(lockorder.Section)
	inv.opened, inv.Failed = inv.Range, false
	s := as.subs.Load()
	if s == nil {
		return nil
	}
	if s.used.Load() {
		if err := s.startIntervals(as, inv); err != nil {
			inv.close()
			return err
		}
	}
	if s.first.Load() == nil {
		return nil
	}
	if err := s.start(as, inv); err != nil {
		s.undo(as, inv)
		return err
	}
	return nil
}

// refused returns why a bracket cannot be opened.
func (inv *Invalidation) refused() error {
	err := check(inv.Range)
	if err == nil {
		err = errOpen
	}
	return fmt.Errorf("invalidate %v: %w", inv.Range, err)
}

func (inv *Invalidation) close() {
	inv.opened = addr.HVARange{}
	lockorder.Release(lockorder.Section)
}

// start tells every subscriber of the start, also after one has failed.
func (s *subscriptions) start(as *AddressSpace, inv *Invalidation) (failed error) {
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if n.m.rangeStarter == nil {
			continue
		}
		if err := n.callStart(as, inv); err != nil {
			if err = n.mayFail(as, inv, err); err != nil && failed == nil {
				failed = err
			}
			if as.mutant == stopAtFirst && failed != nil {
				return failed
			}
		}
	}
	return failed
}

func (n *Notifier) callStart(as *AddressSpace, inv *Invalidation) (err error) {
	defer as.contain(n.sub, "InvalidateRangeStart", &err)
	return n.m.rangeStarter.InvalidateRangeStart(inv)
}

var (
	errMustNotFail = errors.New("it failed, which it may only where it must not block")
	errHasEnd      = errors.New("it failed and has an InvalidateRangeEnd, which cannot tell that from success")
)

// mayFail returns the error with which the bracket is not opened because n's
// start failed with err, or nil if n should not have failed.
func (n *Notifier) mayFail(as *AddressSpace, inv *Invalidation, err error) error {
	var panicked *PanicError
	isPanic := errors.As(err, &panicked) // reported already
	if !inv.NonBlockable {
		if !isPanic {
			as.report(n.sub, "InvalidateRangeStart", fmt.Errorf("%w: %w", errMustNotFail, err))
		}
		return nil
	}
	if n.m.rangeEnder != nil && !isPanic {
		as.report(n.sub, "InvalidateRangeStart", fmt.Errorf("%w: %w", errHasEnd, err))
	}
	return fmt.Errorf("invalidate %v: %T: %w (%w)", inv.Range, n.sub, ErrWouldBlock, err)
}

// undo tells of the end of a bracket that could not be opened.
func (s *subscriptions) undo(as *AddressSpace, inv *Invalidation) {
	inv.Failed = true
	defer inv.close()
	if s.used.Load() && as.mutant != undoForgetsIntervals {
		s.endIntervals(as)
	}
	switch as.mutant {
	case undoTellsNobody:
	case undoTellsEarlier:
		s.endEarlier(as, inv)
	default:
		s.end(as, inv)
	}
}

// InvalidateRangeEnd closes the bracket that InvalidateRangeStart opened with
// inv, whether the change was made or failed. One that is not open, or whose
// range has changed, is reported; the former is not closed again.
func (as *AddressSpace) InvalidateRangeEnd(inv *Invalidation) {
	if inv.opened != inv.Range && as.mutant != endAnything {
		as.report(nil, "InvalidateRangeEnd", fmt.Errorf("the bracket of %v was opened for %v", inv.Range, inv.opened))
		if inv.opened.Empty() {
			return
		}
		inv.Range = inv.opened
	}
	defer inv.close()
	s := as.subs.Load()
	if s == nil {
		return
	}
	if s.used.Load() {
		s.endIntervals(as)
	}
	if s.first.Load() != nil {
		s.end(as, inv)
	}
}

func (s *subscriptions) end(as *AddressSpace, inv *Invalidation) {
	idx := chains.ReadLock()
	defer chains.ReadUnlock(idx)
	for n := s.first.Load(); n != nil; n = n.next.Load() {
		if n.m.rangeEnder != nil {
			n.callEnd(as, inv)
		}
	}
}

func (n *Notifier) callEnd(as *AddressSpace, inv *Invalidation) {
	var err error
	defer as.contain(n.sub, "InvalidateRangeEnd", &err)
	n.m.rangeEnder.InvalidateRangeEnd(inv)
}
