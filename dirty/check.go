package dirty

import (
	"errors"
	"fmt"
)

// Check returns an error for every invariant of the structure that does not
// hold, joined, or nil. It looks at every word of every bitmap.
func (s *Set) Check() error {
	var c checker
	c.set("the set", s)
	return errors.Join(c.violations...)
}

// Check returns an error for every invariant of the structure that does not
// hold, joined, or nil. It may be called at any time, by any goroutine; what it
// sees of a log that is in use is not of one instant.
func (l *Log) Check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var c checker
	top := *l.top.Load()
	if len(top) > directories {
		c.report("the log has %d directories, and at most %d are below Limit", len(top), directories)
	}
	for i, dir := range top {
		if dir == nil {
			continue
		}
		for j := range dir {
			if b := dir[j].Load(); b != nil {
				c.bitmap(fmt.Sprintf("directory %d[%d]", i, j), b)
			}
		}
	}
	c.set("the set of other frames", &l.others)
	c.set("the discarded set", &l.discarded)
	switch {
	case (l.open != nil) != (l.phase == harvesting):
		c.report("in phase %d, an open harvest is there: %v", l.phase, l.open != nil)
	case l.open != nil:
		c.set("the harvest's dirty set", &l.open.dirty)
		c.set("the harvest's discarded set", &l.open.discarded)
	}
	return errors.Join(c.violations...)
}

type checker struct {
	violations []error
	owners     map[*bitmap]string
}

func (c *checker) report(format string, args ...any) {
	c.violations = append(c.violations, fmt.Errorf("dirty: "+format, args...))
}

// bitmap notes where b is, which is only there.
func (c *checker) bitmap(where string, b *bitmap) {
	if other, ok := c.owners[b]; ok {
		c.report("%s has the bitmap of %s", where, other)
	}
	if c.owners == nil {
		c.owners = map[*bitmap]string{}
	}
	c.owners[b] = where
}

func (c *checker) set(what string, s *Set) {
	for i := range s.spans {
		sp := &s.spans[i]
		where := fmt.Sprintf("span %d of %s, chunks [%#x, %#x),", i, what, sp.first, sp.end)
		if sp.first >= sp.end || sp.end > chunks {
			c.report("%s is empty or not below Limit", where)
		}
		if i > 0 && sp.first < s.spans[i-1].end {
			c.report("%s begins before the end of the one before it", where)
		}
		if sp.words == nil {
			if sp.n != chunkFrames {
				c.report("%s has no bitmap and %d frames", where, sp.n)
			}
			if i > 0 && s.spans[i-1].words == nil && s.spans[i-1].end == sp.first {
				c.report("%s goes on where the one before it, of whole chunks too, ends", where)
			}
			continue
		}
		c.bitmap(where, sp.words)
		if sp.end != sp.first+1 {
			c.report("%s has one bitmap", where)
		}
		if n := sp.words.count(); sp.n != n {
			c.report("%s has a bitmap of %d frames, and counts %d", where, n, sp.n)
		}
		if sp.n == 0 || sp.n >= chunkFrames {
			c.report("%s has a bitmap for %d frames", where, sp.n)
		}
	}
}
