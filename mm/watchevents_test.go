package mm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/hostmem"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
)

// bed is a memory with a guest that has no KVM: slots and translations of its first
// region, the content of whose pages is their number, from 1.
type bed struct {
	*Memory
	ram, spare *Region
	tracker    *shadow.Tracker
	events     *EventWatch
	strays     chan Stray
}

// slotsOnly is a backend whose slots nobody uses.
type slotsOnly struct{}

func (slotsOnly) Hold()                                    {}
func (slotsOnly) Release()                                 {}
func (slotsOnly) CreateSlot(shadow.Slot) error             { return nil }
func (slotsOnly) DeleteSlot(shadow.Slot) error             { return nil }
func (slotsOnly) DirtyLog([]shadow.Slot, *dirty.Set) error { return nil }
func (slotsOnly) ChangeSlot(_, _ shadow.Slot) error        { return nil }

const (
	shown    = 8 // pages of ram that the tests look at
	firstGFN = addr.GFN(0x1000)
)

func newBed(t testing.TB, backing Backing) *bed {
	t.Helper()
	w := &bed{strays: make(chan Stray, 10000)}
	w.Memory, w.ram = newMemory(t, RegionConfig{Backing: backing})
	w.log = trace.NewLog(1000)
	var err error
	if w.spare, err = w.NewRegion(RegionConfig{Name: "spare", Size: pages * addr.PageSize, Reserved: true}); err != nil {
		t.Fatal(err)
	}
	w.tracker = shadow.NewTracker(w.Memory, slotsOnly{}, 64, w.log)
	if err := w.as.Register(context.Background(), w.tracker); err != nil {
		t.Fatal(err)
	}
	w.as.Lock()
	err = w.tracker.AddWindow(shadow.Window{Name: "ram", GFN: firstGFN, NPages: pages, HVA: w.ram.Range.Start})
	w.as.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(pages) {
		if err := w.tracker.Table().Store64((firstGFN + addr.GFN(i)).GPA(), i+1); err != nil {
			t.Fatal(err)
		}
	}
	w.state(t) // harvests that
	t.Cleanup(func() {
		if err := w.tracker.Check(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// newWatched returns a tracked memory with an event watch.
func newWatched(t testing.TB, backing Backing, c EventConfig) *bed {
	t.Helper()
	gvmtest.Need(t, gvmtest.UFFD)
	w := newBed(t, backing)
	if c.Report == nil {
		c.Report = func(s Stray) { w.strays <- s }
	}
	c.settle = 60 * time.Millisecond // the thread that discards may be off its processor
	var err error
	if w.events, err = w.WatchEvents(c); errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EPERM) {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	} else if err != nil {
		t.Fatal(err)
	}
	return w
}

// next waits for a report.
func (w *bed) next(t testing.TB) Stray {
	t.Helper()
	select {
	case s := <-w.strays:
		return s
	case <-time.After(gvmtest.Limit):
		t.Fatal("nothing is reported")
		return Stray{}
	}
}

// state tells of the first pages what the guest has there, "." for no slot, and what the
// dirty log says of the page since the last time: d for dirty, z for discarded.
func (w *bed) state(t testing.TB) string {
	t.Helper()
	h, err := w.tracker.Harvest(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Commit()
	var says []string
	for gfn := firstGFN; gfn < firstGFN+shown; gfn++ {
		s := "."
		if _, ok := w.tracker.Slots().Lookup(gfn); ok {
			v, err := w.tracker.Table().Load64(gfn.GPA())
			if err != nil {
				t.Errorf("%v: %v", gfn, err)
			}
			s = fmt.Sprint(v)
		}
		if h.Dirty().Contains(gfn) {
			s += "d"
		}
		if h.Discarded().Contains(gfn) {
			s += "z"
		}
		says = append(says, s)
	}
	return strings.Join(says, " ")
}

// rawCall makes a system call that the memory knows nothing of.
func rawCall(number uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

func rawAdvise(r addr.HVARange, advice int) error {
	return rawCall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), uintptr(advice))
}

func rawUnmap(r addr.HVARange) error {
	return rawCall(unix.SYS_MUNMAP, uintptr(r.Start), uintptr(r.Bytes()))
}

func rawMap(r addr.HVARange, flags uintptr) error {
	return rawCall(unix.SYS_MMAP, uintptr(r.Start), uintptr(r.Bytes()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED|flags, ^uintptr(0))
}

func rawMove(from addr.HVARange, to addr.HVA, flags uintptr) error {
	return rawCall(unix.SYS_MREMAP, uintptr(from.Start), uintptr(from.Bytes()), uintptr(from.Bytes()), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED|flags, uintptr(to))
}

// outside returns n pages of addresses that are not guest memory.
func outside(t testing.TB, n uint64) addr.HVARange {
	t.Helper()
	r, err := mmap(addr.HVAs(0, n*addr.PageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { munmap(addr.HVAs(r, n*addr.PageSize)) })
	return addr.HVAs(r, n*addr.PageSize)
}

// strayCall is a change that somebody makes to pages 3 and 4 of ram, and what can be known
// of it.
type strayCall struct {
	name     string
	backings []Backing
	call     func(t *testing.T, w *bed, r addr.HVARange) error
	reports  []string // op, fate and content of each that the kernel tells of; empty: it tells nothing
	state    string   // afterwards; "": it is not followed, and what the guest has is not known
	foreign  bool     // it leaves a mapping behind
}

var (
	anonymous = []Backing{Anonymous}
	sharedMem = []Backing{Memfd, SharedAnonymous, File}
	fileCopy  = []Backing{MemfdPrivate, FilePrivate}
	everyKind = []Backing{Anonymous, Memfd, SharedAnonymous, MemfdPrivate, File, FilePrivate}
)

// strayCalls is what an event watch sees of the calls that change mappings, and what it
// does not see.
var strayCalls = []strayCall{
	{"DONTNEED of anonymous memory", anonymous, advise(unix.MADV_DONTNEED), []string{"stray-remove stays zeroed"}, "1 2 3 0z 0z 6 7 8", false},
	{"DONTNEED of shared memory", sharedMem, advise(unix.MADV_DONTNEED), []string{"stray-remove stays changed"}, "1 2 3 4d 5d 6 7 8", false},
	{"DONTNEED of copies of a file", fileCopy, advise(unix.MADV_DONTNEED), []string{"stray-remove stays changed"}, "1 2 3 0d 0d 6 7 8", false},
	{"FREE", anonymous, advise(unix.MADV_FREE), []string{"stray-remove stays changed"}, "1 2 3 4d 5d 6 7 8", false},
	{"REMOVE", sharedMem[:2], advise(unix.MADV_REMOVE), []string{"stray-remove stays changed"}, "1 2 3 0d 0d 6 7 8", false},
	{"munmap", everyKind, func(_ *testing.T, _ *bed, r addr.HVARange) error { return rawUnmap(r) },
		[]string{"stray-unmap reserved gone"}, "1 2 3 .z .z 6 7 8", false},
	{"munmap of more than guest memory", everyKind, func(_ *testing.T, w *bed, r addr.HVARange) error {
		return rawUnmap(addr.HVARange{Start: r.Start, End: w.ram.reserved.End})
	}, []string{"stray-unmap reserved gone"}, "1 2 3 .z .z .z .z .z", false},
	{"MAP_FIXED over", everyKind, func(_ *testing.T, _ *bed, r addr.HVARange) error { return rawMap(r, 0) },
		[]string{"stray-unmap foreign gone"}, "1 2 3 .z .z 6 7 8", true},
	{"MAP_FIXED over the first of two pages that were unmapped before it was read", anonymous, func(t *testing.T, w *bed, r addr.HVARange) error {
		w.as.RLock() // nothing is followed yet
		defer w.as.RUnlock()
		half := addr.HVAs(r.Start, addr.PageSize)
		return errors.Join(rawUnmap(r), rawMap(half, unix.MAP_FIXED_NOREPLACE))
	}, []string{"stray-unmap foreign gone", "stray-unmap reserved gone"}, "1 2 3 .z .z 6 7 8", true},
	{"mremap to elsewhere", everyKind, func(t *testing.T, _ *bed, r addr.HVARange) error {
		return rawMove(r, outside(t, r.NPages()).Start, 0)
	}, []string{"stray-remap reserved gone"}, "1 2 3 .z .z 6 7 8", false},
	{"mremap to other guest memory", everyKind, func(_ *testing.T, w *bed, r addr.HVARange) error {
		return rawMove(r, part(w.spare, 1, 1).Start, 0)
	}, []string{"stray-remap moved changed"}, "1 2 3 4d 5d 6 7 8", false},
	{"mremap DONTUNMAP to other guest memory", anonymous, func(_ *testing.T, w *bed, r addr.HVARange) error {
		return rawMove(r, part(w.spare, 1, 1).Start, unix.MREMAP_DONTUNMAP)
	}, []string{"stray-remap stays changed"}, "1 2 3 0z 0z 6 7 8", false},
	{"mremap DONTUNMAP to elsewhere", anonymous, func(t *testing.T, _ *bed, r addr.HVARange) error {
		return rawMove(r, outside(t, r.NPages()).Start, unix.MREMAP_DONTUNMAP)
	}, []string{"stray-remap stays zeroed"}, "1 2 3 0z 0z 6 7 8", false},
	{"mremap into guest memory", everyKind, func(t *testing.T, _ *bed, r addr.HVARange) error {
		return rawMove(outside(t, r.NPages()), r.Start, 0)
	}, []string{"stray-unmap foreign gone"}, "1 2 3 .z .z 6 7 8", true},

	// What the kernel does not tell of.
	{"mprotect", everyKind, func(_ *testing.T, _ *bed, r addr.HVARange) error {
		return rawCall(unix.SYS_MPROTECT, uintptr(r.Start), uintptr(r.Bytes()), unix.PROT_NONE)
	}, nil, "", false},
	{"PAGEOUT", everyKind, advise(unix.MADV_PAGEOUT), nil, "1 2 3 4 5 6 7 8", false},
	{"GUARD_INSTALL", everyKind, advise(unix.MADV_GUARD_INSTALL), nil, "", false},
	{"PUNCH_HOLE", []Backing{Memfd, File}, func(_ *testing.T, w *bed, r addr.HVARange) error {
		return unix.Fallocate(int(w.ram.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(r.Start-w.ram.Range.Start), int64(r.Bytes()))
	}, nil, "1 2 3 0 0 6 7 8", false},
	{"ftruncate", []Backing{Memfd, MemfdPrivate, File, FilePrivate}, func(_ *testing.T, w *bed, r addr.HVARange) error {
		return w.ram.file.Truncate(int64(r.Start - w.ram.Range.Start))
	}, nil, "", false},
	{"a store", everyKind, func(_ *testing.T, _ *bed, r addr.HVARange) error { return hostmem.Store64(r.Start, 40) },
		nil, "1 2 3 40 5 6 7 8", false},
	{"a protection key, a lock, advice that changes nothing", everyKind, func(_ *testing.T, _ *bed, r addr.HVARange) error {
		return errors.Join(rawAdvise(r, unix.MADV_COLD), rawAdvise(r, unix.MADV_DONTDUMP), rawCall(unix.SYS_MLOCK, uintptr(r.Start), uintptr(r.Bytes())))
	}, nil, "1 2 3 4 5 6 7 8", false},
}

func advise(advice int) func(*testing.T, *bed, addr.HVARange) error {
	return func(_ *testing.T, _ *bed, r addr.HVARange) error { return rawAdvise(r, advice) }
}

// TestStrayEvents makes every change behind the back of a memory, and compares what is
// reported, what the guest has, and what the dirty log says, with the table.
func TestStrayEvents(t *testing.T) {
	for _, tt := range strayCalls {
		t.Run(tt.name, func(t *testing.T) {
			for _, backing := range tt.backings {
				t.Run(backing.String(), func(t *testing.T) { tt.run(t, backing) })
			}
		})
	}
}

func (tt strayCall) run(t *testing.T, backing Backing) {
	w := newWatched(t, backing, EventConfig{})
	r := part(w.ram, 3, 2)
	if tt.foreign {
		t.Cleanup(func() { // before the memory is closed, which would leave it
			if err := w.Map(r); err != nil {
				t.Error(err)
			}
		})
	}
	if err := tt.call(t, w, r); errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		gvmtest.Lack(t, gvmtest.Advice, err)
	} else if err != nil {
		t.Fatal(err)
	}
	var got []string
	for range tt.reports {
		s := w.next(t)
		got = append(got, fmt.Sprintf("%v %v %v", s.Op, s.Fate, s.Content))
		if s.Err != nil || s.Evidence != Event || s.Seq == 0 {
			t.Errorf("reported is %v, with error %v", s, s.Err)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, tt.reports) {
		t.Errorf("reported is %q, want %q", got, tt.reports)
	}
	if tt.state != "" {
		if state := w.state(t); state != tt.state {
			t.Errorf("afterwards the guest has %q, want %q", state, tt.state)
		}
	}
	// The next report is of the next change: there was no other one.
	if err := rawAdvise(part(w.ram, 9, 1), unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if s := w.next(t); s.Range != part(w.ram, 9, 1) || s.Op != OpStrayRemove {
		t.Errorf("another report: %v", s)
	}
}

// TestFollow has what was changed before it followed and reported when it returns, whoever
// does it, and waits for nothing where there is no watch. Messages are read without a bracket,
// which would have the change followed before its thread goes on.
func TestFollow(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{patience: 1})
	for i := range uint64(200) {
		r := part(w.ram, i%shown, 1)
		if err := rawAdvise(r, unix.MADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		w.Follow()
		select {
		case s := <-w.strays:
			if s.Range != r {
				t.Fatalf("reported is %v, want one of %v", s, r)
			}
		default:
			t.Fatalf("the discard of %v is not reported when Follow has returned", r)
		}
	}
	if err := w.events.Close(); err != nil {
		t.Fatal(err)
	}
	w.Follow()
}

// TestStrayRemoveOfAlias frees shared memory by way of a mapping that no guest has: what
// shows the same elsewhere has changed.
func TestStrayRemoveOfAlias(t *testing.T) {
	w := newWatched(t, Memfd, EventConfig{})
	alias := part(w.spare, 0, 1)
	if err := w.RemapKeep(part(w.ram, 3, 1), alias.Start); err != nil {
		t.Fatal(err)
	}
	w.state(t) // harvests that
	if err := rawAdvise(alias, unix.MADV_REMOVE); err != nil {
		t.Fatal(err)
	}
	w.next(t)
	if got, want := w.state(t), "1 2 3 0d 5 6 7 8"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
}

// atStart calls a function at the start of every bracket.
type atStart struct {
	notifier.Notifier
	do func(*notifier.Invalidation)
}

func (s *atStart) InvalidateRangeStart(inv *notifier.Invalidation) error { s.do(inv); return nil }
func (s *atStart) Release()                                              {}

// TestStrayDiscardIsBracketed looks at the memory when the first bracket for a stray
// discard opens: the pages are there, as nothing has been read. When the last one opens
// they are gone.
func TestStrayDiscardIsBracketed(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{patience: gvmtest.Limit})
	r := part(w.ram, 3, 2)
	var seen []string
	sub := &atStart{do: func(inv *notifier.Invalidation) {
		v, err := hostmem.Load64(r.Start)
		seen = append(seen, fmt.Sprintf("%v of %v: %d, %v", inv.Event, inv.Range.Contains(r), v, err))
	}}
	register(t, w.Memory, sub)
	if err := rawAdvise(r, unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if s := w.next(t); s.Late {
		t.Errorf("it was followed late: %v", s)
	}
	sub.Unregister()
	want := []string{"remap of true: 4, <nil>", "remap of false: 4, <nil>", "clear of true: 0, <nil>"}
	if !slices.Equal(seen, want) {
		t.Errorf("brackets found %q, want %q", seen, want)
	}
}

// TestOwnOperationsAreNotStray carries every operation out under a watch. None is taken for
// somebody else's, and each leaves its memory watched.
func TestOwnOperationsAreNotStray(t *testing.T) {
	for _, backing := range everyKind {
		for op := range operations(nil, &Region{}, addr.HVARange{}, &Region{}) {
			t.Run(fmt.Sprintf("%v of %v", op, backing), func(t *testing.T) {
				w := newWatched(t, backing, EventConfig{patience: gvmtest.Limit})
				r := part(w.ram, 3, 2)
				if err := operations(w.Memory, w.ram, r, w.spare)[op](); err != nil {
					var failed *Error
					if !errors.As(err, &failed) || failed.Made {
						t.Error(err)
					}
				}
				next := r // of what the operation was, and where it went
				if op == OpTruncate {
					next = part(w.ram, 0, 1)
				}
				if op == OpRemap || op == OpRemapKeep {
					next = part(w.spare, 0, 2)
				}
				if err := rawUnmap(next); err != nil {
					t.Fatal(err)
				}
				if s := w.next(t); s.Op != OpStrayUnmap || s.Range != next || s.Late {
					t.Errorf("reported is %v, want only the %v of %v", s, OpStrayUnmap, next)
				}
				if len(w.strays) != 0 {
					t.Errorf("reported is also %v", <-w.strays)
				}
			})
		}
	}
}

// TestStrayInsideOperation makes a change while an operation is in its system call: it is
// told apart, and followed before the mapping lock is given back.
func TestStrayInsideOperation(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	next := make(chan uint64)
	err := w.change(request{op: OpDiscard, r: part(w.ram, 0, 2)}, operation{
		brackets: func(invs []notifier.Invalidation) []notifier.Invalidation {
			return append(invs, w.cleared(part(w.ram, 0, 2), dropped))
		},
		do: func(*Region) error {
			go func() { // who gets the lock next, such as a harvest, finds them followed
				w.as.RLock()
				defer w.as.RUnlock()
				next <- w.Changes()
			}()
			return errors.Join(rawAdvise(part(w.ram, 0, 2), unix.MADV_DONTNEED),
				rawAdvise(part(w.ram, 1, 1), unix.MADV_FREE), // told of already, so it is another one
				rawAdvise(part(w.ram, 5, 1), unix.MADV_DONTNEED))
		},
	})
	if n := <-next; err != nil || n != 3 {
		t.Errorf("after the operation, %v, %d changes are made or followed; want 3", err, n)
	}
	for _, page := range []uint64{1, 5} {
		if s := w.next(t); s.Range != part(w.ram, page, 1) || !s.Late {
			t.Errorf("reported is %v, want page %d, late", s, page)
		}
	}
	if got, want := w.state(t), "0z 0z 3 4 5 0z 7 8"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
}

// TestStrayByWhoIsWaitedFor has the thread that makes a change hold what its bracket has to
// wait for. It is not held for ever, and the change is followed, late.
func TestStrayByWhoIsWaitedFor(t *testing.T) {
	for name, hold := range map[string]func(w *bed, do func() error) error{
		"the mapping lock, for reading": func(w *bed, do func() error) error {
			w.as.RLock()
			defer w.as.RUnlock()
			return do()
		},
		"the mapping lock, for writing": func(w *bed, do func() error) error {
			w.as.Lock()
			defer w.as.Unlock()
			return do()
		},
		"a page of the guest": func(w *bed, do func() error) error {
			return w.tracker.Table().Use(firstGFN.GPA(), 8, addr.Read, func([]byte) error { return do() })
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWatched(t, Anonymous, EventConfig{})
			var failed error
			done := gvmtest.Background(func() {
				failed = hold(w, func() error { return rawAdvise(part(w.ram, 3, 2), unix.MADV_DONTNEED) })
			})
			if !gvmtest.ClosedWithin(done, gvmtest.Limit) || failed != nil {
				t.Fatalf("the thread waits for itself, or fails: %v", failed)
			}
			if s := w.next(t); !s.Late || s.Op != OpStrayRemove {
				t.Errorf("reported is %v, want it late", s)
			}
			if got, want := w.state(t), "1 2 3 0z 0z 6 7 8"; got != want {
				t.Errorf("the guest has %q, want %q", got, want)
			}
		})
	}
}

// TestForeignMappingSurvives lets the memory end while others have mapped something in it:
// that stays.
func TestForeignMappingSurvives(t *testing.T) {
	var r addr.HVARange
	t.Run("", func(t *testing.T) {
		w := newWatched(t, Anonymous, EventConfig{})
		r = part(w.ram, 3, 2)
		if err := rawMap(r, 0); err != nil {
			t.Fatal(err)
		}
		if s := w.next(t); !s.Hazard() || !strings.Contains(fmt.Sprint(w.Extents(r)), "others have mapped something") {
			t.Errorf("reported is %v, and the extents are %v", s, w.Extents(r))
		}
		if err := w.Discard(r); !errors.Is(err, unix.ENOMEM) {
			t.Errorf("discard of what is not the guest's: %v, want ENOMEM", err)
		}
		if err := hostmem.Store64(r.Start, 77); err != nil {
			t.Error(err)
		}
	})
	if r.Empty() {
		return // without a watch, which has said why
	}
	if v, err := hostmem.Load64(r.Start); v != 77 || err != nil {
		t.Errorf("the mapping has %d, %v; want 77", v, err)
	}
	if occupied(addr.HVAs(r.End, addr.PageSize)) || occupied(addr.HVAs(r.Start-addr.PageSize, addr.PageSize)) {
		t.Error("memory is left around it")
	}
	if err := munmap(r); err != nil {
		t.Error(err)
	}
}

// TestMapAfterStray repairs what is gone from within the report.
func TestMapAfterStray(t *testing.T) {
	memory, repaired := make(chan *Memory, 1), make(chan error, 1)
	w := newWatched(t, Memfd, EventConfig{Report: func(s Stray) { repaired <- (<-memory).Map(s.Range) }})
	memory <- w.Memory
	if err := rawUnmap(part(w.ram, 3, 2)); err != nil {
		t.Fatal(err)
	}
	if err := <-repaired; err != nil {
		t.Fatal(err)
	}
	if got, want := w.state(t), "1 2 3 4dz 5dz 6 7 8"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
}

func TestWatchEventsEnds(t *testing.T) {
	stray := func(w *bed) <-chan struct{} {
		return gvmtest.Background(func() { _ = rawAdvise(part(w.ram, 3, 2), unix.MADV_DONTNEED) })
	}
	for name, end := range map[string]func(w *bed) error{
		"Close":           func(w *bed) error { return w.events.Close() },
		"Memory.Close":    func(w *bed) error { return w.Memory.Close() },
		"the last user's": func(w *bed) error { err := w.Memory.Close(); return errors.Join(err, w.as.PutUser()) },
	} {
		for _, pending := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, pending=%t", name, pending), func(t *testing.T) {
				gvmtest.Need(t, gvmtest.UFFD)
				m := New(nil)
				r, err := m.NewRegion(RegionConfig{Name: "ram", Size: pages * addr.PageSize})
				if err != nil {
					t.Fatal(err)
				}
				w := &bed{Memory: m, ram: r}
				if w.events, err = m.WatchEvents(EventConfig{Report: func(Stray) {}, patience: time.Hour}); err != nil {
					t.Fatal(err)
				}
				if name == "the last user's" {
					m.as.TryGetUser()
				}
				var waits <-chan struct{}
				var failed error
				m.as.RLock()
				if pending {
					waits = stray(w)
					gvmtest.Eventually(w.events.awaited)
				}
				ended := gvmtest.Background(func() { failed = end(w) })
				m.as.RUnlock()
				if !gvmtest.ClosedWithin(ended, gvmtest.Limit) || failed != nil {
					t.Fatalf("the end does not come, or fails: %v", failed)
				}
				if pending && !gvmtest.ClosedWithin(waits, gvmtest.Limit) {
					t.Error("a thread waits for a watch that has ended")
				}
				if name != "Close" {
					if err := w.events.Close(); err != nil {
						t.Errorf("Close after the end of the memory: %v", err)
					}
				}
				if err := w.events.Close(); !errors.Is(err, os.ErrClosed) {
					t.Errorf("a second Close: %v, want %v", err, os.ErrClosed)
				}
				if name == "Close" {
					if err := m.Unmap(part(r, 1, 1)); err != nil {
						t.Errorf("an operation after the watch: %v", err)
					}
					if err := m.Close(); err != nil {
						t.Error(err)
					}
				}
				if _, err := m.WatchEvents(EventConfig{}); !errors.Is(err, os.ErrClosed) {
					t.Errorf("a watch of a closed memory: %v", err)
				}
			})
		}
	}
}

// TestWatchEventsOrWriteLog: the kernel has one userfaultfd for a range.
func TestWatchEventsOrWriteLog(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	l := newWriteLog(t, Anonymous)
	if err := l.Begin(w.ram.Range); !errors.Is(err, ErrWatched) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("a log of memory that is watched: %v, want %v", err, ErrWatched)
	}
	if _, err := w.WatchEvents(EventConfig{}); !errors.Is(err, ErrWatched) {
		t.Errorf("a second watch: %v, want %v", err, ErrWatched)
	}
	if err := w.events.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Begin(part(w.ram, 7, 1)); err != nil {
		t.Errorf("a log after the watch: %v", err)
	}
	if _, err := w.WatchEvents(EventConfig{}); !errors.Is(err, ErrWatched) {
		t.Errorf("a watch of memory with a log: %v, want %v", err, ErrWatched)
	}
	if err := w.Discard(part(w.ram, 1, 1)); err != nil {
		t.Errorf("an operation after a watch that could not begin: %v", err)
	}
}

// TestRegionUnderWatch makes a region while there is a watch, which sees it too.
func TestRegionUnderWatch(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	r, err := w.NewRegion(RegionConfig{Name: "later", Size: addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	if err := rawUnmap(r.Range); err != nil {
		t.Fatal(err)
	}
	if s := w.next(t); s.Range != r.Range || s.Fate != Reserved {
		t.Errorf("reported is %v, want that %v is reserved", s, r)
	}
}

// TestReaderFails closes the descriptor under the reader in a way that the watch does not
// know of: nobody waits for it then, and it is told.
func TestReaderFails(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	w.as.RLock() // so that there is nobody to open a bracket
	done := gvmtest.Background(func() { _ = rawAdvise(part(w.ram, 3, 1), unix.MADV_DONTNEED) })
	gvmtest.Eventually(w.events.awaited)
	if err := w.events.fd.Close(); err != nil {
		t.Error(err)
	}
	w.as.RUnlock()
	if !gvmtest.ClosedWithin(done, gvmtest.Limit) {
		t.Error("a thread waits for a reader that has gone")
	}
	if err := w.Unmap(part(w.ram, 5, 1)); err != nil {
		t.Errorf("an operation when the reader has gone: %v", err)
	}
	if s := w.next(t); s.Op != OpStrayGap || s.Range != part(w.ram, 5, 1) || s.Err == nil {
		t.Errorf("reported is %v, want that %v is not watched", s, part(w.ram, 5, 1))
	}
}

// TestUnknownMessage: what the kernel may tell of one day could be any change.
func TestUnknownMessage(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	w.as.Lock()
	w.Memory.events.followOne(message{})
	w.as.Unlock()
	if s := w.next(t); s.Op != OpStrayGap || s.Range != w.ram.Range || s.Err == nil {
		t.Errorf("reported is %v", s)
	}
	if got, want := w.state(t), "1d 2d 3d 4d 5d 6d 7d 8d"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
}

// TestStrayFork starts a process in a way in which Go forks, and not shares its memory
// until the exec: in a user namespace of its own.
func TestStrayFork(t *testing.T) {
	gvmtest.Need(t, gvmtest.Root)
	w := newWatched(t, Anonymous, EventConfig{Forks: true})
	// The runtime holds locks across its fork, and a collection that began would wait for
	// it with the reader stopped; see EventConfig.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	runtime.GC()
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER}
	if err := cmd.Run(); errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL) {
		gvmtest.Lack(t, gvmtest.Root, err)
	} else if err != nil {
		t.Fatal(err)
	}
	if s := w.next(t); s.Op != OpStrayFork || s.Content != notifier.Kept || s.Err != nil || s.Hazard() {
		t.Errorf("reported is %v", s)
	}
	if _, err := w.Fork(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Fork under a watch that reports forks: %v, want EBUSY", err)
	}
	if got, want := w.state(t), "1 2 3 4 5 6 7 8"; got != want {
		t.Errorf("the guest has %q, want %q", got, want)
	}
}

func TestForkUnderWatch(t *testing.T) {
	w := newWatched(t, Anonymous, EventConfig{})
	c, err := w.Fork()
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if err := c.ReadAt(b[:], part(w.ram, 3, 1).Start); err != nil || b[0] != 4 {
		t.Errorf("the child has %d, %v; want 4", b[0], err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if len(w.strays) != 0 {
		t.Errorf("reported is %v", <-w.strays)
	}
}

// TestStrayStorm has threads change memory behind the back of others that carry out
// operations, use it through the table, and collect garbage. All threads go on, and at the
// end the slots show what is mapped.
func TestStrayStorm(t *testing.T) {
	const stamped = pages - 2 // the last two are for others
	w := newWatched(t, Anonymous, EventConfig{Report: func(Stray) {}})
	rounds := 300
	if testing.Short() || gvmtest.Race {
		rounds = 60
	}
	table := w.tracker.Table()
	var workers sync.WaitGroup
	work := func(do func(i int) error) {
		workers.Go(func() {
			for i := range rounds {
				if err := do(i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for n := range uint64(2) {
		work(func(i int) error { return rawAdvise(part(w.ram, (n*7+uint64(i))%stamped, 1), unix.MADV_DONTNEED) })
	}
	work(func(i int) error { return rawUnmap(part(w.ram, pages-2, 2)) })
	work(func(i int) error { return w.Map(part(w.ram, pages-2, 2)) })
	work(func(i int) error { return w.Discard(part(w.ram, uint64(i)%(stamped-2), 2)) })
	work(func(i int) error { // nothing is there if it has not been mapped since the last time
		return ignore(w.Remap(part(w.ram, stamped-1, 1), part(w.spare, 0, 1).Start), unix.ENOMEM)
	})
	work(func(i int) error { return ignore(w.Map(part(w.ram, stamped-1, 1)), nil) })
	work(func(i int) error {
		return ignore(table.Store64((firstGFN+addr.GFN(i%stamped)).GPA(), uint64(i)), unix.EFAULT)
	})
	work(func(i int) error {
		runtime.GC()
		return nil
	})
	finished := gvmtest.Background(workers.Wait)
	if !gvmtest.ClosedWithin(finished, 3*gvmtest.Limit) {
		b := make([]byte, 1<<20)
		t.Fatalf("threads wait for ever:\n%s", b[:runtime.Stack(b, true)])
	}
	if err := w.events.Close(); err != nil {
		t.Error(err)
	}
}

func ignore(err, what error) error {
	if what == nil || errors.Is(err, what) {
		return nil
	}
	return err
}

// BenchmarkWatchedDiscard times an operation with and without a watch, and the same change made
// behind its back.
func BenchmarkWatchedDiscard(b *testing.B) {
	for _, by := range []string{"operation", "watched", "stray"} {
		b.Run("by="+by, func(b *testing.B) {
			var w *bed
			if by == "operation" {
				w = newBed(b, Anonymous)
			} else {
				w = newWatched(b, Anonymous, EventConfig{Report: func(Stray) {}})
			}
			page := part(w.ram, 3, 1)
			do := func() error { return w.Discard(page) }
			if by == "stray" {
				do = func() error { return rawAdvise(page, unix.MADV_DONTNEED) }
			}
			for b.Loop() {
				if err := do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
