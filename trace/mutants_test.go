package trace

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

var mutants = []gvmtest.Mutant[mutant]{
	{ID: "T1", Defect: clockBeforeClaim, What: "a writer looks at the clock before the reader can see that an event is coming", By: "checkOrder", Check: checkOrder(claiming)},
	{ID: "T2", Defect: dropUnowned, What: "a writer takes the oldest cell of a full ring from its reader", By: "checkOverrun", Check: checkOverrun},
	{ID: "T3", Defect: refusalUncounted, What: "an event that finds the oldest cell in use is not counted", By: "checkOverrun", Check: checkOverrun},
	{ID: "T4", Defect: pendingUnawaited, What: "a reader leaves an event that is being written for later", By: "checkPending", Check: checkPending},
	{ID: "T5", Defect: unheld, What: "a reader returns what is newer than its look at the clock", By: "checkHeld", Check: checkHeld},
	{ID: "T6", Defect: firstOpStays, What: "a touch belongs to the first operation of its page, not the last", By: "checkTies", Check: checkTies},
	{ID: "T7", Defect: toldIsWhen, What: "a fault belongs to the operation that came last when it was told of, not when it happened", By: "checkLateTies", Check: checkLateTies},
}

func TestMutants(t *testing.T) { gvmtest.RunMutants(t, mutants) }

func TestMutantsAreAllThere(t *testing.T) { gvmtest.EveryMutant(t, toldIsWhen, mutants) }

// stop is a place at which one goroutine waits, once, until it is let go on.
type stop struct {
	at            point
	passed        atomic.Bool
	reached, goOn chan struct{}
}

func newStop(at point) *stop {
	return &stop{at: at, reached: make(chan struct{}), goOn: make(chan struct{})}
}

func (s *stop) hook(p point) {
	if p == s.at {
		if s.passed.CompareAndSwap(false, true) {
			close(s.reached)
			<-s.goOn
		}
	}
}

// inOrder reports what is wrong with events that a reader was given, in several calls.
func inOrder(events []Event) error {
	for i := 1; i < len(events); i++ {
		if a, b := events[i-1], events[i]; b.Time < a.Time || b.Seq != a.Seq+1 {
			return fmt.Errorf("event %d at %v comes after event %d at %v", b.Seq, b.Time, a.Seq, a.Time)
		}
	}
	return nil
}

// checkOrder has a writer be slow in the middle, while another one records and a reader
// reads: what the slow one records comes later, and is not older.
func checkOrder(at point) func(mutant) error {
	return func(m mutant) error {
		s := newStop(at)
		l := newLog(8, &testpoint{mutant: m, hook: s.hook})
		slow := gvmtest.Background(func() { l.Record(Event{Kind: Exit, VCPU: 1}) })
		if !gvmtest.ClosedWithin(s.reached, gvmtest.GraceFor(m)) { // the point is in the defect alone
			close(s.goOn)
			<-slow
			return nil
		}
		l.Record(Event{Kind: Exit, VCPU: 2})
		first, _ := l.Since(0)
		close(s.goOn)
		<-slow
		second, _ := l.Since(uint64(len(first)))
		return inOrder(append(first, second...))
	}
}

// checkPending has a reader come by while an event is half written, and another one has been
// recorded after it: the reader waits for it.
func checkPending(m mutant) error {
	s := newStop(writing)
	l := newLog(8, &testpoint{mutant: m, hook: s.hook})
	slow := gvmtest.Background(func() { l.Record(Event{Kind: Exit, VCPU: 1}) })
	<-s.reached
	l.Record(Event{Kind: Exit, VCPU: 2})
	var first []Event
	read := gvmtest.Background(func() { first, _ = l.Since(0) })
	early := gvmtest.ClosedWithin(read, gvmtest.GraceFor(m))
	close(s.goOn)
	<-slow
	<-read
	second, _ := l.Since(uint64(len(first)))
	if err := inOrder(append(first, second...)); err != nil {
		return err
	}
	if early || len(first) != 2 {
		return fmt.Errorf("a reader did not wait for an event that is being written, and got %d of 2", len(first))
	}
	return nil
}

// checkHeld has events recorded after a reader has looked at the clock, one where he has
// looked for events already and one where he will. What he returns must not be newer than
// what others find afterwards.
func checkHeld(m mutant) error {
	s := newStop(looked)
	l := newLog(8, &testpoint{mutant: m, hook: s.hook})
	var first []Event
	read := gvmtest.Background(func() { first, _ = l.Since(0) })
	<-s.reached
	l.Record(Event{Kind: Exit, VCPU: 1})
	close(s.goOn)
	<-read
	if len(first) != 0 {
		return fmt.Errorf("a reader returned an event of %v, and has looked at the clock before", first[0].Time)
	}
	if second, _ := l.Since(0); len(second) != 1 {
		return fmt.Errorf("the next reader returned %d events, want 1", len(second))
	}
	return nil
}

// checkOverrun fills a ring several times while a reader copies an event of it: the event is
// not torn, and the count is exact.
func checkOverrun(m mutant) error {
	const size, n = 4, 100
	s := newStop(reading)
	l := newLog(size, &testpoint{mutant: m, hook: s.hook})
	l.Record(stamped(0, 1))
	var got []Event
	var lost uint64
	read := gvmtest.Background(func() { got, lost = l.Since(0) })
	<-s.reached
	for i := 2; i <= n; i++ {
		l.Record(stamped(0, i))
	}
	close(s.goOn)
	<-read
	if len(got) == 0 || got[0].Slot != 1 {
		return fmt.Errorf("the reader got %v, want the event that it was reading first", got)
	}
	rest, missed := l.Since(uint64(len(got)) + lost)
	if lost += missed; len(got)+len(rest)+int(lost) != n {
		return fmt.Errorf("%d events were returned and %d lost, of %d", len(got)+len(rest), lost, n)
	}
	return nil
}

// checkTies compares what touches belong to with a map from pages to operations.
func checkTies(m mutant) error {
	const pages = 20
	rng := rand.New(rand.NewPCG(1, 0))
	l := newLog(1<<12, &testpoint{mutant: m})
	last := map[addr.GFN]uint64{}
	var want []uint64
	for op := uint64(1); op <= 500; op++ {
		start := addr.GFN(rng.IntN(pages))
		r := addr.GFNRange{Start: start, End: start + addr.GFN(rng.IntN(6))}
		l.Record(Event{Kind: Zap, Op: op, GFN: r})
		for gfn := r.Start; gfn < r.End; gfn++ {
			last[gfn] = op
		}
		gfn := addr.GFN(rng.IntN(pages + 6))
		l.Record(Event{Kind: Touch, GFN: addr.GFNRange{Start: gfn, End: gfn + 1}})
		want = append(want, last[gfn])
	}
	events, _ := l.Since(0)
	var got []uint64
	for _, e := range events {
		if e.Kind == Touch {
			got = append(got, e.Op)
		}
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("touches belong to the operations\n%d, want\n%d", got, want)
	}
	return nil
}

// checkLateTies has faults told of after later operations on their pages.
func checkLateTies(m mutant) error {
	const pages, ops = 8, lateZaps + 300
	rng := rand.New(rand.NewPCG(2, 0))
	p, test := places{}, &testpoint{mutant: m}
	zaps := make([]Event, 0, ops)
	for op := range uint64(ops) {
		start := addr.GFN(rng.IntN(pages))
		zaps = append(zaps, Event{Kind: Zap, Op: op + 1, Time: time.Duration(10 * (op + 1)), GFN: addr.GFNRange{Start: start, End: start + 2}})
		p.tie(&zaps[op], test)
		at := max(1, int(op)-rng.IntN(lateZaps/2))
		fault := Event{Kind: Kernel, GFN: addr.GFNRange{Start: 3, End: 4}, Time: zaps[op].Time + 1, At: time.Duration(10*at + 5)}
		want := uint64(0)
		for _, z := range zaps {
			if z.GFN.Contains(3) && z.Time <= fault.At {
				want = z.Op
			}
		}
		p.tie(&fault, test)
		if fault.Op != want {
			return fmt.Errorf("a fault at %v that is told of at %v belongs to operation %d, want %d", fault.At, fault.Time, fault.Op, want)
		}
	}
	// What is too old to be known belongs to none.
	fault := Event{Kind: Kernel, GFN: addr.GFNRange{Start: 3, End: 4}, Time: zaps[ops-1].Time + 1, At: zaps[200].Time}
	if p.tie(&fault, test); fault.Op != 0 {
		return fmt.Errorf("a fault from before all zaps that are remembered belongs to operation %d", fault.Op)
	}
	return nil
}

// TestKernelEventsBelong: an event of the kernel belongs to the operation that it is recorded
// with, and only a fault to one that the page tells.
func TestKernelEventsBelong(t *testing.T) {
	l := NewLog(16)
	r, page := addr.HVAs(0x10000, 2*addr.PageSize), addr.GFNRange{Start: 5, End: 6}
	l.Record(Event{Kind: HostOp, Op: 5, HVA: r})
	l.Record(Event{Kind: Zap, Op: 5, HVA: r, GFN: page})
	l.Record(Event{Kind: Kernel, HVA: r})
	l.Record(Event{Kind: Kernel, HVA: r, Op: 4})
	l.Record(Event{Kind: Kernel, GFN: page})
	l.Record(Event{Kind: Kernel, GFN: addr.GFNRange{Start: 6, End: 7}})
	l.Record(Event{Kind: HostOpEnd, Op: 5, HVA: r})
	events, _ := l.Since(0)
	var got []uint64
	for _, e := range events {
		if e.Kind == Kernel {
			got = append(got, e.Op)
		}
	}
	if want := []uint64{0, 4, 5, 0}; !slices.Equal(got, want) {
		t.Errorf("they belong to the operations %v, want %v", got, want)
	}
}
