package kvm

import (
	"bytes"
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// mmio is the first guest physical address after the test machine's memory.
const mmio = ramEnd

// TestSmallestMachine takes a guest through ports, MMIO and hlt.
func TestSmallestMachine(t *testing.T) {
	m := newMachine(t,
		0xb0, 'h', // mov $'h', %al
		0xba, 0xf8, 0x03, // mov $0x3f8, %dx
		0xee,       // out %al, (%dx)
		0xe5, 0x60, // in $0x60, %ax
		0xa3, 0x00, 0x80, // mov %ax, mmio
		0xa1, 0x02, 0x80, // mov mmio+2, %ax
		0xe7, 0x80, // out %ax, $0x80
		0xf4, // hlt
	)
	c := m.vcpu

	if e, ok := run(t, c).(*IOExit); !ok || e.In || e.Port != 0x3f8 || e.Size != 1 || e.Count != 1 || string(e.Data) != "h" {
		t.Fatalf("first exit: %v", e)
	}
	e, ok := run(t, c).(*IOExit)
	if !ok || !e.In || e.Port != 0x60 || e.Size != 2 || !bytes.Equal(e.Data, []byte{0xff, 0xff}) {
		t.Fatalf("second exit: %v, data %x", e, e.Data)
	}
	copy(e.Data, []byte{0x34, 0x12})
	if e, ok := run(t, c).(*MMIOExit); !ok || !e.Write || e.GPA != mmio || !bytes.Equal(e.Data, []byte{0x34, 0x12}) {
		t.Fatalf("third exit: %v", e)
	}
	r, ok := run(t, c).(*MMIOExit)
	if !ok || r.Write || r.GPA != mmio+2 || !bytes.Equal(r.Data, []byte{0xff, 0xff}) {
		t.Fatalf("fourth exit: %v, data %x", r, r.Data)
	}
	copy(r.Data, []byte{0xcd, 0xab})
	if e, ok := run(t, c).(*IOExit); !ok || e.In || e.Port != 0x80 || !bytes.Equal(e.Data, []byte{0xcd, 0xab}) {
		t.Fatalf("fifth exit: %v", e)
	}
	if e := run(t, c); e.Reason() != ReasonHLT {
		t.Fatalf("last exit: %v", e)
	}
	regs, err := c.Regs()
	if err != nil || regs.Rax != 0xabcd || regs.Rip != codeAt+17 {
		t.Errorf("rax 0x%x, rip 0x%x, %v; want 0xabcd and 0x%x", regs.Rax, regs.Rip, err, codeAt+17)
	}
}

// TestRepIO has a guest move several elements by one instruction.
func TestRepIO(t *testing.T) {
	m := newMachine(t,
		0xbf, 0x00, 0x20, // mov $0x2000, %di
		0xb9, 0x04, 0x00, // mov $4, %cx
		0xba, 0x70, 0x00, // mov $0x70, %dx
		0xf3, 0x6c, // rep insb
		0xf4, // hlt
	)
	const sent = "ping"
	for got := 0; got < len(sent); {
		e, ok := run(t, m.vcpu).(*IOExit)
		if !ok || !e.In || e.Port != 0x70 || e.Size != 1 || e.Count != len(e.Data) || e.Count == 0 {
			t.Fatalf("exit: %v", e)
		}
		got += copy(e.Data, sent[got:])
	}
	if e := run(t, m.vcpu); e.Reason() != ReasonHLT {
		t.Fatalf("last exit: %v", e)
	}
	if got := string(m.ram[0x2000:0x2004]); got != sent {
		t.Errorf("guest read %q, want %q", got, sent)
	}
}

// TestUnansweredReadIsAllOnes checks that a read the caller leaves alone does not
// get the bytes of the one before it.
func TestUnansweredReadIsAllOnes(t *testing.T) {
	for name, code := range map[string][]byte{
		"MMIO": {
			0xa1, 0x00, 0x80, // mov mmio, %ax
			0xa1, 0x00, 0x80, // mov mmio, %ax
			0xf4, // hlt
		},
		"port": {
			0xe5, 0x60, // in $0x60, %ax
			0xe5, 0x60, // in $0x60, %ax
			0xf4, // hlt
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newMachine(t, code...).vcpu
			switch e := run(t, c).(type) {
			case *IOExit:
				copy(e.Data, []byte{0x5a, 0x5a})
			case *MMIOExit:
				copy(e.Data, []byte{0x5a, 0x5a})
			}
			run(t, c)
			if r, err := c.Regs(); err != nil || r.Rax != 0x5a5a {
				t.Fatalf("rax after the answered read is 0x%x, %v", r.Rax, err)
			}
			if e := run(t, c); e.Reason() != ReasonHLT {
				t.Fatalf("last exit: %v", e)
			}
			if r, err := c.Regs(); err != nil || r.Rax != 0xffff {
				t.Errorf("rax after the unanswered read is 0x%x, %v; want 0xffff", r.Rax, err)
			}
		})
	}
}

// TestImmediateExitCompletesRead: a Run that does not enter the guest delivers
// what the exit before it asked for, and the next one does not deliver it again.
func TestImmediateExitCompletesRead(t *testing.T) {
	c := newMachine(t,
		0xa1, 0x00, 0x80, // mov mmio, %ax
		0xf4, // hlt
	).vcpu
	e, ok := run(t, c).(*MMIOExit)
	if !ok {
		t.Fatal("no MMIO exit")
	}
	copy(e.Data, []byte{0x34, 0x12})
	c.SetImmediateExit(true)
	if exit, err := c.Run(); exit != nil || !errors.Is(err, unix.EINTR) {
		t.Fatalf("Run = %v, %v; want EINTR", exit, err)
	}
	if r, err := c.Regs(); err != nil || r.Rax != 0x1234 || r.Rip != codeAt+3 {
		t.Errorf("rax 0x%x, rip 0x%x, %v; want 0x1234 and 0x%x", r.Rax, r.Rip, err, codeAt+3)
	}
	c.SetImmediateExit(false)
	if e := run(t, c); e.Reason() != ReasonHLT {
		t.Fatalf("last exit: %v", e)
	}
}

// TestKick stops a guest that never exits, and does not lose the kick when it
// comes before KVM_RUN.
func TestKick(t *testing.T) {
	m := newMachine(t,
		0x66, 0xff, 0x06, 0x00, 0x20, // incl 0x2000
		0xeb, 0xf9, // jmp back
	)
	counter := word(m.ram, 0x2000)
	tid := unix.Gettid()
	for range 20 {
		start := atomic.LoadUint32(counter)
		var wg sync.WaitGroup
		wg.Go(func() {
			for atomic.LoadUint32(counter) == start {
				runtime.Gosched()
			}
			m.vcpu.SetImmediateExit(true)
			// The signal that the Go runtime preempts by: it has a handler.
			if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
				t.Error(err)
			}
		})
		for kicked := false; !kicked; { // until then it is the runtime that interrupts
			if exit, err := m.vcpu.Run(); exit != nil || !errors.Is(err, unix.EINTR) {
				t.Fatalf("Run = %v, %v; want EINTR", exit, err)
			}
			kicked = atomic.LoadUint32(controlWord(m.vcpu.fd.mem))&immediateExitBits != 0
		}
		wg.Wait()
		m.vcpu.SetImmediateExit(false)
	}
}

// TestCloseDuringRun closes a vCPU that is in the guest, while others kick it
// and ask for its registers. The Run ends by a kick, and is the last.
func TestCloseDuringRun(t *testing.T) {
	m := newMachine(t,
		0x66, 0xff, 0x06, 0x00, 0x20, // incl 0x2000
		0xeb, 0xf9, // jmp back
	)
	counter := word(m.ram, 0x2000)
	tid, done := unix.Gettid(), make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(done)
		for atomic.LoadUint32(counter) == 0 {
			runtime.Gosched()
		}
		if err := m.vcpu.Close(); err != nil {
			t.Error(err)
		}
		for {
			select {
			case <-stop:
				return
			default:
			}
			m.vcpu.SetImmediateExit(true)
			if _, err := m.vcpu.Regs(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Regs after Close = %v, want os.ErrClosed", err)
			}
			if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
				t.Error(err)
			}
		}
	}()
	var err error
	for err = errRunEINTR; errors.Is(err, unix.EINTR); {
		_, err = m.vcpu.Run()
	}
	close(stop)
	<-done
	if !errors.Is(err, os.ErrClosed) {
		t.Errorf("Run ended with %v, want os.ErrClosed", err)
	}
	if left := openFDs(t); len(left) != 1 { // that of the VM
		t.Errorf("descriptors left: %v", left)
	}
}

// TestExitOutlivesVCPU uses what an exit holds after the run area is gone.
func TestExitOutlivesVCPU(t *testing.T) {
	c := newMachine(t, 0xe4, 0x60).vcpu // in $0x60, %al
	e, ok := run(t, c).(*IOExit)
	if !ok {
		t.Fatal("no I/O exit")
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	e.Data[0] = 1
	if want := "KVM_EXIT_IO: in port 0x60, 1 of 1 bytes"; e.String() != want {
		t.Errorf("%q, want %q", e, want)
	}
}

// TestUnmappedMemory: a guest that touches what the host took away gets EFAULT,
// and goes on where it was once the memory is back.
func TestUnmappedMemory(t *testing.T) {
	m := newUserMachine(t,
		0x8b, 0x04, 0x25, 0x00, 0x20, 0x00, 0x00, // mov 0x2000, %eax
		0xe7, 0x80, // out %eax, $0x80
	)
	page := m.ram[0x2000:0x3000]
	page[0], page[1] = 0x34, 0x12
	if err := unix.Mprotect(page, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	exit, err := m.vcpu.Run()
	for errors.Is(err, unix.EINTR) {
		exit, err = m.vcpu.Run()
	}
	if !errors.Is(err, unix.EFAULT) {
		t.Fatalf("Run = %v, %v; want EFAULT", exit, err)
	}
	if exit != nil { // only some hosts can say
		if f, ok := exit.(*MemoryFaultExit); !ok || f.GPA.GFN() != 2 {
			t.Errorf("EFAULT came with %v, want nothing or a memory fault at gfn 2", exit)
		}
	}
	if r, err := m.vcpu.Regs(); err != nil || r.Rip != codeAt {
		t.Errorf("rip 0x%x, %v; want 0x%x, at the instruction", r.Rip, err, codeAt)
	}
	if err := unix.Mprotect(page, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	if e, ok := run(t, m.vcpu).(*IOExit); !ok || !bytes.Equal(e.Data, []byte{0x34, 0x12, 0, 0}) {
		t.Errorf("exit: %v, want the page's content", e)
	}
}

// TestStaleReasonIsNotDecoded: an error that is not a memory fault has no exit,
// whatever the run area says from before.
func TestStaleReasonIsNotDecoded(t *testing.T) {
	c := newMachine(t, 0xf4).vcpu // hlt
	if e := run(t, c); e.Reason() != ReasonHLT {
		t.Fatalf("first exit: %v", e)
	}
	runAreaOf(c.fd.mem).exitReason = ReasonMemoryFault
	c.SetImmediateExit(true)
	if exit, err := c.Run(); exit != nil || !errors.Is(err, unix.EINTR) {
		t.Errorf("Run = %v, %v; want EINTR alone", exit, err)
	}
}

func TestInterrupt(t *testing.T) {
	m := newMachine(t,
		0xbc, 0x00, 0x30, // mov $0x3000, %sp
		0xfb,       // sti
		0x90,       // nop
		0xeb, 0xfd, // jmp back
	)
	const vector, handler = 0x21, 0x2000
	m.ram[4*vector+1] = handler >> 8 // segment 0
	m.ram[handler] = 0xf4            // hlt
	if m.vcpu.ReadyForIRQ() {
		t.Error("ready for an interrupt before it ran")
	}
	m.vcpu.RequestIRQWindow(true)
	if e := run(t, m.vcpu); e.Reason() != ReasonIRQWindowOpen {
		t.Fatalf("exit: %v, want an interrupt window", e)
	}
	if !m.vcpu.ReadyForIRQ() {
		t.Error("not ready for an interrupt in the window")
	}
	m.vcpu.RequestIRQWindow(false)
	if err := m.vcpu.Interrupt(vector); err != nil {
		t.Fatal(err)
	}
	if e := run(t, m.vcpu); e.Reason() != ReasonHLT {
		t.Fatalf("exit: %v, want hlt", e)
	}
	if r, err := m.vcpu.Regs(); err != nil || r.Rip != handler+1 {
		t.Errorf("halted at 0x%x, %v; want 0x%x", r.Rip, err, handler+1)
	}
	if err := m.vcpu.Interrupt(256); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Interrupt(256) = %v, want EINVAL", err)
	}
}

// TestHLTWithIRQChip: with an in-kernel interrupt controller hlt does not exit.
func TestHLTWithIRQChip(t *testing.T) {
	ram := newRAM(t, ramEnd)
	copy(ram[codeAt:], []byte{
		0x66, 0xff, 0x06, 0x00, 0x20, // incl 0x2000
		0xf4, // hlt
	})
	vm := newVM(t)
	if err := vm.CreateIRQChip(); err != nil {
		t.Fatal(err)
	}
	if err := vm.SetMemoryRegion(MemoryRegion{Size: ramEnd, HVA: hvaOf(ram)}); err != nil {
		t.Fatal(err)
	}
	c := newTestVCPU(t, vm)
	if err := c.Interrupt(32); !errors.Is(err, unix.ENXIO) {
		t.Errorf("Interrupt = %v, want ENXIO", err)
	}
	tid := unix.Gettid()
	done := make(chan struct{})
	var stop atomic.Bool
	go func() {
		defer close(done)
		for !stop.Load() {
			if atomic.LoadUint32(word(ram, 0x2000)) != 0 {
				if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
					t.Error(err)
				}
			}
			runtime.Gosched()
		}
	}()
	for {
		exit, err := c.Run()
		if exit != nil || !errors.Is(err, unix.EINTR) {
			t.Errorf("Run = %v, %v; want EINTR", exit, err)
			break
		}
		s, err := c.MPState()
		if err != nil {
			t.Error(err)
			break
		}
		if s == MPStateHalted {
			break
		}
	}
	stop.Store(true)
	<-done
}

func TestTranslate(t *testing.T) {
	c := newMachine(t).vcpu
	got, err := c.Translate(0x1234)
	if err != nil || !got.Valid || got.GPA != 0x1234 {
		t.Errorf("Translate without paging = %+v, %v; want gpa 0x1234", got, err)
	}

	m := newUserMachine(t)
	*word(m.ram, tablesAt[3]+8*3) = 0x2000 | 1
	for gva, want := range map[addr.GVA]Translation{
		0x2123:     {GPA: 0x2123, Valid: true},
		0x3123:     {GPA: 0x2123, Valid: true},
		0x10000:    {},
		0x40000000: {},
	} {
		got, err := m.vcpu.Translate(gva)
		if err != nil || got.Valid != want.Valid || got.Valid && got.GPA != want.GPA {
			t.Errorf("Translate(%v) = %+v, %v; want %+v", gva, got, err, want)
		}
	}
}

func TestMSRs(t *testing.T) {
	c := newMachine(t).vcpu
	const (
		sysenterCS  = 0x174
		sysenterESP = 0x175
		lstar       = 0xc0000082
		none        = 0x12345678
	)
	if err := c.SetMSRs([]MSREntry{{Index: sysenterCS, Data: 0x10}, {Index: lstar, Data: 0x1000}}); err != nil {
		t.Fatal(err)
	}
	got, err := c.MSRs(lstar, sysenterCS)
	if err != nil || len(got) != 2 || got[0] != (MSREntry{Index: lstar, Data: 0x1000}) || got[1] != (MSREntry{Index: sysenterCS, Data: 0x10}) {
		t.Errorf("MSRs = %+v, %v", got, err)
	}

	var e *MSRError
	err = c.SetMSRs([]MSREntry{{Index: sysenterCS, Data: 0x20}, {Index: none}, {Index: lstar, Data: 0x2000}})
	if !errors.As(err, &e) || *e != (MSRError{Op: "KVM_SET_MSRS", Index: none, Done: 1}) {
		t.Errorf("SetMSRs = %v, want MSR 0x%x refused after 1", err, none)
	}
	got, err = c.MSRs(sysenterCS, none, lstar)
	if !errors.As(err, &e) || *e != (MSRError{Op: "KVM_GET_MSRS", Index: none, Done: 1}) {
		t.Errorf("MSRs = %v, want MSR 0x%x refused after 1", err, none)
	}
	if len(got) != 1 || got[0].Data != 0x20 {
		t.Errorf("MSRs before the refused one = %+v, want 0x20", got)
	}
	if _, err := c.MSRs(make([]uint32, 256)...); !errors.Is(err, unix.E2BIG) {
		t.Errorf("256 MSRs: %v, want E2BIG", err)
	}
	if got, err := c.MSRs(); err != nil || len(got) != 0 {
		t.Errorf("no MSRs: %v, %v", got, err)
	}
}

func TestCPUID2(t *testing.T) {
	c := newMachine(t).vcpu
	want := []CPUIDEntry{
		{Function: 0, EAX: 0xd, EBX: 0x756e6547, EDX: 0x49656e69, ECX: 0x6c65746e},
		{Function: 0x40000000, EAX: 0x40000000, EBX: 0x6d7667},
	}
	if err := c.SetCPUID2(want); err != nil {
		t.Fatal(err)
	}
	got, err := c.CPUID2()
	if err != nil || len(got) != 2 || got[1].EBX != want[1].EBX {
		t.Errorf("CPUID2 = %+v, %v; want %+v", got, err, want)
	}
	if err := c.SetCPUID2(make([]CPUIDEntry, 1000)); !errors.Is(err, unix.E2BIG) {
		t.Errorf("SetCPUID2 of 1000 entries = %v, want E2BIG", err)
	}
}

// TestRegisterFiles writes each register file and reads it back.
func TestRegisterFiles(t *testing.T) {
	c := newMachine(t, 0xf4).vcpu // hlt

	regs := Regs{Rax: 1, Rbx: 2, Rsi: 3, R8: 8, R15: 15, Rip: codeAt, Rflags: 2}
	if err := c.SetRegs(regs); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Regs(); err != nil || got != regs {
		t.Errorf("Regs = %+v, %v; want %+v", got, err, regs)
	}

	sregs, err := c.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	sregs.GDT, sregs.CR8 = DTable{Base: 0x3000, Limit: 0x17}, 5
	if err := c.SetSregs(sregs); err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		if got, err := c.Sregs(); err != nil || got.GDT != sregs.GDT || got.CR8 != 5 {
			t.Errorf("%s: gdt %+v, cr8 %d, %v; want %+v and 5", when, got.GDT, got.CR8, err, sregs.GDT)
		}
	}
	check("before Run")
	run(t, c)
	check("after Run")

	fpu, err := c.FPU()
	if err != nil {
		t.Fatal(err)
	}
	fpu.FCW, fpu.XMM[3][7] = 0x37e, 0x99
	if err := c.SetFPU(fpu); err != nil {
		t.Fatal(err)
	}
	if got, err := c.FPU(); err != nil || got.FCW != 0x37e || got.XMM[3][7] != 0x99 {
		t.Errorf("FCW 0x%x, xmm3[7] 0x%x, %v; want 0x37e and 0x99", got.FCW, got.XMM[3][7], err)
	}

	events, err := c.VCPUEvents()
	if err != nil {
		t.Fatal(err)
	}
	events.NMI.Masked = 1
	if err := c.SetVCPUEvents(events); err != nil {
		t.Fatal(err)
	}
	if got, err := c.VCPUEvents(); err != nil || got.NMI.Masked != 1 {
		t.Errorf("NMI masked %d, %v; want 1", got.NMI.Masked, err)
	}

	if s, err := c.MPState(); err != nil || s != MPStateRunnable {
		t.Errorf("MPState = %v, %v; want %v", s, err, MPStateRunnable)
	}
	if err := c.SetMPState(MPStateHalted); !errors.Is(err, unix.EINVAL) {
		t.Errorf("SetMPState without a local APIC = %v, want EINVAL", err)
	}
	if _, err := c.LAPIC(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("LAPIC without one = %v, want EINVAL", err)
	}
}

// TestSignalMask: a signal that the thread blocks and the mask does not ends a
// Run that begins after it was sent.
func TestSignalMask(t *testing.T) {
	c := newMachine(t, 0xeb, 0xfe).vcpu // jmp .
	const sig = unix.SIGUSR2
	bit := uint64(1) << (sig - 1)
	block := unix.Sigset_t{}
	block.Val[0] = bit
	var old unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &block, &old); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Tgkill(unix.Getpid(), unix.Gettid(), sig); err != nil {
		t.Fatal(err)
	}
	// All others are blocked in Run, so that it is this one that ends it.
	mask := unix.Sigset_t{}
	mask.Val[0] = ^bit
	if err := c.SetSignalMask(&mask); err != nil {
		t.Fatal(err)
	}
	if exit, err := c.Run(); exit != nil || !errors.Is(err, unix.EINTR) {
		t.Errorf("Run = %v, %v; want EINTR", exit, err)
	}
	if err := takeSignal(block); err != nil {
		t.Errorf("the signal is not pending any more: %v", err)
	}
	if err := c.SetSignalMask(nil); err != nil {
		t.Error(err)
	}
}

func TestSingleStep(t *testing.T) {
	c := newMachine(t, 0x90, 0xf4).vcpu // nop; hlt
	if err := c.SetGuestDebug(GuestDebug{Control: GuestDebugEnable | GuestDebugSingleStep}); err != nil {
		t.Fatal(err)
	}
	if e, ok := run(t, c).(*DebugExit); !ok || e.PC != codeAt+1 || e.Exception != 1 {
		t.Fatalf("exit: %v, want #DB at 0x%x", e, codeAt+1)
	}
	if err := c.SetGuestDebug(GuestDebug{}); err != nil {
		t.Fatal(err)
	}
	if e := run(t, c); e.Reason() != ReasonHLT {
		t.Errorf("exit: %v, want hlt", e)
	}
}

func TestVCPUEnableCap(t *testing.T) {
	c := newMachine(t).vcpu
	if err := c.EnableCap(CapIrqchip, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("EnableCap of what is not for vCPUs = %v, want EINVAL", err)
	}
}

// TestAllocations: what runs in a vCPU's loop leaves nothing to collect.
func TestAllocations(t *testing.T) {
	c := newMachine(t, 0xee, 0xeb, 0xfd).vcpu // out %al, (%dx); jmp back
	regs, err := c.Regs()
	if err != nil {
		t.Fatal(err)
	}
	sregs, err := c.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"Run":              func() { _, _ = c.Run() },
		"Regs":             func() { _, _ = c.Regs() },
		"SetRegs":          func() { _ = c.SetRegs(regs) },
		"Sregs":            func() { _, _ = c.Sregs() },
		"SetSregs":         func() { _ = c.SetSregs(sregs) },
		"SetImmediateExit": func() { c.SetImmediateExit(false) },
		"Run that is kicked": func() {
			c.SetImmediateExit(true)
			if _, err := c.Run(); err != errRunEINTR {
				t.Error(err)
			}
			c.SetImmediateExit(false)
		},
	} {
		if n := testing.AllocsPerRun(20, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}

	m := newUserMachine(t, 0xa0) // what it is does not matter: it cannot be fetched
	if err := unix.Mprotect(m.ram[codeAt:codeAt+addr.PageSize], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(20, func() {
		if _, err := m.vcpu.Run(); err != errRunEFAULT && err != errRunEINTR {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("Run that faults allocates %v times", n)
	}
}
