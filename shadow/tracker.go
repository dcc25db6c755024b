// Package shadow keeps KVM's memory slots coherent with the host mappings that
// they are made of.
//
// A [Tracker] subscribes to the notifier of an address space. It knows the
// guest's RAM as [Window]s, frames with the host addresses they show, and
// derives from them and from what the host has mapped the set of slots that
// should be there. When a bracket opens it takes away what will no longer be
// backed; when it closes it makes the slots fit what is mapped then. The slots
// are installed through a [Backend], all changes of one step behind its gate,
// so that no vCPU runs while a slot is absent only for a moment.
//
// The package makes no system call.
//
// # Invariants
//
//   - The published set is what the backend has, also after a failure.
//   - Outside brackets every slot lies in a window and covers mapped memory that
//     allows what the slot allows.
//   - From the moment that InvalidateRangeStart for Unmap or Protect returned
//     nil, no slot allows an access that the change takes away.
//
// # Locks
//
// Package internal/lockorder has the order; Tracker.mu is a subscriber's lock.
// With it held the tracker waits for vCPUs to leave the guest, who take no lock
// of the order before they have left.
package shadow

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

// Backend is where slots are installed: KVM, or a model of it.
type Backend interface {
	// Hold returns when no vCPU is in the guest, and none enters it until
	// Release. Holds nest.
	Hold()
	Release()

	// CreateSlot and DeleteSlot are called while the backend is held. A slot
	// that is created overlaps no other one, and its number is free.
	CreateSlot(Slot) error
	DeleteSlot(Slot) error
}

// Host says what is mapped. Walk calls fn for runs of equal access that cover
// all of r, in order; it is called with the mapping lock held.
type Host interface {
	Walk(r addr.HVARange, fn func(r addr.HVARange, access addr.Access))
}

// Tracker makes the slots of one VM follow the mappings of its host memory.
type Tracker struct {
	notifier.Notifier

	host    Host       // immutable
	backend Backend    // immutable
	limit   uint32     // slot numbers are below it; immutable
	log     *trace.Log // immutable

	mu       sync.Mutex // lockorder.Consumer
	released bool       // no more slots; protected by mu
	used     []bool     // by slot number; protected by mu
	behind   bool       // the backend refused to widen slots; protected by mu

	// current is the set that the backend has. It is stored with mu held.
	current atomic.Pointer[Slots]

	// changed is closed and replaced when current is. Protected by mu.
	changed chan struct{}
}

// NewTracker returns a tracker without windows. It installs slots with numbers
// from 0 to below limit. The caller registers it with the notifier of the
// address space that host belongs to.
func NewTracker(host Host, backend Backend, limit uint32, log *trace.Log) *Tracker {
	t := &Tracker{host: host, backend: backend, limit: limit, log: log, changed: make(chan struct{})}
	t.current.Store(&Slots{generation: 1})
	return t
}

func (t *Tracker) lock() {
	lockorder.Acquire(lockorder.Consumer)
	t.mu.Lock()
}

func (t *Tracker) unlock() {
	t.mu.Unlock()
	lockorder.Release(lockorder.Consumer)
}

// Slots returns the current set.
func (t *Tracker) Slots() *Slots { return t.current.Load() }

// Changed returns a channel that is closed when the set is no longer the one
// that Slots returns after this call.
func (t *Tracker) Changed() <-chan struct{} {
	t.lock()
	defer t.unlock()
	return t.changed
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
	t.lock()
	defer t.unlock()
	if t.released {
		return fail(notifier.ErrExited)
	}
	old := t.current.Load()
	for _, o := range old.windows {
		if o.GFNs().Overlaps(w.GFNs()) {
			return fail(fmt.Errorf("it overlaps window %q, %v", o.Name, o.GFNs()))
		}
	}
	windows := append(slices.Clone(old.windows), w)
	slices.SortFunc(windows, compareWindows)
	if err := t.applyLocked(windows, t.deriveLocked(windows, nil), 0); err != nil {
		return fail(err)
	}
	return nil
}

// InvalidateRangeStart does before a change what policy says. If the backend
// refuses, the slots are as they were, and the error, which is for the report
// of whoever makes the change, says why: a guest that uses what has gone then
// leaves with EFAULT instead of an exit that names the address.
//
// A change that nobody may wait for leaves the mappings in place and takes their
// pages only. The backend follows that by itself, and vCPUs could not be waited
// for: nothing is done.
func (t *Tracker) InvalidateRangeStart(inv *notifier.Invalidation) error {
	if inv.NonBlockable {
		return nil
	}
	t.lock()
	defer t.unlock()
	react := policy[inv.Event]
	if react.hold {
		t.backend.Hold()
	}
	if !react.narrow || t.released {
		return nil
	}
	windows := t.current.Load().windows
	if err := t.applyLocked(windows, t.deriveLocked(windows, inv), inv.Op); err != nil {
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
	t.lock()
	defer t.unlock()
	react := policy[inv.Event]
	if react.hold {
		defer t.backend.Release()
	}
	if t.released || !react.settle && !t.behind {
		return
	}
	windows := t.current.Load().windows
	moved := react.follow && !inv.Failed
	if moved {
		// What the windows show is a fact, whether or not the slots can follow.
		windows = follow(windows, inv)
		t.publishLocked(windows, t.current.Load().slots)
	}
	err := t.applyLocked(windows, t.deriveLocked(windows, nil), inv.Op)
	t.behind = err != nil
	if err != nil && moved {
		// The slots that show the old addresses cannot stay: those are no
		// longer the guest's memory. To leave them out takes deletions only.
		var rest []Slot
		for s := range t.current.Load().All() {
			if !s.HVAs().Overlaps(inv.Range) {
				rest = append(rest, s)
			}
		}
		_ = t.applyLocked(windows, rest, inv.Op)
	}
}

// follow returns windows with everything that shows inv.Range showing the same
// number of bytes at inv.To.
func follow(windows []Window, inv *notifier.Invalidation) []Window {
	var out []Window
	for _, w := range windows {
		moved := w.HVAs().Intersect(inv.Range)
		if moved.Empty() {
			out = append(out, w)
			continue
		}
		part := func(r addr.HVARange, hva addr.HVA) {
			if !r.Empty() {
				out = append(out, Window{Name: w.Name, GFN: w.gfn(r.Start), NPages: r.NPages(), HVA: hva})
			}
		}
		part(addr.HVARange{Start: w.HVA, End: moved.Start}, w.HVA)
		part(moved, inv.To+(moved.Start-inv.Range.Start))
		part(addr.HVARange{Start: moved.End, End: w.HVAs().End}, moved.End)
	}
	return mergeWindows(out)
}

// mergeWindows joins neighbours that one window could stand for.
func mergeWindows(windows []Window) []Window {
	out := windows[:0:0]
	for _, w := range windows {
		if n := len(out); n > 0 && out[n-1].Name == w.Name && out[n-1].GFNs().End == w.GFN && out[n-1].HVAs().End == w.HVA {
			out[n-1].NPages += w.NPages
			continue
		}
		out = append(out, w)
	}
	return out
}

// Release takes all slots away. The backend may be gone or about to go, so what
// it says to that does not matter.
func (t *Tracker) Release() {
	t.lock()
	defer t.unlock()
	t.released = true
	_ = t.applyLocked(nil, nil, 0)
}

// noID is the number of a slot that has none yet.
const noID = ^uint32(0)

// deriveLocked returns the slots, without numbers, that show as much of the
// windows as the host has mapped. If inv is not nil, access that it will take
// from its range is gone already.
func (t *Tracker) deriveLocked(windows []Window, inv *notifier.Invalidation) []Slot {
	var slots []Slot
	for _, w := range windows {
		emit := func(r addr.HVARange, access addr.Access) {
			if r.Empty() || access == addr.NoAccess {
				return
			}
			s := Slot{ID: noID, GFN: w.gfn(r.Start), NPages: r.NPages(), HVA: r.Start, Access: access}
			if n := len(slots); n > 0 && slots[n-1].Access == access && slots[n-1].GFNs().End == s.GFN && slots[n-1].HVAs().End == s.HVA {
				slots[n-1].NPages += s.NPages
				return
			}
			slots = append(slots, s)
		}
		t.host.Walk(w.HVAs(), func(r addr.HVARange, access addr.Access) {
			if inv == nil || !r.Overlaps(inv.Range) {
				emit(r, access)
				return
			}
			in := r.Intersect(inv.Range)
			emit(addr.HVARange{Start: r.Start, End: in.Start}, access)
			emit(in, narrowed(inv, access))
			emit(addr.HVARange{Start: in.End, End: r.End}, access)
		})
	}
	return slots
}

// applyLocked makes want the slots of the backend, as one transaction behind its
// gate: what is no longer wanted is deleted first, then the rest is created. If
// a step fails the former slots are put back. The set that the backend ends up
// with is published.
func (t *Tracker) applyLocked(windows []Window, want []Slot, op uint64) error {
	old := t.current.Load()
	var deletes, creates []Slot
	for _, s := range old.slots {
		if i, ok := slices.BinarySearchFunc(want, s, compareSlots); !ok || !want[i].sameMapping(s) {
			deletes = append(deletes, s)
		}
	}
	for _, s := range want {
		if i, ok := slices.BinarySearchFunc(old.slots, s, compareSlots); !ok || !old.slots[i].sameMapping(s) {
			creates = append(creates, s)
		}
	}
	if len(deletes)+len(creates) == 0 {
		if !slices.Equal(windows, old.windows) {
			t.publishLocked(windows, old.slots)
		}
		return nil
	}

	t.backend.Hold()
	defer t.backend.Release()
	x := &transaction{t: t, op: op, slots: slices.Clone(old.slots)}
	err := x.step(deletes, creates)
	if err != nil && !t.released {
		created := slices.DeleteFunc(slices.Clone(x.slots), func(s Slot) bool { return slices.Contains(old.slots, s) })
		deleted := slices.DeleteFunc(deletes, func(s Slot) bool { return slices.Contains(x.slots, s) })
		if undoErr := x.step(created, deleted); undoErr != nil {
			err = errors.Join(err, fmt.Errorf("and the former slots could not be put back: %w", undoErr))
		}
		windows = old.windows
	}
	if t.released {
		x.slots = nil
	}
	slices.SortFunc(x.slots, compareSlots)
	t.publishLocked(windows, x.slots)
	return err
}

// transaction is a sequence of slot changes; slots is what the backend has.
type transaction struct {
	t     *Tracker
	op    uint64
	slots []Slot
}

// step deletes and creates slots until all is done or one is refused.
func (x *transaction) step(deletes, creates []Slot) error {
	for _, s := range deletes {
		err := x.t.backend.DeleteSlot(s)
		x.record(trace.SlotDelete, s, err)
		if err != nil {
			return fmt.Errorf("delete %v: %w", s, err)
		}
		x.t.used[s.ID] = false
		x.slots = slices.DeleteFunc(x.slots, func(o Slot) bool { return o == s })
	}
	for _, s := range creates {
		if err := x.t.numberLocked(&s); err != nil {
			return fmt.Errorf("create %v: %w", s, err)
		}
		err := x.t.backend.CreateSlot(s)
		x.record(trace.SlotCreate, s, err)
		if err != nil {
			x.t.used[s.ID] = false
			return fmt.Errorf("create %v: %w", s, err)
		}
		x.slots = append(x.slots, s)
	}
	return nil
}

func (x *transaction) record(kind trace.Kind, s Slot, err error) {
	e := trace.Event{Kind: kind, Op: x.op, Slot: s.ID, GFN: s.GFNs(), HVA: s.HVAs(), Acc: s.Access}
	if err != nil {
		e.Err = err.Error()
	}
	x.t.log.Record(e)
}

// ErrNoSlot is returned where a VM has no slot number left.
var ErrNoSlot = errors.New("all memory slots are in use; change mappings in larger pieces")

// numberLocked gives s a free slot number: the one it has, if that is free, so
// that a slot that is put back keeps it, or else the lowest.
func (t *Tracker) numberLocked(s *Slot) error {
	if s.ID == noID || t.used[s.ID] {
		i := slices.Index(t.used, false)
		if i < 0 && uint64(len(t.used)) >= uint64(t.limit) {
			return fmt.Errorf("slot limit of %d: %w", t.limit, ErrNoSlot)
		}
		if i < 0 {
			i = len(t.used)
			t.used = append(t.used, false)
		}
		s.ID = uint32(i)
	}
	t.used[s.ID] = true
	return nil
}

func (t *Tracker) publishLocked(windows []Window, slots []Slot) {
	t.current.Store(&Slots{generation: t.current.Load().generation + 1, windows: windows, slots: slots})
	close(t.changed)
	t.changed = make(chan struct{})
}
