package perf

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/tracefs"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func tracepointID(t *testing.T, system, name string) uint64 {
	t.Helper()
	gvmtest.Need(t, gvmtest.Tracepoints)
	fs, err := tracefs.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	id, err := fs.TracepointID(system, name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestCountInvalidations discards a page of a process that has a VM, which KVM
// is told of by way of the tracepoint that gvm follows.
func TestCountInvalidations(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	id := tracepointID(t, "kvm", "kvm_unmap_hva_range")
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(kvm)
	const createVM = 0xAE01 // KVM_CREATE_VM
	vm, err := unix.IoctlRetInt(kvm, createVM)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(vm)
	mem, err := unix.Mmap(-1, 0, addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)

	for _, scope := range []Scope{ThisThread, AllCPUs} {
		t.Run(scope.String(), func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			c, err := Open(id, scope)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			const n = 1000
			if err := discard(mem, n); err != nil {
				t.Fatal(err)
			}
			elsewhere := make(chan error)
			go func() { // a thread of its own, while this one is locked
				elsewhere <- discard(mem, n)
			}()
			if err := <-elsewhere; err != nil {
				t.Fatal(err)
			}
			got, err := c.Count()
			if err != nil {
				t.Fatal(err)
			}
			// The Go runtime and other processes discard pages too.
			low, high := uint64(n), uint64(2*n)
			if scope == AllCPUs {
				low, high = 2*n, math.MaxUint64
			}
			if got < low || got >= high {
				t.Errorf("%d discards in this thread and %d in another were counted as %d", n, n, got)
			}
		})
	}
}

func discard(page []byte, times int) error {
	for range times {
		page[0] = 1
		if err := unix.Madvise(page, unix.MADV_DONTNEED); err != nil {
			return err
		}
	}
	return nil
}

func TestClosed(t *testing.T) {
	c, err := Open(tracepointID(t, "sched", "sched_switch"), ThisThread)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Count(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Count after Close: %v, want %v", err, fs.ErrClosed)
	}
}

func TestOpenUnknownTracepoint(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	for _, scope := range []Scope{ThisThread, AllCPUs} {
		if _, err := Open(1<<31, scope); err == nil {
			t.Errorf("Open of no tracepoint, %v: no error", scope)
		}
	}
}

func TestParseCPUs(t *testing.T) {
	for list, want := range map[string][]int{
		"0":       {0},
		"0-1":     {0, 1},
		"0-1,4-5": {0, 1, 4, 5},
		"2,7":     {2, 7},
		"":        nil,
		"0-":      nil,
		"-1":      nil,
		"a":       nil,
	} {
		t.Run(fmt.Sprintf("%q", list), func(t *testing.T) {
			got, err := parseCPUs(list)
			if !slices.Equal(got, want) || (err == nil) != (want != nil) {
				t.Errorf("parseCPUs(%q) = %v, %v; want %v", list, got, err, want)
			}
		})
	}
}
