package notifier

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// The invariants of intervals, N17 to N23, have a test each, named for them, and
// so have the rules R29 to R38 that they follow from. Where one is about what a
// schedule does, it is a check: a function that makes the schedule step by step.
// The checks run here, and in TestMutants on address spaces with a defect.

// An intervalCheck returns an error if an invariant is broken in an address space
// that newBed makes. It leaves no goroutine behind, whether it does or not.
type intervalCheck func(newBed func() *intervalBed) error

// intervalBed is an address space that has had an interval, and its pages.
type intervalBed struct {
	*AddressSpace
	s *subscriptions

	// pages has for each page of the address space its generation, which changes
	// inside brackets: what was looked up in another one is stale.
	pages [8]atomic.Uint64

	defect  mirrorDefect  // of the mirrors
	waiting chan struct{} // has an element for each wait for an invalidation that has begun
	soon    time.Duration // how long what happens soon may take

	mu      sync.Mutex
	reports []error
}

// firstSeqs are with what the sequence of an address space begins in a test. It
// wraps soon after the others, and is 0 when it has.
var firstSeqs = []uint64{firstSeq, ^uint64(0) - 1, ^uint64(0) - 3, ^uint64(0) - 7}

func newIntervalBed(m mutant, seq uint64) *intervalBed {
	b := &intervalBed{waiting: make(chan struct{}, 64), soon: gvmtest.Limit}
	if m != sound {
		b.soon = 200 * time.Millisecond
	}
	b.AddressSpace = New(Options{Report: func(err error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.reports = append(b.reports, err)
	}})
	b.mutant = m
	if err := b.firstInterval(context.Background()); err != nil {
		panic(err)
	}
	b.s = b.subs.Load()
	b.s.seq = seq
	b.s.changed.L = watchedMutex{&b.s.mu, b.waiting}
	for i := range b.pages {
		b.pages[i].Store(1)
	}
	return b
}

func soundBed() *intervalBed { return newIntervalBed(sound, firstSeq) }

// watchedMutex tells of those who wait: they give it back by way of their
// sync.Cond, while everybody else calls the sync.Mutex itself.
type watchedMutex struct {
	*sync.Mutex
	waiting chan<- struct{}
}

func (w watchedMutex) Unlock() {
	w.Mutex.Unlock()
	select {
	case w.waiting <- struct{}{}:
	default: // nobody counts them
	}
}

// attempt calls f on a goroutine of its own, and returns when f has returned or
// waits for an invalidation. Nobody else begins to wait meanwhile.
func (b *intervalBed) attempt(f func()) (done <-chan struct{}, waits bool) {
	for len(b.waiting) > 0 {
		<-b.waiting // of those who were not counted
	}
	done = gvmtest.Background(f)
	select {
	case <-done:
		return done, false
	case <-b.waiting:
		return done, true
	}
}

// finish waits for an attempt that there is nothing to wait for any more.
func (b *intervalBed) finish(done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-time.After(b.soon):
	}
	b.rescue(done)
	return errors.New("who waited for an invalidation was not woken at its end")
}

// rescue makes an attempt finish that might wait for ever.
func (b *intervalBed) rescue(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-time.After(time.Millisecond):
			b.s.lock()
			b.s.seq = (b.s.seq | 1) + 1
			b.s.changed.Broadcast()
			b.s.unlock()
		}
	}
}

// reported returns what was reported since it was called last.
func (b *intervalBed) reported() (errs []error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	errs, b.reports = b.reports, nil
	return errs
}

// atRest removes the intervals, with no bracket open, and returns an error if
// that has to wait or anything is left.
func (b *intervalBed) atRest(intervals ...interface{ Remove() }) error {
	for _, i := range intervals {
		if done, waits := b.attempt(i.Remove); waits {
			b.rescue(done)
			return errors.New("Remove waits with no bracket open")
		}
	}
	st := b.Stats()
	switch errs := b.reported(); {
	case st.Intervals != 0 || st.Invalidating != 0 || st.Count != 1 || b.s.tree.Len() != 0 || len(b.s.deferred) != 0:
		return fmt.Errorf("left behind: %+v, %d intervals in the tree and %d put off", st, b.s.tree.Len(), len(b.s.deferred))
	case b.s.seq&1 != 0:
		return fmt.Errorf("the sequence is %#x with no bracket open", b.s.seq)
	case len(errs) != 0:
		return fmt.Errorf("reported: %w", errors.Join(errs...))
	}
	return nil
}

// pageRange returns n pages of a bed.
func pageRange(first, n int) addr.HVARange {
	return addr.HVAs(page.Start+addr.HVA(first)*addr.PageSize, uint64(n)*addr.PageSize)
}

// open opens a bracket. The caller holds the mapping lock.
func (b *intervalBed) open(r addr.HVARange) *Invalidation {
	inv := &Invalidation{Range: r, Event: Clear}
	if err := b.InvalidateRangeStart(inv); err != nil {
		panic(err)
	}
	return inv
}

// replace makes the change that a bracket is for.
func (b *intervalBed) replace(inv *Invalidation) {
	for i := range b.pages {
		if inv.Range.Contains(pageRange(i, 1)) {
			b.pages[i].Add(1)
		}
	}
}

// change replaces the pages of r, in a bracket.
func (b *intervalBed) change(r addr.HVARange) {
	b.Lock()
	defer b.Unlock()
	inv := b.open(r)
	b.replace(inv)
	b.InvalidateRangeEnd(inv)
}

func (b *intervalBed) insert(s IntervalSubscriber, r addr.HVARange) {
	if err := b.Insert(context.Background(), s, r.Start, r.Bytes()); err != nil {
		panic(err)
	}
}

// mirror is a subscriber as they should be: it keeps what it has looked up of the
// pages of its interval, until told.
type mirror struct {
	Interval
	b *intervalBed
	r addr.HVARange

	mu      sync.Mutex
	entries [8]uint64 // for each page the generation that was looked up, or 0; protected by mu

	told func(inv *Invalidation) bool // called by Invalidate before anything else, for its answer; may be nil
	gap  func()                       // called where something comes in between if there is a defect; may be nil
}

// mirrorDefect is what a mirror does wrong.
type mirrorDefect uint8

const (
	soundMirror    mirrorDefect = iota
	seqAfterUnlock              // NM26: SetSeq is called when the lock was given back
	seqForEntries               // NM26: it is called only if something was established
	retryUnlocked               // NM27: ReadRetry is called without the lock
)

func (b *intervalBed) newMirror(r addr.HVARange) *mirror { return &mirror{b: b, r: r} }

func (b *intervalBed) mirror(r addr.HVARange) *mirror {
	m := b.newMirror(r)
	b.insert(m, r)
	return m
}

func (m *mirror) lock() {
	lockorder.Acquire(lockorder.Consumer)
	m.mu.Lock()
}

func (m *mirror) unlock() {
	m.mu.Unlock()
	lockorder.Release(lockorder.Consumer)
}

func (m *mirror) atGap() {
	if m.gap != nil {
		m.gap()
	}
}

func (m *mirror) Invalidate(inv *Invalidation, seq uint64) bool {
	if m.told != nil && !m.told(inv) {
		return false
	}
	m.lock()
	dropped := false
	for i, gen := range m.entries {
		if gen != 0 && pageRange(i, 1).Overlaps(inv.Range) {
			m.entries[i] = 0
			dropped = true
		}
	}
	if m.b.defect != seqAfterUnlock && (m.b.defect != seqForEntries || dropped) {
		m.SetSeq(seq)
	}
	m.unlock()
	m.atGap()
	if m.b.defect == seqAfterUnlock {
		m.SetSeq(seq)
	}
	return true
}

// look is what a mirror has looked up.
type look struct {
	seq  uint64
	page int
	gen  uint64
}

// lookUp looks at a page without a lock, which may take its time.
func (m *mirror) lookUp(seq uint64, page int) look { return look{seq, page, m.b.pages[page].Load()} }

// establish makes an entry of a look, unless the interval was invalidated.
func (m *mirror) establish(l look) bool {
	if m.b.defect == retryUnlocked && m.ReadRetry(l.seq) {
		return false
	}
	m.atGap()
	m.lock()
	defer m.unlock()
	if m.b.defect != retryUnlocked && m.ReadRetry(l.seq) {
		return false
	}
	m.entries[l.page] = l.gen
	return true
}

// check uses the entries: it returns an error if one is of a page that has been
// replaced, or is in the range of one of the brackets, which are open.
func (m *mirror) check(open ...*Invalidation) error {
	m.lock()
	defer m.unlock()
	for i, gen := range m.entries {
		if gen == 0 {
			continue
		}
		if now := m.b.pages[i].Load(); gen != now {
			return fmt.Errorf("an entry of page %d is stale: of generation %d, and it is %d now", i, gen, now)
		}
		for _, inv := range open {
			if inv != nil && inv.Range.Overlaps(pageRange(i, 1)) {
				return fmt.Errorf("page %d has an entry while a bracket of %v is open", i, inv.Range)
			}
		}
	}
	return nil
}

// runIntervalChecks runs checks on address spaces without a defect.
func runIntervalChecks(t *testing.T, seqs []uint64, checks ...intervalCheck) {
	t.Helper()
	for _, seq := range seqs {
		for _, check := range checks {
			if err := check(func() *intervalBed { return newIntervalBed(sound, seq) }); err != nil {
				t.Errorf("with a sequence that begins with %#x: %v", seq, err)
			}
		}
	}
}

// What is established after ReadRetry returned false is never stale: neither
// used after its page was replaced, nor there while a bracket of it is open.
func TestN17MirrorIsNeverStale(t *testing.T) {
	runIntervalChecks(t, firstSeqs[:1], checkEveryOrder, checkMirror, checkMirrorStorm)
}

// schedules yields every order of the steps of processes that have as many as n
// says: for each step its process.
func schedules(n ...int) iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		left := slices.Clone(n)
		var order []int
		var extend func() bool
		extend = func() bool {
			complete := true
			for p := range left {
				if left[p] == 0 {
					continue
				}
				complete = false
				left[p]--
				order = append(order, p)
				more := extend()
				order = order[:len(order)-1]
				left[p]++
				if !more {
					return false
				}
			}
			return !complete || yield(order)
		}
		extend()
	}
}

// checkEveryOrder has a reader and two who change the mappings take their steps
// in every order that there is: changes of the same page, of another page of the
// interval, and of one outside of it.
func checkEveryOrder(newBed func() *intervalBed) error {
	for _, changed := range [][2]addr.HVARange{
		{pageRange(0, 1), pageRange(0, 2)},
		{pageRange(1, 1), pageRange(4, 1)},
	} {
		n := 0
		for order := range schedules(4, 3, 3) {
			if n++; n%16 != 0 && lockorder.Enabled {
				continue // it takes long to check the order of locks
			}
			p := play{b: newBed(), changed: changed}
			if err := p.run(order); err != nil {
				return fmt.Errorf("changes of %v and %v, in the order %v: %w", changed[0], changed[1], order, err)
			}
		}
	}
	return nil
}

// play is one order of the steps of
//
//	process 0           processes 1 and 2
//	Insert              InvalidateRangeStart
//	ReadBegin           the change
//	look up             InvalidateRangeEnd
//	ReadRetry
//
// and what is known of them, to tell what is right from what is not.
type play struct {
	b       *intervalBed
	m       *mirror
	changed [2]addr.HVARange
	taken   [3]int // steps of each process
	due     int    // steps of the reader that come when ReadBegin returns
	waits   <-chan struct{}
	look    look

	inv       [2]*Invalidation // the open brackets
	concerned bool             // the brackets that are open are taken to have hit the interval
	overtaken bool             // the interval was hit since ReadBegin returned
}

func (p *play) run(order []int) (err error) {
	p.m = p.b.newMirror(pageRange(0, 2))
	other := p.b.mirror(pageRange(4, 1))
	p.b.Lock()
	defer p.b.Unlock()
	for _, process := range order {
		if process == 0 {
			p.due++
			err = p.reads()
		} else {
			err = p.changes(process)
		}
		if err == nil {
			err = p.m.check(p.inv[:]...)
		}
		if err != nil {
			p.abandon()
			return err
		}
	}
	last := p.m.lookUp(0, 0)
	if done, waits := p.b.attempt(func() { last.seq = p.m.ReadBegin() }); waits {
		p.b.rescue(done)
		return errors.New("ReadBegin waits with no bracket open")
	}
	if !p.m.establish(last) {
		return errors.New("nothing can be established with no bracket open")
	}
	return p.b.atRest(p.m, other)
}

// reads takes the steps of the reader that are due.
func (p *play) reads() error {
	for ; p.due > 0 && p.waits == nil; p.due-- {
		p.taken[0]++
		switch p.taken[0] {
		case 1:
			<-gvmtest.Background(func() { p.b.insert(p.m, p.m.r) })
			p.concerned = p.open() > 0
		case 2:
			done, waits := p.b.attempt(func() { p.look.seq = p.m.ReadBegin() })
			if waits {
				p.waits = done
			}
			if waits && !p.concerned {
				return errors.New("ReadBegin waits for brackets that did not hit the interval")
			}
			if !waits && p.openOfMirror() > 0 {
				return errors.New("ReadBegin returned while the interval was being invalidated")
			}
		case 3:
			p.look = p.m.lookUp(p.look.seq, 0)
		case 4:
			if retry := p.m.CheckRetry(p.look.seq); retry != p.overtaken {
				return fmt.Errorf("CheckRetry is %v, want %v", retry, p.overtaken)
			}
			if ok := p.m.establish(p.look); ok == p.overtaken {
				return fmt.Errorf("ReadRetry is %v, want %v", !ok, p.overtaken)
			}
		}
	}
	return nil
}

// changes takes a step of one who changes mappings.
func (p *play) changes(process int) error {
	p.taken[process]++
	i := process - 1
	switch p.taken[process] {
	case 1:
		p.inv[i] = p.b.open(p.changed[i])
		if p.changed[i].Overlaps(p.m.r) && p.taken[0] > 0 {
			p.concerned, p.overtaken = true, p.taken[0] > 1 && p.waits == nil
		}
	case 2:
		p.b.replace(p.inv[i])
	case 3:
		p.b.InvalidateRangeEnd(p.inv[i])
		p.inv[i] = nil
		if p.open() > 0 {
			break
		}
		p.concerned = false
		if p.waits != nil {
			if err := p.b.finish(p.waits); err != nil {
				return err
			}
			p.waits = nil
			return p.reads()
		}
	}
	return nil
}

// open returns the number of open brackets.
func (p *play) open() (n int) {
	for _, inv := range p.inv {
		if inv != nil {
			n++
		}
	}
	return n
}

// openOfMirror returns the number of those whose range overlaps the mirror.
func (p *play) openOfMirror() (n int) {
	for _, inv := range p.inv {
		if inv != nil && inv.Range.Overlaps(p.m.r) {
			n++
		}
	}
	return n
}

// abandon leaves no bracket open and nobody waiting.
func (p *play) abandon() {
	for _, inv := range p.inv {
		if inv != nil {
			p.b.InvalidateRangeEnd(inv)
		}
	}
	if p.waits != nil {
		p.b.rescue(p.waits)
	}
}

// checkMirror has a bracket, or the part of a reader that matters, come in
// between where a mirror with a defect lets it: in schedules that checkEveryOrder
// does not have, because what is one step for it is two.
func checkMirror(newBed func() *intervalBed) error {
	for _, during := range []bool{false, true} {
		b := newBed()
		m := b.mirror(pageRange(0, 1))
		l := m.lookUp(m.ReadBegin(), 0)
		var errDuring error
		if during { // the reader goes on while the subscriber is told
			m.gap = func() {
				m.gap = nil
				m.establish(l)
			}
			b.Lock()
			inv := b.open(m.r)
			errDuring = m.check(inv)
			b.replace(inv)
			b.InvalidateRangeEnd(inv)
			b.Unlock()
		} else { // it is told before the reader goes on, and between the test and the lock
			m.gap = func() {
				m.gap = nil
				b.change(m.r)
			}
			m.establish(l)
		}
		m.gap = nil
		err := errors.Join(errDuring, m.check())
		l = m.lookUp(m.ReadBegin(), 0) // and before the reader goes on at all
		m.entries = [8]uint64{}
		b.change(m.r)
		m.establish(l)
		err = errors.Join(err, m.check())
		if err = errors.Join(err, b.atRest(m)); err != nil {
			return err
		}
	}
	return nil
}

// checkMirrorStorm has brackets that overlap and nest, on several goroutines,
// with mirrors that overlap and are looked up by several others; one mirror
// comes and goes.
func checkMirrorStorm(newBed func() *intervalBed) error {
	b := newBed()
	mirrors := []*mirror{b.mirror(pageRange(0, 4)), b.mirror(pageRange(2, 4)), b.mirror(pageRange(6, 1))}
	for _, m := range mirrors {
		m.gap = runtime.Gosched
	}
	var (
		stop            atomic.Bool
		failed          atomic.Pointer[error]
		changes, others sync.WaitGroup
		established     atomic.Int64
	)
	fail := func(err error) {
		if err != nil {
			failed.CompareAndSwap(nil, &err)
			stop.Store(true)
		}
	}
	for seed := range uint64(3) {
		changes.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			anyRange := func() addr.HVARange {
				first := r.IntN(len(b.pages))
				return pageRange(first, 1+r.IntN(len(b.pages)-first))
			}
			for n := intervalRounds(2000); n > 0 && !stop.Load(); n-- {
				b.RLock()
				outer := b.open(anyRange())
				b.replace(outer)
				if r.IntN(3) == 0 {
					inner := b.open(anyRange())
					b.replace(inner)
					yield(r)
					for _, m := range mirrors {
						fail(m.check(outer, inner))
					}
					if r.IntN(2) == 0 { // not the last one first
						inner, outer = outer, inner
					}
					b.InvalidateRangeEnd(inner)
				}
				yield(r)
				for _, m := range mirrors {
					fail(m.check(outer))
				}
				b.InvalidateRangeEnd(outer)
				b.RUnlock()
				yield(r)
			}
		})
	}
	for seed := range uint64(4) {
		others.Go(func() {
			r := rand.New(rand.NewPCG(seed, 2))
			m := mirrors[int(seed)%len(mirrors)]
			first := int((m.r.Start - page.Start) / addr.PageSize)
			for !stop.Load() {
				seq := m.ReadBegin()
				l := m.lookUp(seq, first+r.IntN(int(m.r.NPages())))
				yield(r)
				if !m.CheckRetry(seq) && m.establish(l) {
					established.Add(1)
				}
				fail(m.check())
			}
		})
	}
	others.Go(func() {
		m := b.newMirror(pageRange(1, 6))
		r := rand.New(rand.NewPCG(0, 3))
		for !stop.Load() {
			b.insert(m, m.r)
			for range r.IntN(3) {
				l := m.lookUp(m.ReadBegin(), 1+r.IntN(6))
				yield(r)
				m.establish(l)
				fail(m.check())
			}
			m.Remove()
			m.entries = [8]uint64{} // nobody tells of changes any more
		}
	})
	changes.Wait()
	for !stop.Load() && established.Load() == 0 {
		runtime.Gosched() // with no brackets in the way it cannot fail
	}
	stop.Store(true)
	others.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return b.atRest(mirrors[0], mirrors[1], mirrors[2])
}

// yield lets others run, or not.
func yield(r *rand.Rand) {
	for range r.IntN(4) {
		runtime.Gosched()
	}
}

// intervalRounds scales the length of a test.
func intervalRounds(n int) int {
	if testing.Short() || lockorder.Enabled {
		return max(n/4, 1)
	}
	return n
}

// Who waits in ReadBegin is woken by the end of the last bracket, at whatever
// time it began to wait.
func TestN18NoWakeUpIsLost(t *testing.T) {
	runIntervalChecks(t, firstSeqs[:1], checkAllWoken, checkWakeUps)
}

// checkAllWoken has several wait for a bracket, in which another one of another
// interval opens and closes. That wakes nobody.
func checkAllWoken(newBed func() *intervalBed) error {
	b := newBed()
	m, other := b.mirror(pageRange(0, 1)), b.mirror(pageRange(1, 1))
	var errs []error
	var readers []<-chan struct{}
	begin := func() {
		done, waits := b.attempt(func() { m.ReadBegin() })
		if readers = append(readers, done); !waits {
			errs = append(errs, errors.New("ReadBegin does not wait while a bracket of the interval is open"))
		}
	}
	b.Lock()
	outer := b.open(m.r)
	begin()
	inner := b.open(other.r)
	begin()
	b.InvalidateRangeEnd(inner)
	begin()
	b.InvalidateRangeEnd(outer)
	b.Unlock()
	for _, done := range readers {
		if len(errs) > 0 {
			b.rescue(done)
		} else if err := b.finish(done); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, b.atRest(m, other))...)
}

// checkWakeUps has ReadBegin meet the end of a bracket.
func checkWakeUps(newBed func() *intervalBed) error {
	b := newBed()
	m := b.mirror(pageRange(0, 1))
	for range intervalRounds(400) {
		b.Lock()
		inv := b.open(m.r)
		var readers [2]<-chan struct{}
		for i := range readers {
			readers[i] = gvmtest.Background(func() { m.ReadBegin() })
		}
		runtime.Gosched()
		b.InvalidateRangeEnd(inv)
		b.Unlock()
		for _, d := range readers {
			if err := b.finish(d); err != nil {
				return err
			}
		}
	}
	return b.atRest(m)
}

// What is inserted and removed while an interval is being invalidated is put
// off: the tree stands still until the end of the last bracket, and is then what
// it would be had nothing been put off.
func TestN19DeferredChangesReachTheTree(t *testing.T) {
	runIntervalChecks(t, firstSeqs[:1], checkTreeStandsStill, checkIntervalPrograms(rand.Uint64()))
}

// checkTreeStandsStill inserts an interval next to one that is being told.
func checkTreeStandsStill(newBed func() *intervalBed) error {
	b := newBed()
	m, late := b.mirror(pageRange(0, 1)), b.newMirror(pageRange(1, 1))
	var errs []error
	late.told = func(*Invalidation) bool {
		errs = append(errs, errors.New("an interval was told of a bracket that began before it was inserted"))
		return true
	}
	m.told = func(*Invalidation) bool {
		<-gvmtest.Background(func() { b.insert(late, late.r) })
		if n := b.s.tree.Len(); n != 1 {
			errs = append(errs, fmt.Errorf("%d intervals are in the tree that is being walked, want 1", n))
		}
		return true
	}
	b.change(pageRange(0, 2))
	if n := b.s.tree.Len(); n != 2 {
		errs = append(errs, fmt.Errorf("%d intervals are in the tree after the end, want 2", n))
	}
	return errors.Join(append(errs, b.atRest(m, late))...)
}

// checkIntervalPrograms runs random programs on an address space and on a model.
func checkIntervalPrograms(seed uint64) intervalCheck {
	return func(newBed func() *intervalBed) error {
		for i := range intervalRounds(120) {
			p := newIntervalProgram(newBed(), rand.New(rand.NewPCG(seed, uint64(i))))
			if err := p.run(60); err != nil {
				return fmt.Errorf("seed %#x, program %d: %w, after:\n%s", seed, i, err, strings.Join(p.log, "\n"))
			}
		}
		return nil
	}
}

// modelInterval is an interval as a model has it, and the real one.
type modelInterval struct {
	Interval
	p     *intervalProgram
	name  int
	r     addr.HVARange
	state where
	at    uint64 // what its seq should be
	known bool   // it was inserted at some time
}

func (m *modelInterval) Invalidate(_ *Invalidation, seq uint64) bool {
	m.SetSeq(seq)
	m.p.told = append(m.p.told, m.name)
	return true
}

// intervalProgram is a program of insertions, removals and brackets, and the
// model: section by section what the table of Linux's mmu_interval_notifier says.
type intervalProgram struct {
	b         *intervalBed
	rng       *rand.Rand
	log       []string
	intervals [6]*modelInterval
	open      []*Invalidation
	seq       uint64
	told      []int             // names of the intervals that were, in order
	removing  []<-chan struct{} // Removes that wait
	reports   int               // of misuse
}

func newIntervalProgram(b *intervalBed, rng *rand.Rand) *intervalProgram {
	p := &intervalProgram{b: b, rng: rng, seq: b.s.seq}
	for i := range p.intervals {
		first := rng.IntN(12)
		p.intervals[i] = &modelInterval{p: p, name: i, r: pageRange(first, 1+rng.IntN(4))}
	}
	return p
}

func (p *intervalProgram) run(steps int) (err error) {
	p.b.Lock()
	defer p.b.Unlock()
	for ; steps > 0 && err == nil; steps-- {
		m := p.intervals[p.rng.IntN(len(p.intervals))]
		switch op := p.rng.IntN(8); {
		case op < 3:
			err = p.insert(m)
		case op < 5:
			err = p.remove(m)
		case op < 6 && len(p.open) < 3:
			err = p.start()
		case len(p.open) > 0:
			err = p.end(p.rng.IntN(len(p.open)))
		}
		if err == nil {
			err = p.compare()
		}
	}
	for len(p.open) > 0 && err == nil {
		if err = p.end(0); err == nil {
			err = p.compare()
		}
	}
	for _, m := range p.intervals {
		if m.state == inTree && err == nil {
			err = p.remove(m)
		}
	}
	for _, inv := range p.open { // an error
		p.b.InvalidateRangeEnd(inv)
	}
	for _, done := range p.removing {
		p.b.rescue(done)
	}
	if err != nil {
		return err
	}
	if got := len(p.b.reported()); got != p.reports {
		return fmt.Errorf("%d mistakes were reported, want %d", got, p.reports)
	}
	return p.b.atRest()
}

func (p *intervalProgram) say(format string, args ...any) {
	p.log = append(p.log, fmt.Sprintf(format, args...))
}

func (p *intervalProgram) insert(m *modelInterval) error {
	p.say("insert %d %v", m.name, m.r)
	var err error
	<-gvmtest.Background(func() { err = p.b.Insert(context.Background(), m, m.r.Start, m.r.Bytes()) })
	if m.state != out {
		if !errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("insert: got %v, want %v", err, syscall.EBUSY)
		}
		return nil
	}
	m.known = true
	switch {
	case len(p.open) == 0:
		m.state, m.at = inTree, p.seq-1
	case p.seq&1 != 0:
		m.state, m.at = willInsert, p.seq
	default:
		p.seq |= 1
		m.state, m.at = inTree, p.seq
	}
	return err
}

func (p *intervalProgram) remove(m *modelInterval) error {
	if !m.known {
		return nil // it panics
	}
	p.say("remove %d", m.name)
	done, waits := p.b.attempt(m.Remove)
	if waits {
		p.removing = append(p.removing, done)
	}
	wantWait := false
	switch m.state {
	case out, willRemove:
		p.reports++
	case willInsert:
		m.state = out
	case inTree:
		if wantWait = p.seq&1 != 0; wantWait {
			m.state = willRemove
		} else {
			m.state = out
		}
	}
	if waits != wantWait {
		return fmt.Errorf("remove waits: got %v, want %v", waits, wantWait)
	}
	return nil
}

func (p *intervalProgram) start() error {
	first := p.rng.IntN(14)
	inv := &Invalidation{Range: pageRange(first, 1+p.rng.IntN(3)), Event: Clear}
	p.say("start %v", inv.Range)
	var want []int
	for _, m := range p.intervals {
		if (m.state == inTree || m.state == willRemove) && m.r.Overlaps(inv.Range) {
			want = append(want, m.name)
			p.seq |= 1
			m.at = p.seq
		}
	}
	p.told = nil
	if err := p.b.InvalidateRangeStart(inv); err != nil {
		return err
	}
	p.open = append(p.open, inv)
	if slices.Sort(p.told); !slices.Equal(p.told, want) {
		return fmt.Errorf("told: got %v, want %v", p.told, want)
	}
	return nil
}

func (p *intervalProgram) end(i int) error {
	p.say("end %v", p.open[i].Range)
	p.b.InvalidateRangeEnd(p.open[i])
	p.open = slices.Delete(p.open, i, i+1)
	if len(p.open) > 0 || p.seq&1 == 0 {
		return nil
	}
	p.seq++
	for _, m := range p.intervals {
		switch m.state {
		case willInsert:
			m.state = inTree
		case willRemove:
			m.state = out
		}
	}
	for len(p.removing) > 0 {
		done := p.removing[0]
		p.removing = p.removing[1:]
		if err := p.b.finish(done); err != nil {
			return err
		}
	}
	return nil
}

// compare compares the address space with the model.
func (p *intervalProgram) compare() error {
	s, st := p.b.s, p.b.Stats()
	s.lock()
	defer s.unlock()
	if s.seq != p.seq {
		return fmt.Errorf("sequence: got %#x, want %#x", s.seq, p.seq)
	}
	var got, want []int
	for i := range s.tree.Overlapping(0, ^uint64(0)) {
		got = append(got, i.sub.(*modelInterval).name)
	}
	slices.Sort(got)
	inserted := 0
	for _, m := range p.intervals {
		if m.state == inTree || m.state == willRemove {
			want = append(want, m.name)
		}
		if m.state != out {
			inserted++
		}
		if m.where != m.state {
			return fmt.Errorf("state of %d: got %d, want %d", m.name, m.where, m.state)
		}
		if seq := m.seq.Load(); m.state != out && seq != m.at {
			return fmt.Errorf("sequence of %d: got %#x, want %#x", m.name, seq, m.at)
		}
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("in the tree: got %v, want %v", got, want)
	}
	if got, want := (Stats{1, int64(1 + inserted), 0, inserted, len(p.open), 0, 0, 0}), st; got != want {
		return fmt.Errorf("stats: got %+v, want %+v", got, want)
	}
	return s.tree.Check()
}

// When Remove has returned nobody touches the interval: it can be freed.
func TestN20RemovedIntervalIsNotTouched(t *testing.T) {
	runIntervalChecks(t, firstSeqs[:1], checkRemoveWaits, checkPoison)
}

// checkRemoveWaits removes an interval that is being told.
func checkRemoveWaits(newBed func() *intervalBed) error {
	b := newBed()
	m := b.mirror(pageRange(0, 1))
	told, goOn := make(chan struct{}), make(chan struct{})
	m.told = func(*Invalidation) bool {
		close(told)
		<-goOn
		return true
	}
	bracket := gvmtest.Background(func() { b.change(m.r) })
	<-told
	removed, waits := b.attempt(m.Remove)
	close(goOn)
	<-bracket
	err := b.finish(removed)
	if !waits {
		err = errors.New("Remove returned while Invalidate ran")
	}
	return errors.Join(err, b.atRest())
}

// poisoned is an interval that is overwritten when it was removed.
type poisoned struct {
	Interval
	live    bool // not protected: whoever may look at it knows that it is
	touched *atomic.Bool
}

func (p *poisoned) Invalidate(_ *Invalidation, seq uint64) bool {
	if !p.live {
		p.touched.Store(true)
	}
	p.SetSeq(seq)
	return true
}

// checkPoison overwrites intervals when Remove has returned, while there are
// brackets: a node that was left in the tree, or is on its way there, is seen by
// the race detector, or ends the process.
func checkPoison(newBed func() *intervalBed) error {
	b := newBed()
	var stop, touched atomic.Bool
	var changes, owners sync.WaitGroup
	for seed := range uint64(2) {
		changes.Go(func() {
			r := rand.New(rand.NewPCG(seed, 4))
			for !stop.Load() {
				b.RLock()
				inv := b.open(pageRange(r.IntN(4), 1+r.IntN(4)))
				yield(r)
				b.InvalidateRangeEnd(inv)
				b.RUnlock()
				yield(r)
			}
		})
	}
	for seed := range uint64(2) {
		owners.Go(func() {
			r := rand.New(rand.NewPCG(seed, 5))
			p := &poisoned{touched: &touched}
			for range intervalRounds(300) {
				p.Interval = Interval{}
				p.live = true
				b.insert(p, pageRange(r.IntN(6), 1))
				yield(r)
				p.Remove()
				p.live = false
				p.Interval = Interval{first: ^uint64(0), where: ^where(0)}
				yield(r)
			}
		})
	}
	owners.Wait()
	stop.Store(true)
	changes.Wait()
	if touched.Load() {
		return errors.New("Invalidate was called after Remove had returned")
	}
	return b.atRest()
}

// While an interval is being invalidated one that does not overlap it goes on,
// neither blocked nor made to retry.
func TestN21DisjointIntervalsDoNotMeet(t *testing.T) {
	runIntervalChecks(t, firstSeqs[:1], checkDisjoint)
}

// checkDisjoint has an interval sleep in Invalidate, and refuse.
func checkDisjoint(newBed func() *intervalBed) error {
	b := newBed()
	busy, idle := b.mirror(pageRange(0, 1)), b.mirror(pageRange(1, 1))
	told, goOn := make(chan struct{}), make(chan struct{})
	busy.told = func(inv *Invalidation) bool {
		if inv.NonBlockable {
			return false
		}
		close(told)
		<-goOn
		return true
	}
	before := idle.lookUp(idle.ReadBegin(), 1)
	bracket := gvmtest.Background(func() {
		b.RLock()
		defer b.RUnlock()
		b.InvalidateRangeEnd(b.open(busy.r))
	})
	<-told
	var errs []error
	if !idle.establish(before) {
		errs = append(errs, errors.New("a look that began before another interval was invalidated has to retry"))
	}
	var during look
	looked, waits := b.attempt(func() { during = idle.lookUp(idle.ReadBegin(), 1) })
	if waits {
		errs = append(errs, errors.New("ReadBegin waits while another interval is invalidated"))
	} else if !idle.establish(during) {
		errs = append(errs, errors.New("a look that began while another interval was invalidated has to retry"))
	}
	b.RLock()
	inv := b.open(idle.r)
	b.replace(inv)
	errs = append(errs, idle.check(inv))
	b.InvalidateRangeEnd(inv)
	refused := &Invalidation{Range: busy.r, Event: Clear, NonBlockable: true}
	if err := b.InvalidateRangeStart(refused); !errors.Is(err, ErrWouldBlock) {
		errs = append(errs, fmt.Errorf("a bracket that cannot wait for an interval: got %v, want %v", err, ErrWouldBlock))
	}
	harmless := &Invalidation{Range: idle.r, Event: Clear, NonBlockable: true}
	if err := b.InvalidateRangeStart(harmless); err != nil {
		errs = append(errs, fmt.Errorf("a bracket that need not wait for any interval: %w", err))
	} else {
		b.InvalidateRangeEnd(harmless)
	}
	b.RUnlock()
	close(goOn)
	<-bracket
	errs = append(errs, b.finish(looked))
	return errors.Join(append(errs, b.atRest(busy, idle))...)
}

// N17 to N21 hold while the sequence wraps, too.
func TestN23SequenceWraps(t *testing.T) {
	runIntervalChecks(t, firstSeqs[1:2], checkEveryOrder)
	runIntervalChecks(t, firstSeqs[1:], checkMirror, checkMirrorStorm, checkAllWoken, checkWakeUps, checkOddBegin,
		checkTreeStandsStill, checkIntervalPrograms(rand.Uint64()), checkRemoveWaits, checkPoison, checkDisjoint)
}

// answer is an interval that answers as it is told to.
type answer struct {
	Interval
	name string
	does func(inv *Invalidation) bool
	log  *[]string
}

func (a *answer) Invalidate(inv *Invalidation, seq uint64) bool {
	*a.log = append(*a.log, a.name)
	a.SetSeq(seq)
	return a.does(inv)
}

func agree(*Invalidation) bool     { return true }
func refuse(*Invalidation) bool    { return false }
func panicking(*Invalidation) bool { panic(errBroken) }

var errBroken = errors.New("broken")

// answers inserts intervals of neighbouring pages that are called a, b and so on.
func (b *intervalBed) answers(log *[]string, does ...func(*Invalidation) bool) (intervals []*answer) {
	for i, f := range does {
		a := &answer{name: string(rune('a' + i)), does: f, log: log}
		b.insert(a, pageRange(i, 1))
		intervals = append(intervals, a)
	}
	return intervals
}

// chained is a subscriber to everything, which logs that it was told and may
// fail.
type chained struct {
	Notifier
	log  *[]string
	fail error
}

func (c *chained) InvalidateRangeStart(*Invalidation) error {
	*c.log = append(*c.log, "chain")
	return c.fail
}

func (c *chained) Release() { *c.log = append(*c.log, "release") }

// An interval that cannot have a bracket that must not block is the last to be
// told of it; the bracket is closed for intervals, and the chain hears nothing.
// One that may not refuse is reported, and the bracket is opened.
func TestR29IntervalRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		nonBlockable bool
		second       func(*Invalidation) bool
		told         []string
		err          error
		report       error
	}{
		"nobody refuses":               {true, agree, []string{"a", "b", "c", "chain"}, nil, nil},
		"refused":                      {true, refuse, []string{"a", "b"}, ErrWouldBlock, nil},
		"refused, but it may block":    {false, refuse, []string{"a", "b", "c", "chain"}, nil, errMustNotFail},
		"a panic":                      {true, panicking, []string{"a", "b"}, ErrWouldBlock, errBroken},
		"a panic where it could sleep": {false, panicking, []string{"a", "b", "c", "chain"}, nil, errBroken},
	} {
		t.Run(name, func(t *testing.T) {
			b := soundBed()
			var log []string
			intervals := b.answers(&log, agree, tt.second, agree)
			c := &chained{log: &log}
			if err := b.Register(context.Background(), c); err != nil {
				t.Fatal(err)
			}
			inv := &Invalidation{Range: pageRange(0, 3), Event: Clear, NonBlockable: tt.nonBlockable}
			b.Lock()
			err := b.InvalidateRangeStart(inv)
			if !errors.Is(err, tt.err) || tt.err != nil && !errors.Is(err, syscall.EAGAIN) {
				t.Errorf("start: got %v, want %v", err, tt.err)
			}
			if tt.err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%T", intervals[1])) {
				t.Errorf("error is %q, want %T in it", err, intervals[1])
			}
			open := 1
			if err != nil {
				open = 0
			}
			if st := b.Stats(); st.Invalidating != open {
				t.Errorf("open brackets: got %d, want %d", st.Invalidating, open)
			}
			if err == nil {
				b.InvalidateRangeEnd(inv)
			}
			b.Unlock()
			if !slices.Equal(log, tt.told) {
				t.Errorf("told: got %v, want %v", log, tt.told)
			}
			checkReport(t, b.reported(), intervals[1], tt.report)
			for _, i := range intervals {
				i.ReadBegin() // does not wait for ever
				i.Remove()
			}
			c.Unregister()
			if err := b.atRest(); err != nil {
				t.Error(err)
			}
		})
	}
}

// checkReport compares what was reported with what is wrong with an interval's
// Invalidate; nil is nothing.
func checkReport(t *testing.T, reports []error, of IntervalSubscriber, want error) {
	t.Helper()
	if want == nil {
		if len(reports) != 0 {
			t.Errorf("reported: got %v, want nothing", reports)
		}
		return
	}
	var r *Report
	if len(reports) != 1 || !errors.As(reports[0], &r) || r.Subscriber != of || r.Method != "Invalidate" || !errors.Is(r, want) {
		t.Errorf("reported: got %v, want one report of Invalidate of %p (%T): %v", reports, of, of, want)
	}
}

// If the chain cannot have a bracket that the intervals could, it is closed for
// the intervals.
func TestR30ChainRefuses(t *testing.T) {
	runIntervalChecks(t, firstSeqs, checkChainRefuses)
}

func checkChainRefuses(newBed func() *intervalBed) error {
	b := newBed()
	m := b.mirror(pageRange(0, 1))
	var log []string
	c := &chained{log: &log, fail: syscall.EAGAIN}
	if err := b.Register(context.Background(), c); err != nil {
		return err
	}
	told := 0
	m.told = func(*Invalidation) bool { told++; return true }
	b.Lock()
	err := b.InvalidateRangeStart(&Invalidation{Range: m.r, Event: Clear, NonBlockable: true})
	b.Unlock()
	var errs []error
	if !errors.Is(err, ErrWouldBlock) || told != 1 || len(log) != 1 {
		errs = append(errs, fmt.Errorf("start: got %v with %d intervals told and %v, want %v, 1 and one start", err, told, log, ErrWouldBlock))
	}
	if n := b.Stats().Invalidating; n != 0 {
		errs = append(errs, fmt.Errorf("open brackets: got %d, want 0", n))
	}
	if done, waits := b.attempt(func() { m.ReadBegin() }); waits {
		errs = append(errs, errors.New("ReadBegin waits for a bracket that was refused"))
		b.rescue(done)
	}
	c.Unregister()
	return errors.Join(append(errs, b.atRest(m))...)
}

// The sequence of an interval is odd, and that of an address space even when
// nothing is invalidated: an old one never looks like one under way.
func TestR35SequencesDifferAtRest(t *testing.T) {
	runIntervalChecks(t, firstSeqs, checkOddBegin)
}

// checkOddBegin inserts an interval in each of the states in which the tree can
// be: at rest, with a bracket open that hit nobody, and with one that did. A look
// at it has to wait for brackets that are open.
func checkOddBegin(newBed func() *intervalBed) error {
	b := newBed()
	hit := b.mirror(pageRange(1, 1))
	for range 8 { // a sequence that is about to wrap does
		for _, bracket := range []addr.HVARange{{}, pageRange(0, 1), pageRange(0, 2)} {
			m := b.newMirror(pageRange(0, 1))
			b.Lock()
			var inv *Invalidation
			if !bracket.Empty() {
				inv = b.open(bracket)
			}
			<-gvmtest.Background(func() { b.insert(m, m.r) })
			seq := m.seq.Load()
			began, waits := b.attempt(func() { m.ReadBegin() })
			if inv != nil {
				b.InvalidateRangeEnd(inv)
			}
			b.Unlock()
			err := b.finish(began)
			m.Remove()
			switch now := b.s.seq; {
			case waits != (inv != nil):
				err = fmt.Errorf("ReadBegin waits, after an insertion inside a bracket of %v: got %v, want %v", bracket, waits, inv != nil)
			case seq&1 == 0 || now&1 != 0:
				err = fmt.Errorf("the sequence of an interval is %#x, and at rest that of the address space %#x", seq, now)
			}
			if err != nil {
				return err
			}
		}
	}
	return b.atRest(hit)
}

// ReadBegin waits only for brackets that hit its interval, which TestN17 and
// TestN21 test, and for those that overlap them in time.
func TestR36ReadBeginWaitsForBracketsThatOverlap(t *testing.T) {
	b := soundBed()
	m := b.mirror(pageRange(0, 1))
	b.Lock()
	first, second := b.open(m.r), b.open(pageRange(4, 1))
	b.InvalidateRangeEnd(first)
	done, waits := b.attempt(func() { m.ReadBegin() })
	if !waits {
		t.Error("ReadBegin does not wait until the sequence has changed")
	}
	b.InvalidateRangeEnd(second)
	b.Unlock()
	if err := b.finish(done); err != nil {
		t.Error(err)
	}
	m.Remove()
}

// Insert that fails has changed nothing; one that succeeds owns a count.
func TestR37Insert(t *testing.T) {
	const last = ^addr.HVA(0)
	for name, tt := range map[string]struct {
		start addr.HVA
		n     uint64
		err   error
	}{
		"a byte":                        {0x1234, 1, nil},
		"the first byte":                {0, 1, nil},
		"the last byte":                 {last, 1, nil},
		"all but the last byte":         {0, uint64(last), nil},
		"all but the first byte":        {1, uint64(last), nil},
		"the last page":                 {last - addr.PageSize + 1, addr.PageSize, nil},
		"nothing":                       {0x1000, 0, syscall.EOVERFLOW},
		"nothing, at 0":                 {0, 0, syscall.EOVERFLOW},
		"a byte more than there is":     {last, 2, syscall.EOVERFLOW},
		"all there is, from the second": {2, uint64(last), syscall.EOVERFLOW},
	} {
		t.Run(name, func(t *testing.T) {
			as := New(Options{})
			i := &mirror{}
			err := as.Insert(context.Background(), i, tt.start, tt.n)
			if !errors.Is(err, tt.err) {
				t.Fatalf("insert: got %v, want %v", err, tt.err)
			}
			if tt.err != nil {
				if as.subs.Load() != nil || as.Stats() != (Stats{Users: 1, Count: 1}) {
					t.Errorf("after %v: %+v", err, as.Stats())
				}
				return
			}
			if want := (Stats{Users: 1, Count: 2, Intervals: 1}); as.Stats() != want {
				t.Errorf("inserted: got %+v, want %+v", as.Stats(), want)
			}
			if i.first != uint64(tt.start) || i.last != uint64(tt.start)+tt.n-1 {
				t.Errorf("interval: got [%#x, %#x], want %d bytes from %v", i.first, i.last, tt.n, tt.start)
			}
			i.Remove()
			if want := (Stats{Users: 1, Count: 1}); as.Stats() != want {
				t.Errorf("removed: got %+v, want %+v", as.Stats(), want)
			}
		})
	}
}

func TestR37InsertTwice(t *testing.T) {
	b := soundBed()
	m := b.mirror(pageRange(0, 1))
	if err := b.Insert(context.Background(), m, page.Start, 1); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a second insertion: got %v, want %v", err, syscall.EBUSY)
	}
	if st := b.Stats(); st.Intervals != 1 || st.Count != 2 || m.last != uint64(m.r.End)-1 {
		t.Errorf("after a second insertion: %+v, and the interval ends with %#x", st, m.last)
	}
	m.Remove()
	b.insert(m, pageRange(3, 1))
	m.Remove()
	if err := b.atRest(); err != nil {
		t.Error(err)
	}
}

// The first insertion waits for what Register waits for, unless its context is
// done; then nothing has changed. Later ones do not wait.
func TestR37FirstInsertionIsInterrupted(t *testing.T) {
	file := NewReverseMap(FileMap)
	for name, tt := range map[string]struct {
		locks      int // that it looks at ctx for, up to the one that is held
		hold, free func(as *AddressSpace)
	}{
		"the mapping lock is held":  {1, (*AddressSpace).Lock, (*AddressSpace).Unlock},
		"somebody registers":        {2, func(*AddressSpace) { _ = allLocks.lock(context.Background()) }, func(*AddressSpace) { allLocks.unlock() }},
		"a reverse map's lock held": {3, func(*AddressSpace) { file.RLock() }, func(*AddressSpace) { file.RUnlock() }},
	} {
		for _, registered := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/registered=%v", name, registered), func(t *testing.T) {
				as := New(Options{})
				as.Lock()
				as.AddRegion(&Region{Range: page, Maps: []*ReverseMap{file}})
				as.Unlock()
				s := new(silent)
				if registered {
					if err := as.Register(context.Background(), s); err != nil {
						t.Fatal(err)
					}
				}
				before, subs := as.Stats(), as.subs.Load()
				ctx, cancel := context.WithCancel(context.Background())
				asked := make(chan struct{}, 8)
				m := &mirror{}
				var err error
				tt.hold(as)
				done := gvmtest.Background(func() { err = as.Insert(countedContext{ctx, asked}, m, page.Start, 1) })
				for range tt.locks {
					<-asked
				}
				cancel()
				<-done
				tt.free(as)
				if !errors.Is(err, syscall.EINTR) || !errors.Is(err, context.Canceled) {
					t.Errorf("insert: got %v, want %v and %v", err, syscall.EINTR, context.Canceled)
				}
				if after := as.Stats(); after != before || as.subs.Load() != subs || subs != nil && subs.used.Load() {
					t.Errorf("after %v: got %+v, want %+v as before", err, after, before)
				}
				if err := as.Insert(ctx, m, page.Start, 1); !errors.Is(err, syscall.EINTR) {
					t.Errorf("insert with a context that is done: got %v, want %v", err, syscall.EINTR)
				}
				if err := as.Insert(context.Background(), m, page.Start, 1); err != nil {
					t.Errorf("insert again: %v", err)
				}
				second := &mirror{}
				if err := as.Insert(ctx, second, page.Start, 1); err != nil {
					t.Errorf("the second insertion, which waits for nothing: %v", err)
				}
				m.Remove()
				second.Remove()
				if registered {
					s.Unregister()
				}
			})
		}
	}
}

// countedContext tells when it is asked for its channel: once for each lock that
// is waited for with it.
type countedContext struct {
	context.Context
	asked chan<- struct{}
}

func (c countedContext) Done() <-chan struct{} {
	c.asked <- struct{}{}
	return c.Context.Done()
}

// The first insertion keeps brackets out while it makes them look for intervals:
// one that is not told of starts is not told of ends.
func TestR37FirstInsertionWaitsForBrackets(t *testing.T) {
	file := NewReverseMap(FileMap)
	as := New(Options{})
	as.Lock()
	as.AddRegion(&Region{Range: page, Maps: []*ReverseMap{file}})
	as.Unlock()
	s := new(silent) // there are subscriptions, but no interval yet
	if err := as.Register(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	var open atomic.Bool
	as.step = func(step string) {
		if step == "all locks" && open.Load() {
			t.Error("all locks are taken with a bracket open")
		}
	}
	asked := make(chan struct{}, 8)
	file.RLock()
	inv := &Invalidation{Range: page, Event: Clear}
	if err := as.InvalidateRangeStart(inv); err != nil {
		t.Fatal(err)
	}
	open.Store(true)
	m := &mirror{}
	inserted := gvmtest.Background(func() {
		if err := as.Insert(countedContext{context.Background(), asked}, m, page.Start, 1); err != nil {
			t.Error(err)
		}
	})
	for range 3 { // the last of its locks is that of the file
		<-asked
	}
	runtime.Gosched()
	open.Store(false)
	as.InvalidateRangeEnd(inv)
	file.RUnlock()
	<-inserted
	if st := as.Stats(); st.Invalidating != 0 || st.Intervals != 1 {
		t.Errorf("after the first insertion: %+v, want 1 interval and no bracket", st)
	}
	m.Remove()
	s.Unregister()
}

// Remove ends one insertion: it drops the count that Insert took, and a second
// one is reported.
func TestR38Remove(t *testing.T) {
	b := soundBed()
	m := b.mirror(pageRange(0, 1))
	m.told = func(*Invalidation) bool {
		t.Error("an interval is told after Remove returned")
		return true
	}
	if st := b.Stats(); st.Count != 2 || st.Intervals != 1 {
		t.Errorf("inserted: %+v, want a count of 2 and 1 interval", st)
	}
	m.Remove()
	if err := b.atRest(); err != nil {
		t.Error(err)
	}
	b.change(m.r)
	m.Remove()
	var r *Report
	if got := b.reported(); len(got) != 1 || !errors.As(got[0], &r) || r.Subscriber != m || r.Method != "Remove" || !errors.Is(r, errNotRegistered) {
		t.Errorf("a second Remove reports %v, want %v", got, errNotRegistered)
	}
	if err := b.atRest(); err != nil {
		t.Error(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("Remove of an interval that was never inserted does not panic")
			}
		}()
		b.newMirror(pageRange(0, 1)).Remove()
	}()
}

// An interval that was inserted during an invalidation, and is not in the tree
// yet, is removed without waiting.
func TestR38RemoveBeforeTheTree(t *testing.T) {
	b := soundBed()
	hit, late := b.mirror(pageRange(0, 1)), b.newMirror(pageRange(1, 1))
	b.Lock()
	inv := b.open(hit.r)
	<-gvmtest.Background(func() { b.insert(late, late.r) })
	if _, waits := b.attempt(late.Remove); waits {
		t.Error("Remove of an interval that is not in the tree yet waits")
	}
	removing, waits := b.attempt(hit.Remove)
	if !waits {
		t.Error("Remove of an interval in a bracket that hit it does not wait")
	}
	if err := b.Insert(context.Background(), hit, page.Start, 1); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("insert of an interval that is being removed: got %v, want %v", err, syscall.EBUSY)
	}
	b.InvalidateRangeEnd(inv)
	b.Unlock()
	if err := b.finish(removing); err != nil {
		t.Error(err)
	}
	if err := b.atRest(); err != nil {
		t.Error(err)
	}
}

// The exit tells every interval, wherever it is, that everything goes, before
// anybody is released and anything is gone. Remove works afterwards.
func TestN22ExitTellsIntervals(t *testing.T) {
	var log []string
	b := soundBed()
	b.teardown = func() error {
		log = append(log, "teardown")
		return nil
	}
	everything := func(inv *Invalidation) bool {
		if inv.Event != Released || inv.NonBlockable || inv.Range != (addr.HVARange{Start: 0, End: ^addr.HVA(0)}) {
			t.Errorf("the exit is told as %+v", inv)
		}
		if st := b.Stats(); st.Invalidating != 1 || st.Users != 0 {
			t.Errorf("while the exit is told: %+v, want a bracket and no user", st)
		}
		return true
	}
	intervals := b.answers(&log, everything, func(inv *Invalidation) bool { return !everything(inv) }, panicking, everything)
	last := &answer{name: "last", does: everything, log: &log}
	if err := b.Insert(context.Background(), last, ^addr.HVA(0), 1); err != nil {
		t.Fatal(err)
	}
	c := &chained{log: &log}
	if err := b.Register(context.Background(), c); err != nil {
		t.Fatal(err)
	}
	seq := intervals[0].ReadBegin()
	if err := b.PutUser(); err != nil {
		t.Fatal(err)
	}
	if want := []string{"a", "b", "c", "d", "last", "release", "teardown"}; !slices.Equal(log, want) {
		t.Errorf("the exit: got %v, want %v", log, want)
	}
	var who []any
	for _, err := range b.reported() {
		var r *Report
		if errors.As(err, &r) && r.Method == "Invalidate" {
			who = append(who, r.Subscriber)
		}
	}
	if want := []any{intervals[1], intervals[2]}; !slices.Equal(who, want) {
		t.Errorf("reported: got %v, want %v", who, want)
	}
	if !intervals[0].ReadRetry(seq) {
		t.Error("a look that began before the exit need not retry")
	}
	if err := b.Insert(context.Background(), b.newMirror(page), page.Start, 1); !errors.Is(err, ErrExited) || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("insert after the exit: got %v, want %v", err, ErrExited)
	}
	if err := New(Options{}).afterExit(); !errors.Is(err, ErrExited) {
		t.Errorf("the first insertion after the exit: got %v, want %v", err, ErrExited)
	}
	c.Unregister()
	if st := b.Stats(); st.Count != 5 || st.Intervals != 5 || st.Invalidating != 0 {
		t.Errorf("after the exit: %+v, want a count of 5, for 5 intervals, and no bracket", st)
	}
	for _, i := range append(intervals, last) {
		i.Remove()
	}
	if b.subs.Load() != nil || b.Stats() != (Stats{Waits: b.waits.n.Load(), Waited: b.Stats().Waited, Longest: b.Stats().Longest}) {
		t.Errorf("after the last Remove: %+v, want nothing left", b.Stats())
	}
}

// afterExit has the address space exit, and inserts an interval.
func (as *AddressSpace) afterExit() error {
	_ = as.PutUser()
	return as.Insert(context.Background(), new(mirror), 0, 1)
}

// Remove that meets the exit waits until the interval was told.
func TestN22RemoveMeetsExit(t *testing.T) {
	b := soundBed()
	m := b.mirror(pageRange(0, 1))
	told, goOn := make(chan struct{}), make(chan struct{})
	m.told = func(*Invalidation) bool {
		close(told)
		<-goOn
		return true
	}
	exited := gvmtest.Background(func() {
		if err := b.PutUser(); err != nil {
			t.Error(err)
		}
	})
	<-told
	removed, waits := b.attempt(m.Remove)
	if !waits {
		t.Error("Remove returned while the interval was told of the exit")
	}
	close(goOn)
	<-exited
	if err := b.finish(removed); err != nil {
		t.Error(err)
	}
	if st := b.Stats(); st.Count != 0 || b.subs.Load() != nil {
		t.Errorf("after the exit and the last Remove: %+v, want nothing left", st)
	}
}

// A bracket, whose end is not of it, hits what has a byte in it, and no
// neighbour, whose last byte is of it.
func TestBracketsHitWhatTheyOverlap(t *testing.T) {
	runIntervalChecks(t, firstSeqs, checkNeighbours)
}

func checkNeighbours(newBed func() *intervalBed) error {
	const begin, end = 0x3000, 0x5000
	for _, tt := range []struct {
		start addr.HVA
		n     uint64
		hit   bool
	}{
		{begin - addr.PageSize, addr.PageSize, false},
		{begin - 1, 1, false},
		{begin - 1, 2, true},
		{begin, 1, true},
		{end - addr.PageSize, addr.PageSize, true},
		{end - 1, 1, true},
		{end - 1, 2, true},
		{end, 1, false},
		{end, addr.PageSize, false},
		{begin - addr.PageSize, end - begin + 2*addr.PageSize, true},
		{0, begin, false},
		{0, ^uint64(0), true},
		{end, ^uint64(0) - end, false},
	} {
		b := newBed()
		m := &mirror{b: b}
		if err := b.Insert(context.Background(), m, tt.start, tt.n); err != nil {
			return err
		}
		hit := false
		m.told = func(*Invalidation) bool { hit = true; return true }
		seq := m.ReadBegin()
		b.change(addr.HVARange{Start: begin, End: end})
		if retry := m.ReadRetry(seq); hit != tt.hit || retry != tt.hit {
			return fmt.Errorf("a bracket of [%#x, %#x) hits %d bytes from %#x: got %v with ReadRetry %v, want %v", begin, end, tt.n, uint64(tt.start), hit, retry, tt.hit)
		}
		if err := b.atRest(m); err != nil {
			return err
		}
	}
	return nil
}

// Stats counts brackets once there was an interval, and an interval from Insert
// to the return of Remove.
func TestStatsOfIntervals(t *testing.T) {
	b := soundBed()
	want := func(intervals, brackets int) {
		t.Helper()
		if st := b.Stats(); st.Intervals != intervals || st.Invalidating != brackets || st.Count != int64(1+intervals) {
			t.Errorf("%+v, want %d intervals, %d brackets and a count of %d", st, intervals, brackets, 1+intervals)
		}
	}
	m, late := b.mirror(pageRange(0, 1)), b.newMirror(pageRange(0, 1))
	want(1, 0)
	b.Lock()
	far := b.open(pageRange(7, 1))
	want(1, 1)
	near := b.open(m.r)
	want(1, 2)
	<-gvmtest.Background(func() { b.insert(late, late.r) })
	want(2, 2) // although it is not in the tree
	removed, _ := b.attempt(m.Remove)
	want(2, 2) // Remove has not returned
	b.InvalidateRangeEnd(near)
	want(2, 1)
	b.InvalidateRangeEnd(far)
	b.Unlock()
	if err := b.finish(removed); err != nil {
		t.Error(err)
	}
	want(1, 0)
	late.Remove()
	want(0, 0)

	as := New(Options{})
	s := new(silent)
	if err := as.Register(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	as.Lock()
	inv := &Invalidation{Range: page, Event: Clear}
	if err := as.InvalidateRangeStart(inv); err != nil {
		t.Fatal(err)
	}
	if n := as.Stats().Invalidating; n != 0 {
		t.Errorf("brackets with no interval ever: got %d, want 0", n)
	}
	as.InvalidateRangeEnd(inv)
	as.Unlock()
	s.Unregister()
}
