package model

import (
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"time"
)

// Case is a set of threads, the memory that they start with, and what must not
// happen.
type Case struct {
	Name string

	programs []*program
	start    state
	buffer   int                     // stores that a store buffer holds
	finish   []int                   // the threads that have to finish, if the machine is fair
	never    func(s *state) Property // what is broken, besides what steps find broken; may be nil

	// data says that the properties of data are looked at and WaitsForOpenSections
	// is not, so that they have to show a defect by themselves.
	data bool

	core core // of the step that is being executed, so that it need not be allocated
}

// move is what led from one state to the next: thread t took its step in one of
// the step's ways, or its oldest store reached memory.
type move struct {
	t     uint8
	drain bool
	way   uint8
}

// Result is what an exploration found.
type Result struct {
	States int
	Depth  int // the number of moves to the state that is farthest from the start
	Time   time.Duration

	// Broken is the property that is violated, or Holds, and Trace shows how, in
	// the fewest moves: a column for each thread, and time going down. In it,
	// v=1 is a load, v<-1 a store to the store buffer, (v=1) that store on its
	// arrival in memory, and v:=1 a store that does not pass through the buffer.
	Broken Property
	Trace  string
}

// graph is the states found so far, in the order in which they were found: a
// breadth-first search works through its own result.
type graph struct {
	c      *Case
	states []state
	from   []uint32 // the state that each was found from
	by     []move   // and the move
	depth  int

	table []uint32 // positions in states plus 1, by hash
	seed  maphash.Seed
}

// limit is a number of states that no case should come near.
const limit = 1 << 26

func newGraph(c *Case) *graph {
	return &graph{c: c, table: make([]uint32, 1<<12), seed: maphash.MakeSeed()}
}

// find returns where s is, or where in the table it would be noted.
func (g *graph) find(s *state) (pos int, slot uint64) {
	mask := uint64(len(g.table) - 1)
	for slot = maphash.Comparable(g.seed, *s) & mask; ; slot = (slot + 1) & mask {
		switch e := g.table[slot]; {
		case e == 0:
			return -1, slot
		case g.states[e-1] == *s:
			return int(e - 1), slot
		}
	}
}

// add notes s unless it is known.
func (g *graph) add(s *state, from int, by move) {
	pos, slot := g.find(s)
	if pos >= 0 {
		return
	}
	if len(g.states) == limit {
		panic("model: case " + g.c.Name + " has too many states")
	}
	g.states = append(g.states, *s)
	g.from = append(g.from, uint32(from))
	g.by = append(g.by, by)
	g.table[slot] = uint32(len(g.states))
	if 2*len(g.states) < len(g.table) {
		return
	}
	g.table = make([]uint32, 2*len(g.table))
	for i := range g.states {
		_, slot := g.find(&g.states[i])
		g.table[slot] = uint32(i + 1)
	}
}

// apply makes move m in s, and reports whether it can be made.
func (c *Case) apply(s *state, m move, log *string) bool {
	t := int(m.t)
	if m.drain {
		st, ok := s.drain(t)
		if ok && log != nil {
			*log = fmt.Sprintf("(%v=%d)", st.to, st.value)
		}
		return ok
	}
	p, th := c.programs[t], &s.threads[t]
	if int(th.pc) == len(p.steps) {
		return false
	}
	st := &p.steps[th.pc]
	if log != nil {
		*log = st.name
	}
	th.pc++
	c.core = core{state: s, c: c, t: t, way: int(m.way), log: log}
	if !st.do(&c.core) {
		return false
	}
	if p.forever && int(th.pc) == len(p.steps) {
		th.pc = p.restart
	}
	if s.broken == Holds && c.never != nil {
		s.broken = c.never(s)
	}
	return true
}

// successors calls f with each state that one move leads to from s. The state is
// overwritten afterwards.
func (c *Case) successors(s *state, f func(next *state, m move)) {
	next := new(state)
	for t, p := range c.programs {
		th := &s.threads[t]
		if th.n > 0 {
			m := move{t: uint8(t), drain: true}
			*next = *s
			c.apply(next, m, nil)
			f(next, m)
		}
		if int(th.pc) == len(p.steps) {
			continue
		}
		for way := range max(p.steps[th.pc].ways, 1) {
			m := move{t: uint8(t), way: uint8(way)}
			*next = *s
			if c.apply(next, m, nil) {
				f(next, m)
			}
		}
	}
}

// explore finds every state, or the first in which a property is violated.
func (c *Case) explore() (g *graph, broken int) {
	g = newGraph(c)
	g.add(&c.start, 0, move{})
	for at, level := 0, 1; at < len(g.states); at++ {
		if at == level {
			g.depth++
			level = len(g.states)
		}
		s := g.states[at] // a copy: the slice moves as it grows
		if s.broken != Holds {
			return g, at
		}
		c.successors(&s, func(next *state, m move) { g.add(next, at, m) })
	}
	return g, -1
}

// Explore takes the case through every interleaving. It stops at the first state
// in which a property is violated. If there is none, it looks for an execution
// that goes on for ever, or comes to a halt, without the updaters of the case
// having finished, although no thread and no store buffer is passed over for
// ever.
func Explore(c *Case) Result {
	start := time.Now()
	g, broken := c.explore()
	r := Result{States: len(g.states), Depth: g.depth}
	if broken >= 0 {
		r.Broken = g.states[broken].broken
		r.Trace = c.print(r.Broken, g.path(broken), nil)
	} else if at, cycle, found := g.starved(); found {
		r.Broken = EveryGracePeriodEnds
		r.Trace = c.print(r.Broken, g.path(at), cycle)
	}
	r.Time = time.Since(start)
	return r
}

// path returns the moves that lead to a state.
func (g *graph) path(to int) (path []move) {
	for ; to > 0; to = int(g.from[to]) {
		path = append(path, g.by[to])
	}
	slices.Reverse(path)
	return path
}

// print makes the moves of path, and then those of cycle, and says what happens.
func (c *Case) print(broken Property, path, cycle []move) string {
	const gap = 2
	rows := make([][]string, 0, len(path)+len(cycle))
	width := make([]int, len(c.programs))
	for t, p := range c.programs {
		width[t] = len(p.name)
	}
	s := c.start
	for _, m := range append(path[:len(path):len(path)], cycle...) {
		row := make([]string, len(c.programs))
		c.apply(&s, m, &row[m.t])
		width[m.t] = max(width[m.t], len(row[m.t]))
		rows = append(rows, row)
	}

	var b strings.Builder
	line := func(row func(t int) string) {
		var l strings.Builder
		for t := range c.programs {
			fmt.Fprintf(&l, "%-*s", width[t]+gap, row(t))
		}
		b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
	}
	line(func(t int) string { return c.programs[t].name })
	for i, row := range rows {
		if len(cycle) > 0 && i == len(path) {
			b.WriteString("and then, for ever:\n")
		}
		line(func(t int) string { return row[t] })
	}
	fmt.Fprintf(&b, "broken: %v\n", broken)
	return b.String()
}
