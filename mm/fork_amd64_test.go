package mm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

// newChild forks the memory. The child is closed with the test, if it is not by then.
func newChild(t testing.TB, m *Memory) *Child {
	t.Helper()
	c, err := m.Fork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return c
}

// noChildren fails the test if the process has a child, dead or alive.
func noChildren(t testing.TB) {
	t.Helper()
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG|unix.WALL, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("there is a child, %d (%v)", pid, err)
	}
}

func (c *Child) mustLoad(t testing.TB, hva addr.HVA) uint64 {
	t.Helper()
	var b [8]byte
	if err := c.ReadAt(b[:], hva); err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(b[:])
}

// TestForkKeepsTheMoment: what a child has is what memory was, whatever is done to it
// afterwards. Shared memory is not kept.
func TestForkKeepsTheMoment(t *testing.T) {
	for _, backing := range allBackings {
		t.Run(backing.String(), func(t *testing.T) {
			m, r := newMemory(t, RegionConfig{Backing: backing})
			for i := range uint64(8) {
				mustStore(t, m, part(r, i, 1).Start, i+1)
			}
			c := newChild(t, m)
			mustStore(t, m, part(r, 0, 1).Start, 100)
			if err := errors.Join(m.Unmap(part(r, 1, 1)), m.Discard(part(r, 2, 1)), m.Map(part(r, 3, 1)), m.Protect(part(r, 4, 1), addr.NoAccess),
				m.Remap(part(r, 5, 1), part(r, 6, 1).Start)); err != nil {
				t.Fatal(err)
			}
			for i := range uint64(8) {
				want := i + 1
				if i == 0 && !backing.private() && backing != Anonymous {
					want = 100
				}
				if got := c.mustLoad(t, part(r, i, 1).Start); got != want {
					t.Errorf("page %d is %d in the child, want %d", i, got, want)
				}
			}
			if v, err := m.Load64(r.Range.Start); v != 100 || err != nil {
				t.Errorf("page 0 is %d, %v on this side, want 100", v, err)
			}
		})
	}
}

// TestForkUnderWriters forks while threads write, each all of its pages in turn: with the
// image of one page from before another one's, as it was written.
func TestForkUnderWriters(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	var stop atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop.Store(true)
	for w := range uint64(2) {
		wg.Go(func() {
			for n := uint64(1); !stop.Load(); n++ {
				for i := range uint64(4) {
					if err := m.Store64(part(r, 4*w+i, 1).Start, n); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for range 20 {
		c := newChild(t, m)
		var first [8]uint64
		for i := range first {
			first[i] = c.mustLoad(t, part(r, uint64(i), 1).Start)
		}
		for w := range 2 { // Store64 holds the mapping lock: each is before the fork, or after it
			if of := first[4*w : 4*w+4]; of[0] < of[3] || of[0] > of[3]+1 || of[0] < of[1] || of[1] < of[2] || of[2] < of[3] {
				t.Errorf("the pages of writer %d are %v in the child, which they never were", w, of)
			}
		}
		for i, v := range first {
			if again := c.mustLoad(t, part(r, uint64(i), 1).Start); again != v {
				t.Errorf("page %d of the child was %d, and is %d", i, v, again)
			}
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestForkIsAnnounced: subscribers are told of private memory, with the access that it has,
// and of nothing else; the mappings stay.
func TestForkIsAnnounced(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Size: 6 * addr.PageSize})
	shared, err := m.NewRegion(RegionConfig{Name: "shared", Size: addr.PageSize, Backing: Memfd})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Unmap(part(r, 1, 1)), m.Protect(part(r, 4, 1), addr.Read), m.Remap(shared.Range, part(r, 2, 1).Start)); err != nil {
		t.Fatal(err)
	}
	extents, changes := fmt.Sprint(m.Extents(r.Range)), m.Changes()
	var told []string
	s := &funcSubscriber{start: func(inv *notifier.Invalidation) error {
		told = append(told, fmt.Sprintf("%v %d+%d %v %v", inv.Event, (inv.Range.Start-r.Range.Start)/addr.PageSize, inv.Range.NPages(), inv.After, inv.Content))
		return nil
	}}
	register(t, m, s)
	newChild(t, m)
	if diff := cmp.Diff([]string{
		"protect-page 0+1 read-write kept", "protect-page 3+1 read-write kept", "protect-page 4+1 read-only kept", "protect-page 5+1 read-write kept",
	}, told); diff != "" {
		t.Errorf("announced (-want +got):\n%s", diff)
	}
	if now := fmt.Sprint(m.Extents(r.Range)); now != extents || m.Changes() != changes+1 {
		t.Errorf("extents are %s after %d changes, were %s after %d", now, m.Changes(), extents, changes)
	}
	if c, ok := m.LastChange(r.Range.Start); !ok || c.Op != OpFork {
		t.Errorf("the last change of page 0 is %v, %v", c, ok)
	}

	broken := errors.New("broken")
	s.start = func(*notifier.Invalidation) error { return broken }
	c, err := m.Fork()
	var e *Error
	if !errors.As(err, &e) || !e.Made || !errors.Is(err, broken) || c == nil {
		t.Fatalf("a fork of which a subscriber fails is %v, %v; want a child, and an *Error with Made", c, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestChildIsAlone looks at a child from outside: what it has, and what it does.
func TestChildIsAlone(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	pinned, err := m.NewRegion(RegionConfig{Name: "pinned", Size: addr.PageSize, Pinned: true})
	if err != nil {
		t.Fatal(err)
	}
	mustStore(t, m, pinned.Range.Start, 3)
	c := newChild(t, m)
	if v := c.mustLoad(t, pinned.Range.Start); v != 3 {
		t.Errorf("a pinned page is %d in the child, want 3", v)
	}
	read := func(name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", c.PID(), name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := read("comm"); got != "gvm fork\n" {
		t.Errorf("its name is %q", got)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.PID()))
	if err != nil || len(fds) != 1 {
		t.Errorf("it has descriptors %v (%v), want the socket", fds, err)
	}
	for line := range strings.Lines(read("status")) {
		if blocked, ok := strings.CutPrefix(line, "SigBlk:\t"); ok && strings.TrimSpace(blocked) != "fffffffe7ffbfeff" && strings.TrimSpace(blocked) != "fffffffffffbfeff" {
			t.Errorf("it blocks signals %s, want all that can be", blocked)
		}
		if threads, ok := strings.CutPrefix(line, "Threads:\t"); ok && threads != "1\n" {
			t.Errorf("it has %s threads", threads)
		}
	}
	// Apart from the regions it has its code, the plan, and the kernel's.
	others := 0
	for line := range strings.Lines(read("maps")) {
		var v addr.HVARange
		if _, err := fmt.Sscanf(line, "%x-%x", &v.Start, &v.End); err != nil {
			t.Fatal(err)
		}
		switch {
		case r.Range.Contains(v), pinned.Range.Contains(v), strings.Contains(line, "[v"), strings.Contains(line, "[uprobes]"):
		default:
			others++
			if v.NPages() > 2 {
				t.Errorf("it has mapped %s", line)
			}
		}
	}
	if others != 2 {
		t.Errorf("it has %d other mappings, want 2: code and plan\n%s", others, read("maps"))
	}
}

// TestChildErrors: reads of what the child has not, and a child that has gone.
func TestChildErrors(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Backing: Memfd})
	if err := m.Unmap(part(r, 1, 1)); err != nil {
		t.Fatal(err)
	}
	c := newChild(t, m)
	if err := m.Truncate(r, 8*addr.PageSize); err != nil {
		t.Fatal(err)
	}
	one := make([]byte, 1)
	for name, tt := range map[string]struct {
		hva  addr.HVA
		says string
	}{
		"not mapped":      {part(r, 1, 1).Start, "not mapped"},
		"no region":       {r.Range.End, "is not guest memory"},
		"taken from both": {part(r, 8, 1).Start, "which was mapped"},
	} {
		var e *AccessError
		if err := c.ReadAt(one, tt.hva); !errors.As(err, &e) || !errors.Is(err, unix.EFAULT) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("a read of what is %s: %v, want EFAULT with %q", name, err, tt.says)
		}
	}
	if err := errors.Join(c.ReadAt(nil, 0), c.ReadAt(one, r.Range.Start)); err != nil {
		t.Error(err)
	}

	killed := newChild(t, m)
	if err := unix.Kill(killed.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !gvmtest.Eventually(func() bool { return killed.ReadAt(one, r.Range.Start) != nil }) {
		t.Fatal("a child that was killed can be read")
	}
	if err := killed.ReadAt(one, r.Range.Start); !errors.Is(err, unix.ESRCH) {
		t.Errorf("a read of a child that was killed: %v, want ESRCH", err)
	}
	for i, want := range []error{nil, fs.ErrClosed} {
		if err := killed.Close(); !errors.Is(err, want) {
			t.Errorf("close %d: %v, want %v", i+1, err, want)
		}
	}
	if err := killed.ReadAt(one, r.Range.Start); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a read after close: %v, want fs.ErrClosed", err)
	}
}

// TestForkFails has each step of a fork fail. No process and no descriptor is left, which
// TestMain looks for, and the next fork succeeds.
func TestForkFails(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	noChildren(t)
	defer noChildren(t)
	empty := New(nil)
	if _, err := empty.Fork(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a fork without regions: %v, want EINVAL", err)
	}
	if err := empty.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := empty.Fork(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a fork of closed memory: %v, want fs.ErrClosed", err)
	}

	own, err := ownMappings()
	if err != nil {
		t.Fatal(err)
	}
	own.keep = append(own.keep, r.Range)
	high := own
	high.end = 1 << 63
	if _, err := fork(high); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "the child's munmap") {
		t.Errorf("a child that fails: %v, want EINVAL of its munmap", err)
	}

	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	last := 0
	for _, fd := range fds {
		n, err := strconv.Atoi(fd.Name())
		if err != nil {
			t.Fatal(err)
		}
		last = max(last, n)
	}
	// Every number of descriptors is too few for one step or another, until it is enough.
	for n := 0; ; n++ {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(n), Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		c, err := fork(own)
		if restore := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); restore != nil {
			t.Fatal(restore)
		}
		if err == nil {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			break
		}
		if !errors.Is(err, unix.EMFILE) || n > last+8 {
			t.Fatalf("with %d descriptors: %v, want EMFILE", n, err)
		}
	}
	if _, err := m.Load64(r.Range.Start); err != nil {
		t.Error(err)
	}
}

// TestChildEndsWithItsParent runs this test in a process of its own, which forks and is
// killed. Its child ends.
func TestChildEndsWithItsParent(t *testing.T) {
	if os.Getenv("GVM_FORK_AND_DIE") != "" {
		m, r := newMemory(t, RegionConfig{})
		mustStore(t, m, r.Range.Start, 1)
		c := newChild(t, m)
		fmt.Printf("child %d\n", c.PID())
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestChildEndsWithItsParent$")
	cmd.Env = append(os.Environ(), "GVM_FORK_AND_DIE=1")
	out, _ := cmd.Output()
	_, after, _ := strings.Cut(string(out), "child ")
	pid, err := strconv.Atoi(strings.TrimSpace(after))
	if err != nil {
		t.Fatalf("it printed %q", out)
	}
	if !gvmtest.Eventually(func() bool {
		name, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
		if err != nil {
			return true
		}
		stat, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat")) // nobody may reap it here
		return string(name) != "gvm fork\n" || strings.Contains(string(stat), ") Z ")
	}) {
		t.Errorf("the child, %d, is there although its parent has been killed", pid)
	}
}

// TestForksAtOnce forks from many goroutines, and has all children at once.
func TestForksAtOnce(t *testing.T) {
	defer noChildren(t)
	m, r := newMemory(t, RegionConfig{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				c, err := m.Fork()
				if err != nil {
					t.Error(err)
					return
				}
				runtime.GC()
				if err := errors.Join(c.ReadAt(make([]byte, 8), r.Range.Start), c.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkFork times a fork and its end, by how much memory is present.
func BenchmarkFork(b *testing.B) {
	for _, mib := range []uint64{1, 64} {
		b.Run(fmt.Sprintf("MiB=%d", mib), func(b *testing.B) {
			m, r := newMemory(b, RegionConfig{Size: mib << 20})
			if err := m.Populate(r.Range, true); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				c, err := m.Fork()
				if err != nil {
					b.Fatal(err)
				}
				if err := c.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
