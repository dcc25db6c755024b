package litmus

import (
	"fmt"
	"math/rand/v2"

	"golang.org/x/arch/x86/x86asm"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
)

// interpreter executes generated code, one instruction of one thread at a time, on a
// memory that is sequentially consistent. It knows the instructions that Generate emits, and
// refuses others; and every access has to be one that the code has a reason for.
type interpreter struct {
	t         *Test
	instances int
	code      []byte
	memory    map[uint64]uint64
	decoded   map[uint64]x86asm.Inst
	threads   []*cpu
	may       map[uint64]access // what each thread may use, by address
	steps     int
}

type access struct {
	read, write uint // a bit for each thread
}

type cpu struct {
	id     int
	regs   [16]uint64
	rip    uint64
	zero   bool
	carry  bool
	exited bool
	marks  []uint32
}

func newInterpreter(t *Test, code *Code, instances int) *interpreter {
	m := &interpreter{t: t, instances: instances, code: code.Bytes, memory: map[uint64]uint64{}, decoded: map[uint64]x86asm.Inst{}, may: map[uint64]access{}}
	allow := func(gpa addr.GPA, read, write uint) {
		a := m.may[uint64(gpa)]
		m.may[uint64(gpa)] = access{a.read | read, a.write | write}
	}
	all := uint(1)<<len(t.Guests) - 1
	allow(goWord, all, 0)
	allow(phaseWord, all, 0)
	for i := range t.Guests {
		self := uint(1) << i
		allow(line(doneWords, i), 0, self)
		allow(line(markWords, i), 0, self)
		allow(line(barriers, i), all, self)
		allow(line(startWords, i), self, 0)
		allow(line(gapWords, i), self, 0)
		allow(line(splitWords, i), self, 0)
		allow(line(seedWords, i), self, 0)
		for k := range instances {
			for off := addr.GPA(0); off <= phaseAfter; off += 8 {
				allow(recordGPA(i, k)+off, 0, self)
			}
		}
		for _, s := range t.Guests[i].Statements {
			for k := range instances {
				if s.Loc.Name == "" || s.Op == Flush {
					continue
				}
				gpa := t.address(s.Loc.Name) + addr.GPA(offset(s.Loc, k))
				switch s.Op {
				case Load, Await:
					allow(gpa, self, 0)
				case Store:
					allow(gpa, 0, self)
				default:
					allow(gpa, self, self)
				}
			}
		}
		m.memory[uint64(line(seedWords, i))] = uint64(i)*7919 + 1
		c := &cpu{id: i, rip: uint64(guests.Image)}
		c.regs[6] = uint64(i) // rsi
		m.threads = append(m.threads, c)
	}
	return m
}

// alias returns the address under which the interpreter's memory has what is at an address
// of the guest.
func (m *interpreter) alias(a uint64) uint64 {
	for _, x := range m.t.Aliases {
		if base := uint64(m.t.address(x.Name)); a >= base && a < base+addr.HugeSize {
			return a - base + uint64(m.t.address(x.Of))
		}
	}
	return a
}

func (m *interpreter) load(c *cpu, a uint64) (uint64, error) {
	if m.may[a].read>>c.id&1 == 0 {
		return 0, fmt.Errorf("thread %d loads from %#x", c.id, a)
	}
	return m.memory[m.alias(a)], nil
}

func (m *interpreter) store(c *cpu, a, v uint64) error {
	if m.may[a].write>>c.id&1 == 0 {
		return fmt.Errorf("thread %d stores to %#x", c.id, a)
	}
	m.memory[m.alias(a)] = v
	return nil
}

// number returns which register r is, and how many bytes of it.
func number(r x86asm.Reg) (n, bytes int) {
	switch {
	case x86asm.RAX <= r && r <= x86asm.R15:
		return int(r - x86asm.RAX), 8
	case x86asm.EAX <= r && r <= x86asm.R15L:
		return int(r - x86asm.EAX), 4
	case r == x86asm.DX:
		return 2, 2
	}
	return -1, 0
}

func effective(c *cpu, mem x86asm.Mem) uint64 {
	a := uint64(mem.Disp)
	if n, _ := number(mem.Base); n >= 0 {
		a += c.regs[n]
	}
	return a
}

func (m *interpreter) get(c *cpu, arg x86asm.Arg) (uint64, error) {
	switch x := arg.(type) {
	case x86asm.Imm:
		return uint64(x), nil
	case x86asm.Mem:
		return m.load(c, effective(c, x))
	case x86asm.Reg:
		n, bytes := number(x)
		if n < 0 {
			return 0, fmt.Errorf("register %v is not used", x)
		}
		if bytes == 4 {
			return c.regs[n] & 0xffffffff, nil
		}
		return c.regs[n], nil
	}
	return 0, fmt.Errorf("argument %v", arg)
}

func (m *interpreter) set(c *cpu, arg x86asm.Arg, v uint64) error {
	switch x := arg.(type) {
	case x86asm.Mem:
		return m.store(c, effective(c, x), v)
	case x86asm.Reg:
		n, bytes := number(x)
		switch {
		case n < 0:
			return fmt.Errorf("register %v is not used", x)
		case bytes == 2:
			v &= 0xffff
		case bytes == 4:
			v &= 0xffffffff
		}
		c.regs[n] = v
		return nil
	}
	return fmt.Errorf("argument %v", arg)
}

// step executes one instruction of a thread.
func (m *interpreter) step(c *cpu) error {
	m.steps++
	inst, ok := m.decoded[c.rip]
	if !ok {
		off := c.rip - uint64(guests.Image)
		if off >= uint64(len(m.code)) {
			return fmt.Errorf("thread %d is at %#x, outside of the code", c.id, c.rip)
		}
		var err error
		if inst, err = x86asm.Decode(m.code[off:], 64); err != nil {
			return fmt.Errorf("at %#x: %w", c.rip, err)
		}
		m.decoded[c.rip] = inst
	}
	next := c.rip + uint64(inst.Len)
	a, err := uint64(0), error(nil)
	b := uint64(0)
	memOnlyWrites := inst.Op == x86asm.MOV
	if _, isRel := inst.Args[0].(x86asm.Rel); inst.Args[0] != nil && !isRel && inst.Op != x86asm.OUT && inst.Op != x86asm.INVLPG {
		if _, isMem := inst.Args[0].(x86asm.Mem); !isMem || !memOnlyWrites {
			if a, err = m.get(c, inst.Args[0]); err != nil {
				return err
			}
		}
		if inst.Args[1] != nil {
			if b, err = m.get(c, inst.Args[1]); err != nil {
				return err
			}
		}
	}
	wide := uint64(1<<64 - 1)
	if r, ok := inst.Args[0].(x86asm.Reg); ok {
		if _, bytes := number(r); bytes == 4 {
			wide = 0xffffffff
		}
	}
	jump := func(taken bool) {
		if taken {
			next += uint64(int64(inst.Args[0].(x86asm.Rel)))
		}
	}
	result := func(v uint64) error {
		v &= wide
		c.zero = v == 0
		return m.set(c, inst.Args[0], v)
	}
	switch inst.Op {
	case x86asm.MOV:
		err = m.set(c, inst.Args[0], b)
	case x86asm.INC:
		err = result(a + 1)
	case x86asm.DEC:
		err = result(a - 1)
	case x86asm.ADD:
		err = result(a + b)
	case x86asm.AND:
		err = result(a & b)
	case x86asm.XOR:
		err = result(a ^ b)
	case x86asm.SHL:
		err = result(a << b)
	case x86asm.SHR:
		err = result(a >> b)
	case x86asm.CMP:
		c.zero, c.carry = (a-b)&wide == 0, a&wide < b&wide
	case x86asm.XADD:
		if err = m.set(c, inst.Args[1], a); err == nil {
			err = result(a + b)
		}
	case x86asm.XCHG:
		if err = m.set(c, inst.Args[1], a); err == nil {
			err = m.set(c, inst.Args[0], b)
		}
	case x86asm.JMP:
		jump(true)
	case x86asm.JE:
		jump(c.zero)
	case x86asm.JNE:
		jump(!c.zero)
	case x86asm.JB:
		jump(c.carry)
	case x86asm.JAE:
		jump(!c.carry)
	case x86asm.PAUSE, x86asm.MFENCE, x86asm.INVLPG:
	case x86asm.OUT:
		switch uint16(c.regs[2]) {
		case guests.PortExit:
			c.exited = true
		case guests.PortMark:
			c.marks = append(c.marks, uint32(c.regs[0]))
		default:
			return fmt.Errorf("thread %d writes to port %#x", c.id, uint16(c.regs[2]))
		}
	default:
		return fmt.Errorf("at %#x: no code of ours has %v", c.rip, inst)
	}
	c.rip = next
	return err
}

// round runs one round, with the threads' instructions interleaved by chance, and calls
// between before each of them. It returns the outcomes of the instances.
func (m *interpreter) round(rng *rand.Rand, n uint64, between func()) ([][]uint64, error) {
	for _, p := range m.t.Pages {
		for k := range m.instances {
			for w, v := range p.Init {
				m.memory[uint64(m.t.address(p.Name))+offset(Loc{Word: w}, k)] = v
			}
		}
	}
	for i := range m.t.Guests {
		m.memory[uint64(line(startWords, i))] = rng.Uint64N(8)
		m.memory[uint64(line(gapWords, i))] = rng.Uint64N(8)
		m.memory[uint64(line(splitWords, i))] = rng.Uint64N(uint64(len(m.t.Guests[i].Statements)) + 1)
	}
	m.memory[uint64(phaseWord)] = 3 * n
	m.memory[uint64(goWord)] = n
	left := 0
	for _, c := range m.threads {
		if m.memory[uint64(line(doneWords, c.id))] != n {
			left++
		}
	}
	for begin := m.steps; left > 0; {
		between()
		c := m.threads[rng.IntN(len(m.threads))]
		for range rng.IntN(6) {
			if c.exited {
				return nil, fmt.Errorf("thread %d has exited", c.id)
			}
			if err := m.step(c); err != nil {
				return nil, err
			}
		}
		left = 0
		for _, c := range m.threads {
			if m.memory[uint64(line(doneWords, c.id))] != n {
				left++
			}
		}
		if m.steps-begin > 50_000_000 {
			return nil, fmt.Errorf("round %d does not end", n)
		}
	}
	var outcomes [][]uint64
	for k := range m.instances {
		var outcome []uint64
		for _, r := range m.t.Observed {
			v := uint64(0)
			if r.Thread == "" {
				v = m.memory[uint64(m.t.address(r.Loc.Name))+offset(r.Loc, k)]
			}
			for i := range m.t.Guests {
				if m.t.Guests[i].Name == r.Thread {
					v = m.memory[uint64(recordGPA(i, k))+uint64(8*r.Reg)]
				}
			}
			outcome = append(outcome, v)
		}
		outcomes = append(outcomes, outcome)
	}
	return outcomes, nil
}

// end has all threads exit.
func (m *interpreter) end() error {
	m.memory[uint64(goWord)] = allDone
	for _, c := range m.threads {
		for n := 0; !c.exited; n++ {
			if err := m.step(c); err != nil {
				return err
			}
			if n > 1000 {
				return fmt.Errorf("thread %d does not exit", c.id)
			}
		}
		if len(c.marks) != 1 || c.marks[0] != markBegun {
			return fmt.Errorf("thread %d has reached the marks %v", c.id, c.marks)
		}
	}
	return nil
}
