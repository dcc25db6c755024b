package hostops

import (
	"math/rand/v2"
	"slices"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
)

// RandomConfig describes a random stream.
type RandomConfig struct {
	Seed uint64

	// Pages is how many pages of RAM, from page 0 on, operations are about; at least 1. A
	// truncate, which the same step undoes, ends the memory file at one of them, and so
	// takes all that is behind it for that while.
	Pages uint64

	// Backing is that of RAM, which decides which operations there are. A file of the
	// caller's is not truncated, and one that is mapped privately stays as it is.
	Backing mm.Backing
	Spare   uint64 // pages of the spare region; 0: none, and nothing is moved

	// Missing is how many steps later, at most, pages that were taken are given back.
	// With 0 each step gives back what it takes. With more, whoever copies memory between
	// steps meets pages that cannot be read, and has to come back for them: those that were
	// only protected are not reported again.
	Missing int
}

// maxRun is how many pages an operation is about at most, but for a collapse.
const maxRun = 4

// hugePages is how many pages a collapse is about.
const hugePages = addr.HugeSize / addr.PageSize

// recipe is operations on some pages, one after the other.
type recipe struct {
	ops   []Op
	when  func(*RandomConfig) bool // whether there is such a thing; nil: always
	shape shape
}

// shape says which pages a recipe is for.
type shape uint8

const (
	here  shape = iota // a few that are there
	taken              // a few that are at home; the first operation takes them, and the second gives them back
	moved              // the same, and one page only
	left               // one page, which leaves a page of the spare region in use for a moment
	huge               // a huge page, all of which is at home
	tail               // those from one on; the first operation takes them, the second gives them back
)

var recipes = []recipe{
	{shape: taken, ops: []Op{{Kind: Unmap}, {Kind: Map}}},
	{shape: taken, ops: []Op{{Kind: Protect, Access: addr.NoAccess}, {Kind: Protect, Access: addr.ReadWrite}}},
	{shape: taken, ops: []Op{{Kind: Protect, Access: addr.Read}, {Kind: Protect, Access: addr.ReadWrite}}},
	{shape: taken, ops: []Op{{Kind: Guard}, {Kind: Unguard}}},
	{shape: moved, ops: []Op{{Kind: Remap}, {Kind: Remap, Back: true}}, when: (*RandomConfig).hasSpare},
	{shape: left, ops: []Op{{Kind: RemapKeep}}, when: (*RandomConfig).hasSpare},
	{shape: tail, ops: []Op{{Kind: Truncate}, {Kind: Truncate, Pages: Pages{Which: AllPages}}}, when: backedBy(mm.Memfd, mm.MemfdPrivate)},
	{shape: huge, ops: []Op{{Kind: Collapse}}, when: func(c *RandomConfig) bool { return c.Pages >= hugePages }},
	{ops: []Op{{Kind: Map}}},
	{ops: []Op{{Kind: Discard}}},
	{ops: []Op{{Kind: Punch}}, when: backedBy(mm.Memfd, mm.MemfdPrivate, mm.File)},
	{ops: []Op{{Kind: Remove}}, when: backedBy(mm.Memfd, mm.SharedAnonymous, mm.File)},
	// What a free leaves is uncertain until it is written: no two readers need see the same.
	{ops: []Op{{Kind: Free}, {Kind: Fill}}, when: backedBy(mm.Anonymous)},
	{ops: []Op{{Kind: Populate, Access: addr.Read}}},
	{ops: []Op{{Kind: Populate, Access: addr.ReadWrite}}},
	{ops: []Op{{Kind: PageOut}}},
	{ops: []Op{{Kind: Mergeable}, {Kind: Unmergeable}}},
	{ops: []Op{{Kind: Store}}},
	{ops: []Op{{Kind: Fill}}},
}

func (c *RandomConfig) hasSpare() bool { return c.Spare > 0 }

func backedBy(backings ...mm.Backing) func(*RandomConfig) bool {
	return func(c *RandomConfig) bool { return slices.Contains(backings, c.Backing) }
}

// Random is an endless stream of operations that take memory away and give it back, of
// all kinds that there are for the backing. The same configuration gives the same stream.
// No operation is about pages that are missing, but for the one that gives them back. One
// goroutine at a time uses it.
type Random struct {
	config  RandomConfig
	rng     *rand.Rand
	recipes []recipe
	step    int
	missing []missing // in the order in which they were taken
}

// missing is pages that have been taken or moved.
type missing struct {
	pages Range
	give  Op
	step  int // in which give is carried out
}

// NewRandom returns the stream that c describes.
func NewRandom(c RandomConfig) *Random {
	g := &Random{config: c, rng: rand.New(rand.NewPCG(c.Seed, 0))}
	for _, r := range recipes {
		if r.when == nil || r.when(&c) {
			g.recipes = append(g.recipes, r)
		}
	}
	return g
}

// Next returns the operations of the next step, at least one, which belong in this order.
// They name their pages by numbers.
func (g *Random) Next() (ops []Op) {
	g.step++
	ops = g.give(func(m missing) bool { return m.step <= g.step })
	r := g.recipes[g.rng.IntN(len(g.recipes))]
	if pages, ok := g.pages(r.shape); ok {
		return append(ops, g.follow(r, pages)...)
	}
	if len(ops) > 0 {
		return ops
	}
	// Too much is missing. There is room again when the first of it is back.
	first := g.missing[0]
	return g.give(func(m missing) bool { return m == first })
}

// give returns what gives back the pages for which due is true.
func (g *Random) give(due func(missing) bool) (ops []Op) {
	g.missing = slices.DeleteFunc(g.missing, func(m missing) bool {
		if due(m) {
			ops = append(ops, m.give)
		}
		return due(m)
	})
	return ops
}

// follow returns the operations of r on some pages, but for those that are for a later step.
func (g *Random) follow(r recipe, pages Range) (ops []Op) {
	for _, o := range r.ops {
		if o.Pages.Which == GivenPages {
			o.Pages.Range = pages
		}
		switch o.Kind {
		case Truncate:
			o.Pages.Range.Start, o.Pages.Range.End = 0, pages.Start
		case Store:
			o.Pages.Range.End = pages.Start + 1
			o.Offset, o.Value = 8*g.rng.Uint64N(addr.PageSize/8), g.rng.Uint64()
		case Fill:
			o.Value = g.rng.Uint64N(1 << 8)
		}
		ops = append(ops, o)
	}
	if r.shape == taken || r.shape == moved {
		if later := g.rng.IntN(g.config.Missing + 1); later > 0 {
			g.missing = append(g.missing, missing{pages, ops[1], g.step + later})
			return ops[:1]
		}
	}
	return ops
}

// pages returns pages of some shape, if it finds any.
func (g *Random) pages(s shape) (Range, bool) {
	if (s == moved || s == left) && g.away() >= g.config.Spare {
		return Range{}, false
	}
	for range 8 {
		if r := g.choose(s); !slices.ContainsFunc(g.missing, func(m missing) bool {
			// What is only elsewhere can be used, but not taken: it has to come home.
			return m.pages.Overlaps(r) && (m.give.Kind != Remap || s != here)
		}) {
			return r, true
		}
	}
	return Range{}, false
}

// away returns how many pages are in the spare region.
func (g *Random) away() (n uint64) {
	for _, m := range g.missing {
		if m.give.Kind == Remap {
			n += m.pages.Len()
		}
	}
	return n
}

// choose returns pages of some shape, whether or not they are there.
func (g *Random) choose(s shape) Range {
	n := 1 + g.rng.Uint64N(min(maxRun, g.config.Pages))
	switch s {
	case moved, left:
		n = 1
	case huge:
		start := hugePages * g.rng.Uint64N(g.config.Pages/hugePages)
		return Range{start, start + hugePages}
	case tail:
		return Range{g.rng.Uint64N(g.config.Pages), g.config.Pages}
	}
	start := g.rng.Uint64N(g.config.Pages - n + 1)
	return Range{start, start + n}
}
