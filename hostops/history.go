package hostops

import (
	"slices"
	"sort"
)

// history is, for every page, the newest record that has it. It is as large as the number
// of runs of pages that have the same one.
type history struct {
	runs []run // in the order of their pages; they do not overlap
}

// run is pages and the newest record of them.
type run struct {
	pages  Range
	record Record
}

// find returns the index of the first run that ends behind page.
func (h *history) find(page uint64) int {
	return sort.Search(len(h.runs), func(i int) bool { return h.runs[i].pages.End > page })
}

// add makes rec the newest record of its pages.
func (h *history) add(rec Record) {
	r := rec.Range
	if r.Len() == 0 {
		return
	}
	i, j := h.find(r.Start), h.find(r.End-1)
	if j < len(h.runs) && h.runs[j].pages.Start < r.End {
		j++
	}
	// runs[i:j] are those that overlap r.
	var with []run
	if i < j && h.runs[i].pages.Start < r.Start {
		with = append(with, run{Range{h.runs[i].pages.Start, r.Start}, h.runs[i].record})
	}
	with = append(with, run{r, rec})
	if i < j && h.runs[j-1].pages.End > r.End {
		with = append(with, run{Range{r.End, h.runs[j-1].pages.End}, h.runs[j-1].record})
	}
	h.runs = slices.Replace(h.runs, i, j, with...)
}

// last returns the newest record of page.
func (h *history) last(page uint64) (Record, bool) {
	if i := h.find(page); i < len(h.runs) && h.runs[i].pages.Contains(page) {
		return h.runs[i].record, true
	}
	return Record{}, false
}
