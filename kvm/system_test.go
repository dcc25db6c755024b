package kvm

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func openSystem(t *testing.T) *System {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	s, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestOpenPathErrors(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "kvm")
	s, err := OpenPath(missing)
	if s != nil || !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), missing) {
		t.Errorf("OpenPath of nothing = %v, %v; want fs.ErrNotExist and the path", s, err)
	}
	const readOnly = "/sys/kernel/uevent_seqnum" // to root as well
	if s, err := OpenPath(readOnly); s != nil || !errors.Is(err, fs.ErrPermission) {
		t.Errorf("OpenPath of a read-only file = %v, %v; want fs.ErrPermission", s, err)
	}
}

func TestErrorTexts(t *testing.T) {
	for want, err := range map[string]error{
		"KVM_CREATE_VM: interrupted system call":                  &Error{Op: "KVM_CREATE_VM", Errno: unix.EINTR},
		"KVM_IRQ_LINE: irq 4, level 1: no such device or address": &Error{Op: "KVM_IRQ_LINE", Detail: "irq 4, level 1", Errno: unix.ENXIO},
		"/dev/kvm speaks version 11 of the KVM API, not 12":       &VersionError{Path: "/dev/kvm", Got: 11},
		"KVM does not support KVM_CAP_GUEST_MEMFD":                &UnsupportedError{CapGuestMemfd},
		"KVM does not support KVM_CAP(9999)":                      &UnsupportedError{9999},
		"KVM_GET_MSRS: MSR 0x12345 refused, 2 before it done":     &MSRError{Op: "KVM_GET_MSRS", Index: 0x12345, Done: 2},
		"KVM_RUN: file already closed":                            closedError("KVM_RUN"),
	} {
		if err.Error() != want {
			t.Errorf("text of a %T is %q, want %q", err, err, want)
		}
	}
	if err := error(&UnsupportedError{CapGuestMemfd}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v is not errors.ErrUnsupported", err)
	}
}

func TestCheckExtension(t *testing.T) {
	s := openSystem(t)
	if n, err := s.CheckExtension(CapNrMemslots); err != nil || n < 32 {
		t.Errorf("CheckExtension(%v) = %d, %v; want at least 32", CapNrMemslots, n, err)
	}
	if n, err := s.CheckExtension(9999); err != nil || n != 0 {
		t.Errorf("CheckExtension(9999) = %d, %v; want 0", n, err)
	}
	if err := s.Require(CapUserMemory, CapImmediateExit); err != nil {
		t.Errorf("Require = %v", err)
	}
	var e *UnsupportedError
	if err := s.Require(CapUserMemory, 9999, 9998); !errors.As(err, &e) || e.Cap != 9999 {
		t.Errorf("Require = %v, want an *UnsupportedError for 9999", err)
	}
}

func TestCPUIDBufferGrows(t *testing.T) {
	s := openSystem(t)
	want, err := s.SupportedCPUID()
	if err != nil {
		t.Fatal(err)
	}
	if len(want) < 4 {
		t.Fatalf("SupportedCPUID has %d entries", len(want))
	}
	got, err := getCPUID(&s.fd, reqGetSupportedCPUID, 1)
	if err != nil || len(got) != len(want) {
		t.Errorf("from room for 1 entry: %d entries, %v; want %d", len(got), err, len(want))
	}
}

func TestMSRLists(t *testing.T) {
	s := openSystem(t)
	list, err := s.MSRIndexList()
	if err != nil {
		t.Fatal(err)
	}
	const tsc = 0x10
	if !slices.Contains(list, tsc) {
		t.Errorf("the TSC is not among %d MSRs", len(list))
	}
	grown, err := getMSRList(&s.fd, reqGetMSRIndexList, 1)
	if err != nil || !slices.Equal(grown, list) {
		t.Errorf("from room for 1 index: %d indices, %v; want %d", len(grown), err, len(list))
	}
	if _, err := s.MSRFeatureIndexList(); err != nil {
		t.Error(err)
	}
}

// TestCreateVMUnderSignals makes VMs on a thread that gets signals faster than
// the Go runtime would send them. KVM_CREATE_VM alone then fails now and again.
func TestCreateVMUnderSignals(t *testing.T) {
	s := openSystem(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var (
		tid  = unix.Gettid()
		stop atomic.Bool
		wg   sync.WaitGroup
	)
	wg.Go(func() {
		for !stop.Load() {
			if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
				t.Error(err)
			}
			for range 20_000 { // some 10 us: a signal in each attempt would leave no way through
				runtime.KeepAlive(tid)
			}
		}
	})
	interrupted := 0
	for range 50 {
		raw, err := call(&s.fd, reqCreateVM, 0)
		switch {
		case err == nil:
			unix.Close(raw)
		case errors.Is(err, unix.EINTR):
			interrupted++
		default:
			t.Error(err)
		}
		vm, err := s.CreateVM()
		if err != nil {
			t.Errorf("CreateVM = %v", err)
			continue
		}
		vm.Close()
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d of 50 bare requests were interrupted", interrupted)
}

// TestDescriptorsCloseOnExec covers descriptors that KVM opens without the flag.
func TestDescriptorsCloseOnExec(t *testing.T) {
	m := newMachine(t)
	st, err := m.vcpu.Stats()
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	vst, err := m.Stats()
	if err != nil {
		t.Fatal(err)
	}
	defer vst.Close()
	raws := map[string]int{"VM": m.fd.raw, "vCPU": m.vcpu.fd.raw, "vCPU stats": st.fd.raw, "VM stats": vst.fd.raw}
	f, err := m.CreateGuestMemfd(4096, 0)
	switch {
	case err == nil:
		defer f.Close()
		raws["guest_memfd"] = int(f.Fd())
	case !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EINVAL): // not on this kernel
		t.Error(err)
	}
	for name, raw := range raws {
		flags, err := unix.FcntlInt(uintptr(raw), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s: descriptor flags 0x%x, %v; want FD_CLOEXEC", name, flags, err)
		}
	}
}

// TestCloseOrder closes owners before what they own.
func TestCloseOrder(t *testing.T) {
	m := newMachine(t, 0xf4) // hlt
	st, err := m.vcpu.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.VM.Close(); err != nil {
		t.Fatal(err)
	}
	if exit := run(t, m.vcpu); exit.Reason() != ReasonHLT {
		t.Errorf("a vCPU whose VM is closed: %v, want hlt", exit)
	}
	if err := m.vcpu.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := st.Read("exits"); err != nil || n == 0 {
		t.Errorf("exits of a closed vCPU = %d, %v; want some", n, err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.VM.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("second Close = %v, want os.ErrClosed", err)
	}
}
