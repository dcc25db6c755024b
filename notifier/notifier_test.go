package notifier

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

// recorder writes down what it is called with, under its name.
type recorder struct {
	name    string
	history *[]string // shared by the recorders of a test; written with the mapping lock held
	refuse  error
}

func (r *recorder) note(what string) { *r.history = append(*r.history, r.name+" "+what) }

func (r *recorder) InvalidateRangeStart(inv *Invalidation) error {
	r.note("start " + inv.Event.String())
	return r.refuse
}
func (r *recorder) InvalidateRangeEnd(inv *Invalidation) { r.note("end " + inv.Event.String()) }
func (r *recorder) Release()                             { r.note("release") }

var page = addr.HVAs(0x1000, addr.PageSize)

func mustRegister(t *testing.T, as *AddressSpace, s Subscriber) *Subscription {
	t.Helper()
	sub, err := as.Register(s)
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

func TestChain(t *testing.T) {
	refused := errors.New("refused")
	for name, tt := range map[string]struct {
		refuseA, refuseB error
		want             []string
		wantErr          error
	}{
		"newest first": {want: []string{"b start clear", "a start clear", "b end clear", "a end clear"}},
		"refusal is undone everywhere": {
			refuseB: refused, wantErr: refused,
			want: []string{"b start clear", "a start clear", "b end clear", "a end clear"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			as := New()
			var history []string
			mustRegister(t, as, &recorder{name: "a", history: &history, refuse: tt.refuseA})
			mustRegister(t, as, &recorder{name: "b", history: &history, refuse: tt.refuseB})
			inv := &Invalidation{Range: page, Event: Clear}
			as.Lock()
			err := as.InvalidateRangeStart(inv)
			if err == nil {
				as.InvalidateRangeEnd(inv)
			}
			as.Unlock()
			if !errors.Is(err, tt.wantErr) {
				t.Errorf("start returned %v, want %v", err, tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, history); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
		})
	}
}

func TestEmptyChain(t *testing.T) {
	as := New()
	inv := &Invalidation{Range: page, Event: Unmap}
	if err := as.InvalidateRangeStart(inv); err != nil {
		t.Error(err)
	}
	as.InvalidateRangeEnd(inv)
	as.Exit()
}

func TestLifetime(t *testing.T) {
	as := New()
	var history []string
	a := mustRegister(t, as, &recorder{name: "a", history: &history})
	mustRegister(t, as, &recorder{name: "b", history: &history})
	a.Unregister()
	a.Unregister()
	as.Exit()
	as.Exit()
	if _, err := as.Register(&recorder{}); !errors.Is(err, ErrExited) {
		t.Errorf("Register after Exit returned %v, want ErrExited", err)
	}
	inv := &Invalidation{Range: page, Event: Unmap}
	if err := as.InvalidateRangeStart(inv); err != nil {
		t.Error(err)
	}
	as.InvalidateRangeEnd(inv)
	if diff := cmp.Diff([]string{"a release", "b release"}, history); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}

// strict fails the test if it is called in a way that the package promises not
// to: an end without a start, anything after its registration has ended, a
// second release.
type strict struct {
	t        *testing.T
	open     atomic.Int64
	released atomic.Int64
	gone     atomic.Bool
}

func (s *strict) InvalidateRangeStart(*Invalidation) error {
	if s.gone.Load() {
		s.t.Error("start after Unregister returned")
	}
	s.open.Add(1)
	return nil
}

func (s *strict) InvalidateRangeEnd(*Invalidation) {
	if s.gone.Load() {
		s.t.Error("end after Unregister returned")
	}
	if s.open.Add(-1) < 0 {
		s.t.Error("end without a start")
	}
}

func (s *strict) Release() {
	if s.released.Add(1) > 1 {
		s.t.Error("released twice")
	}
	time.Sleep(10 * time.Microsecond) // long enough for the loser of a race to overtake
}

func TestRegistrationRacesBracketsAndExit(t *testing.T) {
	for round := range 50 {
		as := New()
		var wg sync.WaitGroup
		var stop atomic.Bool
		var brackets sync.WaitGroup
		brackets.Go(func() {
			for inv := (&Invalidation{Range: page, Event: Clear}); !stop.Load(); {
				as.Lock()
				if as.InvalidateRangeStart(inv) == nil {
					as.InvalidateRangeEnd(inv)
				}
				as.Unlock()
			}
		})
		for range 4 {
			wg.Go(func() {
				for range 10 {
					s := &strict{t: t}
					sub, err := as.Register(s)
					if err != nil {
						return // the other goroutine's Exit came first
					}
					sub.Unregister()
					s.gone.Store(true)
					if n := s.released.Load(); n != 1 {
						t.Errorf("released %d times when Unregister returned, want 1", n)
					}
				}
			})
		}
		if round%2 == 1 {
			wg.Go(as.Exit)
		}
		wg.Wait()
		stop.Store(true)
		brackets.Wait()
		as.Exit()
		if chain := as.chain.Load(); chain != nil && len(*chain) != 0 {
			t.Fatalf("%d subscribers are left on the chain", len(*chain))
		}
	}
}

type silent struct{}

func (silent) InvalidateRangeStart(*Invalidation) error { return nil }
func (silent) InvalidateRangeEnd(*Invalidation)         {}
func (silent) Release()                                 {}

func TestBracketDoesNotAllocate(t *testing.T) {
	as := New()
	mustRegister(t, as, silent{})
	inv := &Invalidation{Range: page, Event: Clear}
	if n := testing.AllocsPerRun(1000, func() {
		if as.InvalidateRangeStart(inv) == nil {
			as.InvalidateRangeEnd(inv)
		}
	}); n != 0 {
		t.Errorf("a bracket allocates %v times, want 0", n)
	}
}

// BenchmarkBracket times one start and end by the number of subscribers.
func BenchmarkBracket(b *testing.B) {
	for _, n := range []int{0, 1, 8} {
		b.Run(fmt.Sprintf("subscribers=%d", n), func(b *testing.B) {
			as := New()
			for range n {
				if _, err := as.Register(silent{}); err != nil {
					b.Fatal(err)
				}
			}
			inv := &Invalidation{Range: page, Event: Clear}
			for b.Loop() {
				if as.InvalidateRangeStart(inv) == nil {
					as.InvalidateRangeEnd(inv)
				}
			}
		})
	}
}
