package hostops

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// schedule is the lines of a script by what sets them off.
type schedule struct {
	blocks []block // immutable, in the order of the script

	// What follows is for the goroutine that carries the script out.
	start time.Time       // zero before the first step
	next  []time.Duration // by block: when it is due, since start; or never
}

// block is a line, and those with "then" that follow it.
type block struct{ lines []Line }

func (b block) when() When { return b.lines[0].When }

const never = time.Duration(math.MaxInt64)

func newSchedule(s *Script) *schedule {
	c := &schedule{}
	for i := 0; i < len(s.Lines); {
		end := i + 1
		for end < len(s.Lines) && s.Lines[end].When.Trigger == Then {
			end++
		}
		b := block{s.Lines[i:end]}
		at := never
		if w := b.when(); w.Trigger == At || w.Trigger == Every {
			at = w.D
		}
		c.blocks, c.next = append(c.blocks, b), append(c.next, at)
		i = end
	}
	return c
}

// on returns the blocks that e sets off. It may be called from any goroutine.
func (c *schedule) on(e event) (bs []block) {
	for _, b := range c.blocks {
		if w := b.when(); w.Trigger == e.trigger && (w.Trigger == OnFault || w.Any || w.Mark == e.mark) {
			bs = append(bs, b)
		}
	}
	return bs
}

// due returns the blocks that are due by now, in the order of their times and then of the
// script, and finds out when they will be again.
func (c *schedule) due() (bs []block) {
	now := c.now()
	var is []int
	for i, at := range c.next {
		if at <= now {
			is = append(is, i)
		}
	}
	slices.SortStableFunc(is, func(i, j int) int { return cmp.Compare(c.next[i], c.next[j]) })
	for _, i := range is {
		b := c.blocks[i]
		bs = append(bs, b)
		if w := b.when(); w.Trigger == Every {
			c.next[i] = after(now, w.D)
		} else {
			c.next[i] = never
		}
	}
	return bs
}

// after returns the first multiple of d that is after now.
func after(now, d time.Duration) time.Duration {
	at := now - now%d + d
	if at < now {
		return never
	}
	return at
}

// now returns the time since the start, which is the first time that this is called.
func (c *schedule) now() time.Duration {
	if c.start.IsZero() {
		c.start = time.Now()
	}
	return time.Since(c.start)
}

// wait returns how long it is until a block is due, which is very long if that takes
// a mark or a fault; and whether one can ever be again.
func (c *schedule) wait() (d time.Duration, more bool) {
	next := slices.Min(append([]time.Duration{never}, c.next...))
	for i, b := range c.blocks {
		w := b.when().Trigger
		more = more || w != At || c.next[i] != never
	}
	if next == never {
		return never, more
	}
	return max(0, next-c.now()), more
}
