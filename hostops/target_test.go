package hostops

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
)

// TestPieces: pages are one piece if they follow each other in one region. Here the spare
// region, of 4 pages, ends where RAM begins.
func TestPieces(t *testing.T) {
	const page = addr.PageSize
	for name, tt := range map[string]struct {
		at   []addr.HVA // where each page is, in pages
		want string
	}{
		"at home":              {at: []addr.HVA{4, 5, 6}, want: "0..3@4"},
		"one is away":          {at: []addr.HVA{4, 0, 6}, want: "0@4 1@0 2@6"},
		"neighbours away":      {at: []addr.HVA{1, 2, 6}, want: "0..2@1 2@6"},
		"in the other order":   {at: []addr.HVA{6, 5, 4}, want: "0@6 1@5 2@4"},
		"over a region border": {at: []addr.HVA{3, 4, 5}, want: "0@3 1..3@4"},
		"at one address":       {at: []addr.HVA{4, 4}, want: "0@4 1@4"},
	} {
		target := Target{
			Spare: &mm.Region{Range: addr.HVAs(0, 4*page)},
			RAM:   &mm.Region{Range: addr.HVAs(4*page, 4*page)},
			HVA: func(p uint64) (addr.HVA, bool) {
				if p >= uint64(len(tt.at)) {
					return 0, false
				}
				return tt.at[p] * page, true
			},
		}
		ps, err := target.pieces(Range{0, uint64(len(tt.at))})
		got := ""
		for i, p := range ps {
			if i > 0 {
				got += " "
			}
			got += fmt.Sprintf("%v@%d", p.pages, uint64(p.hvas.Start/page))
			if p.hvas.NPages() != p.pages.Len() {
				t.Errorf("%s: %v are %v", name, p.pages, p.hvas)
			}
		}
		if got != tt.want || err != nil {
			t.Errorf("%s: the pieces are %s (%v), want %s", name, got, err, tt.want)
		}
		if _, err := target.pieces(Range{1, 9}); !errors.Is(err, unix.EFAULT) {
			t.Errorf("%s: pages that there are not: %v, want EFAULT", name, err)
		}
	}
}
