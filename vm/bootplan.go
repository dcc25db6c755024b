package vm

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/shadow"
)

// Board is what a machine has beside vCPUs and RAM, and where its RAM is.
type Board uint8

const (
	// Bare is for the built-in guests: memory as package guests describes it, and a few
	// ports.
	Bare Board = iota

	// PC is for images of others: memory as [boot.Layout] has it, interrupt controllers
	// and a timer in the kernel, and the devices of pc. All vCPUs but the first wait to be
	// started by the image. What is used of memory where there is no RAM is an empty bus.
	PC

	// Polled is a PC with one vCPU and without interrupt controllers and timer: its HLT
	// ends the run.
	Polled
)

func (b Board) String() string {
	switch b {
	case Bare:
		return "bare"
	case PC:
		return "pc"
	case Polled:
		return "polled"
	}
	return fmt.Sprintf("board(%d)", uint8(b))
}

// checkBoard reports what is wrong with a Config whose Board is not Bare.
func (c *Config) checkBoard() error {
	switch {
	case c.Board > Polled:
		return fmt.Errorf("there is no %v", c.Board)
	case c.Ring0:
		return fmt.Errorf("the board %v has no ring to start in: the image says", c.Board)
	case c.Board == Polled && c.VCPUs != 1:
		return fmt.Errorf("the board %v has one vCPU, not %d", c.Board, c.VCPUs)
	case c.VCPUs < 1 || c.VCPUs > boot.MaxVCPUs:
		return fmt.Errorf("%d vCPUs are not in 1 to %d", c.VCPUs, boot.MaxVCPUs)
	}
	return c.layout().Check()
}

func (c *Config) layout() boot.Layout { return boot.Layout{RAM: c.RAM} }

// addBoard gives the VM what has to be there before vCPUs are.
func (m *Machine) addBoard(sys *kvm.System) error {
	if m.config.Board == Bare {
		return nil
	}
	// Pages that some Intel hosts need for real mode, where no PC has anything.
	const identityMap, taskState = addr.GPA(0xfffbc000), addr.GPA(0xfffbd000)
	for _, need := range []struct {
		c   kvm.Cap
		set func(addr.GPA) error
		gpa addr.GPA
	}{{kvm.CapSetIdentityMapAddr, m.vm.SetIdentityMapAddr, identityMap}, {kvm.CapSetTSSAddr, m.vm.SetTSSAddr, taskState}} {
		if n, err := m.vm.CheckExtension(need.c); err != nil || n == 0 {
			continue // a host without it does without it
		}
		if err := need.set(need.gpa); err != nil {
			return err
		}
	}
	if m.config.Board == Polled {
		return nil
	}
	if err := sys.Require(kvm.CapIrqchip, kvm.CapIRQRouting, kvm.CapPIT2, kvm.CapMPState); err != nil {
		return fmt.Errorf("the board %v: %w", m.config.Board, err)
	}
	if err := m.vm.CreateIRQChip(); err != nil {
		return err
	}
	if err := m.vm.SetIRQRoutes(boardRoutes()); err != nil {
		return err
	}
	const speaker = 1 << 0 // its port is the timer's too
	return m.vm.CreatePIT2(speaker)
}

// boardRoutes returns where the interrupt lines of a PC lead: to the PICs and to the IOAPIC,
// as the tables of package boot say.
func boardRoutes() []kvm.IRQRoute {
	const pins, isa = 24, 16
	var routes []kvm.IRQRoute
	for irq := range uint32(pins) {
		switch {
		case irq < isa/2:
			routes = append(routes, kvm.IRQRoute{IRQ: irq, Chip: kvm.PICMaster, Pin: irq})
		case irq < isa:
			routes = append(routes, kvm.IRQRoute{IRQ: irq, Chip: kvm.PICSlave, Pin: irq - isa/2})
		}
		switch irq {
		case 0:
			routes = append(routes, kvm.IRQRoute{IRQ: irq, Chip: kvm.IOAPIC, Pin: boot.TimerPin})
		case boot.TimerPin: // the other PIC is there
		default:
			routes = append(routes, kvm.IRQRoute{IRQ: irq, Chip: kvm.IOAPIC, Pin: irq})
		}
	}
	return routes
}

// windows returns what the guest is promised of the machine's memory.
func (m *Machine) windows() []shadow.Window {
	if m.config.Board == Bare {
		return []shadow.Window{
			{Name: "boot", NPages: m.boot.Range.NPages(), HVA: m.boot.Range.Start},
			{Name: "ram", GFN: m.RAMBase().GFN(), NPages: m.ram.Range.NPages(), HVA: m.ram.Range.Start},
		}
	}
	list := []shadow.Window{{Name: "firmware", GFN: boot.Firmware.GFN(), NPages: boot.FirmwareSize >> addr.PageShift, HVA: m.boot.Range.Start}}
	for i, w := range m.config.layout().Windows() {
		list = append(list, shadow.Window{
			Name: [...]string{"low", "ram", "high"}[i], GFN: w.Start.GFN(), NPages: uint64(w.End-w.Start) >> addr.PageShift,
			HVA: m.ram.Range.Start + addr.HVA(w.Offset),
		})
	}
	return list
}

// BootPlan sets the machine up as a plan says. Its Board is PC or Polled, and the plan was
// made for its memory and its number of vCPUs. It is called once, before the first run.
func (m *Machine) BootPlan(p *boot.Plan) error {
	fail := func(err error) error { return fmt.Errorf("boot an image, %v: %w", p.Format, err) }
	if m.config.Board == Bare {
		return fail(fmt.Errorf("the machine's board is %v, which is for built-in guests", m.config.Board))
	}
	if err := m.bootOnce(); err != nil {
		return fail(err)
	}
	for _, s := range p.Segments {
		if err := m.fill(s); err != nil {
			return fail(fmt.Errorf("%s: %w", s.Name, err))
		}
	}
	if err := m.vcpus[0].begin(p.CPU); err != nil {
		return fail(fmt.Errorf("vCPU 0: %w", err))
	}
	return nil
}

// fill writes a segment. Memory is zero when it is new, unless it is a file's.
func (m *Machine) fill(s boot.Segment) error {
	if err := m.WriteGuest(s.GPA, s.Data); err != nil || m.config.File == nil {
		return err
	}
	zeros := make([]byte, addr.HugeSize)
	for n := uint64(len(s.Data)); n < s.Size; {
		part := min(s.Size-n, uint64(len(zeros)))
		if err := m.WriteGuest(s.GPA+addr.GPA(n), zeros[:part]); err != nil {
			return err
		}
		n += part
	}
	return nil
}

// begin sets the vCPU to where a plan has it begin.
func (v *vcpu) begin(c boot.CPU) error {
	sregs, err := v.cpu.Sregs()
	if err != nil {
		return err
	}
	regs := kvm.Regs{Rip: c.Entry, Rsp: c.SP, Rax: c.AX, Rbx: c.BX, Rsi: c.SI, Rdi: c.DI, Rflags: rflagsOne}
	code := kvm.Segment{Limit: ^uint32(0), Selector: boot.CodeSelector, Type: 11, Present: 1, S: 1, G: 1}
	data := kvm.Segment{Limit: ^uint32(0), Selector: boot.DataSelector, Type: 3, Present: 1, S: 1, DB: 1, G: 1}
	sregs.GDT = kvm.DTable{Base: uint64(boot.Descriptors), Limit: boot.GDTSize - 1}
	sregs.IDT = kvm.DTable{}
	switch c.Mode {
	case boot.Real:
		code = kvm.Segment{Limit: 0xffff, Type: 11, Present: 1, S: 1}
		data = kvm.Segment{Limit: 0xffff, Type: 3, Present: 1, S: 1}
		sregs.GDT, sregs.IDT = kvm.DTable{}, kvm.DTable{Limit: 0x3ff}
	case boot.Protected:
		code.DB = 1
		sregs.CR0 = cr0PE | cr0ET
	case boot.User:
		code.DPL, data.DPL = 3, 3
		code.Selector |= 3
		data.Selector |= 3
		sregs.TR = kvm.Segment{Base: uint64(boot.TaskState), Limit: addr.PageSize - 1, Selector: 0x20, Type: 11, Present: 1}
		regs.Rflags |= rflagsIOPL3
		fallthrough
	case boot.Long:
		code.L = 1
		sregs.CR0 = cr0PE | cr0MP | cr0ET | cr0NE | cr0WP | cr0PG
		sregs.CR3 = uint64(boot.PageTables)
		sregs.CR4 = cr4PAE | cr4OSFXSR | cr4OSXMMEXCPT
		sregs.EFER = eferLME | eferLMA
	default:
		return fmt.Errorf("there is no %v to begin in", c.Mode)
	}
	sregs.CS, sregs.SS, sregs.DS, sregs.ES, sregs.FS, sregs.GS = code, data, data, data, data, data
	if err := v.cpu.SetSregs(sregs); err != nil {
		return err
	}
	return v.cpu.SetRegs(regs)
}

// RAMAddr returns the guest address of a byte of RAM, and whether the guest sees it: a PC
// has a hole below 1 MiB.
func (m *Machine) RAMAddr(offset uint64) (gpa addr.GPA, ok bool) {
	if m.config.Board != Bare {
		return m.config.layout().GPA(offset)
	}
	return m.RAMBase() + addr.GPA(offset), offset < m.config.RAM
}

// RAMOffset returns which byte of RAM is at a guest address, and whether one is.
func (m *Machine) RAMOffset(gpa addr.GPA) (offset uint64, ok bool) {
	if m.config.Board == Bare {
		offset = uint64(gpa - m.RAMBase())
		return offset, gpa >= m.RAMBase() && offset < m.config.RAM
	}
	for _, w := range m.config.layout().Windows() {
		if w.Start <= gpa && gpa < w.End {
			return w.Offset + uint64(gpa-w.Start), true
		}
	}
	return 0, false
}

// bootOnce reports an error if the machine is not to be booted any more.
func (m *Machine) bootOnce() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.booted || m.closed {
		return errors.New("the machine has been booted or closed")
	}
	m.booted = true
	return nil
}

// The bits of CPUID that depend on the board.
const (
	leafFeatures  = 1
	leafCaches    = 4
	leafMore      = 7
	leafTopology  = 0xb
	leafTopology2 = 0x1f
	leafSizes     = 0x80000008
	leafTopology3 = 0x8000001e

	ecxLA57        = 1 << 16
	ecxX2APIC      = 1 << 21
	ecxTSCDeadline = 1 << 24
	ecxHypervisor  = 1 << 31
	edxAPIC        = 1 << 9
	edxHTT         = 1 << 28
)

// boardCPUID returns what CPUID tells an image on vCPU id of n: what KVM can run, with the
// machine's processors in it, which are cores of one package.
func boardCPUID(supported []kvm.CPUIDEntry, id, n int, apic, deadline bool) []kvm.CPUIDEntry {
	shift := uint32(bits.Len(uint(n - 1)))
	var list []kvm.CPUIDEntry
	levels := false
	for _, e := range supported {
		switch e.Function {
		case leafFeatures:
			e.EBX = e.EBX&0xffff | uint32(n)<<16 | uint32(id)<<24
			e.ECX |= ecxHypervisor
			e.EDX &^= edxHTT
			if n > 1 {
				e.EDX |= edxHTT
			}
			switch {
			case !apic:
				e.ECX &^= ecxX2APIC | ecxTSCDeadline
				e.EDX &^= edxAPIC
			case deadline:
				e.ECX |= ecxTSCDeadline
			}
		case leafCaches:
			if e.EAX&0x1f != 0 { // there is such a cache
				e.EAX = e.EAX&0x3fff | uint32(min(n-1, 63))<<26
			}
		case leafMore:
			if e.Index == 0 {
				// Some hosts that shadow page tables offer those of five levels and cannot
				// run them. No machine here has memory for them.
				e.ECX &^= ecxLA57
			}
		case leafTopology:
			levels = true
			continue
		case leafTopology2:
			continue
		case leafSizes:
			if e.EAX>>8&0xff > 48 {
				e.EAX = e.EAX&^0xff00 | 48<<8 // what four levels map
			}
			e.ECX = e.ECX&^0xf0ff | uint32(n-1) | shift<<12
		case leafTopology3:
			e.EAX, e.EBX, e.ECX = uint32(id), uint32(id), 0
		}
		list = append(list, e)
	}
	if levels {
		const threads, cores = 1 << 8, 2 << 8
		for i, level := range []struct{ shift, n, kind uint32 }{{0, 1, threads}, {shift, uint32(n), cores}, {0, 0, 0}} {
			list = append(list, kvm.CPUIDEntry{Function: leafTopology, Index: uint32(i), Flags: kvm.CPUIDSignificantIndex,
				EAX: level.shift, EBX: level.n, ECX: level.kind | uint32(i), EDX: uint32(id)})
		}
	}
	return list
}
