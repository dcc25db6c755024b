package mm

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// The operations of madvise(2). All of the range is mapped. Advice that the kernel does
// not know, or does not take for a mapping, is EINVAL.

// Discard drops the pages of r, as madvise(2) does with MADV_DONTNEED: the next access
// reads zero from private anonymous memory, what the file has from a private mapping of
// one, and what was there before from shared memory. Guards stay.
func (m *Memory) Discard(r addr.HVARange) error {
	return m.clear(OpDiscard, r, unix.MADV_DONTNEED, dropped, nil)
}

// Free gives the pages of r back, which are private and anonymous, as madvise(2) does
// with MADV_FREE: at any time from now on, or never, the kernel takes one away, and it
// reads zero. No bracket tells of that moment.
//
// So the content is announced as changed, and it stays uncertain until it is written: who
// needs a page to have some content stores to it, or discards it. What was read from a
// page need not be there when it is read again, unless it was the guest that read: its
// fault may take the page back. A copy of the page, as of a snapshot, may have what was
// there or zero, and neither is wrong.
func (m *Memory) Free(r addr.HVARange) error {
	return m.clear(OpFree, r, unix.MADV_FREE, uncertain, func(x Extent) error {
		if x.object != nil {
			return fmt.Errorf("%v is not private anonymous memory: %w", x.Range, unix.EINVAL)
		}
		return nil
	})
}

// PageOut has the kernel reclaim the pages of r, as madvise(2) does with MADV_PAGEOUT.
// The content is kept: the next access brings it back. It is advice: without swap, nothing
// happens to anonymous pages, and pages of other memory lose only their mappings.
func (m *Memory) PageOut(r addr.HVARange) error {
	return m.clear(OpPageOut, r, unix.MADV_PAGEOUT, kept, nil)
}

// Collapse has the kernel replace the pages of r by huge ones, as madvise(2) does with
// MADV_COLLAPSE. The content is kept, also if the operation fails, when a part may have
// been replaced. r is aligned to addr.HugeSize. The error is EINVAL, too, where there is
// nothing to collapse in anonymous memory, where a page is guarded or, in a private mapping
// of a file, is a copy, and where huge pages are not wanted.
func (m *Memory) Collapse(r addr.HVARange) error {
	return m.clear(OpCollapse, r, unix.MADV_COLLAPSE, kept, func(Extent) error {
		if (r.Start|r.End)%addr.HugeSize != 0 {
			return fmt.Errorf("the range is not aligned to %d bytes: %w", addr.HugeSize, unix.EINVAL)
		}
		return nil
	})
}

// Mergeable lets the kernel merge the pages of r with others of the same content, as
// madvise(2) does with MADV_MERGEABLE: those of private mappings that are not a file's;
// with others it does nothing.
//
// No bracket is opened. The call replaces no page: ksmd does, later, page by page, and
// whenever it likes, of which the kernel tells KVM, and a bracket that is closed by then
// would tell nobody. Nor does anybody have to know: addresses and content stay, and a store
// to a merged page replaces it by a copy, as in a fresh mapping.
func (m *Memory) Mergeable(r addr.HVARange) error {
	return m.change(request{op: OpMergeable, r: r}, operation{
		check: func() error { return m.mapped(r) },
		do:    func(*Region) error { return madvise(r, unix.MADV_MERGEABLE) },
	})
}

// Unmergeable ends what Mergeable allows, as madvise(2) does with MADV_UNMERGEABLE. What
// was merged is replaced by copies before it returns; the content is kept. If the error is
// ENOMEM, some may be merged still.
func (m *Memory) Unmergeable(r addr.HVARange) error {
	return m.clear(OpUnmergeable, r, unix.MADV_UNMERGEABLE, kept, nil)
}

// clear carries out advice after which the mappings of r are the same, and their pages may
// be others. The content of an extent becomes what content says of it; it may be refused.
func (m *Memory) clear(op Op, r addr.HVARange, advice int, content func(Extent) notifier.Content, refuse func(Extent) error) error {
	if refuse == nil {
		refuse = func(Extent) error { return nil }
	}
	return m.change(request{op: op, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			return append(invs, m.cleared(r, content))
		},
		check: func() error { return m.each(r, refuse) },
		do:    func(*Region) error { return madvise(r, advice) },
	})
}

// Remove frees the memory that is mapped at r, which is shared, as madvise(2) does with
// MADV_REMOVE. As after Punch, all shared mappings of it read zero, and a page of which a
// private one has a copy is as it was. The error is EOPNOTSUPP if it is a file's whose file
// system cannot do it.
func (m *Memory) Remove(r addr.HVARange) error {
	return m.change(request{op: OpRemove, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation { return m.holes(invs, r) },
		check: func() error {
			return m.each(r, func(x Extent) error {
				if x.object == nil || x.private {
					return fmt.Errorf("%v is not shared: %w", x.Range, unix.EINVAL)
				}
				return m.freeable(x)
			})
		},
		do: func(*Region) error {
			for x := range m.extents.in(r) {
				if err := madvise(x.Range, unix.MADV_REMOVE); err != nil {
					return x.noHole(err)
				}
			}
			return nil
		},
	})
}

// Guard has every access to r fail, as madvise(2) does with MADV_GUARD_INSTALL since Linux
// 6.13, and 6.15 if r shows a file or is shared. The content of private memory is lost,
// the copies of a file's pages too; shared memory has its own still. Guards stay through
// all other operations but Unguard, those that map or unmap, and Remap, with which they
// move.
func (m *Memory) Guard(r addr.HVARange) error {
	lost := func(x Extent) notifier.Content {
		if x.object == nil || x.private {
			return notifier.Gone
		}
		return notifier.Kept
	}
	return m.change(request{op: OpGuard, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			inv := m.cleared(r, lost)
			inv.Event, inv.After = notifier.Protect, addr.NoAccess
			return append(invs, inv)
		},
		check: func() error { return m.mapped(r) },
		do:    func(*Region) error { return madvise(r, unix.MADV_GUARD_INSTALL) },
		becomes: func(c *Change, _ *Region) []Extent {
			return m.extentsWith(r, func(x *Extent) { x.guard = c })
		},
	})
}

// Unguard takes the guards from r, if there are any, as madvise(2) does with
// MADV_GUARD_REMOVE. The permissions are those that the mapping has. Private anonymous
// memory reads zero then, a private mapping of a file what that has, and shared memory
// what it did.
func (m *Memory) Unguard(r addr.HVARange) error {
	return m.change(request{op: OpUnguard, r: r}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			for x := range m.extents.in(r) {
				if x.guard != nil {
					x.guard = nil
					invs = append(invs, notifier.Invalidation{Range: x.Range, Event: notifier.Map, After: x.settled().Access, Content: dropped(x)})
				}
			}
			return invs
		},
		check: func() error { return m.mapped(r) },
		do:    func(*Region) error { return madvise(r, unix.MADV_GUARD_REMOVE) },
		becomes: func(*Change, *Region) []Extent {
			return m.extentsWith(r, func(x *Extent) { x.guard = nil })
		},
	})
}

// Populate makes the pages of r present, and for write writable, as loads or stores to
// them would, by madvise(2) with MADV_POPULATE_READ or MADV_POPULATE_WRITE. The mappings
// and the content stay: no bracket is opened, it does not count as a change, and a pinned
// region permits it. It holds the mapping lock for reading. An error of the kernel says what
// PageTables.Fault has.
func (m *Memory) Populate(r addr.HVARange, write bool) error {
	m.as.RLock()
	defer m.as.RUnlock()
	_, err := m.usable(r)
	if err == nil {
		err = m.mapped(r)
	}
	if err != nil {
		return &Error{Op: OpPopulate, Range: r, Err: err}
	}
	id := m.begun(OpPopulate, r)
	return m.ended(id, OpPopulate, r, false, populate(r, write))
}
