package hmm

import (
	"context"
	"errors"
	"sync"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// Sequence tells whether a range has changed. A [notifier.Interval] does, and so does
// a driver that embeds one; see there for what the methods promise.
type Sequence interface {
	ReadBegin() uint64
	ReadRetry(seq uint64) bool
	CheckRetry(seq uint64) bool
}

// Request is one look at a part of the page tables by a driver with an interval of its
// own that covers the part: Linux's struct hmm_range since 5.5. A request is used by one
// goroutine at a time.
type Request struct {
	Range        addr.HVARange
	Tables       PageTables
	AddressSpace *notifier.AddressSpace
	Interval     Sequence
	Seq          uint64 // what ReadBegin has returned before the look

	// Entries has an element for each page. What is asked of it is Default, and
	// of the element those bits that Mask has.
	Entries       []Entry
	Default, Mask Entry

	Owner any // whose device memory is not foreign

	// DropLock has Populate use RangeFaultUnlocked.
	DropLock bool

	wanted []Entry // what was asked, for Populate
	walk   walk
	mutant mutant            // a defect, in tests of the tests; none otherwise
	step   func(name string) // called at each step of Populate, in tests
}

func (q *Request) at(step string) {
	if q.step != nil {
		q.step(step)
	}
}

func (q *Request) stale() bool { return q.Interval.CheckRetry(q.Seq) }

func (q *Request) fail(op string, errno syscall.Errno, why string, err error) *Error {
	return &Error{Op: op, Range: q.Range, At: q.Range.Start, Why: why, Errno: errno, Err: err}
}

// RangeFault writes to q.Entries what the page tables are, and makes present first what
// is asked for and is not. The caller is a user of the address space, has called
// ReadBegin for q.Seq, and holds the mapping lock for reading. It may sleep. It is
// Linux's hmm_range_fault.
//
// With nil the entries may be installed, with the lock of the driver held, if ReadRetry
// of q.Seq reports false then. EBUSY says that it need not be asked: all entries are of
// no use, and the next try begins with ReadBegin and with what is asked written to
// q.Entries again. Other errors are EFAULT if something that is asked for cannot be had,
// or the address space has exited; EPERM if it would have to be writable; EINVAL, and
// the entries are as they were, if the range is empty or not aligned, or q.Entries is not
// of its length; ENOMEM; and what Tables.Walk has returned.
func RangeFault(q *Request) error { return q.fault(nil) }

// RangeFaultUnlocked is ReadBegin and RangeFault for a caller who does not hold the
// mapping lock. It takes it, and gives it back where a fault has to wait for somebody who
// may need it, as in memory that a userfaultfd handler fills. It sets q.Seq, so that is
// what is to be compared, and not what was in it before.
//
// What was found before the lock was given back may have changed by the time it is had
// again. Then the error is EBUSY.
func RangeFaultUnlocked(q *Request) error {
	q.Seq = q.Interval.ReadBegin()
	q.AddressSpace.RLock()
	defer q.AddressSpace.RUnlock()
	return q.fault(q.AddressSpace)
}

// fault is RangeFault. If droppable is not nil its mapping lock may be given back
// meanwhile.
func (q *Request) fault(droppable *notifier.AddressSpace) error {
	if why := malformed(q.Range, q.Entries, 0); why != "" {
		return q.fail("fault", syscall.EINVAL, why, nil)
	}
	if q.AddressSpace.Stats().Users == 0 {
		return q.fail("fault", syscall.EFAULT, exited, nil)
	}
	w := &q.walk
	w.walkOf = walkOf{
		op: "fault", r: q.Range, shift: addr.PageShift, tables: q.Tables, entries: q.Entries,
		def: q.Default, mask: q.Mask, owner: q.Owner,
		nonblocking: droppable != nil, droppable: droppable, look: q, mutant: q.mutant,
	}
	if err := w.run(); err != nil {
		return err
	}
	return nil
}

// Populate looks at the page tables, faulting in what is asked, as often as they change
// meanwhile, and calls install with the entries while lock is held, which is the one that
// the driver's Invalidate takes. It is called with no lock of the order held, by somebody
// who need not be a user of the address space.
//
// The error is that of install, or as of RangeFault; EBUSY then means that ctx was done
// before the page tables stood still for long enough. It bounds how often a look is tried
// again, not how long one takes. If the address space has lost its other users meanwhile
// it exits here, and the error of that is returned too.
func (q *Request) Populate(ctx context.Context, lock sync.Locker, install func([]Entry) error) (err error) {
	if !q.AddressSpace.TryGetUser() {
		return q.fail("populate", syscall.EFAULT, exited, nil)
	}
	defer func() { err = join(err, q.AddressSpace.PutUser()) }()
	q.wanted = append(q.wanted[:0], q.Entries...)
	for {
		if q.mutant != notRefilled {
			copy(q.Entries, q.wanted)
		}
		err := q.try()
		switch {
		case err == nil:
			if done, err := q.install(lock, install); done {
				return err
			}
		case !errors.Is(err, syscall.EBUSY):
			return err
		}
		if err := ctx.Err(); err != nil {
			return q.fail("populate", syscall.EBUSY, outOfTime, err)
		}
	}
}

// try is one look.
func (q *Request) try() error {
	if q.DropLock {
		return RangeFaultUnlocked(q)
	}
	q.at("begin")
	q.Seq = q.Interval.ReadBegin()
	q.at("begun")
	q.AddressSpace.RLock()
	q.at("locked")
	err := RangeFault(q)
	q.at("looked")
	q.AddressSpace.RUnlock()
	q.at("unlocked")
	return err
}

func (q *Request) install(lock sync.Locker, install func([]Entry) error) (done bool, err error) {
	if q.mutant != sound {
		return q.installMutant(lock, install)
	}
	return installIf(
		func() bool { return !q.Interval.ReadRetry(q.Seq) }, lock,
		func() error {
			q.at("installing")
			return install(q.Entries)
		})
}
