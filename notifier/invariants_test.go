package notifier

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/srcu"
)

// The invariants N1 to N16, N22 and N24 to N26 have a test each, named for them;
// those of intervals are in interval_test.go. Where an invariant is about what one
// schedule does, it is a check: a function that makes the schedule, step by step,
// and returns an error if the package breaks the invariant. The checks run here on
// the package as it is, and in TestMutants on address spaces with a defect. What
// no single schedule shows is left to storms.

// graceRequested returns a condition that comes true when somebody has asked for
// a grace period since.
func graceRequested() func() bool {
	before := chains.Stats().Requests
	return func() bool { return chains.Stats().Requests > before }
}

// graceIgnores returns a condition that comes true when a grace period is under
// way that will not wait for sections opened from then on. The caller is in a
// section, so there is one such grace period at most; and there was none before
// the section, which the caller has seen to.
func graceIgnores() func() bool {
	rank := func() int {
		idx := chains.ReadLock()
		defer chains.ReadUnlock(idx)
		return idx & 1
	}
	before := rank()
	return func() bool { return rank() != before }
}

// quiesce returns when nobody runs or waits for a grace period.
func quiesce() {
	Synchronize()
	chains.Synchronize()
}

// world is an address space in a check, and what was found wrong with it.
type world struct {
	*AddressSpace
	mutant mutant
	file   *ReverseMap   // of the only region; under its lock brackets are run by those who need no user
	torn   chan struct{} // closed by Options.Teardown

	mu      sync.Mutex // protects what follows
	wrong   []error
	reports []*Report
}

func newWorld(m mutant) *world {
	w := &world{mutant: m, file: NewReverseMap(FileMap), torn: make(chan struct{})}
	w.AddressSpace = New(Options{
		Teardown: func() error {
			if gvmtest.Closed(w.torn) {
				w.errorf("the mappings are given up twice")
				return nil
			}
			close(w.torn)
			return nil
		},
		Report: func(err error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.reports = append(w.reports, err.(*Report))
		},
	})
	w.AddressSpace.mutant = m
	w.addRegion(w.file)
	return w
}

// addRegion adds a region that has the maps.
func (w *world) addRegion(maps ...*ReverseMap) {
	w.Lock()
	defer w.Unlock()
	w.AddRegion(&Region{page, maps})
}

// errorf adds to what is wrong.
func (w *world) errorf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.wrong) < 8 {
		w.wrong = append(w.wrong, fmt.Errorf(format, args...))
	}
}

// broken reports whether something is wrong.
func (w *world) broken() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.wrong) > 0
}

// reported returns what was reported since it was last called.
func (w *world) reported() []*Report {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() { w.reports = nil }()
	return w.reports
}

// err returns what is wrong, and what was reported without being asked for.
func (w *world) err() error {
	for _, r := range w.reported() {
		w.errorf("reported: %w", r)
	}
	return errors.Join(w.wrong...)
}

// background is gvmtest.Background. A panic is something that is wrong.
func (w *world) background(f func()) <-chan struct{} {
	return gvmtest.Background(func() {
		defer func() {
			if p := recover(); p != nil {
				w.errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		f()
	})
}

func (w *world) register(s Subscriber) {
	if err := w.Register(context.Background(), s); err != nil {
		w.errorf("%w", err)
	}
}

// exit gives the first user back.
func (w *world) exit() {
	if err := w.PutUser(); err != nil {
		w.errorf("PutUser: %w", err)
	}
}

// close is exit for the end of a check: nothing is to be left.
func (w *world) close() {
	w.exit()
	if !gvmtest.Closed(w.torn) {
		w.errorf("the last user has gone, and the mappings have not been given up")
	}
	w.gone()
}

// gone checks that nobody keeps the structure any more.
func (w *world) gone() {
	if st := w.Stats(); st.Users != 0 || st.Count != 0 || w.subs.Load() != nil {
		w.errorf("at the end there are %d users, the count is %d and the subscriptions are %p; want none of them", st.Users, st.Count, w.subs.Load())
	}
}

// bracket runs inside, which may be nil, in a bracket under the lock of the file.
func (w *world) bracket(inv *Invalidation, inside func()) {
	w.file.RLock()
	defer w.file.RUnlock()
	if err := w.InvalidateRangeStart(inv); err != nil {
		w.errorf("%w", err)
		return
	}
	defer w.InvalidateRangeEnd(inv)
	if inside != nil {
		inside()
	}
}

// clearing returns a change for a bracket.
func clearing(r addr.HVARange) *Invalidation {
	return &Invalidation{Range: r, Event: Clear, After: addr.ReadWrite}
}

// What subscribers are put together from: a Notifier with a Release, and a
// function for each of the other methods.
type (
	base struct {
		Notifier
		release func() // nil does nothing
	}
	starter  func(*Invalidation) error
	ender    func(*Invalidation)
	tlb      func(addr.HVARange)
	flusher  func(addr.HVARange) bool
	clearer  func(addr.HVARange) bool
	tester   func(addr.HVA) bool
	pager    func(addr.HVA)
	changer  func(addr.HVA, addr.PFN)
	spanOver struct { // an interval
		Interval
		invalidate func(*Invalidation) bool
	}
)

func (b *base) Release() {
	if b.release != nil {
		b.release()
	}
}
func (f starter) InvalidateRangeStart(inv *Invalidation) error { return f(inv) }
func (f ender) InvalidateRangeEnd(inv *Invalidation)           { f(inv) }
func (f tlb) InvalidateSecondaryTLBs(r addr.HVARange)          { f(r) }
func (f flusher) ClearFlushYoung(r addr.HVARange) bool         { return f(r) }
func (f clearer) ClearYoung(r addr.HVARange) bool              { return f(r) }
func (f tester) TestYoung(hva addr.HVA) bool                   { return f(hva) }
func (f pager) InvalidatePage(hva addr.HVA)                    { f(hva) }
func (f changer) ChangePTE(hva addr.HVA, pfn addr.PFN)         { f(hva, pfn) }
func (s *spanOver) Invalidate(inv *Invalidation, seq uint64) bool {
	s.SetSeq(seq)
	return s.invalidate(inv)
}

// starts is a subscriber with a start only.
type starts struct {
	base
	starter
}

// brackets is a subscriber with both.
type brackets struct {
	base
	starter
	ender
}

func willing(*Invalidation) error { return nil }

// strict is a subscriber that finds wrong what no subscriber is to see: an end
// without its start, a second release, and any method once it is gone.
type strict struct {
	Notifier
	w        *world
	released atomic.Int32
	gone     atomic.Bool

	mu   sync.Mutex // protects open
	open map[addr.HVARange]int
}

func newStrict(w *world) *strict { return &strict{w: w, open: map[addr.HVARange]int{}} }

func (s *strict) called(method string) {
	if s.gone.Load() {
		s.w.errorf("%s is called after Unregister has returned", method)
	}
}

func (s *strict) InvalidateRangeStart(inv *Invalidation) error {
	s.called("InvalidateRangeStart")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[inv.Range]++
	return nil
}

func (s *strict) InvalidateRangeEnd(inv *Invalidation) {
	s.called("InvalidateRangeEnd")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[inv.Range]--; s.open[inv.Range] < 0 {
		s.w.errorf("the end of %v is told without its start", inv.Range)
	}
}

func (s *strict) Release() {
	s.called("Release")
	if s.released.Add(1) > 1 {
		s.w.errorf("Release is called twice")
	}
}

// unregister ends the registration, and whatever is called then is wrong. A
// subscriber may be told of a start and not of the end, but only of those.
func (s *strict) unregister() {
	s.Unregister()
	s.gone.Store(true)
	if n := s.released.Load(); n != 1 {
		s.w.errorf("Release was called %d times when Unregister returned, want once", n)
	}
}

// again makes s as good as new.
func (s *strict) again() *strict {
	clear(s.open)
	s.released.Store(0)
	s.gone.Store(false)
	return s
}

// pass fails the test if a check returns an error.
func pass(t *testing.T, checks ...func(mutant) error) {
	t.Helper()
	for _, check := range checks {
		if err := check(sound); err != nil {
			t.Error(err)
		}
	}
}

// TestN1EveryEndHasItsStart: a subscriber that is given an end was given its
// start, however registrations and brackets meet.
func TestN1EveryEndHasItsStart(t *testing.T) {
	pass(t, checkRegistrationAwaitsBrackets)
	w := newWorld(sound)
	lasts := gvmtest.StormLasts(200 * time.Millisecond)
	deadline := time.Now().Add(lasts)
	var told, registered atomic.Int64
	var all sync.WaitGroup
	work := func(round func(i int)) {
		all.Go(func() {
			for i := 0; time.Now().Before(deadline) && !w.broken(); i++ {
				round(i)
			}
		})
	}
	ranges := []addr.HVARange{page, addr.HVAs(page.Start, 2*addr.PageSize)}
	brackets := func(i int) {
		outer, inner := clearing(ranges[i%2]), clearing(ranges[i/2%2])
		for _, inv := range []*Invalidation{outer, inner} {
			if err := w.InvalidateRangeStart(inv); err != nil {
				w.errorf("%w", err)
			}
			runtime.Gosched()
		}
		w.InvalidateRangeEnd(outer)
		w.InvalidateRangeEnd(inner)
		told.Add(2)
	}
	work(func(i int) { w.Lock(); defer w.Unlock(); brackets(i) })
	work(func(i int) { w.RLock(); defer w.RUnlock(); brackets(i) })
	work(func(i int) { w.file.RLock(); defer w.file.RUnlock(); brackets(i) })
	own := newStrict(w)
	work(func(int) {
		w.register(own.again())
		runtime.Gosched()
		own.unregister()
		registered.Add(1)
	})
	work(func(int) {
		s := newStrict(w)
		w.register(s)
		runtime.Gosched()
		s.UnregisterNoRelease()
		registered.Add(1)
	})
	all.Wait()
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
	t.Logf("%d registrations among %d brackets", registered.Load(), told.Load())
}

// checkRegistrationAwaitsBrackets has somebody register while a bracket is open.
func checkRegistrationAwaitsBrackets(m mutant) error {
	w := newWorld(m)
	s := newStrict(w)
	opened, leave := make(chan struct{}), make(chan struct{})
	bracket := w.background(func() {
		w.bracket(clearing(page), func() { close(opened); <-leave })
	})
	<-opened
	registered := w.background(func() { w.register(s) })
	gvmtest.ClosedWithin(registered, gvmtest.GraceFor(m))
	close(leave)
	<-bracket
	<-registered
	w.bracket(clearing(page), nil)
	s.unregister()
	w.close()
	return w.err()
}

// TestN2OneAllocation: registrations allocate the subscriptions of their address
// space once, and nothing with all locks held.
func TestN2OneAllocation(t *testing.T) { pass(t, checkOneAllocation) }

// checkOneAllocation has several register at once, and writes down the steps.
func checkOneAllocation(m mutant) error {
	w := newWorld(m)
	var steps []string // with the mapping lock held
	w.step = func(name string) { steps = append(steps, name) }
	subscribers := make([]base, 4)
	var all sync.WaitGroup
	for i := range subscribers {
		all.Go(func() { w.register(&subscribers[i]) })
	}
	all.Wait()
	want := append([]string{"allocate"}, slices.Repeat([]string{"all locks", "linked"}, len(subscribers))...)
	if diff := cmp.Diff(want, steps); diff != "" {
		w.errorf("the steps of %d registrations (-want +got):\n%s", len(subscribers), diff)
	}
	for i := range subscribers {
		subscribers[i].Unregister()
	}
	w.close()
	return w.err()
}

// TestN2DoesNotAllocateInsideAllLocks counts what the runtime allocates meanwhile.
func TestN2DoesNotAllocateInsideAllLocks(t *testing.T) {
	if gvmtest.Race || lockorder.Enabled {
		gvmtest.OtherBuild(t, "the race detector and a debug build allocate for themselves")
	}
	w := newWorld(sound)
	w.addRegion(NewReverseMap(HugeMap), NewReverseMap(AnonMap))
	var before, after runtime.MemStats
	w.step = func(name string) {
		switch name {
		case "all locks":
			runtime.ReadMemStats(&before)
		case "linked":
			runtime.ReadMemStats(&after)
		}
	}
	least := ^uint64(0) // others may allocate in between
	for range 10 {
		s := new(base)
		w.register(s)
		least = min(least, after.Mallocs-before.Mallocs)
		s.Unregister()
	}
	if least != 0 {
		t.Errorf("a registration allocates %d objects with all locks held, want 0", least)
	}
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// lockContext is a context that knows how often a lock was asked for with it:
// whoever waits with a context begins by looking when it is done. Only one
// goroutine uses it.
type lockContext struct {
	context.Context
	asked  int
	before func(n int) // called before the nth lock is asked for
}

func (c *lockContext) Done() <-chan struct{} {
	c.asked++
	c.before(c.asked)
	return c.Context.Done()
}

// interruptedAt returns a context that is done when the nth lock is asked for.
func interruptedAt(nth int) *lockContext {
	ctx, cancel := context.WithCancel(context.Background())
	return &lockContext{Context: ctx, before: func(n int) {
		if n >= nth {
			cancel()
		}
	}}
}

// isFree reports whether nobody holds l.
func (l rwLock) isFree() bool {
	if !l.sem.TryAcquire(everybody) {
		return false
	}
	l.sem.Release(everybody)
	return true
}

// plural is an address space with several regions that have reverse maps of every
// kind, some of them in common.
type plural struct {
	*world
	maps []*ReverseMap // all of them, in the order of registration
}

func newPlural(m mutant) *plural {
	p := &plural{world: newWorld(m)}
	huge, file, group := NewReverseMap(HugeMap), NewReverseMap(FileMap), NewReverseMap(AnonMap)
	p.addRegion(group, file)
	p.addRegion(huge, file)
	p.addRegion(file, group, p.file)
	p.maps = []*ReverseMap{huge, p.file, file, group}
	return p
}

// marks returns which maps are marked as taken, by their place in maps. Nobody
// may register at the same time.
func (p *plural) marks() (marked []int) {
	for i, m := range p.maps {
		if m.taken {
			marked = append(marked, i)
		}
	}
	return marked
}

// heldMaps returns which maps are locked.
func (p *plural) heldMaps() (held []int) {
	for i, m := range p.maps {
		if !m.lock.isFree() {
			held = append(held, i)
		}
	}
	return held
}

// state is all there is to an address space.
type state struct {
	Stats                      Stats
	Subs                       string // the pointer
	Chain                      []string
	Marks, Held                []int
	MmapLockFree, AllLocksFree bool
	Regions                    int
}

func (p *plural) state() state {
	st := state{
		Stats: p.Stats(), Subs: fmt.Sprintf("%p", p.subs.Load()), Marks: p.marks(), Held: p.heldMaps(),
		MmapLockFree: p.mmapLock.isFree(), AllLocksFree: allLocks.isFree(), Regions: len(p.regions),
	}
	if s := p.subs.Load(); s != nil {
		for n := s.first.Load(); n != nil; n = n.next.Load() {
			st.Chain = append(st.Chain, fmt.Sprintf("%p of %p, state %d, users %d", n, n.as, n.state.Load(), n.users))
		}
	}
	return st
}

// contradiction is a subscriber whose methods contradict each other.
type contradiction struct {
	brackets
	tlb
}

// object is a shared subscriber.
type object struct {
	base
	released, freed atomic.Int32
}

func (o *object) Release() { o.released.Add(1) }

// newObjects returns a kind of such subscribers.
func newObjects() *Kind[*object] {
	return NewKind(func(*AddressSpace) (*object, error) { return new(object), nil }, func(o *object) { o.freed.Add(1) })
}

// TestN3FailureChangesNothing: a registration that fails, wherever it does, has
// left everything as it was.
func TestN3FailureChangesNothing(t *testing.T) { pass(t, checkFailureChangesNothing) }

// attempt is a way to register. If it succeeds it returns the end of what it has
// begun.
type attempt struct {
	name  string
	locks bool // it takes the mapping lock itself
	get   bool // it is a Get: what it allocates is freed
	do    func(p *plural, ctx context.Context, s Subscriber, allocated, freed *int) (end func(), err error)
}

func kindOf(s Subscriber, fails error, allocated, freed *int) *Kind[Subscriber] {
	return NewKind(func(*AddressSpace) (Subscriber, error) {
		if fails != nil {
			return nil, fails
		}
		*allocated++
		return s, nil
	}, func(Subscriber) { *freed++ })
}

var attempts = []attempt{
	{name: "Register", locks: true, do: func(p *plural, ctx context.Context, s Subscriber, _, _ *int) (func(), error) {
		return s.notifier().Unregister, p.Register(ctx, s)
	}},
	{name: "RegisterLocked", do: func(p *plural, ctx context.Context, s Subscriber, _, _ *int) (func(), error) {
		p.Lock()
		defer p.Unlock()
		return s.notifier().Unregister, p.RegisterLocked(ctx, s)
	}},
	{name: "Get", locks: true, get: true, do: func(p *plural, ctx context.Context, s Subscriber, allocated, freed *int) (func(), error) {
		k := kindOf(s, nil, allocated, freed)
		_, err := k.Get(ctx, p.AddressSpace)
		return func() { k.Put(s); Synchronize() }, err
	}},
	{name: "GetLocked", get: true, do: func(p *plural, ctx context.Context, s Subscriber, allocated, freed *int) (func(), error) {
		k := kindOf(s, nil, allocated, freed)
		p.Lock()
		defer p.Unlock()
		_, err := k.GetLocked(ctx, p.AddressSpace)
		return func() { k.Put(s); Synchronize() }, err
	}},
}

// checkFailureChangesNothing has each way to register fail at each step that can
// fail, in an address space in which nobody is and in one in which somebody is.
func checkFailureChangesNothing(m mutant) error {
	var wrong []error
	for _, a := range attempts {
		for _, f := range failures(a) {
			for _, first := range []bool{true, false} {
				if err := a.fail(m, f, first); err != nil {
					wrong = append(wrong, fmt.Errorf("%s, %s, first %t: %w", a.name, f.name, first, err))
				}
			}
		}
	}
	return errors.Join(wrong...)
}

// failure is a way to make a registration fail.
type failure struct {
	name    string
	want    error
	unready bool // it fails before a Get allocates
	refused bool // it fails for ever
	s       func() Subscriber
	ctx     func(p *plural) context.Context // nil: it is never done
}

// failures returns those of a way to register.
func failures(a attempt) (list []failure) {
	locks, own := 5, 0 // all locks, and the maps
	if a.locks {
		locks, own = 6, 1
	}
	for nth := 1; nth <= locks; nth++ {
		list = append(list, failure{
			name: fmt.Sprintf("interrupted at lock %d of %d", nth, locks), want: syscall.EINTR, unready: nth <= own,
			ctx: func(*plural) context.Context { return interruptedAt(nth) },
		})
	}
	list = append(list, failure{
		name: "methods that contradict each other", want: syscall.EINVAL, refused: true,
		s: func() Subscriber {
			return &contradiction{brackets{base{}, willing, nil}, func(addr.HVARange) {}}
		},
	})
	return list
}

// fail makes an attempt that fails, and compares what was before with what is
// afterwards.
func (a attempt) fail(m mutant, f failure, first bool) error {
	p := newPlural(m)
	old := new(base)
	if !first {
		p.register(old)
	}
	var s Subscriber = new(base)
	if f.s != nil {
		s = f.s()
	}
	ctx := context.Background()
	if f.ctx != nil {
		ctx = f.ctx(p)
	}
	var allocated, freed int
	before := p.state()
	_, err := a.do(p, ctx, s, &allocated, &freed)
	if !errors.Is(err, f.want) {
		p.errorf("it returned %w, want %w", err, f.want)
	}
	if errors.Is(f.want, syscall.EINTR) && !errors.Is(err, context.Canceled) {
		p.errorf("the error %w does not say that the context was cancelled", err)
	}
	if diff := cmp.Diff(before, p.state()); diff != "" {
		p.errorf("the address space (-before +after):\n%s", diff)
	}
	if n := s.notifier(); n.state.Load() != idle || n.linked || n.as != nil || n.kind != nil || n.sub != nil {
		p.errorf("the notifier is in state %d, linked %t, of %p", n.state.Load(), n.linked, n.as)
	}
	a.balance(p, f, allocated, freed)
	if !p.broken() && !f.refused { // and the next attempt succeeds
		end, err := a.do(p, context.Background(), s, &allocated, &freed)
		if err != nil {
			p.errorf("afterwards it fails with %w", err)
		} else {
			end()
		}
	}
	if !first {
		old.Unregister()
	}
	p.close()
	return p.err()
}

// balance checks what a failed Get has allocated and freed.
func (a attempt) balance(p *plural, f failure, allocated, freed int) {
	want := 0
	if a.get && !f.unready {
		want = 1
	}
	if allocated != want || freed != want {
		p.errorf("%d were allocated and %d freed, want %d and %d", allocated, freed, want, want)
	}
}

// TestN3InterruptedWhileWaiting has contexts come to their end while a lock is
// waited for.
func TestN3InterruptedWhileWaiting(t *testing.T) {
	for name, hold := range map[string]func(p *plural) (release func()){
		"the mapping lock": func(p *plural) func() { p.RLock(); return p.RUnlock },
		"all-locks":        func(*plural) func() { _ = allLocks.lock(context.Background()); return allLocks.unlock },
		"a reverse map":    func(p *plural) func() { p.file.RLock(); return p.file.RUnlock },
	} {
		for _, a := range []attempt{attempts[0], attempts[2]} {
			t.Run(name+"/"+a.name, func(t *testing.T) {
				p := newPlural(sound)
				before := p.state()
				release := hold(p)
				ctx, cancel := context.WithCancelCause(context.Background())
				cause := errors.New("enough")
				var allocated, freed int
				var err error
				done := p.background(func() { _, err = a.do(p, ctx, new(base), &allocated, &freed) })
				if gvmtest.ClosedWithin(done, gvmtest.Grace) {
					t.Errorf("it does not wait for %s", name)
				}
				cancel(cause)
				<-done
				release()
				if !errors.Is(err, syscall.EINTR) || !errors.Is(err, context.Canceled) {
					t.Errorf("it returned %v, want EINTR and %v", err, context.Canceled)
				}
				if diff := cmp.Diff(before, p.state()); diff != "" {
					t.Errorf("the address space (-before +after):\n%s", diff)
				}
				a.balance(p, failure{unready: name == "the mapping lock"}, allocated, freed)
				p.close()
				if err := p.err(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestN3Refused lists what fails for other reasons than a context.
func TestN3Refused(t *testing.T) {
	ctx := context.Background()
	refusal := errors.New("no memory")
	for name, tt := range map[string]struct {
		do               func(p *plural, a, b *int) error
		want             error
		allocated, freed int
		exits, keepsSubs bool
	}{
		"Register after exit": {exits: true, want: ErrExited, do: func(p *plural, _, _ *int) error {
			return p.Register(ctx, new(base))
		}},
		"Insert after exit": {exits: true, want: ErrExited, do: func(p *plural, _, _ *int) error {
			return p.Insert(ctx, new(spanOver), 0, addr.PageSize)
		}},
		"Get after exit": {exits: true, want: ErrExited, do: func(p *plural, a, f *int) error {
			_, err := kindOf(new(base), nil, a, f).Get(ctx, p.AddressSpace)
			return err
		}},
		"alloc fails": {want: refusal, do: func(p *plural, a, f *int) error {
			_, err := kindOf(nil, refusal, a, f).Get(ctx, p.AddressSpace)
			return err
		}},
		"first Insert interrupted": {want: syscall.EINTR, do: func(p *plural, _, _ *int) error {
			return p.Insert(interruptedAt(4), new(spanOver), 0, addr.PageSize)
		}},
		"alloc returns what is registered": {want: syscall.EBUSY, allocated: 1, freed: 1, keepsSubs: true, do: func(p *plural, a, f *int) error {
			_, err := kindOf(p.subs.Load().first.Load().sub, nil, a, f).Get(ctx, p.AddressSpace)
			return err
		}},
		"Register twice": {want: syscall.EBUSY, keepsSubs: true, do: func(p *plural, _, _ *int) error {
			return p.Register(ctx, p.subs.Load().first.Load().sub)
		}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			p := newPlural(sound)
			s := new(base)
			if tt.keepsSubs {
				p.register(s)
			}
			if tt.exits {
				p.exit()
			}
			before := p.state()
			var allocated, freed int
			if err := tt.do(p, &allocated, &freed); !errors.Is(err, tt.want) {
				t.Errorf("it returned %v, want %v", err, tt.want)
			}
			if diff := cmp.Diff(before, p.state()); diff != "" {
				t.Errorf("the address space (-before +after):\n%s", diff)
			}
			if allocated != tt.allocated || freed != tt.freed {
				t.Errorf("%d were allocated and %d freed, want %d and %d", allocated, freed, tt.allocated, tt.freed)
			}
			if tt.keepsSubs {
				s.Unregister()
			}
			if !tt.exits {
				p.exit()
			}
			p.gone()
			if err := p.err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestN4EveryLockCanBeInterrupted and N5: before the nth lock n-1 are held, those
// that come first in the order, each of them once and marked; an interruption at
// the nth gives them all back.
func TestN4EveryLockCanBeInterrupted(t *testing.T) { pass(t, checkLocksOneByOne) }

// TestN5SharedLocksAreTakenOnce: the lock of a map that several regions have is
// taken once.
func TestN5SharedLocksAreTakenOnce(t *testing.T) { pass(t, checkLocksOneByOne) }

// checkLocksOneByOne interrupts a registration at each lock, and finally not.
func checkLocksOneByOne(m mutant) error {
	p := newPlural(m)
	const locks = 2 + 4 // the mapping lock, all-locks, and the maps
	for nth := 1; nth <= locks+1; nth++ {
		ctx := interruptedAt(nth)
		limited, cancel := context.WithTimeout(ctx.Context, gvmtest.LimitFor(m))
		defer cancel()
		ctx.Context = limited // or a lock that is taken twice would be waited for for ever
		interrupt := ctx.before
		ctx.before = func(n int) {
			interrupt(n)
			held := p.heldMaps()
			if want := max(n-1-2, 0); len(held) != want || !slices.Equal(held, p.marks()) {
				p.errorf("before lock %d the maps %v are locked and %v marked, want %d of them", n, held, p.marks(), want)
			}
			if slices.ContainsFunc(held, func(i int) bool { return i >= len(held) && p.maps[i].kind != p.maps[len(held)-1].kind }) {
				p.errorf("before lock %d the maps %v are locked, which is out of order", n, held)
			}
			if got, want := p.mmapLock.isFree(), n <= 1; got != want {
				p.errorf("before lock %d the mapping lock is free: %t, want %t", n, got, want)
			}
			if got, want := allLocks.isFree(), n <= 2; got != want {
				p.errorf("before lock %d all-locks is free: %t, want %t", n, got, want)
			}
		}
		s := new(base)
		err := p.Register(ctx, s)
		if ctx.asked != min(nth, locks) {
			p.errorf("interrupted at lock %d: %d locks were asked for, want %d", nth, ctx.asked, min(nth, locks))
		}
		if wantErr := nth <= locks; errors.Is(err, syscall.EINTR) != wantErr || (err != nil) != wantErr {
			p.errorf("interrupted at lock %d: Register returned %w", nth, err)
		}
		if held, marks := p.heldMaps(), p.marks(); len(held)+len(marks) != 0 || !p.mmapLock.isFree() || !allLocks.isFree() {
			p.errorf("interrupted at lock %d: afterwards the maps %v are locked and %v marked, the mapping lock is free: %t, all-locks: %t", nth, held, marks, p.mmapLock.isFree(), allLocks.isFree())
		}
		if err == nil {
			s.Unregister()
		}
	}
	p.close()
	return p.err()
}

// TestN6TwoAddressSpacesShareFiles: address spaces that have the same files mapped,
// in different orders, register at the same time and do not wait for each other
// for ever.
func TestN6TwoAddressSpacesShareFiles(t *testing.T) {
	pass(t, checkNoDeadlock)
	maps := []*ReverseMap{NewReverseMap(FileMap), NewReverseMap(FileMap), NewReverseMap(AnonMap), NewReverseMap(FileMap)}
	lasts := gvmtest.StormLasts(300 * time.Millisecond)
	deadline := time.Now().Add(lasts)
	var rounds [2]int
	var worlds [2]*world
	done := make([]<-chan struct{}, 2)
	for i := range worlds {
		w := newWorld(sound)
		worlds[i] = w
		for _, m := range maps {
			w.addRegion(m)
		}
		slices.Reverse(maps)
		done[i] = w.background(func() {
			for time.Now().Before(deadline) {
				s := new(base)
				w.register(s)
				s.UnregisterNoRelease()
				rounds[i]++
			}
		})
	}
	for i, w := range worlds {
		if !gvmtest.ClosedWithin(done[i], lasts+gvmtest.Limit) {
			t.Fatal("the address spaces wait for each other")
		}
		w.close()
		if err := w.err(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d rounds in %v", rounds[0]+rounds[1], lasts)
}

// checkNoDeadlock stops one registration between two files, has another one, of
// an address space that has them in the other order, go as far as it gets, and
// lets the first go on. Without a lock around all-locks the two wait for each
// other, or take the other's marks for their own and give back what they have not
// taken.
func checkNoDeadlock(m mutant) error {
	files := [2]*ReverseMap{NewReverseMap(FileMap), NewReverseMap(FileMap)}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var worlds [2]*world
	var reached, leave [2]chan struct{}
	for i := range worlds {
		worlds[i] = newWorld(m)
		reached[i], leave[i] = make(chan struct{}), make(chan struct{})
		worlds[i].addRegion(files[i])
		worlds[i].addRegion(files[1-i])
	}
	second := 5 // of the two files; before it come the mapping lock, all-locks, its own file and the first
	if m == noAllLocksMutex {
		second--
	}
	register := func(i int) <-chan struct{} {
		return worlds[i].background(func() {
			s := new(base)
			err := worlds[i].Register(&lockContext{Context: ctx, before: func(n int) {
				if n == second {
					close(reached[i])
					<-leave[i]
				}
			}}, s)
			if err == nil {
				s.UnregisterNoRelease()
			}
		})
	}
	first := register(0)
	<-reached[0]
	close(leave[1])
	other := register(1)
	if gvmtest.ClosedWithin(other, gvmtest.GraceFor(m)) {
		worlds[1].errorf("a registration went through while another one held one of its locks")
	}
	close(leave[0])
	for i, done := range []<-chan struct{}{first, other} {
		if !gvmtest.ClosedWithin(done, gvmtest.LimitFor(m)) {
			worlds[i].errorf("two address spaces that share files wait for each other")
			cancel()
		}
	}
	<-first
	<-other
	for _, w := range worlds {
		w.close()
	}
	return errors.Join(worlds[0].err(), worlds[1].err())
}

// TestUnregisterTakesNoLocks: it cannot fail, and does not wait for whoever holds
// the locks of brackets but is in none.
func TestUnregisterTakesNoLocks(t *testing.T) { pass(t, checkUnregisterTakesNoLocks) }

func checkUnregisterTakesNoLocks(m mutant) error {
	w := newWorld(m)
	s := new(base)
	w.register(s)
	held, leave := make(chan struct{}), make(chan struct{})
	holder := w.background(func() {
		w.RLock()
		defer w.RUnlock()
		w.file.RLock()
		defer w.file.RUnlock()
		close(held)
		<-leave
	})
	<-held
	done := w.background(s.Unregister)
	if !gvmtest.ClosedWithin(done, gvmtest.LimitFor(m)) {
		w.errorf("Unregister waits for locks that no bracket is run under")
	}
	close(leave)
	<-holder
	<-done
	w.close()
	return w.err()
}

// TestN7ReleaseOnce: Release is called once, however Unregister and the exit meet.
func TestN7ReleaseOnce(t *testing.T) {
	pass(t, checkExitDuringUnregister, checkUnregisterDuringExit)
	t.Run("exit, then Unregister", func(t *testing.T) {
		w := newWorld(sound)
		s := newStrict(w)
		w.register(s)
		w.exit()
		if n := s.released.Load(); n != 1 {
			t.Errorf("the exit has called Release %d times, want once", n)
		}
		s.unregister()
		w.gone()
		if err := w.err(); err != nil {
			t.Error(err)
		}
	})
	lasts := gvmtest.StormLasts(150 * time.Millisecond)
	rounds := 0
	for deadline := time.Now().Add(lasts); time.Now().Before(deadline) && !t.Failed(); rounds++ {
		if err := meet(rounds); err != nil {
			t.Errorf("round %d: %v", rounds, err)
		}
	}
	t.Logf("%d rounds in %v", rounds, lasts)
}

// meet has the exit, several Unregisters and a bracket begin at the same time.
func meet(round int) error {
	w := newWorld(sound)
	subscribers := make([]*strict, 3)
	for i := range subscribers {
		subscribers[i] = newStrict(w)
		w.register(subscribers[i])
	}
	begin := make(chan struct{})
	var done []<-chan struct{}
	add := func(i int, f func()) {
		done = append(done, w.background(func() {
			<-begin
			for range (round >> (2 * i)) % 4 {
				runtime.Gosched()
			}
			f()
		}))
	}
	add(0, func() {
		w.exit()
		for _, s := range subscribers {
			if s.released.Load() != 1 {
				w.errorf("the exit has returned, and a subscriber has not been released")
			}
		}
	})
	for i, s := range subscribers[1:] {
		add(1+i, s.unregister)
	}
	add(3, func() { w.bracket(clearing(page), nil) })
	close(begin)
	for _, d := range done {
		<-d
	}
	subscribers[0].unregister()
	w.gone()
	return w.err()
}

// checkExitDuringUnregister has the exit come while Release is running that
// Unregister has called.
func checkExitDuringUnregister(m mutant) error { return checkMeeting(m, false) }

// checkUnregisterDuringExit is the other way round.
func checkUnregisterDuringExit(m mutant) error { return checkMeeting(m, true) }

func checkMeeting(m mutant, exitFirst bool) error {
	w := newWorld(m)
	var calls, told atomic.Int32
	var released atomic.Bool
	inside, leave := make(chan struct{}), make(chan struct{})
	s := &starts{starter: func(*Invalidation) error { told.Add(1); return nil }}
	s.release = func() {
		if calls.Add(1) > 1 {
			w.errorf("Release is called twice")
			return
		}
		close(inside)
		<-leave
		if gvmtest.Closed(w.torn) {
			w.errorf("the mappings are given up while Release is running")
		}
		released.Store(true)
	}
	w.register(s)
	ends := []func(){s.Unregister, w.exit}
	if exitFirst {
		slices.Reverse(ends)
	}
	var done []<-chan struct{}
	end := func(f func()) {
		done = append(done, w.background(func() {
			f()
			if !released.Load() {
				w.errorf("Unregister or the exit has returned before Release")
			}
		}))
	}
	end(ends[0])
	<-inside
	requested := graceRequested()
	end(ends[1])
	if !gvmtest.Eventually(requested) {
		w.errorf("whoever comes second does not wait for a grace period")
	}
	w.bracket(clearing(page), nil)
	if n := told.Load(); n != 1 {
		w.errorf("while Release is running the subscriber is told of a bracket %d times, want once", n)
	}
	gvmtest.ClosedWithin(done[1], gvmtest.GraceFor(m))
	close(leave)
	<-done[0]
	<-done[1]
	w.gone()
	return w.err()
}

// TestN8ReleaseComesFirst: Release has returned before the first page is given up
// and before Unregister returns.
func TestN8ReleaseComesFirst(t *testing.T) {
	pass(t, checkExitDuringUnregister, checkUnregisterDuringExit, checkClaimedInside, checkExitAwaitsMethods)
}

// checkUnregisterAwaitsLateWalks has Unregister wait for the exit's Release, and a
// bracket begin during that wait: it finds the subscriber, which is linked until
// Release has returned.
func checkUnregisterAwaitsLateWalks(m mutant) error { return checkLateWalk(m, true) }

// checkExitAwaitsLateWalks is the other way round.
func checkExitAwaitsLateWalks(m mutant) error { return checkLateWalk(m, false) }

func checkLateWalk(m mutant, exitFirst bool) error {
	w := newWorld(m)
	inside, done := make(chan struct{}), make(chan struct{})
	s := &starts{starter: func(*Invalidation) error {
		close(inside)
		if gvmtest.ClosedWithin(done, gvmtest.GraceFor(m)) {
			w.errorf("Unregister or the exit has returned while a method is running")
		}
		return nil
	}}
	first, second := s.Unregister, w.exit
	if exitFirst {
		first, second = second, first
	}
	s.release = func() {
		w.lateBracket(func() {
			w.background(func() {
				defer close(done)
				second()
			})
		}, inside)
	}
	w.register(s)
	quiesce()
	first()
	<-done
	w.gone()
	return w.err()
}

// checkClaimedInside has the exit come as soon as Unregister has claimed a
// subscription, possibly before it has called Release.
func checkClaimedInside(m mutant) error {
	rounds := 3
	if m != sound {
		rounds = 200 // it takes luck
	}
	for range rounds {
		w := newWorld(m)
		s := &base{release: func() {
			if gvmtest.ClosedWithin(w.torn, gvmtest.Grace) {
				w.errorf("the mappings are given up before Release has returned")
			}
		}}
		w.register(s)
		unregistered := w.background(s.Unregister)
		gvmtest.Eventually(func() bool { return s.state.Load()&phase > live })
		w.exit()
		<-unregistered
		w.gone()
		if err := w.err(); err != nil {
			return err
		}
	}
	return nil
}

// checkExitAwaitsMethods has an address space exit while a method is running.
func checkExitAwaitsMethods(m mutant) error {
	w := newWorld(m)
	inside, leave := make(chan struct{}), make(chan struct{})
	s := &starts{starter: func(*Invalidation) error {
		close(inside)
		<-leave
		if gvmtest.Closed(w.torn) {
			w.errorf("the mappings are given up while a method is running")
		}
		return nil
	}}
	w.register(s)
	bracket := w.background(func() { w.bracket(clearing(page), nil) })
	<-inside
	exited := w.background(w.exit)
	gvmtest.ClosedWithin(w.torn, gvmtest.GraceFor(m))
	close(leave)
	<-bracket
	<-exited
	s.Unregister()
	w.gone()
	return w.err()
}

// pool is the pages of a machine. It finds wrong that a page is free and shown by
// a view of memory at the same time.
type pool struct {
	w  *world
	mu sync.Mutex // protects what follows; a leaf

	frames []struct {
		generation int // counts how often it was taken; odd: it is in use
		shown      int // by how many views
	}
	table []int // what is mapped: a frame for each page of the address space, or -1
}

func newPool(w *world, pages, spare int) *pool {
	p := &pool{w: w, table: make([]int, pages)}
	p.frames = append(p.frames, make([]struct{ generation, shown int }, pages+spare)...)
	for i := range p.table {
		p.table[i] = i
		p.frames[i].generation = 1
	}
	return p
}

// replace maps another frame where the old one was, which becomes free. Its place
// is told by a bracket that is open.
func (p *pool) replace(page int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.table[page]
	if old < 0 {
		return
	}
	for i := range p.frames {
		if p.frames[i].generation%2 == 0 {
			p.frames[i].generation++
			p.table[page] = i
			p.freeLocked(old)
			return
		}
	}
}

func (p *pool) freeLocked(i int) {
	if f := &p.frames[i]; f.shown > 0 {
		p.w.errorf("frame %d, generation %d, becomes free while %d views show it", i, f.generation, f.shown)
	}
	p.frames[i].generation++
}

// freeAll is the teardown.
func (p *pool) freeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for page, i := range p.table {
		p.freeLocked(i)
		p.table[page] = -1
	}
}

func (p *pool) lookUp(page int) (frame int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.table[page]
}

// show counts a view that shows a frame, or with -1 one that no longer does.
func (p *pool) show(frame, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := &p.frames[frame]
	if f.shown += n; n > 0 && f.generation%2 == 0 {
		p.w.errorf("frame %d, generation %d, is free and a view shows it", frame, f.generation)
	}
}

// view is a subscriber that shows what is mapped.
type view struct {
	*strict
	p *pool

	mu     sync.Mutex // protects what follows
	active int        // open brackets
	seq    int        // brackets that have ended
	frozen bool       // by Release
	shows  map[int]int
}

func newView(p *pool) *view { return &view{strict: newStrict(p.w), p: p, shows: map[int]int{}} }

func (v *view) dropLocked(r addr.HVARange) {
	for page, frame := range v.shows {
		if r.Contains(pageAt(page)) {
			v.p.show(frame, -1)
			delete(v.shows, page)
		}
	}
}

func (v *view) InvalidateRangeStart(inv *Invalidation) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.active++
	v.dropLocked(inv.Range)
	return v.strict.InvalidateRangeStart(inv)
}

func (v *view) InvalidateRangeEnd(inv *Invalidation) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.active--
	v.seq++
	v.strict.InvalidateRangeEnd(inv)
}

func (v *view) Release() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.frozen = true
	v.dropLocked(addr.HVARange{Start: 0, End: ^addr.HVA(0)})
	v.strict.Release()
}

// fault looks up what is mapped at a page, and shows it unless that may have
// changed. It returns false if the view is frozen.
func (v *view) fault(page int) bool {
	v.mu.Lock()
	seq := v.seq
	v.mu.Unlock()
	frame := v.p.lookUp(page)
	runtime.Gosched()
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.shows[page]; !ok && !v.frozen && v.active == 0 && v.seq == seq {
		v.shows[page] = frame
		v.p.show(frame, 1)
	}
	return !v.frozen
}

// pageAt returns the range of a page of a pool.
func pageAt(i int) addr.HVARange { return addr.HVAs(addr.HVA(i)<<addr.PageShift, addr.PageSize) }

// TestN9NoPageIsFreeAndShown: at no instant is a page free while a view shows it.
// Pages are replaced in brackets under both kinds of locks, views come and go and
// fault, and finally the address space exits, while all of that goes on.
func TestN9NoPageIsFreeAndShown(t *testing.T) {
	lasts := gvmtest.StormLasts(250 * time.Millisecond)
	rounds, faults := 0, new(atomic.Int64)
	for deadline := time.Now().Add(lasts); time.Now().Before(deadline) && !t.Failed(); rounds++ {
		if err := replacePages(rounds, faults); err != nil {
			t.Errorf("round %d: %v", rounds, err)
		}
	}
	t.Logf("%d rounds with %d faults in %v", rounds, faults.Load(), lasts)
}

func replacePages(round int, faults *atomic.Int64) error {
	w := newWorld(sound)
	p := newPool(w, 4, 3)
	torn := w.teardown
	w.teardown = func() error { p.freeAll(); return torn() }
	replace := func(i int) {
		inv := clearing(pageAt(i % len(p.table)))
		if err := w.InvalidateRangeStart(inv); err != nil {
			w.errorf("%w", err)
			return
		}
		p.replace(i % len(p.table))
		runtime.Gosched()
		w.InvalidateRangeEnd(inv)
	}
	user := func(f func(i int)) <-chan struct{} {
		return w.background(func() {
			for i := 0; i < 10+round%50 && w.TryGetUser(); i++ {
				f(i)
				w.exit() // if the others have gone
			}
		})
	}
	var stop atomic.Bool
	views := []*view{newView(p), newView(p)}
	done := []<-chan struct{}{
		user(func(i int) { w.Lock(); defer w.Unlock(); replace(i) }),
		user(func(i int) {
			v := newView(p)
			w.register(v)
			faults.Add(1)
			v.fault(i % len(p.table))
			v.unregister()
		}),
	}
	rmap := w.background(func() { // nobody's exit stops this one
		for i := 0; !stop.Load(); i++ {
			func() { w.file.RLock(); defer w.file.RUnlock(); replace(i) }()
		}
	})
	for _, v := range views {
		w.register(v)
		done = append(done, w.background(func() {
			for i := 0; v.fault(i % len(p.table)); i++ {
				faults.Add(1)
			}
		}))
	}
	for range round % 100 {
		runtime.Gosched()
	}
	w.exit()
	views[0].unregister()
	for _, d := range done {
		<-d
	}
	stop.Store(true)
	<-rmap
	views[1].unregister()
	for i := range p.frames {
		if f := p.frames[i]; f.generation%2 != 0 || f.shown != 0 {
			w.errorf("at the end frame %d has generation %d, and %d views show it", i, f.generation, f.shown)
		}
	}
	w.gone()
	return w.err()
}

// TestN10NothingRunsAfterUnregister: when Unregister returns no method of the
// subscriber runs, and none will.
func TestN10NothingRunsAfterUnregister(t *testing.T) {
	pass(t, checkUnregisterAwaitsMethods, checkUnregisterAwaitsLateWalks, checkExitAwaitsLateWalks)
}

// checkUnregisterAwaitsMethods unregisters a subscriber one of whose methods runs.
func checkUnregisterAwaitsMethods(m mutant) error {
	w := newWorld(m)
	var calls atomic.Int32
	var gone atomic.Bool
	inside, leave := make(chan struct{}), make(chan struct{})
	s := &starts{starter: func(*Invalidation) error {
		if calls.Add(1) == 1 {
			close(inside)
			<-leave
		}
		if gone.Load() {
			w.errorf("a method runs although Unregister has returned")
		}
		return nil
	}}
	w.register(s)
	bracket := w.background(func() { w.bracket(clearing(page), nil) })
	<-inside
	unregistered := w.background(func() { s.Unregister(); gone.Store(true) })
	gvmtest.ClosedWithin(unregistered, gvmtest.GraceFor(m))
	close(leave)
	<-bracket
	<-unregistered
	w.bracket(clearing(page), nil)
	if n := calls.Load(); n != 1 {
		w.errorf("the subscriber was told of %d brackets, want 1", n)
	}
	w.close()
	return w.err()
}

// TestN11SelfDetach: subscribers may end their own subscriptions in Release. The
// walk of the exit goes on to the others, and each is freed once, after it.
func TestN11SelfDetach(t *testing.T) {
	pass(t, checkFreedAfterExit)
	w := newWorld(sound)
	subscribers := make([]base, 4)
	var released, freed atomic.Int32
	for i := range subscribers {
		s := &subscribers[i]
		s.release = func() {
			released.Add(1)
			if i%2 == 1 {
				return
			}
			s.UnregisterNoRelease()
			Call(&s.head, func(h *srcu.Head) {
				if h != &s.head || s.linked {
					w.errorf("subscriber %d is freed on the chain", i)
				}
				freed.Add(1)
			})
		}
		w.register(s)
	}
	idx := chains.ReadLock()
	exited := w.background(w.exit)
	if !gvmtest.Eventually(func() bool { return released.Load() == 4 }) {
		t.Errorf("%d of 4 subscribers are released", released.Load())
	}
	if gvmtest.ClosedWithin(exited, gvmtest.Grace) || freed.Load() != 0 {
		t.Errorf("%d subscribers are freed before a grace period has passed", freed.Load())
	}
	chains.ReadUnlock(idx)
	<-exited
	Synchronize()
	if n := freed.Load(); n != 2 {
		t.Errorf("%d subscribers were freed, want 2", n)
	}
	subscribers[1].Unregister()
	subscribers[3].Unregister()
	w.gone()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestN11NobodyFindsWhatIsToBeFreed: one that has detached itself in Release is
// not found by walks that begin after that.
func TestN11NobodyFindsWhatIsToBeFreed(t *testing.T) { pass(t, checkDetachedIsNotFound) }

// checkDetachedIsNotFound has a bracket begin when the grace period after which
// the subscriber is freed is under way: that does not wait for the bracket.
func checkDetachedIsNotFound(m mutant) error {
	w := newWorld(m)
	inside, freed := make(chan struct{}), make(chan struct{})
	var k *Kind[*starts]
	k = NewKind(func(*AddressSpace) (*starts, error) {
		s := &starts{starter: func(*Invalidation) error {
			close(inside)
			if gvmtest.ClosedWithin(freed, gvmtest.GraceFor(m)) {
				w.errorf("it is freed while its start is running")
			}
			return nil
		}}
		s.release = func() {
			w.lateBracket(func() { k.Put(s) }, inside)
		}
		return s, nil
	}, func(*starts) { close(freed) })
	if _, err := k.Get(context.Background(), w.AddressSpace); err != nil {
		return err
	}
	quiesce()
	w.exit()
	Synchronize()
	w.gone()
	return w.err()
}

// lateBracket calls wait, which has somebody else wait for a grace period, starts
// a bracket for which that does not wait, and returns when the bracket is over, or
// in the start of a subscriber, which closes inside. The caller is in a section.
func (w *world) lateBracket(wait func(), inside <-chan struct{}) {
	ignored := graceIgnores()
	wait()
	if !gvmtest.Eventually(ignored) {
		w.errorf("nobody waits for a grace period")
	}
	select {
	case <-w.background(func() { w.bracket(clearing(page), nil) }):
	case <-inside:
	}
}

// checkFreedAfterExit keeps the exit from unlinking a subscriber that has detached
// itself, for as long as a grace period may take.
func checkFreedAfterExit(m mutant) error {
	w := newWorld(m)
	freed := make(chan struct{})
	s := new(base)
	detached := make(chan struct{})
	s.release = func() {
		s.UnregisterNoRelease()
		Call(&s.head, func(*srcu.Head) { close(freed) })
		w.subs.Load().mu.Lock() // for the check to give back
		close(detached)
	}
	w.register(s)
	exited := w.background(w.exit)
	<-detached
	if gvmtest.ClosedWithin(freed, gvmtest.GraceFor(m)) {
		w.errorf("a subscriber is freed that the exit has still to unlink")
	}
	w.subs.Load().mu.Unlock()
	<-exited
	Synchronize()
	if !gvmtest.Closed(freed) {
		w.errorf("a subscriber that detached itself is not freed")
	}
	w.gone()
	return w.err()
}

// TestN12SynchronizeWaitsForFrees: when Synchronize returns, as many functions
// have returned as were passed to Call before.
func TestN12SynchronizeWaitsForFrees(t *testing.T) {
	if err := checkFreesHaveReturned(Synchronize); err != nil {
		t.Error(err)
	}
	var queued, freed atomic.Int64
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for range 100 {
				Call(new(srcu.Head), func(*srcu.Head) { freed.Add(1) })
				queued.Add(1)
			}
		})
		all.Go(func() {
			for range 10 {
				before := queued.Load()
				Synchronize()
				if n := freed.Load(); n < before {
					t.Errorf("Synchronize has returned when %d of %d functions had", n, before)
				}
			}
		})
	}
	all.Wait()
	Synchronize()
	if n := freed.Load(); n != 300 {
		t.Errorf("at the end %d functions have returned, want 300", n)
	}
}

// checkFreesHaveReturned has somebody wait in one way or another for functions of
// which one does not return.
func checkFreesHaveReturned(synchronize func()) error {
	inside, leave := make(chan struct{}), make(chan struct{})
	var freed atomic.Int32
	Call(new(srcu.Head), func(*srcu.Head) { close(inside); <-leave })
	for range 3 {
		Call(new(srcu.Head), func(*srcu.Head) { freed.Add(1) })
	}
	<-inside
	after := make(chan int32)
	go func() { synchronize(); after <- freed.Load() }()
	var err error
	select {
	case n := <-after:
		err = fmt.Errorf("it has returned when %d of 3 functions had, and one before them had not", n)
		close(leave)
	case <-time.After(gvmtest.Grace):
		close(leave)
		if n := <-after; n != 3 {
			err = fmt.Errorf("it has returned when %d of 3 functions had", n)
		}
	}
	Synchronize()
	return err
}

// TestN13OneSleeperDelaysNoBrackets: while a method sleeps in one address space,
// the brackets of another go on; its Unregister waits, which is counted.
func TestN13OneSleeperDelaysNoBrackets(t *testing.T) {
	a, b := newWorld(sound), newWorld(sound)
	inside, leave := make(chan struct{}), make(chan struct{})
	sleeper := &starts{starter: func(*Invalidation) error { close(inside); <-leave; return nil }}
	told := 0
	other := &starts{starter: func(*Invalidation) error { told++; return nil }}
	a.register(sleeper)
	b.register(other)
	bracket := a.background(func() { a.bracket(clearing(page), nil) })
	<-inside
	for range 100 {
		b.bracket(clearing(page), nil)
	}
	if told != 100 {
		t.Errorf("the other address space's subscriber was told of %d brackets, want 100", told)
	}
	if st := b.Stats(); st.Waits != 0 || st.Waited != 0 || st.Longest != 0 {
		t.Errorf("before Unregister the statistics are %+v", st)
	}
	begin := time.Now()
	unregistered := b.background(other.Unregister)
	if !gvmtest.Eventually(func() bool { return other.state.Load()&phase == released }) {
		t.Error("Unregister does not call Release while a method sleeps elsewhere")
	}
	if gvmtest.ClosedWithin(unregistered, 5*gvmtest.Grace) {
		t.Error("Unregister does not wait for a method of another address space, which the domain cannot tell from its own")
	}
	close(leave)
	<-bracket
	<-unregistered
	took := time.Since(begin)
	if st := b.Stats(); st.Waits != 1 || st.Waited <= 0 || st.Waited > took || st.Longest != st.Waited {
		t.Errorf("after an Unregister that took %v the statistics are %+v, want one wait of that order", took, st)
	}
	sleeper.Unregister()
	for _, w := range []*world{a, b} {
		w.close()
		if err := w.err(); err != nil {
			t.Error(err)
		}
	}
}

// TestN14CountReturnsToBase: every end of a subscription gives its count back, and
// the structure goes with the last of the users and subscriptions, in any order.
func TestN14CountReturnsToBase(t *testing.T) {
	pass(t, checkUsersLeave, checkCountDuringRelease)
	type step struct {
		name string
		do   func(w *world)
		want int64 // the count afterwards
	}
	ctx := context.Background()
	shared := newObjects()
	s, d, i := new(base), new(base), &spanOver{invalidate: func(*Invalidation) bool { return true }}
	var o *object
	var section int
	registered := func(s Subscriber) func(*world) { return func(w *world) { w.register(s) } }
	exit := func(w *world) { w.exit() }
	for name, steps := range map[string][]step{
		"ended before the exit": {
			{"Register", registered(s), 2}, {"Unregister", func(*world) { s.Unregister() }, 1}, {"exit", exit, 0},
		},
		"ended after it": {
			{"Register", registered(s), 2}, {"exit", exit, 1}, {"Unregister", func(*world) { s.Unregister() }, 0},
		},
		"detached": {
			{"Register", registered(d), 2}, {"UnregisterNoRelease", func(*world) { d.UnregisterNoRelease(); Synchronize() }, 1}, {"exit", exit, 0},
		},
		"two users": {
			{"Register", registered(s), 2},
			{"TryGetUser", func(w *world) {
				if !w.TryGetUser() {
					w.errorf("TryGetUser: false, want true")
				}
			}, 2},
			{"PutUser", exit, 2},
			{"exit", exit, 1},
			{"TryGetUser after exit", func(w *world) {
				if w.TryGetUser() {
					w.errorf("TryGetUser after the exit: true, want false")
				}
			}, 1},
			{"Unregister", func(*world) { s.Unregister() }, 0},
		},
		"grabbed": {
			{"Register", registered(s), 2}, {"Grab", func(w *world) { w.Grab() }, 3}, {"exit", exit, 2},
			{"Unregister", func(*world) { s.Unregister() }, 1}, {"Drop", func(w *world) { w.Drop() }, 0},
		},
		"shared": {
			{"Get", func(w *world) {
				var err error
				if o, err = shared.Get(ctx, w.AddressSpace); err != nil {
					w.errorf("%w", err)
				}
			}, 2},
			{"Get again", func(w *world) {
				if p, err := shared.Get(ctx, w.AddressSpace); err != nil || p != o {
					w.errorf("Get returned %p and %w, want %p", p, err, o)
				}
			}, 2},
			{"exit", exit, 1},
			{"Put", func(*world) { shared.Put(o) }, 1},
			{"last Put, inside a section", func(*world) { section = chains.ReadLock(); shared.Put(o) }, 1},
			{"it is freed", func(*world) { chains.ReadUnlock(section); Synchronize() }, 0},
		},
		"interval": {
			{"Insert", func(w *world) {
				if err := w.Insert(ctx, i, page.Start, page.Bytes()); err != nil {
					w.errorf("%w", err)
				}
			}, 2},
			{"exit", exit, 1}, {"Remove", func(*world) { i.Remove() }, 0},
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			w := newWorld(sound)
			for _, st := range steps {
				st.do(w)
				got := w.Stats().Count
				if got != st.want {
					t.Errorf("after %s the count is %d, want %d", st.name, got, st.want)
				}
				if there := w.subs.Load() != nil; there != (st.want > 0) {
					t.Errorf("after %s there are subscriptions: %t, want %t", st.name, there, st.want > 0)
				}
			}
			w.gone()
			if err := w.err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// checkUsersLeave has the last user go while there is a subscription.
func checkUsersLeave(m mutant) error {
	w := newWorld(m)
	s := new(base)
	w.register(s)
	if n := w.Stats().Users; n != 1 {
		w.errorf("a subscription is a user: there are %d, want 1", n)
	}
	w.exit()
	if !gvmtest.Closed(w.torn) {
		w.errorf("the last user has gone, and the mappings stay because of a subscription")
		w.exit()
	}
	s.Unregister()
	w.gone()
	return w.err()
}

// checkCountDuringRelease looks at the count while Unregister has not returned.
func checkCountDuringRelease(m mutant) error {
	w := newWorld(m)
	s := new(base)
	s.release = func() {
		if n := w.Stats().Count; n != 2 {
			w.errorf("the count is %d before Unregister has waited, want 2", n)
		}
	}
	w.register(s)
	s.Unregister()
	w.close()
	return w.err()
}

// TestN15SharingAgreesWithAModel plays every short sequence of Get and Put of two
// kinds, of waiting for frees and of the exit, and compares with what is simple:
// a number for each kind.
func TestN15SharingAgreesWithAModel(t *testing.T) {
	pass(t, checkSharing)
	const length = 6
	plays := 0
	var extend func(ops []shareOp)
	extend = func(ops []shareOp) {
		if len(ops) == length {
			plays++
			if err := playShares(ops); err != nil {
				t.Errorf("%v: %v", ops, err)
			}
			return
		}
		for op := range shareOps {
			if !t.Failed() && op.possible(ops) {
				extend(append(ops[:len(ops):len(ops)], op))
			}
		}
	}
	extend(nil)
	t.Logf("%d sequences", plays)
}

// shareOp is what is done in a sequence.
type shareOp int

const (
	get0 shareOp = iota
	get1
	put0
	put1
	awaitFrees
	exitNow
	shareOps
)

func (op shareOp) String() string {
	return [...]string{"get 0", "get 1", "put 0", "put 1", "synchronize", "exit"}[op]
}

// possible reports whether op is allowed after others.
func (op shareOp) possible(before []shareOp) bool {
	count := func(of shareOp) (n int) {
		for i, o := range before {
			if o == of && (o > get1 || !slices.Contains(before[:i], exitNow)) {
				n++
			}
		}
		return n
	}
	switch op {
	case put0, put1:
		return count(op) < count(op-put0+get0)
	case exitNow:
		return count(op) == 0
	}
	return true
}

// playShares plays a sequence, and then what is left to do.
func playShares(ops []shareOp) error {
	ctx := context.Background()
	w := newWorld(sound)
	kinds := [2]*Kind[*object]{newObjects(), newObjects()}
	var model [2]struct {
		now   *object
		users int
		old   []*object // given back by their last user
	}
	exited := false
	do := func(op shareOp) {
		switch op {
		case get0, get1:
			k := &model[op-get0]
			o, err := kinds[op-get0].Get(ctx, w.AddressSpace)
			switch {
			case exited && !errors.Is(err, ErrExited):
				w.errorf("%v after the exit returned %p, %w, want %w", op, o, err, ErrExited)
			case exited:
			case err != nil:
				w.errorf("%v: %w", op, err)
			case k.now != nil && o != k.now:
				w.errorf("%v returned %p, want %p, which is shared", op, o, k.now)
			case k.now == nil && (slices.Contains(model[0].old, o) || slices.Contains(model[1].old, o)):
				w.errorf("%v returned %p, which was given back", op, o)
			default:
				k.now = o
				k.users++
			}
		case put0, put1:
			k := &model[op-put0]
			kinds[op-put0].Put(k.now)
			if k.users--; k.users == 0 {
				k.old = append(k.old, k.now)
				k.now = nil
			}
		case awaitFrees:
			Synchronize()
		case exitNow:
			w.exit()
			exited = true
		}
	}
	compare := func(after shareOp) {
		linked, live, waiting := 0, 0, 0
		for i, k := range model {
			if o := k.now; o != nil {
				live++
				if o.linked {
					linked++
				}
				if o.users != k.users || o.linked == exited || o.freed.Load() != 0 || o.released.Load() == 1 != exited {
					w.errorf("after %v kind %d has %d users, linked %t, freed %d times, released %d times, and the model %d users, exited %t", after, i, o.users, o.linked, o.freed.Load(), o.released.Load(), k.users, exited)
				}
			}
			for _, o := range k.old {
				if n := o.freed.Load(); n > 1 || n == 0 && after == awaitFrees {
					w.errorf("after %v one of kind %d that was given back has been freed %d times", after, i, n)
				} else if n == 0 {
					waiting++
				}
			}
		}
		want := int64(live)
		if !exited {
			want++
		}
		// Of those that count as freed, one may not have dropped its count yet:
		// callbacks run one at a time.
		waiting++
		st := w.Stats()
		if n := st.Count - want; n < 0 || n > int64(waiting) || after == awaitFrees && n != 0 {
			w.errorf("after %v the count is %d, want %d and up to %d that are to be freed", after, st.Count, want, waiting)
		}
		if st.Notifiers != linked {
			w.errorf("after %v there are %d on the chain, want %d", after, st.Notifiers, linked)
		}
	}
	for _, op := range ops {
		do(op)
		compare(op)
	}
	for i := range model {
		for model[i].users > 0 {
			do(put0 + shareOp(i))
			compare(put0 + shareOp(i))
		}
	}
	if !exited {
		do(exitNow)
	}
	do(awaitFrees)
	compare(awaitFrees)
	w.gone()
	return w.err()
}

// checkSharing has two kinds of one type, and users who come while what the last
// one gave back is still in use by a method.
func checkSharing(m mutant) error {
	ctx := context.Background()
	w := newWorld(m)
	kinds := [2]*Kind[*object]{newObjects(), newObjects()}
	get := func(k int) *object {
		o, err := kinds[k].Get(ctx, w.AddressSpace)
		if err != nil {
			w.errorf("%w", err)
		}
		return o
	}
	a, b := get(0), get(1)
	if a == b {
		w.errorf("two kinds of one type share a subscriber")
		kinds[0].Put(a)
		kinds[0].Put(a)
		Synchronize()
		return w.err()
	}
	idx := chains.ReadLock()
	kinds[0].Put(a)
	if n := a.freed.Load(); n != 0 {
		w.errorf("it is freed by Put, in which methods may still be running")
	}
	if n := a.released.Load(); n != 0 {
		w.errorf("Put calls Release")
	}
	c := get(0)
	if c == a {
		w.errorf("Get returns what its last user has given back")
		chains.ReadUnlock(idx)
		Synchronize()
		return w.err()
	}
	if st := w.Stats(); st.Notifiers != 2 {
		w.errorf("there are %d on the chain, want 2", st.Notifiers)
	}
	if a.freed.Load() == 0 && !a.linked && a.users != 0 {
		w.errorf("the one that was given back has %d users", a.users)
	}
	chains.ReadUnlock(idx)
	kinds[0].Put(c)
	kinds[1].Put(b)
	Synchronize()
	for _, o := range []*object{a, b, c} {
		if f, r := o.freed.Load(), o.released.Load(); f != 1 || r != 0 {
			w.errorf("one was freed %d times and released %d times, want once and not", f, r)
		}
	}
	w.close()
	return w.err()
}

// TestN15SharedAtOnce: users who come at the same time share, and it is freed once.
func TestN15SharedAtOnce(t *testing.T) {
	w := newWorld(sound)
	k := newObjects()
	objects := make([]*object, 8)
	var all sync.WaitGroup
	for i := range objects {
		all.Go(func() {
			var err error
			if objects[i], err = k.Get(context.Background(), w.AddressSpace); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if len(slices.Compact(slices.Clone(objects))) != 1 {
		t.Fatalf("Gets returned %v, want one", objects)
	}
	for _, o := range objects {
		all.Go(func() { k.Put(o) })
	}
	all.Wait()
	Synchronize()
	if n := objects[0].freed.Load(); n != 1 {
		t.Errorf("it was freed %d times, want once", n)
	}
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestN15SharedTooOften: as many users as can be counted are left alone.
func TestN15SharedTooOften(t *testing.T) {
	ctx := context.Background()
	w := newWorld(sound)
	k := newObjects()
	o, err := k.Get(ctx, w.AddressSpace)
	if err != nil {
		t.Fatal(err)
	}
	o.users = maxUsers
	if _, err := k.Get(ctx, w.AddressSpace); !errors.Is(err, syscall.EOVERFLOW) || o.users != maxUsers {
		t.Errorf("Get with %d users returned %v and leaves %d, want EOVERFLOW", maxUsers, err, o.users)
	}
	o.users = maxUsers - 1
	if again, err := k.Get(ctx, w.AddressSpace); err != nil || again != o || o.users != maxUsers {
		t.Errorf("Get with %d users returned %p, %v and leaves %d, want %p", maxUsers-1, again, err, o.users, o)
	}
	o.users = 1
	k.Put(o)
	Synchronize()
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestN15PutInRelease: a shared subscriber may be given back when it is released.
func TestN15PutInRelease(t *testing.T) {
	w := newWorld(sound)
	var k *Kind[*base]
	freed := 0
	k = NewKind(func(*AddressSpace) (*base, error) {
		s := new(base)
		s.release = func() { k.Put(s) }
		return s, nil
	}, func(s *base) {
		if s.linked {
			t.Error("it is freed on the chain")
		}
		freed++
	})
	if _, err := k.Get(context.Background(), w.AddressSpace); err != nil {
		t.Fatal(err)
	}
	w.exit()
	Synchronize()
	if freed != 1 {
		t.Errorf("it was freed %d times, want once", freed)
	}
	w.gone()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestN16WhoIsToldOfABracket compares, for every short chain and kind of interval,
// who is told of what with what the rules say, among them what to do after one
// has refused.
func TestN16WhoIsToldOfABracket(t *testing.T) {
	pass(t, checkWhoIsTold, checkEndAfterRefusal)
	if err := checkReaperNeverWaits(false); err != nil {
		t.Error(err)
	}
}

// The kinds of subscribers in a chain: with a start, an end or both, and those
// whose start refuses if it may.
var chainKinds = []string{"start", "end", "both", "refuses", "refuses both"}

func checkWhoIsTold(m mutant) error {
	var check func(chain []string) error
	check = func(chain []string) error {
		for _, interval := range []string{"", "willing", "refuses"} {
			for _, nonBlockable := range []bool{false, true} {
				if err := whoIsTold(m, chain, interval, nonBlockable); err != nil {
					return fmt.Errorf("chain %q, interval %q, non-blockable %t: %w", chain, interval, nonBlockable, err)
				}
			}
		}
		for _, kind := range chainKinds {
			if len(chain) == 3 {
				break
			}
			if err := check(append(chain[:len(chain):len(chain)], kind)); err != nil {
				return err
			}
		}
		return nil
	}
	return check(nil)
}

// has reports of a kind whether it has a start, an end, and refuses.
func has(kind string) (start, end, refuses bool) {
	return kind != "end", strings.HasSuffix(kind, "both") || kind == "end", strings.HasPrefix(kind, "refuses")
}

// expected returns the calls of a bracket, whether it is opened, and how many
// subscribers are reported.
func expected(chain []string, interval string, nonBlockable bool) (calls []string, opened bool, reports int) {
	opened = true
	if interval != "" {
		calls = append(calls, "interval")
	}
	if interval == "refuses" {
		if nonBlockable {
			return calls, false, 0 // nobody else is told
		}
		reports++
	}
	for i, kind := range chain {
		start, end, refuses := has(kind)
		if start {
			calls = append(calls, fmt.Sprint("start ", i))
		}
		if refuses && nonBlockable {
			opened = false
		}
		if refuses && (end || !nonBlockable) {
			reports++
		}
	}
	what := "end"
	if opened {
		calls = append(calls, "change")
	} else {
		what = "end of what failed"
	}
	for i, kind := range chain {
		if _, end, _ := has(kind); end {
			calls = append(calls, fmt.Sprint(what, " ", i))
		}
	}
	return calls, opened, reports
}

func whoIsTold(m mutant, chain []string, interval string, nonBlockable bool) error {
	ctx := context.Background()
	w := newWorld(m)
	inv := clearing(page)
	inv.NonBlockable = nonBlockable
	inv.Owner, inv.Op, inv.Event = w, 7, Migrate
	var calls []string
	told := func(what string, got *Invalidation) {
		if got != inv || got.Range != page || got.Event != Migrate || got.Owner != any(w) || got.Op != 7 {
			w.errorf("%s is told of %+v", what, got)
		}
		calls = append(calls, what)
	}
	ivl := &spanOver{invalidate: func(inv *Invalidation) bool {
		if inv.Event == Released {
			return true
		}
		told("interval", inv)
		return interval != "refuses"
	}}
	if interval != "" {
		if err := w.Insert(ctx, ivl, page.Start, page.Bytes()); err != nil {
			w.errorf("%w", err)
		}
	}
	refusal := fmt.Errorf("busy: %w", syscall.EAGAIN)
	var subscribers []Subscriber
	for i, kind := range slices.Backward(chain) { // the newest is told first
		start, end, refuses := has(kind)
		onStart := starter(func(inv *Invalidation) error {
			told(fmt.Sprint("start ", i), inv)
			if refuses {
				return refusal
			}
			return nil
		})
		onEnd := ender(func(inv *Invalidation) {
			what := "end"
			if inv.Failed {
				what = "end of what failed"
			}
			told(fmt.Sprint(what, " ", i), inv)
		})
		var s Subscriber
		switch {
		case start && end:
			s = &brackets{starter: onStart, ender: onEnd}
		case start:
			s = &starts{starter: onStart}
		default:
			s = &struct {
				base
				ender
			}{ender: onEnd}
		}
		w.register(s)
		subscribers = append(subscribers, s)
	}

	want, opened, reports := expected(chain, interval, nonBlockable)
	w.Lock()
	err := w.InvalidateRangeStart(inv)
	open := w.Stats().Invalidating
	if err == nil {
		calls = append(calls, "change")
		w.InvalidateRangeEnd(inv)
	}
	w.Unlock()

	if diff := cmp.Diff(want, calls); diff != "" {
		w.errorf("calls (-want +got):\n%s", diff)
	}
	if wantOpen := opened && interval != ""; open != 0 != wantOpen {
		w.errorf("after the start %d brackets are open, want one: %t", open, wantOpen)
	}
	if n := w.Stats().Invalidating; n != 0 {
		w.errorf("at the end %d brackets are open, want 0", n)
	}
	if opened != (err == nil) || !opened && (!errors.Is(err, ErrWouldBlock) || !errors.Is(err, syscall.EAGAIN)) {
		w.errorf("the start returned %w, want it to succeed: %t, or %w", err, opened, ErrWouldBlock)
	}
	if err != nil && interval != "refuses" && !errors.Is(err, refusal) {
		w.errorf("the start returned %w, want the subscriber's %w in it", err, refusal)
	}
	if got := w.reported(); len(got) != reports {
		w.errorf("%d were reported, want %d: %v", len(got), reports, got)
	}
	if interval != "" {
		ivl.Remove()
	}
	for _, s := range subscribers {
		s.notifier().UnregisterNoRelease()
	}
	w.close()
	return w.err()
}

// checkEndAfterRefusal has a caller close a bracket that was not opened.
func checkEndAfterRefusal(m mutant) error {
	w := newWorld(m)
	ends := 0
	s := &struct {
		base
		ender
	}{ender: func(*Invalidation) { ends++ }}
	refuses := &starts{starter: func(*Invalidation) error { return syscall.EAGAIN }}
	w.register(s)
	w.register(refuses)
	inv := clearing(page)
	inv.NonBlockable = true
	<-w.background(func() {
		w.Lock()
		defer w.Unlock()
		if err := w.InvalidateRangeStart(inv); !errors.Is(err, ErrWouldBlock) || ends != 1 {
			w.errorf("the start returned %w after %d ends, want %w after 1", err, ends, ErrWouldBlock)
		}
		w.InvalidateRangeEnd(inv)
	})
	if r := w.reported(); ends != 1 || len(r) != 1 || r[0].Method != "InvalidateRangeEnd" {
		w.errorf("an end after ErrWouldBlock is passed on %d times and reported as %v, want not and once", ends-1, r)
	}
	s.UnregisterNoRelease()
	refuses.UnregisterNoRelease()
	w.close()
	return w.err()
}

// checkReaperNeverWaits has a bracket that must not block come while a
// subscriber's lock is held by somebody who waits for the end of that bracket, as
// one who allocates memory waits for whoever frees some. A subscriber that sleeps
// then makes three wait for each other.
func checkReaperNeverWaits(sleeps bool) error {
	w := newWorld(sound)
	var mu sync.Mutex
	s := &starts{starter: func(inv *Invalidation) error {
		if sleeps || !inv.NonBlockable {
			mu.Lock()
		} else if !mu.TryLock() {
			return syscall.EAGAIN
		}
		mu.Unlock()
		return nil
	}}
	w.register(s)
	inv := clearing(page)
	inv.NonBlockable = true
	soon := gvmtest.Limit
	if sleeps {
		soon = 50 * time.Millisecond
	}
	mu.Lock()
	reaped := w.background(func() {
		w.Lock()
		defer w.Unlock()
		if err := w.InvalidateRangeStart(inv); err == nil {
			w.InvalidateRangeEnd(inv)
		} else if !errors.Is(err, syscall.EAGAIN) {
			w.errorf("%w", err)
		}
	})
	if !gvmtest.ClosedWithin(reaped, soon) {
		w.errorf("a bracket that must not block waits for a subscriber")
	}
	mu.Unlock()
	<-reaped
	s.Unregister()
	w.close()
	return w.err()
}

// TestN22OrderOfTheExit: the exit tells intervals, then subscribers, waits for the
// methods that run, and gives up the mappings.
func TestN22OrderOfTheExit(t *testing.T) {
	w := newWorld(sound)
	var order []string // written by the exit, and before and after it; see inside and leave
	note := func(what string) { order = append(order, what) }
	torn := w.teardown
	w.teardown = func() error { note("teardown"); return torn() }
	ivl := &spanOver{invalidate: func(inv *Invalidation) bool {
		if inv.Event == Released {
			note("interval")
			return false // which is reported, and changes nothing
		}
		return true
	}}
	if err := w.Insert(context.Background(), ivl, page.Start, page.Bytes()); err != nil {
		t.Fatal(err)
	}
	inside, leave := make(chan struct{}), make(chan struct{})
	old := &base{release: func() { note("older subscriber") }}
	young := &starts{starter: func(*Invalidation) error {
		close(inside)
		<-leave
		note("method returns")
		return nil
	}}
	last := make(chan struct{})
	young.release = func() { note("younger subscriber") }
	old.release = func() { note("older subscriber"); close(last) }
	w.register(old)
	w.register(young)
	bracket := w.background(func() { w.bracket(clearing(page), nil) })
	<-inside
	requested := graceRequested()
	exited := w.background(w.exit)
	<-last
	if !gvmtest.Eventually(requested) || !gvmtest.Eventually(func() bool { return w.Stats().Notifiers == 0 }) {
		t.Error("the exit does not come to an end of the chain")
	}
	if gvmtest.ClosedWithin(exited, gvmtest.Grace) {
		t.Error("the exit does not wait for a method")
	}
	close(leave)
	<-bracket
	<-exited
	if diff := cmp.Diff([]string{"interval", "younger subscriber", "older subscriber", "method returns", "teardown"}, order); diff != "" {
		t.Errorf("the exit (-want +got):\n%s", diff)
	}
	if r := w.reported(); len(r) != 1 || r[0].Subscriber != any(ivl) || r[0].Method != "Invalidate" {
		t.Errorf("reported: %v, want the interval that refused", r)
	}
	ivl.Remove()
	old.Unregister()
	young.Unregister()
	w.gone()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestN22TeardownFails: its error is that of the last PutUser, which has done all
// the rest.
func TestN22TeardownFails(t *testing.T) {
	refusal := errors.New("munmap failed")
	as := New(Options{Teardown: func() error { return refusal }})
	if !as.TryGetUser() {
		t.Fatal("TryGetUser: false, want true")
	}
	if err := as.PutUser(); err != nil {
		t.Errorf("PutUser, not the last: %v", err)
	}
	if err := as.PutUser(); !errors.Is(err, refusal) {
		t.Errorf("the last PutUser returned %v, want %v", err, refusal)
	}
	if st := as.Stats(); st.Users != 0 || st.Count != 0 {
		t.Errorf("there are %d users and the count is %d, want 0 and 0", st.Users, st.Count)
	}
}

// Subscribers with some of the methods for accessed bits.
type (
	agesFlush struct {
		base
		flusher
	}
	agesClear struct {
		base
		clearer
	}
	agesBoth struct {
		base
		flusher
		clearer
	}
	agesTest struct {
		base
		tester
	}
)

// TestN24Aging: to clear asks every subscriber that has accessed bits, and is the
// OR of the answers; to test asks until the first one that says yes.
func TestN24Aging(t *testing.T) {
	r := addr.HVAs(page.Start, 2*addr.PageSize)
	for young := range 1 << 5 { // who says yes
		w := newWorld(sound)
		var calls []string
		told := func(i int, method string, got addr.HVARange) bool {
			if got != r {
				t.Errorf("%s is called with %v, want %v", method, got, r)
			}
			calls = append(calls, fmt.Sprint(method, " ", i))
			return young>>i&1 != 0
		}
		flush := func(i int) flusher { return func(r addr.HVARange) bool { return told(i, "flush", r) } }
		clean := func(i int) clearer { return func(r addr.HVARange) bool { return told(i, "clear", r) } }
		test := func(i int) tester {
			return func(hva addr.HVA) bool { return told(i, "test", addr.HVARange{Start: hva, End: r.End}) }
		}
		subscribers := []Subscriber{ // the first is told first
			&agesFlush{flusher: flush(0)}, &agesTest{tester: test(1)}, &agesBoth{flusher: flush(2), clearer: clean(2)},
			&agesClear{clearer: clean(3)}, &agesTest{tester: test(4)}, new(base),
		}
		for _, s := range slices.Backward(subscribers) {
			w.register(s)
		}
		tests := []string{"test 1"}
		if young>>1&1 == 0 {
			tests = append(tests, "test 4")
		}
		for name, tt := range map[string]struct {
			call func() bool
			asks []string
			who  int // those whose answers count
		}{
			"ClearFlushYoung": {func() bool { return w.ClearFlushYoung(r) }, []string{"flush 0", "flush 2", "clear 3"}, 0b01101},
			"ClearYoung":      {func() bool { return w.ClearYoung(r) }, []string{"flush 0", "clear 2", "clear 3"}, 0b01101},
			"TestYoung":       {func() bool { return w.TestYoung(r.Start) }, tests, 0b10010},
		} {
			calls = nil
			if got, want := tt.call(), young&tt.who != 0; got != want {
				t.Errorf("%s with %05b young: %t, want %t", name, young, got, want)
			}
			if diff := cmp.Diff(tt.asks, calls); diff != "" {
				t.Errorf("%s with %05b young asks (-want +got):\n%s", name, young, diff)
			}
		}
		for _, s := range subscribers {
			s.notifier().UnregisterNoRelease()
		}
		w.close()
		if err := w.err(); err != nil {
			t.Error(err)
		}
	}
}

// TestN24SecondaryTLBs: all are told of entries that were cleared, and nobody else.
func TestN24SecondaryTLBs(t *testing.T) {
	w := newWorld(sound)
	var told []addr.HVARange
	hardware := func() Subscriber {
		return &struct {
			base
			tlb
		}{tlb: func(r addr.HVARange) { told = append(told, r) }}
	}
	subscribers := []Subscriber{hardware(), &starts{starter: func(*Invalidation) error { t.Error("a start is told"); return nil }}, hardware()}
	for _, s := range subscribers {
		w.register(s)
	}
	w.InvalidateSecondaryTLBs(page)
	if diff := cmp.Diff([]addr.HVARange{page, page}, told); diff != "" {
		t.Errorf("told (-want +got):\n%s", diff)
	}
	for _, s := range subscribers {
		s.notifier().UnregisterNoRelease()
	}
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestN25WalkersGoOn: one that is unlinked leads on until a grace period has
// passed, those who stand on it to the rest of the chain.
func TestN25WalkersGoOn(t *testing.T) { pass(t, checkWalkersGoOn) }

// checkWalkersGoOn unlinks a subscriber, in each way, while it is told of a start.
func checkWalkersGoOn(m mutant) error {
	var wrong []error
	for name, end := range map[string]func(n *Notifier){
		"UnregisterNoRelease": (*Notifier).UnregisterNoRelease,
		"Unregister":          (*Notifier).Unregister,
	} {
		w := newWorld(m)
		inside, leave := make(chan struct{}), make(chan struct{})
		told := false
		rest := &starts{starter: func(*Invalidation) error { told = true; return nil }}
		middle := &starts{starter: func(*Invalidation) error { close(inside); <-leave; return nil }}
		front := new(base)
		for _, s := range []Subscriber{rest, middle, front} {
			w.register(s)
		}
		bracket := w.background(func() { w.bracket(clearing(page), nil) })
		<-inside
		ended := w.background(func() { end(&middle.Notifier) })
		if !gvmtest.Eventually(func() bool { return w.Stats().Notifiers == 2 }) {
			w.errorf("%s does not unlink while a method runs", name)
		}
		if next := middle.next.Load(); next != &rest.Notifier {
			w.errorf("after %s it leads to %p, want %p", name, next, &rest.Notifier)
		}
		close(leave)
		<-bracket
		<-ended
		if !told {
			w.errorf("a walk ends at one that %s has unlinked meanwhile", name)
		}
		front.Unregister()
		rest.Unregister()
		w.close()
		wrong = append(wrong, w.err())
	}
	return errors.Join(wrong...)
}

// TestN26SubscriptionsStay: once there are subscriptions, no registration and no
// end of one changes the pointer to them, until the structure goes.
func TestN26SubscriptionsStay(t *testing.T) {
	w := newWorld(sound)
	if w.subs.Load() != nil {
		t.Error("there are subscriptions before the first registration")
	}
	first := new(base)
	w.register(first)
	subs := w.subs.Load()
	stop := make(chan struct{})
	watcher := w.background(func() {
		for !gvmtest.Closed(stop) {
			if got := w.subs.Load(); got != subs {
				w.errorf("the subscriptions went from %p to %p", subs, got)
				return
			}
			runtime.Gosched()
		}
	})
	first.Unregister()
	k := newObjects()
	for range 50 {
		s, d := new(base), new(base)
		w.register(s)
		w.register(d)
		o, err := k.Get(context.Background(), w.AddressSpace)
		if err != nil {
			w.errorf("%w", err)
			break
		}
		d.UnregisterNoRelease()
		s.Unregister()
		k.Put(o)
		if err := w.Register(interruptedAt(3), new(base)); !errors.Is(err, syscall.EINTR) {
			w.errorf("it returned %w, want EINTR", err)
		}
		if got := w.subs.Load(); got != subs {
			w.errorf("the subscriptions went from %p to %p", subs, got)
		}
	}
	Synchronize()
	close(stop)
	<-watcher
	w.close()
	if err := w.err(); err != nil {
		t.Error(err)
	}
}

// TestUnregisterNoRelease: it does not call Release, nor does the exit then, and
// it does not wait.
func TestUnregisterNoRelease(t *testing.T) { pass(t, checkDetach) }

// checkDetach detaches a subscriber with a section open, which somebody who waits
// would wait for, and with all locks held.
func checkDetach(m mutant) error {
	w := newWorld(m)
	s := newStrict(w)
	w.register(s)
	idx := chains.ReadLock()
	w.Lock()
	s.UnregisterNoRelease()
	if st := w.Stats(); st.Notifiers != 0 || st.Count != 1 || st.Waits != 0 {
		w.errorf("after UnregisterNoRelease the statistics are %+v, want nobody on the chain, a count of 1 and no wait", st)
	}
	w.Unlock()
	chains.ReadUnlock(idx)
	w.bracket(clearing(page), nil)
	w.close()
	if n := s.released.Load(); n != 0 || len(s.open) != 0 {
		w.errorf("one that was detached is released %d times and told of %d brackets, want not", n, len(s.open))
	}
	return w.err()
}
