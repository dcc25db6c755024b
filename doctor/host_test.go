package doctor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/uffd"
)

// fakeMachine is a machine whose files and permissions a test can change.
type fakeMachine struct {
	machine
	files fstest.MapFS
}

const (
	swapsHeader = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	allCaps     = "CapEff:\t000001ffffffffff\n"
	noCaps      = "CapEff:\t0000000000000000\n"

	limits = "Limit                     Soft Limit           Hard Limit           Units     \n" +
		"Max locked memory         %s              8388608              bytes     \n" +
		"Max file locks            unlimited            unlimited            locks     \n"
)

// completeMachine has everything. Nothing in it is of the machine below.
func completeMachine() *fakeMachine {
	m := &fakeMachine{files: fstest.MapFS{}}
	for name, text := range map[string]string{
		"proc/sys/kernel/osrelease": "6.12.0-test\n",
		"proc/cpuinfo": "processor\t: 0\nmodel name\t: Model 1 Processor\nflags\t\t: fpu vmx sse\n\n" +
			"processor\t: 1\nmodel name\t: Model 1 Processor\nflags\t\t: fpu vmx sse\n",
		"proc/meminfo":                                     "MemTotal:        2097152 kB\nMemFree:         1048576 kB\n",
		"proc/self/status":                                 "Name:\tgvm\n" + allCaps,
		"proc/self/uid_map":                                "         0          0 4294967295\n",
		"proc/self/limits":                                 fmt.Sprintf(limits, "8388608"),
		"proc/sys/kernel/perf_event_paranoid":              "2\n",
		"proc/sys/vm/overcommit_memory":                    "0\n",
		"proc/swaps":                                       swapsHeader + "/dev/zram0\tpartition\t262140\t0\t-2\n/swapfile\tfile\t4\t0\t-3\n",
		"sys/block/zram0/disksize":                         "268435456\n",
		"sys/block/zram1/disksize":                         "0\n",
		"sys/kernel/mm/ksm/run":                            "1\n",
		"sys/kernel/mm/transparent_hugepage/enabled":       "always [madvise] never\n",
		"sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force\n",
		"sys/kernel/mm/page_idle/bitmap":                   "",
		"sys/module/kvm/parameters/tdp_mmu":                "Y\n",
		"sys/module/kvm_intel/parameters/ept":              "Y\n",
	} {
		m.files[name] = &fstest.MapFile{Data: []byte(text)}
	}
	m.root = m.files
	m.tryUserfaultfd = func() (userfaultfd, error) {
		return userfaultfd{origin: uffd.Syscall, kernelFaults: true, offered: usedFeatures | uffd.Move}, nil
	}
	m.tryScan = func() (errScan, errTrack error) { return nil, nil }
	m.tryTracepoint = func() tracepoint { return tracepoint{id: 42} }
	m.watchEvents = func() error { return nil }
	m.watchTrace = func() error { return nil }
	m.timeDiscard = func() (time.Duration, error) { return 1250 * time.Nanosecond, nil }
	m.tryKVM = func() (capabilities, error) { return allCapabilities(), nil }
	m.guestTimes(nil)
	return m
}

func (m *fakeMachine) set(name, text string) { m.files[name].Data = []byte(text) }

// deny makes reading the file fail for lack of permission.
func (m *fakeMachine) deny(name string) { m.root = deniedFS{m.root, name} }

type deniedFS struct {
	fs.FS
	name string
}

func (f deniedFS) Open(name string) (fs.File, error) {
	if name == f.name {
		return nil, &fs.PathError{Op: "open", Path: name, Err: unix.EACCES}
	}
	return f.FS.Open(name)
}

func (m *fakeMachine) userfaultfd(u userfaultfd, err error) {
	m.tryUserfaultfd = func() (userfaultfd, error) { return u, err }
}

// TestHostChecks makes one change at a time to a machine that has everything.
// What each check then says is in the golden file.
func TestHostChecks(t *testing.T) {
	failed := func(what string, errno unix.Errno) error { return fmt.Errorf("%s: %w", what, errno) }
	scan := func(errScan, errTrack error) func(*fakeMachine) {
		return func(m *fakeMachine) {
			m.tryScan = func() (error, error) { return errScan, errTrack }
		}
	}
	trace := func(tp tracepoint) func(*fakeMachine) {
		return func(m *fakeMachine) {
			m.tryTracepoint = func() tracepoint { return tp }
		}
	}
	set := func(name, text string) func(*fakeMachine) {
		return func(m *fakeMachine) { m.set(name, text) }
	}
	remove := func(name string) func(*fakeMachine) {
		return func(m *fakeMachine) { delete(m.files, name) }
	}
	deny := func(name string) func(*fakeMachine) {
		return func(m *fakeMachine) { m.deny(name) }
	}
	const (
		paranoid   = "proc/sys/kernel/perf_event_paranoid"
		overcommit = "proc/sys/vm/overcommit_memory"
		ksm        = "sys/kernel/mm/ksm/run"
		thpAnon    = "sys/kernel/mm/transparent_hugepage/enabled"
		thpShmem   = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
		idle       = "sys/kernel/mm/page_idle/bitmap"
		status     = "proc/self/status"
	)
	var out bytes.Buffer
	for _, tt := range []struct {
		name   string
		check  func(*machine) Check
		change func(*fakeMachine)
		want   Status
	}{
		{"complete", checkUserfaultfd, func(*fakeMachine) {}, OK},
		{"from the device", checkUserfaultfd, func(m *fakeMachine) {
			m.userfaultfd(userfaultfd{uffd.Device, true, usedFeatures, 0}, nil)
		}, OK},
		{"user mode only", checkUserfaultfd, func(m *fakeMachine) {
			m.userfaultfd(userfaultfd{uffd.Syscall, false, usedFeatures, uffd.EventFork}, nil)
		}, Limited},
		{"old kernel", checkUserfaultfd, func(m *fakeMachine) {
			m.userfaultfd(userfaultfd{uffd.Syscall, true, usedFeatures &^ (uffd.WPAsync | uffd.WPUnpopulated), 0}, nil)
			m.watchEvents = func() error { return failed("UFFDIO_API", unix.EINVAL) }
		}, Limited},
		{"no watch", checkUserfaultfd, func(m *fakeMachine) {
			m.watchEvents = func() error { return failed("open /proc/self/pagemap", unix.ENOENT) }
		}, Limited},
		{"watch not permitted", checkUserfaultfd, func(m *fakeMachine) {
			m.watchEvents = func() error { return failed("open /proc/self/pagemap", unix.EACCES) }
		}, Limited},
		{"not permitted", checkUserfaultfd, func(m *fakeMachine) {
			m.userfaultfd(userfaultfd{}, failed("userfaultfd(2)", unix.EPERM))
		}, Missing},
		{"not built in", checkUserfaultfd, func(m *fakeMachine) {
			m.userfaultfd(userfaultfd{}, failed("userfaultfd(2)", unix.ENOSYS))
		}, Missing},

		{"complete", checkPagemapScan, func(*fakeMachine) {}, OK},
		{"no userfaultfd", checkPagemapScan, scan(nil, failed("userfaultfd(2)", unix.EPERM)), Limited},
		{"old kernel", checkPagemapScan, scan(failed("PAGEMAP_SCAN", unix.ENOTTY), nil), Missing},
		{"no pagemap", checkPagemapScan, scan(failed("open /proc/self/pagemap", unix.ENOENT), nil), Missing},

		{"complete", checkTracepoints, func(*fakeMachine) {}, OK},
		{"one thread", checkTracepoints, trace(tracepoint{id: 42, errAllCPUs: failed("perf_event_open", unix.EACCES)}), Limited},
		{"no watch", checkTracepoints, func(m *fakeMachine) {
			m.watchTrace = func() error { return failed("PERF_EVENT_IOC_SET_FILTER", unix.EINVAL) }
		}, Limited},
		{"watch not permitted", checkTracepoints, func(m *fakeMachine) {
			m.watchTrace = func() error { return failed("mmap of 65 pages", unix.EPERM) }
		}, Limited},
		{"no memory for a watch", checkTracepoints, func(m *fakeMachine) {
			m.watchTrace = func() error { return failed("mmap of 65 pages", unix.ENOMEM) }
		}, Limited},
		{"fewer tracepoints", checkTracepoints, trace(tracepoint{id: 42, lacking: []string{"kvm:kvm_age_hva", "kvm:kvm_test_age_hva"}}), Limited},
		{"perf not permitted", checkTracepoints, trace(tracepoint{id: 42,
			errAllCPUs: failed("perf_event_open on cpu 0", unix.EPERM), errThread: failed("perf_event_open", unix.EPERM)}), Missing},
		{"no KVM", checkTracepoints, trace(tracepoint{errLookup: failed("tracefs: open id", unix.ENOENT)}), Missing},
		{"tracefs unreadable", checkTracepoints, trace(tracepoint{errLookup: failed("tracefs: open id", unix.EACCES)}), Missing},
		{"tracefs not permitted", checkTracepoints, trace(tracepoint{errTracefs: failed("fsopen tracefs", unix.EPERM)}), Missing},
		{"no tracefs", checkTracepoints, trace(tracepoint{errTracefs: failed("fsopen tracefs", unix.ENODEV)}), Missing},

		{"exempt", checkPerfEventParanoid, func(*fakeMachine) {}, OK},
		{"open to all", checkPerfEventParanoid, set(paranoid, "-1\n"), OK},
		{"ordinary user", checkPerfEventParanoid, set(status, noCaps), Limited},
		{"user namespace", checkPerfEventParanoid, set("proc/self/uid_map", "0 1000 1\n"), Limited},
		{"no perf", checkPerfEventParanoid, remove(paranoid), Missing},
		{"garbage", checkPerfEventParanoid, set(paranoid, "x\n"), Missing},

		{"two", checkSwap, func(*fakeMachine) {}, OK},
		{"free zram", checkSwap, set("proc/swaps", swapsHeader), Missing},
		{"used zram", checkSwap, func(m *fakeMachine) {
			m.set("proc/swaps", swapsHeader)
			m.set("sys/block/zram1/disksize", "4096\n")
		}, Missing},
		{"not built in", checkSwap, remove("proc/swaps"), Missing},

		{"running", checkKSM, func(*fakeMachine) {}, OK},
		{"stopped", checkKSM, set(ksm, "0\n"), Limited},
		{"unmerged", checkKSM, set(ksm, "2\n"), Limited},
		{"not built in", checkKSM, remove(ksm), Missing},

		{"both", checkTHP, func(*fakeMachine) {}, OK},
		{"anonymous only", checkTHP, set(thpShmem, "always within_size advise [never] deny force\n"), Limited},
		{"denied", checkTHP, set(thpShmem, "always within_size advise never [deny] force\n"), Limited},
		{"shared only", checkTHP, set(thpAnon, "always madvise [never]\n"), Limited},
		{"none", checkTHP, func(m *fakeMachine) {
			m.set(thpAnon, "always madvise [never]\n")
			m.set(thpShmem, "always within_size advise [never] deny force\n")
		}, Limited},
		{"not built in", checkTHP, remove(thpAnon), Missing},
		{"not built in for shared memory", checkTHP, remove(thpShmem), Missing},

		{"complete", checkPageIdle, func(*fakeMachine) {}, OK},
		{"not permitted", checkPageIdle, deny(idle), Missing},
		{"not built in", checkPageIdle, remove(idle), Missing},

		{"heuristic", checkOvercommit, func(*fakeMachine) {}, OK},
		{"always", checkOvercommit, set(overcommit, "1\n"), OK},
		{"never", checkOvercommit, set(overcommit, "2\n"), Limited},
		{"not permitted", checkOvercommit, deny(overcommit), Missing},
		{"not there", checkOvercommit, remove(overcommit), Missing},

		{"exempt", checkMemlock, func(*fakeMachine) {}, OK},
		{"small", checkMemlock, set(status, noCaps), Limited},
		{"large", checkMemlock, func(m *fakeMachine) {
			m.set(status, noCaps)
			m.set("proc/self/limits", fmt.Sprintf(limits, "33554432"))
		}, OK},
		{"unlimited", checkMemlock, set("proc/self/limits", fmt.Sprintf(limits, "unlimited")), OK},
		{"not there", checkMemlock, remove("proc/self/limits"), Missing},
	} {
		m := completeMachine()
		tt.change(m)
		c := tt.check(&m.machine)
		if c.Status != tt.want || (c.Status == OK) != (c.Remedy == "") {
			t.Errorf("%s, %s: got %+v, want status %s, and a remedy if that is not ok", c.Name, tt.name, c, tt.want)
		}
		fmt.Fprintf(&out, "%s, %s: %s\n\t%s\n\t-> %s\n\t%v\n", c.Name, tt.name, c.Status, c.Detail, c.Remedy, c.Values)
	}
	golden(t, "checks", out.Bytes())
}

// TestMeasureFails expects no measure rather than a wrong one.
func TestMeasureFails(t *testing.T) {
	m := completeMachine()
	m.timeDiscard = func() (time.Duration, error) { return 0, errors.New("no memory") }
	r := &Report{}
	examineHost(t.Context(), &m.machine, r)
	if len(r.Measures) != 0 {
		t.Errorf("measures are %+v, want none", r.Measures)
	}
}

// TestEmptyMachine has no file at all, as where /proc and /sys are not mounted.
func TestEmptyMachine(t *testing.T) {
	m := completeMachine()
	m.root = os.DirFS(t.TempDir())
	r := &Report{}
	examineHost(t.Context(), &m.machine, r)
	if r.Kernel != "" || r.CPU != "" || r.CPUs != 0 || r.MemoryBytes != 0 {
		t.Errorf("report is %+v, want nothing known of the machine", r)
	}
	if got := len(r.Checks); got != len(hostChecks) {
		t.Errorf("%d checks, want %d", got, len(hostChecks))
	}
}
