package shadow

import (
	"bytes"
	"context"
	"errors"
	"io"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

// TestLayout holds the tables to the sizes that are counted for them.
func TestLayout(t *testing.T) {
	for level, typ := range []reflect.Type{1: reflect.TypeFor[leaf](), 2: reflect.TypeFor[level2](), 3: reflect.TypeFor[level3]()} {
		if level > 0 && int(typ.Size()) != tableBytes[level] {
			t.Errorf("a table of level %d has %d bytes, and counts as %d", level, typ.Size(), tableBytes[level])
		}
	}
	if n := reflect.TypeFor[Table]().Size(); n > rootBytes+1024 {
		t.Errorf("a table has %d bytes, and its root counts as %d", n, rootBytes)
	}
}

// TestAccess uses memory in every way, and looks at the host's side of it.
func TestAccess(t *testing.T) {
	b := newBed(sound, bedPages)
	view := b.table.NewView(t.Context())
	for name, u := range map[string]*user{"table": &b.table.user, "view": &view.user} {
		t.Run(name, func(t *testing.T) {
			if err := errors.Join(u.Store64(gpa(5)+8, 1<<40|7), u.Store32(gpa(5)+16, 9)); err != nil {
				t.Fatal(err)
			}
			v64, err64 := u.Load64(gpa(5) + 8)
			v32, err32 := u.Load32(gpa(5) + 16)
			if v64 != 1<<40|7 || v32 != 9 || err64 != nil || err32 != nil {
				t.Errorf("what was stored is loaded as %#x, %v and %d, %v", v64, err64, v32, err32)
			}
			if got := b.memory[5*page+8]; got != 7 {
				t.Errorf("the host has %d where 7 was stored", got)
			}
			for _, tt := range []struct {
				old, v uint64
				want   bool
			}{{1, 2, false}, {1<<40 | 7, 3, true}, {3, 4, true}} {
				if ok, err := u.CompareAndSwap64(gpa(5)+8, tt.old, tt.v); ok != tt.want || err != nil {
					t.Errorf("CompareAndSwap64(%d, %d) gives %v, %v", tt.old, tt.v, ok, err)
				}
			}
			// Across page borders, and to pages that the guest has elsewhere.
			text := []byte(strings.Repeat(name, 2*page))[:2*page]
			if n, err := u.WriteAt(text, int64(gpa(2)+100)); n != len(text) || err != nil {
				t.Errorf("WriteAt gives %d, %v", n, err)
			}
			if !bytes.Equal(b.memory[2*page+100:][:len(text)], text) {
				t.Error("what was written across pages is not what the host has")
			}
			got := make([]byte, 2*page-100)
			if n, err := u.ReadAt(got, int64(aliasGPA(2)+100)); n != len(got) || err != nil || !bytes.Equal(got, text[:len(got)]) {
				t.Errorf("ReadAt of an alias gives %d, %v, and the same text: %v", n, err, bytes.Equal(got, text[:len(got)]))
			}
			if n, err := io.ReadAll(io.NewSectionReader(u, int64(gpa(2)+100), 8)); err != nil || !bytes.Equal(n, text[:8]) {
				t.Errorf("a section reader gives %q, %v", n, err)
			}
			var pieces []int
			err := u.Use(gpa(bedPages-2), 2*page, addr.ReadWrite, func(p []byte) error {
				pieces = append(pieces, len(p))
				p[0] = 42
				return nil
			})
			if err != nil || !slices.Equal(pieces, []int{page, page}) || b.memory[(bedPages-1)*page] != 42 {
				t.Errorf("Use comes in pieces of %v, %v", pieces, err)
			}
		})
	}
	view.Close()
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// TestAccessErrors: each says what was wanted where, and why it is not to be had.
func TestAccessErrors(t *testing.T) {
	b := newBed(sound, bedPages)
	if err := b.bracket(notifier.Invalidation{Range: b.hvas(3, 1), Event: notifier.Protect, After: addr.Read}, func() { b.host.set(b.hvas(3, 1), addr.Read) }); err != nil {
		t.Fatal(err)
	}
	b.host.set(b.hvas(6, 1), addr.NoAccess) // by somebody who tells nobody
	u := b.table
	buf := make([]byte, 8)
	broken := errors.New("broken")
	for name, tt := range map[string]struct {
		do   func() error
		want error
		at   addr.GPA
		says string
	}{
		"nowhere":         {func() error { _, err := u.Load64(8); return err }, syscall.EFAULT, 8, "no memory slot"},
		"past the end":    {func() error { _, err := u.ReadAt(buf, int64(gpa(bedPages)-4)); return err }, syscall.EFAULT, gpa(bedPages), "no memory slot"},
		"negative":        {func() error { _, err := u.ReadAt(buf, -8); return err }, syscall.EFAULT, ^addr.GPA(7), "no memory slot"},
		"read-only":       {func() error { return u.Store64(gpa(3), 1) }, syscall.EFAULT, gpa(3), "read-only"},
		"not mapped":      {func() error { _, err := u.Load64(gpa(6)); return err }, syscall.EFAULT, gpa(6), "mapping does not allow"},
		"misaligned":      {func() error { _, err := u.Load64(gpa(1) + 4); return err }, syscall.EINVAL, gpa(1) + 4, "not a multiple"},
		"misaligned 32":   {func() error { return u.Store32(gpa(1)+2, 1) }, syscall.EINVAL, gpa(1) + 2, "not a multiple"},
		"the user's":      {func() error { return u.Use(gpa(1), 1, addr.Read, func([]byte) error { return broken }) }, broken, 0, ""},
		"use past memory": {func() error { return u.Use(gpa(bedPages-1), 2*page, addr.Read, func([]byte) error { return nil }) }, syscall.EFAULT, gpa(bedPages), "no memory slot"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tt.do()
			var e *AccessError
			if !errors.Is(err, tt.want) || tt.says != "" && (!errors.As(err, &e) || e.GPA != tt.at || !strings.Contains(e.Error(), tt.says)) {
				t.Errorf("error is %v, want %v at %v that says %q", err, tt.want, tt.at, tt.says)
			}
		})
	}
	b.host.set(b.hvas(6, 1), addr.ReadWrite)
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// TestStrayChange: memory that was unmapped by code that tells nobody is an error,
// not the end of the process, also in the middle of a Use.
func TestStrayChange(t *testing.T) {
	b := newBed(sound, bedPages)
	b.touch(9)
	if err := protectNone(b.memory[9*page : 10*page]); err != nil {
		t.Fatal(err)
	}
	_, loaded := b.table.Load64(gpa(9))
	used := b.table.Use(gpa(9), 8, addr.Read, func(p []byte) error {
		t.Errorf("a byte of memory that is not there is %d", p[0])
		return nil
	})
	for _, err := range []error{loaded, used} {
		var e *AccessError
		if !errors.As(err, &e) || !errors.Is(err, syscall.EFAULT) || !strings.Contains(err.Error(), "although it was mapped") {
			t.Errorf("error is %v, want an *AccessError with EFAULT", err)
		}
	}
	func() {
		defer func() {
			if p := recover(); p == nil {
				t.Error("a fault of the user's own is taken for one of guest memory")
			}
		}()
		_ = b.table.Use(gpa(1), 8, addr.Read, func([]byte) error {
			var none *error
			return *none
		})
	}()
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// bracket makes a change between start and end.
func (b *bed) bracket(inv notifier.Invalidation, change func()) error {
	err := b.InvalidateRangeStart(&inv)
	change()
	b.InvalidateRangeEnd(&inv)
	return err
}

// TestHotPathsDoNotAllocate includes brackets that zap something.
func TestHotPathsDoNotAllocate(t *testing.T) {
	b := newBed(sound, bedPages)
	view := b.table.NewView(t.Context())
	buf := make([]byte, 3*page)
	b.touch(4, 5, 6, 7)
	inv := notifier.Invalidation{Range: b.hvas(6, 1), Event: notifier.Clear, Content: notifier.Zeroed, After: addr.ReadWrite}
	five := []addr.GFNRange{frames(ramGFN+5, 1)}
	for name, do := range map[string]func() error{
		"load":       func() error { _, err := view.Load64(gpa(4)); return err },
		"store":      func() error { return view.Store64(gpa(4), 1) },
		"table load": func() error { _, err := b.table.Load64(gpa(4)); return err },
		"copy":       func() error { _, err := view.ReadAt(buf, int64(gpa(4)+8)); return err },
		"fault": func() error {
			b.table.zapFrames(five)
			_, err := view.Load64(gpa(5))
			return err
		},
		"bracket": func() error {
			err := b.InvalidateRangeStart(&inv)
			b.InvalidateRangeEnd(&inv)
			return err
		},
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := testing.AllocsPerRun(100, func() { _ = do() }); n != 0 && !gvmtest.Race && !gvmtest.Debug { // which allocate by themselves
			t.Errorf("%s allocates %v times", name, n)
		}
	}
	view.Close()
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// TestLargeEntries: memory that is in one piece takes large entries, which are
// split when a part of them goes, and only there.
func TestLargeEntries(t *testing.T) {
	const (
		block = 1 << levelShift // pages of an entry of level 2
		giant = block * block   // and of level 3
		npage = 2*giant + block + 7
	)
	tr := NewTracker(wholeHost{}, nullBackend{}, 8, nil)
	w := Window{Name: "ram", GFN: 3 * giant, NPages: npage, HVA: 1 << 40}
	if err := tr.AddWindow(w); err != nil {
		t.Fatal(err)
	}
	if err := tr.AddWindow(Window{Name: "alias", GFN: 0, NPages: 1, HVA: w.HVA + block*page}); err != nil {
		t.Fatal(err)
	}
	tab := tr.Table()
	level := func(gfn addr.GFN) (addr.HVA, int) {
		t.Helper()
		if err := tab.fault(t.Context(), gfn, addr.ReadWrite); err != nil {
			t.Fatal(err)
		}
		e, _, level := tab.find(gfn)
		if !e.allows(addr.ReadWrite) {
			t.Fatalf("%v is not translated after a fault", gfn)
		}
		return e.hva() + addr.HVA(gfn-levelBlock(gfn, level).Start)<<addr.PageShift, level
	}
	for name, tt := range map[string]struct {
		gfn   addr.GFN
		level int
	}{
		"the second GiB":           {w.GFN + giant + 5, 3},
		"the first, with an alias": {w.GFN + 5, 2},
		"the block with the alias": {w.GFN + block + 5, 1},
		"the aliased page":         {w.GFN + block, 1},
		"the alias":                {0, 1},
		"2 MiB at the end":         {w.GFN + 2*giant + 1, 2},
		"the rest":                 {w.GFN + 2*giant + block + 1, 1},
		"the last page":            {w.GFN + npage - 1, 1},
	} {
		hva, got := level(tt.gfn)
		want := w.HVA + addr.HVA(tt.gfn-w.GFN)*page
		if tt.gfn == 0 {
			want = w.HVA + block*page
		}
		if got != tt.level || hva != want {
			t.Errorf("%s: %v is translated at level %d to %v, want level %d and %v", name, tt.gfn, got, hva, tt.level, want)
		}
	}
	check := func(what string, pages int) {
		t.Helper()
		if err := tr.Check(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if got := tab.Stats().Pages; got != pages {
			t.Errorf("%s: %d pages are translated, want %d", what, got, pages)
		}
	}
	pages := giant + block + 1 + 1 + 1 + block + 1 + 1
	check("all", pages)
	zap := func(what string, gfn addr.GFN, n, zapped int) {
		t.Helper()
		tab.zapFrames([]addr.GFNRange{frames(gfn, uint64(n))})
		pages -= zapped
		check(what, pages)
	}
	zap("nothing there", w.GFN+2*giant+block+2, 4, 0)
	zap("a page of a GiB", w.GFN+giant+5, 1, 1)
	if _, l := level(w.GFN + giant + 6); l != 1 {
		t.Errorf("beside the page that was zapped the level is %d, want 1", l)
	}
	if _, l := level(w.GFN + giant + 2*block); l != 2 {
		t.Errorf("in another block of the GiB the level is %d, want 2", l)
	}
	zap("pages of two blocks", w.GFN+giant+2*block-2, 4, 4)
	zap("a block and more", w.GFN+giant+4*block-1, block+2, block+2)
	zap("the whole GiB", w.GFN+giant, giant, giant-1-4-block-2)
	zap("everything", 0, 1<<40, pages)
	if st := tab.Stats(); st.Tables > 1+1 {
		t.Errorf("an empty table has %d tables", st.Tables)
	}
}

// TestSparseGuest: what a guest of 1 TiB costs is what is used of it.
func TestSparseGuest(t *testing.T) {
	const (
		npages = 1 << 28
		used   = 500
	)
	m := NewMemslots(nullBackend{}, 8, nil)
	tab := NewTable(m, pagewiseHost{})
	if err := m.Set(Slot{NPages: npages, HVA: 1 << 40, Access: addr.ReadWrite}); err != nil {
		t.Fatal(err)
	}
	rng := gvmtest.Rand(t)
	gfns := map[addr.GFN]bool{}
	for len(gfns) < used {
		gfn := addr.GFN(rng.Uint64N(npages))
		gfns[gfn] = true
		if err := tab.fault(t.Context(), gfn, addr.ReadWrite); err != nil {
			t.Fatal(err)
		}
		idx := tab.domain.ReadLock()
		tab.mark(gfn, 0)
		tab.domain.ReadUnlock(idx)
	}
	// At the most, each page is alone in tables of its own.
	st, most := tab.Stats(), rootBytes+tableBytes[3]+used*(tableBytes[1]+tableBytes[2])
	if st.Pages != used || st.Bytes > most {
		t.Errorf("%d pages take %d bytes of tables, want at most %d", st.Pages, st.Bytes, most)
	}
	if n := tab.Dirty().Stats().Bytes; n > used*(4096+64)+1<<20 {
		t.Errorf("%d dirty pages take %d bytes", used, n)
	}
	if err := errors.Join(tab.Check(), m.Slots().Check()); err != nil {
		t.Error(err)
	}
	tab.zapFrames([]addr.GFNRange{allGFNs})
	if st := tab.Stats(); st.Pages != 0 || st.Bytes > rootBytes+tableBytes[3] {
		t.Errorf("after all was zapped %d pages take %d bytes", st.Pages, st.Bytes)
	}
}

// Checks of faults that are overtaken by brackets.

// pulse is a bracket of page i in which its mapping goes away, and the memory with it.
func (b *bed) pulse(i int) {
	b.table.begin(b.hvas(i, 1))
	b.host.set(b.hvas(i, 1), addr.NoAccess)
	b.table.end(b.hvas(i, 1))
}

// TestV7EveryPlacement places a whole bracket at every step of a fault, and one that
// stays open: what the fault has looked up is stale, and it must not use it.
func TestV7EveryPlacement(t *testing.T) { runs(t, checkPulses, checkOpenBrackets, checkForgotten) }

func checkPulses(m mutant) error {
	var errs []error
	for _, at := range []string{"looked at seq", "look", "looked up", "compared"} {
		b := newBed(m, bedPages)
		once := sync.OnceFunc(func() { b.pulse(8) })
		b.table.step = func(step string) {
			if step == at {
				once()
			}
		}
		b.host.lookUp = func(addr.HVA) {
			if at == "look" {
				once()
			}
		}
		_, err := b.table.Load64(gpa(8))
		if at == "compared" { // which only a defective fault comes to
			once()
		} else if !errors.Is(err, errUnmapped) {
			b.errorf("with a bracket at %q the fault has the page, which has gone: %v", at, err)
		}
		b.table.step, b.host.lookUp = nil, nil
		for _, gfn := range b.translated() {
			b.errorf("with a bracket at %q %v is translated, which has gone", at, gfn)
		}
		b.host.set(b.hvas(8, 1), addr.ReadWrite)
		errs = append(errs, b.finish())
	}
	return errors.Join(errs...)
}

// TestViewsForget: a view remembers its last translation until it is zapped, cut from
// its slot, or made old.
func TestViewsForget(t *testing.T) { runs(t, checkViewsForget) }

func checkViewsForget(m mutant) error {
	b := newBed(m, bedPages)
	view := b.table.NewView(context.Background())
	touch := func() {
		if _, err := view.Load64(gpa(8)); err != nil {
			b.errorf("%w", err)
		}
	}
	touch()
	b.pulse(8)
	if _, err := view.Load64(gpa(8)); !errors.Is(err, errUnmapped) {
		b.errorf("after a bracket the view has the page, which has gone: %v", err)
	}
	b.host.set(b.hvas(8, 1), addr.ReadWrite)
	touch()
	b.table.zapFrames([]addr.GFNRange{frames(ramGFN+8, 1)})
	faults := b.table.Stats().Faults
	if touch(); b.table.Stats().Faults != faults+1 {
		b.errorf("after a zap the view finds its page without a fault")
	}
	if touch(); !b.ClearYoung(b.hvas(8, 1)) {
		b.errorf("a page that was used is not young")
	}
	if touch(); !b.TestYoung(b.hva(8)) {
		b.errorf("a page that was used since ClearYoung is not young")
	}
	view.Close()
	return b.finish()
}

// checkOpenBrackets has a bracket open during a fault and stay open, and another
// one, of another page, open after it.
func checkOpenBrackets(m mutant) error {
	b := newBed(m, bedPages)
	opened := make(chan struct{})
	open := sync.OnceFunc(func() {
		b.table.begin(b.hvas(8, 1))
		b.table.begin(b.hvas(9, 1))
		close(opened)
	})
	b.table.step = func(step string) {
		if step == "looked up" {
			open()
		}
	}
	var err error
	loaded := gvmtest.Background(func() { _, err = b.table.Load64(gpa(8)) })
	<-opened
	waits := func() bool {
		b.table.bracketMu.Lock()
		defer b.table.bracketMu.Unlock()
		return b.table.ended != nil
	}
	gvmtest.Eventually(func() bool { return waits() || gvmtest.Closed(loaded) })
	if gvmtest.Closed(loaded) {
		b.errorf("the fault does not wait for the end of the bracket")
	}
	b.check()
	b.host.set(b.hvas(8, 1), addr.NoAccess)
	b.table.end(b.hvas(9, 1))
	b.table.end(b.hvas(8, 1))
	<-loaded
	if !errors.Is(err, errUnmapped) {
		b.errorf("after the bracket the fault has the page, which has gone: %v", err)
	}
	b.host.set(b.hvas(8, 1), addr.ReadWrite)
	return b.finish()
}

// checkForgotten has a fault compare when its bracket has been forgotten and the
// sequence is what it was, if there is such a moment.
func checkForgotten(m mutant) error {
	b := newBed(m, bedPages)
	compare, ended := make(chan struct{}), make(chan struct{})
	start := sync.OnceFunc(func() {
		b.table.begin(b.hvas(8, 1))
		b.host.set(b.hvas(8, 1), addr.NoAccess)
		go func() {
			defer close(ended)
			b.table.end(b.hvas(8, 1))
		}()
		if m == sound {
			<-ended
		} else {
			gvmtest.Eventually(func() bool { return b.table.active.Load() == 0 })
		}
	})
	b.table.step = func(step string) {
		switch step {
		case "looked up":
			start()
		case "between":
			<-compare
		}
	}
	loaded := gvmtest.Background(func() {
		if _, err := b.table.Load64(gpa(8)); !errors.Is(err, errUnmapped) {
			b.errorf("the fault has the page, which has gone: %v", err)
		}
	})
	if m == sound {
		close(compare)
		<-loaded
	} else {
		gvmtest.ClosedWithin(loaded, gvmtest.GraceFor(m)) // or it waits for the lock
		close(compare)
		<-loaded
	}
	<-ended
	b.host.set(b.hvas(8, 1), addr.ReadWrite)
	return b.finish()
}

// TestRetryEnds: a fault that is overtaken again and again ends when its context is
// done, as KVM's does for a signal; and so does one that waits.
func TestRetryEnds(t *testing.T) { runs(t, checkRetryEnds) }

func checkRetryEnds(m mutant) error {
	b := newBed(m, bedPages)
	ctx, cancel := context.WithCancel(context.Background())
	view := b.table.NewView(ctx)
	looks := 0
	b.host.lookUp = func(addr.HVA) {
		switch looks++; {
		case looks == 3:
			cancel()
		case looks > 100:
			return // and let it have its way
		}
		b.table.begin(b.hvas(8, 1))
		b.table.end(b.hvas(8, 1))
	}
	_, err := view.Load64(gpa(8))
	if !errors.Is(err, syscall.EINTR) || !errors.Is(err, context.Canceled) || looks > 10 {
		b.errorf("after %d looks the fault of a canceled view gives %v, want EINTR", looks, err)
	}
	b.host.lookUp = nil
	b.table.begin(b.hvas(9, 1))
	if _, err := view.Load64(gpa(9)); !errors.Is(err, syscall.EINTR) {
		b.errorf("a canceled view that would have to wait for a bracket gives %v, want EINTR", err)
	}
	b.table.end(b.hvas(9, 1))
	view.Close()
	return b.finish()
}

// Checks of who is waited for.

// TestZapWaitsForHolders: a bracket's start returns when nobody uses a page of the
// range, whoever has zapped its translation.
func TestZapWaitsForHolders(t *testing.T) { runs(t, checkHolder, checkSecondBracket, checkUntouched) }

// hold uses page i until the channel that it returns is closed, and goes on then to
// look at done, which is not to be closed yet.
func (b *bed) hold(i int, done *atomic.Bool) (leave chan<- struct{}, left <-chan struct{}) {
	inside, out := make(chan struct{}), make(chan struct{})
	left = gvmtest.Background(func() {
		err := b.table.Use(gpa(i), 8, addr.ReadWrite, func(p []byte) error {
			close(inside)
			<-out
			if done.Load() {
				b.errorf("the page may go while it is used")
			}
			return nil
		})
		if err != nil {
			b.errorf("%w", err)
		}
	})
	<-inside
	return out, left
}

func checkHolder(m mutant) error {
	b := newBed(m, bedPages)
	var started atomic.Bool
	leave, left := b.hold(8, &started)
	bracket := gvmtest.Background(func() {
		b.table.begin(b.hvas(8, 1))
		started.Store(true)
		b.table.end(b.hvas(8, 1))
	})
	gvmtest.ClosedWithin(bracket, gvmtest.GraceFor(m))
	close(leave)
	<-left
	<-bracket
	return b.finish()
}

// checkSecondBracket opens a bracket whose page another one has zapped, and waits for.
func checkSecondBracket(m mutant) error {
	b := newBed(m, bedPages)
	var started atomic.Bool
	leave, left := b.hold(8, &started)
	bracket := func() <-chan struct{} {
		return gvmtest.Background(func() {
			b.table.begin(b.hvas(8, 1))
			started.Store(true)
			b.table.end(b.hvas(8, 1))
		})
	}
	first := bracket()
	gvmtest.Eventually(func() bool { return b.table.Stats().Flushes == 1 })
	second := bracket()
	gvmtest.ClosedWithin(second, gvmtest.GraceFor(m))
	close(leave)
	<-left
	<-first
	<-second
	return b.finish()
}

// checkUntouched: brackets of other pages wait for nobody.
func checkUntouched(m mutant) error {
	b := newBed(m, bedPages)
	var never atomic.Bool
	leave, left := b.hold(8, &never)
	if !gvmtest.ClosedWithin(gvmtest.Background(func() {
		b.table.begin(b.hvas(9, 1))
		b.table.end(b.hvas(9, 1))
	}), gvmtest.Limit) {
		b.errorf("a bracket waits for somebody who uses another page")
	}
	close(leave)
	<-left
	return b.finish()
}

// TestV1NothingOlderIsRead has pages go and come again under readers and writers. A
// page that has gone is filled with a mark: nobody may read that, nor write there.
func TestV1NothingOlderIsRead(t *testing.T) { runs(t, checkNoneGoneIsUsed) }

const gone = 0xdead_dead_dead_dead

func checkNoneGoneIsUsed(m mutant) error {
	rounds := 300
	if m != sound {
		rounds = 20_000 // until it is noticed
	}
	b := newBed(m, bedPages)
	var stop atomic.Bool
	var users sync.WaitGroup
	for n := range 3 {
		view := b.table.NewView(context.Background())
		users.Go(func() {
			defer view.Close()
			for i := n; !stop.Load(); i++ {
				at := gpa(4 + i%4)
				var v uint64
				var err error
				switch i % 3 {
				case 0:
					v, err = view.Load64(at)
				case 1:
					err = view.Store64(at, 1)
				case 2:
					err = view.Use(at, 8, addr.Read, func(p []byte) error {
						runtime.Gosched() // it may take its time
						v = load(p)
						return nil
					})
				}
				switch {
				case err != nil && !errors.Is(err, syscall.EFAULT):
					b.errorf("%w", err)
				case v == gone:
					b.errorf("a page was read that had gone")
				}
			}
		})
	}
	for i := 0; i < rounds && b.err() == nil; i++ {
		p := 4 + i%4
		word := b.memory[p*page : p*page+8]
		unmap := notifier.Invalidation{Range: b.hvas(p, 1), Event: notifier.Unmap}
		if err := b.bracket(unmap, func() {
			store(word, gone)
			b.host.set(b.hvas(p, 1), addr.NoAccess)
		}); err != nil {
			b.errorf("%w", err)
		}
		for range i % 8 {
			runtime.Gosched() // to whoever is still there
			if load(word) != gone {
				b.errorf("a page was written that had gone")
			}
		}
		back := notifier.Invalidation{Range: b.hvas(p, 1), Event: notifier.Map, After: addr.ReadWrite}
		if err := b.bracket(back, func() {
			store(word, 0)
			b.host.set(b.hvas(p, 1), addr.ReadWrite)
		}); err != nil {
			b.errorf("%w", err)
		}
	}
	stop.Store(true)
	users.Wait()
	return b.finish()
}

// TestV3BracketsBalance: as many brackets end as begin, and nothing is left of them,
// whatever becomes of the slots in between.
func TestV3BracketsBalance(t *testing.T) { runs(t, checkBalance) }

func checkBalance(m mutant) error {
	b := newBed(m, bedPages)
	outer := notifier.Invalidation{Range: b.hvas(0, bedPages), Event: notifier.Unmap}
	inner := notifier.Invalidation{Range: b.hvas(4, 2), Event: notifier.Clear, After: addr.ReadWrite}
	if err := errors.Join(b.InvalidateRangeStart(&outer), b.InvalidateRangeStart(&inner)); err != nil {
		b.errorf("%w", err)
	}
	b.host.set(outer.Range, addr.NoAccess) // so that the slots have gone at the end
	if n := b.table.active.Load(); n != 2 {
		b.errorf("%d brackets are open, want 2", n)
	}
	b.InvalidateRangeEnd(&inner)
	b.InvalidateRangeEnd(&outer)
	if n := b.table.active.Load(); n != 0 || len(b.table.open) != 0 {
		b.errorf("with no bracket open %d are counted, and there are %v", n, b.table.open)
	}
	return b.finish()
}

// TestV6NoLockWithoutOverlap: brackets where no slot shows anything do not take the
// lock of the translations.
func TestV6NoLockWithoutOverlap(t *testing.T) {
	b := newBed(sound, bedPages)
	b.touch(4)
	before := b.table.Stats().Locked
	for _, r := range []addr.HVARange{
		addr.HVAs(b.base-page, page), addr.HVAs(b.hva(bedPages+highPages), 8*page), addr.HVAs(0, page),
	} {
		b.table.begin(r)
		b.table.end(r)
	}
	if n := b.table.Stats().Locked; n != before {
		t.Errorf("brackets outside of all slots took the lock %d times", n-before)
	}
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// TestV8TwoSlotsHit and TestV9Aliases: all frames that show a page of the range are
// zapped, at both slots, up to its last page; aged; and logged.
func TestV8TwoSlotsHit(t *testing.T) { runs(t, checkWholeRange) }
func TestV9Aliases(t *testing.T)     { runs(t, checkAliases) }

func checkWholeRange(m mutant) error {
	b := newBed(m, bedPages)
	b.touch(0, 1, 2, 3, 4)
	for i := range 4 {
		if _, err := b.table.Load64(aliasGPA(i)); err != nil {
			b.errorf("%w", err)
		}
	}
	// The last byte of the range is in page 2.
	r := addr.HVARange{Start: b.hva(1), End: b.hva(3) - 100}
	b.table.begin(r)
	want := []addr.GFN{ramGFN, ramGFN + 3, ramGFN + 4, aliasGFN, aliasGFN + 3}
	if got := b.translated(); !slices.Equal(got, want) {
		b.errorf("in a bracket of %v translated are %v, want %v", r, got, want)
	}
	b.check()
	b.table.end(r)
	return b.finish()
}

func checkAliases(m mutant) error {
	b := newBed(m, bedPages)
	for _, at := range []addr.GPA{gpa(1), aliasGPA(2)} {
		if err := b.table.Store64(at, 1); err != nil {
			b.errorf("%w", err)
		}
	}
	h, err := b.table.Dirty().Begin()
	if err != nil {
		return err
	}
	want := []addr.GFNRange{frames(ramGFN+1, 2), frames(aliasGFN+1, 2)}
	if got := slices.Collect(h.Dirty().Runs()); !slices.Equal(got, want) {
		b.errorf("after stores to one page by its frame in ram, and to another by its alias, dirty are %v, want %v", got, want)
	}
	if err := h.Commit(); err != nil {
		return err
	}
	if !b.TestYoung(b.hva(2)) || !b.TestYoung(b.hva(1)) || b.TestYoung(b.hva(3)) {
		b.errorf("pages 1 and 2 were used, and young are %v, %v and %v", b.TestYoung(b.hva(1)), b.TestYoung(b.hva(2)), b.TestYoung(b.hva(3)))
	}
	if !b.ClearYoung(b.hvas(2, 2)) || b.TestYoung(b.hva(2)) || !b.TestYoung(b.hva(1)) || b.ClearFlushYoung(b.hvas(2, 2)) {
		b.errorf("clearing pages 2 and 3 leaves young %v and %v", b.TestYoung(b.hva(1)), b.TestYoung(b.hva(2)))
	}
	return b.finish()
}

// TestV10EveryStoreIsInALog writes increasing numbers through views while others
// harvest, and copy what was reported: in the end the copy is the memory.
func TestV10EveryStoreIsInALog(t *testing.T) {
	b := newBed(sound, bedPages)
	var stop atomic.Bool
	var writers sync.WaitGroup
	for n := range 2 {
		view := b.table.NewView(t.Context())
		writers.Go(func() {
			defer view.Close()
			for i := uint64(1); !stop.Load(); i++ {
				p := int(i*7+uint64(n)) % bedPages
				if err := view.Store64(gpa(p)+addr.GPA(8*n), i); err != nil {
					t.Error(err)
				}
			}
		})
	}
	shadow := make([]byte, bedPages*page)
	apply := func(commit bool) {
		h, err := b.table.Dirty().Begin()
		if err != nil {
			t.Fatal(err)
		}
		if !commit {
			if err := h.Abort(); err != nil {
				t.Error(err)
			}
			return
		}
		for r := range h.Dirty().RunsIn(frames(ramGFN, bedPages)) {
			at := int(r.Start-ramGFN) * page
			if _, err := b.table.ReadAt(shadow[at:at+int(r.NPages())*page], int64(r.Start.GPA())); err != nil {
				t.Error(err)
			}
		}
		if err := h.Commit(); err != nil {
			t.Error(err)
		}
	}
	for i := range 200 {
		apply(i%3 != 0)
		b.table.begin(b.hvas(i%bedPages, 2))
		b.table.end(b.hvas(i%bedPages, 2))
	}
	stop.Store(true)
	writers.Wait()
	apply(true)
	if !bytes.Equal(shadow, b.memory[:bedPages*page]) {
		t.Error("a copy of the pages that were reported as dirty is not the memory")
	}
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// TestV19ReleaseMeetsFaults: whatever a release meets, in the end there is no slot and
// no translation, and nobody waits.
func TestV19ReleaseMeetsFaults(t *testing.T) {
	for range 20 {
		b := newBed(sound, bedPages)
		var users sync.WaitGroup
		for n := range 3 {
			users.Go(func() {
				for i := n; ; i++ {
					if _, err := b.table.Load64(gpa(i % bedPages)); err != nil {
						if !errors.Is(err, notifier.ErrExited) && !errors.Is(err, syscall.EFAULT) {
							t.Error(err)
						}
						if errors.Is(err, notifier.ErrExited) {
							return
						}
					}
				}
			})
		}
		users.Go(func() {
			for i := range 10 {
				inv := notifier.Invalidation{Range: b.hvas(i, 2), Event: notifier.Unmap}
				_ = b.bracket(inv, func() { b.host.set(inv.Range, addr.NoAccess) })
			}
		})
		b.Release()
		users.Wait()
		if err := b.finish(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestV20TeardownInABracket: the release neither waits for the end of a bracket, which
// may never come, nor leaves anybody waiting for it.
func TestV20TeardownInABracket(t *testing.T) { runs(t, checkTeardown) }

func checkTeardown(m mutant) error {
	b := newBed(m, bedPages)
	inv := notifier.Invalidation{Range: b.hvas(8, 1), Event: notifier.Clear, After: addr.ReadWrite}
	if err := b.InvalidateRangeStart(&inv); err != nil {
		b.errorf("%w", err)
	}
	var err error
	waiting := gvmtest.Background(func() { _, err = b.table.Load64(gpa(8)) })
	gvmtest.Eventually(func() bool {
		b.table.bracketMu.Lock()
		defer b.table.bracketMu.Unlock()
		return b.table.ended != nil
	})
	released := gvmtest.Background(b.Release)
	if m == sound && !gvmtest.ClosedWithin(released, gvmtest.Limit) || m != sound && !gvmtest.ClosedWithin(released, gvmtest.GraceFor(m)) {
		b.errorf("the release waits for the end of a bracket")
		b.InvalidateRangeEnd(&inv)
	}
	<-released
	<-waiting
	if !errors.Is(err, notifier.ErrExited) {
		b.errorf("who waited for a bracket is told %v after the release, want ErrExited", err)
	}
	b.InvalidateRangeEnd(&inv) // it comes after all
	return b.finish()
}
