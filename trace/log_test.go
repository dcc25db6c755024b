package trace

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestSince(t *testing.T) {
	for name, tt := range map[string]struct {
		keep, record int
		since        uint64
		first, lost  uint64 // first: sequence number of the first event returned
	}{
		"all are kept":              {keep: 8, record: 3, since: 0, first: 1},
		"after a number":            {keep: 8, record: 3, since: 2, first: 3},
		"after the newest":          {keep: 8, record: 3, since: 3, first: 4},
		"after what will be":        {keep: 8, record: 3, since: 9, first: 4},
		"exactly full":              {keep: 4, record: 4, since: 0, first: 1},
		"oldest are lost":           {keep: 3, record: 5, since: 0, first: 3, lost: 2},
		"asked for fewer than kept": {keep: 3, record: 5, since: 3, first: 4},
		"many times around":         {keep: 4, record: 1003, since: 7, first: 1000, lost: 992},
		"one is kept":               {keep: 1, record: 9, since: 0, first: 9, lost: 8},
	} {
		t.Run(name, func(t *testing.T) {
			l := NewLog(tt.keep)
			for range tt.record {
				l.Record(Event{Kind: HostOp})
			}
			events, lost := l.Since(tt.since)
			if lost != tt.lost {
				t.Errorf("lost %d events, want %d", lost, tt.lost)
			}
			if want := uint64(tt.record) - tt.first + 1; uint64(len(events)) != want {
				t.Fatalf("got %d events, want %d", len(events), want)
			}
			for i, e := range events {
				if want := tt.first + uint64(i); e.Seq != want {
					t.Errorf("event %d has sequence number %d, want %d", i, e.Seq, want)
				}
			}
		})
	}
}

// TestSinceKeeps: what a reader has seen is there for others, as long as it is among
// the newest.
func TestSinceKeeps(t *testing.T) {
	l := NewLog(8)
	for n := uint64(1); n <= 100; n++ {
		l.Record(Event{Kind: Exit, VCPU: int(n % 3)})
		if got := l.Len(); got != n {
			t.Fatalf("%d events, want %d", got, n)
		}
		events, lost := l.Since(0)
		if got, want := uint64(len(events)), min(n, 8); got != want || lost != n-want || events[got-1].Seq != n {
			t.Fatalf("after %d events, %d are kept and %d lost", n, got, lost)
		}
	}
}

func TestNilLogKeepsNothing(t *testing.T) {
	var l *Log
	l.Record(Event{Kind: HostOp, At: 1})
	if events, lost := l.Since(0); len(events) != 0 || lost != 0 || l.Len() != 0 || l.NewOp() != 0 {
		t.Errorf("a nil log returned %v, lost %d, length %d", events, lost, l.Len())
	}
}

// stamped returns the nth event of a writer, all of whose fields say so.
func stamped(writer, n int) Event {
	e := Event{Kind: Touch, VCPU: writer, Slot: uint32(n), Pages: uint64(n), Acc: addr.Access(n % 4), Name: Waits}
	e.GFN = addr.GFNRange{Start: addr.GFN(n), End: addr.GFN(2 * n)}
	e.HVA = addr.HVARange{Start: addr.HVA(3 * n), End: addr.HVA(4*n + writer)}
	if n%2 != 0 {
		e.Name, e.Err = "odd", "error"
	}
	return e
}

// checkStorm has writers record in few rings at once, while readers read, and reports
// what does not hold:
//
//   - No event is torn.
//   - Numbers and times grow.
//   - The events of a writer come in his order.
//   - What was recorded is returned, once, or lost, and the count is exact.
func checkStorm(seed uint64, writers, vcpus, each, size int) error {
	l := NewLog(size)
	var errs []error
	var wg, reader sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			for n := range each {
				e := stamped(w, n)
				if w >= vcpus {
					e.Kind = SlotCreate
				}
				l.Record(e)
				if rng.IntN(64) == 0 {
					time.Sleep(time.Duration(rng.IntN(20)) * time.Microsecond)
				}
			}
		})
	}
	done := make(chan struct{})
	var got []Event
	var lost uint64
	reader.Go(func() {
		for seq, last := uint64(0), false; ; {
			events, missed := l.Since(seq)
			got, lost = append(got, events...), lost+missed
			seq += missed + uint64(len(events))
			if last {
				return
			}
			last = gvmtest.Closed(done)
		}
	})
	reader.Go(func() { // another, who disturbs
		for !gvmtest.Closed(done) {
			l.Len()
		}
	})
	wg.Wait()
	close(done)
	reader.Wait()

	if n := uint64(writers * each); uint64(len(got))+lost != n || l.Len() != n {
		errs = append(errs, fmt.Errorf("%d events were returned and %d lost, of %d, and the log says %d", len(got), lost, n, l.Len()))
	}
	next := make([]int, writers)
	for i, e := range got {
		if i > 0 && (e.Seq <= got[i-1].Seq || e.Time < got[i-1].Time) {
			errs = append(errs, fmt.Errorf("event %d at %v comes after event %d at %v", e.Seq, e.Time, got[i-1].Seq, got[i-1].Time))
		}
		w, n := e.VCPU, int(e.Slot)
		want := stamped(w, n)
		want.Seq, want.Time, want.Kind = e.Seq, e.Time, e.Kind
		if e.Op = 0; e != want {
			errs = append(errs, fmt.Errorf("event %+v is torn, want %+v", e, want))
		}
		if n < next[w] {
			errs = append(errs, fmt.Errorf("event %d of writer %d comes after event %d", n, w, next[w]-1))
		}
		next[w] = n + 1
	}
	if len(errs) > 5 {
		errs = errs[:5]
	}
	return errors.Join(errs...)
}

func TestStorm(t *testing.T) {
	for name, tt := range map[string]struct{ writers, vcpus, size int }{
		"each has a ring":      {writers: 4, vcpus: 4, size: 1 << 16},
		"one ring for all":     {writers: 4, vcpus: 0, size: 1 << 16},
		"rings are small":      {writers: 4, vcpus: 2, size: 64},
		"rings are very small": {writers: 4, vcpus: 1, size: 2},
	} {
		t.Run(name, func(t *testing.T) {
			if err := checkStorm(gvmtest.Seed(t), tt.writers, tt.vcpus, 5000, tt.size); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOrderAcrossRings has two goroutines record in turns, each in a ring of his own: the
// order is that in which they waited for each other.
func TestOrderAcrossRings(t *testing.T) {
	l := NewLog(1 << 12)
	const turns = 1000
	token := make(chan int)
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for n := range token {
				l.Record(Event{Kind: Exit, VCPU: w, Pages: uint64(n)})
				if n == turns {
					close(token)
					return
				}
				token <- n + 1
			}
		})
	}
	token <- 1
	wg.Wait()
	events, lost := l.Since(0)
	if len(events) != turns || lost != 0 {
		t.Fatalf("%d events and %d lost, want %d and 0", len(events), lost, turns)
	}
	for i, e := range events {
		if e.Pages != uint64(i+1) {
			t.Fatalf("event %d is the %dth that was recorded", i+1, e.Pages)
		}
	}
}

// TestAt: the time when an event happened is kept if it is before it was recorded. The order is
// that of recording.
func TestAt(t *testing.T) {
	l := NewLog(8)
	time.Sleep(time.Millisecond)
	now := time.Since(l.Start())
	for _, at := range []time.Duration{now, 1, time.Hour, 0} {
		l.Record(Event{Kind: Kernel, At: at})
	}
	events, _ := l.Since(0)
	if err := inOrder(events); err != nil || len(events) != 4 {
		t.Fatalf("%d events, %v", len(events), err)
	}
	for i, want := range []time.Duration{now, 1, 0, 0} {
		if e := events[i]; e.At != want || want == 0 && e.When() != e.Time || want != 0 && e.When() != want {
			t.Errorf("event %d is at %v, and was at %v, want %v", i, e.At, e.When(), want)
		}
	}
}

func TestRecordDoesNotAllocate(t *testing.T) {
	l := NewLog(64)
	var none *Log
	for vcpu := range 2 {
		l.Record(Event{Kind: Exit, VCPU: vcpu}) // makes the ring
	}
	l.Record(Event{Kind: Kernel})
	for name, f := range map[string]func(){
		"vcpu":   func() { l.Record(Event{Kind: Exit, VCPU: 1, Name: "KVM_EXIT_IO"}) },
		"kernel": func() { l.Record(Event{Kind: Kernel, Op: 1, Name: "zap", At: 1}) },
		"host":   func() { l.Record(Event{Kind: HostOp, Op: l.NewOp(), Name: "discard"}) },
		"nil":    func() { none.Record(Event{Kind: HostOp, Op: none.NewOp(), Name: "discard"}) },
	} {
		if n := testing.AllocsPerRun(1000, f); n != 0 && !gvmtest.Race {
			t.Errorf("%s: a record allocates %v times, want 0", name, n)
		}
	}
}

// mutexLog is the obvious log, to compare with.
type mutexLog struct {
	mu     sync.Mutex
	start  time.Time
	events []Event
	next   uint64
}

func (l *mutexLog) Record(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next++
	e.Seq, e.Time = l.next, time.Since(l.start)
	l.events[(l.next-1)%uint64(len(l.events))] = e
}

// BenchmarkRecord times one event, of those that writers record all the time at once, each
// about a vCPU of his own. Nobody reads, so the rings are full.
func BenchmarkRecord(b *testing.B) {
	const size = 1 << 12
	var none *Log
	for _, impl := range []struct {
		name string
		log  interface{ Record(Event) }
	}{
		{"rings", NewLog(size)},
		{"mutex", &mutexLog{start: time.Now(), events: make([]Event, size)}},
		{"nil", none},
	} {
		for _, writers := range []int{1, 2} {
			b.Run(fmt.Sprintf("impl=%s/writers=%d", impl.name, writers), func(b *testing.B) {
				b.ReportAllocs()
				var wg sync.WaitGroup
				for w := range writers {
					wg.Go(func() {
						for range b.N / writers {
							impl.log.Record(Event{Kind: Touch, Name: Waits, VCPU: w, GFN: addr.GFNRange{Start: 1, End: 2}})
						}
					})
				}
				wg.Wait()
			})
		}
	}
}

// BenchmarkClock times what every event pays for its time.
func BenchmarkClock(b *testing.B) {
	start := time.Now()
	for b.Loop() {
		_ = time.Since(start)
	}
}
