package interval

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
)

// entry is an interval and a value. Trees of tests have it as their value, so
// that a lookup tells all there is to know.
type entry struct {
	first, last uint64
	v           int
}

func (e entry) String() string { return fmt.Sprintf("[%#x, %#x]:%d", e.first, e.last, e.v) }

func compare(a, b entry) int {
	return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.last, b.last), cmp.Compare(a.v, b.v))
}

// model is a tree that is obviously right.
type model []entry

func (m *model) insert(e entry) { *m = append(*m, e) }

func (m *model) delete(e entry) bool {
	i := slices.Index(*m, e)
	if i < 0 {
		return false
	}
	(*m)[i] = (*m)[len(*m)-1]
	*m = (*m)[:len(*m)-1]
	return true
}

// overlapping returns what overlaps, in the order of compare.
func (m *model) overlapping(first, last uint64) []entry {
	var found []entry
	for _, e := range *m {
		if first <= last && e.first <= last && first <= e.last {
			found = append(found, e)
		}
	}
	slices.SortFunc(found, compare)
	return found
}

// both is a tree and its model.
type both struct {
	t     testing.TB
	tree  *Tree[entry]
	model model
}

func newBoth(t testing.TB, entries ...entry) *both {
	b := &both{t: t, tree: new(Tree[entry])}
	for _, e := range entries {
		b.insert(e)
	}
	return b
}

func (b *both) insert(e entry) {
	b.tree.Insert(e.first, e.last, e)
	b.model.insert(e)
}

func (b *both) delete(e entry) {
	b.t.Helper()
	if got, want := b.tree.Delete(e.first, e.last, e), b.model.delete(e); got != want {
		b.t.Fatalf("Delete of %v = %v, want %v", e, got, want)
	}
}

// stab compares lookups of a range.
func (b *both) stab(first, last uint64) {
	b.t.Helper()
	got := slices.Collect(b.tree.Overlapping(first, last))
	if !slices.IsSortedFunc(got, func(a, b entry) int { a.v, b.v = 0, 0; return compare(a, b) }) {
		b.t.Errorf("Overlapping(%#x, %#x) is not in order: %v", first, last, got)
	}
	slices.SortFunc(got, compare)
	want := b.model.overlapping(first, last)
	if !slices.Equal(got, want) {
		b.t.Fatalf("Overlapping(%#x, %#x), with the model's as want:\n%s", first, last, diff(want, got))
	}
	if got := b.tree.Overlaps(first, last); got != (len(want) > 0) {
		b.t.Fatalf("Overlaps(%#x, %#x) = %v, and the model finds %v", first, last, got, want)
	}
}

func (b *both) clone() *both { return &both{b.t, b.tree.Clone(), slices.Clone(b.model)} }

// check compares everything.
func (b *both) check() {
	b.t.Helper()
	if err := b.tree.Check(); err != nil {
		b.t.Fatal(err)
	}
	if b.tree.Len() != len(b.model) {
		b.t.Fatalf("Len = %d, want %d", b.tree.Len(), len(b.model))
	}
	b.stab(0, math.MaxUint64)
}

func diff(want, got []entry) string {
	return gocmp.Diff(want, got, gocmp.AllowUnexported(entry{}))
}

func TestLookup(t *testing.T) {
	const top = math.MaxUint64
	for name, tt := range map[string]struct {
		in, want    []entry
		first, last uint64
	}{
		"nothing":                       {first: 0, last: top},
		"first is inclusive":            {in: []entry{{4, 6, 1}}, first: 0, last: 4, want: []entry{{4, 6, 1}}},
		"before first":                  {in: []entry{{4, 6, 1}}, first: 0, last: 3},
		"last is inclusive":             {in: []entry{{4, 6, 1}}, first: 6, last: 9, want: []entry{{4, 6, 1}}},
		"after last":                    {in: []entry{{4, 6, 1}}, first: 7, last: 9},
		"inside":                        {in: []entry{{4, 6, 1}}, first: 5, last: 5, want: []entry{{4, 6, 1}}},
		"around":                        {in: []entry{{4, 6, 1}}, first: 0, last: 9, want: []entry{{4, 6, 1}}},
		"one number":                    {in: []entry{{4, 4, 1}}, first: 4, last: 4, want: []entry{{4, 4, 1}}},
		"the left neighbour":            {in: []entry{{4, 6, 1}, {7, 9, 2}}, first: 6, last: 6, want: []entry{{4, 6, 1}}},
		"the right neighbour":           {in: []entry{{4, 6, 1}, {7, 9, 2}}, first: 7, last: 7, want: []entry{{7, 9, 2}}},
		"both neighbours":               {in: []entry{{4, 6, 1}, {7, 9, 2}}, first: 6, last: 7, want: []entry{{4, 6, 1}, {7, 9, 2}}},
		"a gap":                         {in: []entry{{4, 6, 1}, {8, 9, 2}}, first: 7, last: 7},
		"a range that ends too early":   {in: []entry{{4, 6, 1}}, first: 6, last: 4},
		"everything, at 0":              {in: []entry{{0, top, 1}}, first: 0, last: 0, want: []entry{{0, top, 1}}},
		"everything, at the top":        {in: []entry{{0, top, 1}}, first: top, last: top, want: []entry{{0, top, 1}}},
		"everything, by everything":     {in: []entry{{0, top, 1}}, first: 0, last: top, want: []entry{{0, top, 1}}},
		"0":                             {in: []entry{{0, 0, 1}}, first: 0, last: 0, want: []entry{{0, 0, 1}}},
		"not 0":                         {in: []entry{{0, 0, 1}}, first: 1, last: top},
		"the top":                       {in: []entry{{top, top, 1}}, first: top, last: top, want: []entry{{top, top, 1}}},
		"not the top":                   {in: []entry{{top, top, 1}}, first: 0, last: top - 1},
		"a long one before a short one": {in: []entry{{0, 9, 1}, {1, 2, 2}}, first: 5, last: 5, want: []entry{{0, 9, 1}}},
		"by first, then by last":        {in: []entry{{4, 9, 1}, {4, 5, 2}, {2, 9, 3}}, first: 4, last: 4, want: []entry{{2, 9, 3}, {4, 5, 2}, {4, 9, 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			tree := newBoth(t, tt.in...)
			tree.check()
			if got := slices.Collect(tree.tree.Overlapping(tt.first, tt.last)); !slices.Equal(got, tt.want) {
				t.Errorf("Overlapping(%#x, %#x) of %v:\n%s", tt.first, tt.last, tt.in, diff(tt.want, got))
			}
			if got, want := tree.tree.Overlaps(tt.first, tt.last), len(tt.want) > 0; got != want {
				t.Errorf("Overlaps(%#x, %#x) of %v = %v, want %v", tt.first, tt.last, tt.in, got, want)
			}
		})
	}
}

func TestDelete(t *testing.T) {
	in := []entry{{4, 6, 1}, {4, 6, 2}, {4, 6, 2}, {4, 7, 1}}
	for name, tt := range map[string]struct {
		delete []entry
		absent entry
		left   []entry
	}{
		"another first": {absent: entry{3, 6, 1}, left: in},
		"another last":  {absent: entry{4, 5, 1}, left: in},
		"another value": {absent: entry{4, 6, 3}, left: in},
		"just the one":  {delete: in[:1], absent: in[0], left: in[1:]},
		"one of two":    {delete: in[1:2], absent: entry{4, 7, 2}, left: []entry{in[0], in[2], in[3]}},
		"two of two":    {delete: in[1:3], absent: in[1], left: []entry{in[0], in[3]}},
		"all":           {delete: in, absent: in[0]},
	} {
		t.Run(name, func(t *testing.T) {
			var tree Tree[int]
			for _, e := range in {
				tree.Insert(e.first, e.last, e.v)
			}
			for _, e := range tt.delete {
				if !tree.Delete(e.first, e.last, e.v) {
					t.Errorf("Delete of %v of %v = false, want true", e, in)
				}
			}
			if tree.Delete(tt.absent.first, tt.absent.last, tt.absent.v) {
				t.Errorf("Delete of %v = true, and it is absent", tt.absent)
			}
			if err := tree.Check(); err != nil {
				t.Error(err)
			}
			var got, want []int
			for _, e := range tt.left {
				want = append(want, e.v)
			}
			got = slices.Sorted(tree.Overlapping(0, 9))
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("%v without %v has the values %v, want %v", in, tt.delete, got, want)
			}
		})
	}
	if new(Tree[int]).Delete(0, 0, 0) {
		t.Error("Delete from an empty tree = true")
	}
}

func TestInsertPanics(t *testing.T) {
	var tree Tree[float64]
	for name, tt := range map[string]struct {
		insert func()
		want   string
	}{
		"backwards": {func() { tree.Insert(2, 1, 0) }, "interval: Insert of [0x2, 0x1], which ends before it begins"},
		"a NaN":     {func() { tree.Insert(1, 2, math.NaN()) }, "interval: Insert of a value that is not equal to itself"},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if got := recover(); got != tt.want {
					t.Errorf("Insert panics with %v, want %q", got, tt.want)
				}
				if tree.Len() != 0 {
					t.Errorf("Len = %d afterwards", tree.Len())
				}
			}()
			tt.insert()
		})
	}
}

// shapes are what trees are made of, and hard on some of them.
var shapes = []struct {
	name string
	nth  func(r *rand.Rand, i, n uint64) (first, last uint64)
}{
	{"random", func(r *rand.Rand, _, n uint64) (uint64, uint64) {
		first := r.Uint64N(4 * n)
		return first, first + r.Uint64N(16)
	}},
	{"ascending", func(_ *rand.Rand, i, _ uint64) (uint64, uint64) { return 2 * i, 2*i + 1 }},
	{"descending", func(_ *rand.Rand, i, n uint64) (uint64, uint64) { return 2 * (n - i), 2*(n-i) + 1 }},
	{"nested", func(_ *rand.Rand, i, n uint64) (uint64, uint64) { return i, 2*n - i }},
	{"unfolding", func(_ *rand.Rand, i, n uint64) (uint64, uint64) { return n - i, n + i }},
	{"same first", func(_ *rand.Rand, i, _ uint64) (uint64, uint64) { return 0, i }},
	{"same last", func(_ *rand.Rand, i, n uint64) (uint64, uint64) { return i, n }},
	{"same", func(*rand.Rand, uint64, uint64) (uint64, uint64) { return 7, 9 }},
	{"long among short", func(_ *rand.Rand, i, n uint64) (uint64, uint64) {
		if i%64 == 0 {
			return i, math.MaxUint64 - i
		}
		return i, i
	}},
}

func entriesOf(r *rand.Rand, nth func(*rand.Rand, uint64, uint64) (uint64, uint64), n int) []entry {
	entries := make([]entry, n)
	for i := range entries {
		first, last := nth(r, uint64(i), uint64(n))
		entries[i] = entry{first, last, i}
	}
	return entries
}

// seeded returns a source of random numbers and has the test name its seed if
// it fails.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// TestFillAndEmpty fills trees of three levels and empties them again, in
// several orders, and compares them with the model all the time.
func TestFillAndEmpty(t *testing.T) {
	const n = 1200
	for _, shape := range shapes {
		for _, order := range []string{"forwards", "backwards", "shuffled", "from the middle"} {
			t.Run(shape.name+"/"+order, func(t *testing.T) {
				r := seeded(t)
				entries := entriesOf(r, shape.nth, n)
				b := newBoth(t)
				step := func(i int) {
					t.Helper()
					if i%41 == 0 || len(b.model) < 3 {
						b.check()
						at := r.Uint64N(2 * n)
						b.stab(at, at)
						b.stab(at, at+r.Uint64N(n/4))
					}
				}
				for i, e := range entries {
					b.insert(e)
					step(i)
				}
				if b.tree.height < 2 {
					t.Errorf("%d entries have a tree of height %d", n, b.tree.height)
				}
				switch order {
				case "backwards":
					slices.Reverse(entries)
				case "shuffled":
					entries = shuffled(r, entries)
				case "from the middle":
					entries = slices.Concat(entries[n/3:], entries[:n/3])
				}
				for i, e := range entries {
					b.delete(e)
					step(i)
				}
				if b.tree.height != 0 || b.tree.Len() != 0 {
					t.Errorf("the empty tree has height %d and Len %d", b.tree.height, b.tree.Len())
				}
			})
		}
	}
}

// TestRandom inserts into and deletes from a tree that grows and shrinks.
func TestRandom(t *testing.T) {
	r := seeded(t)
	b := newBoth(t)
	for i := range 20_000 {
		if insert := r.IntN(100) < 70-i/4000%2*40; insert || len(b.model) == 0 {
			first := r.Uint64N(1000)
			b.insert(entry{first, first + r.Uint64N(1<<r.IntN(8)), r.IntN(3)})
		} else {
			b.delete(b.model[r.IntN(len(b.model))])
		}
		first := r.Uint64N(1100)
		b.stab(first, first+r.Uint64N(4))
		if i%100 == 0 {
			b.check()
		}
	}
	for len(b.model) > 0 {
		b.delete(b.model[r.IntN(len(b.model))])
	}
	b.check()
}

// TestClone changes trees that share nodes, each of which keeps its own entries.
func TestClone(t *testing.T) {
	r := seeded(t)
	family := []*both{newBoth(t)}
	for i := range 10_000 {
		b := family[r.IntN(len(family))]
		if insert := r.IntN(100) < 60; insert || len(b.model) == 0 {
			first := r.Uint64N(1000)
			b.insert(entry{first, first + r.Uint64N(1<<r.IntN(8)), r.IntN(3)})
		} else {
			b.delete(b.model[r.IntN(len(b.model))])
		}
		if i%100 == 0 {
			family = append(family, b.clone())
			if len(family) > 8 {
				family = slices.Delete(family, 0, 1+r.IntN(4))
			}
			for _, b := range family {
				b.check()
			}
		}
	}
}

// TestCloneWhileReading looks a tree up while others change clones of it.
func TestCloneWhileReading(t *testing.T) {
	const n = 1000
	b := newBoth(t, entriesOf(nil, shapes[1].nth, n)...)
	next := b.tree.Clone()
	var reader sync.WaitGroup
	reader.Go(func() {
		for range 100 {
			if got := len(slices.Collect(b.tree.Overlapping(0, math.MaxUint64))); got != n {
				t.Errorf("a lookup finds %d entries, want %d", got, n)
			}
		}
	})
	for range 10 {
		for _, e := range b.model[:n/2] {
			next.Delete(e.first, e.last, e)
		}
		next = b.tree.Clone()
	}
	reader.Wait()
	b.check()
}

// TestEqualHashes has hashes collide, which they hardly ever do by themselves.
func TestEqualHashes(t *testing.T) {
	for hashes := range 4 {
		t.Run(fmt.Sprintf("hashes=%d", hashes+1), func(t *testing.T) {
			r := seeded(t)
			b := newBoth(t)
			b.tree.hash = func(e entry) uint64 { return uint64(e.v % (hashes + 1)) }
			for i := range 400 {
				b.insert(entry{7, 7 + uint64(i%2), i / 2})
			}
			b.check()
			for i, e := range shuffled(r, b.model) {
				b.delete(entry{7, 7, 400 + i})
				b.delete(e)
				if i%10 == 0 {
					b.check()
				}
			}
			b.check()
		})
	}
}

// FuzzTree runs programs of four bytes an instruction on a tree and its model.
func FuzzTree(f *testing.F) {
	f.Add([]byte("\x00" + "i\x04\x06\x00" + "i\x04\x06\x00" + "d\x04\x06\x00" + "s\x06\x07\x00"))
	f.Add([]byte("\x00" + "i\x00\xff\x00" + "i\xff\xff\x00" + "i\x00\x00\x01" + "s\xfe\xff\x00" + "D\x00\x03\x00"))
	f.Add([]byte("\x00" + "I\x10\x01\x00" + "I\x10\x01\x01" + "D\x20\x30\x00" + "D\x00\x30\x00"))
	f.Add([]byte("\x00" + "I\x30\x01\x00" + "c\x00\x00\x00" + "D\x04\x20\x00" + "c\x00\x00\x00" + "I\x30\x01\x01"))
	f.Add([]byte("\x02" + "I\x10\x00\x00" + "I\x10\x00\x00" + "D\x20\x30\x00" + "d\x10\x10\x00"))
	f.Fuzz(func(t *testing.T, prog []byte) {
		if len(prog) == 0 {
			return
		}
		b := newBoth(t)
		if hashes := uint64(prog[0] % 4); hashes > 0 {
			b.tree.hash = func(e entry) uint64 { return uint64(e.v) % hashes }
		}
		number := func(b byte) uint64 { // both ends of the range
			return uint64(int64(int8(b)))
		}
		var clones []*both
		for prog = prog[1:min(len(prog), 1+4*64)]; len(prog) >= 4; prog = prog[4:] {
			op, x, y, v := prog[0], prog[1], prog[2], int(prog[3])
			first, last := number(x), number(y)
			e := entry{min(first, last), max(first, last), v % 4}
			switch op {
			case 'i':
				b.insert(e)
			case 'd':
				b.delete(e)
			case 'I': // x of them, y apart from each other
				for i := range uint64(x) {
					b.insert(entry{i * uint64(y), i*uint64(y) + uint64(v), v})
				}
			case 'c': // from here on the clone is the one that changes
				clones = append(clones, b)
				b = b.clone()
			case 'D': // y of them, in the order in which they come
				all := b.model.overlapping(0, math.MaxUint64)
				from := min(int(x), len(all))
				for _, e := range all[from:min(from+int(y), len(all))] {
					b.delete(e)
				}
			}
			b.stab(first, last)
			b.stab(last, last)
			b.check()
		}
		for _, b := range clones {
			b.check()
		}
	})
}

// TestLookupsSkip takes away all nodes that lookups have no business with: those
// they would visit in vain if they took more than O(log n).
func TestLookupsSkip(t *testing.T) {
	const n = 5000
	r := seeded(t)
	for _, shape := range shapes {
		t.Run(shape.name, func(t *testing.T) {
			b := newBoth(t, entriesOf(r, shape.nth, n)...)
			whole := b.tree.root
			for range 50 {
				first := r.Uint64N(2*n + 10)
				last := first + r.Uint64N(3)
				hits := len(b.model.overlapping(first, last))

				// Overlapping visits a node for a hit or because it may hold the
				// last entry that begins in time.
				kept := 0
				b.tree.root = keep(whole, &kept, func(in *inner[entry], i int) bool {
					return in.first[i] <= last && in.max[i] >= first
				})
				got := 0
				for range b.tree.Overlapping(first, last) {
					got++
				}
				if got != hits {
					t.Errorf("Overlapping(%d, %d) finds %d, want %d", first, last, got, hits)
				}
				if most := (1 + hits) * (1 + b.tree.height); kept > most {
					t.Errorf("Overlapping(%d, %d) visits %d nodes for %d hits, want at most %d", first, last, kept, hits, most)
				}

				// Overlaps visits one node of each level.
				b.tree.root = keep(whole, new(int), func(in *inner[entry], i int) bool {
					return in.first[i] <= last && (i+1 == in.n || in.first[i+1] > last)
				})
				if got := b.tree.Overlaps(first, last); got != (hits > 0) {
					t.Errorf("Overlaps(%d, %d) = %v, want %v", first, last, got, hits > 0)
				}

				// So does Delete, of what is absent too, unless hashes collide.
				absent := b.model[r.IntN(n)]
				absent.v = -1
				k := key{absent.first, absent.last, b.tree.hash(absent)}
				b.tree.root = keep(whole, new(int), func(in *inner[entry], i int) bool {
					return i == in.search(k)-1
				})
				if b.tree.Delete(absent.first, absent.last, absent) {
					t.Errorf("Delete of %v = true", absent)
				}
			}
		})
	}
}

// keep returns a copy of nd without the children that may reports false of; to
// visit one of those is to follow a nil pointer. It counts the nodes kept.
func keep(nd node[entry], kept *int, may func(in *inner[entry], i int) bool) node[entry] {
	*kept++
	if nd.inner == nil {
		return nd
	}
	in := *nd.inner
	for i := range in.n {
		if may(&in, i) {
			in.child[i] = keep(in.child[i], kept, may)
		} else {
			in.child[i] = node[entry]{}
		}
	}
	return node[entry]{inner: &in}
}

// TestMend deletes an entry from a node with as few as it may have, next to nodes
// of several sizes, which are leaves or the parents of leaves.
func TestMend(t *testing.T) {
	for _, tt := range []struct {
		sizes  []int
		at     int // of the node that loses one
		merged bool
	}{
		{[]int{8, 8}, 0, true},
		{[]int{8, 8}, 1, true},
		{[]int{8, 24}, 0, true},
		{[]int{24, 8}, 1, true},
		{[]int{8, 25}, 0, false},
		{[]int{25, 8}, 1, false},
		{[]int{8, 31}, 0, false},
		{[]int{31, 8}, 1, false},
		{[]int{31, 8, 8}, 1, true},
		{[]int{8, 8, 31}, 1, false},
		{[]int{31, 8, 31}, 1, false},
		{[]int{8, 31, 8}, 2, false},
	} {
		for _, level := range []string{"leaves", "inner nodes"} {
			t.Run(fmt.Sprintf("%s/%v at %d", level, tt.sizes, tt.at), func(t *testing.T) {
				b := newBoth(t)
				b.tree.hash = func(e entry) uint64 { return uint64(e.v) }
				newLeaf := func(n int) node[entry] {
					l := new(leaf[entry])
					for i := range n {
						at := uint64(len(b.model))
						e := entry{at, 2000 - at, i}
						l.put(i, key{first: e.first, last: e.last}, e)
						b.model.insert(e)
						b.tree.len++
					}
					return node[entry]{leaf: l}
				}
				parent := func(n int, child func(i int) node[entry]) node[entry] {
					in := new(inner[entry])
					for i := range n {
						in.put(i, child(i))
						b.tree.describe(in, i)
					}
					return node[entry]{inner: in}
				}
				height := 1
				root := parent(len(tt.sizes), func(i int) node[entry] {
					if level == "leaves" {
						return newLeaf(tt.sizes[i])
					}
					height = 2
					return parent(tt.sizes[i], func(int) node[entry] { return newLeaf(minimum) })
				})
				b.tree.root, b.tree.height = root, height
				b.check()

				victim := root.inner.key(tt.at).first
				b.delete(b.model[victim])
				b.check()
				want := len(tt.sizes)
				if tt.merged {
					want--
				}
				if want == 1 {
					height--
				} else if got := b.tree.root.len(); got != want {
					t.Errorf("%d of the nodes are left, want %d", got, want)
				}
				if b.tree.height != height {
					t.Errorf("the height is %d, want %d", b.tree.height, height)
				}
			})
		}
	}
}

// TestOneIdentical deletes from so many identical intervals that to look for the
// value among them would take minutes.
func TestOneIdentical(t *testing.T) {
	const n = 100_000
	var tree Tree[int]
	for i := range n {
		tree.Insert(7, 9, i)
	}
	for i := range n {
		if !tree.Delete(7, 9, i) {
			t.Fatalf("%d is not found", i)
		}
	}
	if tree.Len() != 0 {
		t.Errorf("Len = %d, want 0", tree.Len())
	}
}

func TestAllocs(t *testing.T) {
	var tree Tree[*entry]
	entries := entriesOf(rand.New(rand.NewPCG(1, 1)), shapes[0].nth, 10_000)
	for i := range entries {
		e := &entries[i]
		tree.Insert(e.first, e.last, e)
	}
	at, sum := uint64(0), 0
	for name, f := range map[string]func(){
		"a loop over Overlapping": func() {
			for e := range tree.Overlapping(at, at+100) {
				sum += e.v
			}
		},
		"a loop that breaks off": func() {
			for e := range tree.Overlapping(at, at+100) {
				sum += e.v
				break
			}
		},
		"Overlaps": func() {
			if tree.Overlaps(at, at) {
				sum++
			}
		},
		"Delete of what is absent": func() { tree.Delete(at, at, nil) },
	} {
		if n := testing.AllocsPerRun(100, func() { f(); at += 17 }); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
	if sum == 0 {
		t.Error("nothing was found")
	}
}

func TestBreak(t *testing.T) {
	b := newBoth(t, entriesOf(nil, shapes[1].nth, 1000)...)
	for _, n := range []int{1, 30, 31, 500, 1000} {
		got := 0
		for range b.tree.Overlapping(0, math.MaxUint64) {
			if got++; got == n {
				break
			}
		}
		if got != n {
			t.Errorf("a loop that is left at entry %d goes on to %d", n, got)
		}
	}
}

// TestReaders looks things up in many goroutines at once; the race detector
// says whether that writes anything.
func TestReaders(t *testing.T) {
	b := newBoth(t, entriesOf(nil, shapes[1].nth, 1000)...)
	var readers sync.WaitGroup
	for i := range uint64(4) {
		readers.Go(func() {
			for at := i; at < 2000; at += 7 {
				n := 0
				for range b.tree.Overlapping(at, at) {
					n++
				}
				if n != 1 || !b.tree.Overlaps(at, at) || b.tree.Len() != 1000 {
					t.Errorf("a stab of %d finds %d", at, n)
				}
			}
		})
	}
	readers.Wait()
}

// TestMemory holds the package comment to the sizes and the filling it promises.
func TestMemory(t *testing.T) {
	// The allocator adds a word to what has pointers and is larger than 512 bytes.
	for class, typ := range map[uintptr]reflect.Type{
		768:  reflect.TypeFor[leaf[*entry]](),
		1024: reflect.TypeFor[leaf[any]](),
		1536: reflect.TypeFor[inner[any]](),
	} {
		if typ.Size()+8 > class {
			t.Errorf("%v has %d bytes, too many for the size class of %d", typ, typ.Size(), class)
		}
	}
	for i, name := range []string{1: "ascending", 2: "descending"} {
		if name == "" {
			continue
		}
		const n = 10_000
		b := newBoth(t, entriesOf(nil, shapes[i].nth, n)...)
		leaves := 0
		var count func(nd node[entry])
		count = func(nd node[entry]) {
			if nd.leaf != nil {
				leaves++
				return
			}
			for _, child := range nd.inner.child[:nd.inner.n] {
				count(child)
			}
		}
		count(b.tree.root)
		if most := n/(fanout+1-minimum) + 1; leaves > most {
			t.Errorf("%d intervals in %s order take %d leaves, want at most %d", n, name, leaves, most)
		}
	}
}

// TestCheck breaks a sound tree in every way that Check knows.
func TestCheck(t *testing.T) {
	const n = 2000 // three levels: the root and its children are inner nodes
	for name, tt := range map[string]struct {
		want   string // in one of the errors
		damage func(t *Tree[entry])
	}{
		"Len":               {"Len is 2001, and there are 2000", func(t *Tree[entry]) { t.len++ }},
		"height":            {"is a leaf at height 1", func(t *Tree[entry]) { t.height++ }},
		"less height":       {"is an inner node at height 0", func(t *Tree[entry]) { t.height-- }},
		"no root":           {"without a root has height 2", func(t *Tree[entry]) { t.root = node[entry]{} }},
		"a lost child":      {"root[1] is nil", func(t *Tree[entry]) { t.root.inner.child[1] = node[entry]{} }},
		"a child too many":  {"root[30] is free, and not nil", func(t *Tree[entry]) { t.root.inner.child[fanout-1] = t.root.inner.child[0] }},
		"two kinds of node": {"root[1] is a leaf and an inner node", func(t *Tree[entry]) { t.root.inner.child[1].leaf = new(leaf[entry]) }},
		"a leaf too high":   {"root[1] is a leaf at height 1", func(t *Tree[entry]) { t.root.inner.child[1] = node[entry]{leaf: someLeaf(t)} }},
		"one child":         {"root has 1 entries, not 2 to 31", func(t *Tree[entry]) { t.root.inner.n = 1 }},
		"a leaf too empty":  {"root[1][2] has 7 entries, not 8 to 31", func(t *Tree[entry]) { someLeaf(t).n = minimum - 1 }},
		"a leaf too full":   {"root[1][2] has 32 entries, not 8 to 31", func(t *Tree[entry]) { someLeaf(t).n = fanout + 1 }},
		"first of a child":  {"root[1] begins with", func(t *Tree[entry]) { t.root.inner.first[1]-- }},
		"last of a tie":     {"root[1] begins with", func(t *Tree[entry]) { t.root.inner.rest[1].last++ }},
		"hash of a tie":     {"root[1] begins with", func(t *Tree[entry]) { t.root.inner.rest[1].hash++ }},
		"max too great":     {"root[1] goes up to", func(t *Tree[entry]) { t.root.inner.max[1]++ }},
		"max too small":     {"root[1][2] goes up to", func(t *Tree[entry]) { t.root.inner.child[1].inner.max[2]-- }},
		"a value kept":      {"root[1][2][30] is free, and not zero", func(t *Tree[entry]) { someLeaf(t).value[fanout-1] = entry{v: 1} }},
		"backwards": {"root[1][2][3] is [", func(t *Tree[entry]) {
			l := someLeaf(t)
			l.last[3] = l.first[3] - 1
		}},
		"order in a leaf": {"root[1][2][3] is {", func(t *Tree[entry]) {
			l := someLeaf(t)
			l.first[2], l.first[3] = l.first[3], l.first[2]
			l.last[2], l.last[3] = l.last[3], l.last[2]
			l.value[2], l.value[3] = l.value[3], l.value[2]
		}},
		"order of leaves": {"root[1][2][0] is {", func(t *Tree[entry]) {
			in := t.root.inner.child[1].inner
			in.child[1], in.child[2] = in.child[2], in.child[1]
			t.describe(in, 1)
			t.describe(in, 2)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBoth(t, entriesOf(nil, shapes[1].nth, n)...)
			b.check()
			tt.damage(b.tree)
			if err := b.tree.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Check = %v\nwant one with %q", err, tt.want)
			}
		})
	}
}

// someLeaf returns a leaf that is neither the first nor full.
func someLeaf(t *Tree[entry]) *leaf[entry] { return t.root.inner.child[1].inner.child[2].leaf }
