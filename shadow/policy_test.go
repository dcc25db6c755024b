package shadow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

// TestPolicies makes the same changes with each policy, and looks at the slots and at
// the requests that they took.
func TestPolicies(t *testing.T) {
	const away = 0x90000
	type want struct {
		slots string // see picture
		calls int    // of the backend, after the first slot
	}
	unchanged := want{"wwwwwwww", 0}
	for name, tt := range map[string]struct {
		do            func(b *bench) error
		precise, lazy want
	}{
		"unmap":             {func(b *bench) error { return b.unmap(2, 3) }, want{"ww...www", 3}, unchanged},
		"unmap and map":     {func(b *bench) error { return errors.Join(b.unmap(2, 3), b.mapBack(2, 3)) }, want{"wwwwwwww", 6}, unchanged},
		"read-only":         {func(b *bench) error { return b.protect(2, 3, addr.Read) }, want{"wwrrrwww", 4}, unchanged},
		"no access":         {func(b *bench) error { return b.protect(2, 3, addr.NoAccess) }, want{"ww...www", 3}, unchanged},
		"remap":             {func(b *bench) error { return b.remap(2, 3, away) }, want{"wwWWWwww", 4}, want{"wwWWWwww", 4}},
		"unmap, then remap": {func(b *bench) error { return errors.Join(b.unmap(2, 1), b.remap(2, 1, away)) }, want{"ww.wwwww", 3}, want{"wwWwwwww", 4}},
		"remap, then unmap": {func(b *bench) error { return errors.Join(b.remap(2, 1, away), b.unmap(5, 1)) }, want{"wwWww.ww", 7}, want{"wwWwwwww", 4}},
		"another window":    {func(b *bench) error { return b.AddWindow(Window{Name: "x", GFN: 0x200, NPages: 4, HVA: 0x80000}) }, unchanged, want{"wwwwwwww", 1}},
		"clear": {func(b *bench) error {
			return b.bracket(notifier.Invalidation{Range: b.hva(2, 3), Event: notifier.Clear, After: addr.ReadWrite}, func() {})
		}, unchanged, unchanged},
		"log what is written": {func(b *bench) error { return errors.Join(b.unmap(2, 1), b.LogDirty(true)) }, want{"ww.wwwww", 5}, want{"wwwwwwww", 1}},
	} {
		for policy, want := range map[Policy]want{Precise: tt.precise, Lazy: tt.lazy} {
			t.Run(name+"/"+policy.String(), func(t *testing.T) {
				b := newBenchWith(t, 8, policy, 64)
				b.backend.calls = 0
				if err := tt.do(b); err != nil {
					t.Fatal(err)
				}
				if got := b.picture(8); got != want.slots {
					t.Errorf("slots are %s, want %s", got, want.slots)
				}
				if b.backend.calls != want.calls {
					t.Errorf("the backend was called %d times, want %d", b.backend.calls, want.calls)
				}
				if b.Coarse() != (policy == Lazy) {
					t.Errorf("Coarse() is %v with the policy %v", b.Coarse(), policy)
				}
			})
		}
	}
}

func TestPolicyIsSetFirst(t *testing.T) {
	b := newBench(t, 8)
	if text := gvmtest.Panics(func() { b.SetPolicy(Lazy) }); text == "" {
		t.Error("the policy of slots that are there is changed")
	}
	if got := Policy(7).String(); got != "policy(7)" {
		t.Errorf("a policy that there is not is %q", got)
	}
}

// TestTableIsNotLazy: through the table memory that is not mapped cannot be used, nor
// can more be done to it than its mapping allows, whatever the slots show.
func TestTableIsNotLazy(t *testing.T) {
	b := newBed(sound, bedPages)
	b.Tracker = NewTracker(b.host, b.backend, 64, nil)
	clear(b.backend.slots)
	b.SetPolicy(Lazy)
	if err := b.AddWindow(Window{Name: "ram", GFN: ramGFN, NPages: bedPages, HVA: b.base}); err != nil {
		t.Fatal(err)
	}
	for _, access := range []addr.Access{addr.ReadWrite, addr.Read, addr.NoAccess, addr.ReadWrite} {
		inv := notifier.Invalidation{Range: b.hvas(8, 1), Event: notifier.Protect, After: access}
		if err := b.bracket(inv, func() { b.host.set(inv.Range, access) }); err != nil {
			t.Fatal(err)
		}
		_, load := b.table.Load64(gpa(8))
		store := b.table.Store64(gpa(8), 1)
		if (load == nil) != (access&addr.Read != 0) || (store == nil) != (access == addr.ReadWrite) {
			t.Errorf("where the mapping is %v a load gives %v and a store %v", access, load, store)
		}
	}
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// TestFallback cuts a window into more pieces than there can be slots, and puts it
// together again.
func TestFallback(t *testing.T) {
	const pages, limit = 256, 8
	b := newBenchWith(t, pages, Precise, limit)
	holes := func() (n int) {
		for i := range uint64(pages) {
			if b.host[b.hva(i, 1).Start] == addr.NoAccess {
				n++
			}
		}
		return n
	}
	for i := uint64(1); i < 200; i += 2 {
		if err := b.unmap(i, 1); err != nil {
			t.Fatalf("hole %d: %v", i/2, err)
		}
		b.check()
		if want := holes()+1 > limit; b.Coarse() != want {
			t.Errorf("with %d holes and %d slots at most, Coarse() is %v", holes(), limit, b.Coarse())
		}
	}
	calls := b.backend.calls
	for i := uint64(199); i > 2*limit; i -= 2 {
		if err := errors.Join(b.mapBack(i, 1), b.protect(i-1, 1, addr.Read), b.protect(i-1, 1, addr.ReadWrite)); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.backend.calls - calls; n != 0 {
		t.Errorf("changes that leave too many pieces took %d requests, want none", n)
	}
	for i := uint64(2*limit - 1); i > 0 && b.Coarse(); i -= 2 {
		if err := b.mapBack(i, 1); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.Slots().Len(); n != limit/2 || holes()+1 != limit/2 {
		t.Errorf("slots are precise again with %d slots and %d holes, want %d slots", n, holes(), limit/2)
	}
	b.checkAgainstHost(pages)
	var said []string
	events, _ := b.slots.log.Since(0)
	for _, e := range events {
		if e.Kind == trace.SlotPolicy {
			said = append(said, e.Name+e.Err)
		}
	}
	if want := []string{"coarse", "precise"}; !slices.Equal(said, want) {
		t.Errorf("the trace says %q, want %q", said, want)
	}
}

// TestTooManyWindows moves pages to so many places that even coarse slots would be too
// many. The change is made, and what has moved has no slot until there are enough.
func TestTooManyWindows(t *testing.T) {
	for _, policy := range []Policy{Precise, Lazy} {
		t.Run(policy.String(), func(t *testing.T) {
			b := newBenchWith(t, 8, policy, 4)
			if err := errors.Join(b.remap(1, 1, 0x90000), b.remap(5, 1, 0xa0000)); err != nil {
				t.Fatal(err)
			}
			b.check()
			if got, want := b.picture(8), "wWwww.ww"; got != want {
				t.Errorf("with too many windows slots are %s, want %s", got, want)
			}
			if err := b.Slots().checkWindows(); err != nil {
				t.Error(err)
			}
			if err := b.bracket(notifier.Invalidation{Range: addr.HVAs(0xa0000, page), Event: notifier.Remap, To: b.hva(5, 1).Start}, func() {
				b.host.set(b.hva(5, 1), addr.ReadWrite)
				b.host.set(addr.HVAs(0xa0000, page), addr.NoAccess)
			}); err != nil {
				t.Fatal(err)
			}
			if got, want := b.picture(8), "wWwwwwww"; got != want {
				t.Errorf("slots are %s, want %s", got, want)
			}
		})
	}
}

// TestNoRoomForAWindow adds a window for which there is no slot.
func TestNoRoomForAWindow(t *testing.T) {
	for _, policy := range []Policy{Precise, Lazy} {
		b := newBenchWith(t, 8, policy, 1)
		b.host.set(addr.HVAs(0x80000, 4*page), addr.ReadWrite)
		if err := b.AddWindow(Window{Name: "x", GFN: 0x200, NPages: 4, HVA: 0x80000}); !errors.Is(err, ErrSlotLimit) {
			t.Errorf("%v: a second window where there is one slot: %v, want ErrSlotLimit", policy, err)
		}
		if got := b.picture(8); got != "wwwwwwww" || b.Coarse() != (policy == Lazy) {
			t.Errorf("%v: slots are %s then, coarse: %v", policy, got, b.Coarse())
		}
	}
}

// limited is a bed whose guest is logged, and which has few slot numbers; and what is
// to be expected of it.
type limited struct {
	*logBed
	coarse bool
	refuse int // the step that the backend refuses, counted down
}

func newLimited(m mutant) *limited {
	b := &limited{logBed: newLogBed(m)}
	b.slots.numbers.limit = 8 // three windows
	b.backend.fail = func(string, Slot) error {
		if b.refuse--; b.refuse == 0 {
			return errBackend
		}
		return nil
	}
	return b
}

// pieces returns how many slots show what is mapped, as it is mapped.
func (b *limited) pieces() (n int) {
	for w := range b.Slots().Windows() {
		last := addr.NoAccess
		for gfn := range each(w.GFNs()) {
			access := b.host.model[w.hva(gfn)]
			if access != last && access != addr.NoAccess {
				n++
			}
			last = access
		}
	}
	return n
}

// expect compares the slots with what is mapped, and their policy with how many slots
// that takes. It is told of every state in which the slots were derived.
func (b *limited) expect(what string) {
	n := b.pieces()
	if b.coarse {
		b.coarse = n > b.limit()/2
	} else {
		b.coarse = n > b.limit()
	}
	if b.Coarse() != b.coarse {
		b.errorf("%s: %d slots would be precise, and Coarse() is %v", what, n, b.Coarse())
	}
	b.check()
	for w := range b.Slots().Windows() {
		for gfn := range each(w.GFNs()) {
			want := b.host.model[w.hva(gfn)]
			if b.coarse {
				want = addr.ReadWrite
			}
			if s, _ := b.Slots().Lookup(gfn); s.Access != want {
				b.errorf("%s: %v has a slot with access %v, want %v", what, gfn, s.Access, want)
			}
		}
	}
}

// set changes the access to pages, in the order in which they are in memory.
func (b *limited) set(i, n int, access addr.Access) {
	inv := notifier.Invalidation{Range: b.hvas(i, n), Event: notifier.Protect, Content: notifier.Kept, After: access}
	b.apply(fmt.Sprintf("%v for %d pages from %d", access, n, i), inv, func() { b.host.set(inv.Range, access) })
}

func (b *limited) apply(what string, inv notifier.Invalidation, change func()) {
	refuse := b.refuse
	err := b.bracket(inv, change)
	if refuse > 0 && b.refuse <= 0 {
		// It was refused, as asked. The next bracket makes up for it.
		b.check()
		err = b.bracket(notifier.Invalidation{Range: b.hvas(0, 1), Event: notifier.Clear, Content: notifier.Kept, After: addr.ReadWrite}, func() {})
	}
	if err != nil {
		b.errorf("%s: %w", what, err)
	}
	b.expect(what)
}

// remap moves a page away.
func (b *limited) remap(from, to int) {
	inv := notifier.Invalidation{Range: b.hvas(from, 1), Event: notifier.Remap, Content: notifier.Kept, To: b.hva(to)}
	b.apply(fmt.Sprintf("page %d to %d", from, to), inv, func() {
		copy(b.memory[to*page:(to+1)*page], b.memory[from*page:])
		b.host.set(b.hvas(to, 1), b.host.model[b.hva(from)])
		b.host.set(b.hvas(from, 1), addr.NoAccess)
	})
}

// TestLimit makes holes and fills them, one by one, and at random, and has the backend
// refuse some of what that takes.
func TestLimit(t *testing.T) {
	runs(t, checkLimit, checkLimitLogs)
	b := newLimited(sound)
	b.mix(gvmtest.Rand(t), 4000)
	if err := b.end(); err != nil {
		t.Error(err)
	}
}

func checkLimit(m mutant) error {
	b := newLimited(m)
	for i := range 6 {
		b.set(5+2*i, 1, addr.NoAccess)
	}
	for i := range 6 {
		b.set(5+2*i, 1, addr.ReadWrite)
	}
	b.mix(rand.New(rand.NewPCG(1, 2)), 100)
	return b.end()
}

// checkLimitLogs has the guest write just before the slots become coarse, and before
// they become precise.
func checkLimitLogs(m mutant) error {
	b := newLimited(m)
	for i := range 6 {
		b.guestStores(4+2*i, byte(1+i))
		b.set(5+2*i, 1, addr.NoAccess)
		b.harvest("a hole")
	}
	for i := range 6 {
		b.guestStores(4+2*i, byte(11+i))
		b.set(5+2*i, 1, addr.ReadWrite)
		b.harvest("a hole less")
	}
	return b.end()
}

// mix makes n random steps.
func (b *limited) mix(rng *rand.Rand, n int) {
	spare := bedPages + highPages
	for range n {
		if b.err() != nil {
			return
		}
		i := rng.IntN(bedPages)
		switch rng.IntN(12) {
		case 0, 1, 2:
			b.set(i, 1, addr.NoAccess)
		case 3:
			b.set(i, 1+rng.IntN(bedPages-i), addr.ReadWrite)
		case 4, 5, 6:
			b.set(i, 1, addr.ReadWrite)
		case 7:
			b.set(i, 1, addr.Read)
		case 8:
			b.refuse = 1 + rng.IntN(12)
			b.set(i, 1, []addr.Access{addr.NoAccess, addr.ReadWrite}[rng.IntN(2)])
			b.refuse = 0
		case 9:
			if b.host.model[b.hva(i)] != addr.NoAccess {
				b.remap(i, spare)
				b.remap(spare, i)
			}
		case 10:
			if err := errors.Join(b.LogDirty(false), b.LogDirty(true)); err != nil {
				b.errorf("%w", err)
			}
			copy(b.copy, b.memory) // nothing was reported meanwhile
		case 11:
			b.harvest("a harvest")
		}
		if i := rng.IntN(bedPages); b.host.model[b.hva(i)] == addr.ReadWrite {
			b.guestStores(i, byte(rng.Uint32()))
		}
	}
}

func (b *limited) end() error {
	b.set(0, bedPages, addr.ReadWrite)
	b.harvest("at the end")
	if n := b.Slots().Len(); n != 3 && b.err() == nil {
		b.errorf("with all mapped there are %d slots, want one for each window", n)
	}
	return b.finish()
}

// TestEnds: whoever waits for memory is told of the end of a bracket when the slots
// are what they are after it, though they may be the same.
func TestEnds(t *testing.T) { runs(t, checkEnds) }

func checkEnds(m mutant) error {
	b := newBed(m, bedPages)
	ended, changed := b.Ended(), b.Slots().Changed()
	inv := notifier.Invalidation{Range: b.hvas(4, 1), Event: notifier.Clear, Content: notifier.Kept, After: addr.ReadWrite}
	if err := b.InvalidateRangeStart(&inv); err != nil {
		b.errorf("%w", err)
	}
	if gvmtest.Closed(ended) {
		b.errorf("the bracket is open, and its end is told")
	}
	b.InvalidateRangeEnd(&inv)
	if !gvmtest.Closed(ended) || gvmtest.Closed(changed) {
		b.errorf("a bracket that leaves the slots alone: its end is told: %v, and that slots have changed: %v", gvmtest.Closed(ended), gvmtest.Closed(changed))
	}
	inv = notifier.Invalidation{Range: b.hvas(4, 1), Event: notifier.Unmap, Content: notifier.Kept}
	ended = b.Ended()
	slots := make(chan int, 1)
	go func() {
		if gvmtest.ClosedWithin(ended, gvmtest.LimitFor(m)) {
			slots <- b.Slots().Len()
		} else {
			slots <- -1
		}
	}()
	if err := b.bracket(inv, func() { b.host.set(inv.Range, addr.NoAccess) }); err != nil {
		b.errorf("%w", err)
	}
	if n := <-slots; n != 4 {
		b.errorf("at the end of a bracket there are %d slots, want 4", n)
	}
	ended = b.Ended()
	b.Release()
	if !gvmtest.Closed(ended) {
		b.errorf("the release is not told")
	}
	return b.finish()
}

// countingBackend counts requests.
type countingBackend struct {
	nullBackend
	requests int
}

func (b *countingBackend) CreateSlot(Slot) error { b.requests++; return nil }
func (b *countingBackend) DeleteSlot(Slot) error { b.requests++; return nil }

// BenchmarkPolicy times the tracker's part of an unmap and a map of the same page, with
// the backend's requests for nothing: each is an ioctl with KVM, with all vCPUs out of
// the guest. They are reported, too. Among many holes, which precise slots go around
// until there are too many.
func BenchmarkPolicy(b *testing.B) {
	const holes = 1000
	for _, bb := range []struct {
		name   string
		policy Policy
		limit  uint32
	}{{"precise", Precise, 1 << 15}, {"coarse", Precise, holes / 2}, {"lazy", Lazy, 1 << 15}} {
		b.Run("slots="+bb.name, func(b *testing.B) {
			host := &bedHost{model: hostModel{}}
			backend := &countingBackend{}
			t := NewTracker(host, backend, bb.limit, nil)
			t.SetPolicy(bb.policy)
			w := Window{Name: "ram", NPages: 4*holes + 64, HVA: 1 << 30}
			host.set(w.HVAs(), addr.ReadWrite)
			for i := range holes {
				host.set(addr.HVAs(w.HVA+addr.HVA((64+4*i)*page), page), addr.NoAccess)
			}
			if err := t.AddWindow(w); err != nil {
				b.Fatal(err)
			}
			if t.Coarse() != (bb.name != "precise") {
				b.Fatalf("Coarse() is %v", t.Coarse())
			}
			r := addr.HVAs(w.HVA+8*page, page)
			backend.requests = 0
			for b.Loop() {
				for _, inv := range []notifier.Invalidation{{Range: r, Event: notifier.Unmap}, {Range: r, Event: notifier.Map, After: addr.ReadWrite}} {
					if err := t.InvalidateRangeStart(&inv); err != nil {
						b.Fatal(err)
					}
					host.set(r, inv.After)
					t.InvalidateRangeEnd(&inv)
				}
			}
			b.ReportMetric(float64(backend.requests)/float64(b.N), "requests/op")
		})
	}
}
