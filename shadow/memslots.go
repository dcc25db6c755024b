package shadow

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/trace"
)

// Backend is where slots are installed: KVM, or a model of it.
type Backend interface {
	// Hold returns when no vCPU is in the guest, and none enters it until
	// Release. Holds nest.
	Hold()
	Release()

	// CreateSlot, DeleteSlot and ChangeSlot are called while the backend is held.
	// A slot that is created overlaps no other one, and its number is free. One
	// that is changed keeps its number, its host addresses and its access, and
	// shows them at other frames, or is logged or not.
	CreateSlot(Slot) error
	DeleteSlot(Slot) error
	ChangeSlot(from, to Slot) error

	// DirtyLog adds to written those frames of slots, all of them logged, that the
	// guest has written since the last call for the slot, or since the slot was
	// created or logged. It may add more; with an error all of them count as written.
	// What is written from then on is for the next call. The backend need not be
	// held, except before a slot goes.
	DirtyLog(slots []Slot, written *dirty.Set) error
}

// Memslots is the memory slots of a VM: what KVM keeps in struct kvm_memslots and
// changes in kvm_set_memory_region. They are looked up without a lock, in a set
// that does not change, and are changed by transactions: either all of one is
// done, or the backend and the set are what they were. Each transaction runs
// behind the backend's gate, deletions first, so that no vCPU sees what is
// between a deletion and a creation.
//
// A [Tracker] has its own, which it derives from what is mapped. By itself,
// Memslots is for those who manage slots by hand, as with the ioctl.
type Memslots struct {
	backend Backend    // immutable
	log     *trace.Log // immutable
	table   *Table     // has translations made from the slots; set before the first of them

	mu        sync.Mutex // lockorder.Consumer; protects what follows
	numbers   numbers
	installed map[uint32]Slot // what the backend has, by number

	// current is the set that the backend has, or is about to leave if it is
	// Updating. It is stored with mu held.
	current atomic.Pointer[Slots]
	mutant  mutant // a defect, in tests of the tests; none otherwise
}

// NewMemslots returns no slots. Their numbers will be below limit.
func NewMemslots(backend Backend, limit uint32, log *trace.Log) *Memslots {
	m := &Memslots{
		backend: backend, log: log, numbers: numbers{limit: limit},
		installed: make(map[uint32]Slot),
	}
	m.current.Store(&Slots{generation: 1, slots: newIndex[Slot](), windows: newIndex[Window](), changed: make(chan struct{})})
	return m
}

func (m *Memslots) lock() {
	lockorder.Acquire(lockorder.Consumer)
	m.mu.Lock()
}

func (m *Memslots) unlock() {
	m.mu.Unlock()
	lockorder.Release(lockorder.Consumer)
}

// Slots returns the current set.
func (m *Memslots) Slots() *Slots { return m.current.Load() }

// SlotError is a request for a slot that was refused. Nothing has changed, unless
// Err says that it could not be undone.
type SlotError struct {
	Op   string // "create", "delete", "move", "log" or "set", if it is none of them
	Slot Slot
	Err  error // EINVAL or EEXIST, as of KVM, ErrSlotLimit, or what the backend said
}

func (e *SlotError) Error() string { return fmt.Sprintf("%s %v: %v", e.Op, e.Slot, e.Err) }
func (e *SlotError) Unwrap() error { return e.Err }

// ErrSlotLimit is returned where a VM has no slot number left. It is ENOSPC for
// errors.Is.
var ErrSlotLimit error = &errnoError{"all memory slots are in use; change mappings in larger pieces", syscall.ENOSPC}

var (
	errShape   error = &errnoError{"it is not page aligned, wraps, or allows neither reading nor reading and writing", syscall.EINVAL}
	errTooHigh error = &errnoError{"guest addresses have 52 bits", syscall.EINVAL}
	errNumber  error = &errnoError{"the number is not below the limit", syscall.EINVAL}
	errMissing error = &errnoError{"there is no slot of that number to delete", syscall.EINVAL}
	errRebuild error = &errnoError{"host addresses, size and access of a slot do not change: delete it and create another", syscall.EINVAL}
	errOverlap error = &errnoError{"another slot has some of the frames", syscall.EEXIST}
)

// errnoError is an error of this package that is also an errno.
type errnoError struct {
	text  string
	errno syscall.Errno
}

func (e *errnoError) Error() string { return e.text }
func (e *errnoError) Unwrap() error { return e.errno }

// Set makes s what slot s.ID is, by the rules of KVM_SET_USER_MEMORY_REGION:
//
//	s                                     the slot is
//	no pages, and there is the slot       deleted
//	no pages, and there is none           EINVAL
//	a new number                          created
//	other frames, all else the same       moved
//	only LogDirty is different            logged, or no more
//	the same                              left alone
//	another HVA, size or Access           EINVAL
//	misaligned, wraps, number too large   EINVAL
//	frames above 52 bits of address       EINVAL
//	frames of another slot                EEXIST
//
// It blocks until vCPUs have left the guest, and until whoever uses a page of the
// slot through the [Table] is done with it. Errors are of type *SlotError.
func (m *Memslots) Set(s Slot) error {
	m.lock()
	defer m.unlock()
	op, u, err := m.requestLocked(s)
	if err == nil && op != "" {
		err = m.applyLocked(u, nil, 0)
	}
	if err != nil {
		return &SlotError{cmp.Or(op, "set"), s, err}
	}
	return nil
}

// requestLocked returns what Set has to do for s, and what that is called.
func (m *Memslots) requestLocked(s Slot) (op string, u update, err error) {
	old, exists := m.installed[s.ID]
	switch {
	case s.ID >= m.numbers.limit:
		return "", u, errNumber
	case s.NPages == 0 && exists:
		return "delete", update{deletes: []Slot{old}}, nil
	case s.NPages == 0:
		return "delete", u, errMissing
	case s.HVA&addr.PageMask != 0 || s.HVAs().NPages() != s.NPages || s.GFNs().NPages() != s.NPages,
		s.Access != addr.Read && s.Access != addr.ReadWrite:
		return "", u, errShape
	case s.GFNs().End > maxGFN+1:
		return "", u, errTooHigh
	case !exists:
		op, u.creates = "create", []Slot{s}
	case s == old:
		return "", u, nil
	case s.HVA != old.HVA || s.NPages != old.NPages || s.Access != old.Access:
		return "", u, errRebuild
	case s.GFN != old.GFN:
		op, u.changes = "move", []move{{old, s}}
	default:
		return "log", update{changes: []move{{old, s}}}, nil
	}
	for o := range m.current.Load().InGFNs(s.GFNs()) {
		if o.ID != s.ID {
			return op, update{}, fmt.Errorf("%v: %w", o, errOverlap)
		}
	}
	return op, u, nil
}

// update is what one transaction does, in this order.
type update struct {
	deletes []Slot
	changes []move
	creates []Slot // in the order of their frames; one with noID is given a number
}

// after returns how many slots there are once u has been done to those there are.
func (u *update) after(slots index[Slot]) int {
	return slots.byGFN.Len() - len(u.deletes) + len(u.creates)
}

// move is a slot that is changed without being deleted.
type move struct{ from, to Slot }

// noID is the number of a slot that has none yet.
const noID = ^uint32(0)

// applyLocked carries u out as one transaction, and makes windows what is
// published with it unless it is nil. If a step fails what was done is undone.
// The set that the backend ends up with is published.
//
// While it runs the set says Updating, and no translation is made from it; those
// that it leaves without a slot are gone before the first step. So whoever looks
// one up in the middle waits for the end, and finds neither a slot that is going
// nor none where there will be one.
func (m *Memslots) applyLocked(u update, windows *index[Window], op uint64) error {
	old := m.current.Load()
	if windows == nil {
		windows = &old.windows
	}
	if len(u.deletes)+len(u.changes)+len(u.creates) == 0 {
		if *windows != old.windows {
			m.publishLocked(old.slots, *windows)
		}
		return nil
	}
	m.beginUpdate(old, u)
	m.hold(op)
	defer m.release(op)
	if m.mutant != collectAfterwards {
		m.collectLocked(u.unlogged())
	}
	x := &transaction{m: m, op: op}
	err := x.do(u)
	if m.mutant == collectAfterwards {
		m.collectLocked(u.unlogged())
	}
	if err != nil {
		if undoErr := x.undo(); undoErr != nil {
			err = errors.Join(err, fmt.Errorf("and the former slots could not be put back: %w", undoErr))
		}
		windows = &old.windows
	}
	if m.mutant == publishIntended {
		x.removed, x.added = u.deletes, u.creates
	}
	m.publishLocked(old.slots.change(x.removed, x.added), *windows)
	return err
}

// unlogged returns the slots whose logs the update throws away. The log of one that
// moves would stay, and be of other frames.
func (u *update) unlogged() []Slot {
	slots := slices.Clone(u.deletes)
	for _, c := range u.changes {
		slots = append(slots, c.from)
	}
	return slots
}

// collectLocked merges what the guest has written to those of slots that are logged
// into the log of the table. If the backend does not tell, all of
// them is taken to be written.
func (m *Memslots) collectLocked(slots []Slot) {
	if m.table == nil {
		return
	}
	var logged []Slot
	for _, s := range slots {
		if s.LogDirty {
			logged = append(logged, s)
		}
	}
	if logged == nil {
		return
	}
	var set dirty.Set
	if err := m.backend.DirtyLog(logged, &set); err != nil && m.mutant != collectAfterwards {
		for _, s := range logged {
			set.AddRange(s.GFNs())
		}
	}
	m.addAliases(logged, &set)
	m.table.log.Merge(&set)
}

// addAliases adds to written, which a backend has told of some slots, the other frames that
// show the same pages: a log is one of frames, and a page is written at one of them.
func (m *Memslots) addAliases(slots []Slot, written *dirty.Set) {
	set := m.Slots()
	var others []addr.GFNRange
	for _, s := range slots {
		if m.mutant == aliasUnlogged || !isAliased(set, s.HVAs()) {
			continue
		}
		for r := range written.RunsIn(s.GFNs()) {
			hvas := addr.HVAs(s.hva(r.Start), r.NPages()<<addr.PageShift)
			for o := range set.InHVAs(hvas) {
				both := o.HVAs().Intersect(hvas)
				others = append(others, frames(o.gfn(both.Start), both.NPages()))
			}
		}
	}
	for _, r := range others {
		written.AddRange(r)
	}
}

// beginUpdate takes away the translations that will not be backed as they are.
func (m *Memslots) beginUpdate(old *Slots, u update) {
	if m.mutant != updateUnmarked {
		m.current.Store(&Slots{generation: old.generation, updating: true, slots: old.slots, windows: old.windows, changed: old.changed})
	}
	if m.table == nil || m.mutant == deleteWithoutZap {
		return
	}
	var zap []addr.GFNRange
	deletes, creates := slices.Clone(u.deletes), slices.Clone(u.creates)
	for _, c := range u.changes {
		deletes, creates = append(deletes, c.from), append(creates, c.to)
	}
	slices.SortFunc(deletes, compareSlots)
	slices.SortFunc(creates, compareSlots)
	for _, s := range deletes {
		zap = append(zap, uncovered(s, creates)...)
	}
	for _, s := range creates {
		for _, r := range uncovered(s, deletes) {
			// Pages that were shown elsewhere already are shown at several
			// frames from now on, which their translations say.
			for o := range old.InHVAs(s.cut(r).HVAs()) {
				both := o.HVAs().Intersect(s.cut(r).HVAs())
				zap = append(zap, frames(o.gfn(both.Start), both.NPages()))
			}
		}
	}
	m.table.zapFrames(zap)
}

// uncovered returns the frames of s that none of the slots in by, which are in
// the order of their frames, backs in the same way.
func uncovered(s Slot, by []Slot) (rest []addr.GFNRange) {
	at := s.GFN
	i, _ := slices.BinarySearchFunc(by, at, func(o Slot, gfn addr.GFN) int { return cmp.Compare(o.GFNs().End-1, gfn) })
	for ; i < len(by) && by[i].GFN < s.GFNs().End; i++ {
		if o := by[i]; o.sameBacking(s) {
			if at < o.GFN {
				rest = append(rest, addr.GFNRange{Start: at, End: o.GFN})
			}
			at = o.GFNs().End
		}
	}
	if at < s.GFNs().End {
		rest = append(rest, addr.GFNRange{Start: at, End: s.GFNs().End})
	}
	return rest
}

func (m *Memslots) publishLocked(slots index[Slot], windows index[Window]) {
	old := m.current.Load()
	generation := old.generation + 1
	if m.mutant == generationStays {
		generation--
	}
	m.current.Store(&Slots{generation: generation, slots: slots, windows: windows, changed: make(chan struct{})})
	close(old.changed)
}

// clearLocked deletes all slots, and publishes that there are none whatever the
// backend says to that.
func (m *Memslots) clearLocked() {
	u := update{deletes: slices.Collect(m.current.Load().All())}
	m.beginUpdate(m.current.Load(), u)
	m.hold(0)
	defer m.release(0)
	m.collectLocked(u.deletes)
	for _, s := range u.deletes {
		_ = (&transaction{m: m}).delete(s)
	}
	clear(m.installed)
	m.publishLocked(newIndex[Slot](), newIndex[Window]())
}

// hold and release hold the backend for an operation of the trace, or for none if it is 0.
func (m *Memslots) hold(op uint64) {
	m.backend.Hold()
	m.log.Record(trace.Event{Kind: trace.Hold, Op: op, Name: "slots"})
}

func (m *Memslots) release(op uint64) {
	m.log.Record(trace.Event{Kind: trace.Release, Op: op, Name: "slots"})
	m.backend.Release()
}

func compareSlots(a, b Slot) int { return cmp.Compare(a.GFN, b.GFN) }

// transaction is the steps of an update that were done, and what they come to.
type transaction struct {
	m              *Memslots
	op             uint64
	undos          []func() error // of the steps, in their order
	removed, added []Slot         // from and to what there was at first
}

// do does all steps, or those before the first that fails.
func (x *transaction) do(u update) error {
	create := func() error {
		for _, s := range u.creates {
			if err := x.m.numberLocked(&s); err != nil {
				return fmt.Errorf("create %v: %w", s, err)
			}
			if err := x.create(s); err != nil {
				return err
			}
			x.undos = append(x.undos, func() error { return x.delete(s) })
		}
		return nil
	}
	if x.m.mutant == createFirst {
		if err := create(); err != nil {
			return err
		}
		u.creates = nil
	}
	for _, s := range u.deletes {
		if err := x.delete(s); err != nil {
			return err
		}
		x.undos = append(x.undos, func() error {
			x.m.numbers.takeThis(s.ID) // whoever took it meanwhile has been undone before
			return x.create(s)
		})
	}
	for _, c := range u.changes {
		if err := x.change(c); err != nil {
			return err
		}
		x.undos = append(x.undos, func() error { return x.change(move{c.to, c.from}) })
	}
	return create()
}

// undo undoes the steps that were done, the last one first, up to one that fails.
func (x *transaction) undo() error {
	if x.m.mutant == undoNothing {
		return nil
	}
	for _, undo := range slices.Backward(x.undos) {
		if err := undo(); err != nil {
			return err
		}
	}
	return nil
}

// numberLocked gives s a number, if it has none, or takes the one that it has.
func (m *Memslots) numberLocked(s *Slot) error {
	ok := true
	if s.ID == noID {
		s.ID, ok = m.numbers.take()
	} else {
		ok = m.numbers.takeThis(s.ID)
	}
	if !ok {
		s.ID = noID
		return fmt.Errorf("slot limit of %d: %w", m.numbers.limit, ErrSlotLimit)
	}
	return nil
}

// create creates s, whose number has been taken, and gives that back on failure.
func (x *transaction) create(s Slot) error {
	err := x.m.backend.CreateSlot(s)
	x.record(trace.SlotCreate, s, err)
	if err != nil {
		x.m.numbers.give(s.ID)
		return fmt.Errorf("create %v: %w", s, err)
	}
	x.put(s)
	return nil
}

func (x *transaction) delete(s Slot) error {
	err := x.m.backend.DeleteSlot(s)
	x.record(trace.SlotDelete, s, err)
	if err != nil {
		return fmt.Errorf("delete %v: %w", s, err)
	}
	if x.m.mutant != numbersLeak {
		x.m.numbers.give(s.ID)
	}
	x.cut(s)
	return nil
}

func (x *transaction) change(c move) error {
	err := x.m.backend.ChangeSlot(c.from, c.to)
	x.record(trace.SlotDelete, c.from, err)
	x.record(trace.SlotCreate, c.to, err)
	if err != nil {
		return fmt.Errorf("change %v to %v: %w", c.from, c.to, err)
	}
	x.cut(c.from)
	x.put(c.to)
	return nil
}

// put and cut count a slot that the backend has, and has no more.
func (x *transaction) put(s Slot) {
	x.m.installed[s.ID] = s
	if i := slices.Index(x.removed, s); i >= 0 {
		x.removed = slices.Delete(x.removed, i, i+1)
	} else {
		x.added = append(x.added, s)
	}
}

func (x *transaction) cut(s Slot) {
	delete(x.m.installed, s.ID)
	if i := slices.Index(x.added, s); i >= 0 {
		x.added = slices.Delete(x.added, i, i+1)
	} else {
		x.removed = append(x.removed, s)
	}
}

func (x *transaction) record(kind trace.Kind, s Slot, err error) {
	e := trace.Event{Kind: kind, Op: x.op, Slot: s.ID, GFN: s.GFNs(), HVA: s.HVAs(), Acc: s.Access}
	if err != nil {
		e.Err = err.Error()
	}
	x.m.log.Record(e)
}
