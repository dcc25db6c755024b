package hmm

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/notifier"
)

// Range is one look at a part of the page tables by a driver that has a [Mirror]:
// Linux's struct hmm_range until 5.4. The driver sets the exported fields, which do
// not change from Begin to Done. A range is used by one goroutine at a time; two that
// use it at once are a mistake that panics where it is seen.
type Range struct {
	Range  addr.HVARange
	Tables PageTables

	// Entries has an element for each page. What is asked of it is Default, and
	// of the element those bits that Mask has.
	Entries       []Entry
	Default, Mask Entry

	// Order makes an entry, and the pages that Range is aligned to, 2^Order base
	// pages long. All of the range must then be mapped with pages of that size.
	Order uint8

	Owner any // whose device memory is not foreign

	h        *HMM        // the reference; nil while not begun
	busy     atomic.Bool // somebody is in a method
	filled   bool        // Snapshot or Fault has succeeded last
	taken    uint64      // what hits was when that began
	wanted   []Entry     // what was asked, for Populate
	walk     walk
	hits     uint64 // changes that have begun; protected by the lock of h, as is changing
	changing bool   // one of those that are under way may be of this range
}

// enter begins a method.
func (r *Range) enter(method string) {
	if !r.busy.CompareAndSwap(false, true) {
		panic("hmm: " + method + " of a Range that another goroutine is using")
	}
}

func (r *Range) leave() { r.busy.Store(false) }

// Begin links the range with the HMM of the address space, so that changes are known
// to it. With an error there is nothing to give back; otherwise Done is called later.
//
// The error is EINVAL if the range is empty or not aligned, Entries is not of its
// length, or the range has begun already; EFAULT if the address space has exited or
// has no mirror. Begin makes no HMM: it may be called with the mapping lock held for
// reading, and that takes it for writing.
func (r *Range) Begin(as *notifier.AddressSpace) error { return hmms.begin(r, as) }

func (reg *registry) begin(r *Range, as *notifier.AddressSpace) error {
	r.enter("Begin")
	defer r.leave()
	if why := r.malformed(); why != "" {
		return r.fail("begin", syscall.EINVAL, why, nil)
	}
	h := reg.lookup(as, byRange)
	if h == nil {
		return r.fail("begin", syscall.EFAULT, "the address space has no mirror", nil)
	}
	if !h.begin(r) {
		if reg.mutant != beginKeeps {
			h.put(byRange)
		}
		return r.fail("begin", syscall.EFAULT, exited, nil)
	}
	r.h, r.filled = h, false
	if reg.mutant == beginDrops {
		h.put(byRange)
	}
	return nil
}

const exited = "the address space has exited"

// begin links r, unless the address space has exited. Brackets that are open may be of
// its pages.
func (h *HMM) begin(r *Range) bool {
	h.lock()
	defer h.unlock()
	if h.dead {
		return false
	}
	h.ranges[r] = struct{}{}
	r.changing = h.active > 0
	return true
}

// malformed returns what is wrong with the fields, or "".
func (r *Range) malformed() string {
	if r.h != nil {
		return "the range has begun already"
	}
	return malformed(r.Range, r.Entries, r.Order)
}

// malformed returns what is wrong with a range of pages of an order, or "".
func malformed(r addr.HVARange, entries []Entry, order uint8) string {
	shift := uint(addr.PageShift + order)
	switch {
	case r.Empty():
		return "the range is empty"
	case uint64(r.Start|r.End)&(1<<shift-1) != 0:
		return "the range is not aligned to its pages"
	case uint64(len(entries)) != r.Bytes()>>shift:
		return "there is not one entry for each page"
	}
	return ""
}

func (r *Range) fail(op string, errno syscall.Errno, why string, err error) *Error {
	return &Error{Op: op, Range: r.Range, At: r.Range.Start, Why: why, Errno: errno, Err: err}
}

// WaitValid waits until no change of the range is under way, the address space exits,
// or ctx is done, and reports whether the first of these is so. It is called with no
// lock held that a driver's Sync takes, and in no bracket.
func (r *Range) WaitValid(ctx context.Context) bool {
	r.enter("WaitValid")
	defer r.leave()
	if r.h == nil {
		return false
	}
	lockorder.Wait(lockorder.Section)
	return r.wait(ctx)
}

func (r *Range) wait(ctx context.Context) bool {
	for {
		valid, dead, changed := r.state()
		if valid || dead {
			return valid
		}
		r.h.reg.at("waiting", r.h)
		select {
		case <-changed:
		case <-ctx.Done():
			valid, _, _ = r.state()
			return valid
		}
	}
}

// state reports whether no change is under way, whether the address space has exited,
// and what is closed when either may have come true.
func (r *Range) state() (valid, dead bool, changed <-chan struct{}) {
	h := r.h
	h.lock()
	defer h.unlock()
	return !r.changing && !h.dead, h.dead, h.changed
}

// Snapshot writes to Entries what the page tables are, without faulting anything in,
// and returns the number of entries. The caller is a user of the address space and
// holds the mapping lock for reading. What was asked does not matter.
//
// For the errors see the package comment. The range stays begun; after EAGAIN the
// caller goes back to WaitValid.
func (r *Range) Snapshot() (n int, err error) {
	r.enter("Snapshot")
	defer r.leave()
	return r.look("snapshot", true, false)
}

// Fault is Snapshot, but makes present what is asked for and is not. It may sleep. With
// nonblocking it does not wait for content to be brought in: where it would have to, the
// error is EAGAIN and has Unlocked set, and the caller does not hold the mapping lock any
// more. For another try what is asked is written to Entries again.
func (r *Range) Fault(nonblocking bool) (n int, err error) {
	r.enter("Fault")
	defer r.leave()
	return r.look("fault", false, nonblocking)
}

func (r *Range) look(op string, report, nonblocking bool) (int, error) {
	if r.h == nil {
		return 0, r.fail(op, syscall.EINVAL, "the range has not begun", nil)
	}
	h := r.h
	h.held(op)
	r.filled = false
	h.lock()
	dead := h.dead
	r.taken = r.hits
	h.unlock()
	if dead {
		return 0, r.fail(op, syscall.EFAULT, exited, nil)
	}
	w := &r.walk
	w.walkOf = walkOf{
		op: op, r: r.Range, shift: uint(addr.PageShift + r.Order), tables: r.Tables, entries: r.Entries,
		def: r.Default, mask: r.Mask, owner: r.Owner,
		list: true, report: report, nonblocking: nonblocking, look: r, mutant: h.reg.mutant,
	}
	if err := w.run(); err != nil {
		if err.Unlocked {
			h.as.RUnlock()
			if h.reg.mutant == unlockTwice {
				h.as.RUnlock()
			}
		}
		return 0, err
	}
	r.filled = true
	return len(r.Entries), nil
}

// stale reports whether a change has begun since the walk, or was under way then.
func (r *Range) stale() bool {
	r.h.lock()
	defer r.h.unlock()
	return r.staleLocked()
}

func (r *Range) staleLocked() bool {
	if r.h.reg.mutant == levelFlag {
		return r.changing || r.h.dead
	}
	return r.changing || r.h.dead || r.hits != r.taken
}

// Valid reports whether what the last Snapshot or Fault found still stands, if it
// succeeded. That is certain only with the lock held that the driver's Sync takes,
// until that is given back.
func (r *Range) Valid() bool {
	r.enter("Valid")
	defer r.leave()
	return r.h != nil && r.filled && !r.stale()
}

// Done ends the range, gives its reference back, and reports what Valid would have. Of
// a range that has not begun, or has been done, it does nothing.
func (r *Range) Done() bool {
	r.enter("Done")
	defer r.leave()
	h := r.h
	if h == nil {
		return false
	}
	h.held("Done")
	h.lock()
	delete(h.ranges, r)
	valid := r.filled && !r.staleLocked()
	h.unlock()
	if h.reg.mutant != doneTwice {
		r.h = nil
	}
	switch h.reg.mutant {
	case doneKeeps:
	case doneByAddressSpace:
		if found := h.reg.lookup(h.as, byRange); found != nil {
			found.put(byRange)
		}
	default:
		h.put(byRange)
	}
	return valid
}

// Populate does the whole of it: it begins the range, looks at the page tables, faulting
// in what is asked, as often as they change meanwhile, calls install with the entries
// while lock is held, which is the one that the driver's Sync takes, and ends the range.
// It is called with no lock of the order held.
//
// The error is that of install, or an *Error: EBUSY if ctx was done before the page
// tables stood still for long enough; others as of Begin and Fault. It bounds how often
// a look is tried again, not how long one takes.
func (r *Range) Populate(ctx context.Context, as *notifier.AddressSpace, lock sync.Locker, install func([]Entry) error) error {
	return hmms.populate(ctx, r, as, lock, install)
}

func (reg *registry) populate(ctx context.Context, r *Range, as *notifier.AddressSpace, lock sync.Locker, install func([]Entry) error) (err error) {
	if !as.TryGetUser() {
		return r.fail("populate", syscall.EFAULT, exited, nil)
	}
	defer func() { err = join(err, as.PutUser()) }()
	if err := reg.begin(r, as); err != nil {
		return err
	}
	defer r.Done()
	r.wanted = append(r.wanted[:0], r.Entries...)
	for {
		if !r.WaitValid(ctx) { // the address space does not exit: this is one of its users
			return r.fail("populate", syscall.EBUSY, outOfTime, ctx.Err())
		}
		copy(r.Entries, r.wanted)
		as.RLock()
		_, err := r.Fault(false)
		as.RUnlock()
		switch {
		case err == nil:
			if done, err := installIf(r.Valid, lock, func() error { return install(r.Entries) }); done {
				return err
			}
		case !errors.Is(err, syscall.EAGAIN):
			if reg.mutant == doneOnError {
				h := r.h
				r.Done()
				h.put(byRange)
			}
			return err
		}
		if ctx.Err() != nil {
			return r.fail("populate", syscall.EBUSY, outOfTime, ctx.Err())
		}
	}
}

const outOfTime = "it has kept changing until there was no time left"

// installIf calls install with the lock held if valid reports true then.
func installIf(valid func() bool, lock sync.Locker, install func() error) (done bool, err error) {
	lock.Lock()
	defer lock.Unlock()
	if !valid() {
		return false, nil
	}
	return true, install()
}

// join is errors.Join, but leaves a single error as it is.
func join(err, other error) error {
	switch {
	case other == nil:
		return err
	case err == nil:
		return other
	}
	return errors.Join(err, other)
}
