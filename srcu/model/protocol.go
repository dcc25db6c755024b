package model

// Flavour is where the fences between readers and updaters are.
type Flavour uint8

// The flavours of package srcu.
const (
	// Asymmetric readers count themselves with plain increments. The updater
	// fences for them, with membarrier, once for a grace period.
	Asymmetric Flavour = iota

	// Fenced readers count themselves with LOCK-prefixed additions.
	Fenced
)

func (f Flavour) String() string { return [...]string{"asymmetric", "fenced"}[f] }

// Protocol is the counter protocol, or one with a defect.
type Protocol struct {
	Flavour Flavour
	Defect  Defect

	// Bits is the width of the counters; zero means 8, which no case can wrap
	// from zero.
	Bits int

	// From is what every counter starts at.
	From uint8
}

func (p Protocol) String() string {
	s := p.Flavour.String()
	if p.Defect != Sound {
		s += ", " + p.Defect.String()
	}
	return s
}

func (p Protocol) mask() uint8 {
	if p.Bits == 0 {
		return 0xff
	}
	return 1<<p.Bits - 1
}

// Defect is a way to get the protocol wrong. Some turn out to be none: their
// comments say so.
type Defect uint8

// The defects. Names in parentheses are those of the same defects in package
// srcu.
const (
	Sound Defect = iota

	// Of a grace period.
	NoFirstScan       // the rank not in use is not waited for (SM1)
	NoFlip            // both ranks are waited for, without a flip (SM2)
	InactiveOnly      // the rank not in use is waited for, and nothing else is done (SM2)
	LocksFirst        // sections opened are summed before sections closed (SM3)
	PlainFlip         // no fence after the flip (SM8); needs narrow counters to matter
	FlipFirst         // the flip comes before the first scan, whose rank is then in use (SM10)
	FlipFirstSameRank // the flip comes before the first scan, so that the second is of the same rank (SM10)
	NoMutex           // grace periods overlap (SM11)
	Leftover          // a counter starts with a section that was never opened (SM19)
	ClearAfter        // the counters of the retired rank are cleared once it is empty (SM19)
	AtLeast           // more closed than opened will do (SM23); needs counters that wrap to matter
	NoMembarrier      // readers without fences, and no membarrier (SM6, SM21)
	OwnMembarrier     // readers without fences, and a membarrier that fences its caller only (SM21)
	MembarrierLate    // membarrier between the scans, not before the first
	MembarrierEarly   // membarrier before seq says that a grace period is under way
	TwoMembarriers    // a second membarrier, after the flip; needs narrow counters to be of use

	// Of a reader.
	OneCounter    // one counter that goes up and down (SM4)
	UnlockCurrent // a section is closed in the rank that is in use at its end (SM5)
	PlainLock     // no fence after a fenced reader's lock (SM6)
	PlainUnlock   // no fence before a fenced reader's unlock (SM7); harmless on TSO
	StaleIdx      // idx is fetched once, for all sections (SM24)
	SharedCell    // plain increments of a cell with two writers

	// Of the sequence number.
	JoinRunning       // a grace period under way counts (SM9)
	PollExactly       // a cookie is reached by its own number only (SM17)
	SnapshotUnfenced  // no fence between the caller's stores and the load of seq
	NeededOverwritten // the last StartPoll decides what is needed

	// Of callbacks.
	CallbacksEarly // those queued during a grace period are run at its end (SM15)

	// Of the list of registered readers.
	ListOnce   // it is loaded once, for all grace periods (SM18)
	ListPerSum // it is loaded for each of the two sums that are compared
)

var defects = [...]string{
	Sound:             "sound",
	NoFirstScan:       "no first scan",
	InactiveOnly:      "no flip, no second scan",
	NoFlip:            "no flip",
	LocksFirst:        "locks summed before unlocks",
	FlipFirst:         "flip before the first scan",
	FlipFirstSameRank: "flip before the first scan, one rank scanned twice",
	NoMutex:           "no mutex around the grace period",
	PlainFlip:         "no fence after the flip",
	AtLeast:           "unlocks >= locks",
	Leftover:          "counters not cleared",
	ClearAfter:        "counters cleared",
	NoMembarrier:      "no membarrier",
	OwnMembarrier:     "membarrier fences its caller only",
	MembarrierLate:    "membarrier after the first scan",
	MembarrierEarly:   "membarrier before seq says scan1",
	TwoMembarriers:    "second membarrier after the flip",
	OneCounter:        "one up-and-down counter",
	UnlockCurrent:     "unlock in the current rank",
	PlainLock:         "no fence after lock",
	PlainUnlock:       "no fence before unlock",
	StaleIdx:          "idx cached across sections",
	SharedCell:        "two threads share a cell",
	JoinRunning:       "snapshot joins a running grace period",
	PollExactly:       "Poll compares with ==",
	SnapshotUnfenced:  "no fence before the snapshot",
	NeededOverwritten: "needed overwritten, not raised",
	CallbacksEarly:    "callbacks of this grace period run at its end",
	ListOnce:          "reader list never loaded again",
	ListPerSum:        "reader list loaded for each sum",
}

func (d Defect) String() string { return defects[d] }

// Property is what a case can violate.
type Property uint8

// Properties, of which the second group is of the data that threads see and the
// first of the protocol itself.
const (
	Holds Property = iota

	WaitsForOpenSections // a grace period ends after every section that was open when it was asked for
	EveryGracePeriodEnds // in a fair execution whose sections end
	PollStaysTrue        // of a cookie for which it was true
	SumsNotNegative      // no more sections are found closed than opened

	NoUseAfterFree // no section sees an object that was freed
	Publish        // who sees what was written after a grace period sees what was written before it
	Overlap        // a section that misses what was written before a grace period does not see what was written after it
	Mutual         // a section that misses what was written before a grace period is seen by who comes after it
)

func (p Property) String() string {
	return [...]string{
		Holds:                "",
		WaitsForOpenSections: "waits for open sections",
		EveryGracePeriodEnds: "every grace period ends",
		PollStaysTrue:        "Poll stays true",
		SumsNotNegative:      "sums are not negative",
		NoUseAfterFree:       "no use after free",
		Publish:              "litmus publish",
		Overlap:              "litmus overlap",
		Mutual:               "litmus mutual",
	}[p]
}

// The registers of a reader.
const (
	outer = iota // the token of a section
	inner        // the token of a section inside it
	seen         // what was loaded
)

// The registers of an updater.
const (
	goal   = iota // the number of grace periods that have to have ended
	rank          // the one that is scanned
	opened        // sum of locks
	closed        // sum of unlocks
	list          // the readers that are registered
	batch         // of callbacks; in a litmus test, what was loaded

	// fenced is the threads that a membarrier has fenced, a bit for each. No sum
	// is being formed then.
	fenced = opened
)

// builder writes the programs of a case.
type builder struct {
	Protocol
	cells   int  // of counters
	threads int  // in the case
	listed  bool // some cells are those of registered readers: a scan loads a list
}

// count adds a step that increments one of the counters of a cell, in the rank
// of a token, and then does the bookkeeping of the section. It is inc of package
// srcu, in which alone the flavours differ.
func (b *builder) count(pr *program, name string, counter func(cell, rank uint8) variable, cell uint8, token int, plain bool, then func(c *core)) {
	place := func(c *core) variable { return counter(cell, *c.reg(token)) }
	by := uint8(1)
	if b.Defect == OneCounter && counter(cell, 0) == unlocks(cell, 0) {
		place = func(c *core) variable { return locks(cell, *c.reg(token)) }
		by = ^uint8(0)
	}
	if b.Defect == SharedCell {
		// The cell has another writer, which may come between load and store.
		pr.add(name, func(c *core) bool {
			*c.reg(seen) = c.load(place(c))
			return true
		})
		pr.add(name, func(c *core) bool {
			v, value := place(c), (*c.reg(seen)+by)&b.mask()
			*c.reg(seen) = 0
			then(c)
			return c.store(v, value)
		})
		return
	}
	// Load, addition and store are one step: nobody else writes the counter, or
	// the instruction is atomic.
	pr.add(name, func(c *core) bool {
		v := place(c)
		value := (c.get(v) + by) & b.mask()
		then(c)
		if b.Flavour == Asymmetric || plain {
			return c.store(v, value)
		}
		return c.write(v, value)
	})
}

// lock is ReadLock on a cell, with the token in a register.
func (b *builder) lock(pr *program, section, cell uint8, token int) {
	if b.Defect != StaleIdx || pr.here() == 0 {
		b.fetch(pr, "lock:", token)
	}
	b.count(pr, "lock:", locks, cell, token, b.Defect == PlainLock, func(c *core) { c.begin(section) })
}

// unlock is ReadUnlock on a cell of the section whose token is in a register.
func (b *builder) unlock(pr *program, section, cell uint8, token int) {
	if b.Defect == UnlockCurrent {
		b.fetch(pr, "unlock:", token)
	}
	b.count(pr, "unlock:", unlocks, cell, token, b.Defect == PlainUnlock, func(c *core) {
		if b.Defect != StaleIdx {
			*c.reg(token) = 0
		}
		c.end(section)
	})
}

func (b *builder) fetch(pr *program, name string, token int) {
	pr.add(name, func(c *core) bool {
		*c.reg(token) = c.load(idx)
		return true
	})
}

// snapshot sets the register goal. It is where the wait of its thread begins.
//
// The fence before the load is not a step of its own: to find one's store buffer
// empty and to load is the same as to load with an empty store buffer.
func (b *builder) snapshot(pr *program) {
	pr.add("snapshot:", func(c *core) bool {
		if b.Defect != SnapshotUnfenced && !c.fence() {
			return false
		}
		now := c.load(seq)
		*c.reg(goal) = now>>1 + 1
		if now&1 != 0 && b.Defect != JoinRunning {
			*c.reg(goal)++
		}
		c.ask()
		return true
	})
}

// reached is ended in package srcu: it allows for wrap. A sequence word is a
// counter of seven bits, and one bit for scan1 and scan2 alike, between which
// nobody distinguishes.
func (p Protocol) reached(now, goal uint8) bool {
	if p.Defect == PollExactly {
		return now>>1 == goal&0x7f
	}
	return int8((now>>1-goal)<<1) >= 0
}

// synchronize is Synchronize.
func (b *builder) synchronize(pr *program) {
	b.snapshot(pr)
	b.runUntil(pr)
}

// runUntil waits for the grace period in the register goal, and runs those that
// nobody else does. Its last step answers the thread.
func (b *builder) runUntil(pr *program) {
	if b.Defect != NoMutex {
		pr.add("mutex:", func(c *core) bool { return c.get(gp) == 0 && c.write(gp, 1) })
	}
	again := pr.here()
	if b.Defect == MembarrierEarly {
		b.membarrier(pr)
	}
	var out uint8
	// The load and the addition can be one step: with the mutex held, nobody else
	// writes seq.
	pr.add("ended?", func(c *core) bool {
		now := c.load(seq)
		if b.reached(now, *c.reg(goal)) {
			c.me().pc = out
			return true
		}
		return c.write(seq, now+1)
	})
	switch b.Defect {
	case NoMembarrier, MembarrierLate, MembarrierEarly:
	default:
		if b.Flavour == Asymmetric {
			b.membarrier(pr)
		}
	}
	switch b.Defect {
	case NoFirstScan:
		b.flip(pr)
		b.scan(pr, "scan2", 1)
	case InactiveOnly:
		b.scan(pr, "scan1", 1)
	case NoFlip:
		b.scan(pr, "scan1", 1)
		b.scan(pr, "scan2", 0)
	case FlipFirst:
		b.flip(pr)
		b.scan(pr, "scan1", 0)
		b.scan(pr, "scan2", 1)
	case FlipFirstSameRank:
		b.flip(pr)
		b.scan(pr, "scan1", 1)
		b.scan(pr, "scan2", 1)
	default:
		b.scan(pr, "scan1", 1)
		if b.Defect == MembarrierLate {
			b.membarrier(pr)
		}
		b.flip(pr)
		if b.Defect == TwoMembarriers {
			b.membarrier(pr)
		}
		b.scan(pr, "scan2", 1)
	}
	if b.Defect == ClearAfter {
		for cell := range uint8(b.cells) {
			for _, counter := range []func(cell, rank uint8) variable{locks, unlocks} {
				pr.add("clear:", func(c *core) bool { return c.write(counter(cell, c.get(idx)^1), 0) })
			}
		}
	}
	pr.add("idle:", func(c *core) bool {
		c.me().pc = again
		return c.write(seq, c.get(seq)+1)
	})
	out = pr.here()
	pr.add("return", func(c *core) bool {
		*c.reg(goal) = 0
		c.answer(c.t)
		return b.Defect == NoMutex || c.write(gp, 0)
	})
}

// membarrier has every thread execute a fence, each at a moment of its own
// between begin and end of the call, in any order. For the caller it is one too.
func (b *builder) membarrier(pr *program) {
	if b.Defect == OwnMembarrier {
		pr.add("membarrier", (*core).fence)
		return
	}
	pr.steps = append(pr.steps, step{name: "membarrier:", ways: b.threads, do: func(c *core) bool {
		mask := c.reg(fenced)
		if *mask&(1<<c.way) != 0 {
			return false
		}
		for more := true; more; {
			_, more = c.drain(c.way)
		}
		*mask |= 1 << c.way
		if c.log != nil {
			c.say("fence on %s", c.c.programs[c.way].name)
		}
		if *mask == 1<<b.threads-1 {
			*mask = 0
		} else {
			c.me().pc--
		}
		return true
	}})
}

func (b *builder) flip(pr *program) {
	pr.add("flip:", func(c *core) bool {
		if b.Defect == PlainFlip {
			return c.store(idx, c.get(idx)^1)
		}
		return c.write(idx, c.get(idx)^1)
	})
}

// scan waits until the rank that differs from idx by other is drained. Each pass
// loads the counters one at a time, and only those of cells that are listed. The
// list is loaded once for a pass: a reader that leaves it between the two sums
// would have sections in one of them only.
func (b *builder) scan(pr *program, name string, other uint8) {
	name += ":"
	pr.add(name, func(c *core) bool {
		*c.reg(rank) = c.load(idx) ^ other
		return true
	})
	again := pr.here()
	load := func() {
		if !b.listed {
			return
		}
		pr.add(name, func(c *core) bool {
			if l := c.reg(list); b.Defect != ListOnce || *l == 0 {
				*l = c.load(handles)
			}
			return true
		})
	}
	sum := func(reg int, counter func(cell, rank uint8) variable) {
		for cell := range uint8(b.cells) {
			pr.add(name, func(c *core) bool {
				if !b.listed || *c.reg(list)&(1<<cell) != 0 {
					*c.reg(reg) += c.load(counter(cell, *c.reg(rank)))
				}
				return true
			})
		}
	}
	load()
	switch b.Defect {
	case OneCounter:
		sum(opened, locks)
	case LocksFirst:
		sum(opened, locks)
		sum(closed, unlocks)
	case ListPerSum:
		sum(closed, unlocks)
		load()
		sum(opened, locks)
	default:
		sum(closed, unlocks)
		sum(opened, locks)
	}
	last := &pr.steps[len(pr.steps)-1]
	add := last.do
	last.do = func(c *core) bool {
		add(c)
		u, l := *c.reg(closed)&b.mask(), *c.reg(opened)&b.mask()
		if b.Defect == Sound && b.Bits == 0 && int8(l-u) < 0 {
			c.broken = SumsNotNegative // package srcu panics
		}
		*c.reg(closed), *c.reg(opened) = 0, 0
		if b.Defect != ListOnce {
			*c.reg(list) = 0 // dead
		}
		if u == l || b.Defect == AtLeast && u >= l {
			*c.reg(rank) = 0
		} else {
			c.me().pc = again
		}
		return true
	}
}

// poll is Poll of the cookie in the register goal, until it is true, and once
// more.
func (b *builder) poll(pr *program) {
	pr.add("poll:", func(c *core) bool {
		if !b.reached(c.load(seq), *c.reg(goal)) {
			return false
		}
		c.answer(c.t)
		return true
	})
	pr.add("poll again:", func(c *core) bool {
		if !b.reached(c.load(seq), *c.reg(goal)) {
			c.broken = PollStaysTrue
		}
		*c.reg(goal) = 0
		return true
	})
}

// startPoll is StartPoll, and Poll until the cookie is reached.
func (b *builder) startPoll(pr *program) {
	b.snapshot(pr)
	// A lock is held during this step.
	pr.add("need:", func(c *core) bool {
		n, was := *c.reg(goal), c.load(needed)
		if int8((n-was)<<1) <= 0 && b.Defect != NeededOverwritten {
			n = was
		}
		return c.write(needed, n)
	})
	b.poll(pr)
}

// call queues a callback that answers the calling thread.
func (b *builder) call(pr *program) {
	pr.add("call:", func(c *core) bool {
		c.ask()
		return c.write(head, c.load(head)|1<<c.t)
	})
}

// worker runs grace periods and callbacks while there is something to do. A
// callback answers the thread that queued it.
func (b *builder) worker() *program {
	pr := &program{name: "worker", forever: true}
	early := b.Defect == CallbacksEarly
	var run uint8
	// The lock is held during this step, and nobody else writes seq.
	pr.add("take:", func(c *core) bool {
		queued, n := c.load(head), c.load(needed)
		if queued == 0 && b.reached(c.load(seq), n) {
			return false
		}
		if queued == 0 {
			*c.reg(goal) = n
			c.me().pc = run
			return true
		}
		if early {
			return true
		}
		*c.reg(batch) = queued
		return c.write(head, 0)
	})
	b.snapshot(pr)
	run = pr.here()
	b.runUntil(pr)
	if early {
		pr.add("take late:", func(c *core) bool {
			*c.reg(batch) = c.load(head)
			return c.write(head, 0)
		})
	}
	pr.add("callbacks:", func(c *core) bool {
		for t := range c.must {
			if *c.reg(batch)&(1<<t) != 0 {
				c.answer(t)
			}
		}
		*c.reg(batch) = 0
		return true
	})
	return pr
}
