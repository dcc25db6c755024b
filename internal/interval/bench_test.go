package interval

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/google/btree"
)

const page = 4096

var benchSizes = []struct {
	name string
	n    int
}{{"1e3", 1e3}, {"1e5", 1e5}, {"1e6", 1e6}}

// disjoint returns n intervals of 1 to 16 pages that do not overlap, sorted,
// with values 0 to n-1. Before each there is room for up to 15 pages.
func disjoint(r *rand.Rand, n int) []entry {
	entries := make([]entry, n)
	at := uint64(1 << 32)
	for i := range entries {
		at += r.Uint64N(16) * page
		last := at + (1+r.Uint64N(16))*page - 1
		entries[i] = entry{at, last, i}
		at = last + 1
	}
	return entries
}

// shuffled returns the entries in random order.
func shuffled(r *rand.Rand, entries []entry) []entry {
	entries = slices.Clone(entries)
	r.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
	return entries
}

func newBTree() *btree.BTreeG[entry] {
	return btree.NewG(32, func(a, b entry) bool { return a.first < b.first })
}

// BenchmarkStab times finding the one interval of n disjoint ones that has a
// given number, which is random. A btree ordered by the begin can do that only
// because they are disjoint: it looks at the predecessor of the number.
func BenchmarkStab(b *testing.B) {
	for _, size := range benchSizes {
		r := rand.New(rand.NewPCG(1, uint64(size.n)))
		entries := disjoint(r, size.n)
		stabs := make([]entry, 1<<20)
		for i := range stabs {
			e := entries[r.IntN(len(entries))]
			at := e.first + r.Uint64N(e.last-e.first+1)
			stabs[i] = entry{at, at, e.v}
		}
		run := func(impl string, stab func(at uint64) (found int)) {
			b.Run(fmt.Sprintf("n=%s/impl=%s", size.name, impl), func(b *testing.B) {
				for i := 0; b.Loop(); i++ {
					s := &stabs[i%len(stabs)]
					if v := stab(s.first); v != s.v {
						b.Fatalf("a stab of %#x finds %d, not %d", s.first, v, s.v)
					}
				}
			})
		}

		var tree Tree[int]
		ordered := newBTree()
		for _, e := range shuffled(r, entries) {
			tree.Insert(e.first, e.last, e.v)
			ordered.ReplaceOrInsert(e)
		}
		run("tree", func(at uint64) int {
			found := -1
			for v := range tree.Overlapping(at, at) {
				found = v
			}
			return found
		})
		run("btree", func(at uint64) int {
			found := -1
			ordered.DescendLessOrEqual(entry{first: at}, func(e entry) bool {
				if e.last >= at {
					found = e.v
				}
				return false
			})
			return found
		})
		if size.n < 1e6 { // there it takes about a millisecond
			run("scan", func(at uint64) int {
				found := -1
				for i := range entries {
					if e := &entries[i]; e.first <= at && at <= e.last {
						found = e.v
					}
				}
				return found
			})
		}
	}
}

// BenchmarkOverlaps times the question whether a page of n disjoint intervals is
// in any of them; the half of the pages that are asked for are.
func BenchmarkOverlaps(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("n=%s/impl=tree", size.name), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, uint64(size.n)))
			entries := disjoint(r, size.n)
			var tree Tree[int]
			for _, e := range shuffled(r, entries) {
				tree.Insert(e.first, e.last, e.v)
			}
			stabs := make([]uint64, 1<<20)
			begin, end := entries[0].first, entries[size.n-1].last
			for i := range stabs {
				stabs[i] = begin + r.Uint64N(end-begin)
			}
			for i := 0; b.Loop(); i++ {
				at := stabs[i%len(stabs)]
				tree.Overlaps(at, at)
			}
		})
	}
}

// BenchmarkInsertDelete times the deletion of a random one of n intervals and
// its insertion: both together.
func BenchmarkInsertDelete(b *testing.B) {
	for _, size := range benchSizes {
		r := rand.New(rand.NewPCG(1, uint64(size.n)))
		entries := shuffled(r, disjoint(r, size.n))
		b.Run(fmt.Sprintf("n=%s/impl=tree", size.name), func(b *testing.B) {
			var tree Tree[int]
			for _, e := range entries {
				tree.Insert(e.first, e.last, e.v)
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				e := &entries[i%len(entries)]
				tree.Delete(e.first, e.last, e.v)
				tree.Insert(e.first, e.last, e.v)
			}
		})
		b.Run(fmt.Sprintf("n=%s/impl=btree", size.name), func(b *testing.B) {
			tree := newBTree()
			for _, e := range entries {
				tree.ReplaceOrInsert(e)
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				e := &entries[i%len(entries)]
				tree.Delete(*e)
				tree.ReplaceOrInsert(*e)
			}
		})
	}
}

// BenchmarkShape times trees of a million intervals of which all overlap, or
// many: a stab at a place where there are no more than four to be found, and a
// deletion with an insertion.
func BenchmarkShape(b *testing.B) {
	const n = 1_000_000
	stabs := map[string]func(r *rand.Rand) uint64{
		"nested":           func(r *rand.Rand) uint64 { return r.Uint64N(4) },
		"same first":       func(r *rand.Rand) uint64 { return n - 1 - r.Uint64N(4) },
		"same last":        func(r *rand.Rand) uint64 { return r.Uint64N(4) },
		"same":             nil, // all or none
		"long among short": func(r *rand.Rand) uint64 { return r.Uint64N(3 * 64) },
	}
	for _, shape := range shapes {
		stab, ok := stabs[shape.name]
		if !ok {
			continue
		}
		r := rand.New(rand.NewPCG(1, 1))
		entries := shuffled(r, entriesOf(r, shape.nth, n))
		var tree Tree[int]
		for _, e := range entries {
			tree.Insert(e.first, e.last, e.v)
		}
		if stab != nil {
			b.Run(fmt.Sprintf("shape=%s/op=stab", shape.name), func(b *testing.B) {
				for b.Loop() {
					at, hits := stab(r), 0
					for range tree.Overlapping(at, at) {
						hits++
					}
					if hits == 0 || hits > 4 {
						b.Fatalf("a stab of %d finds %d", at, hits)
					}
				}
			})
		}
		b.Run(fmt.Sprintf("shape=%s/op=insertdelete", shape.name), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				e := &entries[i%len(entries)]
				if !tree.Delete(e.first, e.last, e.v) {
					b.Fatalf("%v is not found", e)
				}
				tree.Insert(e.first, e.last, e.v)
			}
		})
	}
}

// BenchmarkFill reports what an interval costs in a tree of a million: the time
// to insert it, and bytes of memory.
func BenchmarkFill(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	entries := disjoint(r, 1e6)
	for _, order := range []struct {
		name    string
		entries []entry
	}{{"ascending", entries}, {"random", shuffled(r, entries)}} {
		b.Run("order="+order.name, func(b *testing.B) {
			var before, after runtime.MemStats
			for b.Loop() {
				runtime.GC()
				runtime.ReadMemStats(&before)
				var tree Tree[int]
				for _, e := range order.entries {
					tree.Insert(e.first, e.last, e.v)
				}
				runtime.GC()
				runtime.ReadMemStats(&after)
				runtime.KeepAlive(&tree)
			}
			n := float64(len(entries))
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/n/float64(b.N), "ns/interval")
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/interval")
		})
	}
}
