package interval

import (
	"fmt"
	"hash/maphash"
	"iter"
)

// A full leaf of 31 values of a word is 760 bytes, and one of 31 values of two
// words is 1008: both just fit a size class of the allocator.
const (
	fanout  = 31 // the most entries of a leaf, and children of an inner node
	minimum = 8  // the fewest, other than in the root; 2*minimum <= fanout+1
)

// Tree is a collection of closed intervals of numbers, each with a value. The
// zero Tree is empty and ready for use. A Tree is not copied after first use.
//
// Any number of goroutines may look things up while nobody inserts or deletes.
// To look things up while somebody does, they are given a [Tree.Clone].
//
// Values are hashed with [maphash.Comparable], which panics, as == does, if one is
// an interface with a dynamic type that cannot be compared.
type Tree[V comparable] struct {
	root   node[V] // zero until the first Insert
	height int     // inner nodes on the way to a leaf
	len    int

	// owner tells the nodes that only this tree has from those that it shares
	// with clones, which are copied before they are changed.
	owner *owner

	// hash orders entries of the same interval. It is set by the first Insert.
	hash func(V) uint64
}

// owner is the identity of a tree, since it was last cloned.
type owner struct{ _ byte }

// node is a leaf or an inner node; the other pointer is nil.
type node[V comparable] struct {
	leaf  *leaf[V]
	inner *inner[V]
}

// key is what entries are ordered by, field after field.
type key struct {
	first, last uint64
	hash        uint64 // of the value
}

// leaf holds entries in the order of their keys. Two entries have the same key
// only if they are the same, or if hashes collide.
type leaf[V comparable] struct {
	owner *owner
	n     int
	first [fanout]uint64
	last  [fanout]uint64
	value [fanout]V // zero from n on
}

// inner holds children in the order of their entries.
type inner[V comparable] struct {
	owner *owner
	n     int
	first [fanout]uint64  // of the key of the child's first entry
	max   [fanout]uint64  // the greatest last of the child's entries
	rest  [fanout]tie     // of the key of the child's first entry
	child [fanout]node[V] // zero from n on
}

// tie is what of a key decides if first is the same.
type tie struct{ last, hash uint64 }

// Len returns the number of entries.
func (t *Tree[V]) Len() int { return t.len }

// Clone returns a tree with the same entries. It takes O(1): the two share their
// nodes until one of them changes them, and copies those on the way to the change.
// t may be looked up meanwhile, but not changed.
func (t *Tree[V]) Clone() *Tree[V] {
	c := *t
	t.owner, c.owner = new(owner), new(owner)
	return &c
}

// own makes nd, a place in a node that t owns or the root, a node that t owns.
func (t *Tree[V]) own(nd *node[V]) {
	switch {
	case nd.leaf != nil && nd.leaf.owner != t.owner:
		l := *nd.leaf
		l.owner = t.owner
		nd.leaf = &l
	case nd.inner != nil && nd.inner.owner != t.owner:
		in := *nd.inner
		in.owner = t.owner
		nd.inner = &in
	}
}

// Insert adds the interval of all numbers from first to last, both of them
// included, with the value v. What is in the tree already stays there: after the
// same Insert twice there are two entries, and it takes two Deletes to be rid of
// them. Insert panics if last is less than first, and if v is not equal to itself,
// as a NaN is not.
//
// It takes O(log n), and allocates if a node is full.
func (t *Tree[V]) Insert(first, last uint64, v V) {
	if last < first {
		panic(fmt.Sprintf("interval: Insert of [%#x, %#x], which ends before it begins", first, last))
	}
	if same := v; same != v {
		panic("interval: Insert of a value that is not equal to itself")
	}
	if t.hash == nil {
		seed := maphash.MakeSeed()
		t.hash = func(v V) uint64 { return maphash.Comparable(seed, v) }
	}
	if t.root == (node[V]{}) {
		t.root.leaf = &leaf[V]{owner: t.owner}
	}
	if right := t.insert(&t.root, key{first, last, t.hash(v)}, v); right != (node[V]{}) {
		root := &inner[V]{owner: t.owner}
		root.n = 2
		root.child[0], root.child[1] = t.root, right
		t.describe(root, 0)
		t.describe(root, 1)
		t.root = node[V]{inner: root}
		t.height++
	}
	t.len++
}

// insert adds an entry below nd. If nd was full, the last of what it has are moved
// to a new node, which is returned.
func (t *Tree[V]) insert(nd *node[V], k key, v V) (right node[V]) {
	t.own(nd)
	if l := nd.leaf; l != nil {
		i := t.search(l, k)
		if l.n == fanout {
			at := splitPoint(i)
			r := &leaf[V]{owner: t.owner}
			l.moveTail(at, r)
			right.leaf = r
			if i > at {
				l, i = r, i-at
			}
		}
		l.put(i, k, v)
		return right
	}
	in := nd.inner
	i := max(in.search(k)-1, 0)
	child := t.insert(&in.child[i], k, v)
	t.describe(in, i)
	if child == (node[V]{}) {
		return right
	}
	i++
	if in.n == fanout {
		at := splitPoint(i)
		r := &inner[V]{owner: t.owner}
		in.moveTail(at, r)
		right.inner = r
		if i > at {
			in, i = r, i-at
		}
	}
	in.put(i, child)
	t.describe(in, i)
	return right
}

// splitPoint returns how many entries of a full node stay in it, if another is
// to be added at i. At an end, further ones are likely to come there: the part
// that they do not go to is left with nearly all it may have.
func splitPoint(i int) int {
	switch i {
	case 0:
		return minimum - 1
	case fanout:
		return fanout + 1 - minimum
	}
	return fanout / 2
}

// Overlaps reports whether an entry has a number in common with the range from
// first to last, both of them included. A range with last less than first has no
// numbers. It takes O(log n).
func (t *Tree[V]) Overlaps(first, last uint64) bool {
	if t.len == 0 || last < first {
		return false
	}
	nd := t.root
	for nd.inner != nil {
		in, n := nd.inner, 0
		for ; n < in.n && in.first[n] <= last; n++ {
			if n > 0 && in.max[n-1] >= first {
				return true // all of child n-1 begins before child n, and thus in time
			}
		}
		if n == 0 || in.max[n-1] < first {
			return false
		}
		nd = in.child[n-1]
	}
	l := nd.leaf
	for i := 0; i < l.n && l.first[i] <= last; i++ {
		if l.last[i] >= first {
			return true
		}
	}
	return false
}

// Overlapping returns the values of the entries that have a number in common
// with the range from first to last, both of them included. They come in the
// order of first, and then of last; the order of values of the same interval is
// not specified and differs from tree to tree. A range with last less than first
// has no numbers. The tree is not modified before the loop ends.
//
// A loop over the result allocates nothing. It takes O(log n) up to the first
// entry and from each to the next, and less if they are neighbours.
func (t *Tree[V]) Overlapping(first, last uint64) iter.Seq[V] {
	return func(yield func(V) bool) {
		if t.len > 0 && first <= last {
			t.root.visit(first, last, yield)
		}
	}
}

// visit yields what overlaps below nd, and reports whether to go on.
func (nd node[V]) visit(first, last uint64, yield func(V) bool) bool {
	if l := nd.leaf; l != nil {
		for i := 0; i < l.n && l.first[i] <= last; i++ {
			if l.last[i] >= first && !yield(l.value[i]) {
				return false
			}
		}
		return true
	}
	in := nd.inner
	for i := 0; i < in.n && in.first[i] <= last; i++ {
		if in.max[i] >= first && !in.child[i].visit(first, last, yield) {
			return false
		}
	}
	return true
}

// Delete removes one entry with just this interval and value, and reports
// whether there was one. It takes O(log n), however many entries have the same
// interval.
func (t *Tree[V]) Delete(first, last uint64, v V) bool {
	if t.len == 0 || !t.remove(&t.root, key{first, last, t.hash(v)}, v) {
		return false
	}
	t.len--
	if in := t.root.inner; in != nil && in.n == 1 {
		t.root = in.child[0]
		t.height--
	}
	return true
}

// remove deletes an entry below nd, and reports whether there was one. It may
// leave nd with one entry less than the minimum.
func (t *Tree[V]) remove(nd *node[V], k key, v V) bool {
	t.own(nd)
	if l := nd.leaf; l != nil {
		for i := t.search(l, k); i < l.n && t.key(l, i) == k; i++ {
			if l.value[i] == v {
				l.cut(i)
				return true
			}
		}
		return false
	}
	in := nd.inner
	for i := in.search(k) - 1; i >= 0; i-- {
		if t.remove(&in.child[i], k, v) {
			t.mend(in, i)
			return true
		}
		if in.key(i) != k {
			break // all before is less than k
		}
	}
	return false
}

// mend makes up for an entry that child i of in has lost: the child gets entries
// from a neighbour, or becomes one node with it, if it has too few.
func (t *Tree[V]) mend(in *inner[V], i int) {
	if in.child[i].len() >= minimum {
		t.describe(in, i)
		return
	}
	i = min(i, in.n-2)
	t.own(&in.child[i])
	t.own(&in.child[i+1])
	a, b := in.child[i], in.child[i+1]
	switch sum := a.len() + b.len(); {
	case sum <= fanout:
		b.moveHead(b.len(), a)
		in.cut(i + 1)
	case a.len() < minimum:
		b.moveHead(sum/2-a.len(), a)
		t.describe(in, i+1)
	default:
		a.moveTail(sum/2, b)
		t.describe(in, i+1)
	}
	t.describe(in, i)
}
