package interval

import (
	"errors"
	"fmt"
)

// Check returns an error for every invariant of the structure that does not
// hold, joined, or nil. It takes O(n).
func (t *Tree[V]) Check() error {
	c := checker[V]{t: t}
	if t.root == (node[V]{}) {
		if t.height != 0 {
			c.report("a tree without a root has height %d", t.height)
		}
	} else {
		c.node(t.root, "root", t.height)
	}
	if c.entries != t.len {
		c.report("Len is %d, and there are %d entries", t.len, c.entries)
	}
	return errors.Join(c.violations...)
}

type checker[V comparable] struct {
	t          *Tree[V]
	violations []error
	entries    int // so far
	before     key // of the entry before the next
}

func (c *checker[V]) report(format string, args ...any) {
	c.violations = append(c.violations, fmt.Errorf("interval: "+format, args...))
}

// node checks nd, which is height levels above the leaves, where path says. It
// reports whether what a parent says of nd can be compared with it.
func (c *checker[V]) node(nd node[V], path string, height int) bool {
	switch {
	case nd.leaf == nil && nd.inner == nil:
		c.report("%s is nil", path)
		return false
	case nd.leaf != nil && nd.inner != nil:
		c.report("%s is a leaf and an inner node", path)
		return false
	case nd.leaf != nil && height != 0:
		c.report("%s is a leaf at height %d", path, height)
		return false
	case nd.inner != nil && height == 0:
		c.report("%s is an inner node at height 0", path)
		return false
	}
	least := minimum
	if path == "root" {
		least = min(2*height, 2)
	}
	if n := nd.len(); n < least || n > fanout {
		c.report("%s has %d entries, not %d to %d", path, n, least, fanout)
		return false
	}
	if height == 0 {
		c.leaf(nd.leaf, path)
	} else {
		c.inner(nd.inner, path, height)
	}
	return true
}

func (c *checker[V]) leaf(l *leaf[V], path string) {
	for i := range l.n {
		k := c.t.key(l, i)
		if k.last < k.first {
			c.report("%s[%d] is [%#x, %#x]", path, i, k.first, k.last)
		}
		if c.entries > 0 && k.less(c.before) {
			c.report("%s[%d] is %#x, and the entry before it is %#x", path, i, k, c.before)
		}
		c.before = k
		c.entries++
	}
	for i := l.n; i < fanout; i++ {
		if l.value[i] != *new(V) {
			c.report("%s[%d] is free, and not zero", path, i)
		}
	}
}

func (c *checker[V]) inner(in *inner[V], path string, height int) {
	for i := range in.n {
		at := fmt.Sprintf("%s[%d]", path, i)
		if !c.node(in.child[i], at, height-1) {
			continue
		}
		first, last := c.t.describes(in.child[i])
		if k := in.key(i); k != first {
			c.report("%s begins with %#x, and its parent says %#x", at, first, k)
		}
		if in.max[i] != last {
			c.report("%s goes up to %#x, and its parent says %#x", at, last, in.max[i])
		}
	}
	for i := in.n; i < fanout; i++ {
		if in.child[i] != (node[V]{}) {
			c.report("%s[%d] is free, and not nil", path, i)
		}
	}
}
