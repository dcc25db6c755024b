package dirty

import (
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/srcu"
)

const chunk = chunkFrames

func TestRanges(t *testing.T) {
	all := gfns(0, Limit)
	for name, tt := range map[string]struct {
		add, remove, want []addr.GFNRange
		bytes             uint64 // of bitmaps
	}{
		"nothing":                       {},
		"an empty range":                {add: []addr.GFNRange{gfns(4, 4)}},
		"a range that ends too early":   {add: []addr.GFNRange{gfns(9, 4), gfns(Limit+9, 4)}},
		"start is inclusive":            {add: []addr.GFNRange{gfns(4, 9)}, remove: []addr.GFNRange{gfns(0, 5)}, want: []addr.GFNRange{gfns(5, 9)}, bytes: bitmapBytes},
		"end is exclusive":              {add: []addr.GFNRange{gfns(4, 9)}, remove: []addr.GFNRange{gfns(8, 99)}, want: []addr.GFNRange{gfns(4, 8)}, bytes: bitmapBytes},
		"remove an empty range":         {add: []addr.GFNRange{gfns(4, 9)}, remove: []addr.GFNRange{gfns(6, 6), gfns(8, 5)}, want: []addr.GFNRange{gfns(4, 9)}, bytes: bitmapBytes},
		"remove what is not there":      {add: []addr.GFNRange{gfns(4, 9)}, remove: []addr.GFNRange{gfns(chunk, 2*chunk)}, want: []addr.GFNRange{gfns(4, 9)}, bytes: bitmapBytes},
		"ranges that touch are one":     {add: []addr.GFNRange{gfns(4, 9), gfns(9, 12)}, want: []addr.GFNRange{gfns(4, 12)}, bytes: bitmapBytes},
		"across a word border":          {add: []addr.GFNRange{gfns(60, 70)}, want: []addr.GFNRange{gfns(60, 70)}, bytes: bitmapBytes},
		"a whole word":                  {add: []addr.GFNRange{gfns(64, 128)}, want: []addr.GFNRange{gfns(64, 128)}, bytes: bitmapBytes},
		"across a chunk border":         {add: []addr.GFNRange{gfns(chunk-1, chunk+1)}, want: []addr.GFNRange{gfns(chunk-1, chunk+1)}, bytes: 2 * bitmapBytes},
		"a whole chunk has no bitmap":   {add: []addr.GFNRange{gfns(chunk, 2*chunk)}, want: []addr.GFNRange{gfns(chunk, 2*chunk)}},
		"nor has one made of pieces":    {add: []addr.GFNRange{gfns(chunk, chunk+9), gfns(chunk+9, 2*chunk)}, want: []addr.GFNRange{gfns(chunk, 2*chunk)}},
		"nor has one that is emptied":   {add: []addr.GFNRange{gfns(chunk, chunk+9)}, remove: []addr.GFNRange{gfns(chunk, chunk+9)}},
		"whole chunks touch":            {add: []addr.GFNRange{gfns(0, chunk), gfns(2*chunk, 3*chunk), gfns(chunk, 2*chunk)}, want: []addr.GFNRange{gfns(0, 3*chunk)}},
		"over bitmaps and whole chunks": {add: []addr.GFNRange{gfns(5, 9), gfns(chunk, 2*chunk), gfns(2*chunk+5, 2*chunk+6), gfns(0, 4*chunk)}, want: []addr.GFNRange{gfns(0, 4*chunk)}},
		"the last frame":                {add: []addr.GFNRange{gfns(Limit-1, Limit)}, want: []addr.GFNRange{gfns(Limit-1, Limit)}, bytes: bitmapBytes},
		"everything":                    {add: []addr.GFNRange{all}, want: []addr.GFNRange{all}},
		"everything but a frame":        {add: []addr.GFNRange{all}, remove: []addr.GFNRange{gfns(chunk+7, chunk+8)}, want: []addr.GFNRange{gfns(0, chunk+7), gfns(chunk+8, Limit)}, bytes: bitmapBytes},
		"everything but some chunks":    {add: []addr.GFNRange{all}, remove: []addr.GFNRange{gfns(chunk, 9*chunk)}, want: []addr.GFNRange{gfns(0, chunk), gfns(9*chunk, Limit)}},
		"everything but everything":     {add: []addr.GFNRange{all}, remove: []addr.GFNRange{gfns(0, Limit+9)}},
		"the inside of whole chunks":    {add: []addr.GFNRange{gfns(0, 4*chunk)}, remove: []addr.GFNRange{gfns(chunk-1, 3*chunk+1)}, want: []addr.GFNRange{gfns(0, chunk-1), gfns(3*chunk+1, 4*chunk)}, bytes: 2 * bitmapBytes},
	} {
		t.Run(name, func(t *testing.T) {
			s := setOf(tt.add...)
			for _, r := range tt.remove {
				s.RemoveRange(r)
			}
			if got := slices.Collect(s.Runs()); !slices.Equal(got, tt.want) {
				t.Errorf("%v without %v is %v, want %v", tt.add, tt.remove, got, tt.want)
			}
			if got := s.Bytes() - uint64(cap(s.spans))*spanBytes; got != tt.bytes {
				t.Errorf("%v without %v has %d bytes of bitmaps, want %d", tt.add, tt.remove, got, tt.bytes)
			}
			if err := s.Check(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRunsIn(t *testing.T) {
	s := setOf(gfns(10, 20), gfns(60, 70), gfns(chunk-4, 3*chunk), gfns(1<<30, 1<<31))
	for name, tt := range map[string]struct {
		in   addr.GFNRange
		want []addr.GFNRange
	}{
		"all":                  {in: gfns(0, Limit), want: []addr.GFNRange{gfns(10, 20), gfns(60, 70), gfns(chunk-4, 3*chunk), gfns(1<<30, 1<<31)}},
		"beyond all":           {in: gfns(1<<31, ^addr.GFN(0))},
		"beyond Limit":         {in: gfns(Limit, ^addr.GFN(0))},
		"an empty range":       {in: gfns(12, 12)},
		"start is inclusive":   {in: gfns(19, 60), want: []addr.GFNRange{gfns(19, 20)}},
		"end is exclusive":     {in: gfns(20, 61), want: []addr.GFNRange{gfns(60, 61)}},
		"a gap":                {in: gfns(20, 60)},
		"inside one range":     {in: gfns(62, 66), want: []addr.GFNRange{gfns(62, 66)}},
		"from inside to whole": {in: gfns(chunk-2, 2*chunk+5), want: []addr.GFNRange{gfns(chunk-2, 2*chunk+5)}},
		"inside whole chunks":  {in: gfns(chunk+7, chunk+9), want: []addr.GFNRange{gfns(chunk+7, chunk+9)}},
		"from a gap on":        {in: gfns(3*chunk, 1<<30+1), want: []addr.GFNRange{gfns(1<<30, 1<<30+1)}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := slices.Collect(s.RunsIn(tt.in)); !slices.Equal(got, tt.want) {
				t.Errorf("RunsIn(%v) of %v = %v, want %v", tt.in, s, got, tt.want)
			}
		})
	}
	all := slices.Collect(s.Runs())
	for n := range all { // a loop that ends early is not called again, or it panics
		var got []addr.GFNRange
		for r := range s.Runs() {
			if got = append(got, r); len(got) > n {
				break
			}
		}
		if !slices.Equal(got, all[:n+1]) {
			t.Errorf("the first %d runs of %v are %v", n+1, s, got)
		}
	}
}

func TestAddBitmap(t *testing.T) {
	const some = 0x8000000000000005
	for name, tt := range map[string]struct {
		before []addr.GFNRange
		start  addr.GFN
		words  []uint64
		want   []addr.GFNRange
	}{
		"no words":           {start: 5},
		"no bits":            {start: Limit, words: []uint64{0, 0}},
		"aligned":            {start: 64, words: []uint64{some}, want: []addr.GFNRange{gfns(64, 65), gfns(66, 67), gfns(127, 128)}},
		"not aligned":        {start: 3, words: []uint64{some}, want: []addr.GFNRange{gfns(3, 4), gfns(5, 6), gfns(66, 67)}},
		"one word to two":    {start: 63, words: []uint64{3}, want: []addr.GFNRange{gfns(63, 65)}},
		"not aligned, zeros": {start: 3, words: []uint64{0, 0, 1}, want: []addr.GFNRange{gfns(131, 132)}},
		"two chunks":         {start: chunk - 64, words: []uint64{1 << 63, 1}, want: []addr.GFNRange{gfns(chunk-1, chunk+1)}},
		"two chunks, by one": {start: chunk - 1, words: []uint64{3}, want: []addr.GFNRange{gfns(chunk-1, chunk+1)}},
		"to what is there":   {before: []addr.GFNRange{gfns(0, 4)}, start: 0, words: []uint64{0xff}, want: []addr.GFNRange{gfns(0, 8)}},
		"to a whole chunk":   {before: []addr.GFNRange{gfns(0, chunk)}, start: 9, words: []uint64{some}, want: []addr.GFNRange{gfns(0, chunk)}},
		"completes a chunk":  {before: []addr.GFNRange{gfns(1, chunk)}, words: []uint64{1}, want: []addr.GFNRange{gfns(0, chunk)}},
		"whole chunks":       {start: 7, words: slices.Repeat([]uint64{^uint64(0)}, 3*chunkWords), want: []addr.GFNRange{gfns(7, 3*chunk+7)}},
		"up to Limit":        {start: Limit - 70, words: []uint64{1, 1 << 5}, want: []addr.GFNRange{gfns(Limit-70, Limit-69), gfns(Limit-1, Limit)}},
	} {
		t.Run(name, func(t *testing.T) {
			s := setOf(tt.before...)
			s.AddBitmap(tt.start, tt.words)
			if got := slices.Collect(s.Runs()); !slices.Equal(got, tt.want) {
				t.Errorf("AddBitmap(%v, %#x) to %v makes %v, want %v", tt.start, tt.words, tt.before, got, tt.want)
			}
			if err := s.Check(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFramesAboveLimit: to add one is a panic, and changes nothing. To look for
// one, or remove it, is not.
func TestFramesAboveLimit(t *testing.T) {
	var s Set
	l := NewLog(srcu.New())
	for name, tt := range map[string]struct {
		do   func()
		want string
	}{
		"Add":           {func() { s.Add(Limit) }, "dirty: Add of gfn 0x10000000000, which is not below gfn 0x10000000000"},
		"Add, the last": {func() { s.Add(^addr.GFN(0)) }, "dirty: Add of gfn 0xffffffffffffffff, which is not below gfn 0x10000000000"},
		"AddRange":      {func() { s.AddRange(gfns(0, Limit+1)) }, "dirty: AddRange of gfn [0x0, 0x10000000001), which is not below gfn 0x10000000000"},
		"AddBitmap":     {func() { s.AddBitmap(Limit-1, []uint64{2}) }, "dirty: AddBitmap of gfn [0xffffffffff, 0x10000000001), which is not below gfn 0x10000000000"},
		"AddBitmap, wraps": {func() { s.AddBitmap(^addr.GFN(0), []uint64{3}) },
			"dirty: AddBitmap of gfn [0xffffffffffffffff, 0x1), which is not below gfn 0x10000000000"},
		"Mark":      {func() { l.Mark(Limit) }, "dirty: Mark of gfn 0x10000000000, which is not below gfn 0x10000000000"},
		"MarkRange": {func() { l.MarkRange(gfns(0, Limit+1)) }, "dirty: MarkRange of gfn [0x0, 0x10000000001), which is not below gfn 0x10000000000"},
		"Discard":   {func() { l.Discard(gfns(0, Limit+1)) }, "dirty: Discard of gfn [0x0, 0x10000000001), which is not below gfn 0x10000000000"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := gvmtest.Panics(tt.do); got != tt.want {
				t.Errorf("it panics with %q, want %q", got, tt.want)
			}
		})
	}
	s.Remove(Limit)
	s.RemoveRange(gfns(Limit, Limit+4))
	if s.Contains(Limit) || s.Contains(^addr.GFN(0)) || !s.Empty() {
		t.Errorf("the set contains %v", &s)
	}
	if l.Contains(Limit) || l.Stats() != NewLog(srcu.New()).Stats() {
		t.Errorf("the log is not empty: %+v", l.Stats())
	}
}

func TestString(t *testing.T) {
	few := []addr.GFNRange{gfns(4, 6), gfns(8, 9)}
	many := slices.Clone(few)
	for gfn := addr.GFN(100); gfn < 200; gfn += 2 {
		many = append(many, gfns(gfn, gfn+1))
	}
	for name, tt := range map[string]struct {
		ranges []addr.GFNRange
		want   string
	}{
		"nothing":     {want: "no frames"},
		"one range":   {ranges: few[:1], want: "gfn [0x4, 0x6)"},
		"two ranges":  {ranges: few, want: "gfn [0x4, 0x6), gfn [0x8, 0x9)"},
		"many ranges": {ranges: many, want: "gfn [0x4, 0x6), gfn [0x8, 0x9), gfn [0x64, 0x65), gfn [0x66, 0x67), gfn [0x68, 0x69), gfn [0x6a, 0x6b), gfn [0x6c, 0x6d), gfn [0x6e, 0x6f) and 44 frames more"},
	} {
		if got := setOf(tt.ranges...).String(); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}

// TestSetsShareNothing changes a set after each operation with another one, and
// looks at the other.
func TestSetsShareNothing(t *testing.T) {
	ranges := []addr.GFNRange{gfns(4, 9), gfns(chunk, 3*chunk+7), gfns(8*chunk+1, 8*chunk+2)}
	for name, with := range map[string]func(o *Set) *Set{
		"Clone":     (*Set).Clone,
		"Union":     func(o *Set) *Set { s := new(Set); s.Union(o); return s },
		"Intersect": func(o *Set) *Set { s := setOf(gfns(0, Limit)); s.Intersect(o); return s },
		"Subtract":  func(o *Set) *Set { s := setOf(gfns(0, Limit)); s.Subtract(o); return s },
	} {
		t.Run(name, func(t *testing.T) {
			o := setOf(ranges...)
			s := with(o)
			s.AddRange(gfns(3, 9*chunk))
			s.RemoveRange(gfns(5, 8*chunk+2))
			if want := setOf(ranges...); !o.Equal(want) {
				t.Errorf("the other set is %v, want %v", o, want)
			}
			o.Clear()
			if s.Contains(5) || !s.Contains(8*chunk+5) {
				t.Errorf("the set is %v after a change of the other", s)
			}
		})
	}
	t.Run("with itself", func(t *testing.T) {
		s := setOf(ranges...)
		s.Union(s)
		s.Intersect(s)
		if want := setOf(ranges...); !s.Equal(want) {
			t.Errorf("Union and Intersect with itself make %v, want %v", s, want)
		}
		if s.Subtract(s); !s.Empty() {
			t.Errorf("a set without itself is %v", s)
		}
	})
}

// TestSetMemory: neither time nor memory depend on how long a range is.
func TestSetMemory(t *testing.T) {
	if got := reflect.TypeFor[span]().Size(); got != spanBytes {
		t.Errorf("a span is %d bytes, want %d", got, spanBytes)
	}
	s := setOf(gfns(0, Limit))
	s.RemoveRange(gfns(1<<28+1, 1<<29+1)) // 1 TiB
	if got, most := s.Bytes(), uint64(2*bitmapBytes+8*spanBytes); got > most {
		t.Errorf("%v takes %d bytes, want %d at most", s, got, most)
	}
	if got, want := s.Len(), uint64(Limit)-1<<28; got != want {
		t.Errorf("Len = %d, want %d", got, want)
	}
}

func TestSetAllocations(t *testing.T) {
	s := setOf(gfns(4, 9), gfns(60, 70), gfns(chunk-1, 3*chunk+1))
	words := []uint64{5, 0, 7}
	for name, f := range map[string]func(){
		"Add and Remove":           func() { s.Add(11); s.Remove(11) },
		"AddRange and RemoveRange": func() { s.AddRange(gfns(11, 50)); s.RemoveRange(gfns(11, 50)) },
		"AddBitmap":                func() { s.AddBitmap(4, words) },
		"Contains, Len, Equal":     func() { _ = s.Contains(11) || s.Len() == 0 || !s.Equal(s) },
		"Runs": func() {
			for r := range s.Runs() {
				runtime.KeepAlive(r)
			}
		},
		"RunsIn": func() {
			for r := range s.RunsIn(gfns(5, 2*chunk)) {
				runtime.KeepAlive(r)
			}
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestSetRandom plays the same operations on a set and on a map.
func TestSetRandom(t *testing.T) {
	r := gvmtest.Rand(t)
	const base, size = 2*chunk - 300, 600
	s, model := new(Set), map[addr.GFN]bool{}
	for step := range 4000 {
		start := base + addr.GFN(r.IntN(size))
		in := gfns(start, min(start+addr.GFN(r.IntN(1<<r.IntN(10))), base+size))
		switch op := r.IntN(6); op {
		case 0:
			s.Add(start)
			model[start] = true
		case 1:
			s.Remove(start)
			delete(model, start)
		case 2, 3:
			for gfn := in.Start; gfn < in.End; gfn++ {
				if model[gfn] = op == 2; op == 3 {
					delete(model, gfn)
				}
			}
			if op == 2 {
				s.AddRange(in)
			} else {
				s.RemoveRange(in)
			}
		default:
			words := make([]uint64, r.IntN(4))
			for i := range words {
				words[i] = r.Uint64() & r.Uint64() & r.Uint64()
				for b := range 64 {
					if words[i]>>b&1 != 0 {
						model[start+addr.GFN(64*i+b)] = true
					}
				}
			}
			s.AddBitmap(start, words)
		}
		if s.Contains(start) != model[start] || s.Len() != uint64(len(model)) {
			t.Fatalf("step %d: Contains(%v) = %v, Len = %d, want %v and %d", step, start, s.Contains(start), s.Len(), model[start], len(model))
		}
		if step%40 == 0 {
			compareWithMap(t, s, model)
		}
	}
	compareWithMap(t, s, model)
}

func compareWithMap(t *testing.T, s *Set, model map[addr.GFN]bool) {
	t.Helper()
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	var want []addr.GFNRange
	for gfn := range model {
		if !model[gfn-1] {
			end := gfn
			for model[end] {
				end++
			}
			want = append(want, gfns(gfn, end))
		}
	}
	slices.SortFunc(want, func(a, b addr.GFNRange) int { return int(int64(a.Start - b.Start)) })
	if diff := cmp.Diff(want, slices.Collect(s.Runs())); diff != "" {
		t.Fatalf("Runs (-map +set):\n%s", diff)
	}
}

// corners are the frames that programs speak of, and Limit. All of the frames
// from one corner up to the next are in a set, or none is.
var corners = slices.Concat(
	near(0, 0, 3), near(64, 2, 2), near(128, 1, 1),
	near(chunk, 2, 2), near(chunk+64, 1, 1), near(2*chunk, 1, 1), near(3*chunk, 1, 1), near(5*chunk, 1, 1),
	near(dirChunks*chunk, 1, 1), near(1<<39, 0, 1), near(Limit-chunk, 1, 1), near(Limit, 1, 0))

func near(gfn addr.GFN, before, after addr.GFN) (list []addr.GFN) {
	for at := gfn - before; at <= gfn+after; at++ {
		list = append(list, at)
	}
	return list
}

// corner returns one of the corners.
func corner(x byte) addr.GFN { return corners[int(x)%len(corners)] }

// between returns the range between two corners.
func between(x, y byte) addr.GFNRange {
	a, b := corner(x), corner(y)
	return gfns(min(a, b), max(a, b))
}

// model is a set that is obviously right: of the corners from which on the frames
// up to the next are in it.
type model map[addr.GFN]bool

func (m model) set(r addr.GFNRange, in bool) {
	for _, gfn := range corners {
		if r.Contains(gfn) {
			m[gfn] = in
		}
	}
}

func (m model) clone() model {
	c := model{}
	c.union(m)
	return c
}

func (m model) union(o model) {
	for gfn, in := range o {
		m[gfn] = m[gfn] || in
	}
}

func (m model) runsIn(r addr.GFNRange) (runs []addr.GFNRange) {
	for i, gfn := range corners[:len(corners)-1] {
		part := r.Intersect(gfns(gfn, corners[i+1]))
		if !m[gfn] || part.Empty() {
			continue
		}
		if n := len(runs); n > 0 && runs[n-1].End == part.Start {
			runs[n-1].End = part.End
		} else {
			runs = append(runs, part)
		}
	}
	return runs
}

// compare compares all that a set tells with its model.
func (m model) compare(t testing.TB, what string, s *Set) {
	t.Helper()
	if err := s.Check(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	want := m.runsIn(gfns(0, Limit))
	if got := slices.Collect(s.Runs()); !slices.Equal(got, want) {
		t.Fatalf("%s (-model +set):\n%s", what, cmp.Diff(want, got))
	}
	n := uint64(0)
	for _, r := range want {
		n += r.NPages()
	}
	if s.Len() != n || s.Empty() != (n == 0) {
		t.Fatalf("%s: Len = %d, Empty = %v, want %d frames", what, s.Len(), s.Empty(), n)
	}
	for i, gfn := range corners[:len(corners)-1] {
		if last := corners[i+1] - 1; s.Contains(gfn) != m[gfn] || s.Contains(last) != m[gfn] {
			t.Fatalf("%s: Contains of %v and %v = %v and %v, want %v", what, gfn, last, s.Contains(gfn), s.Contains(last), m[gfn])
		}
	}
}

// runSetProgram runs a program of four bytes an instruction on two sets and their
// models.
func runSetProgram(t testing.TB, prog []byte) {
	type both struct {
		set   *Set
		model model
	}
	b, o := both{new(Set), model{}}, both{new(Set), model{}}
	all := []both{b, o}
	for prog = prog[:min(len(prog), 4*64)]; len(prog) >= 4; prog = prog[4:] {
		op, x, y, v := prog[0], prog[1], prog[2], prog[3]
		r := between(x, y)
		switch op {
		case 'a':
			b.set.AddRange(r)
			b.model.set(r, true)
		case 'r':
			b.set.RemoveRange(r)
			b.model.set(r, false)
		case '+', '-': // one frame, if the corner is of one
			if gfn := corner(x); slices.Contains(corners, gfn+1) {
				b.model.set(gfns(gfn, gfn+1), op == '+')
				if op == '+' {
					b.set.Add(gfn)
				} else {
					b.set.Remove(gfn)
				}
			}
		case 'b': // the frames near a corner, by the bits of v, from some frame before it on
			start := corner(x) - min(corner(x), addr.GFN(y))
			words := make([]uint64, 6)
			for i, gfn := range corners[:len(corners)-1] {
				if at := uint64(gfn - start); gfn >= start && at < 6*64 && corners[i+1] == gfn+1 && v>>(i%8)&1 != 0 {
					words[at/64] |= 1 << (at % 64)
					b.model[gfn] = true
				}
			}
			b.set.AddBitmap(start, words)
		case 'u':
			b.set.Union(o.set)
			b.model.union(o.model)
		case 'i':
			b.set.Intersect(o.set)
			for gfn, in := range b.model {
				b.model[gfn] = in && o.model[gfn]
			}
		case 's':
			b.set.Subtract(o.set)
			for gfn, in := range b.model {
				b.model[gfn] = in && !o.model[gfn]
			}
		case 'x':
			b, o = o, b
		case 'c': // from here on the clone is the one that changes
			b = both{b.set.Clone(), b.model.clone()}
			all = append(all, b)
		case 'z':
			b.set.Clear()
			clear(b.model)
		}
		b.model.compare(t, string(op), b.set)
		if got, want := slices.Collect(b.set.RunsIn(r)), b.model.runsIn(r); !slices.Equal(got, want) {
			t.Fatalf("RunsIn(%v) of %v = %v, want %v", r, b.set, got, want)
		}
		if got, want := b.set.Equal(o.set), slices.Equal(b.model.runsIn(gfns(0, Limit)), o.model.runsIn(gfns(0, Limit))); got != want {
			t.Fatalf("Equal of %v and %v = %v, want %v", b.set, o.set, got, want)
		}
	}
	for _, b := range all {
		b.model.compare(t, "at the end", b.set)
	}
}

// FuzzSet runs programs on sets and models.
func FuzzSet(f *testing.F) {
	f.Add([]byte("a\x00\x05\x00" + "r\x02\x04\x00" + "c\x00\x00\x00" + "+\x01\x00\x00" + "-\x01\x00\x00"))
	f.Add([]byte("a\x00\x40\x00" + "x\x00\x00\x00" + "a\x0e\x1c\x00" + "x\x00\x00\x00" + "s\x00\x00\x00" + "u\x00\x00\x00"))
	f.Add([]byte("b\x0e\x07\xff" + "b\x05\x00\x55" + "x\x00\x00\x00" + "a\x05\x20\x00" + "i\x00\x00\x00" + "z\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, prog []byte) { runSetProgram(t, prog) })
}

// TestSetPrograms runs random programs.
func TestSetPrograms(t *testing.T) {
	r := gvmtest.Rand(t)
	for range 150 {
		runSetProgram(t, randomProgram(r, "aaarrr+-bbuisxc"))
	}
}

func randomProgram(r *rand.Rand, ops string) []byte {
	prog := make([]byte, 4*40)
	for i := range prog {
		if prog[i] = byte(r.Uint32()); i%4 == 0 {
			prog[i] = ops[r.IntN(len(ops))]
		}
	}
	return prog
}

// TestSetCheck breaks each invariant.
func TestSetCheck(t *testing.T) {
	b := new(bitmap)
	b.add(piece{0, 3, 9})
	for want, spans := range map[string][]span{
		"is empty or not below Limit":    {{4, 4, whole}},
		"chunks [0x1, 0x2000001)":        {{1, chunks + 1, whole}},
		"begins before the end":          {{4, 8, whole}, {7, 9, part{b, 6}}},
		"has no bitmap and 5 frames":     {{4, 5, part{nil, 5}}},
		"of whole chunks too":            {{4, 5, whole}, {5, 6, whole}},
		"has the bitmap of":              {{4, 5, part{b, 6}}, {8, 9, part{b, 6}}},
		"has one bitmap":                 {{4, 6, part{b, 6}}},
		"of 6 frames, and counts 5":      {{4, 5, part{b, 5}}},
		"has a bitmap for 0 frames":      {{4, 5, part{new(bitmap), 0}}},
		"has a bitmap for 32768 frames":  {{4, 5, part{ones(), chunkFrames}}},
		"span 1 of the set, chunks [0x9": {{4, 5, part{b, 6}}, {9, 9, whole}},
	} {
		s := Set{spans: spans}
		if err := s.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Check says %v, want %q in it", err, want)
		}
	}
}
