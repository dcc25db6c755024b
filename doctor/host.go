package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/uffd"
)

// machine is what is examined. Tests make up their own.
type machine struct {
	root fs.FS // the file system from its root

	// What no file tells is found out by trying. The results are described at
	// the functions that thisMachine puts here.
	tryUserfaultfd func() (userfaultfd, error)
	tryScan        func() (errScan, errTrack error)
	tryTracepoint  func() tracepoint
	watchEvents    func() error
	watchTrace     func() error
	timeDiscard    func() (time.Duration, error)
	tryKVM         func() (capabilities, error)
	timeGuest      func(ctx context.Context, measure string) (ns float64, err error)
}

// hostChecks examine everything but KVM, in the order of the report.
var hostChecks = []func(*machine) Check{
	checkUserfaultfd,
	checkPagemapScan,
	checkTracepoints,
	checkPerfEventParanoid,
	checkSwap,
	checkKSM,
	checkTHP,
	checkPageIdle,
	checkOvercommit,
	checkMemlock,
}

func examineHost(_ context.Context, m *machine, r *Report) {
	r.Kernel, _ = m.read("/proc/sys/kernel/osrelease")
	r.CPU, r.CPUs = m.cpus()
	r.MemoryBytes = m.memory()
	for _, check := range hostChecks {
		r.Checks = append(r.Checks, check(m))
	}
	if d, err := m.timeDiscard(); err == nil {
		r.Measures = append(r.Measures, Measure{
			Name: "page-discard", Value: d.Seconds() * 1e6, Unit: "us",
			Detail: "MADV_DONTNEED of one resident page that no guest maps, median",
		})
	}
}

// read returns a small file of the machine without the white space around it.
func (m *machine) read(name string) (string, error) {
	b, err := fs.ReadFile(m.root, name[1:])
	return strings.TrimSpace(string(b)), fullPath(err, name)
}

// fullPath returns err with the name that a person knows the file by, instead
// of its path in an fs.FS.
func fullPath(err error, name string) error {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return &fs.PathError{Op: pathErr.Op, Path: name, Err: pathErr.Err}
	}
	return err
}

func (m *machine) readInt(name string) (int, error) {
	s, err := m.read(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

// field returns what follows the first line's beginning with key in a file of
// lines such as "MemTotal:  1024 kB", and "" if there is no such line.
func (m *machine) field(name, key string) string {
	text, _ := m.read(name)
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

func (m *machine) cpus() (model string, online int) {
	text, _ := m.read("/proc/cpuinfo")
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "processor":
			online++
		case "model name":
			model = strings.TrimSpace(value)
		}
	}
	return model, online
}

func (m *machine) memory() uint64 {
	kib, _ := strconv.ParseUint(strings.TrimSuffix(m.field("/proc/meminfo", "MemTotal:"), " kB"), 10, 64)
	return kib << 10
}

// capable reports whether the process has one of the capabilities. In a user
// namespace none counts for what is examined here.
func (m *machine) capable(capabilities ...int) bool {
	uids, _ := m.read("/proc/self/uid_map")
	if !slices.Equal(strings.Fields(uids), []string{"0", "0", "4294967295"}) {
		return false
	}
	effective, _ := strconv.ParseUint(m.field("/proc/self/status", "CapEff:"), 16, 64)
	for _, c := range capabilities {
		if effective&(1<<c) != 0 {
			return true
		}
	}
	return false
}

// found returns c with a status and a detail that is made as Sprintf does.
func (c Check) found(s Status, format string, args ...any) Check {
	c.Status, c.Detail = s, fmt.Sprintf(format, args...)
	return c
}

// unreadable returns c for a file that cannot be read and that is there in
// kernels built with config.
func (c Check) unreadable(err error, config string) Check {
	c.Status, c.Detail, c.Remedy = Missing, err.Error(), "use a kernel built with "+config
	if errors.Is(err, fs.ErrPermission) {
		c.Remedy = "run as root"
	}
	return c
}

// usedFeatures are the userfaultfd features that watching an address space and
// tracking writes to it take.
const usedFeatures = uffd.EventFork | uffd.EventRemap | uffd.EventRemove | uffd.EventUnmap |
	uffd.ThreadID | uffd.MissingShmem | uffd.MinorShmem |
	uffd.PagefaultFlagWP | uffd.WPHugetlbfsShmem | uffd.WPUnpopulated | uffd.WPAsync

// userfaultfd is how far userfaultfd is there.
type userfaultfd struct {
	origin       uffd.Origin
	kernelFaults bool
	offered      uffd.Features // by the kernel
	denied       uffd.Features // offered and used, but not to this process
}

func checkUserfaultfd(m *machine) Check {
	c := Check{Name: "userfaultfd"}
	const permit = "sysctl vm.unprivileged_userfaultfd=1, or setfacl -m u:$USER:rw /dev/userfaultfd, or run as root"
	u, err := m.tryUserfaultfd()
	switch {
	case errors.Is(err, unix.ENOSYS):
		return c.unreadable(err, "CONFIG_USERFAULTFD=y")
	case err != nil:
		c.Remedy = permit + "; in a container, let its seccomp profile pass userfaultfd"
		return c.found(Missing, "%v", err)
	}

	lacking := usedFeatures &^ u.offered
	c.Values = map[string]any{
		"origin":           u.origin,
		"kernel_faults":    u.kernelFaults,
		"features":         u.offered.Names(),
		"features_lacking": lacking.Names(),
		"features_denied":  u.denied.Names(),
	}
	detail, remedies := []string{"from " + string(u.origin)}, []string{}
	if u.kernelFaults {
		detail = append(detail, "faults inside KVM_RUN included")
	} else {
		detail = append(detail, "user-mode faults only: inside KVM_RUN they are EFAULT")
		remedies = append(remedies, permit)
	}
	errWatch := m.watchEvents()
	c.Values["event_watch"] = errWatch == nil
	switch {
	case errWatch == nil:
		detail = append(detail, "changes by others can be watched")
	case errors.Is(errWatch, fs.ErrPermission):
		remedies = append(remedies, "run as root to watch changes by others")
	case lacking == 0:
		remedies = append(remedies, "use a kernel built with CONFIG_PROC_PAGE_MONITOR=y to watch changes by others")
	}
	if errWatch != nil {
		detail = append(detail, fmt.Sprintf("changes by others cannot be watched: %v", errWatch))
	}
	if lacking != 0 {
		detail = append(detail, fmt.Sprintf("the kernel lacks %v", lacking))
		remedies = append(remedies, "use Linux 6.7 or later, built with CONFIG_PTE_MARKER_UFFD_WP=y")
	}
	if u.denied != 0 {
		detail = append(detail, fmt.Sprintf("not permitted: %v", u.denied))
		remedies = append(remedies, fmt.Sprintf("run as root for %v", u.denied))
	}
	c.Remedy = strings.Join(remedies, "; ")
	status := Limited
	if len(remedies) == 0 {
		status = OK
		detail = append(detail, "with every feature that gvm uses")
	}
	return c.found(status, "%s", strings.Join(detail, ", "))
}

func checkPagemapScan(m *machine) Check {
	c := Check{Name: "pagemap-scan"}
	errScan, errTrack := m.tryScan()
	c.Values = map[string]any{"scan": errScan == nil, "write_tracking": errScan == nil && errTrack == nil}
	switch {
	case errors.Is(errScan, unix.ENOTTY):
		c.Remedy = "use Linux 6.7 or later"
		return c.found(Missing, "%v", errScan)
	case errScan != nil:
		return c.unreadable(errScan, "CONFIG_PROC_PAGE_MONITOR=y")
	case errTrack != nil:
		c.Remedy = "see userfaultfd: writes are tracked by its WP_ASYNC"
		return c.found(Limited, "page states are seen, writes are not: %v", errTrack)
	}
	return c.found(OK, "page states are seen, and a write to a protected page")
}

// tracepoint is how far the tracepoint that gvm follows can be reached: the
// first step that failed has its error.
type tracepoint struct {
	id      uint64
	lacking []string // of what else KVM tells, what it does not

	errTracefs error // opening tracefs
	errLookup  error // finding the tracepoint there
	errAllCPUs error // following it on all CPUs...
	errThread  error // ...and, that having failed, in one thread
}

func checkTracepoints(m *machine) Check {
	const permit = "sysctl kernel.perf_event_paranoid=-1, or run as root; in a container, let its seccomp profile pass perf_event_open"
	c := Check{Name: "tracepoints"}
	tp := m.tryTracepoint()
	switch {
	case errors.Is(tp.errTracefs, unix.ENODEV):
		return c.unreadable(tp.errTracefs, "CONFIG_FTRACE=y")
	case tp.errTracefs != nil:
		c.Remedy = "run as root"
		return c.found(Missing, "%v", tp.errTracefs)
	case errors.Is(tp.errLookup, fs.ErrNotExist):
		c.Remedy = "modprobe kvm_intel || modprobe kvm_amd"
		return c.found(Missing, "%v", tp.errLookup)
	case tp.errLookup != nil:
		c.Remedy = "run as root"
		return c.found(Missing, "%v", tp.errLookup)
	}
	c.Values = map[string]any{"id": tp.id, "all_cpus": tp.errAllCPUs == nil, "thread": tp.errAllCPUs == nil || tp.errThread == nil, "lacking": append([]string{}, tp.lacking...)}
	switch {
	case tp.errAllCPUs == nil:
		return c.watchable(m.watchTrace(), tp.lacking)
	case tp.errThread == nil:
		c.Remedy = permit
		return c.found(Limited, "%s can be counted in one thread, not followed: %v", tracepointName, tp.errAllCPUs)
	}
	c.Remedy = permit
	return c.found(Missing, "%v", tp.errThread)
}

// watchable returns c for a tracepoint that can be followed, where errWatch is why changes by
// others cannot be watched by it all the same.
func (c Check) watchable(errWatch error, lacking []string) Check {
	detail, remedies := []string{tracepointName + " can be followed on all CPUs"}, []string{}
	c.Values["trace_watch"] = errWatch == nil
	switch {
	case errWatch == nil:
		detail = append(detail, "changes by others can be watched")
	case errors.Is(errWatch, fs.ErrPermission):
		remedies = append(remedies, "run as root, or raise ulimit -l, to watch changes by others")
	case errors.Is(errWatch, unix.ENOMEM):
		remedies = append(remedies, "free some memory, of which each CPU's ring takes 256 KiB")
	default:
		remedies = append(remedies, "use another kernel to watch changes by others")
	}
	if errWatch != nil {
		detail = append(detail, fmt.Sprintf("changes by others cannot be watched: %v", errWatch))
	}
	if len(lacking) > 0 {
		detail = append(detail, "the kernel lacks "+strings.Join(lacking, ", "))
		remedies = append(remedies, "use a newer kernel for "+strings.Join(lacking, ", "))
	}
	c.Remedy = strings.Join(remedies, "; ")
	status := Limited
	if len(remedies) == 0 {
		status = OK
	}
	return c.found(status, "%s", strings.Join(detail, ", "))
}

func checkPerfEventParanoid(m *machine) Check {
	const (
		sysctl = "/proc/sys/kernel/perf_event_paranoid"
		open   = -1 // the level at which everybody may record tracepoints
	)
	c := Check{Name: "perf-event-paranoid"}
	level, err := m.readInt(sysctl)
	if err != nil {
		return c.unreadable(err, "CONFIG_PERF_EVENTS=y")
	}
	exempt := m.capable(unix.CAP_PERFMON, unix.CAP_SYS_ADMIN)
	c.Values = map[string]any{"level": level, "exempt": exempt}
	switch {
	case level <= open:
		return c.found(OK, "level %d: everybody may record tracepoints", level)
	case exempt:
		return c.found(OK, "level %d, from which this process is exempt", level)
	}
	c.Remedy = "sysctl kernel.perf_event_paranoid=-1, or run as root"
	return c.found(Limited, "level %d: this process may not record tracepoints", level)
}

func checkSwap(m *machine) Check {
	c := Check{Name: "swap"}
	text, err := m.read("/proc/swaps")
	if err != nil {
		return c.unreadable(err, "CONFIG_SWAP=y")
	}
	var (
		names []string
		total uint64
	)
	for line := range strings.Lines(text) {
		// Filename, Type, Size, Used, Priority; the header's size is no number.
		if f := strings.Fields(line); len(f) >= 3 {
			if kib, err := strconv.ParseUint(f[2], 10, 64); err == nil {
				names, total = append(names, f[0]), total+kib<<10
			}
		}
	}
	zram := m.freeZram()
	c.Values = map[string]any{"bytes": total, "free_zram": zram}
	switch {
	case len(names) > 0:
		return c.found(OK, "%s on %s", sizeString(total), strings.Join(names, ", "))
	case zram != "":
		c.Remedy = fmt.Sprintf("echo 256M > /sys/block/%[1]s/disksize && mkswap /dev/%[1]s && swapon /dev/%[1]s", zram)
		return c.found(Missing, "none, so MADV_PAGEOUT leaves anonymous pages in place; %s is free to be made one", zram)
	}
	c.Remedy = "fallocate -l 256M /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile"
	return c.found(Missing, "none, so MADV_PAGEOUT leaves anonymous pages in place; no zram device is free")
}

// freeZram returns the name of a zram device that nothing uses, or "".
func (m *machine) freeZram() string {
	dirs, _ := fs.Glob(m.root, "sys/block/zram*")
	for _, dir := range dirs {
		if size, err := m.read("/" + dir + "/disksize"); err == nil && size == "0" {
			return path.Base(dir)
		}
	}
	return ""
}

func checkKSM(m *machine) Check {
	const run = "/sys/kernel/mm/ksm/run"
	c := Check{Name: "ksm", Remedy: "echo 1 > " + run}
	mode, err := m.readInt(run)
	if err != nil {
		return c.unreadable(err, "CONFIG_KSM=y")
	}
	c.Values = map[string]any{"run": mode}
	switch mode {
	case 1:
		c.Remedy = ""
		return c.found(OK, "ksmd merges pages")
	case 2:
		return c.found(Limited, "stopped, and all pages unmerged (run is 2)")
	}
	return c.found(Limited, "stopped (run is %d): MADV_MERGEABLE pages are not merged", mode)
}

func checkTHP(m *machine) Check {
	const (
		dir   = "/sys/kernel/mm/transparent_hugepage/"
		anon  = dir + "enabled"
		shmem = dir + "shmem_enabled"
	)
	c := Check{Name: "thp"}
	text, err := m.read(anon)
	if err != nil {
		return c.unreadable(err, "CONFIG_TRANSPARENT_HUGEPAGE=y")
	}
	anonMode := selected(text)
	text, err = m.read(shmem)
	if err != nil {
		return c.unreadable(err, "CONFIG_TRANSPARENT_HUGEPAGE=y and CONFIG_SHMEM=y")
	}
	shmemMode := selected(text)

	c.Values = map[string]any{"enabled": anonMode, "shmem_enabled": shmemMode}
	var remedies []string
	if anonMode == "never" {
		remedies = append(remedies, "echo madvise > "+anon)
	}
	if shmemMode == "never" || shmemMode == "deny" {
		remedies = append(remedies, "echo advise > "+shmem)
	}
	c.Remedy = strings.Join(remedies, " && ")
	status := OK
	if len(remedies) > 0 {
		status = Limited
	}
	return c.found(status, "anonymous memory: %s, shared memory: %s", anonMode, shmemMode)
}

// selected returns the choice in brackets of a list such as "always [madvise] never".
func selected(list string) string {
	_, rest, _ := strings.Cut(list, "[")
	choice, _, _ := strings.Cut(rest, "]")
	return choice
}

func checkPageIdle(m *machine) Check {
	const bitmap = "/sys/kernel/mm/page_idle/bitmap"
	c := Check{Name: "page-idle"}
	f, err := m.root.Open(bitmap[1:])
	if err != nil {
		return c.unreadable(fullPath(err, bitmap), "CONFIG_IDLE_PAGE_TRACKING=y")
	}
	f.Close()
	return c.found(OK, "pages can be marked idle")
}

func checkOvercommit(m *machine) Check {
	c := Check{Name: "overcommit"}
	mode, err := m.readInt("/proc/sys/vm/overcommit_memory")
	if err != nil {
		return c.unreadable(err, "CONFIG_PROC_SYSCTL=y")
	}
	c.Values = map[string]any{"mode": mode}
	switch mode {
	case 0:
		return c.found(OK, "heuristic (mode 0)")
	case 1:
		return c.found(OK, "always (mode 1)")
	}
	c.Remedy = "sysctl vm.overcommit_memory=0"
	return c.found(Limited, "never (mode %d): guest RAM that is not touched counts as used", mode)
}

// wantedMemlock is what a guest of the usual 16 MiB takes whose RAM is locked,
// with as much again for rings of trace records.
const wantedMemlock = 32 << 20

func checkMemlock(m *machine) Check {
	c := Check{Name: "memlock"}
	limit, _, _ := strings.Cut(m.field("/proc/self/limits", "Max locked memory"), " ")
	exempt := m.capable(unix.CAP_IPC_LOCK)
	c.Values = map[string]any{"exempt": exempt, "unlimited": limit == "unlimited"}
	if limit == "unlimited" {
		return c.found(OK, "unlimited")
	}
	n, err := strconv.ParseUint(limit, 10, 64)
	if err != nil {
		return c.unreadable(errors.New("no limit of locked memory in /proc/self/limits"), "CONFIG_PROC_FS=y")
	}
	c.Values["bytes"] = n
	switch {
	case exempt:
		return c.found(OK, "%s, from which this process is exempt", sizeString(n))
	case n >= wantedMemlock:
		return c.found(OK, "%s", sizeString(n))
	}
	c.Remedy = fmt.Sprintf("ulimit -l %d, as root if that is refused", wantedMemlock>>10)
	return c.found(Limited, "%s, of the %s that locked guest RAM and trace rings take", sizeString(n), sizeString(wantedMemlock))
}
