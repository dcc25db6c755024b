package kvm

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

// The test machine: memory from gpa 0 to ramEnd, real-mode code at codeAt.
const (
	codeAt = 0x1000
	ramEnd = 0x8000
)

type machine struct {
	*VM
	vcpu *VCPU
	ram  []byte
}

// newVM returns a VM without anything, which is closed when the test ends.
func newVM(t testing.TB) *VM {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	sys, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sys.Close()
	vm, err := sys.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Close() })
	return vm
}

// newRAM maps n bytes for a guest. It is called before anything that uses them
// is made, so that they are unmapped after it is closed.
func newRAM(t testing.TB, n int) []byte {
	t.Helper()
	ram, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(ram); err != nil {
			t.Error(err)
		}
	})
	return ram
}

// newMachine returns a machine about to execute code, on a goroutine that it has
// locked to its thread.
func newMachine(t testing.TB, code ...byte) *machine {
	t.Helper()
	return newMachineOn(t, newVM, code...)
}

// newMachineOn is newMachine on a VM that somebody else makes.
func newMachineOn(t testing.TB, newVM func(testing.TB) *VM, code ...byte) *machine {
	t.Helper()
	ram := newRAM(t, ramEnd)
	copy(ram[codeAt:], code)
	m := &machine{VM: newVM(t), ram: ram}
	if err := m.SetMemoryRegion(MemoryRegion{Size: ramEnd, HVA: hvaOf(ram)}); err != nil {
		t.Fatal(err)
	}
	m.vcpu = newTestVCPU(t, m.VM)
	return m
}

// newTestVCPU returns vCPU 0 of vm, about to execute real-mode code at codeAt.
func newTestVCPU(t testing.TB, vm *VM) *VCPU {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	c, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s, err := c.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	s.CS.Base, s.CS.Selector = 0, 0
	if err := c.SetSregs(s); err != nil {
		t.Fatal(err)
	}
	if err := c.SetRegs(Regs{Rip: codeAt, Rflags: 2}); err != nil {
		t.Fatal(err)
	}
	return c
}

// Where newUserMachine has page tables, from the top level down.
var tablesAt = []int{0x4000, 0x5000, 0x6000, 0x7000}

// newUserMachine is newMachine for 64-bit code at CPL 3, which the CPU executes
// itself on every host. The identity map has 16 pages.
func newUserMachine(t testing.TB, code ...byte) *machine {
	t.Helper()
	m := newMachine(t, code...)
	m.enterUserMode(t)
	return m
}

func (m *machine) enterUserMode(t testing.TB) {
	t.Helper()
	const present, user = 1, 7 // writable and for CPL 3 as well
	for i, at := range tablesAt[1:] {
		*word(m.ram, tablesAt[i]) = uint32(at) | user
	}
	for page := range 16 {
		*word(m.ram, tablesAt[3]+8*page) = uint32(page)<<addr.PageShift | user
	}
	s, err := m.vcpu.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	const (
		cr0PE, cr0PG     = 1 << 0, 1 << 31
		cr4PAE           = 1 << 5
		eferLME, eferLMA = 1 << 8, 1 << 10
		iopl3            = 3 << 12
	)
	s.CR0, s.CR3, s.CR4, s.EFER = s.CR0|cr0PE|cr0PG, uint64(tablesAt[0]), cr4PAE, eferLME|eferLMA
	s.CS = Segment{Limit: ^uint32(0), Selector: 0x0b, Type: 11, Present: present, DPL: 3, S: 1, L: 1, G: 1}
	s.DS = Segment{Limit: ^uint32(0), Selector: 0x13, Type: 3, Present: present, DPL: 3, S: 1, DB: 1, G: 1}
	s.ES, s.FS, s.GS, s.SS = s.DS, s.DS, s.DS, s.DS
	s.TR = Segment{Limit: 0x67, Type: 11, Present: present}
	if err := m.vcpu.SetSregs(s); err != nil {
		t.Fatal(err)
	}
	if err := m.vcpu.SetRegs(Regs{Rip: codeAt, Rflags: 2 | iopl3}); err != nil {
		t.Fatal(err)
	}
}

// run runs the guest past the signals of the Go runtime to its next exit.
func run(t testing.TB, c *VCPU) Exit {
	t.Helper()
	for {
		exit, err := c.Run()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return exit
	}
}

func openFDs(t *testing.T) map[string]string {
	t.Helper()
	list := map[string]string{}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.Contains(target, "kvm") {
			list[e.Name()] = target
		}
	}
	return list
}
