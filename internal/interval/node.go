package interval

import "slices"

func (nd node[V]) len() int {
	if nd.leaf != nil {
		return nd.leaf.n
	}
	return nd.inner.n
}

// moveTail moves entries from the at-th on of nd to the front of its right neighbour.
func (nd node[V]) moveTail(at int, right node[V]) {
	if nd.leaf != nil {
		nd.leaf.moveTail(at, right.leaf)
	} else {
		nd.inner.moveTail(at, right.inner)
	}
}

// moveHead moves the first n entries of nd to the end of its left neighbour.
func (nd node[V]) moveHead(n int, left node[V]) {
	if nd.leaf != nil {
		nd.leaf.moveHead(n, left.leaf)
	} else {
		nd.inner.moveHead(n, left.inner)
	}
}

// less orders keys.
func (k key) less(o key) bool {
	if k.first != o.first {
		return k.first < o.first
	}
	if k.last != o.last {
		return k.last < o.last
	}
	return k.hash < o.hash
}

// key returns the key of entry i of l.
func (t *Tree[V]) key(l *leaf[V], i int) key {
	return key{l.first[i], l.last[i], t.hash(l.value[i])}
}

// search returns the number of entries of l that are less than k.
func (t *Tree[V]) search(l *leaf[V], k key) int {
	lo, hi := 0, l.n
	for lo < hi {
		mid := (lo + hi) / 2
		first, last := l.first[mid], l.last[mid]
		if first < k.first || first == k.first && (last < k.last || last == k.last && t.hash(l.value[mid]) < k.hash) {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

func (l *leaf[V]) put(i int, k key, v V) {
	put(&l.first, l.n, i, k.first)
	put(&l.last, l.n, i, k.last)
	put(&l.value, l.n, i, v)
	l.n++
}

func (l *leaf[V]) cut(i int) {
	cut(&l.first, l.n, i)
	cut(&l.last, l.n, i)
	cut(&l.value, l.n, i)
	l.n--
}

func (l *leaf[V]) moveTail(at int, right *leaf[V]) {
	moveTail(&l.first, l.n, at, &right.first, right.n)
	moveTail(&l.last, l.n, at, &right.last, right.n)
	moveTail(&l.value, l.n, at, &right.value, right.n)
	l.n, right.n = at, right.n+l.n-at
}

func (l *leaf[V]) moveHead(n int, left *leaf[V]) {
	moveHead(&l.first, l.n, n, &left.first, left.n)
	moveHead(&l.last, l.n, n, &left.last, left.n)
	moveHead(&l.value, l.n, n, &left.value, left.n)
	l.n, left.n = l.n-n, left.n+n
}

// key returns the key of the first entry of child i.
func (in *inner[V]) key(i int) key { return key{in.first[i], in.rest[i].last, in.rest[i].hash} }

// search returns the number of children whose first entry is not greater than k.
func (in *inner[V]) search(k key) int {
	lo, hi := 0, in.n
	for lo < hi {
		mid := (lo + hi) / 2
		if k.less(in.key(mid)) {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// describe brings what in says of child i up to date with the child.
func (t *Tree[V]) describe(in *inner[V], i int) {
	k, last := t.describes(in.child[i])
	in.first[i], in.rest[i], in.max[i] = k.first, tie{k.last, k.hash}, last
}

// describes returns the key of the first entry of nd and the greatest last.
func (t *Tree[V]) describes(nd node[V]) (key, uint64) {
	if l := nd.leaf; l != nil {
		return t.key(l, 0), slices.Max(l.last[:l.n])
	}
	return nd.inner.key(0), slices.Max(nd.inner.max[:nd.inner.n])
}

// put makes room for a child before child i; what is said of it is not set.
func (in *inner[V]) put(i int, child node[V]) {
	put(&in.first, in.n, i, 0)
	put(&in.max, in.n, i, 0)
	put(&in.rest, in.n, i, tie{})
	put(&in.child, in.n, i, child)
	in.n++
}

func (in *inner[V]) cut(i int) {
	cut(&in.first, in.n, i)
	cut(&in.max, in.n, i)
	cut(&in.rest, in.n, i)
	cut(&in.child, in.n, i)
	in.n--
}

func (in *inner[V]) moveTail(at int, right *inner[V]) {
	moveTail(&in.first, in.n, at, &right.first, right.n)
	moveTail(&in.max, in.n, at, &right.max, right.n)
	moveTail(&in.rest, in.n, at, &right.rest, right.n)
	moveTail(&in.child, in.n, at, &right.child, right.n)
	in.n, right.n = at, right.n+in.n-at
}

func (in *inner[V]) moveHead(n int, left *inner[V]) {
	moveHead(&in.first, in.n, n, &left.first, left.n)
	moveHead(&in.max, in.n, n, &left.max, left.n)
	moveHead(&in.rest, in.n, n, &left.rest, left.n)
	moveHead(&in.child, in.n, n, &left.child, left.n)
	in.n, left.n = in.n-n, left.n+n
}

// The arrays of a node are changed alike. Of each, the first n are in use, and
// the others are zero.

func put[T any](a *[fanout]T, n, i int, v T) {
	copy(a[i+1:n+1], a[i:n])
	a[i] = v
}

func cut[T any](a *[fanout]T, n, i int) {
	copy(a[i:n-1], a[i+1:n])
	clear(a[n-1 : n])
}

// moveTail moves a[at:n] before b[:m].
func moveTail[T any](a *[fanout]T, n, at int, b *[fanout]T, m int) {
	copy(b[n-at:], b[:m])
	copy(b[:], a[at:n])
	clear(a[at:n])
}

// moveHead moves b[:n] of b[:m] behind a[:l].
func moveHead[T any](b *[fanout]T, m, n int, a *[fanout]T, l int) {
	copy(a[l:], b[:n])
	copy(b[:], b[n:m])
	clear(b[m-n : m])
}
