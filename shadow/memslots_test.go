package shadow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

// board is slots that are set by hand, and what was wrong with them.
type board struct {
	*Memslots
	backend *bedBackend
	wrong   []error
}

func newBoard(m mutant, limit uint32) *board {
	b := &board{}
	b.backend = &bedBackend{slots: map[uint32]Slot{}, report: func(format string, args ...any) {
		b.wrong = append(b.wrong, fmt.Errorf(format, args...))
	}}
	b.Memslots = NewMemslots(b.backend, limit, nil)
	b.mutant = m
	return b
}

// err checks the board, and returns what is wrong.
func (b *board) err() error {
	errs := append(slices.Clone(b.wrong), b.Slots().Check())
	if b.Slots().Updating() {
		errs = append(errs, errors.New("the set says that it is being updated"))
	}
	if diff := cmp.Diff(b.backend.list(), slices.Collect(b.Slots().All())); diff != "" {
		errs = append(errs, fmt.Errorf("slots (-backend +published):\n%s", diff))
	}
	if b.backend.held != 0 {
		errs = append(errs, fmt.Errorf("the backend is held %d times", b.backend.held))
	}
	return errors.Join(errs...)
}

// list returns the slots of the backend in the order of their frames.
func (b *bedBackend) list() (list []Slot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.slots {
		list = append(list, s)
	}
	slices.SortFunc(list, compareSlots)
	return list
}

// TestRequests is the table of KVM_SET_USER_MEMORY_REGION.
func TestRequests(t *testing.T) {
	const at = 0x10000
	old := Slot{ID: 3, GFN: 0x100, NPages: 8, HVA: at, Access: addr.ReadWrite}
	next := Slot{ID: 4, GFN: 0x110, NPages: 8, HVA: at, Access: addr.Read} // an alias: that is allowed
	with := func(change func(s *Slot)) Slot {
		s := old
		change(&s)
		return s
	}
	for name, tt := range map[string]struct {
		s    Slot
		op   string // empty: nothing is done
		want error
	}{
		"delete":              {with(func(s *Slot) { s.NPages = 0 }), "delete", nil},
		"delete by number":    {Slot{ID: 3}, "delete", nil},
		"delete none":         {Slot{ID: 5}, "delete", syscall.EINVAL},
		"create":              {Slot{ID: 5, GFN: 0x108, NPages: 8, HVA: at, Access: addr.Read}, "create", nil},
		"create over the end": {Slot{ID: 5, GFN: 0x107, NPages: 2, HVA: at, Access: addr.Read}, "create", syscall.EEXIST},
		"create over two":     {Slot{ID: 5, GFN: 0x107, NPages: 10, HVA: at, Access: addr.Read}, "create", syscall.EEXIST},
		"move":                {with(func(s *Slot) { s.GFN = 0x200 }), "move", nil},
		"move a bit":          {with(func(s *Slot) { s.GFN++ }), "move", nil},
		"move and log":        {with(func(s *Slot) { s.GFN, s.LogDirty = 0x200, true }), "move", nil},
		"move over another":   {with(func(s *Slot) { s.GFN = 0x109 }), "move", syscall.EEXIST},
		"log":                 {with(func(s *Slot) { s.LogDirty = true }), "log", nil},
		"identical":           {old, "", nil},
		"another size":        {with(func(s *Slot) { s.NPages++ }), "set", syscall.EINVAL},
		"another address":     {with(func(s *Slot) { s.HVA += page }), "set", syscall.EINVAL},
		"read-only":           {with(func(s *Slot) { s.Access = addr.Read }), "set", syscall.EINVAL},
		"no access":           {Slot{ID: 5, GFN: 0x300, NPages: 8, HVA: at}, "set", syscall.EINVAL},
		"write only":          {Slot{ID: 5, GFN: 0x300, NPages: 8, HVA: at, Access: addr.Write}, "set", syscall.EINVAL},
		"misaligned":          {Slot{ID: 5, GFN: 0x300, NPages: 8, HVA: at + 1, Access: addr.Read}, "set", syscall.EINVAL},
		"addresses wrap":      {Slot{ID: 5, GFN: 0x300, NPages: 8, HVA: ^addr.HVA(page - 1), Access: addr.Read}, "set", syscall.EINVAL},
		"frames wrap":         {Slot{ID: 5, GFN: ^addr.GFN(3), NPages: 8, HVA: at, Access: addr.Read}, "set", syscall.EINVAL},
		"the last frame":      {Slot{ID: 5, GFN: 1<<40 - 8, NPages: 8, HVA: at, Access: addr.Read}, "create", nil},
		"too high":            {Slot{ID: 5, GFN: 1<<40 - 7, NPages: 8, HVA: at, Access: addr.Read}, "set", syscall.EINVAL},
		"number":              {Slot{ID: 8, GFN: 0x300, NPages: 8, HVA: at, Access: addr.Read}, "set", syscall.EINVAL},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBoard(sound, 8)
			if err := errors.Join(b.Set(old), b.Set(next)); err != nil {
				t.Fatal(err)
			}
			before, generation := slices.Collect(b.Slots().All()), b.Slots().Generation()
			err := b.Set(tt.s)
			var e *SlotError
			if !errors.Is(err, tt.want) || err != nil && (!errors.As(err, &e) || e.Op != tt.op || e.Slot != tt.s) {
				t.Errorf("Set(%v) returned %v, want %v of %q", tt.s, err, tt.want, tt.op)
			}
			want := before
			if err == nil && tt.op != "" {
				want = slices.DeleteFunc(slices.Clone(before), func(s Slot) bool { return s.ID == tt.s.ID })
				if tt.s.NPages > 0 {
					want = append(want, tt.s)
				}
				slices.SortFunc(want, compareSlots)
			}
			if diff := cmp.Diff(want, slices.Collect(b.Slots().All())); diff != "" {
				t.Errorf("slots (-want +got):\n%s", diff)
			}
			if changed := b.Slots().Generation() != generation; changed != (err == nil && tt.op != "") {
				t.Errorf("the generation was %d and is %d", generation, b.Slots().Generation())
			}
			if err := b.err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLookups finds slots by frame and by address among many, aliases included.
func TestLookups(t *testing.T) {
	const n = 3000
	b := newBoard(sound, n+1)
	slot := func(i int) Slot {
		return Slot{ID: uint32(i), GFN: addr.GFN(10 * i), NPages: 5, HVA: addr.HVA(i%1000) * 8 * page, Access: addr.ReadWrite}
	}
	for _, i := range rand.Perm(n) {
		if err := b.Set(slot(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		s := slot(i)
		for gfn := s.GFN; gfn < s.GFN+10; gfn++ {
			if got, ok := b.Slots().Lookup(gfn); ok != s.GFNs().Contains(gfn) || ok && got != s {
				t.Fatalf("Lookup(%v) gives %v, %v, want %v", gfn, got, ok, s)
			}
		}
		for _, r := range []addr.HVARange{addr.HVAs(s.HVA, page), addr.HVAs(s.HVA+5*page-1, 3*page), addr.HVAs(s.HVA, 0), addr.HVAs(s.HVA+5*page, 3*page)} {
			var want []uint32
			for k := i % 1000; k < n; k += 1000 {
				if slot(k).HVAs().Overlaps(r) {
					want = append(want, uint32(k))
				}
			}
			var got []uint32
			for o := range b.Slots().InHVAs(r) {
				got = append(got, o.ID)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Fatalf("InHVAs(%v) gives slots %v, want %v", r, got, want)
			}
		}
	}
	if err := b.err(); err != nil {
		t.Error(err)
	}
}

// TestNumbersAreRecycled, also after refusals, lowest first.
func TestNumbersAreRecycled(t *testing.T) { runs(t, checkNumbers) }

func checkNumbers(m mutant) error {
	const limit = 200 // more than the bits of a word, and no multiple of them
	b := newBoard(m, limit)
	add := func(gfn addr.GFN) error {
		b.lock()
		defer b.unlock()
		return b.applyLocked(update{creates: []Slot{{ID: noID, GFN: gfn, NPages: 1, HVA: page, Access: addr.Read}}}, nil, 0)
	}
	for round := range 3 {
		for i := range limit {
			if err := add(addr.GFN(i)); err != nil {
				return fmt.Errorf("round %d: slot %d of %d: %w", round, i, limit, err)
			}
			if s, _ := b.Slots().Lookup(addr.GFN(i)); s.ID != uint32(i) {
				return fmt.Errorf("round %d: slot %d has number %d, which is not the lowest that is free", round, i, s.ID)
			}
		}
		if err := add(limit); !errors.Is(err, ErrSlotLimit) || !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("one slot too many: %w, want ErrSlotLimit", err)
		}
		for _, i := range rand.Perm(limit) {
			if err := b.Set(Slot{ID: uint32(i)}); err != nil {
				return err
			}
		}
	}
	return b.err()
}

// TestTransactions refuses each step of a transaction in turn, and then all from
// there on: it is done as a whole or not at all, and where it cannot be undone
// what is published is what there is.
func TestTransactions(t *testing.T) { runs(t, checkTransactions) }

func checkTransactions(m mutant) error {
	refused := errors.New("refused")
	var errs []error
	for at := 1; at <= 7; at++ {
		for _, forGood := range []bool{false, true} {
			b := newBoard(m, 16)
			for i := range 4 {
				if err := b.Set(Slot{ID: uint32(i), GFN: addr.GFN(16 * i), NPages: 8, HVA: addr.HVA(16 * i * page), Access: addr.ReadWrite}); err != nil {
					return err
				}
			}
			before := b.backend.list()
			// The frames of what is created are those of what is deleted.
			u := update{
				deletes: []Slot{before[0], before[1]},
				changes: []move{{before[3], func(s Slot) Slot { s.GFN = 100; return s }(before[3])}},
				creates: []Slot{
					{ID: noID, GFN: 0, NPages: 3, HVA: 0, Access: addr.ReadWrite}, {ID: noID, GFN: 4, NPages: 4, HVA: 4 * page, Access: addr.Read},
					{ID: noID, GFN: 16, NPages: 8, HVA: 0x100 * page, Access: addr.ReadWrite},
				},
			}
			calls := 0
			b.backend.fail = func(string, Slot) error {
				if calls++; calls == at || forGood && calls > at {
					return refused
				}
				return nil
			}
			b.lock()
			err := b.applyLocked(u, nil, 0)
			b.unlock()
			b.backend.fail = nil
			if done := at > 6; done != (err == nil) || !done && !errors.Is(err, refused) {
				errs = append(errs, fmt.Errorf("refused at step %d: error is %w", at, err))
			}
			if diff := cmp.Diff(before, b.backend.list()); diff != "" && !forGood && at <= 6 {
				errs = append(errs, fmt.Errorf("refused at step %d: slots (-before +after):\n%s", at, diff))
			}
			errs = append(errs, b.err())
		}
	}
	return errors.Join(errs...)
}

// TestV2DeletedSlotsHaveNoTranslations: when a slot goes, its translations have gone
// before; of one that others take the place of only where these show something
// else.
func TestV2DeletedSlotsHaveNoTranslations(t *testing.T) { runs(t, checkDeletedSlots) }

func checkDeletedSlots(m mutant) error {
	b := newBed(m, bedPages)
	b.touch(6, 7, 8, 9)
	at := func(want ...addr.GFN) func(string, Slot) error {
		return func(string, Slot) error {
			if got := b.translated(); !slices.Equal(got, want) {
				b.errorf("as the slots change, translated are %v, want %v", got, want)
			}
			return nil
		}
	}
	b.backend.fail = at(ramGFN+6, ramGFN+7, ramGFN+9)
	// Through the slots alone: a bracket would zap the page by itself.
	cut := notifier.Invalidation{Range: b.hvas(8, 1), Event: notifier.Unmap}
	b.slots.lock()
	if err := b.fitLocked(b.Slots().windows, b.shows(cut.Range), &cut, 0); err != nil {
		b.errorf("%w", err)
	}
	b.slots.unlock()
	b.check()
	b.backend.fail = at()
	b.slots.lock()
	b.slots.clearLocked()
	b.slots.unlock()
	b.check()
	return b.finish()
}

// TestV14NobodySeesAnUpdate: who uses a page while its slot is made anew waits for the
// new one, and finds it.
func TestV14NobodySeesAnUpdate(t *testing.T) { runs(t, checkUpdateUnseen) }

func checkUpdateUnseen(m mutant) error {
	b := newBed(m, bedPages)
	var loads []<-chan struct{}
	var errs []error
	var last atomic.Bool // the backend has done all steps: what remains is to publish the set
	var steps int
	b.backend.fail = func(string, Slot) error {
		n := len(loads)
		loads = append(loads, gvmtest.Background(func() {
			_, errs[n] = b.table.Load64(gpa(8))
			if !last.Load() {
				errs[n] = errors.Join(errs[n], errors.New("a page was used while its slot was changing"))
			}
		}))
		gvmtest.ClosedWithin(loads[n], gvmtest.GraceFor(m))
		last.Store(len(loads) == steps)
		return nil
	}
	inv := notifier.Invalidation{Range: b.hvas(9, 1), Event: notifier.Unmap} // cuts the slot of page 8, too
	b.slots.lock()
	u := derive(b.Slots().slots, b.shows(inv.Range), b.mapped(b.Slots().windows, &inv, false))
	steps = len(u.deletes) + len(u.changes) + len(u.creates)
	errs = make([]error, steps)
	err := b.slots.applyLocked(u, nil, 0)
	b.slots.unlock()
	for _, l := range loads {
		<-l
	}
	if b.backend.fail = nil; len(loads) != steps {
		b.errorf("the backend was asked for %d steps, want %d", len(loads), steps)
	}
	b.behind.Store(true) // page 9 has no slot, and is mapped
	return errors.Join(err, errors.Join(errs...), b.finish())
}

// TestV5SetsAreWhole looks at sets while they change: each is a whole one, before or
// after a change.
func TestV5SetsAreWhole(t *testing.T) {
	b := newBoard(sound, 64)
	var stop atomic.Bool
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for last := uint64(0); !stop.Load(); {
				set := b.Slots()
				if err := set.Check(); err != nil {
					t.Error(err)
				}
				// Slots come and go two at a time.
				if n := set.Len(); n%2 != 0 {
					t.Errorf("a set has %d slots", n)
				}
				if set.Generation() < last {
					t.Errorf("generation %d after %d", set.Generation(), last)
				}
				last = set.Generation()
			}
		})
	}
	for i := range 1000 {
		gfn := addr.GFN(i % 16 * 32)
		two := []Slot{{ID: noID, GFN: gfn, NPages: 8, HVA: page, Access: addr.Read}, {ID: noID, GFN: gfn + 16, NPages: 8, HVA: page, Access: addr.Read}}
		u := update{creates: two}
		if i/16%2 == 1 {
			u = update{deletes: slices.Collect(b.Slots().InGFNs(frames(gfn, 32)))}
		}
		b.lock()
		if err := b.applyLocked(u, nil, 0); err != nil {
			t.Error(err)
		}
		b.unlock()
	}
	stop.Store(true)
	readers.Wait()
	if err := b.err(); err != nil {
		t.Error(err)
	}
}

// TestV18Generations: every set that is different has a larger generation, and a set
// that is about to change says so.
func TestV18Generations(t *testing.T) { runs(t, checkGenerations) }

func checkGenerations(m mutant) error {
	b := newBoard(m, 8)
	updating := false
	b.backend.fail = func(string, Slot) error {
		updating = b.Slots().Updating()
		return nil
	}
	for i, s := range []Slot{
		{ID: 1, GFN: 8, NPages: 8, HVA: page, Access: addr.Read}, {ID: 1, GFN: 16, NPages: 8, HVA: page, Access: addr.Read},
		{ID: 1, GFN: 16, NPages: 8, HVA: page, Access: addr.Read, LogDirty: true}, {ID: 1},
	} {
		before := b.Slots()
		changed := b.Slots().Changed()
		if err := b.Set(s); err != nil {
			return err
		}
		if now := b.Slots(); now.Generation() <= before.Generation() || before.Updating() || !updating || now.Updating() {
			return fmt.Errorf("change %d: the generation was %d and is %d; updating before it, in it, after it: %v, %v, %v",
				i, before.Generation(), now.Generation(), before.Updating(), updating, now.Updating())
		}
		if !gvmtest.Closed(changed) {
			return fmt.Errorf("change %d is not told to who waits for one", i)
		}
	}
	return b.err()
}

// TestV4UpdatesAndStorms: slots change while brackets come and go elsewhere and
// there, and neither keeps the other from ending.
func TestV4UpdatesAndStorms(t *testing.T) {
	b := newBed(sound, bedPages)
	var stop atomic.Bool
	var storm sync.WaitGroup
	for n := range 2 {
		storm.Go(func() {
			for i := 0; !stop.Load(); i++ {
				r := b.hvas((i+n)%bedPages, 1+i%3)
				b.table.begin(r)
				b.table.end(r)
			}
		})
	}
	storm.Go(func() {
		for i := 0; !stop.Load(); i++ {
			if _, err := b.table.Load64(gpa(8 + i%8)); err != nil && !errors.Is(err, syscall.EFAULT) {
				t.Error(err)
			}
		}
	})
	for i := range 300 {
		inv := notifier.Invalidation{Range: b.hvas(8+i%4, 1), Event: notifier.Unmap}
		if err := b.bracket(inv, func() { b.host.set(inv.Range, addr.NoAccess) }); err != nil {
			t.Error(err)
		}
		inv.Event, inv.After = notifier.Map, addr.ReadWrite
		if err := b.bracket(inv, func() { b.host.set(inv.Range, addr.ReadWrite) }); err != nil {
			t.Error(err)
		}
	}
	stop.Store(true)
	storm.Wait()
	if n := b.table.active.Load(); n != 0 {
		t.Errorf("%d brackets are counted after the storm", n)
	}
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}
