package shadow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

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

	policy   Policy // written before the first window is added, with slots.mu held
	released bool   // no more slots; protected by slots.mu
	logDirty bool   // slots are logged; protected by slots.mu

	// behind says that the backend refused a change, and may have fewer slots than it
	// could. It is written with slots.mu held, in a bracket.
	behind atomic.Bool

	// coarse says that each window is shown whole, or is about to be, or was a moment
	// ago. It is written with slots.mu held.
	coarse atomic.Bool

	// pieces is the slots that there would be if they were precise, without numbers,
	// while they are coarse for the lack of numbers. Protected by slots.mu.
	pieces index[Slot]
}

// NewTracker returns a tracker without windows. It installs slots with numbers
// from 0 to below limit. The caller registers it with the notifier of the
// address space that host belongs to.
func NewTracker(host Host, backend Backend, limit uint32, log *trace.Log) *Tracker {
	m := NewMemslots(backend, limit, log)
	return &Tracker{slots: m, table: NewTable(m, host), host: host, pieces: newIndex[Slot]()}
}

// SetPolicy has the slots follow the mappings by p instead of Precise. It is called
// before the first window is added, and panics later.
func (t *Tracker) SetPolicy(p Policy) {
	t.slots.lock()
	defer t.slots.unlock()
	for range t.Slots().Windows() {
		panic("shadow: the policy is set of slots that are there")
	}
	t.policy = p
	t.coarse.Store(p == Lazy)
}

// Coarse reports whether the slots show all of each window, mapped or not, readable and
// writable: with Lazy always, with Precise while there are not enough slot numbers for
// what is mapped. A guest that uses what is not mapped then leaves with EFAULT.
//
// Slots that are precise become coarse with the change of the mappings that would need
// more than the limit, and precise again with the one after which half of the limit is
// enough. In between, a change costs what it does with Lazy, and O(log n) for the
// bookkeeping. Going from one to the other makes all slots anew, behind the gate, which
// so many changes have to precede that it comes to a few slots for each. Where the
// windows alone take more than half of the limit, slots that are coarse stay so.
func (t *Tracker) Coarse() bool { return t.coarse.Load() }

// Behind reports whether slots show less than is mapped: the backend has refused a change, or
// the windows have moved in more pieces than there are slot numbers. The next bracket tries
// again.
func (t *Tracker) Behind() bool { return t.behind.Load() }

// Ended returns a channel that is closed when, after the call, a bracket has ended, and
// slots and translations have followed it. Who waits for memory to come back gets the
// channel, tries, and waits for it and for [Slots.Changed]: the slots need not change.
func (t *Tracker) Ended() <-chan struct{} { return t.table.endOfBracket() }

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
// A frame that is dirty and cannot be read has no memory at the moment; when it has
// again, that is in a later harvest.
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
	h, err := t.table.log.Begin()
	if err == nil && t.slots.log != nil {
		t.slots.log.Record(trace.Event{Kind: trace.Harvest, Pages: h.Dirty().Len()})
	}
	return h, err
}

// Check returns an error for every invariant of the set and the table that does
// not hold, joined, or nil. Unless the backend has refused to make the slots follow,
// these are among them:
//
//   - Each slot shows what its window does.
//   - No translation has more access than the mapping.
//   - While the slots are coarse, each window is shown whole; and precise ones would
//     be more than half of the limit, unless the policy is Lazy.
//
// It takes the mapping lock for reading.
func (t *Tracker) Check() error {
	if as := t.AddressSpace(); as != nil {
		as.RLock()
		defer as.RUnlock()
	}
	t.slots.lock()
	defer t.slots.unlock()
	errs := []error{t.Slots().Check(), t.table.check(t.mappedAccess)}
	if !t.behind.Load() {
		errs = append(errs, t.Slots().checkWindows(), t.checkCoarse())
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

// mappedAccess returns the access that all mappings of r allow. The caller holds the mapping
// lock.
func (t *Tracker) mappedAccess(r addr.HVARange) addr.Access {
	all, covered := addr.ReadWrite, uint64(0)
	t.host.Walk(r, func(part addr.HVARange, access addr.Access) {
		all &= access
		covered += part.Bytes()
	})
	if covered < r.Bytes() {
		return addr.NoAccess
	}
	return all
}

// checkCoarse is Check for slots that are coarse.
//
// Preconditions: t.slots.mu is held.
func (t *Tracker) checkCoarse() error {
	if !t.coarse.Load() {
		return nil
	}
	errs := []error{t.pieces.check()}
	if n := t.pieces.byGFN.Len(); t.policy == Precise && !t.released && !t.scarce(n) {
		errs = append(errs, fmt.Errorf("shadow: slots are coarse, and %d would be precise", n))
	}
	for w := range t.Slots().Windows() {
		for gfn := w.GFN; gfn < w.GFNs().End; {
			s, ok := t.Slots().Lookup(gfn)
			if !ok || s.Access != addr.ReadWrite {
				errs = append(errs, fmt.Errorf("shadow: slots are coarse, and do not show all of window %q: not %v", w.Name, gfn))
				break
			}
			gfn = s.GFNs().End
		}
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
// of them is used, and does before the change what the policy says. If the backend
// refuses, the slots are as they were, and the error, which is for the report
// of whoever makes the change, says why: a guest that uses what has gone then
// leaves with EFAULT instead of an exit that names the address. That slot numbers
// run out is no such error: see Coarse.
//
// A change that nobody may wait for leaves the mappings in place and takes their
// pages only. The backend follows that by itself, vCPUs could not be waited for,
// and a host address, which is what a translation has, is as good as before:
// nothing is done.
func (t *Tracker) InvalidateRangeStart(inv *notifier.Invalidation) error {
	if inv.NonBlockable {
		return nil
	}
	t.traceZap(inv, t.table.begin(inv.Range))
	t.recordReturns(inv)
	react := t.reaction(inv)
	narrow := react.narrow && inv.After != addr.ReadWrite // which takes nothing
	if !narrow && !react.hold {
		return nil
	}
	t.slots.lock()
	defer t.slots.unlock()
	if react.hold {
		t.slots.hold(inv.Op)
	}
	if !narrow || t.coarse.Load() || t.released || t.forgets(inv) {
		return nil
	}
	if err := t.fitLocked(t.Slots().windows, t.shows(inv.Range), inv, inv.Op); err != nil {
		t.behind.Store(true)
		return fmt.Errorf("make the memory slots follow: %w", err)
	}
	return nil
}

// forgets is the defect slotStays.
func (t *Tracker) forgets(inv *notifier.Invalidation) bool {
	return t.slots.mutant == slotStays && inv.Event == notifier.Unmap && inv.After == addr.NoAccess
}

// reaction returns what policy has for an event.
func (t *Tracker) reaction(inv *notifier.Invalidation) *reaction {
	if int(inv.Event) >= len(policies[t.policy]) {
		return new(reaction)
	}
	return &policies[t.policy][inv.Event]
}

// traceZap records in the trace which frames the translations were of that a bracket has
// taken out, zapped pages of them. There is an event for each run of frames, also if
// none of them was translated; the first has the number.
func (t *Tracker) traceZap(inv *notifier.Invalidation, zapped int) {
	if t.slots.log == nil {
		return
	}
	for w := range t.Slots().windows.inHVAs(inv.Range) {
		both := w.HVAs().Intersect(inv.Range)
		t.slots.log.Record(trace.Event{Kind: trace.Zap, Op: inv.Op, HVA: both, GFN: frames(w.gfn(both.Start), both.NPages()), Pages: uint64(zapped)})
		zapped = 0
	}
}

// InvalidateRangeEnd makes the slots what they are to be after a change, if the
// policy says that this may be something else.
//
// If the backend refuses, the slots stay narrower than the mappings allow,
// which the guest meets as exits, not as wrong memory; the next bracket tries
// again. The reason is in the trace, at the slot that was refused. The same goes for
// windows that have moved in so many pieces that there are not enough numbers for one
// slot each.
func (t *Tracker) InvalidateRangeEnd(inv *notifier.Invalidation) {
	if inv.NonBlockable {
		return
	}
	defer t.endTable(inv.Range)
	t.record(inv)
	react := t.reaction(inv)
	if !react.settle && !react.hold && !t.behind.Load() {
		return
	}
	t.slots.lock()
	defer t.slots.unlock()
	if react.hold {
		defer t.slots.release(inv.Op)
	}
	if t.released || !react.settle && !t.behind.Load() || t.forgets(inv) {
		return
	}
	fit := t.shows(inv.Range)
	moved := react.follow && !inv.Failed
	if moved {
		// What the windows show is a fact, whether or not the slots can follow.
		t.slots.publishLocked(t.Slots().slots, t.follow(inv))
	}
	if t.behind.Load() {
		fit = []addr.GFNRange{allGFNs}
	}
	windows := t.Slots().windows
	err := t.fitLocked(windows, fit, nil, inv.Op)
	t.behind.Store(err != nil)
	if err != nil && moved {
		t.leaveLocked(inv.Range, inv.Op)
	}
}

// leaveLocked takes what shows r out of the slots: those addresses are no longer the
// guest's memory. Of the rest of a slot, the larger part is kept, and the other if there
// are numbers for both; or none, if the backend refuses that.
func (t *Tracker) leaveLocked(r addr.HVARange, op uint64) {
	gone := update{deletes: slices.Collect(t.Slots().InHVAs(r))}
	for _, s := range gone.deletes {
		both := s.HVAs().Intersect(r)
		first := s.gfn(both.Start)
		for _, rest := range []addr.GFNRange{{Start: s.GFN, End: first}, {Start: first + addr.GFN(both.NPages()), End: s.GFNs().End}} {
			if keep := s.cut(rest); keep.NPages > 0 {
				keep.ID = noID
				gone.creates = append(gone.creates, keep)
			}
		}
	}
	slices.SortStableFunc(gone.creates, func(a, b Slot) int { return cmp.Compare(b.NPages, a.NPages) })
	room := t.limit() - t.Slots().Len() + len(gone.deletes)
	gone.creates = gone.creates[:min(room, len(gone.creates))]
	slices.SortFunc(gone.creates, compareSlots)
	windows := t.Slots().windows
	if t.slots.applyLocked(gone, &windows, op) != nil {
		gone.creates = nil
		_ = t.slots.applyLocked(gone, &windows, op)
	}
}

// record records what a change has done to the content of frames. The caller is
// in a bracket with the mapping lock held, so no harvest is between the change and
// this, as the log asks for.
func (t *Tracker) record(inv *notifier.Invalidation) {
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

// recordReturns records frames that could not be read and are about to be, with the
// content that they had: a harvest that had them as dirty meanwhile was of no use to who
// wanted to copy them. The caller is in a bracket, before the change.
func (t *Tracker) recordReturns(inv *notifier.Invalidation) {
	gives := inv.Event == notifier.Protect || inv.Event == notifier.Map
	if !gives || inv.Content != notifier.Kept || inv.After&addr.Read == 0 || t.slots.mutant == returnsUnrecorded {
		return
	}
	idx := t.table.domain.ReadLock() // marks are made in sections
	defer t.table.domain.ReadUnlock(idx)
	for w := range t.Slots().windows.inHVAs(inv.Range) {
		t.host.Walk(w.HVAs().Intersect(inv.Range), func(r addr.HVARange, access addr.Access) {
			if access&addr.Read == 0 {
				t.table.log.MarkRange(frames(w.gfn(r.Start), r.NPages()))
			}
		})
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

// fitLocked makes the slots of some frames what the policy has there. Where they are
// precise, that is what shows as much of the windows as the host has mapped, less the
// access that inv is about to take, unless it is nil. Slots elsewhere change only if
// they become one with these, or if all change between precise and coarse. With an
// error nothing has changed.
func (t *Tracker) fitLocked(windows index[Window], where []addr.GFNRange, inv *notifier.Invalidation, op uint64) error {
	have, all := t.Slots().slots, []addr.GFNRange{allGFNs}
	if t.policy == Lazy {
		return t.installLocked(derive(have, where, whole(windows, t.logDirty)), windows, op)
	}
	was := t.coarse.Load()
	if !was {
		u := derive(have, where, t.mapped(windows, inv, t.logDirty))
		if u.after(have) <= t.limit() {
			return t.slots.applyLocked(u, &windows, op)
		}
		where = all // there is no plan, and all slots become coarse
	}
	pieces := t.pieces
	if u := derive(pieces, where, t.mapped(windows, inv, false)); !was || t.slots.mutant != piecesStand {
		pieces = pieces.change(u.deletes, u.creates)
	}
	coarse := !was || t.scarce(pieces.byGFN.Len())
	var u update
	if coarse {
		u = derive(have, where, whole(windows, t.logDirty))
	} else {
		u = derive(have, all, t.mapped(windows, inv, t.logDirty))
		pieces = newIndex[Slot]()
	}
	t.coarse.Store(true) // before a guest can use a slot that is
	err := t.installLocked(u, windows, op)
	if coarse != was {
		t.recordCoarse(coarse, op, err)
	}
	if err != nil {
		t.coarse.Store(was)
		return err
	}
	t.pieces = pieces
	t.coarse.Store(coarse)
	return nil
}

// limit returns how many slots there can be.
func (t *Tracker) limit() int { return int(t.slots.numbers.limit) }

// scarce reports whether slots that are coarse stay so, if n would be precise. Half of
// the numbers are then free, so that it takes as many changes to run out of them again.
func (t *Tracker) scarce(n int) bool {
	switch t.slots.mutant {
	case coarseForGood:
		return true
	case fineAtOnce:
		return n > t.limit()
	}
	return n > t.limit()/2
}

// installLocked carries u out, if there are numbers enough.
func (t *Tracker) installLocked(u update, windows index[Window], op uint64) error {
	if n := u.after(t.Slots().slots); n > t.limit() {
		return fmt.Errorf("%d slots, of %d: %w", n, t.limit(), ErrSlotLimit)
	}
	return t.slots.applyLocked(u, &windows, op)
}

// recordCoarse records that the slots become coarse or precise, or why they do not.
func (t *Tracker) recordCoarse(coarse bool, op uint64, err error) {
	e := trace.Event{Kind: trace.SlotPolicy, Op: op, Name: "precise"}
	if coarse {
		e.Name = "coarse"
	}
	if err != nil {
		e.Err = err.Error()
	}
	t.slots.log.Record(e)
}

// shower appends to slots those that there are to be for the frames of r, in any order
// and in pieces of any size.
type shower func(slots []Slot, r addr.GFNRange) []Slot

// mapped returns the slots that are precise.
func (t *Tracker) mapped(windows index[Window], inv *notifier.Invalidation, logDirty bool) shower {
	return func(slots []Slot, r addr.GFNRange) []Slot {
		for w := range windows.inGFNs(r) {
			slots = t.backed(slots, *w, w.GFNs().Intersect(r), inv, logDirty)
		}
		return slots
	}
}

// whole returns the slots that are coarse.
func whole(windows index[Window], logDirty bool) shower {
	return func(slots []Slot, r addr.GFNRange) []Slot {
		for w := range windows.inGFNs(r) {
			s := Slot{GFN: w.GFN, NPages: w.NPages, HVA: w.HVA, Access: addr.ReadWrite, LogDirty: logDirty}
			slots = append(slots, s.cut(r))
		}
		return slots
	}
}

// derive returns what has to be done to the slots there are to make those of some
// frames what show has.
func derive(slots index[Slot], where []addr.GFNRange, show shower) (u update) {
	for _, r := range union(where) {
		var want []Slot
		around := addr.GFNRange{Start: r.Start - min(r.Start, 1), End: max(r.End+1, r.End)}
		have := slices.Collect(values(slots.inGFNs(around))) // and the neighbours
		for _, s := range have {
			for _, rest := range []addr.GFNRange{{Start: s.GFN, End: r.Start}, {Start: r.End, End: s.GFNs().End}} {
				if rest = rest.Intersect(s.GFNs()); !rest.Empty() {
					want = append(want, s.cut(rest))
				}
			}
		}
		want = show(want, r)
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
func (t *Tracker) backed(slots []Slot, w Window, r addr.GFNRange, inv *notifier.Invalidation, logDirty bool) []Slot {
	emit := func(r addr.HVARange, access addr.Access) {
		if !r.Empty() && access != addr.NoAccess {
			slots = append(slots, Slot{GFN: w.gfn(r.Start), NPages: r.NPages(), HVA: r.Start, Access: access, LogDirty: logDirty})
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
