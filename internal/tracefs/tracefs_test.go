package tracefs

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestTracepointID(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	before := mounts(t)
	tr, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	if id, err := tr.TracepointID("sched", "sched_switch"); err != nil || id == 0 {
		t.Errorf("id of sched:sched_switch = %d, %v; want a number above 0", id, err)
	}
	if id, err := tr.TracepointID("sched", "no_such_event"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("id of a missing tracepoint = %d, %v; want %v", id, err, fs.ErrNotExist)
	}
	if after := mounts(t); after != before {
		t.Errorf("mounts changed:\n%s\nbefore:\n%s", after, before)
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	if _, err := tr.TracepointID("sched", "sched_switch"); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("TracepointID after Close: %v, want %v", err, fs.ErrClosed)
	}
}

func mounts(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestOpenMounted looks at the usual mount point from a mount namespace of its
// own, with nothing and then with a tracefs there.
func TestOpenMounted(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	gvmtest.Need(t, gvmtest.Root)
	if _, err := os.Stat(mountPoint); err != nil {
		gvmtest.Lack(t, gvmtest.Tracepoints, err)
	}
	// The thread, and its namespace, end with the goroutine that is locked to it.
	var failed []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		failed = openMountedInNamespace()
	}()
	<-done
	if len(failed) > 0 {
		t.Error(strings.Join(failed, "\n"))
	}
}

func openMountedInNamespace() (failed []string) {
	check := func(step string, err, want error) bool {
		if !errors.Is(err, want) {
			failed = append(failed, step+": "+errors.Join(err).Error())
		}
		return err == nil
	}
	if !check("unshare", unix.Unshare(unix.CLONE_NEWNS), nil) ||
		!check("make private", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), nil) ||
		!check("mount tmpfs", unix.Mount("tmpfs", mountPoint, "tmpfs", 0, ""), nil) {
		return failed
	}
	_, err := openMounted()
	check("open without tracefs", err, fs.ErrNotExist)

	if !check("mount tracefs", unix.Mount("tracefs", mountPoint, "tracefs", 0, ""), nil) {
		return failed
	}
	root, err := openMounted()
	if check("open with tracefs", err, nil) {
		check("close", root.Close(), nil)
	}
	return failed
}
