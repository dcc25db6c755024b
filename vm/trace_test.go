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

	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/trace"
)

// newTraced returns a machine that is recorded, with what the kernel tells.
func newTraced(t testing.TB, c Config, guest string, args guests.Args) *Machine {
	t.Helper()
	gvmtest.Need(t, gvmtest.Tracepoints)
	c.Log = trace.NewLog(1 << 14)
	m := newMachine(t, c, guest, args)
	w, err := m.Memory().WatchTrace(mm.TraceConfig{Report: func(mm.Stray) {}})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		gvmtest.Lack(t, gvmtest.Tracepoints, err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// chain returns the events of page i in the order in which they happened, those of a kind
// and a name in a row as one; and of which operation they are.
func chain(m *Machine, seq uint64, i uint64) (names []string, ops []uint64) {
	m.Memory().Follow()
	events, _ := m.config.Log.Since(seq)
	events = trace.Page(events, gpaOf(i).GFN())
	slices.SortStableFunc(events, func(a, b trace.Event) int { return int(a.When() - b.When()) })
	for _, e := range events {
		name := e.Kind.String()
		switch e.Kind {
		case trace.Kernel, trace.HostOp, trace.Touch:
			name = e.Name
		case trace.Exit:
			continue // it depends on the host how a guest is held
		}
		if n := len(names); n == 0 || names[n-1] != name {
			names, ops = append(names, name), append(ops, e.Op)
		}
	}
	return names, ops
}

// inTurn reports whether names has those of want, in their order.
func inTurn(names []string, want ...string) bool {
	for _, name := range names {
		if len(want) > 0 && slices.Contains(strings.Split(want[0], "|"), name) {
			want = want[1:]
		}
	}
	return len(want) == 0
}

// faultNames are the tracepoints that tell of a guest's fault.
const faultNames = "kvm_page_fault|kvm_mmu_spte_requested"

// TestTraceOfDiscard discards a page under a guest that uses it afterwards, by an operation
// and behind the back of the machine. The trace of the page is all that happened, in its
// order, and of one operation.
func TestTraceOfDiscard(t *testing.T) {
	for _, tt := range []struct {
		name    string
		discard func(t *testing.T, m *Machine)
		want    []string
	}{
		{"operation", func(t *testing.T, m *Machine) {
			if err := m.Memory().Discard(m.hvas(3, 1)); err != nil {
				t.Fatal(err)
			}
		}, []string{"discard", "invalidate-start", "zap", "kvm_unmap_hva_range", "invalidate-end", "host-op-end", faultNames}},
		{"stray", func(t *testing.T, m *Machine) {
			strayAdvise(t, m.hvas(3, 1), unix.MADV_DONTNEED)
			m.Memory().Follow()
		}, []string{"kvm_unmap_hva_range", "stray-zap", "invalidate-start", "zap", "invalidate-end", "host-op-end", faultNames}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := testContext(t)
			m := newTraced(t, Config{}, "probe", nil)
			p := m.Probe(0)
			if err := m.Start(ctx); err != nil {
				t.Fatal(err)
			}
			if err := p.Store(ctx, gpaOf(3), 7); err != nil {
				t.Fatal(err)
			}
			m.Memory().Follow()
			seq := m.config.Log.Len()
			tt.discard(t, m)
			if v, err := p.Load(ctx, gpaOf(3)); v != 0 || err != nil {
				t.Errorf("the guest reads %d, %v", v, err)
			}
			names, ops := chain(m, seq, 3)
			if !inTurn(names, tt.want...) || slices.Min(ops) == 0 || slices.Max(ops) != ops[0] {
				t.Errorf("the trace of the page is %v, of the operations %v; want %v, of one", names, ops, tt.want)
			}
		})
	}
}

// TestTraceOfUnmap takes a page away from a guest that waits for it, and gives it back.
func TestTraceOfUnmap(t *testing.T) {
	ctx := testContext(t)
	m := newTraced(t, Config{Touch: Wait}, "probe", nil)
	p := m.Probe(0)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := p.Store(ctx, gpaOf(3), 7); err != nil {
		t.Fatal(err)
	}
	m.Memory().Follow()
	seq := m.config.Log.Len()
	if err := m.Memory().Unmap(m.hvas(3, 1)); err != nil {
		t.Fatal(err)
	}
	loaded := make(chan error)
	go func() {
		_, err := p.Load(ctx, gpaOf(3))
		loaded <- err
	}()
	waits := func() bool {
		events, _ := m.config.Log.Since(seq)
		return slices.ContainsFunc(events, func(e trace.Event) bool { return e.Kind == trace.Touch })
	}
	if !gvmtest.Eventually(waits) {
		t.Error("the guest does not wait for the page")
	}
	if err := errors.Join(m.Memory().Map(m.hvas(3, 1)), <-loaded); err != nil {
		t.Fatal(err)
	}
	names, ops := chain(m, seq, 3)
	want := []string{"unmap", "invalidate-start", "zap", "hold", "slot-delete", "slot-create", "release", "kvm_unmap_hva_range", "invalidate-end", "host-op-end", trace.Waits,
		"map", "invalidate-start", "zap", "hold", "slot-delete", "slot-create", "release", trace.Resumed}
	if !inTurn(names, want...) {
		t.Errorf("the trace of the page is %v, want %v", names, want)
	}
	if slices.Min(ops) == 0 || len(slices.Compact(slices.Sorted(slices.Values(ops)))) != 2 {
		t.Errorf("the events %v are of the operations %v, want two", names, ops)
	}
}

// BenchmarkRecording times runs of a guest that writes a number of stamps, while the host
// discards a page every now and then: with a recording, and a reader of it, next to without. Reported
// are the shortest run of each kind, and by how much that with a recording is longer.
func BenchmarkRecording(b *testing.B) {
	gvmtest.Need(b, gvmtest.KVM)
	for _, watch := range []Watch{0, WatchTrace} {
		b.Run("watch="+watch.String(), func(b *testing.B) {
			if watch != 0 {
				gvmtest.Need(b, gvmtest.Tracepoints)
			}
			off, on := time.Hour, time.Hour
			for b.Loop() {
				// There and back, so that whatever changes meanwhile changes both.
				off = min(off, runStamp(b, Config{Watch: watch}))
				on = min(on, runStamp(b, Config{Watch: watch, Log: trace.NewLog(1 << 15)}))
				on = min(on, runStamp(b, Config{Watch: watch, Log: trace.NewLog(1 << 15)}))
				off = min(off, runStamp(b, Config{Watch: watch}))
			}
			b.ReportMetric(float64(off), "off-ns/op")
			b.ReportMetric(float64(on), "ns/op")
			b.ReportMetric(100*(float64(on)/float64(off)-1), "cost-%")
		})
	}
}

// runStamp returns how long a stamp ran, from which pages were discarded at equal distances.
func runStamp(b *testing.B, c Config) time.Duration {
	b.Helper()
	const pages, stamps, discards = 64, 5_000_000, 20
	c.OnStray = func(mm.Stray) {}
	m := newMachine(b, c, "stamp", guests.Args{"pages": pages, "limit": stamps})
	for _, kind := range []trace.Kind{trace.Harvest, trace.Kernel, trace.Exit} {
		c.Log.Record(trace.Event{Kind: kind}) // makes the ring, which is done once
	}
	begin := time.Now()
	if err := m.Start(context.Background()); err != nil {
		b.Fatal(err)
	}
	read := gvmtest.Background(func() { // as gvm trace does
		for seq := uint64(0); !gvmtest.ClosedWithin(m.Done(), 10*time.Millisecond); {
			events, lost := c.Log.Since(seq)
			seq += lost + uint64(len(events))
		}
	})
	for i := range uint64(discards) {
		for m.mustLoad(b, guests.ResultGPA(0, 0)) < i*stamps/discards && !ended(m) {
			time.Sleep(time.Millisecond) // a look takes time of the guest's
		}
		if err := m.Memory().Discard(m.hvas(i, 1)); err != nil {
			b.Fatal(err)
		}
	}
	if status, err := m.Wait(); status != 0 || err != nil {
		b.Fatalf("the guest has ended with status %d, %v", status, err)
	}
	took := time.Since(begin)
	<-read
	if err := m.Close(); err != nil {
		b.Fatal(err)
	}
	return took
}
