package mm

import (
	"errors"
	"fmt"
	"iter"
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

	OpRemapKeep   Op = "remap-keep"  // mremap(2) MREMAP_DONTUNMAP
	OpFree        Op = "free"        // madvise(2) MADV_FREE
	OpRemove      Op = "remove"      // MADV_REMOVE
	OpPopulate    Op = "populate"    // MADV_POPULATE_READ or MADV_POPULATE_WRITE
	OpPageOut     Op = "pageout"     // MADV_PAGEOUT
	OpCollapse    Op = "collapse"    // MADV_COLLAPSE
	OpMergeable   Op = "mergeable"   // MADV_MERGEABLE
	OpUnmergeable Op = "unmergeable" // MADV_UNMERGEABLE
	OpGuard       Op = "guard"       // MADV_GUARD_INSTALL
	OpUnguard     Op = "unguard"     // MADV_GUARD_REMOVE
	OpTruncate    Op = "truncate"    // ftruncate(2)
	OpFork        Op = "fork"        // fork(2), of a child that keeps the memory
)

// Error is an operation that was not carried out, or in which something went
// wrong although it was.
type Error struct {
	Op    Op
	Range addr.HVARange
	Made  bool  // the mappings have changed; otherwise they are as they were, unless a system call failed in the middle, of which subscribers are told
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
// reserved. Content of anonymous memory, and the copies
// that a private mapping has, are lost. Where nothing is mapped it
// does nothing.
//
// Like all operations it blocks until subscribers were told of the change, before
// and after; r is page aligned, not empty, and in one region that is not pinned.
// Errors are of type *Error. Subscribers cannot refuse, but an operation that was
// carried out returns what they reported, such as slots that could not follow.
func (m *Memory) Unmap(r addr.HVARange) error {
	return m.change(request{op: OpUnmap, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			return append(invs, notifier.Invalidation{Range: r, Event: notifier.Unmap, After: addr.NoAccess, Content: notifier.Gone})
		},
		do:      func(*Region) error { return reserveFixed(r) },
		becomes: func(c *Change, _ *Region) []Extent { return []Extent{{Range: r, Why: c}} },
	})
}

// Map maps r as its region was mapped at first, readable and writable, in place
// of whatever is there, as mmap(2) does with MAP_FIXED: anonymous memory reads
// zero, also if it is shared; a file shows its content at the offset that
// belongs to r, and nothing can be used past its end.
func (m *Memory) Map(r addr.HVARange) error {
	var x Extent
	return m.change(request{op: OpMap, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			x = m.region(r).mapping(r)
			for _, y := range x.backed() {
				if !y.Range.Empty() {
					inv := m.replaced(y.Range)
					inv.After, inv.Content = y.Access, y.fresh()
					invs = append(invs, inv)
				}
			}
			return invs
		},
		do: func(region *Region) error { return mapFixed(x, region.file) },
		becomes: func(*Change, *Region) (xs []Extent) {
			for _, y := range x.backed() {
				if !y.Range.Empty() {
					xs = append(xs, y)
				}
			}
			return xs
		},
	})
}

// fresh returns what is read through x when it has just been mapped.
func (x Extent) fresh() notifier.Content {
	switch {
	case x.ended != nil:
		return notifier.Gone
	case x.object == nil || x.object.file == nil:
		return notifier.Zeroed
	}
	return notifier.Changed
}

// Protect changes the permissions of r, as mprotect(2) does. All of r is mapped. What is
// guarded, or past the end of its file, stays without access, and has the permissions
// once it is neither.
func (m *Memory) Protect(r addr.HVARange, access addr.Access) error {
	return m.change(request{op: OpProtect, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			return append(invs, notifier.Invalidation{Range: r, Event: notifier.Protect, After: access, Content: notifier.Kept})
		},
		check: func() error { return m.mapped(r) },
		do:    func(*Region) error { return mprotect(r, access) },
		becomes: func(c *Change, _ *Region) []Extent {
			if access == addr.ReadWrite {
				c = nil
			}
			return m.extentsWith(r, func(x *Extent) { x.access, x.since = access, c })
		},
	})
}

// extentsWith returns the extents of r after set was called for each.
func (m *Memory) extentsWith(r addr.HVARange, set func(*Extent)) (xs []Extent) {
	for x := range m.extents.in(r) {
		set(&x)
		xs = append(xs, x.settled())
	}
	return xs
}

// Punch frees the part of the file that is mapped at r, as fallocate(2)
// does with FALLOC_FL_PUNCH_HOLE. Every shared mapping of it reads zero then; of a
// private one, a page that was stored to is as it was. All of r is mapped from a
// file, which is open for writing, or the error is EBADF. It is EOPNOTSUPP if the file
// system cannot do it.
func (m *Memory) Punch(r addr.HVARange) error {
	return m.change(request{op: OpPunch, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation { return m.holes(invs, r) },
		check: func() error {
			return m.each(r, func(x Extent) error {
				switch {
				case x.object == nil:
					return fmt.Errorf("%v is anonymous and has no file to punch; discard it instead: %w", x.Range, unix.EINVAL)
				case x.object.file == nil:
					return fmt.Errorf("%v is anonymous and has no file to punch; remove it instead: %w", x.Range, unix.EINVAL)
				}
				return m.freeable(x)
			})
		},
		do: func(*Region) error {
			for x := range m.extents.in(r) {
				if err := x.deallocate(); err != nil {
					return err
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
// concerned. Moving a page in over another one is this too. Memory does not grow:
// a region is as large as it was made.
func (m *Memory) Remap(from addr.HVARange, to addr.HVA) error {
	kept := false // the addresses of from could not be reserved
	return m.change(request{op: OpRemap, r: from, to: to}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			// The target's closes first: who follows the pages there is not to find that
			// its content has changed.
			return append(invs,
				notifier.Invalidation{Range: from, Event: notifier.Remap, After: addr.NoAccess, To: to, Content: notifier.Kept},
				m.replaced(addr.HVAs(to, from.Bytes())))
		},
		check: func() error { return m.movable(from, to) },
		do: func(*Region) error {
			// The source keeps an empty mapping at first, so that there is no
			// instant at which another thread's mmap could be given its addresses.
			if err := m.moveKeep(request{op: OpRemap, r: from, to: to}); err != nil {
				return err
			}
			if err := reserveFixed(from); err != nil {
				kept = true
				m.reports.add(fmt.Errorf("empty memory is left where the pages were: %w", err))
			}
			return nil
		},
		becomes: func(c *Change, _ *Region) []Extent {
			xs := m.moved(from, to)
			if !kept {
				xs = append(xs, Extent{Range: from, Why: c})
			}
			return xs
		},
	})
}

// RemapKeep moves the pages of from to the address to, as mremap(2) does with
// MREMAP_DONTUNMAP: the mapping of from stays, without pages. It reads zero then if it is
// private and anonymous, as the file does if it is a private mapping of one, and as
// before if it is shared, when both show the same pages. Slots do not follow: a guest goes
// on with what from is now. What is mapped at to goes away. The ranges are as for Remap,
// and no page of from is guarded.
func (m *Memory) RemapKeep(from addr.HVARange, to addr.HVA) error {
	return m.change(request{op: OpRemapKeep, r: from, to: to}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			return append(invs, m.replaced(addr.HVAs(to, from.Bytes())), m.cleared(from, dropped))
		},
		check: func() error {
			if err := m.movable(from, to); err != nil {
				return err
			}
			return m.each(from, func(x Extent) error {
				if x.guard != nil {
					return fmt.Errorf("%v, and guards would move; unguard it first: %w", x, unix.EINVAL)
				}
				return nil
			})
		},
		do:      func(*Region) error { return m.moveKeep(request{op: OpRemapKeep, r: from, to: to}) },
		becomes: func(*Change, *Region) []Extent { return m.moved(from, to) },
	})
}

// moveKeep moves the pages of req.r to req.to, and leaves an empty mapping in their place.
//
// Linux before 6.17 unmaps the target before it finds that it cannot move the source, which
// is several mappings. The target is a reservation then: never a hole, in which the next
// allocation of the process could land.
func (m *Memory) moveKeep(req request) error {
	err := mremapKeep(req.r, req.to)
	if err == nil {
		return nil
	}
	target := addr.HVAs(req.to, req.r.Bytes())
	hole, failed := reserveHole(target)
	if hole {
		why := m.changed(req)
		m.extents.set(Extent{Range: target, Why: &why})
		err = fmt.Errorf("%w, and what was mapped at %v is gone", err, target)
	}
	return errors.Join(err, failed)
}

// movable reports why the pages of from cannot move to the address to.
func (m *Memory) movable(from addr.HVARange, to addr.HVA) error {
	target := addr.HVAs(to, from.Bytes())
	switch region := m.region(target); {
	case !target.Aligned() || from.Overlaps(target) || region == nil:
		return fmt.Errorf("the target %v is not page aligned, overlaps, or is not in a region: %w", target, unix.EINVAL)
	case region.Pinned:
		return fmt.Errorf("the target %v: %w", target, ErrPinned)
	}
	return m.mapped(from)
}

// moved returns the extents of from as they are at the address to.
func (m *Memory) moved(from addr.HVARange, to addr.HVA) (xs []Extent) {
	for x := range m.extents.in(from) {
		x.Range = addr.HVAs(to+(x.Range.Start-from.Start), x.Range.Bytes())
		xs = append(xs, x)
	}
	return xs
}

// showing yields the extents that show the bytes of o from first to end, cut to them.
func (m *Memory) showing(o *object, first, end int64) iter.Seq[Extent] {
	return func(yield func(Extent) bool) {
		for _, x := range m.extents {
			if x.object != o {
				continue
			}
			if x = x.within(first, end); !x.Range.Empty() && !yield(x) {
				return
			}
		}
	}
}

// within is the part of x that shows the bytes of its object from first to end.
func (x Extent) within(first, end int64) Extent {
	at := func(offset int64) addr.HVA {
		return x.Range.Start + addr.HVA(min(max(offset-x.offset, 0), int64(x.Range.Bytes())))
	}
	return x.cut(addr.HVARange{Start: at(first), End: at(end)})
}

// holes appends to invs the brackets in which the pages of objects that r shows are freed:
// of r, and of every other range that shows them.
func (m *Memory) holes(invs []notifier.Invalidation, r addr.HVARange) []notifier.Invalidation {
	punched := func(x Extent) notifier.Content {
		if x.private {
			return notifier.Changed
		}
		return notifier.Zeroed
	}
	invs = append(invs, m.cleared(r, punched))
	for y := range m.aliases(r) {
		invs = append(invs, m.cleared(y.Range, punched))
	}
	return invs
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

// cleared is the invalidation of a range whose mappings stay, and may fault in other
// pages. The content of an extent becomes what content says of it; if it is not the same
// of all of them, it is announced as changed.
func (m *Memory) cleared(r addr.HVARange, content func(Extent) notifier.Content) notifier.Invalidation {
	inv := notifier.Invalidation{Range: r, Event: notifier.Clear}
	first := true
	for x := range m.extents.in(r) {
		inv.After |= x.Access
		switch c := content(x); {
		case first:
			inv.Content = c
		case inv.Content != c:
			inv.Content = notifier.Changed
		}
		first = false
	}
	return inv
}

// dropped returns what becomes of the content of x if its mapping loses its pages: an
// object has its own still, which is not what a private mapping may have shown.
func dropped(x Extent) notifier.Content {
	switch {
	case x.object == nil:
		return notifier.Zeroed
	case x.private:
		return notifier.Changed
	}
	return notifier.Kept
}

func uncertain(Extent) notifier.Content { return notifier.Changed }
func kept(Extent) notifier.Content      { return notifier.Kept }

// mapped reports the first part of r that is not mapped, as the kernel would.
func (m *Memory) mapped(r addr.HVARange) error {
	return m.each(r, func(Extent) error { return nil })
}

// each returns why the first extent of r that is not mapped, or that refuse has an error
// for, keeps an operation from being carried out.
func (m *Memory) each(r addr.HVARange, refuse func(Extent) error) error {
	for x := range m.extents.in(r) {
		if !x.Mapped {
			return fmt.Errorf("%v; map it first: %w", x, unix.ENOMEM)
		}
		if err := refuse(x); err != nil {
			return err
		}
	}
	return nil
}

// request is what is asked for, and of what.
type request struct {
	op Op
	r  addr.HVARange
	to addr.HVA // for OpRemap and OpRemapKeep

	stray bool   // others have made it, and it is followed
	id    uint64 // its number in the trace, once it has begun
}

// operation is one change of mappings, as change carries it out. All functions
// run with the mapping lock held for writing.
type operation struct {
	check    func() error                                          // what else must hold; may be nil
	brackets func([]notifier.Invalidation) []notifier.Invalidation // appends them, without Op, in the order in which they are opened; nil: none
	do       func(*Region) error                                   // the system calls
	becomes  func(c *Change, region *Region) []Extent              // what is mapped afterwards; nil: as before
}

// change carries an operation out between the start and the end of its brackets.
func (m *Memory) change(req request, o operation) error {
	m.as.Lock()
	defer m.as.Unlock()
	if m.events != nil {
		m.events.followLocked() // what others did before, where the pages are before they move
	}
	err := m.changeLocked(req, o)
	if m.events != nil {
		m.events.followLocked() // what others did meanwhile, before anybody looks at the memory
	}
	return err
}

// usable returns the region that r lies in, or why no operation can be carried out there.
// The caller holds the mapping lock.
func (m *Memory) usable(r addr.HVARange) (*Region, error) {
	region := m.region(r)
	switch {
	case m.closed:
		return nil, os.ErrClosed
	case r.Empty() || !r.Aligned():
		return nil, fmt.Errorf("the range is empty or not page aligned: %w", unix.EINVAL)
	case region == nil:
		return nil, fmt.Errorf("the range does not lie in one region of guest memory: %w", unix.EINVAL)
	}
	return region, nil
}

// changeLocked is change with the mapping lock held for writing. An operation that leaves
// the extents as they are allocates nothing.
func (m *Memory) changeLocked(req request, o operation) error {
	fail := func(err error) error { return &Error{Op: req.op, Range: req.r, Err: err} }
	region, err := m.usable(req.r)
	if err != nil {
		return fail(err)
	}
	if region.Pinned {
		return fail(fmt.Errorf("%v: %w", region, ErrPinned))
	}
	if o.check != nil {
		if err := o.check(); err != nil {
			return fail(err)
		}
	}
	m.brackets = m.brackets[:0]
	if o.brackets != nil {
		m.brackets = o.brackets(m.brackets)
	}
	return m.carryOut(req, func() error {
		if err := o.do(region); err != nil {
			return err
		}
		c := m.changed(req)
		if o.becomes == nil {
			return nil
		}
		why := c // on the heap: extents may refer to it
		for _, x := range o.becomes(&why, region) {
			m.extents.set(x)
		}
		return nil
	})
}

// changed counts and remembers a change that has just been made.
func (m *Memory) changed(req request) Change {
	now := m.start.Add(time.Since(m.start)) // reads one clock, where time.Now reads two
	c := Change{Seq: m.changes.Add(1), Op: req.op, Range: req.r, To: req.to, Time: now}
	m.history.add(c)
	return c
}

// carryOut calls do inside of m.brackets, and returns the error of the operation. If do
// has none, the change is made. The caller holds the mapping lock for writing.
func (m *Memory) carryOut(req request, do func() error) error {
	req.id = m.begun(req.op, req.r)
	m.doing = req
	m.reports.collect()
	err := m.bracketed(req.id, m.brackets, do)
	made := err == nil
	err = errors.Join(err, m.reports.collected())
	return m.ended(req.id, req.op, req.r, made, err)
}

// begun records the begin of an operation in the trace, and returns its number there. The
// caller holds the mapping lock.
func (m *Memory) begun(op Op, r addr.HVARange) uint64 {
	id := m.followed
	if id == 0 {
		id = m.log.NewOp()
	}
	m.record(trace.HostOp, id, string(op), r, nil)
	return id
}

// ended records the end of an operation in the trace, and returns its error.
func (m *Memory) ended(id uint64, op Op, r addr.HVARange, made bool, err error) error {
	m.record(trace.HostOpEnd, id, string(op), r, err)
	if err != nil {
		return &Error{Op: op, Range: r, Made: made, Err: err}
	}
	return nil
}

// record records a part of an operation in the trace, if there is one.
func (m *Memory) record(kind trace.Kind, id uint64, name string, r addr.HVARange, err error) {
	if m.log == nil {
		return
	}
	e := trace.Event{Kind: kind, Op: id, Name: name, HVA: r}
	if err != nil {
		e.Err = err.Error()
	}
	m.log.Record(e)
}

// call makes the system calls of what m.doing says, and has those who watch for the changes
// of others know that they are not.
func (m *Memory) call(do func() error) error {
	switch req := m.doing; {
	case req.stray || m.events == nil && m.traced == nil:
		return do()
	case m.traced == nil:
		return m.events.call(req, do)
	case m.events == nil:
		return m.traced.call(req, do)
	default:
		return m.traced.call(req, func() error { return m.events.call(req, do) })
	}
}

// bracketed opens the brackets in their order, calls change, and closes them in
// the opposite order.
func (m *Memory) bracketed(id uint64, brackets []notifier.Invalidation, change func() error) error {
	if len(brackets) == 0 {
		return m.call(change)
	}
	inv := &brackets[0]
	inv.Op = id
	m.record(trace.InvalidateStart, id, inv.Event.String(), inv.Range, nil)
	if err := m.as.InvalidateRangeStart(inv); err != nil {
		return err
	}
	err := m.bracketed(id, brackets[1:], change)
	inv.Failed = err != nil
	m.as.InvalidateRangeEnd(inv)
	m.record(trace.InvalidateEnd, id, inv.Event.String(), inv.Range, nil)
	return err
}
