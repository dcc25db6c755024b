package mm

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// Truncate makes the file of the region size bytes long, as ftruncate(2) does: a multiple
// of the page size, and no more than where the region ends in it. The file is open for
// writing.
//
// Every mapping of what is past a new end loses its memory, the copies that private
// mappings have included: an access fails, which is a SIGBUS for who does not expect it,
// and EFAULT for a guest. The mappings stay, and their extents have no access. If the
// file grows, they have memory again, which reads zero.
//
// The error is EINVAL if the region has no file. Its range is where the region shows, or
// showed at first, what has gone or come; if that is only what it does not show, all of the
// region.
func (m *Memory) Truncate(r *Region, size uint64) error {
	m.as.Lock()
	defer m.as.Unlock()
	if err := m.truncatable(r, size); err != nil {
		return &Error{Op: OpTruncate, Range: r.Range, Err: err}
	}
	o, end := r.object, int64(size)
	first, last := min(o.size, end), max(o.size, end)
	if first == last && !m.closed {
		return nil
	}
	shown := r.mapping(r.Range).within(first, last).Range
	if shown.Empty() {
		shown = r.Range
	}
	// after returns what the extents that show the part are once c has been done.
	after := func(c *Change) (xs []Extent) {
		for x := range m.showing(o, first, last) {
			x.ended = c
			xs = append(xs, x.settled())
		}
		return xs
	}
	return m.changeLocked(request{op: OpTruncate, r: shown}, operation{
		check: func() error {
			if !o.writable {
				return o.readOnly()
			}
			return m.unpinned(m.showing(o, first, last))
		},
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			for _, x := range after(nil) {
				inv := notifier.Invalidation{Range: x.Range, Event: notifier.Map, After: x.Access, Content: notifier.Zeroed}
				if end < o.size {
					inv.Event, inv.After, inv.Content = notifier.Unmap, addr.NoAccess, notifier.Gone
				}
				invs = append(invs, inv)
			}
			return invs
		},
		do: func(*Region) error { return o.file.Truncate(end) },
		becomes: func(c *Change, _ *Region) []Extent {
			if end > o.size {
				o.size = end
				return after(nil)
			}
			o.size, o.ended = end, c
			return after(c)
		},
	})
}

// truncatable reports what is wrong with a size of the region's file.
func (m *Memory) truncatable(r *Region, size uint64) error {
	switch {
	case r.object == nil:
		return fmt.Errorf("%v has no file: %w", r, unix.EINVAL)
	case size%addr.PageSize != 0 || size > uint64(r.Offset)+r.Size:
		return fmt.Errorf("%d bytes are not whole pages, or more than the %d at which %v ends in its file: %w", size, uint64(r.Offset)+r.Size, r, unix.EINVAL)
	case !m.closed && m.region(r.Range) != r:
		return fmt.Errorf("%v is not of this memory: %w", r, unix.EINVAL)
	}
	return nil
}
