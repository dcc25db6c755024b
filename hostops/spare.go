package hostops

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// spare says which pages of the spare region have pages of RAM. What else is mapped
// there is nobody's, and may be replaced.
type spare struct {
	region addr.HVARange
	taken  []bool // by page of the region
}

func newSpare(t *Target) spare {
	if t.Spare == nil {
		return spare{}
	}
	return spare{t.Spare.Range, make([]bool, t.Spare.Range.NPages())}
}

// find returns the first n bytes of the region that are free. The error is ENOSPC if there
// are not so many in a row.
func (s *spare) find(n uint64) (addr.HVARange, error) {
	pages, run := int(n>>addr.PageShift), 0
	for i, taken := range s.taken {
		if run++; taken {
			run = 0
		}
		if run == pages {
			return addr.HVAs(s.region.Start+addr.HVA((i+1-pages)<<addr.PageShift), n), nil
		}
	}
	return addr.HVARange{}, fmt.Errorf("the spare region has no %d pages in a row that are free: %w", pages, unix.ENOSPC)
}

// set says whether the pages of r are taken, if they are in the region.
func (s *spare) set(r addr.HVARange, taken bool) {
	r = r.Intersect(s.region)
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		s.taken[(hva-s.region.Start)>>addr.PageShift] = taken
	}
}
