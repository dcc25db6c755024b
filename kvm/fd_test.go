package kvm

import (
	"errors"
	"os"
	"reflect"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// wrappers lists every method of the package that makes a system call and
// reports an error, for one set of objects.
func wrappers(sys *System, vm *VM, c *VCPU, st *Stats) map[string]func() error {
	return map[string]func() error{
		"System.CheckExtension":      func() error { _, err := sys.CheckExtension(CapIrqchip); return err },
		"System.Require":             func() error { return sys.Require(CapIrqchip) },
		"System.SupportedCPUID":      func() error { _, err := sys.SupportedCPUID(); return err },
		"System.MSRIndexList":        func() error { _, err := sys.MSRIndexList(); return err },
		"System.MSRFeatureIndexList": func() error { _, err := sys.MSRFeatureIndexList(); return err },
		"System.CreateVM":            func() error { _, err := sys.CreateVM(); return err },

		"VM.CheckExtension":     func() error { _, err := vm.CheckExtension(CapIrqchip); return err },
		"VM.EnableCap":          func() error { return vm.EnableCap(CapDisableQuirks2, 0, 1) },
		"VM.SetMemoryRegion":    func() error { return vm.SetMemoryRegion(MemoryRegion{}) },
		"VM.SetMemoryRegion2":   func() error { return vm.SetMemoryRegion2(MemoryRegion2{}) },
		"VM.CreateGuestMemfd":   func() error { _, err := vm.CreateGuestMemfd(4096, 0); return err },
		"VM.SetTSSAddr":         func() error { return vm.SetTSSAddr(0) },
		"VM.SetIdentityMapAddr": func() error { return vm.SetIdentityMapAddr(0) },
		"VM.CreateIRQChip":      func() error { return vm.CreateIRQChip() },
		"VM.CreatePIT2":         func() error { return vm.CreatePIT2(0) },
		"VM.SetIRQRoutes":       func() error { return vm.SetIRQRoutes(nil) },
		"VM.SetIRQLine":         func() error { return vm.SetIRQLine(0, true) },
		"VM.CreateVCPU":         func() error { _, err := vm.CreateVCPU(0); return err },
		"VM.GetDirtyLog":        func() error { return vm.GetDirtyLog(0, make([]uint64, 1)) },
		"VM.ClearDirtyLog":      func() error { return vm.ClearDirtyLog(0, 0, 64, make([]uint64, 1)) },
		"VM.EnableDirtyRing":    func() error { return vm.EnableDirtyRing(256) },
		"VM.ResetDirtyRings":    func() error { _, err := vm.ResetDirtyRings(); return err },
		"VM.Stats":              func() error { _, err := vm.Stats(); return err },

		"VM.EnableManualDirtyLogProtect": func() error { return vm.EnableManualDirtyLogProtect(DirtyLogManualProtect) },

		"VCPU.Run":           func() error { _, err := c.Run(); return err },
		"VCPU.EnableCap":     func() error { return c.EnableCap(CapDisableQuirks2, 0) },
		"VCPU.Stats":         func() error { _, err := c.Stats(); return err },
		"VCPU.Regs":          func() error { _, err := c.Regs(); return err },
		"VCPU.SetRegs":       func() error { return c.SetRegs(Regs{}) },
		"VCPU.Sregs":         func() error { _, err := c.Sregs(); return err },
		"VCPU.SetSregs":      func() error { return c.SetSregs(Sregs{}) },
		"VCPU.FPU":           func() error { _, err := c.FPU(); return err },
		"VCPU.SetFPU":        func() error { return c.SetFPU(FPU{}) },
		"VCPU.MSRs":          func() error { _, err := c.MSRs(0x10); return err },
		"VCPU.SetMSRs":       func() error { return c.SetMSRs([]MSREntry{{Index: 0x10}}) },
		"VCPU.CPUID2":        func() error { _, err := c.CPUID2(); return err },
		"VCPU.SetCPUID2":     func() error { return c.SetCPUID2(nil) },
		"VCPU.SetSignalMask": func() error { return c.SetSignalMask(&unix.Sigset_t{}) },
		"VCPU.MPState":       func() error { _, err := c.MPState(); return err },
		"VCPU.SetMPState":    func() error { return c.SetMPState(0) },
		"VCPU.Interrupt":     func() error { return c.Interrupt(32) },
		"VCPU.LAPIC":         func() error { _, err := c.LAPIC(); return err },
		"VCPU.SetLAPIC":      func() error { return c.SetLAPIC(LAPIC{}) },
		"VCPU.VCPUEvents":    func() error { _, err := c.VCPUEvents(); return err },
		"VCPU.SetVCPUEvents": func() error { return c.SetVCPUEvents(VCPUEvents{}) },
		"VCPU.SetGuestDebug": func() error { return c.SetGuestDebug(GuestDebug{}) },
		"VCPU.Translate":     func() error { _, err := c.Translate(0); return err },
		"VCPU.DirtyRing":     func() error { _, err := c.DirtyRing(); return err },

		"Stats.Read":    func() error { _, err := st.Read("exits"); return err },
		"Stats.ReadAll": func() error { _, err := st.ReadAll(); return err },

		"System.Close": sys.Close,
		"VM.Close":     vm.Close,
		"VCPU.Close":   c.Close,
		"Stats.Close":  st.Close,
	}
}

// Methods that report no error.
var silent = []string{
	"VCPU.SetImmediateExit", "VCPU.RequestIRQWindow", "VCPU.ReadyForIRQ",
	"Stats.ID", "Stats.Descs",
}

// onDescriptor returns one object of each kind, all on the descriptor raw.
func onDescriptor(t *testing.T, raw int) (*System, *VM, *VCPU, *Stats) {
	t.Helper()
	const size = 3 * 4096
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	sys, vm, c := new(System), &VM{runSize: size}, newVCPU(raw, mem)
	c.ringSize = size
	st := &Stats{index: map[string]int{"exits": 0}, descs: []StatDesc{{Name: "exits", Len: 1}}, dataLen: 8}
	for _, f := range []*fd{&sys.fd, &vm.fd, &st.fd} {
		f.init(raw, nil)
	}
	return sys, vm, c, st
}

// TestWrappersListed keeps the list of wrappers complete.
func TestWrappersListed(t *testing.T) {
	listed := wrappers(new(System), new(VM), new(VCPU), new(Stats))
	for _, obj := range []any{new(System), new(VM), new(VCPU), new(Stats)} {
		typ := reflect.TypeOf(obj)
		for m := range typ.Methods() {
			name := typ.Elem().Name() + "." + m.Name
			if _, ok := listed[name]; !ok && !slices.Contains(silent, name) {
				t.Errorf("%s is in no list of this test", name)
			}
		}
	}
}

func TestBadDescriptor(t *testing.T) {
	const raw = 1 << 30 // no process has as many
	sys, vm, c, st := onDescriptor(t, raw)
	calls := wrappers(sys, vm, c, st)
	check := func(name string) {
		t.Helper()
		var e *Error
		if err := calls[name](); !errors.As(err, &e) || !errors.Is(err, unix.EBADF) || e.Op == "" {
			t.Errorf("%s = %v, want an *Error that is EBADF", name, err)
		}
	}
	closers := []string{"System.Close", "VM.Close", "VCPU.Close", "Stats.Close"}
	for name := range calls {
		if !slices.Contains(closers, name) {
			check(name)
		}
	}
	for _, name := range closers {
		check(name)
	}
}

func TestWrongDescriptor(t *testing.T) {
	for _, path := range []string{"/dev/null", "/dev/zero"} {
		s, err := OpenPath(path)
		var e *Error
		if s != nil || !errors.As(err, &e) || e.Detail != path || !errors.Is(err, unix.ENOTTY) {
			t.Errorf("OpenPath(%s) = %v, %v; want ENOTTY", path, s, err)
		}
	}
}

func TestClosed(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	dup := func() int {
		raw, err := unix.FcntlInt(null.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	sys, vm, c, st := onDescriptor(t, dup())
	vm.fd.raw, c.fd.raw, st.fd.raw = dup(), dup(), dup()
	for _, closeOne := range []func() error{sys.Close, vm.Close, c.Close, st.Close} {
		if err := closeOne(); err != nil {
			t.Fatal(err)
		}
	}
	for name, f := range wrappers(sys, vm, c, st) {
		if err := f(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close = %v, want os.ErrClosed", name, err)
		}
	}
	c.SetImmediateExit(true)
	c.RequestIRQWindow(true)
	if c.ReadyForIRQ() {
		t.Error("ReadyForIRQ after Close")
	}
}

func TestZeroValuesAreClosed(t *testing.T) {
	for name, f := range wrappers(new(System), new(VM), new(VCPU), &Stats{index: map[string]int{"exits": 0}, descs: []StatDesc{{Len: 1}}}) {
		if err := f(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s of a zero value = %v, want os.ErrClosed", name, err)
		}
	}
}

// TestFDCloseWaitsForUsers runs the two orders of the last release: the
// descriptor is open for as long as a call holds it, and closed after.
func TestFDCloseWaitsForUsers(t *testing.T) {
	raw, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	isOpen := func() bool {
		_, err := unix.FcntlInt(uintptr(raw), unix.F_GETFD, 0)
		return err == nil
	}
	var f fd
	f.init(raw, nil)
	for range 2 {
		if !f.acquire() {
			t.Fatal("acquire of an open fd failed")
		}
	}
	if err := f.close(); err != nil {
		t.Fatal(err)
	}
	if f.acquire() {
		t.Error("acquire of a closed fd succeeded")
	}
	f.release()
	if !isOpen() {
		t.Fatal("closed under a call")
	}
	f.release()
	if isOpen() {
		t.Error("still open after the last call")
	}
	if err := f.close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("second close = %v, want os.ErrClosed", err)
	}
}

// TestFDConcurrentClose has many goroutines use and close one descriptor at
// once: exactly one close succeeds, and no use sees another file in its place.
func TestFDConcurrentClose(t *testing.T) {
	for range 200 {
		raw, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		var (
			f      fd
			wg     sync.WaitGroup
			closed = make(chan struct{}, 8)
		)
		f.init(raw, nil)
		for range 4 {
			wg.Go(func() {
				for f.acquire() {
					if _, err := unix.FcntlInt(uintptr(f.raw), unix.F_GETFD, 0); err != nil {
						t.Errorf("held descriptor: %v", err)
					}
					f.release()
				}
			})
			wg.Go(func() {
				if f.close() == nil {
					closed <- struct{}{}
				}
			})
		}
		wg.Wait()
		if n := len(closed); n != 1 {
			t.Fatalf("%d of 4 closes succeeded, want 1", n)
		}
		if _, err := unix.FcntlInt(uintptr(raw), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
			t.Fatalf("descriptor after close: %v, want EBADF", err)
		}
	}
}
