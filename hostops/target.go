package hostops

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
)

// Target is a guest's memory. As long as a [Runner] has it, nobody else moves pages of RAM,
// or changes the size of its file. Its functions may be called from any goroutine.
type Target struct {
	Memory *mm.Memory
	RAM    *mm.Region // its first page is page 0
	Spare  *mm.Region // where pages can be moved to; nil: nowhere

	// HVA returns the host address that the guest is shown a page of RAM from, whether or
	// not something is mapped there. It is false if there is no such page.
	HVA func(page uint64) (addr.HVA, bool)

	// Store64 stores 8 bytes, and Write some bytes of one page, as the machine does it by
	// itself: through its table, which tells the dirty log. The offset is in bytes, a
	// multiple of 8 for Store64.
	Store64 func(page, offset, value uint64) error
	Write   func(page, offset uint64, p []byte) error
}

// pages returns the number of pages of RAM.
func (t *Target) pages() uint64 { return t.RAM.Range.NPages() }

// home returns the addresses at which pages were at first.
func (t *Target) home(r Range) addr.HVARange {
	return addr.HVAs(t.RAM.Range.Start+addr.HVA(r.Start<<addr.PageShift), r.Len()<<addr.PageShift)
}

// inSpare reports whether r is in the spare region.
func (t *Target) inSpare(r addr.HVARange) bool { return t.Spare != nil && t.Spare.Range.Contains(r) }

// piece is pages that are one run of host addresses, in one region.
type piece struct {
	pages Range
	hvas  addr.HVARange
}

// cut returns the part of p at the addresses r, which are some of its.
func (p piece) cut(r addr.HVARange) piece {
	start := p.pages.Start + uint64(r.Start-p.hvas.Start)>>addr.PageShift
	return piece{Range{start, start + r.NPages()}, r}
}

// pieces returns the pages of r, in their order, in as few pieces as they are in.
func (t *Target) pieces(r Range) (ps []piece, err error) {
	for page := r.Start; page < r.End; page++ {
		hva, ok := t.HVA(page)
		if !ok {
			return nil, fmt.Errorf("RAM has no page %d: %w", page, unix.EFAULT)
		}
		this := addr.HVAs(hva, addr.PageSize)
		if n := len(ps) - 1; n >= 0 && ps[n].hvas.End == hva && t.inSpare(ps[n].hvas) == t.inSpare(this) {
			ps[n].pages.End, ps[n].hvas.End = page+1, this.End
			continue
		}
		ps = append(ps, piece{Range{page, page + 1}, this})
	}
	return ps, nil
}
