package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/kvm"
)

// kvmMeasures are the costs of running a guest, in the order of the report.
// The machine finds their values.
var kvmMeasures = []Measure{
	{Name: instructionCPL3, Unit: "ns", Detail: "one instruction of a guest's loop at CPL 3, median of 3 runs"},
	{Name: instructionCPL0, Unit: "ns", Detail: "one instruction of a guest's loop at CPL 0, median of 3 runs"},
	{Name: exitCPL3, Unit: "us", Detail: "KVM_RUN from one OUT of a guest at CPL 3 to the next, median of 3 runs"},
	{Name: exitCPL0, Unit: "us", Detail: "KVM_RUN from one OUT of a guest at CPL 0 to the next, median of 3 runs"},
	{Name: bootHello, Unit: "us", Detail: "make a machine of 1 vCPU and 16 MiB, and run guest hello to its end, median of 7"},
	{Name: kickVCPU, Unit: "us", Detail: "pause a running vCPU: from the request until it is out of the guest, median of 51"},
	{Name: slotCut, Unit: "us", Detail: "unmap a page and map it again, memory slots included, beside a running guest, median of 25"},
	{Name: discardRunning, Unit: "us", Detail: "MADV_DONTNEED of one page that a running guest writes to, notifications included, median of 51"},
}

// Names of measures.
const (
	instructionCPL3 = "instruction-cpl3"
	instructionCPL0 = "instruction-cpl0"
	exitCPL3        = "exit-cpl3"
	exitCPL0        = "exit-cpl0"
	bootHello       = "boot"
	kickVCPU        = "kick"
	slotCut         = "slot-cut"
	discardRunning  = "discard-running"
)

// patience is how long guests are measured at most. A quarter of a second is
// enough, unless they make no progress or the host has no time for them.
const patience = 5 * time.Second

// examineKVM examines what runs the guests. A measure that fails is left out.
func examineKVM(ctx context.Context, m *machine, r *Report) {
	caps, err := m.tryKVM()
	times := make(map[string]guestTime)
	if err == nil {
		times = timeGuests(ctx, m)
		err = times[instructionCPL3].err
	}
	r.Checks = append(r.Checks, checkKVM(m, caps, err), checkCapabilities(caps), checkPaging(m, caps), checkRing0(times))
	for _, measure := range kvmMeasures {
		if t, ok := times[measure.Name]; ok && t.err == nil {
			measure.Value = t.in(measure.Unit)
			r.Measures = append(r.Measures, measure)
		}
	}
}

// guestTime is the result of one measure.
type guestTime struct {
	ns  float64
	err error
}

func (t guestTime) in(unit string) float64 {
	if unit == "us" {
		return t.ns / 1e3
	}
	return t.ns
}

// timeGuests takes the measures. Without the first, of a guest that does next to
// nothing, there are no others.
func timeGuests(ctx context.Context, m *machine) map[string]guestTime {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("it took too long"))
	defer cancel()
	times := make(map[string]guestTime)
	for i, measure := range kvmMeasures {
		ns, err := m.timeGuest(ctx, measure.Name)
		times[measure.Name] = guestTime{ns, err}
		if i == 0 && err != nil {
			break
		}
	}
	return times
}

// needsKVM returns c for a machine without KVM.
func (c Check) needsKVM() Check {
	c.Remedy = "see kvm"
	return c.found(Missing, "needs kvm")
}

// cpuHas reports whether the CPU has a feature, by its name in /proc/cpuinfo.
func (m *machine) cpuHas(feature string) bool {
	return slices.Contains(strings.Fields(m.field("/proc/cpuinfo", "flags")), feature)
}

// checkKVM says whether guests run. Without caps, err is why no VM can be made,
// and with them why no guest runs in it.
func checkKVM(m *machine, caps capabilities, err error) Check {
	c := Check{Name: "kvm", Required: true}
	if err != nil {
		if version, ok := errors.AsType[*kvm.VersionError](err); ok {
			c.Values = map[string]any{"api_version": version.Got}
		}
		c.Remedy = kvmRemedy(m, err)
		if caps != nil {
			return c.found(Missing, "a VM can be made, but no guest runs: %v", err)
		}
		return c.found(Missing, "%v", err)
	}
	recommended, most, slots := caps[kvm.CapNrVCPUs], caps[kvm.CapMaxVCPUs], caps[kvm.CapNrMemslots]
	c.Values = map[string]any{
		"api_version":       kvm.APIVersion,
		"vcpus_recommended": recommended,
		"vcpus_max":         most,
		"slots":             slots,
	}
	return c.found(OK, "a VM has up to %d vCPUs, of which %d are recommended, and %d memory slots", most, recommended, slots)
}

// kvmRemedy returns what to do when no guest runs for the reason err.
func kvmRemedy(m *machine, err error) string {
	const container = "; in a container, pass it /dev/kvm"
	version, _ := errors.AsType[*kvm.VersionError](err)
	lacks, _ := errors.AsType[*kvm.UnsupportedError](err)
	switch {
	case version != nil:
		return fmt.Sprintf("use a kernel whose KVM API has version %d: Linux 2.6.22 or later", kvm.APIVersion)
	case lacks != nil:
		return "see kvm-capabilities"
	case errors.Is(err, unix.ENOTTY):
		return "make /dev/kvm the node of KVM again: mknod /dev/kvm c 10 232"
	case errors.Is(err, fs.ErrPermission): // EACCES, or EPERM from a container's device rules
		return "usermod -aG kvm $USER and log in again, or setfacl -m u:$USER:rw /dev/kvm, or run as root" + container
	case errors.Is(err, unix.EBUSY):
		return "end what else uses the CPU's virtualization, such as another hypervisor"
	case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENXIO):
		return "see what dmesg has of KVM"
	case m.cpuHas("vmx"):
		return "modprobe kvm_intel; if that fails, enable VT-x in the firmware" + container
	case m.cpuHas("svm"):
		return "modprobe kvm_amd; if that fails, enable AMD-V in the firmware" + container
	}
	return "enable VT-x or AMD-V in the firmware or, for a virtual machine, nested virtualization in its host, and modprobe kvm_intel || modprobe kvm_amd" + container
}

// capabilities are the answers of KVM, by capability.
type capabilities map[kvm.Cap]int

// quirkSlotZapAll in the answer to kvm.CapDisableQuirks2 says that KVM can be
// kept from dropping the mappings of all slots when one is deleted.
const quirkSlotZapAll = 1 << 7

// usedCapabilities are the capabilities that gvm needs, which are those of
// vm.Capabilities, or can use.
var usedCapabilities = []struct {
	cap    kvm.Cap
	needed bool   // gvm relies on it
	bits   int    // those that have to be in the answer; 0: it has to be positive
	also   string // what the bits are, after the name
	linux  [2]int // the first version with it
}{
	{cap: kvm.CapUserMemory, needed: true, linux: [2]int{2, 6}},
	{cap: kvm.CapSyncMMU, needed: true, linux: [2]int{2, 6}},
	{cap: kvm.CapReadonlyMem, needed: true, linux: [2]int{3, 7}},
	{cap: kvm.CapImmediateExit, needed: true, linux: [2]int{4, 11}},
	{cap: kvm.CapExtCPUID, needed: true, linux: [2]int{2, 6}},
	{cap: kvm.CapNrMemslots, needed: true, linux: [2]int{2, 6}},

	{cap: kvm.CapManualDirtyLogProtect2, linux: [2]int{5, 2}},
	{cap: kvm.CapDirtyLogRing, linux: [2]int{5, 11}},
	{cap: kvm.CapBinaryStatsFD, linux: [2]int{5, 14}},
	{cap: kvm.CapUserMemory2, linux: [2]int{6, 8}},
	{cap: kvm.CapMemoryFaultInfo, linux: [2]int{6, 8}},
	{cap: kvm.CapDisableQuirks2, bits: quirkSlotZapAll, also: " (slot zap all)", linux: [2]int{6, 12}},
	{cap: kvm.CapGuestMemfd, linux: [2]int{6, 18}}, // from 6.8 for VMs of other types
	{cap: kvm.CapGuestMemfdFlags, bits: int(kvm.GuestMemfdMmap | kvm.GuestMemfdInitShared), also: " (mmap, init shared)", linux: [2]int{6, 18}},
}

func checkCapabilities(caps capabilities) Check {
	c := Check{Name: "kvm-capabilities", Required: true}
	if caps == nil {
		return c.needsKVM()
	}
	c.Values = make(map[string]any)
	var (
		needed, other []string // capabilities that are not there
		linux         [2]int   // the first version that has them all
	)
	for _, u := range usedCapabilities {
		n := caps[u.cap]
		c.Values[valueKey(u.cap)] = n
		if n > 0 && n&u.bits == u.bits {
			continue
		}
		if name := u.cap.String() + u.also; u.needed {
			needed = append(needed, name)
		} else {
			other = append(other, name)
		}
		if slices.Compare(u.linux[:], linux[:]) > 0 {
			linux = u.linux
		}
	}
	if needed == nil && other == nil {
		return c.found(OK, "all %d that gvm needs or can use", len(usedCapabilities))
	}
	c.Remedy = fmt.Sprintf("use Linux %d.%d or later", linux[0], linux[1])
	status := Limited
	var details []string
	if needed != nil {
		status = Missing
		details = append(details, "gvm needs "+strings.Join(needed, ", "))
	}
	if other != nil {
		details = append(details, "gvm could use "+strings.Join(other, ", "))
	}
	return c.found(status, "not all: %s", strings.Join(details, "; "))
}

// valueKey returns the key that the answer to c has in the values of a check.
func valueKey(c kvm.Cap) string {
	return strings.ToLower(strings.TrimPrefix(c.String(), "KVM_CAP_"))
}

// vendor is a module that KVM can be based on.
type vendor struct {
	module  string
	feature string // of the CPU, without which it does not start; "": it starts on all
	param   string // its parameter that says whether the CPU translates guest addresses; "": it never does
}

var vendors = []vendor{
	{module: "kvm_intel", feature: "vmx", param: "ept"},
	{module: "kvm_amd", feature: "svm", param: "npt"},
	{module: "kvm_pvm"},
}

// kvmModules returns the names of KVM's modules, and the vendors among them that
// can be in use. One is at a time, but a kernel may have several built in.
func (m *machine) kvmModules() (modules []string, usable []vendor) {
	dirs, _ := fs.Glob(m.root, sysModule[1:]+"kvm_*")
	modules = []string{}
	for _, dir := range dirs {
		modules = append(modules, path.Base(dir))
	}
	for _, v := range vendors {
		if slices.Contains(modules, v.module) && (v.feature == "" || m.cpuHas(v.feature)) {
			usable = append(usable, v)
		}
	}
	return modules, usable
}

const sysModule = "/sys/module/"

// checkPaging says who translates guest physical addresses: the CPU, which
// walks the guest's tables and KVM's (two-dimensional paging), or KVM, which
// makes one table of both (shadow paging).
func checkPaging(m *machine, caps capabilities) Check {
	const (
		unknown        = "unknown"
		twoDimensional = "two-dimensional"
		shadow         = "shadow"
	)
	c := Check{Name: "kvm-paging"}
	if caps == nil {
		return c.needsKVM()
	}
	modules, usable := m.kvmModules()
	c.Values = map[string]any{"paging": unknown, "modules": modules}
	tdpMMU := "" // no evidence: some kernels say Y wherever they could
	if value, err := m.read(sysModule + "kvm/parameters/tdp_mmu"); err == nil {
		c.Values["tdp_mmu"] = isTrue(value)
		tdpMMU = " (kvm has tdp_mmu=" + value + ")"
	}
	switch {
	case len(usable) == 0:
		c.Remedy = "mount -t sysfs sysfs /sys, if it is not there"
		return c.found(Limited, "unknown: %s has no module that is known for it", sysModule)
	case len(usable) > 1:
		c.Remedy = "unload the module that is not in use"
		return c.found(Limited, "unknown: %s and %s are there, and either can be in use", usable[0].module, usable[1].module)
	}

	v := usable[0]
	evidence := v.module + ", which has no other"
	c.Remedy = "use a host whose CPU has VMX with EPT, or SVM with NPT"
	if v.param != "" {
		value, err := m.read(sysModule + v.module + "/parameters/" + v.param)
		if err != nil {
			c.Remedy = "mount -t sysfs sysfs /sys, if it is not there"
			return c.found(Limited, "unknown: %v", err)
		}
		c.Values[v.param] = isTrue(value)
		evidence = v.module + " with " + v.param + "=" + value
		if isTrue(value) {
			c.Values["paging"], c.Remedy = twoDimensional, ""
			return c.found(OK, "%s, going by %s%s", twoDimensional, evidence, tdpMMU)
		}
		c.Remedy = fmt.Sprintf("modprobe -r %[1]s && modprobe %[1]s %[2]s=1; it stays off if the CPU lacks it", v.module, v.param)
	}
	c.Values["paging"] = shadow
	return c.found(Limited, "%s, going by %s%s: guest page tables are not coherent with host changes", shadow, evidence, tdpMMU)
}

// isTrue reads a parameter of a module, which older kernels have as a number.
func isTrue(param string) bool { return param == "Y" || param == "1" }

// emulatedRatio is how much slower CPL 0 is at least if it is emulated. What
// runs on the CPU is as fast as at CPL 3, emulation takes hundreds of times as
// long.
const emulatedRatio = 10

// checkRing0 says how a guest's kernel code is executed, from the time that an
// instruction takes at CPL 3 and at CPL 0.
func checkRing0(times map[string]guestTime) Check {
	c := Check{Name: "kvm-ring0"}
	cpl3, ok := times[instructionCPL3]
	if !ok || cpl3.err != nil {
		return c.needsKVM()
	}
	const remedy = "use a host with VMX or SVM for guests that have a kernel; the built-in guests run at CPL 3"
	c.Values = map[string]any{"instruction_cpl3_ns": cpl3.ns}
	cpl0 := times[instructionCPL0]
	if cpl0.err != nil {
		c.Remedy = remedy
		return c.found(Missing, "guests run at CPL 3 only: %v", cpl0.err)
	}
	ratio := cpl0.ns / cpl3.ns
	c.Values["instruction_cpl0_ns"], c.Values["ratio"] = cpl0.ns, ratio
	status, execution := OK, "native"
	if ratio >= emulatedRatio {
		status, execution, c.Remedy = Limited, "emulated", remedy
	}
	c.Values["execution"] = execution
	return c.found(status, "%s: an instruction takes %.2f ns at CPL 0, %.2f ns at CPL 3", execution, cpl0.ns, cpl3.ns)
}
