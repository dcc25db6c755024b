package mm

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// forkPlan is what the code of the child goes by; see fork_amd64.s. It is in pages of its
// own, which the child keeps.
type forkPlan struct {
	all    uint64 // every signal
	mask   uint64 // the signals that the thread had blocked
	pid    int64  // of the child, or what clone(2) returned; 0: there is none
	pidfd  int32
	socket int32      // the child's end of it
	name   [16]byte   // of the child, as ps shows it
	report forkReport // the child's, before it waits or exits
	ngaps  uint64     // of what follows it: that many pairs of an address and a length
}

// forkReport is what the child writes to its socket.
type forkReport struct {
	errno int64 // as system calls return it: 0, or negative
	call  int64 // which one failed; an index of forkCalls
}

const forkReportLen = int(unsafe.Sizeof(forkReport{}))

// The calls of the child that can fail.
const (
	forkDup2 = iota
	forkCloseRange
	forkMunmap
)

var forkCalls = [...]string{forkDup2: "dup2", forkCloseRange: "close_range", forkMunmap: "munmap"}

// forkReported returns the error that a child has reported.
func forkReported(report [forkReportLen]byte) error {
	errno, call := int64(binary.NativeEndian.Uint64(report[:])), binary.NativeEndian.Uint64(report[8:])
	if errno == 0 {
		return nil
	}
	return fmt.Errorf("the child's %s: %w", forkCalls[call], unix.Errno(-errno))
}

// cloneAlone makes a process that carries out the plan, by way of a helper: a process that
// exits before cloneAlone returns, and is to be waited for. It returns the helper's PID, or
// what clone(2) returned. Until it returns it holds the thread, with all signals blocked.
//
//go:noescape
func cloneAlone(plan unsafe.Pointer) (helper int)

// aloneCode returns where the code of the child begins, which is less than a page long.
func aloneCode() uintptr

// forkAlone makes a child that ends when the other end of the socket is closed, and its
// pidfd.
func forkAlone(own mappings, socket int) (pid, pidfd int, err error) {
	const header, gap = int(unsafe.Sizeof(forkPlan{})), 16
	mem, err := unix.Mmap(-1, 0, (header+gap*(len(own.keep)+3)+addr.PageMask)&^addr.PageMask, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, -1, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(mem)
	plan := (*forkPlan)(unsafe.Pointer(&mem[0]))
	*plan = forkPlan{all: ^uint64(0), pidfd: -1, socket: int32(socket)}
	copy(plan.name[:], "gvm fork")

	code := addr.HVA(aloneCode())
	own.keep = append(own.keep,
		addr.HVAs(addr.HVA(uintptr(unsafe.Pointer(plan))), uint64(len(mem))),
		addr.HVAs(code&^addr.PageMask, 2*addr.PageSize))
	for _, r := range own.gaps() {
		at := mem[header+gap*int(plan.ngaps):]
		binary.NativeEndian.PutUint64(at, uint64(r.Start))
		binary.NativeEndian.PutUint64(at[8:], r.Bytes())
		plan.ngaps++
	}

	helper := cloneAlone(unsafe.Pointer(plan))
	if helper < 0 {
		return 0, -1, fmt.Errorf("clone: %w", unix.Errno(-helper))
	}
	if err := reap(unix.P_PID, helper); err != nil {
		return int(plan.pid), int(plan.pidfd), err
	}
	switch {
	case plan.pid == 0:
		return 0, -1, fmt.Errorf("the helper of a fork was ended: %w", unix.ECHILD)
	case plan.pid < 0:
		return 0, -1, fmt.Errorf("clone: %w", unix.Errno(-plan.pid))
	}
	return int(plan.pid), int(plan.pidfd), nil
}
