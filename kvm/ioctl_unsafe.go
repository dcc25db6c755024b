package kvm

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// request is an ioctl whose argument is a T. Its number is derived from the size
// of T, so that a request cannot be made with a struct of another layout.
type request[T any] struct {
	nr   uintptr
	name string
}

// command is an ioctl whose argument is a number, or is not looked at.
type command struct {
	nr   uintptr
	name string
}

// The layout of a request's number: _IOC in the kernel.
const (
	iocTypeShift = 8
	iocSizeShift = 16
	iocDirShift  = 30

	iocWrite = 1 // the kernel reads the argument
	iocRead  = 2 // the kernel writes to it

	kvmio = 0xae
)

func ioc(dir, nr, size uintptr) uintptr {
	return dir<<iocDirShift | size<<iocSizeShift | kvmio<<iocTypeShift | nr
}

func newCommand(nr uintptr, name string) command { return command{ioc(0, nr, 0), name} }

func ior[T any](nr uintptr, name string) request[T] {
	return request[T]{ioc(iocRead, nr, unsafe.Sizeof(*new(T))), name}
}

func iow[T any](nr uintptr, name string) request[T] {
	return request[T]{ioc(iocWrite, nr, unsafe.Sizeof(*new(T))), name}
}

func iowr[T any](nr uintptr, name string) request[T] {
	return request[T]{ioc(iocRead|iocWrite, nr, unsafe.Sizeof(*new(T))), name}
}

// System requests.
var (
	reqGetAPIVersion          = newCommand(0x00, "KVM_GET_API_VERSION")
	reqCreateVM               = newCommand(0x01, "KVM_CREATE_VM")
	reqGetMSRIndexList        = iowr[msrListHeader](0x02, "KVM_GET_MSR_INDEX_LIST")
	reqCheckExtension         = newCommand(0x03, "KVM_CHECK_EXTENSION") // a VM has it too
	reqGetVCPUMmapSize        = newCommand(0x04, "KVM_GET_VCPU_MMAP_SIZE")
	reqGetSupportedCPUID      = iowr[cpuidHeader](0x05, "KVM_GET_SUPPORTED_CPUID")
	reqGetMSRFeatureIndexList = iowr[msrListHeader](0x0a, "KVM_GET_MSR_FEATURE_INDEX_LIST")
)

// VM requests.
var (
	reqCreateVCPU           = newCommand(0x41, "KVM_CREATE_VCPU")
	reqGetDirtyLog          = iow[dirtyLog](0x42, "KVM_GET_DIRTY_LOG")
	reqSetUserMemoryRegion  = iow[userspaceMemoryRegion](0x46, "KVM_SET_USER_MEMORY_REGION")
	reqSetTSSAddr           = newCommand(0x47, "KVM_SET_TSS_ADDR")
	reqSetIdentityMapAddr   = iow[uint64](0x48, "KVM_SET_IDENTITY_MAP_ADDR")
	reqSetUserMemoryRegion2 = iow[userspaceMemoryRegion2](0x49, "KVM_SET_USER_MEMORY_REGION2")
	reqCreateIRQChip        = newCommand(0x60, "KVM_CREATE_IRQCHIP")
	reqIRQLine              = iow[irqLevel](0x61, "KVM_IRQ_LINE")
	reqSetGSIRouting        = iow[routingHeader](0x6a, "KVM_SET_GSI_ROUTING")
	reqCreatePIT2           = iow[pitConfig](0x77, "KVM_CREATE_PIT2")
	reqClearDirtyLog        = iowr[clearDirtyLog](0xc0, "KVM_CLEAR_DIRTY_LOG")
	reqResetDirtyRings      = newCommand(0xc7, "KVM_RESET_DIRTY_RINGS")
	reqCreateGuestMemfd     = iowr[createGuestMemfd](0xd4, "KVM_CREATE_GUEST_MEMFD")

	// A vCPU has these too.
	reqEnableCap  = iow[enableCap](0xa3, "KVM_ENABLE_CAP")
	reqGetStatsFD = newCommand(0xce, "KVM_GET_STATS_FD")
)

// vCPU requests.
var (
	reqRun           = newCommand(0x80, "KVM_RUN")
	reqGetRegs       = ior[Regs](0x81, "KVM_GET_REGS")
	reqSetRegs       = iow[Regs](0x82, "KVM_SET_REGS")
	reqGetSregs      = ior[Sregs](0x83, "KVM_GET_SREGS")
	reqSetSregs      = iow[Sregs](0x84, "KVM_SET_SREGS")
	reqTranslate     = iowr[translation](0x85, "KVM_TRANSLATE")
	reqInterrupt     = iow[interrupt](0x86, "KVM_INTERRUPT")
	reqGetMSRs       = iowr[msrsHeader](0x88, "KVM_GET_MSRS")
	reqSetMSRs       = iow[msrsHeader](0x89, "KVM_SET_MSRS")
	reqSetSignalMask = iow[signalMaskHeader](0x8b, "KVM_SET_SIGNAL_MASK")
	reqGetFPU        = ior[FPU](0x8c, "KVM_GET_FPU")
	reqSetFPU        = iow[FPU](0x8d, "KVM_SET_FPU")
	reqGetLAPIC      = ior[LAPIC](0x8e, "KVM_GET_LAPIC")
	reqSetLAPIC      = iow[LAPIC](0x8f, "KVM_SET_LAPIC")
	reqSetCPUID2     = iow[cpuidHeader](0x90, "KVM_SET_CPUID2")
	reqGetCPUID2     = iowr[cpuidHeader](0x91, "KVM_GET_CPUID2")
	reqGetMPState    = ior[MPState](0x98, "KVM_GET_MP_STATE")
	reqSetMPState    = iow[MPState](0x99, "KVM_SET_MP_STATE")
	reqSetGuestDebug = iow[GuestDebug](0x9b, "KVM_SET_GUEST_DEBUG")
	reqGetVCPUEvents = ior[VCPUEvents](0x9f, "KVM_GET_VCPU_EVENTS")
	reqSetVCPUEvents = iow[VCPUEvents](0xa0, "KVM_SET_VCPU_EVENTS")
)

// ioctl makes one request and returns its answer, which is not negative. arg may
// be nil where the kernel says so. EINTR is returned, not retried.
//
// arg does not escape: its address is taken as the argument of the system call,
// during which the kernel has it and the stack it may be on does not move.
func ioctl[T any](f *fd, req request[T], arg *T) (int, error) {
	if !f.acquire() {
		return 0, closedError(req.name)
	}
	defer f.release()
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.raw), req.nr, uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return 0, &Error{Op: req.name, Errno: errno}
	}
	return int(r), nil
}

// call makes one request that takes a number.
func call(f *fd, cmd command, arg uintptr) (int, error) {
	if !f.acquire() {
		return 0, closedError(cmd.name)
	}
	defer f.release()
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.raw), cmd.nr, arg)
	if errno != 0 {
		return 0, &Error{Op: cmd.name, Errno: errno}
	}
	return int(r), nil
}

// opened makes the descriptor that open returns close on exec. It is for the
// requests whose descriptors KVM opens without that flag.
func opened(open func() (int, error)) (int, error) {
	syscall.ForkLock.RLock() // no child is forked before the flag is set
	defer syscall.ForkLock.RUnlock()
	raw, err := open()
	if err != nil {
		return -1, err
	}
	unix.CloseOnExec(raw)
	return raw, nil
}

// flex allocates what C writes as a struct H that ends in an array of n Es. Both
// results are parts of one allocation, which either keeps alive. E may not be
// aligned more strictly than the end of H.
func flex[H, E any](n int) (*H, []E) {
	var (
		h    H
		e    E
		size = unsafe.Sizeof(h) + uintptr(max(n, 1))*unsafe.Sizeof(e) // no pointer past the end for n = 0
		buf  = make([]uint64, (size+7)/8)                             // KVM's structs are aligned to 8 bytes at most
		head = unsafe.Pointer(unsafe.SliceData(buf))
	)
	return (*H)(head), unsafe.Slice((*E)(unsafe.Add(head, unsafe.Sizeof(h))), n)
}
