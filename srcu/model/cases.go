package model

import "fmt"

// Size is how much there is of everything in a case. What a case has a fixed
// number of, it ignores.
type Size struct {
	Readers  int // each on a thread and a cell of its own
	Sections int // that each reader opens, one after the other
	Updaters int // each on a thread of its own
	Periods  int // that each updater waits for, one after the other
}

func (n Size) String() string {
	return fmt.Sprintf("%dx%d readers, %dx%d updaters", n.Readers, n.Sections, n.Updaters, n.Periods)
}

// handed is the number of a section that is not its thread's ordinary one, which
// has the number of the thread.
const handed = 7

// newCase starts a case whose first threads are readers with a cell each, and
// which has others besides.
func newCase(name string, p Protocol, n Size, readers, others int) (*Case, *builder) {
	if readers > maxCells || readers+others > maxThreads {
		panic(fmt.Sprintf("model: %s: %v: too large", name, n))
	}
	c := &Case{Name: fmt.Sprintf("%s: %v", name, n), buffer: maxBuffer}
	if p.Bits != 0 {
		c.Name += fmt.Sprintf(", %d-bit counters", p.Bits)
	}
	for cell := range uint8(readers) {
		for rank := range uint8(2) {
			c.start.mem[locks(cell, rank)] = p.From & p.mask()
			c.start.mem[unlocks(cell, rank)] = p.From & p.mask()
		}
	}
	if p.Defect == Leftover {
		c.start.mem[unlocks(0, 0)]++
	}
	return c, &builder{Protocol: p, cells: readers, threads: readers + others}
}

func (c *Case) thread(name string) *program {
	p := &program{name: name}
	c.programs = append(c.programs, p)
	return p
}

// reader adds a thread, and returns the cell that is its own.
func (c *Case) reader() (p *program, cell uint8) {
	cell = uint8(len(c.programs))
	return c.thread(fmt.Sprintf("reader %d", cell+1)), cell
}

// updater adds a thread that has to finish.
func (c *Case) updater() *program {
	c.finish = append(c.finish, len(c.programs))
	return c.thread(fmt.Sprintf("updater %d", len(c.finish)))
}

// readers adds readers that do nothing but be counted.
func (b *builder) readers(c *Case, readers, sections int) {
	for range readers {
		pr, cell := c.reader()
		for range sections {
			b.lock(pr, cell, cell, outer)
			b.unlock(pr, cell, cell, outer)
		}
	}
}

// updaters adds updaters that do nothing but wait.
func (b *builder) updaters(c *Case, updaters, periods int) {
	for range updaters {
		pr := c.updater()
		for range periods {
			b.synchronize(pr)
		}
	}
}

// Sections is readers that are counted, and updaters that wait for them. It
// includes the reader that stalls between fetching idx and counting itself while
// grace periods go by.
func Sections(p Protocol, n Size) *Case {
	c, b := newCase("sections", p, n, n.Readers, n.Updaters)
	b.readers(c, n.Readers, n.Sections)
	b.updaters(c, n.Updaters, n.Periods)
	return c
}

// Endless is Sections with readers that never stop. Counters have two bits, for
// a finite number of states, and store buffers hold only two stores, because
// larger ones ask for wider counters; see the package comment.
func Endless(p Protocol, n Size) *Case {
	p.Bits = 2
	c, b := newCase("endless sections", p, n, n.Readers, n.Updaters)
	c.buffer = 2
	b.readers(c, n.Readers, 1)
	for _, pr := range c.programs {
		pr.forever = true
		if p.Defect == StaleIdx {
			pr.restart = 1
		}
	}
	b.updaters(c, n.Updaters, n.Periods)
	return c
}

// LitmusPublish is the first of three litmus tests of the guarantee. An updater
// writes x, waits for a grace period, and writes or reads y; sections of the
// first reader do the rest:
//
//	         updater           section         forbidden
//	Publish  x=1; wait; y=1    r1=y; r2=x      r1=1, r2=0
//	Overlap  x=1; wait; y=1    r1=x; r2=y      r1=0, r2=1
//	Mutual   x=1; wait; r2=y   r1=x; y=1       r1=0, r2=0
//
// Other readers are counted, and other updaters wait for a grace period, which
// the first may share.
func LitmusPublish(p Protocol, n Size) *Case {
	return litmus(p, n, Publish, dataY, dataX, func(r1, r2 uint8) bool { return r1 == 1 && r2 == 0 })
}

// LitmusOverlap is the second litmus test.
func LitmusOverlap(p Protocol, n Size) *Case {
	return litmus(p, n, Overlap, dataX, dataY, func(r1, r2 uint8) bool { return r1 == 0 && r2 == 1 })
}

func litmus(p Protocol, n Size, test Property, first, second variable, forbidden func(r1, r2 uint8) bool) *Case {
	c, b := newCase(test.String(), p, n, n.Readers, n.Updaters)
	c.data = true
	pr, cell := c.reader()
	for range n.Sections {
		b.lock(pr, cell, cell, outer)
		pr.add("r1:", func(c *core) bool {
			*c.reg(seen) = c.load(first)
			return true
		})
		pr.add("r2:", func(c *core) bool {
			if forbidden(*c.reg(seen), c.load(second)) {
				c.broken = test
			}
			*c.reg(seen) = 0
			return true
		})
		b.unlock(pr, cell, cell, outer)
	}
	b.readers(c, n.Readers-1, n.Sections)
	pr = c.updater()
	pr.add("x:", func(c *core) bool { return c.store(dataX, 1) })
	b.synchronize(pr)
	pr.add("y:", func(c *core) bool { return c.store(dataY, 1) })
	b.updaters(c, n.Updaters-1, 1)
	return c
}

// LitmusMutual is the third litmus test. Each thread knows half of the outcome.
func LitmusMutual(p Protocol, n Size) *Case {
	c, b := newCase(Mutual.String(), p, n, n.Readers, n.Updaters)
	c.data = true
	pr, cell := c.reader()
	for range n.Sections {
		b.lock(pr, cell, cell, outer)
		pr.add("r1:", func(c *core) bool {
			if c.load(dataX) == 0 {
				*c.reg(seen) = 1 // in one section or another
			}
			return true
		})
		pr.add("y:", func(c *core) bool { return c.store(dataY, 1) })
		b.unlock(pr, cell, cell, outer)
	}
	b.readers(c, n.Readers-1, n.Sections)
	reader, updater := 0, len(c.programs)
	pr = c.updater()
	pr.add("x:", func(c *core) bool { return c.store(dataX, 1) })
	b.synchronize(pr)
	pr.add("r2:", func(c *core) bool {
		if c.load(dataY) == 0 {
			*c.reg(batch) = 1
		}
		return true
	})
	b.updaters(c, n.Updaters-1, 1)
	c.never = func(s *state) Property {
		if s.threads[reader].regs[seen] == 1 && s.threads[updater].regs[batch] == 1 {
			return Mutual
		}
		return Holds
	}
	return c
}

// Reclaim is readers that follow a pointer and look at the object twice, and an
// updater that swaps the pointer between two objects and frees the one that it
// replaced.
func Reclaim(p Protocol, n Size) *Case {
	c, b := newCase("reclaim", p, n, n.Readers, 1)
	c.data = true
	for range n.Readers {
		pr, cell := c.reader()
		for range n.Sections {
			b.lock(pr, cell, cell, outer)
			pr.add("follow:", func(c *core) bool {
				*c.reg(seen) = c.load(shared)
				return true
			})
			for look := range 2 {
				pr.add("look:", func(c *core) bool {
					if c.load(poison0+variable(*c.reg(seen))) != 0 {
						c.broken = NoUseAfterFree
					}
					if look == 1 {
						*c.reg(seen) = 0
					}
					return true
				})
			}
			b.unlock(pr, cell, cell, outer)
		}
	}
	c.start.mem[poison1] = 1
	pr := c.updater()
	for swap := range n.Periods {
		old, fresh := variable(swap%2), variable(1-swap%2)
		pr.add("new:", func(c *core) bool { return c.store(poison0+fresh, 0) })
		pr.add("swap:", func(c *core) bool { return c.store(shared, uint8(fresh)) })
		b.synchronize(pr)
		pr.add("free:", func(c *core) bool { return c.store(poison0+old, 1) })
	}
	return c
}

// Nested is Sections with a first reader that opens a section inside its own.
func Nested(p Protocol, n Size) *Case { return nested("nested", p, n, false) }

// Crossed is Nested with the outer section closed first.
func Crossed(p Protocol, n Size) *Case { return nested("crossed", p, n, true) }

func nested(name string, p Protocol, n Size, crossed bool) *Case {
	c, b := newCase(name, p, n, n.Readers, n.Updaters)
	pr, cell := c.reader()
	b.lock(pr, cell, cell, outer)
	b.lock(pr, handed, cell, inner)
	if crossed {
		b.unlock(pr, cell, cell, outer)
		b.unlock(pr, handed, cell, inner)
	} else {
		b.unlock(pr, handed, cell, inner)
		b.unlock(pr, cell, cell, outer)
	}
	b.readers(c, n.Readers-1, n.Sections)
	b.updaters(c, n.Updaters, n.Periods)
	return c
}

// HandOver is a section that one reader opens on its cell, and another closes on
// its own while it is in a section itself. The handing over is a store and a
// load: on TSO that is enough to synchronize.
func HandOver(p Protocol, n Size) *Case {
	c, b := newCase("hand-over", p, n, 2, n.Updaters)
	from, cell := c.reader()
	b.lock(from, handed, cell, outer)
	from.add("give:", func(c *core) bool {
		value := *c.reg(outer) + 1
		*c.reg(outer) = 0
		return c.store(token, value)
	})
	for range n.Sections - 1 {
		b.lock(from, cell, cell, outer)
		b.unlock(from, cell, cell, outer)
	}
	to, cell := c.reader()
	b.lock(to, cell, cell, outer)
	to.add("take:", func(c *core) bool {
		value := c.load(token)
		*c.reg(inner) = value - 1
		return value != 0
	})
	b.unlock(to, handed, cell, inner)
	b.unlock(to, cell, cell, outer)
	b.updaters(c, n.Updaters, n.Periods)
	return c
}

// OneCell is two readers that count themselves in the same cell.
func OneCell(p Protocol, n Size) *Case {
	c, b := newCase("one cell", p, n, 2, n.Updaters)
	for range 2 {
		pr, section := c.reader()
		for range n.Sections {
			b.lock(pr, section, 0, outer)
			b.unlock(pr, section, 0, outer)
		}
	}
	b.updaters(c, n.Updaters, n.Periods)
	return c
}

// Registered is a reader with a cell that every scan looks at, and others that
// register their cells, open sections, and take the cells off the list again.
func Registered(p Protocol, n Size) *Case {
	c, b := newCase("registered", p, n, 1+n.Readers, n.Updaters)
	b.listed = true
	c.start.mem[handles] = 1
	b.readers(c, 1, n.Sections)
	for range n.Readers {
		pr, cell := c.reader()
		pr.add("register:", func(c *core) bool { return c.write(handles, c.get(handles)|1<<cell) })
		for range n.Sections {
			b.lock(pr, cell, cell, outer)
			b.unlock(pr, cell, cell, outer)
		}
		pr.add("close:", func(c *core) bool { return c.write(handles, c.get(handles)&^(1<<cell)) })
	}
	b.updaters(c, n.Updaters, n.Periods)
	return c
}

// GetState is Sections with a thread that takes a cookie and polls until it is
// reached, which it need not be.
func GetState(p Protocol, n Size) *Case {
	c, b := newCase("get state", p, n, n.Readers, 1+n.Updaters)
	b.readers(c, n.Readers, n.Sections)
	pr := c.thread("poller")
	b.snapshot(pr)
	b.poll(pr)
	b.updaters(c, n.Updaters, n.Periods)
	return c
}

// StartPoll is readers, and updaters that do not run grace periods themselves:
// they ask a worker for them, and poll.
func StartPoll(p Protocol, n Size) *Case {
	c, b := newCase("start poll", p, n, n.Readers, n.Updaters+1)
	b.readers(c, n.Readers, n.Sections)
	for range n.Updaters {
		b.startPoll(c.updater())
	}
	c.programs = append(c.programs, b.worker())
	return c
}

// Callback is StartPoll with a thread that queues a callback.
func Callback(p Protocol, n Size) *Case {
	c, b := newCase("callback", p, n, n.Readers, n.Updaters+2)
	b.readers(c, n.Readers, n.Sections)
	for range n.Updaters {
		b.startPoll(c.updater())
	}
	b.call(c.thread("caller"))
	c.programs = append(c.programs, b.worker())
	return c
}
