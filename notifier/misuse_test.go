package notifier

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

// said returns what was reported, without stacks and types.
func (w *world) said() (all []string) {
	for _, r := range w.reported() {
		text, _, _ := strings.Cut(r.Err.Error(), "\n")
		all = append(all, r.Method+": "+text)
	}
	return all
}

// TestMisuseIsReported: whatever is called at the wrong time or too often is
// reported once, does nothing, and leaves the address space in order.
func TestMisuseIsReported(t *testing.T) {
	const notRegistered = "it is not registered, or its registration was ended before"
	ctx := context.Background()
	for name, tt := range map[string]struct {
		do   func(w *world)
		want []string
	}{
		"Unregister twice": {func(w *world) {
			s := new(base)
			w.register(s)
			s.Unregister()
			s.Unregister()
		}, []string{"Unregister: " + notRegistered}},
		"Unregister after UnregisterNoRelease": {func(w *world) {
			s := new(base)
			w.register(s)
			s.UnregisterNoRelease()
			s.Unregister()
		}, []string{"Unregister: " + notRegistered}},
		"UnregisterNoRelease twice": {func(w *world) {
			s := new(base)
			w.register(s)
			s.UnregisterNoRelease()
			s.UnregisterNoRelease()
		}, []string{"UnregisterNoRelease: " + notRegistered}},
		"UnregisterNoRelease inside Unregister": {func(w *world) {
			s := new(base)
			s.release = s.UnregisterNoRelease
			w.register(s)
			s.Unregister()
		}, []string{"UnregisterNoRelease: " + notRegistered}},
		"Unregister of a shared one": {func(w *world) {
			k, s := shared(w)
			s.Unregister()
			s.UnregisterNoRelease()
			k.Put(s)
		}, []string{"Unregister: it is shared, and given back by Put of its Kind", "UnregisterNoRelease: it is shared, and given back by Put of its Kind"}},
		"Put too often": {func(w *world) {
			k, s := shared(w)
			k.Put(s)
			k.Put(s)
		}, []string{"Put: there were more Puts than Gets"}},
		"Put of another kind": {func(w *world) {
			k, s := shared(w)
			other, _ := shared(newWorld(sound))
			other.Put(s)
			k.Put(s)
		}, []string{"Put: it is not of this kind"}},
		"Put of one that was registered": {func(w *world) {
			k, first := shared(w)
			s := new(base)
			w.register(s)
			k.Put(s)
			s.Unregister()
			k.Put(first)
		}, []string{"Put: it is not of this kind"}},
		"an end without a start": {func(w *world) {
			w.InvalidateRangeEnd(clearing(page))
		}, []string{"InvalidateRangeEnd: the bracket of hva [0x1000, 0x2000) was opened for hva [0x0, 0x0)"}},
		"an end twice": {func(w *world) {
			inv := clearing(page)
			w.bracket(inv, nil)
			w.InvalidateRangeEnd(inv)
		}, []string{"InvalidateRangeEnd: the bracket of hva [0x1000, 0x2000) was opened for hva [0x0, 0x0)"}},
		"the end of another range": {func(w *world) {
			var told []addr.HVARange
			note := func(inv *Invalidation) { told = append(told, inv.Range) }
			s := &brackets{starter: func(inv *Invalidation) error { note(inv); return nil }, ender: note}
			w.register(s)
			inv := clearing(page)
			w.bracket(inv, func() { inv.Range.End += addr.PageSize })
			s.Unregister()
			if len(told) != 2 || told[0] != told[1] {
				w.errorf("told of %v, want twice the same", told)
			}
		}, []string{"InvalidateRangeEnd: the bracket of hva [0x1000, 0x3000) was opened for hva [0x1000, 0x2000)"}},
		"ranges that are none": {func(w *world) {
			for _, r := range badRanges {
				w.ClearFlushYoung(r)
			}
			w.ClearYoung(badRanges[0])
			w.TestYoung(1)
			w.InvalidateSecondaryTLBs(badRanges[0])
			w.InvalidatePage(1)
		}, []string{
			"ClearFlushYoung: hva [0x1000, 0x1000): the range is empty or not page aligned",
			"ClearFlushYoung: hva [0x1001, 0x2000): the range is empty or not page aligned",
			"ClearFlushYoung: hva [0x1000, 0x2001): the range is empty or not page aligned",
			"ClearFlushYoung: hva [0x2000, 0x1000): the range is empty or not page aligned",
			"ClearYoung: hva [0x1000, 0x1000): the range is empty or not page aligned",
			"TestYoung: hva [0x1, 0x1001): the range is empty or not page aligned",
			"InvalidateSecondaryTLBs: hva [0x1000, 0x1000): the range is empty or not page aligned",
			"InvalidatePage: hva [0x1, 0x1001): the range is empty or not page aligned",
		}},
		"ChangePTE without a bracket": {func(w *world) {
			w.ChangePTE(clearing(page), page.Start, 1)
		}, []string{"ChangePTE: hva [0x1000, 0x2000): there is no open bracket of the page"}},
		"ChangePTE of another page": {func(w *world) {
			inv := clearing(page)
			w.bracket(inv, func() { w.ChangePTE(inv, page.End, 1) })
		}, []string{"ChangePTE: hva [0x2000, 0x3000): there is no open bracket of the page"}},
		"Remove twice": {func(w *world) {
			i := &spanOver{}
			if err := w.Insert(ctx, i, page.Start, 1); err != nil {
				w.errorf("%w", err)
			}
			i.Remove()
			i.Remove()
		}, []string{"Remove: " + notRegistered}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(sound)
			tt.do(w)
			if diff := cmp.Diff(tt.want, w.said()); diff != "" {
				t.Errorf("reports (-want +got):\n%s", diff)
			}
			Synchronize()
			w.close()
			if err := w.err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// badRanges are not ranges of pages.
var badRanges = []addr.HVARange{{Start: 0x1000, End: 0x1000}, {Start: 0x1001, End: 0x2000}, {Start: 0x1000, End: 0x2001}, {Start: 0x2000, End: 0x1000}}

// shared returns a subscriber that was got once, and its kind.
func shared(w *world) (*Kind[*base], *base) {
	k := NewKind(func(*AddressSpace) (*base, error) { return new(base), nil }, func(*base) {})
	s, err := k.Get(context.Background(), w.AddressSpace)
	if err != nil {
		w.errorf("%w", err)
	}
	return k, s
}

// TestCountsDoNotFallBelowZero: users and counts that are given back too often
// are reported, and stay 0.
func TestCountsDoNotFallBelowZero(t *testing.T) {
	w := newWorld(sound)
	w.close()
	if err := w.PutUser(); err != nil {
		t.Error(err)
	}
	w.Drop()
	if diff := cmp.Diff([]string{"PutUser: the address space has no users", "Drop: the count is 0 already"}, w.said()); diff != "" {
		t.Errorf("reports (-want +got):\n%s", diff)
	}
	w.gone()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestNeverRegisteredPanics: there is nobody to report to.
func TestNeverRegisteredPanics(t *testing.T) {
	k := NewKind(func(*AddressSpace) (*base, error) { return new(base), nil }, func(*base) {})
	for name, do := range map[string]func(){
		"Unregister":          func() { new(base).Unregister() },
		"UnregisterNoRelease": func() { new(base).UnregisterNoRelease() },
		"Put":                 func() { k.Put(new(base)) },
		"Remove":              func() { new(spanOver).Remove() },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if p := recover(); p == nil || !strings.HasPrefix(fmt.Sprint(p), "notifier: ") {
					t.Errorf("panic is %v, want one of package notifier", p)
				}
			}()
			do()
		})
	}
}

func TestStartErrors(t *testing.T) {
	w := newWorld(sound)
	defer w.close()
	told := 0
	s := &starts{starter: func(*Invalidation) error { told++; return nil }}
	w.register(s)
	defer s.Unregister()
	w.Lock()
	defer w.Unlock()
	for _, r := range badRanges {
		if err := w.InvalidateRangeStart(clearing(r)); !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), r.String()) {
			t.Errorf("start of %v returned %v, want EINVAL and the range", r, err)
		}
	}
	if told != 0 {
		t.Errorf("%d starts were told of ranges that are none", told)
	}
	inv := clearing(page)
	if err := w.InvalidateRangeStart(inv); err != nil {
		t.Fatal(err)
	}
	if err := w.InvalidateRangeStart(inv); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a second start of an open bracket returned %v, want EINVAL", err)
	}
	w.InvalidateRangeEnd(inv)
	if told != 1 {
		t.Errorf("%d starts were told, want 1", told)
	}
}

// TestReregister: a subscriber can be registered again when nothing of it runs any
// more, and not before.
func TestReregister(t *testing.T) {
	w, ctx := newWorld(sound), context.Background()
	entered, leave := make(chan struct{}), make(chan struct{})
	s := &starts{starter: func(*Invalidation) error { close(entered); <-leave; return nil }}
	w.register(s)
	if err := w.Register(ctx, s); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a second registration returned %v, want EBUSY", err)
	}
	done := w.background(func() { w.bracket(clearing(page), nil) })
	<-entered
	s.UnregisterNoRelease()
	// A registration waits for brackets, so this asks what it would.
	if err := s.reserve(); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("with a method running, registering it again would return %v, want EBUSY", err)
	}
	close(leave)
	<-done
	s.starter = willing
	if !gvmtest.Eventually(func() bool { return w.Register(ctx, s) == nil }) {
		t.Error("it cannot be registered after a grace period")
	}
	s.Unregister()
	w.register(s)
	s.Unregister()
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

func TestContradictingMethods(t *testing.T) {
	w := newWorld(sound)
	defer w.close()
	for name, s := range map[string]Subscriber{
		"start": &struct {
			base
			tlb
			starter
		}{},
		"end": &struct {
			base
			tlb
			ender
		}{},
	} {
		if err := w.Register(context.Background(), s); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("a secondary TLB with a %s: Register returned %v, want EINVAL", name, err)
		}
	}
}

// panicky has every method, and panics in each.
type panicky struct {
	base
	starter
	ender
	flusher
	clearer
	tester
	pager
	changer
}

// TestPanicsAreContained: a panic in any method is reported with the subscriber
// and the method, the caller gets what it would without that subscriber, and
// everybody else is told.
func TestPanicsAreContained(t *testing.T) {
	boom := errors.New("boom")
	var told []string
	bad, bystander := &panicky{
		base:    base{release: func() { panic(boom) }},
		starter: func(*Invalidation) error { panic(boom) }, ender: func(*Invalidation) { panic(boom) },
		flusher: func(addr.HVARange) bool { panic(boom) }, clearer: func(addr.HVARange) bool { panic(boom) }, tester: func(addr.HVA) bool { panic(boom) },
		pager: func(addr.HVA) { panic(boom) }, changer: func(addr.HVA, addr.PFN) { panic(boom) },
	}, &panicky{
		base:    base{release: func() { told = append(told, "Release") }},
		starter: func(*Invalidation) error { told = append(told, "InvalidateRangeStart"); return nil },
		ender:   func(*Invalidation) { told = append(told, "InvalidateRangeEnd") },
		flusher: func(addr.HVARange) bool { told = append(told, "ClearFlushYoung"); return true },
		clearer: func(addr.HVARange) bool { told = append(told, "ClearYoung"); return true },
		tester:  func(addr.HVA) bool { told = append(told, "TestYoung"); return true },
		pager:   func(addr.HVA) { told = append(told, "InvalidatePage") },
		changer: func(addr.HVA, addr.PFN) { told = append(told, "ChangePTE") },
	}
	badTLB := &struct {
		base
		tlb
	}{tlb: func(addr.HVARange) { panic(boom) }}
	w := newWorld(sound)
	w.register(bystander)
	w.register(badTLB)
	w.register(bad) // newest first: it comes before the bystander
	young := true
	w.Lock()
	for _, call := range []func(){
		func() {
			inv := clearing(page)
			if err := w.InvalidateRangeStart(inv); err != nil {
				t.Errorf("a bracket that may block: %v", err)
			}
			w.ChangePTE(inv, page.Start, 1)
			w.InvalidateRangeEnd(inv)
		},
		func() { young = w.ClearFlushYoung(page) && young },
		func() { young = w.ClearYoung(page) && young },
		func() { young = w.TestYoung(page.Start) && young },
		func() { w.InvalidatePage(page.Start) },
		func() {
			inv := clearing(page)
			inv.NonBlockable = true
			if err := w.InvalidateRangeStart(inv); !errors.Is(err, ErrWouldBlock) || !errors.Is(err, syscall.EAGAIN) || !errors.Is(err, boom) {
				t.Errorf("a bracket that must not block: error is %v, want EAGAIN and the panic", err)
			}
		},
	} {
		call()
	}
	w.Unlock()
	if !young {
		t.Error("the bystander's accessed bits are lost")
	}
	bad.Unregister()
	badTLB.Unregister()
	bystander.Unregister()
	want := []string{
		"InvalidateRangeStart", "ChangePTE", "InvalidateRangeEnd", "ClearFlushYoung", "ClearYoung", "TestYoung", "InvalidatePage",
		"InvalidateRangeStart", "InvalidateRangeEnd", "Release",
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("the bystander is told (-want +got):\n%s", diff)
	}
	var methods []string
	for _, r := range w.reported() {
		var p *PanicError
		who := r.Subscriber == any(bad) || r.Subscriber == any(badTLB)
		if !who || !errors.As(r, &p) || p.Value != any(boom) || !strings.Contains(string(p.Stack), "misuse_test.go") || !errors.Is(r, boom) {
			t.Errorf("report %v is not of the panic, by %T", r, r.Subscriber)
		}
		methods = append(methods, r.Method)
	}
	want = append(want[:6:6], "InvalidatePage", "InvalidateSecondaryTLBs", "InvalidateRangeStart", "InvalidateRangeEnd", "Release")
	if diff := cmp.Diff(want, methods); diff != "" {
		t.Errorf("panics reported (-want +got):\n%s", diff)
	}
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestMustNotFail: a subscriber that fails where it may not is reported, and the
// bracket is opened; one that fails where it may, but has an end, is reported too.
func TestMustNotFail(t *testing.T) {
	refused := errors.New("refused")
	for name, tt := range map[string]struct {
		nonBlockable bool
		wantErr      error
		report       string
	}{
		"blockable":     {false, nil, "it failed, which it may only where it must not block: refused"},
		"non-blockable": {true, ErrWouldBlock, "it failed and has an InvalidateRangeEnd, which cannot tell that from success: refused"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(sound)
			ends := 0
			s := &brackets{starter: func(*Invalidation) error { return refused }, ender: func(*Invalidation) { ends++ }}
			w.register(s)
			inv := clearing(page)
			inv.NonBlockable = tt.nonBlockable
			w.Lock()
			err := w.InvalidateRangeStart(inv)
			if err == nil {
				w.InvalidateRangeEnd(inv)
			}
			w.Unlock()
			if !errors.Is(err, tt.wantErr) {
				t.Errorf("start returned %v, want %v", err, tt.wantErr)
			}
			if ends != 1 {
				t.Errorf("it is given %d ends, want 1", ends)
			}
			if diff := cmp.Diff([]string{"InvalidateRangeStart: " + tt.report}, w.said()); diff != "" {
				t.Errorf("reports (-want +got):\n%s", diff)
			}
			s.Unregister()
			w.close()
			if err := w.err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGoexitInAMethod ends the goroutine in a method. No section is left open:
// Unregister would wait for it for ever.
func TestGoexitInAMethod(t *testing.T) {
	w := newWorld(sound)
	s := &starts{starter: func(*Invalidation) error { runtime.Goexit(); return nil }}
	w.register(s)
	<-w.background(func() {
		w.file.RLock()
		defer w.file.RUnlock()
		inv := clearing(page)
		defer w.InvalidateRangeEnd(inv)
		_ = w.InvalidateRangeStart(inv)
	})
	if !gvmtest.ClosedWithin(w.background(s.Unregister), gvmtest.Limit) {
		t.Error("Unregister waits for a goroutine that is gone")
	}
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestPageDefaults: who has no method for single pages is told in brackets, and of
// a page that takes the place of another one only if it can drop it.
func TestPageDefaults(t *testing.T) {
	var told []string
	note := func(what string) { told = append(told, what) }
	w := newWorld(sound)
	both := &brackets{starter: func(inv *Invalidation) error { note("start " + inv.Range.String()); return nil }, ender: func(*Invalidation) { note("end") }}
	pages := &struct {
		base
		pager
	}{pager: func(hva addr.HVA) { note("page " + hva.String()) }}
	hardware := &struct {
		base
		tlb
	}{tlb: func(r addr.HVARange) { note("tlb " + r.String()) }}
	for _, s := range []Subscriber{hardware, pages, both} {
		w.register(s)
	}
	iv := &spanOver{invalidate: func(inv *Invalidation) bool { note("interval " + inv.Event.String()); return true }}
	if err := w.Insert(context.Background(), iv, page.Start, 1); err != nil {
		t.Fatal(err)
	}
	w.Lock()
	w.InvalidatePage(page.Start)
	w.Unlock()
	if got := w.Stats().Invalidating; got != 0 {
		t.Errorf("%d brackets of intervals are open afterwards", got)
	}
	want := []string{"interval clear", "start hva [0x1000, 0x2000)", "end", "page hva 0x1000", "tlb hva [0x1000, 0x2000)"}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("InvalidatePage (-want +got):\n%s", diff)
	}
	inv := clearing(page)
	w.bracket(inv, func() { told = nil; w.ChangePTE(inv, page.Start, 1); want = told })
	if diff := cmp.Diff([]string{"page hva 0x1000"}, want); diff != "" {
		t.Errorf("ChangePTE (-want +got):\n%s", diff)
	}
	iv.Remove()
	for _, s := range []interface{ Unregister() }{hardware, pages, both} {
		s.Unregister()
	}
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}
