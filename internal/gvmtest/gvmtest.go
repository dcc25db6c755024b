// Package gvmtest is what gvm's tests share: skips that can be forbidden, a TestMain
// that fails when a test leaves something behind, defects that checks have to notice,
// random tests that can be repeated, and waiting.
//
// A skip is a claim that the machine lacks something. GVM_REQUIRE, a list of
// [Feature] names separated by commas, says what the machine does have; a test
// that would skip for lack of one of those fails instead.
package gvmtest

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// Feature is something that a machine may lack and a test may need.
type Feature string

// The features that tests need.
const (
	KVM         Feature = "kvm"         // /dev/kvm can be opened for reading and writing
	KVMCaps     Feature = "kvmcaps"     // KVM has every capability that is used
	UFFD        Feature = "uffd"        // userfaultfd(2) is permitted
	Tracepoints Feature = "tracepoints" // KVM's tracepoints can be opened through perf
	Assembler   Feature = "as"          // the GNU assembler and linker, for x86-64
	CC          Feature = "cc"          // a C compiler, with the kernel's headers
	QEMU        Feature = "qemu"        // qemu-system-x86_64
	Kernel      Feature = "kernel"      // Debian's linux-image-cloud-amd64 is in /boot
	Root        Feature = "root"        // the test may change root directory and user
	Terminal    Feature = "terminal"    // a pseudoterminal can be opened
	Swap        Feature = "swap"        // there is swap space that is not full
	HugePages   Feature = "hugepages"   // transparent huge pages may be asked for
	Advice      Feature = "advice"      // the kernel knows all of madvise(2) that is used: Linux 6.13
	Chromium    Feature = "chromium"    // the browser: see Browser
)

// Need skips the test, naming the reason, if the machine lacks f; it fails the
// test instead if GVM_REQUIRE lists f.
func Need(t testing.TB, f Feature) {
	t.Helper()
	if err := probe(f); err != nil {
		Lack(t, f, err)
	}
}

// Lack is Need for a test that has found out by itself, by err, that the machine
// lacks a part of f.
func Lack(t testing.TB, f Feature, err error) {
	t.Helper()
	switch {
	case slices.Contains(strings.Split(os.Getenv("GVM_REQUIRE"), ","), string(f)):
		t.Fatalf("GVM_REQUIRE lists %q, but this machine lacks it: %v", f, err)
	default:
		t.Skipf("needs %s: %v", f, err)
	}
}

func probe(f Feature) error {
	switch f {
	case KVM:
		fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /dev/kvm: %w", err)
		}
		return unix.Close(fd)
	case UFFD:
		fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
		if errno != 0 {
			return fmt.Errorf("userfaultfd: %w", errno)
		}
		return unix.Close(int(fd))
	case Tracepoints:
		fd, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
		if err != nil {
			return fmt.Errorf("fsopen tracefs: %w", err)
		}
		return unix.Close(fd)
	case Assembler:
		return lookTools("as", "ld")
	case CC:
		if _, err := os.Stat("/usr/include/linux/kvm.h"); err != nil {
			return err
		}
		return lookTools("cc")
	case QEMU:
		return lookTools("qemu-system-x86_64")
	case Chromium:
		_, err := Browser()
		return err
	case Root:
		if os.Geteuid() != 0 {
			return errors.New("not running as root")
		}
		return nil
	case KVMCaps, Kernel, Terminal, Swap, HugePages, Advice:
		return nil // tests find out by themselves, by use
	}
	return fmt.Errorf("unknown feature %q", f)
}

// Browser returns the path of Chromium or one of its kind.
func Browser() (string, error) {
	names := []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("none of %s is in PATH", strings.Join(names, ", "))
}

func lookTools(names ...string) error {
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	return nil
}

// Main runs the tests of a package and exits. The run fails if, after the last
// test, a goroutine is still running, or a descriptor is open or a guest's
// mapping is present that was not when it began.
func Main(m *testing.M) {
	before := resources()
	code := m.Run()
	if code == 0 {
		code = leaks(before)
	}
	os.Exit(code)
}

func leaks(before []string) (code int) {
	if err := goleak.Find(); err != nil {
		fmt.Fprintf(os.Stderr, "goroutines left behind: %v\n", err)
		code = 1
	}
	before = slices.Clone(before)
	for _, r := range resources() {
		if i := slices.Index(before, r); i >= 0 {
			before = slices.Delete(before, i, i+1)
			continue
		}
		fmt.Fprintf(os.Stderr, "left behind: %s\n", r)
		code = 1
	}
	return code
}

// resources lists the open descriptors, other than the Go runtime's poller, and
// the mappings that belong to guests, which are recognised by their names.
func resources() []string {
	var list []string
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, e := range fds {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:[eventpoll]") || strings.HasPrefix(target, "anon_inode:[eventfd]") {
			continue // an error: it is the descriptor that the listing itself used
		}
		list = append(list, "fd "+target)
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return list
	}
	defer maps.Close()
	for s := bufio.NewScanner(maps); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) >= 6 {
			if name := strings.Join(fields[5:], " "); strings.Contains(name, "gvm") && !strings.HasSuffix(name, ".test") || strings.Contains(name, "kvm") {
				list = append(list, "mapping "+name)
			}
		}
	}
	return list
}
