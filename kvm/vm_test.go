package kvm

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMemFlagsString(t *testing.T) {
	for flags, want := range map[MemFlags]string{
		0:                              "0",
		MemReadonly:                    "KVM_MEM_READONLY",
		MemLogDirtyPages | MemReadonly: "KVM_MEM_LOG_DIRTY_PAGES|KVM_MEM_READONLY",
		MemGuestMemfd | 1<<8:           "KVM_MEM_GUEST_MEMFD|0x100",
	} {
		if got := flags.String(); got != want {
			t.Errorf("MemFlags(%d) = %q, want %q", uint32(flags), got, want)
		}
	}
}

// TestSlotErrors checks what KVM refuses, and that the error says what was asked.
func TestSlotErrors(t *testing.T) {
	ram := newRAM(t, 2*addr.PageSize)
	hva := hvaOf(ram)
	vm := newVM(t)
	if err := vm.SetMemoryRegion(MemoryRegion{Slot: 1, GPA: 0x1000, Size: 0x2000, HVA: hva}); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		region MemoryRegion
		errno  unix.Errno
		text   string
	}{
		"overlap": {
			MemoryRegion{Slot: 2, Flags: MemLogDirtyPages, GPA: 0x2000, Size: 0x1000, HVA: hva}, unix.EEXIST,
			fmt.Sprintf("slot 2, gpa [0x2000, 0x3000), hva [0x%x, 0x%x), flags KVM_MEM_LOG_DIRTY_PAGES", uint64(hva), uint64(hva)+0x1000),
		},
		"change of size": {
			MemoryRegion{Slot: 1, GPA: 0x1000, Size: 0x1000, HVA: hva}, unix.EINVAL,
			fmt.Sprintf("slot 1, gpa [0x1000, 0x2000), hva [0x%x, 0x%x), flags 0", uint64(hva), uint64(hva)+0x1000),
		},
		"delete of nothing": {
			MemoryRegion{Slot: 7}, unix.EINVAL,
			"slot 7, gpa [0x0, 0x0), hva [0x0, 0x0), flags 0",
		},
		"part of a page": {
			MemoryRegion{Slot: 2, GPA: 0x8000, Size: 0x800, HVA: hva}, unix.EINVAL,
			fmt.Sprintf("slot 2, gpa [0x8000, 0x8800), hva [0x%x, 0x%x), flags 0", uint64(hva), uint64(hva)+0x800),
		},
		"wrap": {
			MemoryRegion{Slot: 2, GPA: ^addr.GPA(0xfff), Size: 0x2000, HVA: hva}, unix.EINVAL,
			fmt.Sprintf("slot 2, gpa [0xfffffffffffff000, 0xffffffffffffffff), hva [0x%x, 0x%x), flags 0", uint64(hva), uint64(hva)+0x2000),
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := &Error{Op: "KVM_SET_USER_MEMORY_REGION", Detail: tt.text, Errno: tt.errno}
			var got *Error
			if err := vm.SetMemoryRegion(tt.region); !errors.As(err, &got) || *got != *want {
				t.Errorf("SetMemoryRegion = %v\nwant %v", err, want)
			}
		})
	}
	if err := vm.SetMemoryRegion(MemoryRegion{Slot: 1}); err != nil {
		t.Errorf("delete: %v", err)
	}
}

// TestGuestMemfd runs a guest whose memory is a guest_memfd that the host maps.
func TestGuestMemfd(t *testing.T) {
	vm := newVM(t)
	const flags = GuestMemfdMmap | GuestMemfdInitShared
	if n, err := vm.CheckExtension(CapGuestMemfdFlags); err != nil || GuestMemfdFlags(n)&flags != flags {
		gvmtest.Lack(t, gvmtest.KVMCaps, fmt.Errorf("%v has flags 0x%x, %v; this needs 0x%x", CapGuestMemfdFlags, n, err, uint64(flags)))
	}
	f, err := vm.CreateGuestMemfd(2*addr.PageSize, flags)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ram, err := unix.Mmap(int(f.Fd()), addr.PageSize, addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(ram) })
	ram[0] = 0xf4 // hlt
	region := MemoryRegion2{
		MemoryRegion:     MemoryRegion{Slot: 0, Flags: MemGuestMemfd, GPA: codeAt, Size: addr.PageSize, HVA: hvaOf(ram)},
		GuestMemfd:       f,
		GuestMemfdOffset: addr.PageSize,
	}
	bad := region
	bad.GuestMemfdOffset = 1
	if err := vm.SetMemoryRegion2(bad); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "guest_memfd offset 0x1") {
		t.Errorf("SetMemoryRegion2 with an odd offset = %v, want EINVAL and the offset", err)
	}
	if err := vm.SetMemoryRegion2(region); err != nil {
		t.Fatal(err)
	}
	if exit := run(t, newTestVCPU(t, vm)); exit.Reason() != ReasonHLT {
		t.Errorf("guest ended with %v, want hlt", exit)
	}
}

func TestSetMemoryRegion2Plain(t *testing.T) {
	ram := newRAM(t, addr.PageSize)
	vm := newVM(t)
	if n, err := vm.CheckExtension(CapUserMemory2); err != nil || n == 0 {
		gvmtest.Lack(t, gvmtest.KVMCaps, fmt.Errorf("%v: %d, %v", CapUserMemory2, n, err))
	}
	if err := vm.SetMemoryRegion2(MemoryRegion2{MemoryRegion: MemoryRegion{Size: addr.PageSize, HVA: hvaOf(ram)}}); err != nil {
		t.Error(err)
	}
}

func TestEnableCap(t *testing.T) {
	vm := newVM(t)
	if err := vm.EnableCap(CapDisableQuirks2, 0, 1, 2, 3, 4, 5); !errors.Is(err, unix.E2BIG) {
		t.Errorf("EnableCap with 5 arguments = %v, want E2BIG", err)
	}
	quirks, err := vm.CheckExtension(CapDisableQuirks2)
	if err != nil {
		t.Fatal(err)
	}
	if quirks == 0 {
		gvmtest.Lack(t, gvmtest.KVMCaps, fmt.Errorf("%v: no quirks to disable", CapDisableQuirks2))
	}
	if err := vm.EnableCap(CapDisableQuirks2, 0, uint64(quirks)); err != nil {
		t.Error(err)
	}
	const want = "KVM_ENABLE_CAP: KVM_CAP_DISABLE_QUIRKS2, flags 0x0, arguments [0xffffffffffffffff]: invalid argument"
	if err := vm.EnableCap(CapDisableQuirks2, 0, ^uint64(0)); err == nil || err.Error() != want {
		t.Errorf("EnableCap of every quirk = %v, want %s", err, want)
	}
}

func TestLegacyAddresses(t *testing.T) {
	vm := newVM(t)
	if err := vm.SetIdentityMapAddr(0xfffbc000); err != nil {
		t.Error(err)
	}
	if err := vm.SetTSSAddr(0xfffbd000); err != nil {
		t.Error(err)
	}
}

func TestInterruptControllers(t *testing.T) {
	vm := newVM(t)
	if err := vm.SetIRQLine(4, true); !errors.Is(err, unix.ENXIO) {
		t.Errorf("SetIRQLine without controllers = %v, want ENXIO", err)
	}
	if err := vm.CreatePIT2(0); !errors.Is(err, unix.ENOENT) {
		t.Errorf("CreatePIT2 without controllers = %v, want ENOENT", err)
	}
	if err := vm.CreateIRQChip(); err != nil {
		t.Fatal(err)
	}
	if err := vm.CreateIRQChip(); !errors.Is(err, unix.EEXIST) {
		t.Errorf("second CreateIRQChip = %v, want EEXIST", err)
	}
	if err := vm.CreatePIT2(1); err != nil {
		t.Error(err)
	}
	if err := vm.SetIRQRoutes([]IRQRoute{{4, PICMaster, 4}, {4, IOAPIC, 4}, {12, PICSlave, 4}}); err != nil {
		t.Error(err)
	}
	var refused *Error
	if err := vm.SetIRQRoutes([]IRQRoute{{4, 9, 0}}); !errors.As(err, &refused) || refused.Errno != unix.EINVAL || refused.Detail != "1 routes" {
		t.Errorf("a route to a controller that there is not: %v, want EINVAL", err)
	}
	c := newTestVCPU(t, vm)
	for _, level := range []bool{true, false} {
		if err := vm.SetIRQLine(4, level); err != nil {
			t.Error(err)
		}
	}
	const version, taskPriority = 0x30, 0x80
	l, err := c.LAPIC()
	if err != nil || l.Regs[version] < 0x10 {
		t.Fatalf("LAPIC version 0x%x, %v; want at least 0x10", l.Regs[version], err)
	}
	l.Regs[taskPriority] = 0x50
	if err := c.SetLAPIC(l); err != nil {
		t.Fatal(err)
	}
	if l, err = c.LAPIC(); err != nil || l.Regs[taskPriority] != 0x50 {
		t.Errorf("task priority 0x%x, %v; want 0x50", l.Regs[taskPriority], err)
	}
	if err := c.SetMPState(MPStateHalted); err != nil {
		t.Fatal(err)
	}
	if s, err := c.MPState(); err != nil || s != MPStateHalted {
		t.Errorf("MPState = %v, %v; want %v", s, err, MPStateHalted)
	}
	if err := c.SetMPState(99); !errors.Is(err, unix.EINVAL) {
		t.Errorf("SetMPState(99) = %v, want EINVAL", err)
	}
}

func TestCreateVCPUErrors(t *testing.T) {
	vm := newVM(t)
	newTestVCPU(t, vm)
	const want = "KVM_CREATE_VCPU: vCPU 0: file exists"
	if _, err := vm.CreateVCPU(0); err == nil || err.Error() != want {
		t.Errorf("second vCPU 0: %v, want %s", err, want)
	}
	if _, err := vm.CreateVCPU(-1); !errors.Is(err, unix.EINVAL) {
		t.Errorf("vCPU -1: %v, want EINVAL", err)
	}
}
