package model

import "testing"

// outcome is what two threads have loaded.
type outcome [2]uint8

// outcomes returns every pair of values that two threads can have in their first
// registers when they are done and memory is at rest.
func outcomes(programs ...[]step) map[outcome]bool {
	c := &Case{Name: "machine", buffer: maxBuffer}
	for _, steps := range programs {
		c.programs = append(c.programs, &program{name: "thread", steps: steps})
	}
	g, _ := c.explore()
	found := map[outcome]bool{}
	for i := range g.states {
		s := &g.states[i]
		if moves := g.edges(nil, i); len(moves) == 0 {
			found[outcome{s.threads[0].regs[0], s.threads[1].regs[0]}] = true
		}
	}
	return found
}

// TestMachine holds the machine against what TSO is known for.
func TestMachine(t *testing.T) {
	store := func(v variable) step {
		return step{name: "store", do: func(c *core) bool { return c.store(v, 1) }}
	}
	locked := func(v variable) step {
		return step{name: "locked", do: func(c *core) bool { return c.write(v, 1) }}
	}
	load := func(v variable) step {
		return step{name: "load", do: func(c *core) bool {
			r := c.reg(0)
			*r = *r<<1 | c.load(v)
			return true
		}}
	}
	fence := step{name: "fence", do: (*core).fence}
	const x, y = dataX, dataY
	for name, tt := range map[string]struct {
		a, b []step
		look outcome // the loads of each thread, the first in the highest bit
		want bool
	}{
		"SB: stores after loads of other places":    {[]step{store(x), load(y)}, []step{store(y), load(x)}, outcome{0, 0}, true},
		"SB with fences":                            {[]step{store(x), fence, load(y)}, []step{store(y), fence, load(x)}, outcome{0, 0}, false},
		"SB with one fence":                         {[]step{store(x), fence, load(y)}, []step{store(y), load(x)}, outcome{0, 0}, true},
		"SB with locked stores":                     {[]step{locked(x), load(y)}, []step{locked(y), load(x)}, outcome{0, 0}, false},
		"SB with forwarding":                        {[]step{store(x), load(x), load(y)}, []step{store(y), load(y), load(x)}, outcome{0b10, 0b10}, true},
		"a thread does not miss its own store":      {[]step{store(x), load(x)}, []step{store(y), load(y)}, outcome{0, 1}, false},
		"MP: stores are in order, and so are loads": {[]step{store(x), store(y)}, []step{load(y), load(x)}, outcome{0, 0b10}, false},
		"MP: both are seen":                         {[]step{store(x), store(y)}, []step{load(y), load(x)}, outcome{0, 0b11}, true},
		"LB: stores are not before earlier loads":   {[]step{load(x), store(y)}, []step{load(y), store(x)}, outcome{1, 1}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := outcomes(tt.a, tt.b)[tt.look]; got != tt.want {
				t.Errorf("outcome %v possible: %v, want %v", tt.look, got, tt.want)
			}
		})
	}
}

// TestFairness looks for cycles that are there, and for cycles that only an
// unfair machine would go through.
func TestFairness(t *testing.T) {
	spin := func(v variable) step { // until v is 1
		return step{name: "spin", do: func(c *core) bool {
			if c.load(v) == 0 {
				c.me().pc--
				*c.reg(0) ^= 1 // so that to spin is to move
			}
			return true
		}}
	}
	set := func(v variable, value uint8) step {
		return step{name: "set", do: func(c *core) bool { return c.store(v, value) }}
	}
	wait := step{name: "wait", do: func(*core) bool { return false }}
	for name, tt := range map[string]struct {
		other   []step
		forever bool
		want    Property
	}{
		"nobody sets it":               {nil, false, EveryGracePeriodEnds},
		"it is set":                    {[]step{set(dataX, 1)}, false, Holds},
		"it is set now and then":       {[]step{set(dataX, 1), set(dataX, 0)}, true, EveryGracePeriodEnds},
		"who would set it has to wait": {[]step{wait, set(dataX, 1)}, false, EveryGracePeriodEnds},
	} {
		t.Run(name, func(t *testing.T) {
			c := &Case{Name: name, buffer: maxBuffer, finish: []int{0}, programs: []*program{
				{name: "spinner", steps: []step{spin(dataX)}},
				{name: "other", steps: tt.other, forever: tt.forever},
			}}
			r := Explore(c)
			if r.Broken != tt.want {
				t.Errorf("violated: %q, want %q\n%s", r.Broken, tt.want, r.Trace)
			}
		})
	}

	c := &Case{Name: "halt", buffer: maxBuffer, finish: []int{0}, programs: []*program{{name: "waiter", steps: []step{wait}}}}
	if r := Explore(c); r.Broken != EveryGracePeriodEnds {
		t.Errorf("a halt is not noticed: %+v", r)
	}
}
