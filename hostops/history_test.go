package hostops

import (
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// TestHistory adds records to a history and to a map.
func TestHistory(t *testing.T) {
	rng := gvmtest.Rand(t)
	const pages = 24
	for range 200 {
		var h history
		model := map[uint64]Record{}
		for n := uint64(1); n < 40; n++ {
			start := rng.Uint64N(pages)
			rec := Record{N: n, Range: Range{start, start + rng.Uint64N(pages-start+1)}}
			h.add(rec)
			for page := rec.Range.Start; page < rec.Range.End; page++ {
				model[page] = rec
			}
			for page := range uint64(pages + 1) {
				want, ok := model[page]
				if got, known := h.last(page); got != want || known != ok {
					t.Fatalf("after %v the last of page %d is %v, %v, want %v, %v", rec, page, got, known, want, ok)
				}
			}
			if len(h.runs) > pages {
				t.Fatalf("%d pages have %d runs", pages, len(h.runs))
			}
		}
	}
}
