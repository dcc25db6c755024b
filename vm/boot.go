package vm

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/kvm"
)

// Boot puts a built-in guest into the machine and sets the vCPUs to its start.
// It is called once, before the first run.
func (m *Machine) Boot(g guests.Guest, args guests.Args) error {
	return m.bootWith(g.Name, func() (page, image []byte, err error) {
		if page, err = g.ParamPage(args, len(m.vcpus), m.config.RAM); err != nil {
			return nil, nil, err
		}
		image, err = g.Image()
		return page, image, err
	})
}

// BootImage puts a guest of the caller's into the machine, as Boot does a built-in one:
// code that is to run at guests.Image, in at most guests.MaxImage bytes. It finds
// what a built-in guest does, but no parameters. The name is for messages.
func (m *Machine) BootImage(name string, image []byte) error {
	return m.bootWith(name, func() (page, code []byte, err error) {
		if len(image) == 0 || len(image) > int(guests.MaxImage) {
			return nil, nil, fmt.Errorf("an image of %d bytes is not of 1 to %d", len(image), int(guests.MaxImage))
		}
		return make([]byte, addr.PageSize), image, nil
	})
}

// bootWith puts what load returns into the machine: a parameter page and an image.
func (m *Machine) bootWith(name string, load func() (page, image []byte, err error)) error {
	fail := func(err error) error { return fmt.Errorf("boot guest %s: %w", name, err) }
	if m.config.Board != Bare {
		return fail(fmt.Errorf("the machine's board is %v, which is for images of package boot", m.config.Board))
	}
	if err := m.bootOnce(); err != nil {
		return fail(err)
	}
	page, image, err := load()
	if err != nil {
		return fail(err)
	}
	if err := errors.Join(m.WriteGuest(guests.Params, page), m.WriteGuest(guests.Image, image), m.writePageTables()); err != nil {
		return fail(err)
	}
	for _, v := range m.vcpus {
		if err := v.reset(); err != nil {
			return fail(fmt.Errorf("vCPU %d: %w", v.id, err))
		}
	}
	return nil
}

// Bits of page-table entries.
const (
	ptePresent = 1 << 0
	pteWrite   = 1 << 1
	pteUser    = 1 << 2
	pteLarge   = 1 << 7
	pteAll     = ptePresent | pteWrite | pteUser
)

// writePageTables maps the guest's memory at its own addresses, with pages of 2
// MiB that CPL 3 may use.
func (m *Machine) writePageTables() error {
	const perDir = 512
	end := uint64(max(m.RAMEnd(), m.shownEnd))
	large := (end + addr.HugeSize - 1) / addr.HugeSize
	dirs := (large + perDir - 1) / perDir

	entries := make([]byte, 0, addr.PageSize)
	for i := range dirs {
		entries = binary.LittleEndian.AppendUint64(entries, uint64(guests.PageDirs)+i*addr.PageSize|pteAll)
	}
	if err := m.WriteGuest(guests.PDPT, entries); err != nil {
		return err
	}
	entries = entries[:0]
	for i := range large {
		entries = binary.LittleEndian.AppendUint64(entries, i*addr.HugeSize|pteAll|pteLarge)
	}
	if err := m.WriteGuest(guests.PageDirs, entries); err != nil {
		return err
	}
	return m.WriteGuest(guests.PML4, binary.LittleEndian.AppendUint64(nil, uint64(guests.PDPT)|pteAll))
}

// Control register bits.
const (
	cr0PE = 1 << 0
	cr0MP = 1 << 1
	cr0ET = 1 << 4
	cr0NE = 1 << 5
	cr0WP = 1 << 16
	cr0PG = 1 << 31

	cr4PAE        = 1 << 5
	cr4OSFXSR     = 1 << 9
	cr4OSXMMEXCPT = 1 << 10

	eferLME = 1 << 8
	eferLMA = 1 << 10

	rflagsOne   = 1 << 1
	rflagsIOPL3 = 3 << 12
)

// reset sets the vCPU to the start of a built-in guest, as described in the
// guests' abi.inc. There are no descriptor tables: the segment registers are
// loaded with what the tables would say.
func (v *vcpu) reset() error {
	sregs, err := v.cpu.Sregs()
	if err != nil {
		return err
	}
	cpl := uint8(3)
	if v.m.config.Ring0 {
		cpl = 0
	}
	code := kvm.Segment{Limit: ^uint32(0), Selector: 0x10 | uint16(cpl), Type: 11, Present: 1, DPL: cpl, S: 1, L: 1, G: 1}
	data := kvm.Segment{Limit: ^uint32(0), Selector: 0x18 | uint16(cpl), Type: 3, Present: 1, DPL: cpl, S: 1, DB: 1, G: 1}
	sregs.CS, sregs.SS, sregs.DS, sregs.ES, sregs.FS, sregs.GS = code, data, data, data, data, data
	// IOPL 3 permits all ports, but hosts with a page-table-based KVM go by the
	// I/O permission bitmap. That of a task state segment of zeros is all of it.
	sregs.TR = kvm.Segment{Base: uint64(guests.TSS), Limit: addr.PageSize - 1, Selector: 0x20, Type: 11, Present: 1}
	sregs.LDT = kvm.Segment{Unusable: 1}
	sregs.GDT, sregs.IDT = kvm.DTable{}, kvm.DTable{}
	sregs.CR0 = cr0PE | cr0MP | cr0ET | cr0NE | cr0WP | cr0PG
	sregs.CR3 = uint64(guests.PML4)
	sregs.CR4 = cr4PAE | cr4OSFXSR | cr4OSXMMEXCPT
	sregs.EFER = eferLME | eferLMA
	if err := v.cpu.SetSregs(sregs); err != nil {
		return err
	}
	return v.cpu.SetRegs(kvm.Regs{
		Rip:    uint64(guests.Image),
		Rsp:    uint64(guests.StackTop(v.id)),
		Rdi:    uint64(guests.Params),
		Rsi:    uint64(v.id),
		Rdx:    uint64(guests.ResultGPA(v.id, 0)),
		Rflags: rflagsOne | rflagsIOPL3,
	})
}
