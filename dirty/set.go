package dirty

import (
	"fmt"
	"iter"
	"math/bits"
	"slices"
	"strings"

	"github.com/secondmmu/gvm/addr"
)

// Set is a set of guest frames. The zero Set is empty and ready for use. A Set is
// not copied after first use; see [Set.Clone].
//
// Any number of goroutines may look at a Set while nobody changes it.
//
// In what methods say of their cost, s is the number of spans: bitmaps, and runs
// of whole chunks.
type Set struct {
	spans []span // in ascending order
}

// span is what a set has in the chunks [first, end). If it has all of their
// frames, there may be any number of chunks; otherwise there is one, and a bitmap.
type span struct {
	first, end uint32
	part
}

// spanBytes is the size of a span.
const spanBytes = 24

// part is what a set has of one chunk: nothing, if n is 0; everything, if n is
// chunkFrames; and otherwise the n frames of words, which only then is not nil.
type part struct {
	words *bitmap
	n     uint32
}

// whole is the part of a set that has all of a chunk.
var whole = part{n: chunkFrames}

// partOf returns the part that has the n frames of b, and takes b over.
func partOf(b *bitmap, n uint32) part {
	if n == 0 || n == chunkFrames {
		b = nil
	}
	return part{b, n}
}

// at returns the part of s in chunk c, and the number of spans that end before c:
// the index of the span that c is in, or else of the next one.
func (s *Set) at(c uint32) (p part, i int) {
	hi := len(s.spans)
	for i < hi {
		if mid := int(uint(i+hi) / 2); s.spans[mid].end <= c {
			i = mid + 1
		} else {
			hi = mid
		}
	}
	if i < len(s.spans) && s.spans[i].first <= c {
		p = s.spans[i].part
	}
	return p, i
}

// put has p be the part of s in chunk c, for which at returned i.
func (s *Set) put(c uint32, i int, p part) {
	if i < len(s.spans) && s.spans[i].words != nil && s.spans[i].first == c && p.words != nil {
		s.spans[i].part = p
		return
	}
	s.replace(c, c+1, p)
}

// replace has p be the part of s in each of the chunks [first, end), which is one
// chunk if p has a bitmap. What s had there is gone.
func (s *Set) replace(first, end uint32, p part) {
	_, i := s.at(first)
	j := i
	for j < len(s.spans) && s.spans[j].first < end {
		j++
	}
	var pieces [3]span
	spans := pieces[:0]
	if i < j && s.spans[i].first < first { // only whole chunks reach over a border
		spans = append(spans, span{s.spans[i].first, first, whole})
	} else if i > 0 && s.spans[i-1].words == nil && s.spans[i-1].end == first {
		i--
		spans = append(spans, s.spans[i])
	}
	spans = push(spans, span{first, end, p})
	if i < j && s.spans[j-1].end > end {
		spans = push(spans, span{end, s.spans[j-1].end, whole})
	} else if j < len(s.spans) && s.spans[j].words == nil && s.spans[j].first == end {
		spans = push(spans, s.spans[j])
		j++
	}
	s.spans = slices.Replace(s.spans, i, j, spans...)
}

// push appends a span that comes after all others, unless there is nothing in it.
func push(spans []span, next span) []span {
	if next.n == 0 {
		return spans
	}
	if i := len(spans) - 1; i >= 0 && next.words == nil && spans[i].words == nil && spans[i].end == next.first {
		spans[i].end = next.end
		return spans
	}
	return append(spans, next)
}

// Add adds a frame. It panics if gfn is not below Limit.
//
// It takes O(log s), and O(s) and an allocation of 4 KiB if the frame is the
// first of its chunk.
func (s *Set) Add(gfn addr.GFN) {
	if gfn >= Limit {
		panic(notBelowLimit("Add", gfn))
	}
	s.addPiece(frame(gfn))
}

// AddRange adds the frames [r.Start, r.End). It panics if there are some that are
// not below Limit.
//
// However long r is, it takes O(s), and allocates no more than a bitmap of 4 KiB
// for each end of r that is inside a chunk.
func (s *Set) AddRange(r addr.GFNRange) {
	if r.Empty() {
		return
	}
	if r.End > Limit {
		panic(notBelowLimit("AddRange", r))
	}
	head, first, end, tail := split(r)
	s.addPiece(head)
	if first < end {
		s.replace(first, end, whole)
	}
	s.addPiece(tail)
}

func (s *Set) addPiece(p piece) {
	if p.empty() {
		return
	}
	old, i := s.at(p.chunk)
	switch {
	case old.n == chunkFrames:
		return
	case old.n == 0:
		old.words = new(bitmap)
	}
	added := old.words.add(p)
	s.put(p.chunk, i, partOf(old.words, old.n+added))
}

// Remove removes a frame, if it is there. It takes O(log s), and O(s) and an
// allocation of 4 KiB if the set has all of the frame's chunk.
func (s *Set) Remove(gfn addr.GFN) {
	if gfn < Limit {
		s.removePiece(frame(gfn))
	}
}

// RemoveRange removes the frames [r.Start, r.End), as far as they are there. It
// takes what AddRange takes.
func (s *Set) RemoveRange(r addr.GFNRange) {
	r = clip(r)
	if r.Empty() {
		return
	}
	head, first, end, tail := split(r)
	s.removePiece(head)
	if first < end {
		s.replace(first, end, part{})
	}
	s.removePiece(tail)
}

func (s *Set) removePiece(p piece) {
	if p.empty() {
		return
	}
	old, i := s.at(p.chunk)
	switch old.n {
	case 0:
		return
	case chunkFrames:
		old.words = ones()
	}
	removed := old.words.remove(p)
	s.put(p.chunk, i, partOf(old.words, old.n-removed))
}

// AddBitmap adds the frames whose bits are set in words, laid out as KVM's dirty
// bitmaps are: bit i of words[0] is start+i, of words[1] start+64+i. It panics if
// a bit stands for a frame that is not below Limit.
//
// It takes O(len(words) + k log s), where k is the number of chunks that words
// reaches into; O(s) and 4 KiB more for each that the set had nothing of. It is
// faster if start is a multiple of 64.
func (s *Set) AddBitmap(start addr.GFN, words []uint64) {
	for len(words) > 0 && words[len(words)-1] == 0 {
		words = words[:len(words)-1]
	}
	if len(words) == 0 {
		return
	}
	end := start + addr.GFN(64*len(words)-bits.LeadingZeros64(words[len(words)-1]))
	if end > Limit || end < start {
		panic(notBelowLimit("AddBitmap", addr.GFNRange{Start: start, End: end}))
	}
	shift := uint(start % 64)
	n := len(words)
	if words[n-1]>>(64-shift) != 0 { // never where shift is 0: Go shifts by 64 to 0
		n++
	}
	var shifted bitmap
	for k := 0; k < n; {
		p := frame(start - addr.GFN(shift) + addr.GFN(64*k))
		w := int(p.lo / 64)
		some := min(chunkWords-w, n-k)
		if shift == 0 {
			s.orWords(p.chunk, w, words[k:k+some])
		} else {
			shiftWords(shifted[:some], words, k, shift)
			s.orWords(p.chunk, w, shifted[:some])
		}
		k += some
	}
}

// shiftWords sets dst to the words from the k-th on of a bitmap that is words,
// moved up by shift bits. Before words and after it there are zeros.
func shiftWords(dst, words []uint64, k int, shift uint) {
	var below uint64
	if k > 0 {
		below = words[k-1]
	}
	for i := range dst {
		var w uint64
		if k+i < len(words) {
			w = words[k+i]
		}
		dst[i] = w<<shift | below>>(64-shift)
		below = w
	}
}

// orWords adds frames of chunk c. The first of src is its word w.
func (s *Set) orWords(c uint32, w int, src []uint64) {
	if !slices.ContainsFunc(src, func(w uint64) bool { return w != 0 }) {
		return
	}
	old, i := s.at(c)
	switch {
	case old.n == chunkFrames:
		return
	case old.n == 0:
		old.words = new(bitmap)
	}
	added := old.words.or(w, src)
	s.put(c, i, partOf(old.words, old.n+added))
}

// Contains reports whether gfn is in the set. It takes O(log s).
func (s *Set) Contains(gfn addr.GFN) bool {
	if gfn >= Limit {
		return false
	}
	f := frame(gfn)
	p, _ := s.at(f.chunk)
	return p.n == chunkFrames || p.n > 0 && p.words.has(f.lo)
}

// Len returns the number of frames. It takes O(s).
func (s *Set) Len() (frames uint64) {
	for i := range s.spans {
		sp := &s.spans[i]
		frames += uint64(sp.n) * uint64(sp.end-sp.first)
	}
	return frames
}

// Empty reports whether there is no frame in the set.
func (s *Set) Empty() bool { return len(s.spans) == 0 }

// Clear removes all frames.
func (s *Set) Clear() { s.spans = nil }

// Bytes returns the memory that the set uses, in bytes.
func (s *Set) Bytes() uint64 {
	bytes := uint64(cap(s.spans)) * spanBytes
	for i := range s.spans {
		if s.spans[i].words != nil {
			bytes += bitmapBytes
		}
	}
	return bytes
}

// Clone returns a set with the same frames, which shares nothing with s.
func (s *Set) Clone() *Set {
	c := &Set{spans: slices.Clone(s.spans)}
	for i := range c.spans {
		if sp := &c.spans[i]; sp.words != nil {
			sp.words = sp.words.clone()
		}
	}
	return c
}

// Equal reports whether both sets have the same frames.
func (s *Set) Equal(o *Set) bool {
	return slices.EqualFunc(s.spans, o.spans, func(a, b span) bool {
		return a.first == b.first && a.end == b.end && a.n == b.n && (a.words == nil || *a.words == *b.words)
	})
}

// Runs returns the frames of the set as ranges, in ascending order. A range goes
// as far as it can: the frames before and after it are not in the set. The set is
// not changed before the loop ends.
//
// A loop over the result allocates nothing. It takes a step for each span, for
// each word of a bitmap, and for each range.
func (s *Set) Runs() iter.Seq[addr.GFNRange] {
	return func(yield func(addr.GFNRange) bool) { s.runs(addr.GFNRange{End: Limit}, yield) }
}

// RunsIn is Runs for the frames of [r.Start, r.End) only; the first and the last
// range end where r does. It begins in O(log s).
func (s *Set) RunsIn(r addr.GFNRange) iter.Seq[addr.GFNRange] {
	return func(yield func(addr.GFNRange) bool) { s.runs(r, yield) }
}

func (s *Set) runs(r addr.GFNRange, yield func(addr.GFNRange) bool) {
	r = clip(r)
	if r.Empty() {
		return
	}
	var run addr.GFNRange          // found, and may go on
	var nonzero [chunkWords]uint16 // words of a bitmap
	_, i := s.at(uint32(r.Start >> chunkShift))
	for ; i < len(s.spans); i++ {
		sp := &s.spans[i]
		base := addr.GFN(sp.first) << chunkShift
		in := r.Intersect(addr.GFNRange{Start: base, End: addr.GFN(sp.end) << chunkShift})
		if in.Empty() {
			break // r ends before it
		}
		if sp.words == nil {
			if in.Start != run.End {
				if !run.Empty() && !yield(run) {
					return
				}
				run.Start = in.Start
			}
			run.End = in.End
			continue
		}
		p := piece{sp.first, uint32(in.Start - base), uint32(in.End - base)}
		cut := p.hi-p.lo < chunkFrames

		// The words that are not zero are picked out first, without a branch, which
		// would be foreseen in every second case if one frame in a hundred is there.
		first, last := p.words()
		n := 0
		for w := first; w <= last; w++ {
			x := sp.words[w]
			nonzero[n%chunkWords] = uint16(w)
			n += int((x | -x) >> 63)
		}
		for _, w := range nonzero[:n] {
			x := sp.words[w%chunkWords]
			if cut {
				x &= p.mask(uint32(w))
			}
			for at := base + addr.GFN(w)*64; x != 0; {
				// To add the lowest bit to x carries through the lowest run of ones,
				// to the zero that it ends at, or out of the word.
				carried := x + x&-x
				start, end := at+addr.GFN(bits.TrailingZeros64(x)), at+addr.GFN(bits.TrailingZeros64(carried))
				x &= carried
				if start != run.End {
					if !run.Empty() && !yield(run) {
						return
					}
					run.Start = start
				}
				run.End = end
			}
		}
	}
	if !run.Empty() {
		yield(run)
	}
}

// String returns the ranges of the set if they are few, and otherwise the first
// of them and the number of frames in the others.
func (s *Set) String() string {
	const most = 8
	if s.Empty() {
		return "no frames"
	}
	var b strings.Builder
	n, left := 0, s.Len()
	for r := range s.Runs() {
		if n == most {
			fmt.Fprintf(&b, " and %d frames more", left)
			break
		}
		if n > 0 {
			b.WriteString(", ")
		}
		b.WriteString(r.String())
		n++
		left -= r.NPages()
	}
	return b.String()
}
