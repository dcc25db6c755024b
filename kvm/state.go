package kvm

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
)

// The structs of this file are those of the kernel, field by field.

// Regs are the general registers: struct kvm_regs.
type Regs struct {
	Rax, Rbx, Rcx, Rdx uint64
	Rsi, Rdi, Rsp, Rbp uint64
	R8, R9, R10, R11   uint64
	R12, R13, R14, R15 uint64
	Rip, Rflags        uint64
}

// Segment is a segment register with its hidden part: struct kvm_segment.
type Segment struct {
	Base     uint64
	Limit    uint32 // in bytes, also where G is set
	Selector uint16
	Type     uint8
	Present  uint8
	DPL      uint8
	DB       uint8
	S        uint8
	L        uint8
	G        uint8
	AVL      uint8
	Unusable uint8
	_        uint8
}

// DTable is a descriptor table register: struct kvm_dtable.
type DTable struct {
	Base  uint64
	Limit uint16
	_     [3]uint16
}

// Sregs are the special registers: struct kvm_sregs.
type Sregs struct {
	CS, DS, ES, FS, GS, SS  Segment
	TR, LDT                 Segment
	GDT, IDT                DTable
	CR0, CR2, CR3, CR4, CR8 uint64
	EFER                    uint64
	APICBase                uint64
	InterruptBitmap         [4]uint64 // at most one bit: the vector being injected
}

// FPU is the x87 and SSE state: struct kvm_fpu.
type FPU struct {
	FPR        [8][16]uint8
	FCW        uint16
	FSW        uint16
	FTWX       uint8 // abridged tag word, as in the FXSAVE area
	_          uint8
	LastOpcode uint16
	LastIP     uint64
	LastDP     uint64
	XMM        [16][16]uint8
	MXCSR      uint32
	_          uint32
}

// MSREntry is a model-specific register and its value: struct kvm_msr_entry.
type MSREntry struct {
	Index uint32
	_     uint32
	Data  uint64
}

// CPUIDEntry is what CPUID answers for one function and, if
// CPUIDSignificantIndex is set, one index: struct kvm_cpuid_entry2.
type CPUIDEntry struct {
	Function           uint32
	Index              uint32
	Flags              uint32
	EAX, EBX, ECX, EDX uint32
	_                  [3]uint32
}

// CPUIDSignificantIndex in CPUIDEntry.Flags says that the answer depends on ECX.
const CPUIDSignificantIndex = 1 << 0

// LAPIC is the register page of a local APIC: struct kvm_lapic_state. The
// register at offset n of the page is at Regs[n:n+4], little-endian.
type LAPIC struct {
	Regs [0x400]uint8
}

// VCPUEvents are events pending or being delivered: struct kvm_vcpu_events.
type VCPUEvents struct {
	Exception struct {
		Injected     uint8
		Nr           uint8
		HasErrorCode uint8
		Pending      uint8
		ErrorCode    uint32
	}
	Interrupt struct {
		Injected uint8
		Nr       uint8
		Soft     uint8
		Shadow   uint8 // an instruction's interrupt shadow: 1 mov ss, 2 sti
	}
	NMI struct {
		Injected uint8
		Pending  uint8
		Masked   uint8
		_        uint8
	}
	SIPIVector uint32
	Flags      VCPUEventFlags
	SMI        struct {
		SMM          uint8
		Pending      uint8
		SMMInsideNMI uint8
		LatchedInit  uint8
	}
	TripleFault struct {
		Pending uint8
	}
	_                   [26]uint8
	ExceptionHasPayload uint8
	ExceptionPayload    uint64
}

// VCPUEventFlags say which optional fields of VCPUEvents count.
type VCPUEventFlags uint32

const (
	EventNMIPending VCPUEventFlags = 1 << iota
	EventSIPIVector
	EventShadow
	EventSMM
	EventPayload
	EventTripleFault
)

// GuestDebug arms the debugging of a guest: struct kvm_guest_debug.
type GuestDebug struct {
	Control  GuestDebugFlags
	_        uint32
	DebugReg [8]uint64 // DR0 to DR7, with GuestDebugHWBreakpoints
}

// GuestDebugFlags say what a guest is to stop for.
type GuestDebugFlags uint32

const (
	GuestDebugEnable        GuestDebugFlags = 1 << 0
	GuestDebugSingleStep    GuestDebugFlags = 1 << 1
	GuestDebugSWBreakpoints GuestDebugFlags = 1 << 16
	GuestDebugHWBreakpoints GuestDebugFlags = 1 << 17
	GuestDebugInjectDB      GuestDebugFlags = 1 << 18
	GuestDebugInjectBP      GuestDebugFlags = 1 << 19
	GuestDebugBlockIRQ      GuestDebugFlags = 1 << 20
)

// MPState is where a vCPU stands in multiprocessor start-up: struct
// kvm_mp_state. Without an in-kernel interrupt controller it is MPStateRunnable.
type MPState uint32

const (
	MPStateRunnable MPState = iota
	MPStateUninitialized
	MPStateInitReceived
	MPStateHalted
	MPStateSIPIReceived
)

func (s MPState) String() string {
	switch s {
	case MPStateRunnable:
		return "KVM_MP_STATE_RUNNABLE"
	case MPStateUninitialized:
		return "KVM_MP_STATE_UNINITIALIZED"
	case MPStateInitReceived:
		return "KVM_MP_STATE_INIT_RECEIVED"
	case MPStateHalted:
		return "KVM_MP_STATE_HALTED"
	case MPStateSIPIReceived:
		return "KVM_MP_STATE_SIPI_RECEIVED"
	}
	return fmt.Sprintf("KVM_MP_STATE(%d)", uint32(s))
}

// Translation is the answer of VCPU.Translate.
type Translation struct {
	GPA      addr.GPA // if Valid
	Valid    bool
	Writable bool
	User     bool
}

type (
	msrListHeader struct{ nmsrs uint32 }
	msrsHeader    struct{ nmsrs, _ uint32 }
	cpuidHeader   struct{ nent, _ uint32 }

	signalMaskHeader struct{ len uint32 }

	translation struct {
		linearAddress   addr.GVA
		physicalAddress addr.GPA
		valid           uint8
		writeable       uint8
		usermode        uint8
		_               [5]uint8
	}

	interrupt struct{ irq uint32 }

	enableCap struct {
		cap   uint32
		flags uint32
		args  [4]uint64
		_     [64]uint8
	}

	userspaceMemoryRegion struct {
		slot          uint32
		flags         MemFlags
		guestPhysAddr addr.GPA
		memorySize    uint64
		userspaceAddr addr.HVA
	}

	userspaceMemoryRegion2 struct {
		slot             uint32
		flags            MemFlags
		guestPhysAddr    addr.GPA
		memorySize       uint64
		userspaceAddr    addr.HVA
		guestMemfdOffset uint64
		guestMemfd       uint32
		_                uint32
		_                [14]uint64
	}

	createGuestMemfd struct {
		size  uint64
		flags GuestMemfdFlags
		_     [6]uint64
	}

	irqLevel struct {
		irq   uint32
		level uint32
	}

	pitConfig struct {
		flags uint32
		_     [15]uint32
	}

	routingHeader struct{ nr, _ uint32 }

	// routingEntry is struct kvm_irq_routing_entry for a pin of a controller.
	routingEntry struct {
		gsi     uint32
		typ     uint32
		_       [2]uint32
		irqchip uint32
		pin     uint32
		_       [6]uint32
	}
)
