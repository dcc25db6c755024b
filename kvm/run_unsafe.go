package kvm

import "unsafe"

// runArea is struct kvm_run, at the start of the memory that KVM shares with the
// thread that runs a vCPU. KVM reads and writes it during KVM_RUN only, except
// for the first word, which SetImmediateExit changes at any time and which is
// therefore accessed by controlWord alone.
type runArea struct {
	requestInterruptWindow uint8
	immediateExit          uint8
	_                      [6]uint8

	exitReason                 ExitReason
	readyForInterruptInjection uint8
	ifFlag                     uint8
	flags                      uint16

	cr8      uint64
	apicBase uint64

	exit [256 / 8]uint64 // a union: see payload

	validRegs uint64
	dirtyRegs uint64
	syncRegs  [2048 / 8]uint64
}

// The members of the union in runArea, each the payload of an exit reason.
type (
	runUnknown struct {
		hardwareExitReason uint64
	}

	runFailEntry struct {
		hardwareEntryFailureReason uint64
		cpu                        uint32
	}

	runIO struct {
		direction  uint8
		size       uint8
		port       uint16
		count      uint32
		dataOffset uint64 // from the start of the run area
	}

	runDebug struct {
		exception uint32
		_         uint32
		pc        uint64
		dr6       uint64
		dr7       uint64
	}

	runMMIO struct {
		physAddr uint64
		data     [8]uint8
		len      uint32
		isWrite  uint8
	}

	runInternal struct {
		suberror uint32
		ndata    uint32
		data     [16]uint64
	}

	// runEmulationFailure is runInternal for one suberror.
	runEmulationFailure struct {
		_         [2]uint32 // suberror and ndata
		flags     uint64
		insnSize  uint8
		insnBytes [15]uint8
	}

	runSystemEvent struct {
		typ   uint32
		ndata uint32
		data  [16]uint64
	}

	runMemoryFault struct {
		flags uint64
		gpa   uint64
		size  uint64
	}
)

const (
	sizeofRunArea  = unsafe.Sizeof(runArea{})
	mmioDataOffset = unsafe.Offsetof(runArea{}.exit) + unsafe.Offsetof(runMMIO{}.data)

	// The bytes of the first word, which hold 0 or 1.
	requestIRQWindowBits = 1 << (8 * unsafe.Offsetof(runArea{}.requestInterruptWindow))
	immediateExitBits    = 1 << (8 * unsafe.Offsetof(runArea{}.immediateExit))
)

// signalMask is struct kvm_signal_mask with the kernel's sigset_t after it, which
// is not aligned as its 64 bits would be.
type signalMask struct {
	signalMaskHeader
	sigset [2]uint32
}

const sizeofSigset = uint32(unsafe.Sizeof(signalMask{}.sigset))

// runAreaOf returns the struct at the start of area.
//
// Preconditions: area has at least sizeofRunArea bytes and starts at a multiple
// of 8.
func runAreaOf(area []byte) *runArea {
	return (*runArea)(unsafe.Pointer(unsafe.SliceData(area)))
}

// payload returns the union of r as a T, which is one of its members.
func payload[T any](r *runArea) *T { return (*T)(unsafe.Pointer(&r.exit)) }

// controlWord returns the first word of area.
//
// Preconditions: those of runAreaOf.
func controlWord(area []byte) *uint32 {
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(area)))
}
