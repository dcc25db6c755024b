package kvm

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// VCPU is a virtual CPU. For which goroutines may use it see the package comment.
type VCPU struct {
	fd fd // its mem is the run area, which the kernel shares

	ringSize uint32     // bytes of the dirty ring, 0 if the VM has none; immutable once the vCPU is known
	ringMu   sync.Mutex // protects ring, and its mapping from being made twice
	ring     *DirtyRing // nil until it was asked for

	// The rest belongs to the goroutine that is in Run.

	exits exits
	data  []byte // what IOExit.Data is a part of: as long as the run area

	// reply is the Data of an exit that asked for bytes, and replyAt where in the
	// run area the next Run puts them for KVM. reply is nil after other exits.
	reply   []byte
	replyAt uintptr
}

func newVCPU(raw int, mem []byte) *VCPU {
	c := &VCPU{data: make([]byte, len(mem))}
	c.fd.init(raw, mem)
	return c
}

// Close closes the vCPU. It does not interrupt a Run that is under way; that one
// returns when it would have, and its Exit stays valid.
func (c *VCPU) Close() error { return c.fd.close() }

// The errors of KVM_RUN that are part of running a guest, built once.
var (
	errRunEINTR  = &Error{Op: reqRun.name, Errno: unix.EINTR}
	errRunEAGAIN = &Error{Op: reqRun.name, Errno: unix.EAGAIN}
	errRunEFAULT = &Error{Op: reqRun.name, Errno: unix.EFAULT}
)

func runError(errno unix.Errno) error {
	switch errno {
	case unix.EINTR:
		return errRunEINTR
	case unix.EAGAIN:
		return errRunEAGAIN
	case unix.EFAULT:
		return errRunEFAULT
	}
	return &Error{Op: reqRun.name, Errno: errno}
}

// Run lets the guest run until it exits. The Exit and what it points to belong
// to the vCPU and are valid until the next Run.
//
// If the exit was an access to a port or to MMIO that reads, the caller fills
// its Data in place, and the next Run completes the access with it, whether or
// not it enters the guest.
//
// An error that is unix.EINTR means that a signal came or that SetImmediateExit
// is on, and that the guest can be run again as it is. It can also after
// unix.EFAULT, once the cause is gone: the guest touched memory of a slot that
// the host has not mapped, or not for that access. Where KVM can say which
// memory, Run returns a [*MemoryFaultExit] together with the error, which may
// then be unix.EHWPOISON as well. With any other error there is no Exit.
//
// Run wraps KVM_RUN. It allocates nothing, unless it fails with an errno other
// than EINTR, EAGAIN and EFAULT.
func (c *VCPU) Run() (Exit, error) {
	if !c.fd.acquire() {
		return nil, closedError(reqRun.name)
	}
	defer c.fd.release()
	area := c.fd.mem
	run := runAreaOf(area)

	// The reply is kept until there is another exit, because a KVM_RUN that
	// fails may or may not have taken it. KVM looks at it only once.
	copy(area[c.replyAt:], c.reply)

	// KVM may leave the reason alone when it fails. Without this store, an EFAULT
	// could be taken for the memory fault before it.
	run.exitReason = ReasonUnknown

	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd.raw), reqRun.nr, 0)
	if errno == 0 {
		return c.decode(area)
	}
	err := runError(errno)
	if (errno == unix.EFAULT || errno == unix.EHWPOISON) && run.exitReason == ReasonMemoryFault {
		exit, _ := c.decode(area)
		return exit, err
	}
	return nil, err
}

// SetImmediateExit makes every Run return unix.EINTR without entering the guest,
// or lets Run enter it again. An access that the last exit left unfinished is
// completed all the same. It needs CapImmediateExit.
//
// With a signal it makes a kick that is never lost, because KVM_RUN looks at the
// flag once, as it begins. The store is sequentially consistent and precedes the
// return of SetImmediateExit:
//
//	kicker                     vCPU thread
//	SetImmediateExit(true)
//	tgkill
//	                           before KVM_RUN: the signal is spent, the flag is seen
//	                           in KVM_RUN: the flag was missed, the signal is not
//	                           KVM_RUN = EINTR (required)
//
// It may be called from any goroutine, during Run too. After Close it does
// nothing.
func (c *VCPU) SetImmediateExit(on bool) { c.setControl(immediateExitBits, on) }

// RequestIRQWindow makes Run exit with an [*IRQWindowExit] as soon as the guest
// can take an interrupt, or lets it go on. It is for a VM without an in-kernel
// interrupt controller. After Close it does nothing.
func (c *VCPU) RequestIRQWindow(on bool) { c.setControl(requestIRQWindowBits, on) }

func (c *VCPU) setControl(bits uint32, on bool) {
	if !c.fd.acquire() {
		return
	}
	defer c.fd.release()
	if on {
		atomic.OrUint32(controlWord(c.fd.mem), bits)
	} else {
		atomic.AndUint32(controlWord(c.fd.mem), ^bits)
	}
}

// ReadyForIRQ reports whether at the last exit the guest could have taken an
// interrupt by VCPU.Interrupt. After Close it reports false.
func (c *VCPU) ReadyForIRQ() bool {
	if !c.fd.acquire() {
		return false
	}
	defer c.fd.release()
	return runAreaOf(c.fd.mem).readyForInterruptInjection != 0
}

// EnableCap turns c on for the vCPU. What flags and args mean, of which there
// are at most 4, depends on c.
//
// EnableCap wraps KVM_ENABLE_CAP, as a vCPU ioctl.
func (c *VCPU) EnableCap(cp Cap, flags uint32, args ...uint64) error {
	return setCap(&c.fd, cp, flags, args)
}

// Stats opens the statistics of the vCPU, which needs CapBinaryStatsFD. They may
// be read after the vCPU is closed and keep it alive until they are closed too.
//
// Stats wraps KVM_GET_STATS_FD, as a vCPU ioctl.
func (c *VCPU) Stats() (*Stats, error) { return openStats(&c.fd) }

// Regs returns the general registers. After an exit that reads, they are those
// from before the reading instruction until the next Run has completed it.
//
// Regs wraps KVM_GET_REGS.
func (c *VCPU) Regs() (Regs, error) {
	var r Regs
	_, err := ioctl(&c.fd, reqGetRegs, &r)
	return r, err
}

// SetRegs sets the general registers.
//
// SetRegs wraps KVM_SET_REGS.
func (c *VCPU) SetRegs(r Regs) error {
	_, err := ioctl(&c.fd, reqSetRegs, &r)
	return err
}

// Sregs returns the special registers.
//
// Sregs wraps KVM_GET_SREGS.
func (c *VCPU) Sregs() (Sregs, error) {
	var s Sregs
	_, err := ioctl(&c.fd, reqGetSregs, &s)
	return s, err
}

// SetSregs sets the special registers.
//
// SetSregs wraps KVM_SET_SREGS.
func (c *VCPU) SetSregs(s Sregs) error {
	if _, err := ioctl(&c.fd, reqSetSregs, &s); err != nil {
		return err
	}
	// Without an in-kernel local APIC, KVM_RUN begins by loading CR8 from the run
	// area and would undo this call.
	if c.fd.acquire() {
		runAreaOf(c.fd.mem).cr8 = s.CR8
		c.fd.release()
	}
	return nil
}

// FPU returns the x87 and SSE state.
//
// FPU wraps KVM_GET_FPU.
func (c *VCPU) FPU() (FPU, error) {
	var f FPU
	_, err := ioctl(&c.fd, reqGetFPU, &f)
	return f, err
}

// SetFPU sets the x87 and SSE state.
//
// SetFPU wraps KVM_SET_FPU.
func (c *VCPU) SetFPU(f FPU) error {
	_, err := ioctl(&c.fd, reqSetFPU, &f)
	return err
}

// MSRs returns the values of the MSRs with these indices. If KVM refuses one,
// the error is an [*MSRError] and the values are those of the MSRs before it.
//
// MSRs wraps KVM_GET_MSRS, which takes at most 255.
func (c *VCPU) MSRs(indices ...uint32) ([]MSREntry, error) {
	h, entries := flex[msrsHeader, MSREntry](len(indices))
	h.nmsrs = uint32(len(indices))
	for i, index := range indices {
		entries[i].Index = index
	}
	n, err := c.msrs(reqGetMSRs, h, entries)
	return entries[:n], err
}

// SetMSRs sets MSRs in order. If KVM refuses one, the error is an [*MSRError];
// the MSRs before it are set and the ones after it are not.
//
// SetMSRs wraps KVM_SET_MSRS, which takes at most 255.
func (c *VCPU) SetMSRs(list []MSREntry) error {
	h, entries := flex[msrsHeader, MSREntry](len(list))
	h.nmsrs = uint32(len(list))
	copy(entries, list)
	_, err := c.msrs(reqSetMSRs, h, entries)
	return err
}

func (c *VCPU) msrs(req request[msrsHeader], h *msrsHeader, entries []MSREntry) (done int, err error) {
	done, err = ioctl(&c.fd, req, h)
	if err != nil {
		return 0, about(err, fmt.Sprintf("%d MSRs", len(entries)))
	}
	if done < len(entries) {
		return done, &MSRError{Op: req.name, Index: entries[done].Index, Done: done}
	}
	return len(entries), nil
}

// CPUID2 returns the CPUID that the guest sees.
//
// CPUID2 wraps KVM_GET_CPUID2.
func (c *VCPU) CPUID2() ([]CPUIDEntry, error) { return getCPUID(&c.fd, reqGetCPUID2, 64) }

// SetCPUID2 sets the CPUID that the guest sees, usually once, before the vCPU
// runs, and from System.SupportedCPUID.
//
// SetCPUID2 wraps KVM_SET_CPUID2.
func (c *VCPU) SetCPUID2(list []CPUIDEntry) error {
	h, entries := flex[cpuidHeader, CPUIDEntry](len(list))
	h.nent = uint32(len(list))
	copy(entries, list)
	if _, err := ioctl(&c.fd, reqSetCPUID2, h); err != nil {
		return about(err, fmt.Sprintf("%d entries", len(list)))
	}
	return nil
}

// SetSignalMask sets the signals that are blocked while the thread is in Run, or
// with nil leaves the thread's own mask in place. A signal that is blocked
// outside of Run and not here interrupts Run even if it was sent before.
//
// SetSignalMask wraps KVM_SET_SIGNAL_MASK.
func (c *VCPU) SetSignalMask(set *unix.Sigset_t) error {
	if set == nil {
		_, err := ioctl(&c.fd, reqSetSignalMask, nil)
		return err
	}
	// The kernel's sigset_t has 64 bits, the C library's has 1024.
	arg := signalMask{
		signalMaskHeader: signalMaskHeader{len: sizeofSigset},
		sigset:           [2]uint32{uint32(set.Val[0]), uint32(set.Val[0] >> 32)},
	}
	_, err := ioctl(&c.fd, reqSetSignalMask, &arg.signalMaskHeader)
	return err
}

// MPState returns where the vCPU stands in multiprocessor start-up.
//
// MPState wraps KVM_GET_MP_STATE.
func (c *VCPU) MPState() (MPState, error) {
	var s MPState
	_, err := ioctl(&c.fd, reqGetMPState, &s)
	return s, err
}

// SetMPState moves the vCPU in multiprocessor start-up.
//
// SetMPState wraps KVM_SET_MP_STATE.
func (c *VCPU) SetMPState(s MPState) error {
	if _, err := ioctl(&c.fd, reqSetMPState, &s); err != nil {
		return about(err, s.String())
	}
	return nil
}

// Interrupt queues an external interrupt, to be delivered by the next Run. The
// vCPU has to be ReadyForIRQ. It is for a VM without an in-kernel interrupt
// controller.
//
// Interrupt wraps KVM_INTERRUPT.
func (c *VCPU) Interrupt(vector uint32) error {
	arg := interrupt{irq: vector}
	if _, err := ioctl(&c.fd, reqInterrupt, &arg); err != nil {
		return about(err, fmt.Sprintf("vector 0x%x", vector))
	}
	return nil
}

// LAPIC returns the registers of the in-kernel local APIC.
//
// LAPIC wraps KVM_GET_LAPIC.
func (c *VCPU) LAPIC() (LAPIC, error) {
	var l LAPIC
	_, err := ioctl(&c.fd, reqGetLAPIC, &l)
	return l, err
}

// SetLAPIC sets the registers of the in-kernel local APIC.
//
// SetLAPIC wraps KVM_SET_LAPIC.
func (c *VCPU) SetLAPIC(l LAPIC) error {
	_, err := ioctl(&c.fd, reqSetLAPIC, &l)
	return err
}

// VCPUEvents returns the events that are pending or being delivered.
//
// VCPUEvents wraps KVM_GET_VCPU_EVENTS.
func (c *VCPU) VCPUEvents() (VCPUEvents, error) {
	var e VCPUEvents
	_, err := ioctl(&c.fd, reqGetVCPUEvents, &e)
	return e, err
}

// SetVCPUEvents sets the events that are pending or being delivered.
//
// SetVCPUEvents wraps KVM_SET_VCPU_EVENTS.
func (c *VCPU) SetVCPUEvents(e VCPUEvents) error {
	_, err := ioctl(&c.fd, reqSetVCPUEvents, &e)
	return err
}

// SetGuestDebug sets what the guest stops for with a [*DebugExit]. The zero
// GuestDebug turns debugging off.
//
// SetGuestDebug wraps KVM_SET_GUEST_DEBUG.
func (c *VCPU) SetGuestDebug(d GuestDebug) error {
	if _, err := ioctl(&c.fd, reqSetGuestDebug, &d); err != nil {
		return about(err, fmt.Sprintf("control 0x%x", uint32(d.Control)))
	}
	return nil
}

// Translate walks the guest's page tables, in its present mode, for gva. What it
// says of Writable and User is what KVM says, which on x86 does not come from
// the page tables: true and false.
//
// Translate wraps KVM_TRANSLATE.
func (c *VCPU) Translate(gva addr.GVA) (Translation, error) {
	arg := translation{linearAddress: gva}
	if _, err := ioctl(&c.fd, reqTranslate, &arg); err != nil {
		return Translation{}, about(err, gva.String())
	}
	return Translation{
		GPA:      arg.physicalAddress,
		Valid:    arg.valid != 0,
		Writable: arg.writeable != 0,
		User:     arg.usermode != 0,
	}, nil
}
