package epoch

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
)

// memory reads guest memory by its address.
type memory interface {
	ReadGuest(gpa addr.GPA, p []byte) error
}

// mirror is a copy of ranges of guest memory that is brought up to date by harvests
// alone.
type mirror struct {
	of     memory
	ranges []addr.GFNRange // ascending, apart
	pages  [][]byte        // the content of each range

	// early is memory as it was before the harvest, if pages are to be copied from that:
	// the defect CopyBeforeClear. Otherwise it is nil.
	early *mirror

	spurious uint64 // pages that were applied and had not changed, so far
}

// newMirror returns a copy of memory as it is.
func newMirror(of memory, ranges ...addr.GFNRange) (*mirror, error) {
	c := &mirror{of: of, ranges: ranges}
	for _, r := range ranges {
		c.pages = append(c.pages, make([]byte, r.NPages()<<addr.PageShift))
	}
	return c, c.refresh()
}

// refresh copies all of memory. Pages that are not there are zero.
func (c *mirror) refresh() error {
	for i, r := range c.ranges {
		err := c.walk(r, func(gfn addr.GFN, content []byte, _ bool) { copy(c.page(i, gfn), content) })
		if err != nil {
			return err
		}
	}
	return nil
}

// batch is how many pages are read at once.
const batch = 16

// walk calls fn for each page of r with its content in memory, and whether it is there;
// it is zero if not. fn may not keep the content.
func (c *mirror) walk(r addr.GFNRange, fn func(gfn addr.GFN, content []byte, there bool)) error {
	buf := make([]byte, min(batch, r.NPages())<<addr.PageShift)
	for at := r.Start; at < r.End; {
		n := min(batch, uint64(r.End-at))
		p := buf[:n<<addr.PageShift]
		there, err := c.read(at, p)
		if err != nil {
			return err
		}
		for k := range addr.GFN(n) {
			one := p[k<<addr.PageShift:][:addr.PageSize]
			if !there && n > 1 { // some are, perhaps
				if there, err = c.read(at+k, one); err != nil {
					return err
				}
				fn(at+k, one, there)
				there = false
				continue
			}
			fn(at+k, one, there)
		}
		at += addr.GFN(n)
	}
	return nil
}

// page returns the copy of gfn, which is in range i.
func (c *mirror) page(i int, gfn addr.GFN) []byte {
	at := int(gfn-c.ranges[i].Start) << addr.PageShift
	return c.pages[i][at : at+addr.PageSize : at+addr.PageSize]
}

// read reads memory from the page gfn on to p. If not all of it is there, it reports
// false, and p is zero.
func (c *mirror) read(gfn addr.GFN, p []byte) (there bool, err error) {
	if err = c.of.ReadGuest(gfn.GPA(), p); err == nil {
		return true, nil
	}
	clear(p)
	if errors.Is(err, unix.EFAULT) {
		return false, nil
	}
	return false, fmt.Errorf("copy guest memory from %v: %w", gfn, err)
}

// apply brings the copy up to date with a harvest, in the way that its users are told
// to.
func (c *mirror) apply(h *dirty.Harvest) error {
	for i, r := range c.ranges {
		for run := range h.Discarded().RunsIn(r) {
			for gfn := run.Start; gfn < run.End; gfn++ {
				clear(c.page(i, gfn))
			}
		}
		for run := range h.Dirty().RunsIn(r) {
			err := c.walk(run, func(gfn addr.GFN, content []byte, _ bool) {
				if c.early != nil {
					content = c.early.page(i, gfn)
				}
				page := c.page(i, gfn)
				if bytes.Equal(page, content) {
					c.spurious++
				}
				copy(page, content)
			})
			if err != nil {
				return err
			}
		}
	}
	if c.early != nil {
		return c.early.refresh()
	}
	return nil
}

// compare returns the frames of which the copy is not what memory has, and makes them
// the same. Nothing stores to memory, or changes its mappings, meanwhile.
func (c *mirror) compare() (missing []addr.GFN, err error) {
	for i, r := range c.ranges {
		err := c.walk(r, func(gfn addr.GFN, content []byte, there bool) {
			if page := c.page(i, gfn); there && !bytes.Equal(page, content) {
				missing = append(missing, gfn)
				copy(page, content)
			}
		})
		if err != nil {
			return missing, err
		}
	}
	return missing, nil
}
