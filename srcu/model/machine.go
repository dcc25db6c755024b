package model

import "fmt"

// The bounds of a case. They are arrays in a state, so that it can be compared.
const (
	maxThreads = 5
	maxCells   = 3
	maxBuffer  = 6 // stores that a store buffer holds; the next one waits
	maxRegs    = 6
)

// variable is a place in memory.
type variable uint8

// The counters come first, four to a cell; see locks and unlocks.
const (
	idx     variable = 4*maxCells + iota // the rank that new sections enter
	seq                                  // grace periods ended, shifted left, and whether one is under way
	gp                                   // the mutex: held or not
	handles                              // the registered readers: a bit for each cell that a scan looks at
	needed                               // grace periods that StartPoll has asked for
	head                                 // the callbacks queued: a bit for each thread that called Call
	shared                               // the pointer that readers follow: which of two objects
	poison0                              // object 0 has been freed
	poison1                              // object 1 has been freed
	token                                // a section handed to another thread: its rank plus 1
	dataX                                // data
	dataY
	maxVars
)

func locks(cell, rank uint8) variable   { return variable(4*cell + rank) }
func unlocks(cell, rank uint8) variable { return variable(4*cell + 2 + rank) }

func (v variable) String() string {
	if v < idx {
		return fmt.Sprintf("%s%d[%d]", [...]string{"locks", "unlocks"}[v/2%2], v/4, v%2)
	}
	return [...]string{"idx", "seq", "gp", "handles", "needed", "head", "shared", "poison0", "poison1", "token", "x", "y"}[v-idx]
}

// store is a store on its way to memory.
type store struct {
	to    variable
	value uint8
}

// thread is what a processor knows of the thread that it runs.
type thread struct {
	pc   uint8            // the step that is next
	n    uint8            // stores in buf
	buf  [maxBuffer]store // the store buffer, oldest first; zero beyond n
	regs [maxRegs]uint8   // zero when dead, so that states which differ in nothing else are one
}

// state is everything that the future depends on, and what the properties have
// to remember of the past. It is compared and hashed as a whole.
type state struct {
	mem     [maxVars]uint8
	threads [maxThreads]thread

	// open has a bit for each section that is open: its begin has been executed,
	// although it may not have reached memory, and its end has not been.
	open uint8

	// must has, for each thread that waits for a grace period, the sections that
	// were open when it asked for it and still are.
	must [maxThreads]uint8

	broken Property // the property that the last step violated
}

// core is a processor during one step: the state that the step changes, seen by
// one thread. Its methods report false where the step has to wait; the state is
// of no use then.
type core struct {
	*state
	c   *Case
	t   int
	way int     // which of the step's ways; see step
	log *string // the trace's line for the step; nil: there is no trace
}

func (c *core) me() *thread { return &c.threads[c.t] }

func (c *core) reg(r int) *uint8 { return &c.me().regs[r] }

// say adds to the trace. Callers look first whether there is one: most steps are
// executed without, and there are millions.
func (c *core) say(format string, args ...any) { *c.log += fmt.Sprintf(" "+format, args...) }

// get is load, for the load of an increment: a trace shows only its store.
func (c *core) get(v variable) (value uint8) {
	th := c.me()
	value = c.mem[v]
	for i := range th.n {
		if th.buf[i].to == v {
			value = th.buf[i].value
		}
	}
	return value
}

// load is an ordinary load. The thread's own stores are seen at once.
func (c *core) load(v variable) (value uint8) {
	value = c.get(v)
	if c.log != nil {
		c.say("%v=%d", v, value)
	}
	return value
}

// store is an ordinary store: it goes to the store buffer.
func (c *core) store(v variable, value uint8) bool {
	th := c.me()
	if int(th.n) == c.c.buffer {
		return false
	}
	th.buf[th.n] = store{v, value}
	th.n++
	if c.log != nil {
		c.say("%v<-%d", v, value)
	}
	return true
}

// fence waits until the thread's own stores are in memory.
func (c *core) fence() bool { return c.me().n == 0 }

// write is the store of an instruction with a LOCK prefix. What such an
// instruction loads before may be loaded with load, in the same step.
func (c *core) write(v variable, value uint8) bool {
	if !c.fence() {
		return false
	}
	c.mem[v] = value
	if c.log != nil {
		c.say("%v:=%d", v, value)
	}
	return true
}

// drain moves the oldest store of thread t to memory.
func (s *state) drain(t int) (st store, ok bool) {
	th := &s.threads[t]
	if th.n == 0 {
		return store{}, false
	}
	st = th.buf[0]
	s.mem[st.to] = st.value
	copy(th.buf[:], th.buf[1:])
	th.n--
	th.buf[th.n] = store{}
	return st, true
}

// begin and end follow a section, and ask and answer the wait of a thread, for
// the sake of WaitsForOpenSections.
func (c *core) begin(section uint8) {
	if !c.c.data {
		c.open |= 1 << section
	}
}

func (c *core) end(section uint8) {
	c.open &^= 1 << section
	for t := range c.must {
		c.must[t] &^= 1 << section
	}
}

func (c *core) ask() { c.must[c.t] = c.open }

func (c *core) answer(t int) {
	if c.must[t] == 0 {
		return
	}
	c.broken = WaitsForOpenSections
	if c.log != nil {
		c.say("too early for %s", c.c.programs[t].name)
	}
}

// step is one atomic action of a thread: at most one access to memory, and
// whatever the thread does by itself around it.
type step struct {
	name string

	// do executes the step; c.me().pc already points to the step after it. It
	// reports false if the step has to wait.
	do func(c *core) bool

	// ways is the number of ways in which the step can be taken, where the
	// machine chooses; zero means one.
	ways int
}

// program is what a thread executes.
type program struct {
	name    string
	steps   []step
	forever bool  // it goes on after the last step
	restart uint8 // with this one
}

func (p *program) add(name string, do func(c *core) bool) {
	p.steps = append(p.steps, step{name: name, do: do})
}

// here is the step that is added next, as the target of a jump.
func (p *program) here() uint8 { return uint8(len(p.steps)) }

// done reports whether thread t of a state has executed all of p.
func (p *program) done(s *state, t int) bool { return int(s.threads[t].pc) == len(p.steps) }
