package litmus

import (
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/arch/x86/x86asm"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
)

// The words that both sides share, in the boot window, whose mapping never changes. Each
// is in a cache line of its own. Those of guest thread t are t lines further on.
//
//	word      written by  what it is
//	go        host        the number of the round that may begin; allDone: none will
//	phase     host        three times the round: the change has not begun; 1 more: it has; 2 more: it has ended
//	done      guest       the number of the last round that the thread has ended
//	mark      guest       the number of the last round in which it reached its mark
//	barrier   guest       the instance that it is about to begin, among all of the run
//	start     host        turns of an empty loop before the first instance
//	gap       host        the same between two instances, or inside of each
//	split     host        the statement before which the gap is, from 1; 0: it is between instances
//	seed      host        of the thread's own jitter, not 0
const (
	control     = guests.Image + 0x40000
	goWord      = control
	phaseWord   = control + 1*lineBytes
	doneWords   = control + 2*lineBytes
	markWords   = doneWords + MaxGuests*lineBytes
	barriers    = markWords + MaxGuests*lineBytes
	startWords  = barriers + MaxGuests*lineBytes
	gapWords    = startWords + MaxGuests*lineBytes
	splitWords  = gapWords + MaxGuests*lineBytes
	seedWords   = splitWords + MaxGuests*lineBytes
	controlSize = seedWords + MaxGuests*lineBytes - control

	// records has what each instance of each thread has seen: its registers, and the phase
	// before and after.
	records     = guests.Image + 0x41000
	recordBytes = 128
	phaseBefore = 8 * Registers
	phaseAfter  = phaseBefore + 8

	allDone  = ^uint64(0)
	maxImage = control - guests.Image
)

// Records end below the stacks: this is negative otherwise, which does not compile.
const _ = uint64(guests.Image + guests.MaxImage - records - MaxGuests*MaxGuestInstances*recordBytes)

func line(base addr.GPA, t int) addr.GPA { return base + addr.GPA(t*lineBytes) }

// recordGPA returns the address of the record of an instance of thread t.
func recordGPA(t, instance int) addr.GPA {
	return records + addr.GPA((t*MaxGuestInstances+instance)*recordBytes)
}

// awaitTurns is how often an await looks at most.
const awaitTurns = 200_000

// markBegun is the mark by which vm.Config.OnMark learns on which OS thread a vCPU runs.
const markBegun = 1

// Code is the machine code of a test's guest threads, for guests.Image.
type Code struct {
	Bytes []byte
	notes map[int][]string // by offset: what the instructions from there on are
}

// Registers of the generated code. The test's r0 to r7 are r8 to r15.
//
//	rax, rcx  scratch
//	rbx       lineBytes times the instance
//	rbp       the record of the instance
//	rsi       the number of the round
//	rdi       the thread's random number
//	rsp       not used: nothing is called

// Generate makes the machine code of the guest threads of t, in which a round has so many
// instances.
//
// A thread waits for the round, by loads of the word go. It delays, and runs its
// instances: each begins when all threads are there, notes the phase of the host, does what
// the test says, and notes the phase again. Then it says that it is done. Nothing
// in it leaves the guest, but for a mark at the beginning, and the exit.
func Generate(t *Test, instances int) (*Code, error) {
	if most := t.maxInstances(); instances < 1 || instances > most {
		return nil, fmt.Errorf("%d instances are not 1 to %d", instances, most)
	}
	a := &assembler{notes: map[int][]string{}, labels: map[string]int{}}
	a.note("which thread is this?")
	for i := range t.Guests {
		a.emit(0x83, 0xfe, byte(i)) // cmp esi, i
		a.jump(jE, label("thread", i, 0))
	}
	a.jump(jmp, "end")
	for i := range t.Guests {
		a.thread(t, i, instances)
	}
	a.label("end")
	a.note("no more rounds")
	a.out(guests.PortExit, 0)
	a.label("stop")
	a.jump(jmp, "stop")
	if err := a.link(); err != nil {
		return nil, err
	}
	if len(a.code) > int(maxImage) {
		return nil, fmt.Errorf("the code of %d bytes is longer than %d", len(a.code), int(maxImage))
	}
	return &Code{a.code, a.notes}, nil
}

func label(kind string, n ...int) string { return fmt.Sprint(kind, n) }

func (a *assembler) thread(t *Test, i, instances int) {
	th := &t.Guests[i]
	a.note(fmt.Sprintf("guest %s", th.Name))
	a.label(label("thread", i, 0))
	a.out(guests.PortMark, markBegun)
	a.emit(0x31, 0xf6) // xor esi, esi
	a.loadAbs(rdi, line(seedWords, i))
	a.note("the next round")
	a.label(label("round", i))
	a.emit(0x48, 0xff, 0xc6) // inc rsi
	a.label(label("wait", i))
	a.loadAbs(rax, goWord)
	a.emit(0x48, 0x83, 0xf8, 0xff) // cmp rax, -1
	a.jump(jE, "end")
	a.emit(0x48, 0x39, 0xf0) // cmp rax, rsi
	a.jump(jE, label("go", i))
	a.pause()
	a.jump(jmp, label("wait", i))
	a.label(label("go", i))
	a.delayWord(line(startWords, i), label("start", i))
	a.emit(0x31, 0xdb)                                   // xor ebx, ebx
	a.emit(0xbd)                                         // mov ebp, imm32
	a.imm32(uint32(recordGPA(i, 0)))                     //
	a.note(fmt.Sprintf("an instance, of %d", instances)) //
	a.label(label("instance", i))
	if len(t.Guests) > 1 {
		a.barrier(len(t.Guests), i)
	}
	a.loadAbs(rax, phaseWord)
	a.emit(0x48, 0x89, 0x45, phaseBefore) // mov [rbp+64], rax
	used := 0
	for _, s := range th.Statements {
		if s.Reg >= 0 {
			used |= 1 << s.Reg
		}
		if s.From >= 0 {
			used |= 1 << s.From
		}
	}
	for r := range Registers {
		if used>>r&1 != 0 {
			a.emit(0x4d, 0x31, modrm(3, r, r)) // xor r, r
		}
	}
	for n := range th.Statements {
		s := &th.Statements[n]
		if n > 0 && t.hasHosts() {
			a.gap(i, n)
		}
		a.note(fmt.Sprintf("line %d: %v", s.Pos.Line, s))
		a.statement(t, i, n, s)
	}
	a.note("the outcome")
	a.loadAbs(rax, phaseWord)
	a.emit(0x48, 0x89, 0x45, phaseAfter) // mov [rbp+72], rax
	for r := range Registers {
		if used>>r&1 != 0 {
			a.emit(0x4c, 0x89, modrm(1, r, rbp), byte(8*r)) // mov [rbp+8*r], r
		}
	}
	a.emit(0x48, 0x81, 0xc5) // add rbp, imm32
	a.imm32(recordBytes)
	a.gap(i, 0)
	a.emit(0x83, 0xc3, lineBytes) // add ebx, 64
	a.emit(0x81, 0xfb)            // cmp ebx, imm32
	a.imm32(uint32(instances * lineBytes))
	a.jump(jB, label("instance", i))
	a.emit(0x48, 0x89, 0x34, 0x25) // mov [done], rsi
	a.imm32(uint32(line(doneWords, i)))
	a.jump(jmp, label("round", i))
}

// gap delays thread i if its split is n. A delay inside of instances has a change meet them in
// the middle.
func (a *assembler) gap(i, n int) {
	a.emit(0x83, 0x3c, 0x25) // cmp dword [split], imm8
	a.imm32(uint32(line(splitWords, i)))
	a.emit(byte(n))
	a.jump(jNE, label("whole", i, n))
	a.delayWord(line(gapWords, i), label("gap", i, n))
	a.label(label("whole", i, n))
}

// barrier has the thread wait until all are about to begin the same instance, and then a
// little longer, by chance.
func (a *assembler) barrier(threads, i int) {
	a.emit(0x48, 0x89, 0xf0)       // mov rax, rsi
	a.emit(0x48, 0xc1, 0xe0, 16)   // shl rax, 16: as much as MaxGuestInstances lines
	a.emit(0x48, 0x01, 0xd8)       // add rax, rbx
	a.emit(0x48, 0x89, 0x04, 0x25) // mov [barrier], rax
	a.imm32(uint32(line(barriers, i)))
	for o := range threads {
		if o == i {
			continue
		}
		a.label(label("barrier", i, o))
		a.emit(0x48, 0x39, 0x04, 0x25) // cmp [barrier of o], rax
		a.imm32(uint32(line(barriers, o)))
		a.jump(jAE, label("past", i, o))
		a.pause()
		a.jump(jmp, label("barrier", i, o))
		a.label(label("past", i, o))
	}
	// guests.Random
	for _, shift := range []struct{ op, n byte }{{0xe0, 13}, {0xe8, 7}, {0xe0, 17}} {
		a.emit(0x48, 0x89, 0xf8)              // mov rax, rdi
		a.emit(0x48, 0xc1, shift.op, shift.n) // shl or shr rax, n
		a.emit(0x48, 0x31, 0xc7)              // xor rdi, rax
	}
	a.emit(0x89, 0xf9)       // mov ecx, edi
	a.emit(0x83, 0xe1, 0x1f) // and ecx, 31
	a.delay(label("jitter", i))
}

func (a *assembler) statement(t *Test, thread, n int, s *Statement) {
	var disp uint32
	if s.Loc.Name != "" {
		disp = uint32(t.address(s.Loc.Name)) + uint32(8*s.Loc.Word)
	}
	mem := func(reg int) { // [rbx+disp32]
		a.emit(modrm(2, reg, rbx))
		a.imm32(disp)
	}
	movImm := func(reg int) { // mov r, imm32
		a.emit(0x49, 0xc7, modrm(3, 0, reg))
		a.imm32(uint32(s.Value))
	}
	switch s.Op {
	case Load:
		a.emit(0x4c, 0x8b) // mov r, [mem]
		mem(s.Reg)
	case Store:
		if s.From >= 0 {
			a.emit(0x4c, 0x89) // mov [mem], r
			mem(s.From)
			return
		}
		a.emit(0x48, 0xc7) // mov qword [mem], imm32
		mem(0)
		a.imm32(uint32(s.Value))
	case Add:
		movImm(s.Reg)
		a.emit(0xf0, 0x4c, 0x0f, 0xc1) // lock xadd [mem], r
		mem(s.Reg)
	case Swap:
		movImm(s.Reg)
		a.emit(0x4c, 0x87) // xchg [mem], r
		mem(s.Reg)
	case Await:
		a.emit(0xb9) // mov ecx, imm32
		a.imm32(awaitTurns)
		a.label(label("await", thread, n))
		a.emit(0x4c, 0x8b) // mov r, [mem]
		mem(s.Reg)
		a.emit(0x49, 0x81, modrm(3, 7, s.Reg)) // cmp r, imm32
		a.imm32(uint32(s.Value))
		a.jump(jE, label("come", thread, n))
		a.pause()
		a.emit(0xff, 0xc9) // dec ecx
		a.jump(jNE, label("await", thread, n))
		a.label(label("come", thread, n))
	case Fence:
		a.emit(0x0f, 0xae, 0xf0) // mfence
	case Mark:
		a.emit(0x48, 0x89, 0x34, 0x25) // mov [mark], rsi
		a.imm32(uint32(line(markWords, thread)))
	case Delay:
		if s.Value > 0 {
			a.emit(0xb9) // mov ecx, imm32
			a.imm32(uint32(s.Value))
			a.delay(label("delay", thread, n))
		}
	case Flush:
		a.emit(0x0f, 0x01) // invlpg [mem]
		mem(7)
	default:
		panic("litmus: no guest thread can " + string(s.Op))
	}
}

// Numbers of registers. r8 to r15 are those of the test by their last three bits.
const (
	rax = 0
	rbx = 3
	rbp = 5
	rdi = 7
)

func modrm(mod, reg, rm int) byte { return byte(mod<<6 | reg&7<<3 | rm&7) }

// assembler puts instructions together.
type assembler struct {
	code   []byte
	notes  map[int][]string
	labels map[string]int
	jumps  []struct {
		at int // of the 4 bytes that say how far
		to string
	}
}

func (a *assembler) emit(b ...byte)    { a.code = append(a.code, b...) }
func (a *assembler) imm32(v uint32)    { a.code = binary.LittleEndian.AppendUint32(a.code, v) }
func (a *assembler) label(name string) { a.labels[name] = len(a.code) }
func (a *assembler) note(text string) {
	a.notes[len(a.code)] = append(a.notes[len(a.code)], text)
}

// Conditions of jumps.
const (
	jmp = iota
	jB
	jAE
	jE
	jNE
)

func (a *assembler) jump(condition int, to string) {
	switch condition {
	case jmp:
		a.emit(0xe9)
	case jB:
		a.emit(0x0f, 0x82)
	case jAE:
		a.emit(0x0f, 0x83)
	case jE:
		a.emit(0x0f, 0x84)
	case jNE:
		a.emit(0x0f, 0x85)
	}
	a.jumps = append(a.jumps, struct {
		at int
		to string
	}{len(a.code), to})
	a.imm32(0)
}

// link makes jumps lead to their labels.
func (a *assembler) link() error {
	for _, j := range a.jumps {
		to, ok := a.labels[j.to]
		if !ok {
			return fmt.Errorf("a jump leads to %s, which there is not", j.to)
		}
		binary.LittleEndian.PutUint32(a.code[j.at:], uint32(to-(j.at+4)))
	}
	return nil
}

func (a *assembler) pause() { a.emit(0xf3, 0x90) }

// loadAbs loads the 8 bytes at gpa into rax or rdi.
func (a *assembler) loadAbs(reg int, gpa addr.GPA) {
	a.emit(0x48, 0x8b, modrm(0, reg, 4), 0x25) // mov reg, [disp32]
	a.imm32(uint32(gpa))
}

// delay takes ecx turns, at least one.
func (a *assembler) delay(name string) {
	a.emit(0xff, 0xc1) // inc ecx: never 0
	a.label(name)
	a.emit(0xff, 0xc9) // dec ecx
	a.jump(jNE, name)
}

// delayWord takes as many turns as the word at gpa says.
func (a *assembler) delayWord(gpa addr.GPA, name string) {
	a.emit(0x8b, 0x0c, 0x25) // mov ecx, [disp32]
	a.imm32(uint32(gpa))
	a.delay(name)
}

// out writes 4 bytes to a port.
func (a *assembler) out(port uint16, v uint32) {
	a.emit(0x66, 0xba, byte(port), byte(port>>8)) // mov dx, imm16
	a.emit(0xb8)                                  // mov eax, imm32
	a.imm32(v)
	a.emit(0xef) // out dx, eax
}

// String returns the code disassembled, an instruction a line, with what belongs to a
// statement behind a line with that.
func (c *Code) String() string {
	var b strings.Builder
	for i := 0; i < len(c.Bytes); {
		for _, note := range c.notes[i] {
			fmt.Fprintf(&b, "; %s\n", note)
		}
		at := uint64(guests.Image) + uint64(i)
		inst, err := x86asm.Decode(c.Bytes[i:], 64)
		if err != nil {
			fmt.Fprintf(&b, "%#x  %x (%v)\n", at, c.Bytes[i], err)
			i++
			continue
		}
		fmt.Fprintf(&b, "%#x  %s\n", at, x86asm.IntelSyntax(inst, at, nil))
		i += inst.Len
	}
	return b.String()
}
