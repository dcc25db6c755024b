package model

import "slices"

// processes counts what the machine has to be fair to: every thread, and every
// store buffer.
const processes = 2 * maxThreads

func (m move) process() int {
	if m.drain {
		return maxThreads + int(m.t)
	}
	return int(m.t)
}

func (c *Case) unfinished(s *state) bool {
	for _, t := range c.finish {
		if !c.programs[t].done(s, t) {
			return true
		}
	}
	return false
}

// edge is a move in the graph.
type edge struct {
	to uint32
	by move
}

// edges appends the moves that can be made in a state.
func (g *graph) edges(list []edge, from int) []edge {
	g.c.successors(&g.states[from], func(next *state, m move) {
		pos, _ := g.find(next)
		list = append(list, edge{uint32(pos), m})
	})
	return list
}

// starved returns an unfinished state and a fair cycle of unfinished states from
// it, or one in which no move can be made and no cycle.
//
// States that an execution visits for ever can all be reached from each other:
// they are in one strongly connected component of the graph of the unfinished
// states. A component has a fair cycle if every process makes a move in it, or is
// unable to in some state of it.
func (g *graph) starved() (at int, cycle []move, found bool) {
	// Tarjan's algorithm, without recursion. A frame is a state whose edges are
	// being followed; they lie on a stack of their own.
	type frame struct{ at, first, next int }
	var edges []edge
	order := make([]uint32, len(g.states)) // 0: not yet seen
	low := make([]uint32, len(g.states))
	member := make([]uint32, len(g.states)) // of the component with this number; 0: it is not complete
	var clock uint32
	var stack []int
	var frames []frame
	enter := func(at int) {
		clock++
		order[at], low[at] = clock, clock
		stack = append(stack, at)
		frames = append(frames, frame{at, len(edges), len(edges)})
		edges = g.edges(edges, at)
	}
	for root := range g.states {
		if order[root] != 0 || !g.c.unfinished(&g.states[root]) {
			continue
		}
		enter(root)
		for len(frames) > 0 {
			f := &frames[len(frames)-1]
			if f.first == len(edges) {
				return f.at, nil, true
			}
			if f.next < len(edges) {
				to := int(edges[f.next].to)
				f.next++
				switch {
				case member[to] != 0 || !g.c.unfinished(&g.states[to]):
				case order[to] == 0:
					enter(to)
				default:
					low[f.at] = min(low[f.at], order[to])
				}
				continue
			}
			at := f.at
			loop := slices.ContainsFunc(edges[f.first:], func(e edge) bool { return int(e.to) == at })
			edges = edges[:f.first]
			frames = frames[:len(frames)-1]
			if len(frames) > 0 {
				up := frames[len(frames)-1].at
				low[up] = min(low[up], low[at])
			}
			if low[at] < order[at] {
				continue
			}
			first := len(stack) - 1
			for stack[first] != at {
				first--
			}
			component := stack[first:]
			stack = stack[:first]
			id := order[at]
			for _, s := range component {
				member[s] = id
			}
			if len(component) == 1 && !loop {
				continue
			}
			inside := func(s uint32) bool { return member[s] == id }
			if cycle := g.fairCycle(at, component, inside); cycle != nil {
				return at, cycle, true
			}
		}
	}
	return 0, nil, false
}

// fairCycle returns a fair cycle through a component, from one of its states, or
// nil if there is none. The component has a cycle.
func (g *graph) fairCycle(at int, component []int, inside func(s uint32) bool) (cycle []move) {
	var moves, waits [processes]bool // in the component; in some state of it
	for _, s := range component {
		for _, e := range g.edges(nil, s) {
			if inside(e.to) {
				moves[e.by.process()] = true
			}
		}
		for p, able := range g.able(s) {
			waits[p] = waits[p] || !able
		}
	}
	for p := range processes {
		if !moves[p] && !waits[p] {
			return nil
		}
	}

	// Walk to whatever serves one process after the other, and back.
	var served [processes]bool
	pos := at
	look := func() {
		for p, able := range g.able(pos) {
			served[p] = served[p] || !able
		}
	}
	walk := func(wanted func(e edge) bool) {
		for _, e := range g.walk(pos, inside, wanted) {
			pos = int(e.to)
			cycle = append(cycle, e.by)
			served[e.by.process()] = true
			look()
		}
	}
	look()
	for p := range processes {
		if !served[p] {
			walk(func(e edge) bool { return e.by.process() == p || !moves[p] && !g.able(int(e.to))[p] })
		}
	}
	if pos != at || len(cycle) == 0 {
		walk(func(e edge) bool { return int(e.to) == at })
	}
	return cycle
}

// able returns which processes can move in a state.
func (g *graph) able(s int) (able [processes]bool) {
	for _, e := range g.edges(nil, s) {
		able[e.by.process()] = true
	}
	return able
}

// walk returns the shortest path through a component that starts in a state of
// it and ends with an edge that is wanted.
func (g *graph) walk(from int, inside func(s uint32) bool, wanted func(e edge) bool) (path []edge) {
	type hop struct {
		from int
		by   edge
	}
	came := map[int]hop{from: {}}
	for queue := []int{from}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		for _, e := range g.edges(nil, at) {
			if !inside(e.to) {
				continue
			}
			if wanted(e) {
				path = append(path, e)
				for ; at != from; at = came[at].from {
					path = append(path, came[at].by)
				}
				slices.Reverse(path)
				return path
			}
			if _, seen := came[int(e.to)]; !seen {
				came[int(e.to)] = hop{at, e}
				queue = append(queue, int(e.to))
			}
		}
	}
	panic("model: a component is not connected")
}
