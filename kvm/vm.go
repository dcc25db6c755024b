package kvm

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// VM is a virtual machine: memory slots, interrupt controllers and vCPUs.
type VM struct {
	fd       fd
	runSize  int           // bytes of a vCPU's run area; immutable
	ringSize atomic.Uint32 // bytes of a vCPU's dirty ring; 0 until there are rings

	// npages is the length of each slot. Protected by slotsMu, which is held across
	// the requests that change slots and, for reading, across the one that has KVM
	// write as much as a slot is long: the slot cannot grow after the look at it.
	slotsMu sync.RWMutex
	npages  map[uint32]uint64
}

// Close closes the VM's descriptor. The kernel keeps the VM, and uses its
// memory, until its vCPUs are closed too.
func (vm *VM) Close() error { return vm.fd.close() }

// CheckExtension returns what KVM says of c for this VM: 0 if it lacks c, and
// otherwise 1 or a quantity that depends on c.
//
// CheckExtension wraps KVM_CHECK_EXTENSION, as a VM ioctl.
func (vm *VM) CheckExtension(c Cap) (int, error) { return checkExtension(&vm.fd, c) }

// EnableCap turns c on for the VM. What flags and args mean, of which there are
// at most 4, depends on c.
//
// EnableCap wraps KVM_ENABLE_CAP, as a VM ioctl.
func (vm *VM) EnableCap(c Cap, flags uint32, args ...uint64) error {
	return setCap(&vm.fd, c, flags, args)
}

func setCap(f *fd, c Cap, flags uint32, args []uint64) error {
	arg := enableCap{cap: uint32(c), flags: flags}
	if len(args) > len(arg.args) {
		return &Error{Op: reqEnableCap.name, Detail: fmt.Sprintf("%v with %d arguments", c, len(args)), Errno: unix.E2BIG}
	}
	copy(arg.args[:], args)
	if _, err := ioctl(f, reqEnableCap, &arg); err != nil {
		return about(err, fmt.Sprintf("%v, flags 0x%x, arguments %#x", c, flags, args))
	}
	return nil
}

// MemFlags are the flags of a memory slot.
type MemFlags uint32

const (
	MemLogDirtyPages MemFlags = 1 << iota // log the pages that the guest writes
	MemReadonly                           // a guest's write is an MMIOExit
	MemGuestMemfd                         // private memory is a guest_memfd's
)

func (f MemFlags) String() string {
	return flagString(uint64(f), "KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY", "KVM_MEM_GUEST_MEMFD")
}

// flagString returns the names of the flags in f, of which names has those of the
// lowest bits.
func flagString(f uint64, names ...string) string {
	if f == 0 {
		return "0"
	}
	var list []string
	for i, name := range names {
		if f&(1<<i) != 0 {
			list = append(list, name)
			f &^= 1 << i
		}
	}
	if f != 0 {
		list = append(list, fmt.Sprintf("0x%x", f))
	}
	return strings.Join(list, "|")
}

// MemoryRegion is a memory slot: the guest frames in [GPA, GPA+Size) are the
// host pages in [HVA, HVA+Size).
type MemoryRegion struct {
	Slot  uint32 // the address space is in bits 16 and up, if there are several
	Flags MemFlags
	GPA   addr.GPA
	Size  uint64 // in bytes
	HVA   addr.HVA
}

func (r MemoryRegion) String() string {
	end := r.GPA + addr.GPA(r.Size)
	if end < r.GPA {
		end = ^addr.GPA(0)
	}
	return fmt.Sprintf("slot %d, gpa [0x%x, 0x%x), %v, flags %v",
		r.Slot, uint64(r.GPA), uint64(end), addr.HVAs(r.HVA, r.Size), r.Flags)
}

// SetMemoryRegion creates the slot r.Slot, changes its flags, moves it in guest
// memory or, where r.Size is 0, deletes it. KVM allows no other change, so that
// a slot of another size or with other host pages is deleted and created; a vCPU
// that touches it in between exits for MMIO.
//
// KVM uses the host range until the slot is deleted or the VM and its vCPUs are
// closed; the caller keeps it reserved until then. What is mapped there may
// change at any time, and the guest sees the change.
//
// SetMemoryRegion wraps KVM_SET_USER_MEMORY_REGION.
func (vm *VM) SetMemoryRegion(r MemoryRegion) error {
	arg := userspaceMemoryRegion{
		slot:          r.Slot,
		flags:         r.Flags,
		guestPhysAddr: r.GPA,
		memorySize:    r.Size,
		userspaceAddr: r.HVA,
	}
	vm.slotsMu.Lock()
	defer vm.slotsMu.Unlock()
	if _, err := ioctl(&vm.fd, reqSetUserMemoryRegion, &arg); err != nil {
		return about(err, r.String())
	}
	vm.noteSlotLocked(r)
	return nil
}

// noteSlotLocked keeps the length of a slot that was set.
//
// Preconditions: vm.slotsMu is held for writing.
func (vm *VM) noteSlotLocked(r MemoryRegion) {
	if r.Size == 0 {
		delete(vm.npages, r.Slot)
		return
	}
	if vm.npages == nil {
		vm.npages = make(map[uint32]uint64)
	}
	vm.npages[r.Slot] = r.Size >> addr.PageShift
}

// MemoryRegion2 is a memory slot whose private memory, if Flags has
// MemGuestMemfd, is that of GuestMemfd from GuestMemfdOffset.
type MemoryRegion2 struct {
	MemoryRegion
	GuestMemfd       *os.File // from VM.CreateGuestMemfd
	GuestMemfdOffset uint64   // in bytes
}

func (r MemoryRegion2) String() string {
	if r.GuestMemfd == nil {
		return r.MemoryRegion.String()
	}
	return fmt.Sprintf("%v, guest_memfd offset 0x%x", r.MemoryRegion, r.GuestMemfdOffset)
}

// SetMemoryRegion2 is SetMemoryRegion for slots that may have a guest_memfd. It
// needs CapUserMemory2. KVM holds a reference to the guest_memfd for as long as
// the slot exists.
//
// SetMemoryRegion2 wraps KVM_SET_USER_MEMORY_REGION2.
func (vm *VM) SetMemoryRegion2(r MemoryRegion2) error {
	arg := userspaceMemoryRegion2{
		slot:             r.Slot,
		flags:            r.Flags,
		guestPhysAddr:    r.GPA,
		memorySize:       r.Size,
		userspaceAddr:    r.HVA,
		guestMemfdOffset: r.GuestMemfdOffset,
	}
	if r.GuestMemfd != nil {
		arg.guestMemfd = uint32(r.GuestMemfd.Fd())
	}
	vm.slotsMu.Lock()
	defer vm.slotsMu.Unlock()
	_, err := ioctl(&vm.fd, reqSetUserMemoryRegion2, &arg)
	runtime.KeepAlive(r.GuestMemfd)
	if err != nil {
		return about(err, r.String())
	}
	vm.noteSlotLocked(r.MemoryRegion)
	return nil
}

// GuestMemfdFlags are the flags of a guest_memfd. Which ones a host has is the
// answer to CapGuestMemfdFlags.
type GuestMemfdFlags uint64

const (
	GuestMemfdMmap       GuestMemfdFlags = 1 << iota // it can be mapped
	GuestMemfdInitShared                             // the host may touch what it maps
)

// CreateGuestMemfd makes a file of size bytes that holds memory of this VM only.
//
// CreateGuestMemfd wraps KVM_CREATE_GUEST_MEMFD.
func (vm *VM) CreateGuestMemfd(size uint64, flags GuestMemfdFlags) (*os.File, error) {
	arg := createGuestMemfd{size: size, flags: flags}
	raw, err := opened(func() (int, error) { return ioctl(&vm.fd, reqCreateGuestMemfd, &arg) })
	if err != nil {
		return nil, about(err, fmt.Sprintf("0x%x bytes, flags 0x%x", size, uint64(flags)))
	}
	return os.NewFile(uintptr(raw), "guest_memfd"), nil
}

// SetTSSAddr gives KVM the three pages of guest memory at gpa, which lie in no
// slot and below 4 GiB, for a TSS. Some Intel hosts need it for real mode.
//
// SetTSSAddr wraps KVM_SET_TSS_ADDR.
func (vm *VM) SetTSSAddr(gpa addr.GPA) error {
	if _, err := call(&vm.fd, reqSetTSSAddr, uintptr(gpa)); err != nil {
		return about(err, gpa.String())
	}
	return nil
}

// SetIdentityMapAddr gives KVM the page of guest memory at gpa, which lies in no
// slot and below 4 GiB, for a page table. Some Intel hosts need it for real mode.
//
// SetIdentityMapAddr wraps KVM_SET_IDENTITY_MAP_ADDR; it comes before any vCPU.
func (vm *VM) SetIdentityMapAddr(gpa addr.GPA) error {
	arg := uint64(gpa)
	if _, err := ioctl(&vm.fd, reqSetIdentityMapAddr, &arg); err != nil {
		return about(err, gpa.String())
	}
	return nil
}

// CreateIRQChip gives the VM two PICs and an IOAPIC in the kernel, and each vCPU
// made later a local APIC. A vCPU that executes HLT then waits inside of
// VCPU.Run for an interrupt and does not exit.
//
// CreateIRQChip wraps KVM_CREATE_IRQCHIP; it comes before any vCPU.
func (vm *VM) CreateIRQChip() error {
	_, err := call(&vm.fd, reqCreateIRQChip, 0)
	return err
}

// CreatePIT2 gives the VM an i8254 timer in the kernel; flag 1 has KVM answer the
// speaker's port too.
//
// CreatePIT2 wraps KVM_CREATE_PIT2; it comes after CreateIRQChip.
func (vm *VM) CreatePIT2(flags uint32) error {
	arg := pitConfig{flags: flags}
	if _, err := ioctl(&vm.fd, reqCreatePIT2, &arg); err != nil {
		return about(err, fmt.Sprintf("flags 0x%x", flags))
	}
	return nil
}

// IRQChip is an in-kernel interrupt controller.
type IRQChip uint32

const (
	PICMaster IRQChip = iota
	PICSlave
	IOAPIC
)

// IRQRoute says that an interrupt line is also an input of a controller.
type IRQRoute struct {
	IRQ  uint32 // the line, as SetIRQLine has it
	Chip IRQChip
	Pin  uint32
}

// routeToChip is KVM_IRQ_ROUTING_IRQCHIP.
const routeToChip = 1

// SetIRQRoutes replaces the routes of interrupt lines. Those that CreateIRQChip makes lead
// lines 0 to 15 to the inputs of the PICs, and 0 to 23 to those of the IOAPIC.
//
// SetIRQRoutes wraps KVM_SET_GSI_ROUTING; it comes after CreateIRQChip and needs CapIRQRouting.
func (vm *VM) SetIRQRoutes(routes []IRQRoute) error {
	h, entries := flex[routingHeader, routingEntry](len(routes))
	h.nr = uint32(len(routes))
	for i, r := range routes {
		entries[i] = routingEntry{gsi: r.IRQ, typ: routeToChip, irqchip: uint32(r.Chip), pin: r.Pin}
	}
	if _, err := ioctl(&vm.fd, reqSetGSIRouting, h); err != nil {
		return about(err, fmt.Sprintf("%d routes", len(routes)))
	}
	return nil
}

// SetIRQLine sets the level of an input of the in-kernel interrupt controllers.
// An edge is a call with true and one with false.
//
// SetIRQLine wraps KVM_IRQ_LINE.
func (vm *VM) SetIRQLine(irq uint32, level bool) error {
	arg := irqLevel{irq: irq}
	if level {
		arg.level = 1
	}
	if _, err := ioctl(&vm.fd, reqIRQLine, &arg); err != nil {
		return about(err, fmt.Sprintf("irq %d, level %d", irq, arg.level))
	}
	return nil
}

// CreateVCPU makes a vCPU and maps its run area. On x86 the id is that of its
// local APIC, and vCPU 0 is the one that boots.
//
// CreateVCPU wraps KVM_CREATE_VCPU.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	detail := fmt.Sprintf("vCPU %d", id)
	raw, err := call(&vm.fd, reqCreateVCPU, uintptr(id))
	if err != nil {
		return nil, about(err, detail)
	}
	mem, err := unix.Mmap(raw, 0, vm.runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(raw)
		return nil, &Error{Op: "mmap", Detail: "run area of " + detail, Errno: errnoOf(err)}
	}
	c := newVCPU(raw, mem)
	c.ringSize = vm.ringSize.Load()
	return c, nil
}

// Stats opens the statistics of the VM, which needs CapBinaryStatsFD. They may
// be read after the VM is closed and keep it alive until they are closed too.
//
// Stats wraps KVM_GET_STATS_FD, as a VM ioctl.
func (vm *VM) Stats() (*Stats, error) { return openStats(&vm.fd) }
