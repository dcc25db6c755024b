package mm

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/internal/tracefs"
	"github.com/secondmmu/gvm/trace"
)

// otherCalls stand in for KVM's tracepoints of aging and of faults where there is no KVM:
// system calls with the same fields.
var otherCalls = []sightSource{
	{zapSource: zapSource{system: "syscalls", name: "sys_enter_msync", start: "start", length: "len"}},
	{zapSource: zapSource{system: "syscalls", name: "sys_enter_brk", start: "brk"}},
	{zapSource: zapSource{system: "syscalls", name: "sys_enter_getsid"}, gfn: "pid"},
	{zapSource: zapSource{system: "syscalls", name: "sys_enter_getpgid"}, gpa: "pid"},
	{zapSource: zapSource{system: "syscalls", name: "no_such_tracepoint", start: "start"}},
	{zapSource: zapSource{system: "syscalls", name: "sys_enter_mincore", start: "no_such_field"}},
}

// recorded returns what the log has recorded since the event seq.
func (w *bed) recorded(seq uint64, is func(trace.Event) bool) (events []trace.Event) {
	all, _ := w.log.Since(seq)
	for _, e := range all {
		if is(e) {
			events = append(events, e)
		}
	}
	return events
}

// within reports an error unless e happened in the operation that it belongs to.
func within(e trace.Event, all []trace.Event) error {
	i := slices.IndexFunc(all, func(o trace.Event) bool { return o.Kind == trace.HostOp && o.Op == e.Op })
	j := slices.IndexFunc(all, func(o trace.Event) bool { return o.Kind == trace.HostOpEnd && o.Op == e.Op })
	if i < 0 || j < 0 || e.At < all[i].Time || e.At > all[j].Time {
		return fmt.Errorf("%+v happened at %v, and is of an operation of %v", e, e.At, all)
	}
	return nil
}

// TestKernelLane has operations and others change memory, and wants to have in the log what
// the tracepoints that stand in for KVM's tell of it: each with the number of the operation
// that it is a part of, or that follows it, and at the time when it was.
func TestKernelLane(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	w := newBed(t, Anonymous)
	tw, err := w.watchTrace(TraceConfig{Report: func(s Stray) { w.strays <- s }}, adviceCalls, otherCalls...)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		gvmtest.Lack(t, gvmtest.Tracepoints, err)
	} else if err != nil {
		t.Fatal(err)
	}
	gfn := func(i uint64) int { return int(firstGFN) + int(i) }
	seq := w.log.Len()
	if err := w.Discard(part(w.ram, 0, 2)); err != nil {
		t.Fatal(err)
	}
	_, _ = unix.Getsid(gfn(1)) // the guest uses page 1, after the discard
	before := time.Since(w.log.Start())
	if err := rawAdvise(part(w.ram, 3, 2), unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	after := time.Since(w.log.Start())
	if s := w.next(t); s.Op != OpStrayZap {
		t.Fatalf("reported is %v", s)
	}
	_, _ = unix.Getpgid(gfn(4) << addr.PageShift)
	_, _ = unix.Getsid(gfn(6)) // nobody has had to do with it
	if !occupied(part(w.ram, 5, 1)) || occupied(addr.HVARange{Start: 0, End: addr.PageSize}) {
		t.Error("pages are not where they are")
	}
	unix.Syscall(unix.SYS_BRK, uintptr(part(w.ram, 7, 1).Start)+8, 0, 0) // fails
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}

	all := w.recorded(seq, func(trace.Event) bool { return true })
	var got []string
	for _, e := range all {
		switch e.Kind {
		case trace.HostOp:
			got = append(got, fmt.Sprintf("#%d %s %v", e.Op, e.Name, e.HVA))
		case trace.Kernel:
			e.Name = strings.TrimPrefix(e.Name, "sys_enter_")
			got = append(got, fmt.Sprintf("#%d kernel %s %s", e.Op, e.Name, e.Where()))
			if e.At == 0 || e.At > e.Time {
				t.Errorf("%+v happened at %v", e, e.At)
			}
			switch {
			case e.Name == "madvise" && e.Op == 1:
				if err := within(e, all); err != nil {
					t.Error(err)
				}
			case e.Name == "madvise" && (e.At < before || e.At > after):
				t.Errorf("%+v happened at %v, and the call was from %v to %v", e, e.At, before, after)
			}
		}
	}
	// What is not followed is in the log some time.
	slices.Sort(got)
	page := func(i uint64) string { return fmt.Sprintf("gfn [%#x, %#x)", gfn(i), gfn(i)+1) }
	want := []string{
		"#0 kernel brk " + part(w.ram, 7, 1).String(),
		"#0 kernel getsid " + page(6),
		"#0 kernel msync " + part(w.ram, 3, 2).String(), // the watch's own look, whether they are mapped
		"#0 kernel msync " + part(w.ram, 5, 1).String(),
		"#1 discard " + part(w.ram, 0, 2).String(),
		"#1 kernel getsid " + page(1),
		"#1 kernel madvise " + part(w.ram, 0, 2).String(),
		"#2 kernel getpgid " + page(4),
		"#2 kernel madvise " + part(w.ram, 3, 2).String(),
		"#2 stray-zap " + part(w.ram, 3, 2).String(),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("recorded is (-want +got):\n%s", diff)
	}
	// The trace of a page is the whole chain.
	got = nil
	for _, e := range trace.Page(all, firstGFN+4) {
		got = append(got, e.Kind.String())
	}
	slices.Sort(got)
	if want := "[host-op host-op-end invalidate-end invalidate-start kernel kernel zap]"; fmt.Sprint(got) != want {
		t.Errorf("of page 4 there are %v, want %s", got, want)
	}
}

// TestKernelLaneWithoutLog: without a log nothing is looked at but what is followed.
func TestKernelLaneWithoutLog(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	w := newBed(t, Anonymous)
	w.log = nil
	tw, err := w.watchTrace(TraceConfig{Report: func(s Stray) { w.strays <- s }}, adviceCalls, otherCalls...)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		gvmtest.Lack(t, gvmtest.Tracepoints, err)
	} else if err != nil {
		t.Fatal(err)
	}
	if tw.sights != nil {
		t.Error("tracepoints are open that nobody has use for")
	}
	if err := rawAdvise(part(w.ram, 3, 2), unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if s := w.reported(t, tw); len(s) != 1 {
		t.Errorf("reported is %v", s)
	}
}

// TestLostSights has more be seen than there is room for: how much is lost is in the log, and
// nothing follows from it.
func TestLostSights(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	w := newBed(t, Anonymous)
	w.log = trace.NewLog(1 << 17)
	tw, err := w.watchTrace(TraceConfig{Report: func(s Stray) { w.strays <- s }}, adviceCalls, otherCalls...)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		gvmtest.Lack(t, gvmtest.Tracepoints, err)
	} else if err != nil {
		t.Fatal(err)
	}
	const n = 4 * ringPages * addr.PageSize / 64
	tw.sights.mu.Lock() // nobody reads
	for range n {
		_, _ = unix.Getsid(1 << 30)
	}
	tw.sights.mu.Unlock()
	if strays := w.reported(t, tw); len(strays) != 0 {
		t.Errorf("reported is %v", strays)
	}
	seen, lost := uint64(0), uint64(0)
	for _, e := range w.recorded(0, func(e trace.Event) bool { return e.Kind == trace.Kernel }) {
		if e.Name == trace.KernelLost {
			lost += e.Pages
		} else {
			seen++
		}
	}
	if lost == 0 || seen+lost < n || seen+lost > n+n/10 { // others may ask for numbers
		t.Errorf("%d were seen and %d lost, of %d", seen, lost, n)
	}
}

// TestLogClock compares the log's time with the clock that the kernel tells times by.
func TestLogClock(t *testing.T) {
	old := perf.Now()
	time.Sleep(time.Millisecond)
	start := time.Now()
	c := perf.NewClock(start)
	const closeBy = 20 * time.Microsecond // a look at a clock takes less than one, if it is not interrupted
	if !gvmtest.Eventually(func() bool {
		before := time.Since(start)
		at := momentOf(c, perf.Now())
		after := time.Since(start)
		return before-closeBy <= at && at <= after+closeBy && after-before < 10*closeBy
	}) {
		t.Errorf("the two clocks differ by more than %v", closeBy)
	}
	if at := momentOf(c, old); at != 1 {
		t.Errorf("what was before the log was made was at %v, want 1 ns", at)
	}
}

// TestSightEvent: a record that is too short tells of nothing, nor does a fault of another
// process.
func TestSightEvent(t *testing.T) {
	first, second := tracefs.Field{Name: "a", Size: 8}, tracefs.Field{Name: "b", Offset: 8, Size: 8}
	ranges := sight{sightSource: sightSource{zapSource: zapSource{name: "r", start: "a", end: "b"}}, first: first, second: second}
	one := sight{sightSource: sightSource{zapSource: zapSource{name: "o", start: "a"}}, first: first}
	gfn := sight{sightSource: sightSource{zapSource: zapSource{name: "f"}, gfn: "a"}, first: first}
	raw := append(append([]byte{1, 0x20, 0, 0, 0, 0, 0, 0}, 1, 0x40), make([]byte, 6)...)
	us := unix.Getpid()
	for _, tt := range []struct {
		p    sight
		rec  perf.Record
		want string
	}{
		{ranges, perf.Record{Raw: raw}, "r hva [0x2000, 0x5000)"},
		{ranges, perf.Record{Raw: raw[:15]}, ""},
		{one, perf.Record{Raw: raw[:8]}, "o hva [0x2000, 0x3000)"},
		{gfn, perf.Record{Raw: raw[:8], PID: us}, "f gfn [0x2001, 0x2002)"},
		{gfn, perf.Record{Raw: raw[:7], PID: us}, ""},
		{gfn, perf.Record{Raw: raw[:8], PID: us + 1}, ""},
	} {
		e, ok := tt.p.event(&tt.rec)
		if got := e.Name + " " + e.Where(); ok != (tt.want != "") || ok && got != tt.want {
			t.Errorf("%+v tells of %q, %t; want %q", tt.rec, got, ok, tt.want)
		}
	}
}

// TestMessagesInTheLog: what a userfaultfd tells of is in the log, with the number of the
// operation that caused it, or of the one that follows it.
func TestMessagesInTheLog(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	seq := w.log.Len()
	if err := errors.Join(w.Discard(part(w.ram, 0, 2)), rawAdvise(part(w.ram, 3, 2), unix.MADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	w.next(t)
	if err := errors.Join(w.Unmap(part(w.ram, 5, 1)), w.events.Close()); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range w.recorded(seq, func(e trace.Event) bool { return e.Kind == trace.Kernel }) {
		ops := w.recorded(seq, func(o trace.Event) bool { return o.Op == e.Op && o.Kind == trace.HostOp })
		for _, o := range ops {
			got = append(got, fmt.Sprintf("%s %v: %s %v", e.Name, e.HVA, o.Name, o.HVA))
		}
		if len(ops) != 1 {
			t.Errorf("%+v belongs to %v", e, ops)
		}
	}
	want := []string{
		fmt.Sprintf("uffd-remove %v: discard %[1]v", part(w.ram, 0, 2)),
		fmt.Sprintf("uffd-remove %v: stray-remove %[1]v", part(w.ram, 3, 2)),
		fmt.Sprintf("uffd-unmap %v: unmap %[1]v", part(w.ram, 5, 1)),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("recorded is (-want +got):\n%s", diff)
	}
}

// TestZapOfEventInTheLog has both watches: a zap that an event explains has the number of the
// operation that followed the event.
func TestZapOfEventInTheLog(t *testing.T) {
	w := newBed(t, Anonymous)
	w.log = trace.NewLog(1000)
	tw := w.trace(t, adviceCalls)
	w.as.Lock()
	z := zap{perf.Now(), part(w.ram, 5, 1)}
	id := w.log.NewOp()
	w.followed = id
	w.made(Stray{Change: Change{Op: OpStrayRemove, Range: z.r}, Evidence: Event}, nil, nil)
	w.followed = 0
	op, ok := tw.calls.explain(z)
	w.as.Unlock()
	if op != id || !ok {
		t.Errorf("it belongs to operation %d, %t; want %d", op, ok, id)
	}
	w.reported(t, tw)
}
