package vm

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
)

// watchedGuest is a running guest that does what the test asks it, and whose memory is
// changed by others.
type watchedGuest struct {
	*Machine
	*Probe
	strays chan mm.Stray
}

// newWatchedGuest has the guest store to the first pages of RAM, page i the word i+1.
func newWatchedGuest(ctx context.Context, t *testing.T, backing mm.Backing) *watchedGuest {
	t.Helper()
	m := newMachine(t, Config{Backing: backing}, "probe", nil)
	g := &watchedGuest{Machine: m, Probe: m.Probe(0), strays: make(chan mm.Stray, 1000)}
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(8) {
		if err := g.Store(ctx, gpaOf(i), i+1); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

func (g *watchedGuest) report(s mm.Stray) { g.strays <- s }

// watchBy starts the watch that is named, events or trace, and returns what ends it.
func (g *watchedGuest) watchBy(t *testing.T, what string) func() {
	t.Helper()
	var w interface{ Close() error }
	var err error
	need := gvmtest.UFFD
	if what == "events" {
		gvmtest.Need(t, need)
		w, err = g.Memory().WatchEvents(mm.EventConfig{Report: g.report})
	} else {
		need = gvmtest.Tracepoints
		gvmtest.Need(t, need)
		w, err = g.Memory().WatchTrace(mm.TraceConfig{Report: g.report})
	}
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		gvmtest.Lack(t, need, err)
	} else if err != nil {
		t.Fatal(err)
	}
	ended := false
	end := func() {
		if ended {
			return
		}
		ended = true
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(end)
	return end
}

// await waits until a change of r has been followed.
func (g *watchedGuest) await(t *testing.T, r addr.HVARange) mm.Stray {
	t.Helper()
	for {
		select {
		case s := <-g.strays:
			if s.Range.Overlaps(r) {
				return s
			}
		case <-time.After(gvmtest.Limit):
			t.Fatalf("no change of %v is followed", r)
		}
	}
}

func strayAdvise(t *testing.T, r addr.HVARange, advice uintptr) {
	t.Helper()
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), advice); errno != 0 {
		t.Fatal(errno)
	}
}

func strayUnmap(t *testing.T, r addr.HVARange) {
	t.Helper()
	if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(r.Start), uintptr(r.Bytes()), 0); errno != 0 {
		t.Fatal(errno)
	}
}

// TestWatchOfConfig has a machine watch its memory from the beginning to its end.
func TestWatchOfConfig(t *testing.T) {
	gvmtest.Need(t, gvmtest.UFFD)
	gvmtest.Need(t, gvmtest.Tracepoints)
	var told []mm.Stray
	m := newMachine(t, Config{Watch: WatchEvents | WatchTrace, OnStray: func(s mm.Stray) { told = append(told, s) }}, "probe", nil)
	strayAdvise(t, m.hvas(3, 1), unix.MADV_DONTNEED)
	m.Memory().Follow()
	if len(told) != 1 || told[0].Op != mm.OpStrayRemove || told[0].Range != m.hvas(3, 1) {
		t.Errorf("told is %v, want one discard", told)
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestStrayDiscardUnderGuest discards a page behind the back of the machine: the guest
// reads zero, and the next harvest has the page, which KVM's log has not.
func TestStrayDiscardUnderGuest(t *testing.T) {
	for _, by := range []string{"events", "trace"} {
		t.Run(by, func(t *testing.T) {
			ctx := testContext(t)
			g := newWatchedGuest(ctx, t, mm.Anonymous)
			g.watchBy(t, by)
			if err := g.LogDirty(true); err != nil {
				t.Fatal(err)
			}
			g.harvested(ctx, t)
			strayAdvise(t, g.hvas(3, 1), unix.MADV_DONTNEED)
			g.await(t, g.hvas(3, 1))
			if frames := g.harvested(ctx, t); !slices.Contains(frames, gpaOf(3).GFN()) {
				t.Errorf("the harvest has %v, without page 3", frames)
			}
			if v, err := g.Load(ctx, gpaOf(3)); v != 0 || err != nil {
				t.Errorf("the guest reads %d, %v; want 0", v, err)
			}
			if v, err := g.Load(ctx, gpaOf(4)); v != 5 || err != nil {
				t.Errorf("the guest reads %d next to it, %v; want 5", v, err)
			}
		})
	}
}

// harvested returns the frames of the first pages of RAM that are dirty or discarded.
func (g *watchedGuest) harvested(ctx context.Context, t *testing.T) (frames []addr.GFN) {
	t.Helper()
	h, err := g.Harvest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(8) {
		if gfn := gpaOf(i).GFN(); h.Dirty().Contains(gfn) || h.Discarded().Contains(gfn) {
			frames = append(frames, gfn)
		}
	}
	if err := h.Commit(); err != nil {
		t.Error(err)
	}
	return frames
}

// TestStrayPunchUnderGuest punches the file under the guest's memory, which only KVM's
// tracepoint tells of.
func TestStrayPunchUnderGuest(t *testing.T) {
	ctx := testContext(t)
	g := newWatchedGuest(ctx, t, mm.Memfd)
	g.watchBy(t, "trace")
	g.harvested(ctx, t)
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(g.RAM().File().Fd()), mode, 3*addr.PageSize, addr.PageSize); err != nil {
		t.Fatal(err)
	}
	if s := g.await(t, g.hvas(3, 1)); s.Op != mm.OpStrayZap || s.Fate != mm.Stays {
		t.Errorf("reported is %v", s)
	}
	if frames := g.harvested(ctx, t); !slices.Contains(frames, gpaOf(3).GFN()) {
		t.Errorf("the harvest has %v, without page 3", frames)
	}
	if v, err := g.Load(ctx, gpaOf(3)); v != 0 || err != nil {
		t.Errorf("the guest reads %d, %v; want 0", v, err)
	}
}

// TestStrayUnmapUnderGuest unmaps a page of a live slot. The slot is cut and the addresses
// are reserved, so that what the process maps next is not the guest's; and a guest that
// uses the page leaves with an exit that names it and who took it away.
func TestStrayUnmapUnderGuest(t *testing.T) {
	for _, by := range []string{"events", "trace"} {
		t.Run(by, func(t *testing.T) {
			ctx := testContext(t)
			g := newWatchedGuest(ctx, t, mm.Anonymous)
			g.watchBy(t, by)
			strayUnmap(t, g.hvas(3, 1))
			for !g.await(t, g.hvas(3, 1)).Hazard() { // KVM drops what is around the page first
			}
			if s, ok := g.Slots().Lookup(gpaOf(3).GFN()); ok {
				t.Errorf("page 3 is in %v", s)
			}
			if v, err := g.Load(ctx, gpaOf(4)); v != 5 || err != nil {
				t.Errorf("the guest reads %d next to it, %v; want 5", v, err)
			}
			if _, err := g.Load(ctx, gpaOf(3)); err == nil {
				t.Fatal("the guest got its access")
			}
			_, err := g.Wait()
			var exit *ExitError
			if !errors.As(err, &exit) || exit.GPA != gpaOf(3) || !strings.Contains(err.Error(), "stray-") {
				t.Errorf("the run has ended with %v; want %v, and the change that took it", err, gpaOf(3))
			}
		})
	}
}

// TestStrayRemapUnderGuest moves a page to other guest memory, where it is followed.
func TestStrayRemapUnderGuest(t *testing.T) {
	ctx := testContext(t)
	g := newWatchedGuest(ctx, t, mm.Anonymous)
	spare, err := g.Memory().NewRegion(mm.RegionConfig{Name: "elsewhere", Size: addr.PageSize, Reserved: true})
	if err != nil {
		t.Fatal(err)
	}
	g.watchBy(t, "events")
	from := g.hvas(3, 1)
	if _, _, errno := unix.Syscall6(unix.SYS_MREMAP, uintptr(from.Start), addr.PageSize, addr.PageSize, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(spare.Range.Start), 0); errno != 0 {
		t.Fatal(errno)
	}
	if s := g.await(t, from); s.Fate != mm.Moved {
		t.Errorf("reported is %v, want it moved", s)
	}
	if err := g.Add(ctx, gpaOf(3), 10); err != nil {
		t.Fatal(err)
	}
	if v, err := g.Memory().Load64(spare.Range.Start); v != 14 || err != nil {
		t.Errorf("where the page is there is %d, %v; want 14", v, err)
	}
}

// TestStraysUnderBusyGuest discards pages behind the back of a guest that never stops
// storing, while both watches run and others carry out operations. Every page that a
// discard was the last change of is in a harvest that follows it, or was stored to since.
func TestStraysUnderBusyGuest(t *testing.T) {
	ctx := testContext(t)
	const npages = 8
	m := newMachine(t, Config{}, "stamp", guests.Args{"pages": npages})
	g := &watchedGuest{Machine: m, strays: make(chan mm.Stray, 100000)}
	g.watchBy(t, "events")
	endTrace := g.watchBy(t, "trace")
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(40) {
		strayAdvise(t, m.hvas(i%npages, 1), unix.MADV_DONTNEED)
		if err := m.Memory().Discard(m.hvas((i+3)%npages, 1)); err != nil {
			t.Fatal(err)
		}
		if h, err := m.Harvest(ctx); err != nil {
			t.Fatal(err)
		} else if err := h.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	endTrace()
	if ended(m) {
		_, err := m.Wait()
		t.Fatalf("the guest has ended: %v", err)
	}
	byEvent := 0
	for len(g.strays) > 0 {
		switch s := <-g.strays; {
		case s.Err != nil || s.Hazard():
			t.Errorf("reported is %v", s)
		case s.Evidence == mm.Event:
			byEvent++
		}
	}
	if byEvent != 40 {
		t.Errorf("%d changes are known by event, want 40", byEvent)
	}
}
