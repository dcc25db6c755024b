package litmus

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
)

// Host is what a machine is known to have, by what its kernel shows in files.
type Host struct {
	root fs.FS // "/"; another one in tests
	uid  int
}

// ThisHost returns the host that the process runs on.
func ThisHost() *Host { return &Host{root: os.DirFS("/"), uid: os.Geteuid()} }

func (h *Host) read(name string) string {
	text, err := fs.ReadFile(h.root, name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// ShadowPaging reports whether KVM shadows guest page tables, going by the modules that are
// loaded, the CPU's features and the modules' parameters. It is false if that cannot be told.
func (h *Host) ShadowPaging() bool {
	features := strings.Fields(h.read("proc/cpuinfo"))
	usable, shadow := 0, false
	for _, v := range []struct{ module, feature, param string }{
		{"kvm_intel", "vmx", "ept"}, {"kvm_amd", "svm", "npt"}, {"kvm_pvm", "", ""},
	} {
		if _, err := fs.Stat(h.root, path.Join("sys/module", v.module)); err != nil || v.feature != "" && !slices.Contains(features, v.feature) {
			continue
		}
		usable++
		switch h.read(path.Join("sys/module", v.module, "parameters", v.param)) {
		case "N", "0":
			shadow = true
		default:
			shadow = v.param == ""
		}
	}
	return usable == 1 && shadow
}

// Lacks returns a *NotRunError for the first thing that a test needs and the host has not.
func (h *Host) Lacks(t *Test) error {
	for _, n := range t.Needs {
		if why := h.why(n); why != "" {
			return &NotRunError{Need: n, Why: why}
		}
	}
	return nil
}

// why says why the host has not what a test needs; "" if it has.
func (h *Host) why(n Need) string {
	switch n {
	case NeedSwap:
		if strings.Count(h.read("proc/swaps"), "\n") == 0 {
			return "no swap space is in use; swapon a file, or a zram device"
		}
	case NeedKSM:
		switch h.read("sys/kernel/mm/ksm/run") {
		case "1":
		case "":
			return "the kernel has no KSM (CONFIG_KSM)"
		default:
			return "ksmd does not run; echo 1 > /sys/kernel/mm/ksm/run"
		}
	case NeedNUMA:
		if online := h.read("sys/devices/system/node/online"); !strings.ContainsAny(online, "-,") {
			return "the machine has one NUMA node, and pages cannot be moved to another"
		}
	case NeedIdle:
		l, err := mm.NewIdleLog()
		if err != nil {
			return fmt.Sprintf("idle page tracking: %v", err)
		}
		_ = l.Close() // nothing was done with it
	case NeedRoot:
		if h.uid != 0 {
			return "run as root"
		}
	case NeedHugePages:
		if h.read("sys/kernel/mm/transparent_hugepage/enabled") == "" {
			return "the kernel has no transparent huge pages"
		}
	}
	return ""
}

// CheckKVM returns the error of a machine without a KVM that can be used, or nil.
func CheckKVM() error {
	sys, err := kvm.Open()
	if err != nil {
		return err
	}
	return sys.Close()
}

// notRun returns err as the reason for which a test has not run, if it is one.
func notRun(err error) (*NotRunError, bool) {
	if e, ok := errors.AsType[*NotRunError](err); ok {
		return e, true
	}
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrPermission) {
		return &NotRunError{Why: err.Error(), Err: err}, true
	}
	return nil, false
}
