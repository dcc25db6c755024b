package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/arch/x86/x86asm"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
)

// ExitError is an exit that a vCPU could not continue from.
type ExitError struct {
	VCPU   int
	Exit   string // the exit as KVM gave it
	Reason string // what it means
	RIP    uint64 // 0 with NoRIP

	// NoRIP says that the host does not tell where the guest was: on AMD, KVM
	// resets a vCPU whose guest has shut down before it reports the exit.
	NoRIP bool

	// If the guest used an address that the host does not back: the address,
	// how it was used, what the host has there, and the newest operation on it.
	// Extent and Change are nil where there is nothing to tell.
	GPA    addr.GPA
	Access addr.Access // NoAccess: the exit was about no address
	Extent *mm.Extent
	Slot   string // the memory slot of GPA, or "no slot"
	Change *mm.Change

	Err error // the error under it, or nil
}

func (e *ExitError) Error() string {
	var b strings.Builder
	if e.NoRIP {
		fmt.Fprintf(&b, "vCPU %d at an unknown rip: %s", e.VCPU, e.Reason)
	} else {
		fmt.Fprintf(&b, "vCPU %d at rip 0x%x: %s", e.VCPU, e.RIP, e.Reason)
	}
	if e.Access != addr.NoAccess {
		verb := "reads"
		if e.Access&addr.Write != 0 {
			verb = "writes"
		}
		fmt.Fprintf(&b, ": it %s %v, %s", verb, e.GPA, e.Slot)
	}
	if e.Extent != nil {
		fmt.Fprintf(&b, "; the host has %v", *e.Extent)
	}
	if e.Change != nil && (e.Extent == nil || e.Extent.Why == nil) {
		fmt.Fprintf(&b, "; last there: %v", *e.Change)
	}
	fmt.Fprintf(&b, " (%s)", e.Exit)
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

func (e *ExitError) Unwrap() error { return e.Err }

// exitError describes an exit that is about no address.
func (v *vcpu) exitError(exit kvm.Exit, reason string) error {
	e := &ExitError{VCPU: v.id, Exit: exit.String(), Reason: reason}
	regs, err := v.cpu.Regs()
	if err != nil {
		e.Err, e.NoRIP = err, true
		return e
	}
	e.RIP = regs.Rip
	switch exit.(type) {
	case *kvm.InternalErrorExit:
		// The instruction may be one that KVM could not fetch: an instruction
		// fetch from a page without a slot ends like this.
		uses, _ := v.uses(&regs)
		if u, ok := v.firstUnbacked(uses); ok {
			return v.describe(e, u)
		}
	case *kvm.ShutdownExit:
		sregs, err := v.cpu.Sregs()
		if err != nil {
			e.Err = err
			return e
		}
		if isReset(&regs, &sregs) {
			e.RIP, e.NoRIP = 0, true
			e.Reason += ", and this host does not keep the registers of a guest that shuts down"
		}
	}
	return e
}

// isReset reports whether a vCPU is about to fetch its first instruction after
// RESET or INIT. No guest here begins there, or gets there: it would have to be in real
// mode and jump to the firmware that there is none of.
func isReset(regs *kvm.Regs, sregs *kvm.Sregs) bool {
	const protected = 1 << 0
	return regs.Rip == 0xfff0 && sregs.CS.Base == 0xffff0000 && sregs.CR0&protected == 0
}

// exitOnEmulationFailure has KVM report an instruction that it cannot emulate,
// where the host can. Otherwise a guest at CPL 3 is given an invalid opcode
// exception for it, and if it has no handler the exit is a shutdown, which tells
// less: on AMD not even rip. Fetches from pages without a slot end so.
//
// A host that offers this and then refuses costs nothing but a good error.
func exitOnEmulationFailure(m *kvm.VM) error {
	offered, err := m.CheckExtension(kvm.CapExitOnEmulationFailure)
	if err != nil || offered == 0 {
		return err
	}
	_ = m.EnableCap(kvm.CapExitOnEmulationFailure, 0, 1)
	return nil
}

// use is one use of guest memory.
type use struct {
	gpa    addr.GPA
	n      int // bytes
	access addr.Access
}

// describe adds to e what is known of the address.
func (v *vcpu) describe(e *ExitError, u use) *ExitError {
	m := v.m
	e.GPA, e.Access, e.Slot = u.gpa, u.access, "no slot"
	set := m.tracker.Slots()
	if s, ok := set.Lookup(u.gpa.GFN()); ok {
		e.Slot = s.String()
	}
	hva, ok := set.HVA(u.gpa)
	if !ok {
		e.Slot = "not RAM"
		return e
	}
	if xs := m.memory.Extents(addr.HVAs(hva&^addr.PageMask, addr.PageSize)); len(xs) > 0 {
		e.Extent = &xs[0]
	}
	if c, ok := m.memory.LastChange(hva); ok {
		e.Change = &c
	}
	return e
}

// touch completes an access of the guest that its slots do not allow.
func (v *vcpu) touch(ctx context.Context, e *kvm.MMIOExit) error {
	u := use{gpa: e.GPA, n: len(e.Data), access: addr.Read}
	if e.Write {
		u.access = addr.ReadWrite
	}
	complete := func() error {
		if !v.m.gate.begin() {
			return errStopped
		}
		defer v.m.gate.end()
		if e.Write {
			return v.m.WriteGuest(e.GPA, e.Data)
		}
		return v.m.ReadGuest(e.GPA, e.Data)
	}
	// A change in flight may have taken the slot away and not have put it back
	// yet. The table waits for its end, so the access comes after the change.
	err := v.wait(ctx, u, complete)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errStopped):
		v.pending = e
		return nil
	case v.m.config.Touch == Float:
		v.touched(u, trace.Floated)
		if !e.Write {
			fill(e.Data)
		}
		return nil
	}
	v.touched(u, trace.Stopped)
	failed := &ExitError{VCPU: v.id, Exit: e.String(), Reason: takenAway}
	if _, err := v.m.hva(e.GPA); err != nil {
		failed.Reason = "the guest used an address where there is no RAM"
	}
	if regs, err := v.cpu.Regs(); err == nil {
		failed.RIP = regs.Rip // after a write it is past the instruction
	}
	return v.describe(failed, u)
}

const takenAway = "the guest used RAM that the host has taken away"

func fill(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}

// wait tries an access until it succeeds, if the machine's policy is to wait
// and the address is RAM; otherwise it tries once. It tries again when the slots
// have changed, and when a bracket has ended: slots that are coarse, or could not be
// cut, stay as they are when memory comes back. When ctx is done it gives up with
// errStopped.
func (v *vcpu) wait(ctx context.Context, u use, try func() error) error {
	waited := false
	for {
		// Before the try: what changes after it is not missed.
		changed, ended := v.m.tracker.Slots().Changed(), v.m.tracker.Ended()
		err := try()
		if err == nil {
			if waited {
				v.record(trace.Touch, u, trace.Resumed)
			} else {
				v.record(trace.Complete, u, "")
			}
			return nil
		}
		var denied *shadow.AccessError
		if v.m.config.Touch != Wait || !errors.As(err, &denied) {
			return err
		}
		if _, err := v.m.hva(denied.GPA); err != nil {
			return err // it is not RAM, and will not be
		}
		if !waited {
			v.record(trace.Touch, u, trace.Waits)
			waited = true
		}
		v.tell(u) // again: the memory may have been here, and gone
		select {
		case <-changed:
		case <-ended:
		case <-ctx.Done():
			return errStopped
		}
	}
}

// errStopped is what wait returns, and may be given by a try, when the run was
// stopped meanwhile.
var errStopped = errors.New("the run was stopped")

// touched tells of a use of RAM that is not there, and what becomes of it.
func (v *vcpu) touched(u use, what string) {
	v.record(trace.Touch, u, what)
	v.tell(u)
}

// tell tells of a use of RAM that is not there.
func (v *vcpu) tell(u use) {
	if v.m.config.OnTouch != nil {
		v.m.config.OnTouch(v.id, u.gpa)
	}
}

// record records a use of RAM that its slots did not allow, and what becomes of it.
func (v *vcpu) record(kind trace.Kind, u use, what string) {
	gfn := u.gpa.GFN()
	v.m.config.Log.Record(trace.Event{Kind: kind, Name: what, VCPU: v.id, GFN: addr.GFNRange{Start: gfn, End: gfn + 1}, Acc: u.access})
}

// faults is a series of EFAULTs at one instruction. Tries of one series are
// closer to each other than faultPatience.
type faults struct {
	rip         uint64
	since, last time.Time
	pause       time.Duration // before the next try
}

// faultPatience is how long EFAULTs at one instruction are borne that nothing
// explains: a mapping that somebody else replaces can be missing for a moment,
// and that somebody can be off its processor in the middle.
const faultPatience = 200 * time.Millisecond

// handleFault finds out why KVM_RUN could not reach the host memory of a slot: a use
// of what is not mapped, where slots are coarse, or could not be cut; or a stray change.
// The guest is as it was before the instruction, which can be run again.
// Changes is the number of changes to mappings before the guest ran.
func (v *vcpu) handleFault(ctx context.Context, changes uint64) error {
	regs, err := v.cpu.Regs()
	if err != nil {
		return err
	}
	e := &ExitError{VCPU: v.id, RIP: regs.Rip, Err: unix.EFAULT, Exit: "KVM_RUN", Reason: takenAway}
	coarse := v.m.tracker.Coarse()
	ended := v.m.tracker.Ended()
	uses, decoded := v.uses(&regs)
	u, found := v.firstUnbacked(uses)
	switch {
	case found:
		if s, _ := v.m.tracker.Slots().Lookup(u.gpa.GFN()); s.Access&u.access != u.access {
			return nil // the slot has been cut since: the next try is an exit that names the address
		}
		// The slot is there and its memory is not.
		err := v.wait(ctx, u, func() error { return v.backed(u) })
		if err == nil || errors.Is(err, errStopped) {
			return nil
		}
		v.touched(u, trace.Stopped)
		if !coarse {
			e.Reason = "the guest used memory whose host mapping is missing"
		}
		return v.describe(e, u)
	case v.m.memory.Changes() != changes:
		return nil // a change of ours came in between, and is complete now
	case coarse && !decoded:
		if v.m.config.Touch == Wait {
			// Whatever it uses, it need not be tried before something has changed.
			select {
			case <-ended:
			case <-ctx.Done():
			}
			return nil
		}
		e.Reason += ", by an instruction that cannot be decoded: the address is not known"
		return e
	}
	f, now := &v.faults, time.Now()
	if f.rip != regs.Rip || now.Sub(f.last) > faultPatience {
		*f = faults{rip: regs.Rip, since: now, pause: 50 * time.Microsecond}
	}
	if f.last = now; now.Sub(f.since) < faultPatience {
		select {
		case <-time.After(f.pause):
		case <-ctx.Done():
		}
		f.pause = min(2*f.pause, 10*time.Millisecond)
		return nil
	}
	e.Reason = "the guest used memory whose host mapping is missing, though no operation of this machine removed it: something else in this process changed it"
	for _, u := range uses {
		if v.probeHost(u) != nil {
			return v.describe(e, u)
		}
	}
	return e
}

// backed reports whether the host's mappings, as far as they are known, allow a
// use; the error says why not.
func (v *vcpu) backed(u use) error {
	hva, err := v.m.hva(u.gpa)
	if err != nil {
		return err
	}
	for _, x := range v.m.memory.Extents(addr.HVAs(hva, uint64(u.n))) {
		if x.Access&u.access != u.access {
			return &shadow.AccessError{GPA: u.gpa, N: u.n, Access: u.access, Err: fmt.Errorf("%v: %w", x, unix.EFAULT)}
		}
	}
	return nil
}

// probeHost tries a use of memory that is said to be mapped, without changing it.
func (v *vcpu) probeHost(u use) error {
	return v.m.ReadGuest(u.gpa, make([]byte, u.n))
}

// firstUnbacked returns the first of uses that the host's mappings do not allow.
func (v *vcpu) firstUnbacked(uses []use) (use, bool) {
	for _, u := range uses {
		if v.backed(u) != nil {
			return u, true
		}
	}
	return use{}, false
}

// uses returns the uses of guest RAM by the instruction at rip, beginning with
// its fetch, and whether it could be decoded: if not, the fetch is all.
func (v *vcpu) uses(regs *kvm.Regs) (uses []use, decoded bool) {
	sregs, err := v.cpu.Sregs()
	if err != nil {
		return nil, false
	}
	mode, fetch := codeMode(&sregs, regs.Rip)
	code := make([]byte, 0, 15)
	for len(code) < cap(code) {
		at := fetch + addr.GVA(len(code))
		n := min(cap(code)-len(code), int(addr.PageSize-at&addr.PageMask))
		t, err := v.cpu.Translate(at)
		if err != nil || !t.Valid {
			break
		}
		uses = append(uses, use{t.GPA, n, addr.Read})
		chunk := make([]byte, n)
		if v.m.ReadGuest(t.GPA, chunk) != nil {
			break
		}
		code = append(code, chunk...)
	}
	inst, err := x86asm.Decode(code, mode)
	if err != nil || inst.Op == 0 {
		return uses, false
	}
	for _, op := range operands(&inst, regs, &sregs) {
		// An operand may cross a page border: each side counts for itself.
		for n := op.n; n > 0; {
			part := min(n, int(addr.PageSize-op.gva&addr.PageMask))
			if t, err := v.cpu.Translate(op.gva); err == nil && t.Valid {
				if op.access&addr.Read != 0 {
					uses = append(uses, use{t.GPA, part, addr.Read})
				}
				if op.access&addr.Write != 0 {
					uses = append(uses, use{t.GPA, part, addr.ReadWrite})
				}
			}
			op.gva, n = op.gva+addr.GVA(part), n-part
		}
	}
	return uses, true
}

// codeMode returns the number of bits of the code that a vCPU runs, and the address of the
// instruction at rip.
func codeMode(sregs *kvm.Sregs, rip uint64) (bits int, at addr.GVA) {
	switch {
	case sregs.EFER&eferLMA != 0 && sregs.CS.L != 0:
		return 64, addr.GVA(rip)
	case sregs.CS.DB != 0:
		bits = 32
	default:
		bits = 16
	}
	return bits, addr.GVA(uint32(sregs.CS.Base + rip))
}

// operand is memory that an instruction names.
type operand struct {
	gva    addr.GVA
	n      int
	access addr.Access // Read, Write, or ReadWrite: read, and then written
}

// operands returns the memory operands of an instruction, those of the stack
// included.
func operands(inst *x86asm.Inst, regs *kvm.Regs, sregs *kvm.Sregs) []operand {
	var ops []operand
	for i, arg := range inst.Args {
		if mem, ok := arg.(x86asm.Mem); ok && inst.Op != x86asm.LEA && inst.Op != x86asm.NOP {
			gva := uint64(mem.Disp)
			gva += register(mem.Base, inst, regs) + uint64(mem.Scale)*register(mem.Index, inst, regs)
			if inst.AddrSize == 16 {
				gva &= 0xffff
			}
			gva = linear(inst, gva+segmentBase(mem, inst, sregs))
			n := inst.MemBytes
			if n == 0 {
				n = stringBytes(inst.Op)
			}
			access := addr.Read // of sources
			if i == 0 {
				access = destination(inst.Op)
			}
			ops = append(ops, operand{addr.GVA(gva), n, access})
		}
	}
	word, mask := 8, ^uint64(0) // of the stack
	if inst.Mode != 64 {
		word = inst.DataSize / 8
		if mask = 0xffffffff; sregs.SS.DB == 0 {
			mask = 0xffff
		}
	}
	stack := func(at uint64, access addr.Access) {
		gva := at & mask
		if inst.Mode != 64 {
			gva += sregs.SS.Base
		}
		ops = append(ops, operand{addr.GVA(linear(inst, gva)), word, access})
	}
	switch inst.Op {
	case x86asm.PUSH, x86asm.CALL, x86asm.PUSHF, x86asm.PUSHFD, x86asm.PUSHFQ, x86asm.ENTER:
		stack(regs.Rsp-uint64(word), addr.Write)
	case x86asm.POP, x86asm.RET, x86asm.POPF, x86asm.POPFD, x86asm.POPFQ:
		stack(regs.Rsp, addr.Read)
	case x86asm.LEAVE:
		stack(regs.Rbp, addr.Read)
	case x86asm.PUSHA, x86asm.PUSHAD:
		word *= 8
		stack(regs.Rsp-uint64(word), addr.Write)
	case x86asm.POPA, x86asm.POPAD:
		word *= 8
		stack(regs.Rsp, addr.Read)
	}
	return ops
}

// segmentBase returns the base of the segment that an operand is in.
func segmentBase(mem x86asm.Mem, inst *x86asm.Inst, sregs *kvm.Sregs) uint64 {
	switch mem.Segment {
	case x86asm.FS:
		return sregs.FS.Base
	case x86asm.GS:
		return sregs.GS.Base
	}
	if inst.Mode == 64 {
		return 0 // the others have none
	}
	switch mem.Segment {
	case x86asm.CS:
		return sregs.CS.Base
	case x86asm.ES:
		return sregs.ES.Base
	case x86asm.SS:
		return sregs.SS.Base
	case x86asm.DS:
		return sregs.DS.Base
	}
	switch mem.Base {
	case x86asm.SP, x86asm.BP, x86asm.ESP, x86asm.EBP:
		return sregs.SS.Base
	}
	return sregs.DS.Base
}

// linear returns an address as the instruction's mode has it.
func linear(inst *x86asm.Inst, gva uint64) uint64 {
	if inst.Mode != 64 {
		return uint64(uint32(gva))
	}
	return gva
}

// destination returns how an instruction uses the first of its operands. That it
// writes must not be said of one that only reads: it would be made to wait until
// it may.
func destination(op x86asm.Op) addr.Access {
	switch op {
	case x86asm.BT, x86asm.CALL, x86asm.CLFLUSH, x86asm.CMP, x86asm.CMPSB, x86asm.CMPSW, x86asm.CMPSD, x86asm.CMPSQ,
		x86asm.DIV, x86asm.FRSTOR, x86asm.FXRSTOR, x86asm.FXRSTOR64, x86asm.IDIV, x86asm.IMUL, x86asm.JMP, x86asm.LCALL, x86asm.LDMXCSR,
		x86asm.LJMP, x86asm.MUL, x86asm.PUSH, x86asm.TEST, x86asm.XRSTOR, x86asm.XRSTOR64:
		return addr.Read
	case x86asm.POP:
		return addr.Write
	}
	is := func(prefixes ...string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(op.String(), p) })
	}
	switch {
	case is("MOV", "VMOV", "SET", "STOS", "INS", "FST", "FNST", "FIST", "FBSTP", "FNSAVE", "FXSAVE", "STMXCSR"):
		return addr.Write
	case is("F", "PREFETCH"): // arithmetic with a floating-point register
		return addr.Read
	}
	return addr.ReadWrite
}

// stringBytes returns the size of a string instruction's element, which the
// decoder leaves out, and 1 for other instructions.
func stringBytes(op x86asm.Op) int {
	switch op {
	case x86asm.MOVSQ, x86asm.STOSQ, x86asm.LODSQ, x86asm.CMPSQ, x86asm.SCASQ:
		return 8
	case x86asm.MOVSD, x86asm.STOSD, x86asm.LODSD, x86asm.CMPSD, x86asm.SCASD, x86asm.INSD, x86asm.OUTSD:
		return 4
	case x86asm.MOVSW, x86asm.STOSW, x86asm.LODSW, x86asm.CMPSW, x86asm.SCASW, x86asm.INSW, x86asm.OUTSW:
		return 2
	}
	return 1
}

// register returns the value of a register that addresses memory.
func register(r x86asm.Reg, inst *x86asm.Inst, regs *kvm.Regs) uint64 {
	byNumber := [16]uint64{
		regs.Rax, regs.Rcx, regs.Rdx, regs.Rbx, regs.Rsp, regs.Rbp, regs.Rsi, regs.Rdi,
		regs.R8, regs.R9, regs.R10, regs.R11, regs.R12, regs.R13, regs.R14, regs.R15,
	}
	switch {
	case x86asm.RAX <= r && r <= x86asm.R15:
		return byNumber[r-x86asm.RAX]
	case x86asm.EAX <= r && r <= x86asm.R15L:
		return byNumber[r-x86asm.EAX] & 0xffffffff
	case x86asm.AX <= r && r <= x86asm.R15W:
		return byNumber[r-x86asm.AX] & 0xffff
	case r == x86asm.RIP:
		return regs.Rip + uint64(inst.Len)
	}
	return 0
}

// le returns up to 4 bytes as a number.
func le(p []byte) uint32 {
	var b [4]byte
	copy(b[:], p)
	return binary.LittleEndian.Uint32(b[:])
}
