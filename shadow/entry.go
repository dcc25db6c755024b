package shadow

import (
	"sync/atomic"

	"github.com/secondmmu/gvm/addr"
)

// entry is a translation, KVM's spte: where the page is, and bits below the page
// shift. At level 1 it translates one page, at level 2 the 512 of an aligned
// block, at level 3 512 such blocks. It holds a host address where KVM has a host
// frame: the process has the primary MMU between itself and the frames.
//
// There is no dirty bit. Who writes marks the page in a [dirty.Log] each time, which
// is about as cheap, is exact by the page whatever the level, and takes a harvest no
// look at the translations.
type entry uint64

const (
	present  entry = 1 << iota
	writable       // stores are allowed; loads always are
	young          // used since ClearYoung; set without the lock
	aliased        // the page is shown at other frames too; at level 1 only

	entryBits = present | writable | young | aliased
)

const (
	levelShift = 9 // log2 of the entries of a table, but for level 3
	levels     = 3
)

// levelPages returns the pages of an entry of a level.
func levelPages(level int) uint64 { return 1 << (levelShift * (level - 1)) }

func (e entry) hva() addr.HVA { return addr.HVA(e &^ entryBits) }

func (e entry) access() addr.Access {
	switch {
	case e&present == 0:
		return addr.NoAccess
	case e&writable == 0:
		return addr.Read
	}
	return addr.ReadWrite
}

func (e entry) allows(want addr.Access) bool { return e.access()&want == want }

// part returns the entry of the i-th of the blocks of n pages that e translates.
func (e entry) part(i int, n uint64) entry {
	return e + entry(uint64(i)*n<<addr.PageShift)
}

// cell is where an entry is. It is stored with Table.mu held, but for the young
// bit, which readers set.
type cell struct{ atomic.Uint64 }

func (c *cell) load() entry           { return entry(c.Load()) }
func (c *cell) store(e entry)         { c.Store(uint64(e)) }
func (c *cell) swap(e entry) entry    { return entry(c.Swap(uint64(e))) }
func (c *cell) cas(old, e entry) bool { return c.CompareAndSwap(uint64(old), uint64(e)) }

// age sets the young bit, unless the entry goes away meanwhile.
func (c *cell) age(e entry) {
	for e&present != 0 && e&young == 0 && !c.cas(e, e|young) {
		e = c.load()
	}
}

// clearYoung clears the young bit, and reports whether it was set.
func (c *cell) clearYoung() bool {
	for e := c.load(); e&present != 0 && e&young != 0; e = c.load() {
		if c.cas(e, e&^young) {
			return true
		}
	}
	return false
}

// A table of level 1 is a leaf. Tables of the other levels have for each part
// either an entry or a table of the level below, or neither. They say how many
// pages are translated below each part, which only the holder of Table.mu looks
// at; so leaves are nothing but entries, and of a size that wastes nothing.
type (
	leaf   [1 << levelShift]cell
	level2 struct {
		leaf  [1 << levelShift]atomic.Pointer[leaf]
		large [1 << levelShift]cell
		pages [1 << levelShift]uint16 // protected by Table.mu
	}
	level3 struct {
		below [level3Len]atomic.Pointer[level2]
		large [level3Len]cell
		pages [level3Len]uint32 // protected by Table.mu
	}
)

// A root has tables of level 3, so that frames of 40 bits, addresses of 52, can be
// translated. An empty table takes the root alone, and one of level 3 for each TiB
// that was ever used: these stay.
const (
	level3Shift = 10
	level3Len   = 1 << level3Shift
	rootLen     = 1 << (40 - level3Shift - 2*levelShift)
	maxGFN      = addr.GFN(1)<<40 - 1
)

// tableBytes is the size of a table of each level.
var tableBytes = [levels + 1]int{1: 8 << levelShift, 2: (8 + 8 + 2) << levelShift, 3: (8 + 8 + 4) << level3Shift}

const rootBytes = 8 * rootLen

// The index of a frame in a table of each level, and in the root.
func at1(gfn addr.GFN) int { return int(gfn & (1<<levelShift - 1)) }
func at2(gfn addr.GFN) int { return int(gfn >> levelShift & (1<<levelShift - 1)) }
func at3(gfn addr.GFN) int { return int(gfn >> (2 * levelShift) & (level3Len - 1)) }
func at4(gfn addr.GFN) int { return int(gfn >> (2*levelShift + level3Shift)) }

// find returns the entry that translates gfn, its place and its level. Without one
// the entry is 0. The caller is in a read section, in which what it finds may be
// used even if it is taken away meanwhile.
func (t *Table) find(gfn addr.GFN) (e entry, c *cell, level int) {
	if gfn > maxGFN {
		return 0, nil, 0
	}
	three := t.root[at4(gfn)].Load()
	if three == nil {
		return 0, nil, 0
	}
	i := at3(gfn)
	two := three.below[i].Load()
	if two == nil {
		c = &three.large[i]
		return c.load(), c, 3
	}
	i = at2(gfn)
	one := two.leaf[i].Load()
	if one == nil {
		c = &two.large[i]
		return c.load(), c, 2
	}
	c = &one[at1(gfn)]
	return c.load(), c, 1
}

// install makes e the translation of gfn at a level, or at a lower one where there
// are tables of that already. A translation that is there may only be widened.
//
// Preconditions: t.mu is held; e is of the first page of gfn's block at the level.
func (t *Table) install(gfn addr.GFN, e entry, level int) {
	three := t.root[at4(gfn)].Load()
	if three == nil {
		three = new(level3)
		t.tables[levels]++
		t.root[at4(gfn)].Store(three)
	}
	i3 := at3(gfn)
	two := three.below[i3].Load()
	switch {
	case two != nil:
	case level == 3:
		t.count(three, nil, gfn, t.put(&three.large[i3], e, level))
		return
	default:
		two = t.split3(three, i3)
	}
	if level == 3 {
		level, e = 2, e.part(at2(gfn), levelPages(2))
	}
	i2 := at2(gfn)
	one := two.leaf[i2].Load()
	switch {
	case one != nil:
	case level == 2:
		t.count(three, two, gfn, t.put(&two.large[i2], e, level))
		return
	default:
		one = t.split2(two, i2)
	}
	if level == 2 {
		e = e.part(at1(gfn), 1)
	}
	t.count(three, two, gfn, t.put(&one[at1(gfn)], e, 1))
}

// put stores e, which keeps the young bit that was there, and returns the pages
// that are translated now and were not.
func (t *Table) put(c *cell, e entry, level int) int {
	for {
		old := c.load()
		if c.cas(old, e|old&young) {
			if old&present != 0 {
				return 0
			}
			return int(levelPages(level))
		}
	}
}

// count adds pages to what is translated at gfn, in all tables that say so.
func (t *Table) count(three *level3, two *level2, gfn addr.GFN, pages int) {
	if two != nil {
		two.pages[at2(gfn)] += uint16(pages)
	}
	three.pages[at3(gfn)] += uint32(pages)
	t.pages += pages
}

// split3 puts a table in the place of the i-th entry, if there is one, that
// translates the same. Who looks the entry up between the two stores finds
// nothing, and faults; who found it before may go on to use it, and whoever takes
// any of its pages away will wait for that.
func (t *Table) split3(three *level3, i int) *level2 {
	two := new(level2)
	t.tables[2]++
	if e := three.large[i].swap(0); e&present != 0 {
		for k := range two.large {
			two.large[k].store(e.part(k, levelPages(2)))
			two.pages[k] = uint16(levelPages(2))
		}
	}
	three.below[i].Store(two)
	return two
}

func (t *Table) split2(two *level2, i int) *leaf {
	one := new(leaf)
	t.tables[1]++
	if e := two.large[i].swap(0); e&present != 0 {
		for k := range one {
			one[k].store(e.part(k, 1))
		}
	}
	two.leaf[i].Store(one)
	return one
}

// zap drops the translations of r, and returns of how many pages there were some.
// Tables of which nothing is left are taken out as a whole: who is inside one of
// them, in a read section, still finds there what it translated.
//
// Preconditions: t.mu is held.
func (t *Table) zap(r addr.GFNRange) (zapped int) {
	r.End = min(r.End, maxGFN+1)
	for gfn := r.Start; gfn < r.End; {
		next := (gfn>>(2*levelShift) + 1) << (2 * levelShift)
		part := addr.GFNRange{Start: gfn, End: min(next, r.End)}
		if three := t.root[at4(gfn)].Load(); three != nil {
			zapped += t.zap3(three, part)
		} else {
			next = (gfn>>(2*levelShift+level3Shift) + 1) << (2*levelShift + level3Shift)
		}
		gfn = next
	}
	t.pages -= zapped
	if zapped > 0 && t.slots.mutant != viewsRemember {
		t.zaps.Add(1)
	}
	return zapped
}

// zap3 zaps r, which lies in one part of a table of level 3.
func (t *Table) zap3(three *level3, r addr.GFNRange) (zapped int) {
	i := at3(r.Start)
	all := int(three.pages[i])
	if all == 0 {
		return 0
	}
	two := three.below[i].Load()
	if r.NPages() == levelPages(3) {
		three.large[i].store(0)
		if three.below[i].Store(nil); two != nil {
			t.drop2(two)
		}
		three.pages[i] = 0
		return all
	}
	if two == nil {
		two = t.split3(three, i)
	}
	for gfn := r.Start; gfn < r.End; {
		next := (gfn>>levelShift + 1) << levelShift
		zapped += t.zap2(two, addr.GFNRange{Start: gfn, End: min(next, r.End)})
		gfn = next
	}
	if three.pages[i] -= uint32(zapped); three.pages[i] == 0 {
		three.below[i].Store(nil)
		t.drop2(two)
	}
	return zapped
}

// zap2 zaps r, which lies in one part of a table of level 2.
func (t *Table) zap2(two *level2, r addr.GFNRange) (zapped int) {
	i := at2(r.Start)
	all := int(two.pages[i])
	if all == 0 {
		return 0
	}
	one := two.leaf[i].Load()
	if r.NPages() == levelPages(2) {
		two.large[i].store(0)
		if two.leaf[i].Store(nil); one != nil {
			t.tables[1]--
		}
		two.pages[i] = 0
		return all
	}
	if one == nil {
		one = t.split2(two, i)
	}
	last := r.End
	if t.slots.mutant == zapRoundsDown && last > r.Start+1 {
		last--
	}
	for gfn := r.Start; gfn < last; gfn++ {
		if one[at1(gfn)].swap(0)&present != 0 {
			zapped++
		}
	}
	if two.pages[i] -= uint16(zapped); two.pages[i] == 0 {
		two.leaf[i].Store(nil)
		t.tables[1]--
	}
	return zapped
}

// drop2 counts the tables that go with one of level 2.
func (t *Table) drop2(two *level2) {
	t.tables[2]--
	for i := range two.leaf {
		if two.leaf[i].Load() != nil {
			t.tables[1]--
		}
	}
}

// visit calls fn for every entry that translates a frame of r, with its place, its
// first frame and its level. Nobody has to keep the entries from changing.
func (t *Table) visit(r addr.GFNRange, fn func(c *cell, gfn addr.GFN, level int)) {
	r.End = min(r.End, maxGFN+1)
	for gfn := r.Start; gfn < r.End; {
		level := levels
		three := t.root[at4(gfn)].Load()
		if three == nil {
			gfn = (gfn>>(2*levelShift+level3Shift) + 1) << (2*levelShift + level3Shift)
			continue
		}
		c := &three.large[at3(gfn)]
		if two := three.below[at3(gfn)].Load(); two != nil {
			c, level = &two.large[at2(gfn)], 2
			if one := two.leaf[at2(gfn)].Load(); one != nil {
				c, level = &one[at1(gfn)], 1
			}
		}
		first := gfn &^ addr.GFN(levelPages(level)-1)
		if c.load()&present != 0 {
			fn(c, first, level)
		}
		gfn = first + addr.GFN(levelPages(level))
	}
}
