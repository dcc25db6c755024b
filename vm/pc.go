package vm

import (
	"encoding/binary"
	"sync"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/kvm"
)

// pc is what an image finds at ports, and in memory where there is no RAM, beside what KVM
// has in the kernel: the interrupt controllers at 0x20, 0xa0, 0x4d0, IOAPIC and local APICs,
// and the timer at 0x40 and 0x61. The rest is an empty bus.
//
//	0x060, 0x064   a keyboard controller without a keyboard: self-test, A20, reset
//	0x070, 0x071   clock and CMOS
//	0x092          A20, and reset
//	0x0e0..0x0e8   kvm-unit-tests' device: echo, flush of a page; lines at 0x2000, memory at 0xff000000
//	0x0e9          debug console. It reads as itself
//	0x0f1          console of kvm-unit-tests
//	0x0f4..0x0f7   exit with status (value << 1) | 1
//	0x3f8          UART, interrupt 4
//	0x510, 0x511   fw_cfg: who, RAM, vCPUs
//	0x600..0x60b   power management: soft off, the timer
//	0xcf9          reset
//
// Accesses of 2 and 4 bytes are of as many ports, except where a register is wider.
type pc struct {
	m   *Machine
	now func() time.Time

	mu        sync.Mutex // protects what follows; inside of it the UART's
	begin     time.Time  // when the timer of power management was 0
	cmos      cmos
	keyboard  keyboard
	selected  []byte // what fw_cfg reads
	echo      [4]byte
	echoRAM   []byte // of the test device; nil until it is written
	pm1Status uint16
	pm1Enable uint16
}

const (
	portKeyboard  = 0x60
	portCommand   = 0x64
	portCMOS      = 0x70
	portA20       = 0x92
	portEcho      = 0xe0
	portFlush     = 0xe4
	portEchoBytes = 0xe8
	portTestOut   = 0xf1
	portDebugExit = 0xf4
	portConfig    = 0x510
	portPCI       = 0xcf8
	portTestIRQs  = 0x2000
	testIRQs      = 24
	testMemory    = addr.GPA(0xff000000)
	testMemoryLen = 0x10000

	irqUART = 4

	a20       = 1 << 1
	a20Reset  = 1 << 0
	pm1Sleep  = 1 << 13
	pm1SCI    = 1 << 0 // events interrupt: ACPI is on
	resetFull = 1 << 2
)

func (p *pc) init(m *Machine) {
	p.m, p.now = m, time.Now
	p.begin = p.now()
	p.cmos.init(m.config.RAM, m.config.VCPUs)
}

// portIO carries out an access to ports, one element after the other.
func (p *pc) portIO(e *kvm.IOExit) error {
	if !e.In && e.Size == 1 && (e.Port == guests.PortConsole || e.Port == portTestOut) {
		return p.m.devices.print(e.Data) // all elements at once
	}
	for i := range e.Count {
		element := e.Data[i*e.Size : (i+1)*e.Size]
		if e.In {
			p.in(e.Port, element)
		} else if err := p.out(e.Port, element); err != nil {
			return err
		}
	}
	return nil
}

// in reads ports.
func (p *pc) in(port uint16, data []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	value := func(v uint32) {
		var b [4]byte
		binary.LittleEndian.PutUint32(b[:], v)
		copy(data, b[:])
	}
	switch {
	case port >= portEcho && int(port)+len(data) <= portEcho+4: // ports do not wrap
		copy(data, p.echo[port-portEcho:])
	case port == portEchoBytes && len(data) == 4: // one of its bytes alone is the debug console
		copy(data, p.echo[:])
	case port == boot.PortPM1Event && len(data) > 1:
		value(uint32(p.pm1Status) | uint32(p.pm1Enable)<<16)
	case port == boot.PortPM1Event+2:
		value(uint32(p.pm1Enable))
	case port == boot.PortPM1Control:
		value(pm1SCI)
	case port == boot.PortPMTimer:
		// As many ticks as there have been, without overflow.
		d := p.now().Sub(p.begin)
		ticks := uint64(d/time.Second)*boot.PMTimerHz + uint64(d%time.Second)*boot.PMTimerHz/uint64(time.Second)
		value(uint32(ticks) & 0xffffff)
	default:
		for i := range data {
			data[i] = p.inByteLocked(int(port) + i)
		}
	}
}

// inByteLocked reads a port of one byte.
//
// Preconditions: p.mu is held.
func (p *pc) inByteLocked(port int) byte {
	switch {
	case guests.PortUART <= port && port < guests.PortUART+uartPorts:
		return p.m.devices.uart.in(uint16(port - guests.PortUART))
	case port == portKeyboard:
		return p.keyboard.data()
	case port == portCommand:
		return p.keyboard.status()
	case port == portCMOS+1:
		return p.cmos.read(p.now())
	case port == portA20:
		return a20
	case port == guests.PortConsole:
		return guests.PortConsole // how its presence is found out
	case port == portEchoBytes:
		return p.echo[0]
	case portDebugExit <= port && port < portDebugExit+4:
		return 0
	case port == portConfig+1:
		if len(p.selected) == 0 {
			return 0
		}
		c := p.selected[0]
		p.selected = p.selected[1:]
		return c
	}
	return 0xff
}

// out writes ports.
func (p *pc) out(port uint16, data []byte) error {
	switch {
	case portDebugExit <= port && port < portDebugExit+4:
		p.m.turnOff(int(le(data)<<1 | 1))
	case port == portFlush && len(data) == 4:
		return p.flush(addr.GPA(le(data)) &^ addr.PageMask)
	case portTestIRQs <= port && port < portTestIRQs+testIRQs:
		if p.m.config.Board == PC {
			return p.m.vm.SetIRQLine(uint32(port-portTestIRQs), data[0] != 0)
		}
	case port >= portEcho && int(port)+len(data) <= portEcho+4: // ports do not wrap
		p.mu.Lock()
		defer p.mu.Unlock()
		copy(p.echo[port-portEcho:], data)
	case port == portEchoBytes && len(data) == 4:
		p.mu.Lock()
		defer p.mu.Unlock()
		copy(p.echo[:], data)
	case port == portConfig:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.selected = p.config(uint16(le(data)))
	case port == boot.PortPM1Event && len(data) > 1:
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(data) == 4 {
			p.pm1Enable = uint16(le(data) >> 16)
		}
	case port == boot.PortPM1Event+2:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.pm1Enable = uint16(le(data))
	case port == portPCI && len(data) == 4: // where PCI is looked for, and not found: no reset
	case port == boot.PortPM1Control:
		if v := le(data); v&pm1Sleep != 0 && v>>10&7 == boot.SleepOff {
			p.m.turnOff(0)
		}
	default:
		for i, b := range data {
			if err := p.outByte(int(port)+i, b); err != nil {
				return err
			}
		}
	}
	return nil
}

// outByte writes a port of one byte. A reset ends the run: there is no firmware to begin again with.
func (p *pc) outByte(port int, b byte) error {
	switch {
	case port == guests.PortConsole, port == portTestOut:
		return p.m.devices.print([]byte{b})
	case guests.PortUART <= port && port < guests.PortUART+uartPorts:
		if c, ok := p.m.devices.uart.out(uint16(port-guests.PortUART), b); ok {
			return p.m.devices.send(c)
		}
	case port == boot.PortReset && b&resetFull != 0, port == portA20 && b&a20Reset != 0:
		p.m.turnOff(0)
	case port == portKeyboard, port == portCommand:
		p.mu.Lock()
		reset := p.keyboard.write(port == portCommand, b)
		p.mu.Unlock()
		if reset {
			p.m.turnOff(0)
		}
	case port == portCMOS:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.cmos.index = b & 0x7f // the highest bit masks an interrupt that there is none of
	case port == portCMOS+1:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.cmos.write(b)
	case port == portEchoBytes:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.echo[0] = b
	}
	return nil
}

// flush has a page's access taken away and given back, so that nobody has a translation of it.
// A page that is not RAM, or is not mapped at the time, has none to lose.
func (p *pc) flush(gpa addr.GPA) error {
	offset, ok := p.m.RAMOffset(gpa)
	if !ok {
		return nil
	}
	page := addr.HVAs(p.m.ram.Range.Start+addr.HVA(offset), addr.PageSize)
	if err := p.m.memory.Protect(page, addr.NoAccess); err != nil {
		return nil
	}
	return p.m.memory.Protect(page, addr.ReadWrite)
}

// config returns what fw_cfg has under a number, for images that ask it what QEMU would say.
func (p *pc) config(selector uint16) []byte {
	const signature, version, ram, vcpus, maxVCPUs, files = 0x00, 0x01, 0x03, 0x05, 0x0f, 0x19
	count := binary.LittleEndian.AppendUint16(nil, uint16(p.m.config.VCPUs))
	switch selector {
	case signature:
		return []byte("QEMU")
	case version:
		return []byte{1, 0, 0, 0} // the interface of two ports and no more
	case ram:
		return binary.LittleEndian.AppendUint64(nil, p.m.config.RAM)
	case vcpus, maxVCPUs:
		return count
	case files:
		return []byte{0, 0, 0, 0}
	}
	return nil
}

// memory carries out an access to memory where there is no RAM.
func (p *pc) memory(e *kvm.MMIOExit) {
	offset := uint64(e.GPA - testMemory)
	if e.GPA < testMemory || offset+uint64(len(e.Data)) > testMemoryLen {
		if !e.Write {
			fill(e.Data)
		}
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.echoRAM == nil {
		p.echoRAM = make([]byte, testMemoryLen)
	}
	if e.Write {
		copy(p.echoRAM[offset:], e.Data)
	} else {
		copy(e.Data, p.echoRAM[offset:])
	}
}

// keyboard is a keyboard controller that nothing is plugged into.
type keyboard struct {
	answers []byte // to be read, the oldest first
	mode    byte   // its command byte
	expects byte   // the command that the next byte belongs to; 0: it is for the keyboard
}

const (
	keyboardFull = 1 << 0 // of the status: an answer can be read
	keyboardGood = 1 << 2 // of the status: the self-test was passed
	maxAnswers   = 16

	cmdReadMode   = 0x20
	cmdWriteMode  = 0x60
	cmdTestAux    = 0xa9
	cmdSelfTest   = 0xaa
	cmdTest       = 0xab
	cmdReadLines  = 0xd0
	cmdWriteLines = 0xd1
	cmdPulse      = 0xf0 // lines whose bits are 0: that of reset is the lowest
)

func (k *keyboard) status() byte {
	if len(k.answers) > 0 {
		return keyboardGood | keyboardFull
	}
	return keyboardGood
}

func (k *keyboard) data() byte {
	if len(k.answers) == 0 {
		return 0
	}
	b := k.answers[0]
	k.answers = k.answers[1:]
	return b
}

// write takes a command or a byte of data, and reports whether it resets the machine.
func (k *keyboard) write(command bool, b byte) (reset bool) {
	answer := func(b byte) {
		if len(k.answers) < maxAnswers {
			k.answers = append(k.answers, b)
		}
	}
	if !command {
		expects := k.expects
		k.expects = 0
		switch expects {
		case cmdWriteMode:
			k.mode = b
		case cmdWriteLines:
			return b&1 == 0
		}
		return false
	}
	k.expects = 0
	switch {
	case b == cmdReadMode:
		answer(k.mode)
	case b == cmdWriteMode, b == cmdWriteLines:
		k.expects = b
	case b == cmdSelfTest:
		answer(0x55)
	case b == cmdTest:
		answer(0)
	case b == cmdTestAux:
		answer(0xff)
	case b == cmdReadLines:
		answer(0x03) // A20, and no reset
	case b&cmdPulse == cmdPulse:
		return b&1 == 0
	}
	return false
}

// cmos is a clock that tells the host's time, UTC, and cannot be set, and 128 bytes of
// memory, which say how much RAM there is.
type cmos struct {
	index byte
	ram   [128]byte
}

const (
	cmosSeconds = 0x00
	cmosMinutes = 0x02
	cmosHours   = 0x04
	cmosWeekday = 0x06
	cmosDay     = 0x07
	cmosMonth   = 0x08
	cmosYear    = 0x09
	cmosStatusA = 0x0a
	cmosStatusB = 0x0b
	cmosStatusD = 0x0d
	cmosCentury = 0x32
)

func (c *cmos) init(ram uint64, vcpus int) {
	put := func(at int, n uint64, size int) {
		for i := range size {
			c.ram[at+i] = byte(n >> (8 * i))
		}
	}
	below := min(ram, uint64(boot.PCIHole))
	extended := min((below-min(below, 1<<20))>>10, 0xffff)
	put(0x15, 640, 2)
	put(0x17, extended, 2)
	put(0x30, extended, 2)
	put(0x34, min((below-min(below, 16<<20))>>16, 0xffff), 2)
	put(0x5b, (ram-below)>>16, 3)
	put(0x5f, uint64(vcpus-1), 1)
	c.ram[cmosStatusA] = 0x26 // running, at the usual rate
	c.ram[cmosStatusB] = 0x02 // 24 hours, decimal digits
	c.ram[cmosStatusD] = 0x80 // the battery is good
}

// read reads the register that is selected.
func (c *cmos) read(now time.Time) byte {
	now = now.UTC()
	digits := func(n int) byte { return byte(n/10<<4 | n%10) }
	switch c.index {
	case cmosSeconds:
		return digits(now.Second())
	case cmosMinutes:
		return digits(now.Minute())
	case cmosHours:
		return digits(now.Hour())
	case cmosWeekday:
		return digits(int(now.Weekday()) + 1)
	case cmosDay:
		return digits(now.Day())
	case cmosMonth:
		return digits(int(now.Month()))
	case cmosYear:
		return digits(now.Year() % 100)
	case cmosCentury:
		return digits(now.Year() / 100)
	}
	return c.ram[c.index]
}

// write writes the register that is selected, if it is memory.
func (c *cmos) write(b byte) {
	if c.index > cmosStatusD {
		c.ram[c.index] = b
	}
}
