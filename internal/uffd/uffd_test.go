package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestFeaturesString(t *testing.T) {
	for f, want := range map[Features]string{
		0:                    "none",
		PagefaultFlagWP:      "PAGEFAULT_FLAG_WP",
		EventUnmap:           "EVENT_UNMAP",
		Move:                 "MOVE",
		WPAsync | ThreadID:   "THREAD_ID|WP_ASYNC",
		1<<17 | 1<<63 | Move: "MOVE|0x8000000000020000",
	} {
		if got := f.String(); got != want {
			t.Errorf("Features(%#x).String() = %q, want %q", uint64(f), got, want)
		}
	}
}

func TestLayout(t *testing.T) {
	for _, tt := range []struct {
		request uintptr
		want    uintptr // as a C compiler has it
		arg     any
		size    uintptr
		offsets []uintptr
	}{
		{reqNew, 0xaa00, struct{}{}, 0, nil},
		{reqAPI, 0xc018aa3f, apiArg{}, 24, []uintptr{0, 8, 16}},
		{reqRegister, 0xc020aa00, registerArg{}, 32, []uintptr{0, 8, 16, 24}},
	} {
		if tt.request != tt.want {
			t.Errorf("request of %T is %#x, want %#x", tt.arg, tt.request, tt.want)
		}
		typ := reflect.TypeOf(tt.arg)
		var offsets []uintptr
		for f := range typ.Fields() {
			offsets = append(offsets, f.Offset)
		}
		if typ.Size() != tt.size || !slices.Equal(offsets, tt.offsets) {
			t.Errorf("%T has size %d and offsets %v, want %d and %v", tt.arg, typ.Size(), offsets, tt.size, tt.offsets)
		}
	}
}

func TestOpen(t *testing.T) {
	gvmtest.Need(t, gvmtest.UFFD)
	u, err := Open(PagefaultFlagWP)
	if err != nil {
		t.Fatal(err)
	}
	if u.Origin() != Syscall || !u.KernelFaults() {
		t.Errorf("from %s, kernel faults %t; want %s, true", u.Origin(), u.KernelFaults(), Syscall)
	}
	if u.Offered()&PagefaultFlagWP == 0 {
		t.Errorf("Offered() = %v, without the feature that was enabled", u.Offered())
	}

	m := mapPages(t, 2)
	if err := u.Register(m, ModeWP); err != nil {
		t.Error(err)
	}
	odd := addr.HVARange{Start: m.Start + 1, End: m.End}
	if err := u.Register(odd, ModeWP); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Register(%v) = %v, want EINVAL", odd, err)
	}
	if err := u.Close(); err != nil {
		t.Error(err)
	}
	if err := u.Register(m, ModeWP); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Register after Close = %v, want %v", err, fs.ErrClosed)
	}
}

func TestOpenUnknownFeature(t *testing.T) {
	gvmtest.Need(t, gvmtest.UFFD)
	if u, err := Open(1 << 63); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Open of an unknown feature = %v, %v; want EINVAL", u, err)
	}
}

func TestDevice(t *testing.T) {
	gvmtest.Need(t, gvmtest.Root)
	raw, err := newByDevice()
	if errors.Is(err, fs.ErrNotExist) {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(raw)
	if _, err := handshake(raw, 0); err != nil {
		t.Error(err)
	}
}

// TestOpenUnprivileged runs itself as a user without privileges.
func TestOpenUnprivileged(t *testing.T) {
	const child = "GVM_TEST_UNPRIVILEGED"
	if os.Getenv(child) != "" {
		u, err := Open(0)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		fmt.Printf("kernel faults: %t\n", u.KernelFaults())
		if u, err := Open(EventFork); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("Open(EVENT_FORK) = %v, %v; want EPERM", u, err)
		}
		return
	}
	gvmtest.Need(t, gvmtest.UFFD)
	gvmtest.Need(t, gvmtest.Root)
	sysctl, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	if err != nil {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	dev, err := os.Stat(string(Device))
	permitted := string(sysctl) == "1\n" || err == nil && dev.Mode()&6 == 6

	// The path by way of /proc needs no access to the directory of the binary.
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestOpenUnprivileged$")
	cmd.Env = append(os.Environ(), child+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if want := fmt.Sprintf("kernel faults: %t\n", permitted); !strings.Contains(string(out), want) {
		t.Errorf("got %q, want %q", out, want)
	}
}
