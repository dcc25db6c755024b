package mm

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

// Op is an operation on mappings, by its stable name.
type Op string

// The operations.
const (
	OpUnmap   Op = "unmap"   // put a reservation in the place of the pages
	OpMap     Op = "map"     // map the region's memory as at first
	OpProtect Op = "protect" // mprotect(2)
	OpDiscard Op = "discard" // madvise(2) MADV_DONTNEED
	OpPunch   Op = "punch"   // fallocate(2) FALLOC_FL_PUNCH_HOLE
	OpRemap   Op = "remap"   // mremap(2) to another address
)

// Error is an operation that was not carried out, or in which something went
// wrong although it was.
type Error struct {
	Op    Op
	Range addr.HVARange
	Made  bool  // the mappings have changed; otherwise they are as they were, unless Err says that some of them are not
	Err   error // an errno, ErrPinned, os.ErrClosed; if Made also what subscribers reported, each a *notifier.Report
}

func (e *Error) Error() string {
	if e.Made {
		return fmt.Sprintf("%s %v: the change was made, but: %v", e.Op, e.Range, e.Err)
	}
	return fmt.Sprintf("%s %v: %v", e.Op, e.Range, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Unmap takes the memory of r away, as munmap(2) does, and keeps the addresses
// reserved. Content of anonymous memory is lost. Where nothing is mapped it
// does nothing.
//
// Like all operations it blocks until subscribers were told of the change, before
// and after; r is page aligned, not empty, and in one region that is not pinned.
// Errors are of type *Error. Subscribers cannot refuse, but an operation that was
// carried out returns what they reported, such as slots that could not follow.
func (m *Memory) Unmap(r addr.HVARange) error {
	return m.change(operation{
		op: OpUnmap, r: r,
		brackets: one(notifier.Invalidation{Range: r, Event: notifier.Unmap, After: addr.NoAccess}),
		do:       func(*Region) error { return reserveFixed(r) },
		becomes:  func(c *Change, _ *Region) []Extent { return []Extent{{Range: r, Why: c}} },
	})
}

// Map maps r as its region was mapped at first, readable and writable, in place
// of whatever is there, as mmap(2) does with MAP_FIXED: anonymous memory reads
// zero, a memory file shows its content at the offset that belongs to r.
func (m *Memory) Map(r addr.HVARange) error {
	return m.change(operation{
		op: OpMap, r: r,
		brackets: func() []notifier.Invalidation { return []notifier.Invalidation{m.replaced(r)} },
		do:       func(region *Region) error { return mapFixed(region.mapped(r)) },
		becomes:  func(_ *Change, region *Region) []Extent { return []Extent{region.mapped(r)} },
	})
}

// Protect changes the permissions of r, as mprotect(2) does. All of r is mapped.
func (m *Memory) Protect(r addr.HVARange, access addr.Access) error {
	return m.change(operation{
		op: OpProtect, r: r,
		brackets: one(notifier.Invalidation{Range: r, Event: notifier.Protect, After: access}),
		check:    func() error { return m.mapped(r) },
		do:       func(*Region) error { return mprotect(r, access) },
		becomes: func(c *Change, _ *Region) (xs []Extent) {
			for x := range m.extents.in(r) {
				x.Access, x.Why = access, c
				if access == addr.ReadWrite {
					x.Why = nil
				}
				xs = append(xs, x)
			}
			return xs
		},
	})
}

// Discard drops the pages of r, as madvise(2) does with MADV_DONTNEED: the next
// access reads zero from anonymous memory, and what the file has from a memory
// file. All of r is mapped.
func (m *Memory) Discard(r addr.HVARange) error {
	return m.change(operation{
		op: OpDiscard, r: r,
		brackets: one(notifier.Invalidation{Range: r, Event: notifier.Clear, After: addr.ReadWrite}),
		check:    func() error { return m.mapped(r) },
		do:       func(*Region) error { return madvise(r, unix.MADV_DONTNEED) },
	})
}

// Punch frees the part of the memory file that is mapped at r, as fallocate(2)
// does with FALLOC_FL_PUNCH_HOLE; every mapping of it reads zero then. All of r
// is mapped from a file.
func (m *Memory) Punch(r addr.HVARange) error {
	return m.change(operation{
		op: OpPunch, r: r,
		brackets: func() (invs []notifier.Invalidation) {
			for _, r := range m.aliases(r) {
				invs = append(invs, notifier.Invalidation{Range: r, Event: notifier.Clear, After: addr.ReadWrite})
			}
			return invs
		},
		check: func() error {
			for x := range m.extents.in(r) {
				if x.Mapped && x.file == nil {
					return fmt.Errorf("%v is anonymous and has no file to punch; discard it instead: %w", x.Range, unix.EINVAL)
				}
			}
			return m.mapped(r)
		},
		do: func(*Region) error {
			for x := range m.extents.in(r) {
				const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
				if err := unix.Fallocate(int(x.file.Fd()), mode, x.offset, int64(x.Range.Bytes())); err != nil {
					return fmt.Errorf("fallocate of %v: %w", x.Range, err)
				}
			}
			return nil
		},
	})
}

// Remap moves the pages of from to the address to, as mremap(2) does: what is
// mapped there goes away, and the addresses of from stay reserved. Whoever used
// the memory through a slot follows it to its new address. The two ranges do
// not overlap, and all of from is mapped, in one piece as far as the kernel is
// concerned.
func (m *Memory) Remap(from addr.HVARange, to addr.HVA) error {
	target := addr.HVAs(to, from.Bytes())
	kept := false // the addresses of from could not be reserved
	return m.change(operation{
		op: OpRemap, r: from, to: to,
		brackets: func() []notifier.Invalidation {
			return []notifier.Invalidation{
				m.replaced(target),
				{Range: from, Event: notifier.Remap, After: addr.NoAccess, To: to},
			}
		},
		check: func() error {
			switch region := m.region(target); {
			case !target.Aligned() || from.Overlaps(target) || region == nil:
				return fmt.Errorf("the target %v is not page aligned, overlaps, or is not in a region: %w", target, unix.EINVAL)
			case region.Pinned:
				return fmt.Errorf("the target %v: %w", target, ErrPinned)
			}
			return m.mapped(from)
		},
		do: func(*Region) error {
			// The source keeps an empty mapping at first, so that there is no
			// instant at which another thread's mmap could be given its addresses.
			if err := mremapKeep(from, to); err != nil {
				return err
			}
			if err := reserveFixed(from); err != nil {
				kept = true
				m.reports.add(fmt.Errorf("empty memory is left where the pages were: %w", err))
			}
			return nil
		},
		becomes: func(c *Change, _ *Region) (xs []Extent) {
			for x := range m.extents.in(from) {
				x.Range = addr.HVAs(to+(x.Range.Start-from.Start), x.Range.Bytes())
				xs = append(xs, x)
			}
			if !kept {
				xs = append(xs, Extent{Range: from, Why: c})
			}
			return xs
		},
	})
}

// aliases returns r, and every other range that shows the same pages of a file: a
// Map of what a Remap has moved away makes one.
func (m *Memory) aliases(r addr.HVARange) []addr.HVARange {
	all := []addr.HVARange{r}
	for x := range m.extents.in(r) {
		for _, y := range m.extents {
			if x.file == nil || y.file != x.file {
				continue
			}
			first := max(x.offset, y.offset)
			end := min(x.offset+int64(x.Range.Bytes()), y.offset+int64(y.Range.Bytes()))
			alias := addr.HVARange{Start: y.Range.Start + addr.HVA(first-y.offset), End: y.Range.Start + addr.HVA(end-y.offset)}
			if first < end && !r.Contains(alias) {
				all = append(all, alias)
			}
		}
	}
	return all
}

// replaced is the invalidation of a range in which something is about to be
// mapped. Access only grows, or one page takes the place of another in one
// step, so nobody has to be kept from using the range meanwhile.
func (m *Memory) replaced(r addr.HVARange) notifier.Invalidation {
	inv := notifier.Invalidation{Range: r, Event: notifier.Map, After: addr.ReadWrite}
	for x := range m.extents.in(r) {
		if x.Mapped {
			inv.Event = notifier.Unmap
		}
	}
	return inv
}

// mapped reports the first part of r that is not mapped, as the kernel would.
func (m *Memory) mapped(r addr.HVARange) error {
	for x := range m.extents.in(r) {
		if !x.Mapped {
			return fmt.Errorf("%v; map it first: %w", x, unix.ENOMEM)
		}
	}
	return nil
}

// operation is one change of mappings, as change carries it out. All functions
// run with the mapping lock held for writing.
type operation struct {
	op       Op
	r        addr.HVARange
	to       addr.HVA                                 // for OpRemap
	check    func() error                             // what else must hold; may be nil
	brackets func() []notifier.Invalidation           // without Op; opened in this order
	do       func(*Region) error                      // the system calls
	becomes  func(c *Change, region *Region) []Extent // what is mapped afterwards; nil: as before
}

func one(inv notifier.Invalidation) func() []notifier.Invalidation {
	return func() []notifier.Invalidation { return []notifier.Invalidation{inv} }
}

// change carries an operation out between the start and the end of its brackets.
func (m *Memory) change(o operation) error {
	m.as.Lock()
	defer m.as.Unlock()
	fail := func(err error) error { return &Error{Op: o.op, Range: o.r, Err: err} }
	region := m.region(o.r)
	switch {
	case m.closed:
		return fail(os.ErrClosed)
	case o.r.Empty() || !o.r.Aligned():
		return fail(fmt.Errorf("the range is empty or not page aligned: %w", unix.EINVAL))
	case region == nil:
		return fail(fmt.Errorf("the range does not lie in one region of guest memory: %w", unix.EINVAL))
	case region.Pinned:
		return fail(fmt.Errorf("%v: %w", region, ErrPinned))
	}
	if o.check != nil {
		if err := o.check(); err != nil {
			return fail(err)
		}
	}

	id := m.log.NewOp()
	m.log.Record(trace.Event{Kind: trace.HostOp, Op: id, Name: string(o.op), HVA: o.r})
	m.reports.collect()
	made := false
	err := m.bracketed(id, o.brackets(), func() error {
		if err := o.do(region); err != nil {
			return err
		}
		made = true
		c := m.history.add(Change{Seq: m.changes.Add(1), Op: o.op, Range: o.r, To: o.to, Time: time.Now()})
		if o.becomes != nil {
			for _, x := range o.becomes(c, region) {
				m.extents.set(x)
			}
		}
		return nil
	})
	err = errors.Join(err, m.reports.collected())
	end := trace.Event{Kind: trace.HostOpEnd, Op: id, Name: string(o.op), HVA: o.r}
	if err != nil {
		end.Err = err.Error()
		err = &Error{Op: o.op, Range: o.r, Made: made, Err: err}
	}
	m.log.Record(end)
	return err
}

// bracketed opens the brackets in their order, calls change, and closes them in
// the opposite order.
func (m *Memory) bracketed(id uint64, brackets []notifier.Invalidation, change func() error) error {
	if len(brackets) == 0 {
		return change()
	}
	inv := &brackets[0]
	inv.Op = id
	event := trace.Event{Kind: trace.InvalidateStart, Op: id, Name: inv.Event.String(), HVA: inv.Range}
	m.log.Record(event)
	if err := m.as.InvalidateRangeStart(inv); err != nil {
		return err
	}
	err := m.bracketed(id, brackets[1:], change)
	inv.Failed = err != nil
	m.as.InvalidateRangeEnd(inv)
	event.Kind = trace.InvalidateEnd
	m.log.Record(event)
	return err
}
