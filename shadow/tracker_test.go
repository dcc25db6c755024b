package shadow

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

const page = addr.PageSize

// hostModel is the host's mappings: an access for each mapped page, by address.
type hostModel map[addr.HVA]addr.Access

func (h hostModel) Walk(r addr.HVARange, fn func(addr.HVARange, addr.Access)) {
	for at := r.Start; at < r.End; at += page {
		fn(addr.HVAs(at, page), h[at])
	}
}

func (h hostModel) Lookup(_ context.Context, hva addr.HVA, within addr.HVARange) (run addr.HVARange, access addr.Access, err error) {
	access = h[hva&^addr.PageMask]
	run = addr.HVAs(hva&^addr.PageMask, page)
	for within.Start < run.Start && h[run.Start-page] == access {
		run.Start -= page
	}
	for run.End < within.End && h[run.End] == access {
		run.End += page
	}
	return run, access, nil
}

func (h hostModel) set(r addr.HVARange, access addr.Access) {
	for at := r.Start; at < r.End; at += page {
		h[at] = access
	}
}

var errBackend = errors.New("the backend refuses")

// backendModel keeps slots as KVM would, and fails when it is told to or when
// it is misused.
type backendModel struct {
	t       *testing.T
	slots   map[uint32]Slot
	held    int
	calls   int
	failAt  int // the call that fails, from 1; 0: none
	failFor int // how many from there
}

func newBackend(t *testing.T) *backendModel {
	return &backendModel{t: t, slots: map[uint32]Slot{}}
}

func (b *backendModel) Hold()    { b.held++ }
func (b *backendModel) Release() { b.held-- }

func (b *backendModel) call() error {
	b.t.Helper()
	if b.held == 0 {
		b.t.Error("a slot is changed while vCPUs may run")
	}
	b.calls++
	if b.failAt != 0 && b.calls >= b.failAt && b.calls < b.failAt+b.failFor {
		return fmt.Errorf("call %d: %w", b.calls, errBackend)
	}
	return nil
}

func (b *backendModel) CreateSlot(s Slot) error {
	b.t.Helper()
	if err := b.call(); err != nil {
		return err
	}
	for _, o := range b.slots {
		if o.ID == s.ID || o.GFNs().Overlaps(s.GFNs()) {
			b.t.Errorf("%v is created over %v", s, o)
		}
	}
	b.slots[s.ID] = s
	return nil
}

func (b *backendModel) DeleteSlot(s Slot) error {
	b.t.Helper()
	if err := b.call(); err != nil {
		return err
	}
	if b.slots[s.ID] != s {
		b.t.Errorf("%v is deleted, but the backend has %v", s, b.slots[s.ID])
	}
	delete(b.slots, s.ID)
	return nil
}

func (b *backendModel) ChangeSlot(from, to Slot) error {
	b.t.Helper()
	if err := b.call(); err != nil {
		return err
	}
	if b.slots[from.ID] != from || from.ID != to.ID || from.HVA != to.HVA || from.NPages != to.NPages || from.Access != to.Access {
		b.t.Errorf("%v is changed to %v, and the backend has %v", from, to, b.slots[from.ID])
	}
	for _, o := range b.slots {
		if o.ID != to.ID && o.GFNs().Overlaps(to.GFNs()) {
			b.t.Errorf("%v is moved over %v", to, o)
		}
	}
	b.slots[to.ID] = to
	return nil
}

// bench is a tracker over models.
type bench struct {
	*Tracker
	t       *testing.T
	host    hostModel
	backend *backendModel
}

// newBench returns a tracker with one window of n mapped pages, gfn 0x100 at hva
// 0x10000.
func newBench(t *testing.T, n uint64) *bench { return newBenchWith(t, n, Precise, 64) }

func newBenchWith(t *testing.T, n uint64, policy Policy, limit uint32) *bench {
	t.Helper()
	b := &bench{t: t, host: hostModel{}, backend: newBackend(t)}
	b.Tracker = NewTracker(b.host, b.backend, limit, trace.NewLog(1000))
	b.SetPolicy(policy)
	w := Window{Name: "ram", GFN: 0x100, NPages: n, HVA: 0x10000}
	b.host.set(w.HVAs(), addr.ReadWrite)
	if err := b.AddWindow(w); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.check)
	return b
}

// check compares what the tracker publishes with what the backend has.
func (b *bench) check() {
	b.t.Helper()
	if err := b.Tracker.Check(); err != nil {
		b.t.Error(err)
	}
	set := b.Slots()
	if got := len(b.backend.slots); got != set.Len() {
		b.t.Errorf("the backend has %d slots, %d are published", got, set.Len())
	}
	last := addr.GFN(0)
	for s := range set.All() {
		if b.backend.slots[s.ID] != s {
			b.t.Errorf("%v is published, the backend has %v", s, b.backend.slots[s.ID])
		}
		if s.GFN < last {
			b.t.Errorf("%v is out of order", s)
		}
		last = s.GFNs().End
	}
	if b.backend.held != 0 {
		b.t.Errorf("the backend is held %d times", b.backend.held)
	}
}

// hva returns the range of n pages from page i of the first window.
func (b *bench) hva(i, n uint64) addr.HVARange { return addr.HVAs(addr.HVA(0x10000+i*page), n*page) }

// bracket makes a change between start and end, as mm does: also if the start
// fails, which is returned.
func (b *bench) bracket(inv notifier.Invalidation, change func()) error {
	b.t.Helper()
	err := b.InvalidateRangeStart(&inv)
	change()
	b.InvalidateRangeEnd(&inv)
	return err
}

func (b *bench) unmap(i, n uint64) error {
	return b.bracket(notifier.Invalidation{Range: b.hva(i, n), Event: notifier.Unmap}, func() { b.host.set(b.hva(i, n), addr.NoAccess) })
}

func (b *bench) mapBack(i, n uint64) error {
	return b.bracket(notifier.Invalidation{Range: b.hva(i, n), Event: notifier.Map, After: addr.ReadWrite}, func() { b.host.set(b.hva(i, n), addr.ReadWrite) })
}

func (b *bench) protect(i, n uint64, access addr.Access) error {
	return b.bracket(notifier.Invalidation{Range: b.hva(i, n), Event: notifier.Protect, After: access}, func() { b.host.set(b.hva(i, n), access) })
}

func (b *bench) remap(i, n uint64, to addr.HVA) error {
	return b.bracket(notifier.Invalidation{Range: b.hva(i, n), Event: notifier.Remap, To: to}, func() {
		for k := range n {
			b.host[to+addr.HVA(k*page)] = b.host[b.hva(i+k, 1).Start]
		}
		b.host.set(b.hva(i, n), addr.NoAccess)
	})
}

// picture is the frames of the first window, a letter for each: w for a slot
// that may be written, r for one that may be read, a dot for none; with an
// upper-case letter where the slot shows another page than at first.
func (b *bench) picture(n uint64) string {
	var p strings.Builder
	for i := range n {
		gfn := addr.GFN(0x100 + i)
		s, ok := b.Slots().Lookup(gfn)
		switch {
		case !ok:
			p.WriteByte('.')
		default:
			letter := "r"
			if s.Access == addr.ReadWrite {
				letter = "w"
			}
			if s.HVA+addr.HVA(gfn-s.GFN)*page != b.hva(i, 1).Start {
				letter = strings.ToUpper(letter)
			}
			p.WriteString(letter)
		}
	}
	return p.String()
}

func TestSlotsFollow(t *testing.T) {
	const away = 0x90000
	for name, tt := range map[string]struct {
		do    func(b *bench) error
		want  string
		slots int
		calls int // of the backend, after the first slot
	}{
		"unmap cuts":         {func(b *bench) error { return b.unmap(2, 3) }, "ww...www", 2, 3},
		"unmap at the start": {func(b *bench) error { return b.unmap(0, 1) }, ".wwwwwww", 1, 2},
		"unmap all":          {func(b *bench) error { return b.unmap(0, 8) }, "........", 0, 1},
		"unmap twice":        {func(b *bench) error { return errors.Join(b.unmap(2, 1), b.unmap(2, 1)) }, "ww.wwwww", 2, 3},
		"map back merges":    {func(b *bench) error { return errors.Join(b.unmap(2, 3), b.mapBack(2, 3)) }, "wwwwwwww", 1, 6},
		"map back a part":    {func(b *bench) error { return errors.Join(b.unmap(2, 3), b.mapBack(3, 1)) }, "ww.w.www", 3, 4},
		"read-only":          {func(b *bench) error { return b.protect(2, 3, addr.Read) }, "wwrrrwww", 3, 4},
		"read-only and back": {func(b *bench) error { return errors.Join(b.protect(2, 3, addr.Read), b.protect(2, 3, addr.ReadWrite)) }, "wwwwwwww", 1, 8},
		"no access cuts":     {func(b *bench) error { return b.protect(2, 3, addr.NoAccess) }, "ww...www", 2, 3},
		"write-only is no access": {func(b *bench) error {
			return b.bracket(notifier.Invalidation{Range: b.hva(2, 1), Event: notifier.Protect, After: addr.Write}, func() { b.host.set(b.hva(2, 1), addr.NoAccess) })
		}, "ww.wwwww", 2, 3},
		"clear changes nothing": {func(b *bench) error {
			return b.bracket(notifier.Invalidation{Range: b.hva(2, 3), Event: notifier.Clear, After: addr.ReadWrite}, func() {})
		}, "wwwwwwww", 1, 0},
		"replacing changes nothing": {func(b *bench) error {
			return b.bracket(notifier.Invalidation{Range: b.hva(2, 3), Event: notifier.Unmap, After: addr.ReadWrite}, func() {})
		}, "wwwwwwww", 1, 0},
		"outside":          {func(b *bench) error { return b.unmap(8, 4) }, "wwwwwwww", 1, 0},
		"reaching outside": {func(b *bench) error { return b.unmap(6, 4) }, "wwwwww..", 1, 2},
		"remap follows":    {func(b *bench) error { return b.remap(2, 3, away) }, "wwWWWwww", 3, 4},
		"remap and back": {func(b *bench) error {
			return errors.Join(b.remap(2, 3, away), b.bracket(notifier.Invalidation{Range: addr.HVAs(away, 3*page), Event: notifier.Remap, To: b.hva(2, 1).Start}, func() {
				b.host.set(addr.HVAs(away, 3*page), addr.NoAccess)
				b.host.set(b.hva(2, 3), addr.ReadWrite)
			}))
		}, "wwwwwwww", 1, 8},
		"read-only remap": {func(b *bench) error { return errors.Join(b.protect(2, 1, addr.Read), b.remap(2, 1, away)) }, "wwRwwwww", 3, 6},
		"failed remap": {func(b *bench) error {
			inv := notifier.Invalidation{Range: b.hva(2, 3), Event: notifier.Remap, To: away}
			err := b.InvalidateRangeStart(&inv)
			inv.Failed = true
			b.InvalidateRangeEnd(&inv)
			return err
		}, "wwwwwwww", 1, 0},
		"failed unmap is undone": {func(b *bench) error {
			inv := notifier.Invalidation{Range: b.hva(2, 3), Event: notifier.Unmap}
			err := b.InvalidateRangeStart(&inv)
			if got := b.picture(8); got != "ww...www" {
				b.t.Errorf("inside the bracket slots are %s", got)
			}
			b.InvalidateRangeEnd(&inv)
			return err
		}, "wwwwwwww", 1, 6},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, 8)
			b.backend.calls = 0
			if err := tt.do(b); err != nil {
				t.Fatal(err)
			}
			if got := b.picture(8); got != tt.want {
				t.Errorf("slots are %s, want %s", got, tt.want)
			}
			if got := b.Slots().Len(); got != tt.slots {
				t.Errorf("%d slots, want %d: %v", got, tt.slots, slices.Collect(b.Slots().All()))
			}
			if b.backend.calls != tt.calls {
				t.Errorf("the backend was called %d times, want %d", b.backend.calls, tt.calls)
			}
		})
	}
}

// TestCutBeforeTheChange looks at the slots inside the bracket: they must be cut
// when the start returns, and a vCPU must not run between a remap's start and end.
func TestCutBeforeTheChange(t *testing.T) {
	b := newBench(t, 8)
	inside := func(inv notifier.Invalidation, look func()) {
		if err := b.bracket(inv, look); err != nil {
			t.Fatal(err)
		}
	}
	inside(notifier.Invalidation{Range: b.hva(1, 1), Event: notifier.Protect, After: addr.Read}, func() {
		if got := b.picture(8); got != "wrwwwwww" {
			t.Errorf("before the protection slots are %s, want wrwwwwww", got)
		}
	})
	inside(notifier.Invalidation{Range: b.hva(1, 1), Event: notifier.Remap, To: 0x90000}, func() {
		if b.backend.held != 1 {
			t.Errorf("inside a remap the backend is held %d times, want once", b.backend.held)
		}
		b.host[0x90000] = addr.ReadWrite
		b.host.set(b.hva(1, 1), addr.NoAccess)
	})
}

// TestRefusals has the backend refuse each call of a change in turn. The change
// is made all the same, and the slots fit it at its end, or, where it is the end
// that was refused, allow less.
func TestRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		do    func(b *bench) error
		calls int
		start bool // the refusal comes at the start, and reaches the caller
		want  string
	}{
		"unmap":     {func(b *bench) error { return b.unmap(2, 3) }, 3, true, "ww...w.w"},
		"read-only": {func(b *bench) error { return b.protect(2, 1, addr.Read) }, 4, true, "wwrwww.w"},
		"map back":  {func(b *bench) error { return b.mapBack(6, 1) }, 3, false, "wwwwww.w"},
		"remap":     {func(b *bench) error { return b.remap(2, 1, 0x90000) }, 4, false, "ww.www.w"},
	} {
		for at := 1; at <= tt.calls; at++ {
			t.Run(fmt.Sprintf("%s/call=%d", name, at), func(t *testing.T) {
				b := newBench(t, 8)
				if err := b.unmap(6, 1); err != nil {
					t.Fatal(err)
				}
				b.backend.calls, b.backend.failAt, b.backend.failFor = 0, at, 1
				before := slices.Collect(b.Slots().All())
				err := tt.do(b)
				if tt.start != errors.Is(err, errBackend) {
					t.Errorf("error is %v", err)
				}
				if got := b.picture(8); got != tt.want {
					t.Errorf("slots are %s, want %s", got, tt.want)
				}
				if name == "map back" {
					if diff := cmp.Diff(before, slices.Collect(b.Slots().All())); diff != "" {
						t.Errorf("slots (-before +after):\n%s", diff)
					}
				}
				b.check()
				// The next bracket makes up for what is missing.
				if err := b.bracket(notifier.Invalidation{Range: b.hva(0, 1), Event: notifier.Clear, After: addr.ReadWrite}, func() {}); err != nil {
					t.Fatal(err)
				}
				b.checkAgainstHost(8)
			})
		}
	}
}

// TestRefusedForGood has the backend refuse everything from each call on: the
// former slots cannot be put back. What is published must still be what it has,
// and what it has missed is made up for once it recovers.
func TestRefusedForGood(t *testing.T) {
	for name, tt := range map[string]struct {
		do    func(b *bench) error
		start bool // some of the calls come at the start
		calls int
	}{
		"unmap": {func(b *bench) error { return b.unmap(2, 3) }, true, 3},
		"remap": {func(b *bench) error { return b.remap(2, 3, 0x90000) }, false, 4},
	} {
		for at := 1; at <= tt.calls; at++ {
			t.Run(fmt.Sprintf("%s/call=%d", name, at), func(t *testing.T) {
				b := newBench(t, 8)
				b.backend.calls, b.backend.failAt, b.backend.failFor = 0, at, 1000
				if err := tt.do(b); tt.start != errors.Is(err, errBackend) {
					t.Errorf("error is %v", err)
				}
				b.check()
				b.backend.failAt = 0
				if err := b.bracket(notifier.Invalidation{Range: b.hva(0, 1), Event: notifier.Clear, After: addr.ReadWrite}, func() {}); err != nil {
					t.Fatal(err)
				}
				b.checkAgainstHost(8)
			})
		}
	}
}

// checkAgainstHost compares every frame's slot with what the host model has
// mapped where the window shows it.
func (b *bench) checkAgainstHost(n uint64) {
	b.t.Helper()
	for i := range n {
		gfn := addr.GFN(0x100 + i)
		hva, ok := b.Slots().HVA(gfn.GPA())
		if !ok {
			b.t.Fatalf("%v is in no window", gfn)
		}
		s, _ := b.Slots().Lookup(gfn)
		want := b.host[hva]
		if want&addr.Read == 0 {
			want = addr.NoAccess
		}
		if s.Access != want {
			b.t.Errorf("%v has a slot with access %v, the host allows %v", gfn, s.Access, b.host[hva])
		}
		if s.NPages != 0 && s.HVA+addr.HVA(gfn-s.GFN)*page != hva {
			b.t.Errorf("%v shows %v, want %v", gfn, s, hva)
		}
	}
}

func TestSlotNumbersAreRecycled(t *testing.T) {
	b := newBench(t, 8)
	for range 1000 {
		if err := errors.Join(b.unmap(2, 1), b.unmap(5, 1), b.mapBack(2, 1), b.mapBack(5, 1)); err != nil {
			t.Fatal(err)
		}
	}
	for s := range b.Slots().All() {
		if s.ID > 3 {
			t.Errorf("%v after a thousand cuts, want a number up to 3", s)
		}
	}
}

func TestWindowErrors(t *testing.T) {
	b := newBench(t, 8)
	for name, tt := range map[string]struct {
		w    Window
		says string
	}{
		"empty":      {Window{Name: "x"}, "empty"},
		"misaligned": {Window{Name: "x", NPages: 1, HVA: 1}, "aligned"},
		"wraps":      {Window{Name: "x", NPages: 2, HVA: ^addr.HVA(0) &^ addr.PageMask}, "wraps"},
		"too high":   {Window{Name: "x", GFN: 1<<40 - 1, NPages: 2, HVA: 0x80000}, "52 bits"},
		"overlaps":   {Window{Name: "x", GFN: 0x107, NPages: 1, HVA: 0x80000}, `overlaps window "ram"`},
	} {
		t.Run(name, func(t *testing.T) {
			if err := b.AddWindow(tt.w); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("AddWindow(%+v) returned %v, want %q in it", tt.w, err, tt.says)
			}
		})
	}
}

func TestReleaseTakesAllSlots(t *testing.T) {
	b := newBench(t, 8)
	changed := b.Slots().Changed()
	b.Release()
	<-changed
	if b.Slots().Len() != 0 {
		t.Errorf("slots after Release: %v", slices.Collect(b.Slots().All()))
	}
	if err := b.unmap(0, 1); err != nil {
		t.Errorf("a bracket after Release: %v", err)
	}
	if err := b.AddWindow(Window{Name: "late", NPages: 1, HVA: 0x80000}); !errors.Is(err, notifier.ErrExited) {
		t.Errorf("AddWindow after Release returned %v, want ErrExited", err)
	}
}

// TestRandomChanges makes random changes, some of which the backend refuses, and
// checks after each that slots allow nothing that the host does not.
func TestRandomChanges(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	b := newBench(t, 16)
	for range 3000 {
		i := rng.Uint64N(16)
		n := 1 + rng.Uint64N(16-i)
		b.backend.failAt = 0
		if rng.IntN(4) == 0 {
			b.backend.failAt, b.backend.failFor = b.backend.calls+1+rng.IntN(4), 1
		}
		switch rng.IntN(4) {
		case 0:
			_ = b.unmap(i, n)
		case 1:
			_ = b.mapBack(i, n)
		case 2:
			_ = b.protect(i, n, addr.Read)
		case 3:
			_ = b.protect(i, n, addr.ReadWrite)
		}
		b.check()
		for s := range b.Slots().All() {
			b.host.Walk(s.HVAs(), func(r addr.HVARange, access addr.Access) {
				if s.Access&^access != 0 {
					t.Fatalf("%v, but the host allows %v in %v", s, access, r)
				}
			})
		}
	}
	b.backend.failAt = 0
	if err := b.mapBack(0, 16); err != nil {
		t.Fatal(err)
	}
	if b.Slots().Len() != 1 {
		t.Errorf("with all mapped again there are slots %v, want one", slices.Collect(b.Slots().All()))
	}
}

// TestHoldsInTheTrace: a hold, and its release, belong to the operation that vCPUs are held for.
func TestHoldsInTheTrace(t *testing.T) {
	for _, policy := range []Policy{Precise, Lazy} {
		b := newBenchWith(t, 8, policy, 64)
		seq := b.slots.log.Len()
		for op, event := range []notifier.Event{notifier.Unmap, notifier.Remap} {
			inv := notifier.Invalidation{Range: b.hva(2, 1), Event: event, Op: uint64(op + 1), To: b.hva(2, 1).Start}
			if err := b.bracket(inv, func() { b.host.set(inv.Range, addr.NoAccess) }); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.LogDirty(true); err != nil {
			t.Fatal(err)
		}
		events, _ := b.slots.log.Since(seq)
		holds := map[uint64]int{}
		some := map[uint64]bool{}
		for _, e := range events {
			switch e.Kind {
			case trace.Hold:
				holds[e.Op]++
				some[e.Op] = true
			case trace.Release:
				holds[e.Op]--
			case trace.SlotDelete, trace.SlotCreate:
				if holds[e.Op] == 0 {
					t.Errorf("%v: %v of operation %d without a hold for it", policy, e.Kind, e.Op)
				}
			}
		}
		want := map[uint64]bool{0: true, 1: true, 2: true} // 0: that pages are logged
		if policy == Lazy {
			delete(want, 1) // slots stay
		}
		for op, n := range holds {
			if n != 0 {
				t.Errorf("%v: %d holds of operation %d are not released", policy, n, op)
			}
		}
		if !maps.Equal(some, want) {
			t.Errorf("%v: there are holds of the operations %v, want %v", policy, some, want)
		}
	}
}
