package dirty

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/secondmmu/gvm/addr"
)

// Limit is the first frame that no guest has: physical addresses of x86 have 52
// bits at most. Frames that are added or marked are below it.
const Limit addr.GFN = 1 << (52 - addr.PageShift)

// A chunk is a run of frames that one bitmap can stand for. Its bitmap is 4 KiB,
// which is a size class of the allocator.
const (
	chunkShift  = 15
	chunkFrames = 1 << chunkShift
	chunkWords  = chunkFrames / 64
	chunks      = uint32(Limit >> chunkShift) // the number of them below Limit

	bitmapBytes = chunkWords * 8
)

// bitmap has a bit for each frame of a chunk: bit 0 of word 0 is the first.
type bitmap [chunkWords]uint64

// piece is a run of frames inside one chunk: [lo, hi), counted from its first.
type piece struct{ chunk, lo, hi uint32 }

func (p piece) empty() bool { return p.lo == p.hi }

// words returns the first and the last word that p has a bit in. p is not empty.
func (p piece) words() (first, last uint32) { return p.lo / 64, (p.hi - 1) / 64 }

// mask returns the bits of word w that are p's.
func (p piece) mask(w uint32) uint64 {
	m := ^uint64(0)
	first, last := p.words()
	if w == first {
		m <<= p.lo % 64
	}
	if w == last {
		m &= ^uint64(0) >> (63 - (p.hi-1)%64)
	}
	return m
}

// frame returns the piece that is just gfn.
func frame(gfn addr.GFN) piece {
	lo := uint32(gfn % chunkFrames)
	return piece{uint32(gfn >> chunkShift), lo, lo + 1}
}

// split takes r apart: a piece of the chunk that it begins inside of, the whole
// chunks [first, end), and a piece of the chunk that it ends inside of. Each of
// the three may be empty. r is not empty and not above Limit.
func split(r addr.GFNRange) (head piece, first, end uint32, tail piece) {
	first, end = uint32(r.Start>>chunkShift), uint32(r.End>>chunkShift)
	lo, hi := uint32(r.Start%chunkFrames), uint32(r.End%chunkFrames)
	switch {
	case lo != 0 && first == end:
		return piece{first, lo, hi}, first, first, tail
	case lo != 0:
		head = piece{first, lo, chunkFrames}
		first++
	}
	if hi != 0 {
		tail = piece{end, 0, hi}
	}
	return head, first, end, tail
}

// clip returns the part of r that is below Limit.
func clip(r addr.GFNRange) addr.GFNRange { return r.Intersect(addr.GFNRange{End: Limit}) }

// notBelowLimit is what is said of frames that are not below Limit.
func notBelowLimit(what string, frames fmt.Stringer) string {
	return fmt.Sprintf("dirty: %s of %v, which is not below %v", what, frames, Limit)
}

// count returns the number of frames in b.
func (b *bitmap) count() (n uint32) {
	for _, w := range b {
		n += uint32(bits.OnesCount64(w))
	}
	return n
}

func (b *bitmap) has(lo uint32) bool { return b[lo/64]>>(lo%64)&1 != 0 }

// add sets the bits of p, and returns how many of them were clear.
func (b *bitmap) add(p piece) (n uint32) {
	first, last := p.words()
	for w := first; w <= last; w++ {
		m := p.mask(w)
		n += uint32(bits.OnesCount64(m &^ b[w]))
		b[w] |= m
	}
	return n
}

// remove clears the bits of p, and returns how many of them were set.
func (b *bitmap) remove(p piece) (n uint32) {
	first, last := p.words()
	for w := first; w <= last; w++ {
		m := p.mask(w)
		n += uint32(bits.OnesCount64(m & b[w]))
		b[w] &^= m
	}
	return n
}

// or adds the frames whose bits are in src, of which the first is word at of b,
// and returns how many of them were not there.
func (b *bitmap) or(at int, src []uint64) (n uint32) {
	dst := b[at : at+len(src)]
	for i, w := range src {
		n += uint32(bits.OnesCount64(w &^ dst[i]))
		dst[i] |= w
	}
	return n
}

func (b *bitmap) clone() *bitmap {
	c := *b
	return &c
}

// load returns a copy of b, which others may be marking frames in.
func (b *bitmap) load() *bitmap {
	c := new(bitmap)
	for w := range b {
		c[w] = atomic.LoadUint64(&b[w])
	}
	return c
}

// ones returns the bitmap of a whole chunk.
func ones() *bitmap {
	b := new(bitmap)
	for i := range b {
		b[i] = ^uint64(0)
	}
	return b
}
