package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/vm"
)

// allCapabilities are those of a KVM that has everything.
func allCapabilities() capabilities {
	caps := capabilities{kvm.CapNrVCPUs: 4, kvm.CapMaxVCPUs: 1024}
	for _, u := range usedCapabilities {
		caps[u.cap] = max(1, u.bits)
	}
	caps[kvm.CapNrMemslots] = 32764
	return caps
}

// guestTimes makes measures take nanoseconds as a machine of today does, unless
// changed says otherwise.
func (m *fakeMachine) guestTimes(changed map[string]guestTime) {
	times := map[string]guestTime{
		instructionCPL3: {ns: 0.25},
		instructionCPL0: {ns: 0.25},
		exitCPL3:        {ns: 1500},
		exitCPL0:        {ns: 1250},
		bootHello:       {ns: 1e6},
		kickVCPU:        {ns: 5500},
		slotCut:         {ns: 60e3},
		discardRunning:  {ns: 7e3},
	}
	m.timeGuest = func(_ context.Context, measure string) (float64, error) {
		t, ok := changed[measure]
		if !ok {
			t, ok = times[measure]
		}
		if !ok {
			t.err = fmt.Errorf("measure %q is not expected", measure)
		}
		return t.ns, t.err
	}
}

func (m *fakeMachine) noKVM(err error) {
	m.tryKVM = func() (capabilities, error) { return nil, err }
}

func (m *fakeMachine) examineKVM(t *testing.T) *Report {
	r := &Report{}
	examineKVM(t.Context(), &m.machine, r)
	return r
}

// TestKVMChecks makes one change at a time to a machine that has everything.
// What the check of that name then says is in the golden file.
func TestKVMChecks(t *testing.T) {
	const (
		cpuinfo = "proc/cpuinfo"
		ept     = "sys/module/kvm_intel/parameters/ept"
		npt     = "sys/module/kvm_amd/parameters/npt"
		pvm     = "sys/module/kvm_pvm/initstate"
		tdpMMU  = "sys/module/kvm/parameters/tdp_mmu"
	)
	noKVM := func(err error) func(*fakeMachine) {
		return func(m *fakeMachine) { m.noKVM(err) }
	}
	cannotOpen := func(errno unix.Errno) func(*fakeMachine) {
		return noKVM(&fs.PathError{Op: "open", Path: "/dev/kvm", Err: errno})
	}
	answer := func(n int, lacking ...kvm.Cap) func(*fakeMachine) {
		return func(m *fakeMachine) {
			caps := allCapabilities()
			for _, c := range lacking {
				caps[c] = n
			}
			m.tryKVM = func() (capabilities, error) { return caps, nil }
		}
	}
	times := func(changed map[string]guestTime) func(*fakeMachine) {
		return func(m *fakeMachine) { m.guestTimes(changed) }
	}
	// files changes files; an empty one goes away.
	files := func(nameText ...string) func(*fakeMachine) {
		return func(m *fakeMachine) {
			for nt := range slices.Chunk(nameText, 2) {
				delete(m.files, nt[0])
				if nt[1] != "" {
					m.files[nt[0]] = &fstest.MapFile{Data: []byte(nt[1])}
				}
			}
		}
	}
	all := func(changes ...func(*fakeMachine)) func(*fakeMachine) {
		return func(m *fakeMachine) {
			for _, change := range changes {
				change(m)
			}
		}
	}
	noGuest := times(map[string]guestTime{instructionCPL3: {err: errors.New("triple fault")}})
	const amd, plain = "processor: 0\nflags: svm\n", "processor: 0\nflags: fpu\n"

	var out bytes.Buffer
	for _, tt := range []struct {
		name   string
		check  string
		change func(*fakeMachine)
		want   Status
	}{
		{"complete", "kvm", func(*fakeMachine) {}, OK},
		{"no node, VMX", "kvm", cannotOpen(unix.ENOENT), Missing},
		{"no node, SVM", "kvm", all(cannotOpen(unix.ENOENT), files(cpuinfo, amd)), Missing},
		{"no node, neither", "kvm", all(cannotOpen(unix.ENOENT), files(cpuinfo, plain)), Missing},
		{"node without a driver", "kvm", cannotOpen(unix.ENODEV), Missing},
		{"not permitted", "kvm", cannotOpen(unix.EACCES), Missing},
		{"not permitted in a container", "kvm", cannotOpen(unix.EPERM), Missing},
		{"another version", "kvm", noKVM(&kvm.VersionError{Path: "/dev/kvm", Got: 11}), Missing},
		{"another hypervisor", "kvm", noKVM(&kvm.Error{Op: "KVM_CREATE_VM", Errno: unix.EBUSY}), Missing},
		{"another node", "kvm", noKVM(&kvm.Error{Op: "KVM_GET_API_VERSION", Errno: unix.ENOTTY}), Missing},
		{"a capability is missing", "kvm", times(map[string]guestTime{instructionCPL3: {err: &kvm.UnsupportedError{Cap: kvm.CapImmediateExit}}}), Missing},
		{"no guest runs", "kvm", noGuest, Missing},
		{"no memory", "kvm", noKVM(&kvm.Error{Op: "KVM_CREATE_VM", Errno: unix.ENOMEM}), Missing},

		{"complete", "kvm-capabilities", func(*fakeMachine) {}, OK},
		{"no KVM", "kvm-capabilities", cannotOpen(unix.ENOENT), Missing},
		{"some to use", "kvm-capabilities", answer(0, kvm.CapDirtyLogRing, kvm.CapUserMemory2), Limited},
		{"other bits", "kvm-capabilities", answer(quirkSlotZapAll-1, kvm.CapDisableQuirks2), Limited},
		{"one bit of two", "kvm-capabilities", answer(int(kvm.GuestMemfdMmap), kvm.CapGuestMemfdFlags), Limited},
		{"one needed", "kvm-capabilities", answer(0, kvm.CapImmediateExit), Missing},
		{"one of each", "kvm-capabilities", answer(0, kvm.CapReadonlyMem, kvm.CapBinaryStatsFD), Missing},

		{"EPT", "kvm-paging", func(*fakeMachine) {}, OK},
		{"NPT", "kvm-paging", files(cpuinfo, amd, ept, "", npt, "1\n"), OK},
		{"EPT, both built in", "kvm-paging", files(npt, "N\n"), OK},
		{"NPT, both built in", "kvm-paging", files(cpuinfo, amd, npt, "Y\n"), OK},
		{"EPT off", "kvm-paging", files(ept, "N\n", tdpMMU, "N\n"), Limited},
		{"NPT off", "kvm-paging", files(cpuinfo, amd, ept, "", npt, "0\n", tdpMMU, ""), Limited},
		{"PVM", "kvm-paging", files(cpuinfo, plain, ept, "", pvm, "live\n", tdpMMU, "N\n"), Limited},
		{"PVM, the others built in", "kvm-paging", files(cpuinfo, plain, npt, "Y\n", pvm, "live\n"), Limited},
		{"PVM or VMX", "kvm-paging", files(pvm, "live\n"), Limited},
		{"no parameter", "kvm-paging", files(ept, "", "sys/module/kvm_intel/initstate", "live\n"), Limited},
		{"no sysfs", "kvm-paging", files(ept, "", tdpMMU, ""), Limited},
		{"no KVM", "kvm-paging", cannotOpen(unix.ENOENT), Missing},

		{"native", "kvm-ring0", func(*fakeMachine) {}, OK},
		{"slow but native", "kvm-ring0", times(map[string]guestTime{instructionCPL0: {ns: 1}}), OK},
		{"emulated", "kvm-ring0", times(map[string]guestTime{instructionCPL0: {ns: 250}}), Limited},
		{"fails", "kvm-ring0", times(map[string]guestTime{instructionCPL0: {err: errors.New("triple fault")}}), Missing},
		{"no guest runs", "kvm-ring0", noGuest, Missing},
		{"no KVM", "kvm-ring0", cannotOpen(unix.ENOENT), Missing},
	} {
		m := completeMachine()
		tt.change(m)
		r := m.examineKVM(t)
		i := slices.IndexFunc(r.Checks, func(c Check) bool { return c.Name == tt.check })
		if i < 0 {
			t.Errorf("%s, %s: there is no such check in %+v", tt.check, tt.name, r.Checks)
			continue
		}
		c := r.Checks[i]
		if c.Status != tt.want || (c.Status == OK) != (c.Remedy == "") {
			t.Errorf("%s, %s: got %+v, want status %s, and a remedy if that is not ok", c.Name, tt.name, c, tt.want)
		}
		fmt.Fprintf(&out, "%s, %s: %s\n\t%s\n\t-> %s\n\t%v\n", c.Name, tt.name, c.Status, c.Detail, c.Remedy, c.Values)
	}
	golden(t, "kvm-checks", out.Bytes())
}

// TestWithoutKVM expects the checks that there always are, and nothing else.
func TestWithoutKVM(t *testing.T) {
	complete := completeMachine().examineKVM(t)
	m := completeMachine()
	m.noKVM(unix.ENOENT)
	m.timeGuest = func(context.Context, string) (float64, error) {
		t.Error("a guest was run without KVM")
		return 0, nil
	}
	r := m.examineKVM(t)
	if len(r.Measures) != 0 {
		t.Errorf("measures are %+v, want none", r.Measures)
	}
	same := func(a, b Check) bool { return a.Name == b.Name && a.Required == b.Required }
	if !slices.EqualFunc(r.Checks, complete.Checks, same) {
		t.Errorf("checks without KVM are %+v, with it they are %+v", r.Checks, complete.Checks)
	}
}

// TestGuestMeasureFails expects no measure rather than a wrong one.
func TestGuestMeasureFails(t *testing.T) {
	m := completeMachine()
	m.guestTimes(map[string]guestTime{kickVCPU: {ns: 1, err: errors.New("no memory")}})
	var names []string
	for _, measure := range m.examineKVM(t).Measures {
		names = append(names, measure.Name)
	}
	want := []string{instructionCPL3, instructionCPL0, exitCPL3, exitCPL0, bootHello, slotCut, discardRunning}
	if !slices.Equal(names, want) {
		t.Errorf("measures are %v, want %v", names, want)
	}
}

// TestTryKVM compares what KVM is found to have with what a machine needs.
func TestTryKVM(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	caps, err := tryKVM()
	if err != nil {
		t.Fatal(err)
	}
	if most := caps[kvm.CapMaxVCPUs]; most < 1 || caps[kvm.CapNrVCPUs] < 1 {
		t.Errorf("capabilities are %v, want a number of vCPUs", caps)
	}
	m, err := vm.New(vm.Config{RAM: machineRAM})
	if err == nil {
		m.Close()
	}
	if c := checkCapabilities(caps); (c.Status == Missing) != (err != nil) {
		t.Errorf("check is %+v, but making a machine: %v", c, err)
	}
}

// TestTimeGuest takes each measure, and compares those of which it is known how
// they compare.
func TestTimeGuest(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	times := make(map[string]float64)
	for _, m := range kvmMeasures {
		ns, err := timeGuest(t.Context(), m.Name)
		if err != nil || ns <= 0 {
			t.Errorf("%s: got %v, %v; want a time", m.Name, ns, err)
		}
		times[m.Name] = ns
	}
	for _, order := range [][2]string{
		{instructionCPL3, exitCPL3},
		{instructionCPL0, exitCPL0},
		{exitCPL3, bootHello},
	} {
		if less, more := times[order[0]], times[order[1]]; less >= more {
			t.Errorf("%s takes %v ns, want less than %s, %v ns", order[0], less, order[1], more)
		}
	}
}

func TestTimeGuestFails(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	pause := func(*vm.Machine) (time.Duration, error) { return 1, nil }
	for name, f := range map[string]func(context.Context) (float64, error){
		"no such measure": func(ctx context.Context) (float64, error) { return timeGuest(ctx, "warp") },
		"no such guest":   func(ctx context.Context) (float64, error) { return timeStep(ctx, "warp", "steps", false) },
		"no such parameter": func(ctx context.Context) (float64, error) {
			return timeStep(ctx, "loop", "steps", false)
		},
		"the guest ends": func(ctx context.Context) (float64, error) {
			return timeRunning(ctx, "hello", nil, 1, pause)
		},
		"the guest does not end": func(ctx context.Context) (float64, error) {
			d, err := timeRun(ctx, "spin", nil, false)
			return float64(d), err
		},
		"the guest makes no progress": func(ctx context.Context) (float64, error) {
			return timeRunning(ctx, "probe", nil, 1, pause)
		},
		"the operation fails": func(ctx context.Context) (float64, error) {
			return timeRunning(ctx, "stamp", guests.Args{"pages": 1}, 1, func(*vm.Machine) (time.Duration, error) {
				return 1, unix.ENOMEM
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if ns, err := f(ctx); err == nil {
				t.Errorf("got %v, want an error", ns)
			} else {
				t.Log(err)
			}
		})
	}
}

// TestExamineCancelledInGuest cancels while guests are being measured.
func TestExamineCancelledInGuest(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	ctx, cancel := context.WithCancel(t.Context())
	m := thisMachine()
	m.timeGuest = func(ctx context.Context, _ string) (float64, error) {
		time.AfterFunc(time.Millisecond, cancel)
		d, err := timeRun(ctx, "spin", nil, false)
		return float64(d), err
	}
	if r, err := m.examine(ctx); r != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("examine = %v, %v; want nil, %v", r, err, context.Canceled)
	}
}

func TestNeededCapabilities(t *testing.T) {
	var needed []kvm.Cap
	for _, u := range usedCapabilities {
		if u.needed {
			needed = append(needed, u.cap)
		}
	}
	want := vm.Capabilities()
	slices.Sort(needed)
	slices.Sort(want)
	if !slices.Equal(needed, want) {
		t.Errorf("the report has %v as needed, a machine needs %v", needed, want)
	}
}
