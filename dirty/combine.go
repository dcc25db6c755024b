package dirty

// Union adds the frames of o, which may be s. It takes O(s) for the spans of both
// sets and a step for each word of bitmaps that meet; bitmaps of chunks of which
// only o has something are copied, so that the sets share nothing.
func (s *Set) Union(o *Set) { s.union(o, (*bitmap).clone) }

// absorb is Union for an o that is not used any more: its bitmaps are taken over.
func (s *Set) absorb(o *Set) { s.union(o, func(b *bitmap) *bitmap { return b }) }

func (s *Set) union(o *Set, own func(*bitmap) *bitmap) {
	if o.Empty() {
		return
	}
	s.combine(o, func(x, y part) part {
		switch {
		case x.n == chunkFrames || y.n == chunkFrames:
			return whole
		case y.n == 0:
			return x
		case x.n == 0:
			return part{own(y.words), y.n}
		}
		added := x.words.or(0, y.words[:])
		return partOf(x.words, x.n+added)
	})
}

// Intersect removes the frames that are not in o. It takes what Union takes.
func (s *Set) Intersect(o *Set) {
	s.combine(o, func(x, y part) part {
		switch {
		case x.n == 0 || y.n == chunkFrames:
			return x
		case y.n == 0:
			return part{}
		case x.n == chunkFrames:
			return part{y.words.clone(), y.n}
		}
		for i, w := range y.words {
			x.words[i] &= w
		}
		return partOf(x.words, x.words.count())
	})
}

// Subtract removes the frames that are in o, which may be s. It takes what Union
// takes.
func (s *Set) Subtract(o *Set) {
	s.combine(o, func(x, y part) part {
		switch {
		case x.n == 0 || y.n == 0:
			return x
		case y.n == chunkFrames:
			return part{}
		case x.n == chunkFrames:
			b := new(bitmap)
			for i, w := range y.words {
				b[i] = ^w
			}
			return part{b, chunkFrames - y.n}
		}
		for i, w := range y.words {
			x.words[i] &^= w
		}
		return partOf(x.words, x.words.count())
	})
}

// combine has f say what s has from now on, of what it has and what o has. A pair
// of parts is either of one chunk or of any number of them of which each set has
// all or nothing. What f returns is not a bitmap of o's; that of s it may change.
func (s *Set) combine(o *Set, f func(x, y part) part) {
	a, b := s.spans, o.spans
	spans := make([]span, 0, len(a))
	for at := uint32(0); at < chunks; {
		x, xEnd := next(&a, at)
		y, yEnd := next(&b, at)
		end := min(xEnd, yEnd)
		spans = push(spans, span{at, end, f(x, y)})
		at = end
	}
	s.spans = spans
}

// next returns the part that spans have in chunk at and those up to end, and
// drops spans that are before it.
func next(spans *[]span, at uint32) (p part, end uint32) {
	for len(*spans) > 0 && (*spans)[0].end <= at {
		*spans = (*spans)[1:]
	}
	switch rest := *spans; {
	case len(rest) == 0:
		return part{}, chunks
	case rest[0].first > at:
		return part{}, rest[0].first
	default:
		return rest[0].part, rest[0].end
	}
}
