package shadow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

// Tracker makes the slots of one VM, and the translations of its threads, follow the
// mappings of its host memory.
type Tracker struct {
	notifier.Notifier

	slots *Memslots // immutable
	table *Table    // immutable
	host  Host      // immutable

	released bool // no more slots; protected by slots.mu
	logDirty bool // slots are logged; protected by slots.mu
	behind   bool // the backend refused a change, and may have fewer slots than it could; protected by slots.mu
}

// NewTracker returns a tracker without windows. It installs slots with numbers
// from 0 to below limit. The caller registers it with the notifier of the
// address space that host belongs to.
func NewTracker(host Host, backend Backend, limit uint32, log *trace.Log) *Tracker {
	m := NewMemslots(backend, limit, log)
	return &Tracker{slots: m, table: NewTable(m, host), host: host}
}

// Slots returns the current set.
func (t *Tracker) Slots() *Slots { return t.slots.Slots() }

// Table returns the table through which threads of the VMM use the guest's memory.
func (t *Tracker) Table() *Table { return t.table }

// LogDirty has the backend log what the guest writes from now on, or no more; what it
// has logged so far is for the next Harvest. With an error nothing has changed.
func (t *Tracker) LogDirty(on bool) error {
	t.slots.lock()
	defer t.slots.unlock()
	var u update
	for s := range t.Slots().All() {
		if to := s; s.LogDirty != on {
			to.LogDirty = on
			u.changes = append(u.changes, move{s, to})
		}
	}
	if err := t.slots.applyLocked(u, nil, 0); err != nil {
		return fmt.Errorf("log dirty pages: %w", err)
	}
	t.logDirty = on
	return nil
}

// Harvest takes out of the dirty log what has changed since it was last harvested: what
// was written through the table, what the guest has written, if that is logged, and
// what changes of the mapping did to content. The pages may be copied when it returns.
// A frame that is dirty and cannot be read has no memory at the moment.
//
// It waits until no bracket is open, so that the content of a page and what is recorded
// of it go together, and until nobody uses a page that he has found before. It is not
// called with a lock of the order held, in a bracket, or inside a Use. The error is
// dirty.ErrOpen if a harvest is open, or EINTR if ctx is done first.
func (t *Tracker) Harvest(ctx context.Context) (*dirty.Harvest, error) {
	if as := t.AddressSpace(); as != nil && t.slots.mutant != harvestInBracket {
		if err := as.RLockContext(ctx); err != nil {
			return nil, fmt.Errorf("harvest dirty pages: %w", err)
		}
		defer as.RUnlock()
	}
	t.slots.lock()
	t.slots.collectLocked(slices.Collect(t.Slots().All()))
	t.slots.unlock()
	return t.table.log.Begin()
}

// Check returns an error for every invariant of the set and the table that does
// not hold, joined, or nil; and for every slot that shows something else than its
// window, unless the backend has refused to make it follow.
func (t *Tracker) Check() error {
	t.slots.lock()
	defer t.slots.unlock()
	errs := []error{t.Slots().Check(), t.table.Check()}
	if !t.behind {
		errs = append(errs, t.Slots().checkWindows())
	}
	for s := range t.Slots().All() {
		if t.slots.installed[s.ID] != s {
			errs = append(errs, fmt.Errorf("shadow: %v is published, and installed is %v", s, t.slots.installed[s.ID]))
		}
	}
	if n := t.Slots().Len(); n != len(t.slots.installed) {
		errs = append(errs, fmt.Errorf("shadow: %d slots are published, and %d installed", n, len(t.slots.installed)))
	}
	return errors.Join(errs...)
}

// AddWindow promises memory to the guest and installs slots for what is mapped
// of it. The caller holds the mapping lock of the address space.
func (t *Tracker) AddWindow(w Window) error {
	fail := func(err error) error {
		return fmt.Errorf("add window %q, %v at %v: %w", w.Name, w.GFNs(), addr.HVA(w.HVA), err)
	}
	if w.NPages == 0 || w.HVA&addr.PageMask != 0 || w.GFNs().Empty() || w.HVAs().NPages() != w.NPages {
		return fail(errors.New("it is empty, not page aligned, or wraps"))
	}
	if w.GFNs().End > maxGFN+1 {
		return fail(errTooHigh)
	}
	t.slots.lock()
	defer t.slots.unlock()
	if t.released {
		return fail(notifier.ErrExited)
	}
	old := t.Slots()
	for o := range old.windows.inGFNs(w.GFNs()) {
		return fail(fmt.Errorf("it overlaps window %q, %v", o.Name, o.GFNs()))
	}
	windows := old.windows.change(nil, []Window{w})
	if err := t.fitLocked(windows, []addr.GFNRange{w.GFNs()}, nil, 0); err != nil {
		return fail(err)
	}
	return nil
}

// InvalidateRangeStart takes the translations of the range out, waits until none
// of them is used, and does before the change what policy says. If the backend
// refuses, the slots are as they were, and the error, which is for the report
// of whoever makes the change, says why: a guest that uses what has gone then
// leaves with EFAULT instead of an exit that names the address.
//
// A change that nobody may wait for leaves the mappings in place and takes their
// pages only. The backend follows that by itself, vCPUs could not be waited for,
// and a host address, which is what a translation has, is as good as before:
// nothing is done.
func (t *Tracker) InvalidateRangeStart(inv *notifier.Invalidation) error {
	if inv.NonBlockable {
		return nil
	}
	t.table.begin(inv.Range)
	t.slots.lock()
	defer t.slots.unlock()
	react := policy[inv.Event]
	if react.hold {
		t.slots.backend.Hold()
	}
	if !react.narrow || t.released {
		return nil
	}
	if err := t.fitLocked(t.Slots().windows, t.shows(inv.Range), inv, inv.Op); err != nil {
		t.behind = true
		return fmt.Errorf("make the memory slots follow: %w", err)
	}
	return nil
}

// InvalidateRangeEnd makes the slots what the mappings allow after a change, if
// policy says that they may have changed.
//
// If the backend refuses, the slots stay narrower than the mappings allow,
// which the guest meets as exits, not as wrong memory; the next bracket tries
// again. The reason is in the trace, at the slot that was refused.
func (t *Tracker) InvalidateRangeEnd(inv *notifier.Invalidation) {
	if inv.NonBlockable {
		return
	}
	defer t.endTable(inv.Range)
	t.slots.lock()
	defer t.slots.unlock()
	react := policy[inv.Event]
	if react.hold {
		defer t.slots.backend.Release()
	}
	t.recordLocked(inv)
	if t.released || !react.settle && !t.behind {
		return
	}
	fit := t.shows(inv.Range)
	moved := react.follow && !inv.Failed
	if moved {
		// What the windows show is a fact, whether or not the slots can follow.
		t.slots.publishLocked(t.Slots().slots, t.follow(inv))
	}
	if t.behind {
		fit = []addr.GFNRange{allGFNs}
	}
	windows := t.Slots().windows
	err := t.fitLocked(windows, fit, nil, inv.Op)
	t.behind = err != nil
	if err != nil && moved {
		// The slots that show the old addresses cannot stay: those are no
		// longer the guest's memory. To leave them out takes deletions only.
		gone := update{deletes: slices.Collect(t.Slots().InHVAs(inv.Range))}
		_ = t.slots.applyLocked(gone, &windows, inv.Op)
	}
}

// recordLocked records what a change has done to the content of frames. The caller is
// in a bracket with the mapping lock held, so no harvest is between the change and
// this, as the log asks for.
func (t *Tracker) recordLocked(inv *notifier.Invalidation) {
	if t.slots.mutant == contentUnrecorded {
		return
	}
	record := recorder(inv)
	idx := t.table.domain.ReadLock() // marks are made in sections
	defer t.table.domain.ReadUnlock(idx)
	for w := range t.Slots().windows.inHVAs(inv.Range) {
		both := w.HVAs().Intersect(inv.Range)
		record(t.table.log, frames(w.gfn(both.Start), both.NPages()))
	}
}

func (t *Tracker) endTable(r addr.HVARange) {
	if t.slots.mutant == endLooksAgain {
		for range t.Slots().InHVAs(r) {
			t.table.end(r)
			return
		}
		return
	}
	t.table.end(r)
}

// ClearFlushYoung clears the young bits of the translations of r, and reports
// whether one was set. It does not wait for who uses one at the moment.
func (t *Tracker) ClearFlushYoung(r addr.HVARange) bool { return t.table.clearYoung(r) }

// ClearYoung is ClearFlushYoung.
func (t *Tracker) ClearYoung(r addr.HVARange) bool { return t.table.clearYoung(r) }

// TestYoung reports whether a translation of the page at hva was used since its
// young bit was cleared.
func (t *Tracker) TestYoung(hva addr.HVA) bool { return t.table.testYoung(hva) }

// shows returns the frames that show a page of r, according to the windows.
func (t *Tracker) shows(r addr.HVARange) (ranges []addr.GFNRange) {
	for w := range t.Slots().windows.inHVAs(r) {
		both := w.HVAs().Intersect(r)
		ranges = append(ranges, frames(w.gfn(both.Start), both.NPages()))
	}
	return ranges
}

// follow returns the windows with everything that shows inv.Range showing the same
// number of bytes at inv.To.
func (t *Tracker) follow(inv *notifier.Invalidation) index[Window] {
	old := t.Slots().windows
	var del, add []Window
	take := func(w Window) {
		if !slices.Contains(del, w) {
			del = append(del, w)
		}
	}
	for w := range old.inHVAs(inv.Range) {
		take(*w)
		moved := w.HVAs().Intersect(inv.Range)
		part := func(r addr.HVARange, hva addr.HVA) {
			if !r.Empty() {
				add = append(add, Window{Name: w.Name, GFN: w.gfn(r.Start), NPages: r.NPages(), HVA: hva})
			}
		}
		part(addr.HVARange{Start: w.HVA, End: moved.Start}, w.HVA)
		part(moved, inv.To+(moved.Start-inv.Range.Start))
		part(addr.HVARange{Start: moved.End, End: w.HVAs().End}, moved.End)
	}
	// Neighbours that one window could stand for become one: among them those
	// that stayed as they were.
	for _, w := range slices.Clone(add) {
		for _, gfn := range []addr.GFN{w.GFN - 1, w.GFNs().End} {
			if o := old.find(gfn); o != nil && !slices.Contains(del, *o) {
				take(*o)
				add = append(add, *o)
			}
		}
	}
	slices.SortFunc(add, func(a, b Window) int { return cmp.Compare(a.GFN, b.GFN) })
	return old.change(del, mergeWindows(add))
}

// mergeWindows joins neighbours that one window could stand for.
func mergeWindows(windows []Window) (merged []Window) {
	for _, w := range windows {
		if n := len(merged); n > 0 && merged[n-1].continues(w) {
			merged[n-1].NPages += w.NPages
		} else {
			merged = append(merged, w)
		}
	}
	return merged
}

// mergeSlots joins neighbours that one slot could stand for, and takes their
// numbers away.
func mergeSlots(slots []Slot) (merged []Slot) {
	for _, s := range slots {
		s.ID = noID
		if n := len(merged); n > 0 && merged[n-1].continues(s) {
			merged[n-1].NPages += s.NPages
		} else {
			merged = append(merged, s)
		}
	}
	return merged
}

// Release takes all slots and translations away. The backend may be gone or about to
// go, so what it says to that does not matter.
func (t *Tracker) Release() {
	t.table.release()
	t.slots.lock()
	defer t.slots.unlock()
	t.released = true
	t.slots.clearLocked()
}

// fitLocked makes the slots of some frames what shows as much of the windows there
// as the host has mapped, less the access that inv is about to take, unless it is
// nil. Slots elsewhere change only if they become one with these. With an error
// nothing has changed.
func (t *Tracker) fitLocked(windows index[Window], where []addr.GFNRange, inv *notifier.Invalidation, op uint64) error {
	u := t.deriveLocked(windows, where, inv)
	return t.slots.applyLocked(u, &windows, op)
}

// deriveLocked returns what fitLocked has to do.
func (t *Tracker) deriveLocked(windows index[Window], where []addr.GFNRange, inv *notifier.Invalidation) (u update) {
	old := t.Slots()
	for _, r := range union(where) {
		var want []Slot
		around := addr.GFNRange{Start: r.Start - min(r.Start, 1), End: max(r.End+1, r.End)}
		have := slices.Collect(old.InGFNs(around)) // and the neighbours
		for _, s := range have {
			for _, rest := range []addr.GFNRange{{Start: s.GFN, End: r.Start}, {Start: r.End, End: s.GFNs().End}} {
				if rest = rest.Intersect(s.GFNs()); !rest.Empty() {
					want = append(want, s.cut(rest))
				}
			}
		}
		for w := range windows.inGFNs(r) {
			want = t.backed(want, *w, w.GFNs().Intersect(r), inv)
		}
		slices.SortFunc(want, compareSlots)
		want = mergeSlots(want)
		for _, s := range have {
			if i, ok := slices.BinarySearchFunc(want, s, compareSlots); !ok || !want[i].sameMapping(s) {
				u.deletes = append(u.deletes, s)
			}
		}
		for _, s := range want {
			if i, ok := slices.BinarySearchFunc(have, s, compareSlots); !ok || !have[i].sameMapping(s) {
				u.creates = append(u.creates, s)
			}
		}
	}
	return u
}

// backed appends to slots those that show as much of the frames r of w as the host
// has mapped, less what inv is about to take.
func (t *Tracker) backed(slots []Slot, w Window, r addr.GFNRange, inv *notifier.Invalidation) []Slot {
	emit := func(r addr.HVARange, access addr.Access) {
		if !r.Empty() && access != addr.NoAccess {
			slots = append(slots, Slot{GFN: w.gfn(r.Start), NPages: r.NPages(), HVA: r.Start, Access: access, LogDirty: t.logDirty})
		}
	}
	t.host.Walk(addr.HVAs(w.hva(r.Start), r.NPages()<<addr.PageShift), func(r addr.HVARange, access addr.Access) {
		if inv == nil || !r.Overlaps(inv.Range) {
			emit(r, access)
			return
		}
		in := r.Intersect(inv.Range)
		emit(addr.HVARange{Start: r.Start, End: in.Start}, access)
		emit(in, narrowed(inv, access))
		emit(addr.HVARange{Start: in.End, End: r.End}, access)
	})
	return slots
}

// union returns the same frames in ranges that do not meet, in order: the slots
// around two that do would be dealt with twice.
func union(ranges []addr.GFNRange) (merged []addr.GFNRange) {
	slices.SortFunc(ranges, func(a, b addr.GFNRange) int { return cmp.Compare(a.Start, b.Start) })
	for _, r := range ranges {
		if n := len(merged); n > 0 && r.Start <= merged[n-1].End+1 {
			merged[n-1].End = max(merged[n-1].End, r.End)
		} else {
			merged = append(merged, r)
		}
	}
	return merged
}
