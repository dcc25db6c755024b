package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
	"github.com/secondmmu/gvm/vm"
)

func TestWatchUsage(t *testing.T) {
	for line, want := range map[string]string{
		"run --watch sand hello":       "it is not one of none, events, trace, events+trace",
		"run hello --watch events":     "flags go before the guest: put --watch before hello",
		"trace run --watch sand hello": "it is not one of none, events, trace, events+trace",
		"dirty --watch trace+events":   "it is not one of none, events, trace, events+trace",
	} {
		gvm(t.Context(), "", strings.Fields(line)...).check(t, statusUsage, want)
	}
}

// TestWatchWriteProtect: who asks for both is told so; who asks for all sources gets the others.
func TestWatchWriteProtect(t *testing.T) {
	for _, watch := range []string{"events", "trace"} {
		gvm(t.Context(), "", "dirty", "--tracker", "wp", "--watch", watch).check(t, statusUsage, "the memory cannot be watched, by "+watch)
	}
	gvmtest.Need(t, gvmtest.KVM)
	gvmtest.Need(t, gvmtest.UFFD)
	r := gvm(t.Context(), "", strings.Fields("dirty --epochs 2 --watch events --verify")...)
	if r.status != 0 || r.stderr != "" || !strings.Contains(r.stdout, "wp: not run: ") || !strings.Contains(r.stdout, "bitmap, which sees ") {
		t.Errorf("got %+v", r)
	}
}

func TestLackWatch(t *testing.T) {
	for name, tt := range map[string]struct {
		watch vm.Watch
		err   error
		want  string
	}{
		"no userfaultfd":   {vm.WatchEvents, unix.EPERM, "vm.unprivileged_userfaultfd=1"},
		"old kernel":       {vm.WatchEvents, errors.ErrUnsupported, "Linux 6.7"},
		"not built in":     {vm.WatchEvents, unix.ENOSYS, "CONFIG_USERFAULTFD=y"},
		"no pagemap":       {vm.WatchEvents, unix.ENOENT, "Linux 6.7"},
		"no tracepoint":    {vm.WatchTrace, unix.ENOENT, "has the tracepoint"},
		"no tracefs":       {vm.WatchTrace, unix.ENODEV, "CONFIG_FTRACE=y"},
		"tracing is not":   {vm.WatchTrace, unix.EPERM, "run as root"},
		"perf refuses":     {vm.WatchTrace, unix.EACCES, "run as root"},
		"and it is hidden": {vm.WatchTrace, fmt.Errorf("%w; %w", unix.EPERM, fs.ErrNotExist), "run as root"},
	} {
		t.Run(name, func(t *testing.T) {
			e, ok := errors.AsType[*lackError](lack(fmt.Errorf("make a machine: %w", &vm.WatchError{Watch: tt.watch, Err: tt.err})))
			if !ok || !errors.Is(e, tt.err) || !strings.Contains(e.remedy, tt.want) || strings.Contains(e.remedy, "\n") || strings.Contains(e.remedy, "modprobe") || strings.Contains(e.remedy, "usermod") {
				t.Errorf("the remedy is %+v, want a line with %q", e, tt.want)
			}
		})
	}
}

// TestStrayWarnings: the first few are shown, the rest is counted; and of a recording, which has
// them, those that could not be followed.
func TestStrayWarnings(t *testing.T) {
	stray := func(err error) mm.Stray {
		return mm.Stray{Change: mm.Change{Op: mm.OpStrayRemove, Range: addr.HVARange{Start: 0x4000, End: 0x6000}}, Evidence: mm.Event, Err: err}
	}
	var b bytes.Buffer
	s := &strayWarnings{w: &b}
	s.name(addr.HVARange{Start: 0x1000, End: 0x9000})
	for range manyStrays + 3 {
		s.add(stray(nil))
	}
	s.end()
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	if len(lines) != manyStrays+1 || !strings.HasPrefix(lines[0], "gvm: warning: others have changed pages 3..5 of RAM: ") || !strings.Contains(lines[0], "stray-remove") ||
		lines[manyStrays] != "gvm: warning: there were 3 more changes of guest memory" || s.count() != manyStrays+3 {
		t.Errorf("%d changes are\n%s", s.count(), &b)
	}
	b.Reset()
	kept := stray(nil)
	kept.Content = notifier.Kept
	s = &strayWarnings{w: &b}
	s.add(kept)
	s.end()
	if b.Len() != 0 || s.count() != 1 {
		t.Errorf("%d changes that change nothing are %q", s.count(), &b)
	}
	s = &strayWarnings{w: &b, quiet: true}
	s.add(stray(nil))
	s.add(stray(io.ErrUnexpectedEOF))
	s.end()
	if got := b.String(); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "gvm: warning: others have changed guest memory: ") || !strings.Contains(got, "unexpected EOF") {
		t.Errorf("quiet: %q", got)
	}
}

// needWatch skips the test if the machine does not have what a watch takes.
func needWatch(t *testing.T, watch string) {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	if strings.Contains(watch, "events") {
		gvmtest.Need(t, gvmtest.UFFD)
	}
	if strings.Contains(watch, "trace") {
		gvmtest.Need(t, gvmtest.Tracepoints)
	}
}

// meddle runs a command line, with the guest's RAM in a file. Once the guest has stored to
// page 3, meddle calls with, with RAM's address, waits until the guest has stored there again, and
// interrupts the command.
func meddle(t *testing.T, line string, with func(f *os.File, ram addr.HVA)) result {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ram")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(64 << 10); err != nil {
		t.Fatal(err)
	}
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	var r result
	ended := gvmtest.Background(func() {
		defer interrupt()
		r = gvm(ctx, "", strings.Fields(strings.ReplaceAll(line, "FILE", name))...)
	})
	if ram, ok := awaitMapping(ctx, name); ok {
		awaitStore(ctx, t, f)
		with(f, ram)
		awaitStore(ctx, t, f)
	}
	interrupt()
	<-ended
	return r
}

// awaitMapping returns where this process has mapped a file, once it has.
func awaitMapping(ctx context.Context, name string) (addr.HVA, bool) {
	for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			return 0, false
		}
		for line := range strings.Lines(string(maps)) {
			var start, end uint64
			if strings.HasSuffix(line, " "+name+"\n") {
				if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err == nil {
					return addr.HVA(start), true
				}
			}
		}
	}
	return 0, false
}

// awaitStore returns once the guest has stored to page 3 of its RAM.
func awaitStore(ctx context.Context, t *testing.T, f *os.File) {
	t.Helper()
	word := make([]byte, 8)
	for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
		if _, err := f.ReadAt(word, 3*addr.PageSize); err != nil && err != io.EOF { // it has no length yet
			t.Error(err)
			return
		}
		if !bytes.Equal(word, make([]byte, 8)) {
			return
		}
	}
	t.Error("it has ended, and the guest has not stored to page 3")
}

func punch(t *testing.T, f *os.File) {
	t.Helper()
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(f.Fd()), mode, 3*addr.PageSize, addr.PageSize); err != nil {
		t.Fatal(err)
	}
}

func discard(t *testing.T, ram addr.HVA) {
	t.Helper()
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(ram)+3*addr.PageSize, addr.PageSize, unix.MADV_REMOVE); errno != 0 {
		t.Fatal(errno)
	}
}

// TestRunWatch changes a guest's RAM behind the back of "gvm run": what is seen is a warning,
// and the guest goes on either way.
func TestRunWatch(t *testing.T) {
	for name, tt := range map[string]struct {
		watch string
		with  func(*testing.T, *os.File, addr.HVA)
		want  string // a part of the warning; "": none
	}{
		"a call":                     {"events", func(t *testing.T, _ *os.File, ram addr.HVA) { discard(t, ram) }, "stray-remove"},
		"a call, seen by KVM":        {"trace", func(t *testing.T, _ *os.File, ram addr.HVA) { discard(t, ram) }, "stray-zap"},
		"a call, seen by both":       {"events+trace", func(t *testing.T, _ *os.File, ram addr.HVA) { discard(t, ram) }, "stray-remove"},
		"a hole in the file":         {"trace", func(t *testing.T, f *os.File, _ addr.HVA) { punch(t, f) }, "stray-zap"},
		"a hole that is not seen":    {"events", func(t *testing.T, f *os.File, _ addr.HVA) { punch(t, f) }, ""},
		"a call that nobody watches": {"none", func(t *testing.T, _ *os.File, ram addr.HVA) { discard(t, ram) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			needWatch(t, tt.watch)
			r := meddle(t, "run --mem 64K --backing file --ram-file FILE --watch "+tt.watch+" stamp pages=16", func(f *os.File, ram addr.HVA) {
				tt.with(t, f, ram)
			})
			const warning = "changed page 3 of RAM: "
			if r.status != statusFailed || r.stdout != "" || !strings.HasSuffix(r.stderr, "gvm: interrupted: the run was stopped: context canceled\n") ||
				strings.Contains(r.stderr, warning) != (tt.want != "") || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("got %+v, want a warning with %q", r, tt.want)
			}
			// A hole may be two changes to KVM, and it is told of copies, too.
			if tt.watch != "trace" && strings.Count(r.stderr, "warning: ") != strings.Count(r.stderr, warning) {
				t.Errorf("there are warnings of other pages:\n%s", r.stderr)
			}
		})
	}
}

// TestRunWatchJSON counts what is seen.
func TestRunWatchJSON(t *testing.T) {
	needWatch(t, "events")
	r := meddle(t, "run --json --mem 64K --backing file --ram-file FILE --watch events stamp pages=16", func(_ *os.File, ram addr.HVA) {
		for range 3 {
			discard(t, ram)
		}
	})
	if !strings.Contains(r.stdout, `"strays": 3`) {
		t.Errorf("got %+v, want 3 strays", r)
	}
}

// TestTraceWatch: a recording has what others do, and what follows from it.
func TestTraceWatch(t *testing.T) {
	needWatch(t, "trace")
	// RAM is in a memory file, of which others of this process have a descriptor.
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	file := filepath.Join(t.TempDir(), "trace")
	var r result
	ended := gvmtest.Background(func() {
		r = gvm(ctx, "", strings.Fields("trace run --backing memfd --watch trace --format jsonl -o "+file+" stamp pages=16")...)
	})
	defer func() { <-ended }()
	defer interrupt()
	for done := false; !done; time.Sleep(time.Millisecond) {
		select {
		case <-ended:
			t.Fatalf("it has ended: %+v", r)
		default:
		}
		fds, _ := filepath.Glob("/proc/self/fd/*")
		for _, fd := range fds {
			if to, _ := os.Readlink(fd); !strings.HasPrefix(to, "/memfd:") || !strings.Contains(to, "ram") {
				continue
			}
			f, err := os.OpenFile(fd, os.O_RDWR, 0)
			if err != nil {
				continue
			}
			awaitStore(ctx, t, f)
			punch(t, f)
			f.Close()
			done = true
		}
	}
	interrupt()
	<-ended
	r.check(t, statusFailed, "gvm: interrupted: the run was stopped: context canceled\n")
	text, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	rec, err := trace.Read(file, text)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range trace.Page(rec.Events, rec.Header.RAM.Start+3) {
		if e.Kind == trace.HostOp && e.Name == string(mm.OpStrayZap) {
			return
		}
	}
	t.Errorf("there is no %s of page 3 among %d events", mm.OpStrayZap, len(rec.Events))
}
