package kvm

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
)

// Exit is why a vCPU left the guest: a pointer to one of the types below. It and
// the slices in it belong to the vCPU and are valid until its next Run. They are
// memory of this process that outlives the vCPU, so that an Exit held too long
// is wrong, but harmless.
type Exit interface {
	Reason() ExitReason
	String() string
}

// ExitReason is the kernel's number of a kind of exit.
type ExitReason uint32

// The exit reasons that are decoded. Any other is an UnknownExit.
const (
	ReasonUnknown       ExitReason = 0
	ReasonIO            ExitReason = 2
	ReasonDebug         ExitReason = 4
	ReasonHLT           ExitReason = 5
	ReasonMMIO          ExitReason = 6
	ReasonIRQWindowOpen ExitReason = 7
	ReasonShutdown      ExitReason = 8
	ReasonFailEntry     ExitReason = 9
	ReasonIntr          ExitReason = 10
	ReasonInternalError ExitReason = 17
	ReasonSystemEvent   ExitReason = 24
	ReasonDirtyRingFull ExitReason = 31
	ReasonMemoryFault   ExitReason = 39
)

// exitNames has all reasons that x86 can give, by their numbers.
var exitNames = [...]string{
	0:  "KVM_EXIT_UNKNOWN",
	1:  "KVM_EXIT_EXCEPTION",
	2:  "KVM_EXIT_IO",
	3:  "KVM_EXIT_HYPERCALL",
	4:  "KVM_EXIT_DEBUG",
	5:  "KVM_EXIT_HLT",
	6:  "KVM_EXIT_MMIO",
	7:  "KVM_EXIT_IRQ_WINDOW_OPEN",
	8:  "KVM_EXIT_SHUTDOWN",
	9:  "KVM_EXIT_FAIL_ENTRY",
	10: "KVM_EXIT_INTR",
	11: "KVM_EXIT_SET_TPR",
	12: "KVM_EXIT_TPR_ACCESS",
	16: "KVM_EXIT_NMI",
	17: "KVM_EXIT_INTERNAL_ERROR",
	21: "KVM_EXIT_WATCHDOG",
	24: "KVM_EXIT_SYSTEM_EVENT",
	26: "KVM_EXIT_IOAPIC_EOI",
	27: "KVM_EXIT_HYPERV",
	29: "KVM_EXIT_X86_RDMSR",
	30: "KVM_EXIT_X86_WRMSR",
	31: "KVM_EXIT_DIRTY_RING_FULL",
	32: "KVM_EXIT_AP_RESET_HOLD",
	33: "KVM_EXIT_X86_BUS_LOCK",
	34: "KVM_EXIT_XEN",
	37: "KVM_EXIT_NOTIFY",
	39: "KVM_EXIT_MEMORY_FAULT",
	40: "KVM_EXIT_TDX",
}

// String returns the kernel's name of r: "KVM_EXIT_IO".
func (r ExitReason) String() string {
	if int(r) < len(exitNames) && exitNames[r] != "" {
		return exitNames[r]
	}
	return fmt.Sprintf("KVM_EXIT(%d)", uint32(r))
}

// IOExit is an access to I/O ports: Count elements of Size bytes each, all on
// Port, as REP INS and OUTS make them.
//
// Data holds what the guest wrote. Of a guest that reads, it is all ones, which
// is what an empty bus reads, until the caller fills it in place.
type IOExit struct {
	In    bool // the guest reads
	Port  uint16
	Size  int // bytes of an element: 1, 2 or 4
	Count int // elements
	Data  []byte
}

// MMIOExit is an access to guest memory that is in no slot, or a write to a
// read-only one. It is also how an access to a slot's memory that the host has
// not mapped ends if KVM emulates the instruction; if the CPU executes it, Run
// fails with EFAULT. An access that crosses a page or has more than 8 bytes is
// several exits, and one that reads and writes is at least two.
//
// Data holds what the guest wrote. Of a guest that reads, it is all ones, which
// is what an empty bus reads, until the caller fills it in place.
type MMIOExit struct {
	GPA   addr.GPA
	Write bool
	Data  []byte // at most 8 bytes

	buf [8]byte // what Data is a part of
}

// HLTExit is an HLT of a vCPU without an in-kernel local APIC.
type HLTExit struct{}

// ShutdownExit is a triple fault, or its equal.
type ShutdownExit struct{}

// FailEntryExit is a guest that the CPU refused to enter.
type FailEntryExit struct {
	HardwareReason uint64 // of VMX: the basic exit reason
	CPU            uint32 // the host CPU it was refused on
}

// Suberrors of an InternalErrorExit.
const (
	SuberrorEmulation            = 1 // KVM cannot emulate an instruction
	SuberrorSimulEx              = 2 // exceptions came together that cannot
	SuberrorDeliveryEv           = 3 // the CPU exited while it delivered an event
	SuberrorUnexpectedExitReason = 4 // the CPU exited for a reason unknown to KVM
)

// InternalErrorExit is a guest that KVM cannot go on with.
type InternalErrorExit struct {
	Suberror uint32
	Data     []uint64 // depends on Suberror and on the kernel

	// Instruction is what KVM could not emulate, if it is a SuberrorEmulation and
	// KVM says: up to 15 bytes from rip. There may be more bytes than the
	// instruction has.
	Instruction []byte

	data [16]uint64
	insn [15]byte
}

// Name returns the kernel's name of e.Suberror.
func (e *InternalErrorExit) Name() string {
	switch e.Suberror {
	case SuberrorEmulation:
		return "KVM_INTERNAL_ERROR_EMULATION"
	case SuberrorSimulEx:
		return "KVM_INTERNAL_ERROR_SIMUL_EX"
	case SuberrorDeliveryEv:
		return "KVM_INTERNAL_ERROR_DELIVERY_EV"
	case SuberrorUnexpectedExitReason:
		return "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON"
	}
	return fmt.Sprintf("KVM_INTERNAL_ERROR(%d)", e.Suberror)
}

// SystemEvent is what happened to a VM as a whole.
type SystemEvent uint32

const (
	SystemEventShutdown SystemEvent = 1
	SystemEventReset    SystemEvent = 2
	SystemEventCrash    SystemEvent = 3
)

func (e SystemEvent) String() string {
	switch e {
	case SystemEventShutdown:
		return "KVM_SYSTEM_EVENT_SHUTDOWN"
	case SystemEventReset:
		return "KVM_SYSTEM_EVENT_RESET"
	case SystemEventCrash:
		return "KVM_SYSTEM_EVENT_CRASH"
	}
	return fmt.Sprintf("KVM_SYSTEM_EVENT(%d)", uint32(e))
}

// SystemEventExit is an event of the whole VM.
type SystemEventExit struct {
	Type SystemEvent
	Data []uint64 // depends on Type; needs CapSystemEventData

	data [16]uint64
}

// MemoryFaultPrivate in MemoryFaultExit.Flags says that the access was to the
// private memory of a guest_memfd.
const MemoryFaultPrivate = 1 << 3

// MemoryFaultExit is an access to guest memory that KVM could not resolve. It
// comes with an error from Run.
type MemoryFaultExit struct {
	Flags uint64
	GPA   addr.GPA
	Size  uint64 // in bytes
}

// DirtyRingFullExit is a vCPU whose dirty ring has to be harvested and reset
// before it can run.
type DirtyRingFullExit struct{}

// IRQWindowExit is a guest that can now take an interrupt, as asked for by
// VCPU.RequestIRQWindow.
type IRQWindowExit struct{}

// IntrExit is a run that was interrupted. KVM on x86 reports most of these as
// the error EINTR.
type IntrExit struct{}

// DebugExit is what VCPU.SetGuestDebug asked for.
type DebugExit struct {
	Exception uint32 // the vector: 1 for #DB, 3 for #BP
	PC        addr.GVA
	DR6, DR7  uint64
}

// UnknownExit is an exit that this package does not decode.
type UnknownExit struct {
	Number         uint32
	HardwareReason uint64 // where Number is 0
}

func (e *IOExit) Reason() ExitReason            { return ReasonIO }
func (e *MMIOExit) Reason() ExitReason          { return ReasonMMIO }
func (e *HLTExit) Reason() ExitReason           { return ReasonHLT }
func (e *ShutdownExit) Reason() ExitReason      { return ReasonShutdown }
func (e *FailEntryExit) Reason() ExitReason     { return ReasonFailEntry }
func (e *InternalErrorExit) Reason() ExitReason { return ReasonInternalError }
func (e *SystemEventExit) Reason() ExitReason   { return ReasonSystemEvent }
func (e *MemoryFaultExit) Reason() ExitReason   { return ReasonMemoryFault }
func (e *DirtyRingFullExit) Reason() ExitReason { return ReasonDirtyRingFull }
func (e *IRQWindowExit) Reason() ExitReason     { return ReasonIRQWindowOpen }
func (e *IntrExit) Reason() ExitReason          { return ReasonIntr }
func (e *DebugExit) Reason() ExitReason         { return ReasonDebug }
func (e *UnknownExit) Reason() ExitReason       { return ExitReason(e.Number) }

func (e *HLTExit) String() string           { return e.Reason().String() }
func (e *ShutdownExit) String() string      { return e.Reason().String() }
func (e *DirtyRingFullExit) String() string { return e.Reason().String() }
func (e *IRQWindowExit) String() string     { return e.Reason().String() }
func (e *IntrExit) String() string          { return e.Reason().String() }

func (e *IOExit) String() string {
	if e.In {
		return fmt.Sprintf("KVM_EXIT_IO: in port 0x%x, %d of %d bytes", e.Port, e.Count, e.Size)
	}
	return fmt.Sprintf("KVM_EXIT_IO: out port 0x%x, %d of %d bytes, data %x", e.Port, e.Count, e.Size, e.Data)
}

func (e *MMIOExit) String() string {
	if e.Write {
		return fmt.Sprintf("KVM_EXIT_MMIO: write %v, %d bytes, data %x", e.GPA, len(e.Data), e.Data)
	}
	return fmt.Sprintf("KVM_EXIT_MMIO: read %v, %d bytes", e.GPA, len(e.Data))
}

func (e *FailEntryExit) String() string {
	return fmt.Sprintf("KVM_EXIT_FAIL_ENTRY: hardware reason 0x%x on CPU %d", e.HardwareReason, e.CPU)
}

func (e *InternalErrorExit) String() string {
	if e.Instruction != nil {
		return fmt.Sprintf("KVM_EXIT_INTERNAL_ERROR: %s, instruction % x", e.Name(), e.Instruction)
	}
	return fmt.Sprintf("KVM_EXIT_INTERNAL_ERROR: %s, data %#x", e.Name(), e.Data)
}

func (e *SystemEventExit) String() string {
	return fmt.Sprintf("KVM_EXIT_SYSTEM_EVENT: %v, data %#x", e.Type, e.Data)
}

func (e *MemoryFaultExit) String() string {
	return fmt.Sprintf("KVM_EXIT_MEMORY_FAULT: %v, 0x%x bytes, flags 0x%x", e.GPA, e.Size, e.Flags)
}

func (e *DebugExit) String() string {
	return fmt.Sprintf("KVM_EXIT_DEBUG: exception %d at %v, dr6 0x%x, dr7 0x%x", e.Exception, e.PC, e.DR6, e.DR7)
}

func (e *UnknownExit) String() string {
	if e.Number == 0 {
		return fmt.Sprintf("KVM_EXIT_UNKNOWN: hardware reason 0x%x", e.HardwareReason)
	}
	return e.Reason().String()
}

// exits has one of each kind of exit, so that Run allocates none.
type exits struct {
	io            IOExit
	mmio          MMIOExit
	hlt           HLTExit
	shutdown      ShutdownExit
	failEntry     FailEntryExit
	internalError InternalErrorExit
	systemEvent   SystemEventExit
	memoryFault   MemoryFaultExit
	dirtyRingFull DirtyRingFullExit
	irqWindow     IRQWindowExit
	intr          IntrExit
	debug         DebugExit
	unknown       UnknownExit
}

// KVM_EXIT_IO_IN, and the flag of an emulation failure that says that there are
// instruction bytes.
const (
	exitIOIn             = 0
	emulationInsnIsValid = 1 << 0
)

// decode returns the exit that area, a run area, tells of, with copies of its
// data. The error is that of an area that no kernel should have left.
//
// Preconditions: those of runAreaOf, and len(c.data) >= len(area).
func (c *VCPU) decode(area []byte) (Exit, error) {
	c.reply = nil
	run := runAreaOf(area)
	switch run.exitReason {
	case ReasonIO:
		return c.decodeIO(area, payload[runIO](run))
	case ReasonMMIO:
		return c.decodeMMIO(payload[runMMIO](run))
	case ReasonHLT:
		return &c.exits.hlt, nil
	case ReasonShutdown:
		return &c.exits.shutdown, nil
	case ReasonIRQWindowOpen:
		return &c.exits.irqWindow, nil
	case ReasonIntr:
		return &c.exits.intr, nil
	case ReasonDirtyRingFull:
		return &c.exits.dirtyRingFull, nil
	case ReasonFailEntry:
		p := payload[runFailEntry](run)
		c.exits.failEntry = FailEntryExit{HardwareReason: p.hardwareEntryFailureReason, CPU: p.cpu}
		return &c.exits.failEntry, nil
	case ReasonDebug:
		p := payload[runDebug](run)
		c.exits.debug = DebugExit{Exception: p.exception, PC: addr.GVA(p.pc), DR6: p.dr6, DR7: p.dr7}
		return &c.exits.debug, nil
	case ReasonMemoryFault:
		p := payload[runMemoryFault](run)
		c.exits.memoryFault = MemoryFaultExit{Flags: p.flags, GPA: addr.GPA(p.gpa), Size: p.size}
		return &c.exits.memoryFault, nil
	case ReasonSystemEvent:
		p, e := payload[runSystemEvent](run), &c.exits.systemEvent
		e.Type = SystemEvent(p.typ)
		e.data = p.data
		e.Data = e.data[:min(int(p.ndata), len(e.data))]
		return e, nil
	case ReasonInternalError:
		return c.decodeInternalError(run), nil
	}
	c.exits.unknown = UnknownExit{Number: uint32(run.exitReason)}
	if run.exitReason == ReasonUnknown {
		c.exits.unknown.HardwareReason = payload[runUnknown](run).hardwareExitReason
	}
	return &c.exits.unknown, nil
}

func (c *VCPU) decodeIO(area []byte, p *runIO) (Exit, error) {
	n, start := uint64(p.size)*uint64(p.count), p.dataOffset
	if end := uint64(len(area)); p.size == 0 || start < uint64(sizeofRunArea) || start > end || n > end-start {
		return nil, fmt.Errorf("KVM_EXIT_IO: %d of %d bytes at offset 0x%x do not lie in the 0x%x bytes of the run area after struct kvm_run",
			p.count, p.size, start, end)
	}
	e := &c.exits.io
	*e = IOExit{
		In:    p.direction == exitIOIn,
		Port:  p.port,
		Size:  int(p.size),
		Count: int(p.count),
		Data:  c.data[:n:n],
	}
	if e.In {
		fillOnes(e.Data)
		c.reply, c.replyAt = e.Data, uintptr(start)
	} else {
		copy(e.Data, area[start:])
	}
	return e, nil
}

func (c *VCPU) decodeMMIO(p *runMMIO) (Exit, error) {
	e := &c.exits.mmio
	n := int(p.len)
	if n > len(e.buf) {
		return nil, fmt.Errorf("KVM_EXIT_MMIO: %d bytes do not fit into the %d of struct kvm_run", n, len(e.buf))
	}
	e.GPA, e.Write, e.Data = addr.GPA(p.physAddr), p.isWrite != 0, e.buf[:n:n]
	if e.Write {
		copy(e.Data, p.data[:])
	} else {
		fillOnes(e.Data)
		c.reply, c.replyAt = e.Data, mmioDataOffset
	}
	return e, nil
}

func (c *VCPU) decodeInternalError(run *runArea) Exit {
	p, e := payload[runInternal](run), &c.exits.internalError
	e.Suberror = p.suberror
	e.data = p.data
	e.Data = e.data[:min(int(p.ndata), len(e.data))]
	e.Instruction = nil
	if e.Suberror == SuberrorEmulation && len(e.Data) >= 3 { // the flags, and two words that hold the instruction
		f := payload[runEmulationFailure](run)
		if f.flags&emulationInsnIsValid != 0 {
			e.insn = f.insnBytes
			e.Instruction = e.insn[:min(int(f.insnSize), len(e.insn))]
		}
	}
	return e
}

func fillOnes(b []byte) {
	for i := range b {
		b[i] = 0xff
	}
}
