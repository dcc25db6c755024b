package mm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/notifier"
)

// adviceCalls stands in for KVM's tracepoint where there is no KVM: it has the same
// fields, says of advice what that says of a zap, and comes a moment before the change.
var adviceCalls = zapSource{system: "syscalls", name: "sys_enter_madvise", start: "start", length: "len_in"}

// trace watches the memory by a tracepoint.
func (w *bed) trace(t testing.TB, source zapSource) *TraceWatch {
	t.Helper()
	gvmtest.Need(t, gvmtest.Tracepoints)
	tw, err := w.watchTrace(TraceConfig{Report: func(s Stray) { w.strays <- s }}, source)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		gvmtest.Lack(t, gvmtest.Tracepoints, err)
	} else if err != nil {
		t.Fatal(err)
	}
	return tw
}

// reported returns what a watch that has been closed has reported.
func (w *bed) reported(t testing.TB, tw *TraceWatch) (strays []Stray) {
	t.Helper()
	if err := tw.Close(); err != nil {
		t.Error(err)
	}
	for len(w.strays) > 0 {
		s := <-w.strays
		if s.Evidence == Trace && (!s.Late || s.Err != nil && s.Op != OpStrayGap) {
			t.Errorf("reported is %v, with error %v; want it late", s, s.Err)
		}
		strays = append(strays, s)
	}
	return strays
}

// TestStrayAdviceIsTraced follows the tracepoint that stands in for KVM's: what others do
// is reported and recorded, and what operations do is not.
func TestStrayAdviceIsTraced(t *testing.T) {
	w := newBed(t, Anonymous)
	tw := w.trace(t, adviceCalls)
	if err := errors.Join(w.Discard(part(w.ram, 0, 2)), rawAdvise(part(w.ram, 3, 2), unix.MADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	strays := w.reported(t, tw)
	if len(strays) != 1 || strays[0].Op != OpStrayZap || strays[0].Range != part(w.ram, 3, 2) || strays[0].Content != notifier.Changed {
		t.Errorf("reported is %v, want the zap of %v", strays, part(w.ram, 3, 2))
	}
	if got, want := w.state(t), "0z 0z 3 0d 0d 6 7 8"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
	if err := tw.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a second Close: %v, want %v", err, os.ErrClosed)
	}
}

// TestTracedByWhatEventsSay has both watches: what the kernel has told of is not followed
// again, and content that must have been told of otherwise is kept.
func TestTracedByWhatEventsSay(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	tw := w.trace(t, adviceCalls)
	before := perf.Now()
	if err := rawAdvise(part(w.ram, 5, 1), unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	s := w.next(t)
	for s.Evidence != Event { // the stand-in comes before the change, and may be followed before it
		s = w.next(t)
	}
	if s.Op != OpStrayRemove || s.Content != notifier.Zeroed {
		t.Errorf("reported is %v, want %v of zeroed memory", s, OpStrayRemove)
	}
	w.as.Lock()
	for _, tt := range []struct {
		zap  zap
		want bool
	}{
		{zap{before, part(w.ram, 5, 1)}, true},
		{zap{before, part(w.ram, 5, 2)}, false},
		{zap{perf.Now(), part(w.ram, 5, 1)}, false},
	} {
		if _, got := tw.calls.explain(tt.zap); got != tt.want {
			t.Errorf("the event explains %+v: %t, want %t", tt.zap, got, tt.want)
		}
	}
	w.as.Unlock()
	if err := rawAdvise(part(w.ram, 3, 2), unix.MADV_COLD); err != nil { // as if the kernel had moved the pages
		t.Fatal(err)
	}
	if err := rawAdvise(part(w.ram, 5, 1), unix.MADV_COLD); err != nil { // and dropped one
		t.Fatal(err)
	}
	contents := map[notifier.Content]addr.HVARange{}
	for _, s := range w.reported(t, tw) {
		contents[s.Content] = s.Range
	}
	want := map[notifier.Content]addr.HVARange{notifier.Kept: part(w.ram, 3, 2), notifier.Changed: part(w.ram, 5, 1)}
	if contents[notifier.Changed] != want[notifier.Changed] || !want[notifier.Kept].Overlaps(contents[notifier.Kept]) {
		t.Errorf("reported is %v, want %v", contents, want)
	}
	if got, want := w.state(t), "1 2 3 4 5 0dz 7 8"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
}

// TestTraceGap has more happen than the ring has room for, while nobody can read it. What
// was lost could be anything.
func TestTraceGap(t *testing.T) {
	w := newBed(t, Anonymous)
	tw := w.trace(t, adviceCalls)
	w.as.Lock()
	for range 4 * ringPages * addr.PageSize / 64 {
		if err := rawAdvise(part(w.ram, 9, 1), unix.MADV_COLD); err != nil {
			t.Error(err)
			break
		}
	}
	w.as.Unlock()
	strays := w.reported(t, tw)
	if len(strays) == 0 || strays[0].Op != OpStrayGap || strays[0].Range != w.ram.Range || strays[0].Err == nil {
		t.Errorf("reported is %v, want a gap in all of %v", strays, w.ram)
	}
	if got, want := w.state(t), "1d 2d 3d 4d 5d 6d 7d 8d"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
}

func TestWatchTraceEnds(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	m := New(nil)
	if _, err := m.watchTrace(TraceConfig{}, adviceCalls); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a watch of no region: %v, want EINVAL", err)
	}
	r, err := m.NewRegion(RegionConfig{Name: "ram", Size: pages * addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	w, err := m.watchTrace(TraceConfig{Report: func(Stray) {}}, adviceCalls)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		gvmtest.Lack(t, gvmtest.Tracepoints, errors.Join(err, m.Close()))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.watchTrace(TraceConfig{}, adviceCalls); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a second watch: %v, want EBUSY", err)
	}
	m.as.Lock()
	if err := rawAdvise(r.Range, unix.MADV_COLD); err != nil { // is pending
		t.Error(err)
	}
	m.as.Unlock()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close after the end of the memory: %v", err)
	}
	if _, err := m.watchTrace(TraceConfig{}, adviceCalls); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a watch of a closed memory: %v, want %v", err, os.ErrClosed)
	}
	missing := adviceCalls
	missing.name = "no_such_tracepoint"
	m, _ = newMemory(t, RegionConfig{})
	if _, err := m.watchTrace(TraceConfig{}, missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without the tracepoint: %v, want %v", err, fs.ErrNotExist)
	}
}

// needVM makes a VM of this process, without which KVM is told of nothing.
func needVM(t testing.TB) {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	const createVM = 0xAE01
	vm, err := unix.IoctlRetInt(kvm, createVM)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(vm); unix.Close(kvm) })
}

// tracedPages is what the guest has in pages 3 and 4 after a call of strayCalls that only
// a trace watch followed; "-": nothing is reported of them; "": that is not looked at.
var tracedPages = map[string]string{
	"DONTNEED of anonymous memory":           "0d 0d",
	"DONTNEED of shared memory":              "4d 5d",
	"DONTNEED of copies of a file":           "0d 0d",
	"FREE":                                   "4d 5d",
	"REMOVE":                                 "0d 0d",
	"munmap":                                 ".z .z",
	"munmap of more than guest memory":       ".z .z",
	"MAP_FIXED over":                         "0d 0d",
	"mremap to elsewhere":                    ".z .z",
	"mremap to other guest memory":           ".z .z",
	"mremap DONTUNMAP to other guest memory": "0d 0d",
	"mremap DONTUNMAP to elsewhere":          "0d 0d",
	"mremap into guest memory":               "0d 0d",
	"mprotect":                               "",
	"GUARD_INSTALL":                          "",
	"PUNCH_HOLE":                             "0d 0d",
	"ftruncate":                              "",
	"a store":                                "-",
	"MAP_FIXED over the first of two pages that were unmapped before it was read": "0d .z",
}

// TestStrayZaps makes the changes of strayCalls with a VM in the process, and compares what
// the tracepoint told of with the table above. Of the pages around more may be told: KVM
// drops 2 MiB where the kernel splits a mapping.
func TestStrayZaps(t *testing.T) {
	needVM(t)
	for _, tt := range strayCalls {
		want, ok := tracedPages[tt.name]
		if !ok {
			continue // it depends on the machine
		}
		for _, backing := range tt.backings {
			t.Run(tt.name+"/"+backing.String(), func(t *testing.T) {
				w := newBed(t, backing)
				tw := w.trace(t, kvmZaps)
				r := part(w.ram, 3, 2)
				if err := tt.call(t, w, r); errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
					gvmtest.Lack(t, gvmtest.Advice, err)
				} else if err != nil {
					t.Fatal(err)
				}
				strays := w.reported(t, tw)
				told := false
				for _, s := range strays {
					told = told || s.Range.Overlaps(r)
				}
				if told == (want == "-") {
					t.Errorf("reported is %v", strays)
				}
				if want == "" || want == "-" {
					return
				}
				if got := strings.Join(strings.Fields(w.state(t))[3:5], " "); got != want && got != strings.ReplaceAll(want, "z", "dz") {
					t.Errorf("the guest has %q in the two pages, want %q; reported is %v", got, want, strays)
				}
			})
		}
	}
}

// TestOwnOperationsAreNotTraced carries every operation out with a VM in the process: what
// KVM drops for it is not taken for somebody else's change.
func TestOwnOperationsAreNotTraced(t *testing.T) {
	needVM(t)
	for _, backing := range everyKind {
		for op := range operations(nil, &Region{}, addr.HVARange{}, &Region{}) {
			t.Run(fmt.Sprintf("%v of %v", op, backing), func(t *testing.T) {
				w := newBed(t, backing)
				tw := w.trace(t, kvmZaps)
				if err := operations(w.Memory, w.ram, part(w.ram, 3, 2), w.spare)[op](); err != nil {
					var failed *Error
					if !errors.As(err, &failed) || failed.Made {
						t.Error(err)
					}
				}
				for _, s := range w.reported(t, tw) {
					if op == OpPopulate { // it opens no bracket, and a page that it breaks from its file is a change
						continue
					}
					t.Errorf("reported is %v", s)
				}
			})
		}
	}
}

// TestZapsByWhatEventsSay has both watches, with KVM's tracepoint, and wants what events
// tell of once, by them.
func TestZapsByWhatEventsSay(t *testing.T) {
	needVM(t)
	for _, tt := range strayCalls {
		if len(tt.reports) == 0 || tt.state == "" {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			w := newWatched(t, tt.backings[0], EventConfig{})
			tw := w.trace(t, kvmZaps)
			r := part(w.ram, 3, 2)
			if tt.foreign {
				defer func() {
					if err := w.Map(r); err != nil {
						t.Error(err)
					}
				}()
			}
			if err := tt.call(t, w, r); err != nil {
				t.Fatal(err)
			}
			byEvent := 0
			for deadline := time.Now().Add(gvmtest.Limit); byEvent < len(tt.reports) && time.Now().Before(deadline); {
				if s := w.next(t); s.Evidence == Event {
					byEvent++
				}
			}
			for _, s := range w.reported(t, tw) {
				if s.Evidence == Event || s.Hazard() {
					t.Errorf("reported is also %v", s)
				}
			}
			plain := strings.NewReplacer("d", "", "z", "").Replace
			if got := w.state(t); plain(got) != plain(tt.state) {
				t.Errorf("the guest has %q, want %q, or more of it dirty", got, tt.state)
			}
		})
	}
}
