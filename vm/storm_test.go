package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
)

// stormPages is how many pages a guest counts in under a storm. Those behind them are for
// changes that are to cut its slots and nothing else.
const stormPages = 6

// stormChanges are changes of the slots of a guest that counts in its pages, through all
// of which these keep their content: each takes something, and gives it back.
var stormChanges = []struct {
	name string
	do   func(m *Machine, page uint64) error // page is one of the guest's
}{
	{"split and merge", func(m *Machine, page uint64) error {
		r := m.hvas(stormPages+page, 1)
		return errors.Join(m.Memory().Unmap(r), m.Memory().Map(r))
	}},
	{"split and merge more", func(m *Machine, _ uint64) error {
		mem, n := m.Memory(), uint64(20)
		var errs []error
		for i := stormPages + 1; uint64(i) < stormPages+n; i += 2 {
			errs = append(errs, mem.Unmap(m.hvas(uint64(i), 1)))
		}
		return errors.Join(append(errs, mem.Map(m.hvas(stormPages, n)))...)
	}},
	{"move", func(m *Machine, page uint64) error {
		r := m.hvas(page, 1)
		return errors.Join(m.Memory().Remap(r, m.spare.Range.Start), m.Memory().Remap(m.spare.Range, r.Start))
	}},
	{"read-only", func(m *Machine, page uint64) error {
		return errors.Join(m.Memory().Protect(m.hvas(page, 1), addr.Read), m.Memory().Protect(m.hvas(page, 1), addr.ReadWrite))
	}},
	{"no access", func(m *Machine, page uint64) error {
		return errors.Join(m.Memory().Protect(m.hvas(page, 2), addr.NoAccess), m.Memory().Protect(m.hvas(page, 2), addr.ReadWrite))
	}},
}

// checkCounts compares what the pages of each vCPU count with each other and with its
// rounds, with the guest standing still: in the round that it is in it has got as far
// as some page.
func checkCounts(t *testing.T, m *Machine, what string) (rounds uint64) {
	t.Helper()
	for vcpu := range m.vcpus {
		done, err := m.Result(vcpu, 0)
		if err != nil {
			t.Fatal(err)
		}
		var counts []uint64
		for page := range uint64(stormPages) {
			counts = append(counts, m.mustLoad(t, gpaOf(page)+addr.GPA(8*vcpu)))
		}
		falls := slices.IsSortedFunc(counts, func(a, b uint64) int { return int(int64(b - a)) })
		if counts[0] > done+1 || counts[stormPages-1] < done || !falls {
			t.Errorf("%s: vCPU %d has done %d rounds, and its pages count %v", what, vcpu, done, counts)
		}
		rounds += done
	}
	return rounds
}

// TestSlotStorm changes the slots of guests as fast as it can. The guests count in their
// memory: they lose no update, and none ends; and a copy of memory that is brought up to
// date by harvests has every page that was written.
func TestSlotStorm(t *testing.T) {
	length := gvmtest.StormLasts(500 * time.Millisecond)
	for _, c := range []Config{{VCPUs: 1}, {VCPUs: 2}, {VCPUs: 2, MaxSlots: 8}, {VCPUs: 2, Policy: shadow.Lazy}} {
		t.Run(fmt.Sprintf("slots=%v/max=%d/vcpus=%d", c.Policy, c.MaxSlots, c.VCPUs), func(t *testing.T) {
			rng := gvmtest.Rand(t)
			c.Touch, c.Spare, c.Log = Wait, addr.PageSize, trace.NewLog(1000)
			m := newMachine(t, c, "counter", guests.Args{"pages": stormPages, "rounds": 1 << 62})
			if err := m.LogDirty(true); err != nil {
				t.Fatal(err)
			}
			s := newSnapshot(t, m)
			storm, end := context.WithTimeout(context.Background(), length+hangs)
			defer end()
			ctx, cancel := context.WithCancel(storm)
			defer cancel()
			if err := m.Start(ctx); err != nil {
				t.Fatal(err)
			}
			advances(t, m)
			var took []time.Duration
			update := func() {
				h, err := m.Harvest(ctx)
				if err != nil {
					t.Fatal(err)
				}
				s.apply(t, h)
				if err := h.Commit(); err != nil {
					t.Error(err)
				}
			}
			begin := time.Now()
			for time.Since(begin) < length && !ended(m) {
				change := stormChanges[rng.IntN(len(stormChanges))]
				now := time.Now()
				if err := change.do(m, rng.Uint64N(stormPages-1)); err != nil {
					t.Fatalf("%s: %v", change.name, err)
				}
				took = append(took, time.Since(now))
				if rng.IntN(50) == 0 {
					update()
				}
				if rng.IntN(200) == 0 {
					m.Pause()
					update()
					s.compare(t, "in the storm")
					checkCounts(t, m, "in the storm")
					m.Resume()
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			elapsed := time.Since(begin)
			cancel()
			if _, err := m.Wait(); !errors.Is(err, context.Canceled) {
				t.Fatalf("the run ended with %v", err)
			}
			ctx = storm
			update()
			s.compare(t, "at the end")
			rounds := checkCounts(t, m, "at the end")
			if err := m.tracker.Check(); err != nil {
				t.Error(err)
			}
			if n := m.Slots().Len(); n != 2 {
				t.Errorf("%d slots at the end, want 2: all is mapped as at first", n)
			}
			slices.Sort(took)
			paused := m.Pauses()
			t.Logf("%d changes with their opposites, %.0f/s, p50 %v, p99 %v; %d pauses of vCPUs, p50 %v, p99 %v; the guests did %d rounds",
				len(took), float64(len(took))/elapsed.Seconds(), took[len(took)/2], took[len(took)*99/100],
				paused.Count, paused.Median, paused.P99, rounds)
		})
	}
}

// TestGuestsWaitAndGoOn has guests meet every change of a storm at the moment at which
// something is taken.
func TestGuestsWaitAndGoOn(t *testing.T) {
	for _, policy := range []shadow.Policy{shadow.Precise, shadow.Lazy} {
		t.Run(policy.String(), func(t *testing.T) {
			m := newMachine(t, Config{Policy: policy, Touch: Wait, Log: trace.NewLog(1000)}, "counter", guests.Args{"pages": stormPages, "rounds": 1 << 62})
			if err := m.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
			for range 20 {
				before := touches(m)
				if err := m.Memory().Protect(m.hvas(2, 1), addr.Read); err != nil {
					t.Fatal(err)
				}
				for touches(m) == before {
					time.Sleep(100 * time.Microsecond)
				}
				if err := m.Memory().Protect(m.hvas(2, 1), addr.ReadWrite); err != nil {
					t.Fatal(err)
				}
				advances(t, m)
			}
			m.Pause()
			defer m.Resume()
			checkCounts(t, m, "at the end")
		})
	}
}

// advances returns when the guest of every vCPU has begun and ended a round.
func advances(t *testing.T, m *Machine) {
	t.Helper()
	for vcpu := range m.vcpus {
		before, err := m.Result(vcpu, 0)
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(hangs); ; time.Sleep(50 * time.Microsecond) {
			now, err := m.Result(vcpu, 0)
			if err != nil {
				t.Fatal(err)
			}
			if now > before+1 {
				break
			}
			if ended(m) {
				_, err := m.Wait()
				t.Fatalf("the run ended with %v", err)
			}
			if time.Now().After(deadline) {
				t.Fatalf("vCPU %d stays in round %d", vcpu, now)
			}
		}
	}
}

// failing is the backend of a machine of whose requests for slots some fail.
type failing struct {
	*backend
	calls int // so far
	at, n int // the first that fails, counted from 1, and how many do
}

var errRefused = errors.New("refused by the test")

func (f *failing) request(do func() error) error {
	if f.calls++; f.at <= f.calls && f.calls < f.at+f.n {
		return fmt.Errorf("request %d: %w", f.calls, errRefused)
	}
	return do()
}

func (f *failing) CreateSlot(s shadow.Slot) error {
	return f.request(func() error { return f.backend.CreateSlot(s) })
}

func (f *failing) DeleteSlot(s shadow.Slot) error {
	return f.request(func() error { return f.backend.DeleteSlot(s) })
}

func (f *failing) ChangeSlot(from, to shadow.Slot) error {
	return f.request(func() error { return f.backend.ChangeSlot(from, to) })
}

// newFailing returns a machine, and its backend between KVM and a tracker that takes the
// place of the machine's own.
func newFailing(t *testing.T, c Config, guest string, args guests.Args) (*Machine, *failing) {
	t.Helper()
	c.Disconnected = true
	m := newMachine(t, c, guest, args)
	windows := slices.Collect(m.Slots().Windows())
	m.tracker.Release()
	f := &failing{backend: (*backend)(m)}
	m.tracker = shadow.NewTracker(m.memory, f, 64, c.Log)
	m.tracker.SetPolicy(c.Policy)
	as := m.memory.AddressSpace()
	if err := as.Register(testContext(t), m.tracker); err != nil {
		t.Fatal(err)
	}
	as.RLock()
	defer as.RUnlock()
	for _, w := range windows {
		if err := m.tracker.AddWindow(w); err != nil {
			t.Fatal(err)
		}
	}
	return m, f
}

// TestRefusedRequests has KVM refuse each request of each change in turn, under guests
// that count in the pages. The change is made; it says what was refused, itself or in
// the trace; and with the next change the guests have all that is mapped.
func TestRefusedRequests(t *testing.T) {
	const page = 2
	for name, tt := range map[string]struct {
		do, back func(m *Machine) error
		reported bool // by the operation: the requests come before the change
	}{
		"cut": {
			do:       func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.NoAccess) },
			back:     func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.ReadWrite) },
			reported: true,
		},
		"read-only": {
			do:       func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.Read) },
			back:     func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.ReadWrite) },
			reported: true,
		},
		"cut next door": {
			do:       func(m *Machine) error { return m.Memory().Unmap(m.hvas(stormPages, 1)) },
			back:     func(m *Machine) error { return m.Memory().Map(m.hvas(stormPages, 1)) },
			reported: true,
		},
		"move": {
			do:   func(m *Machine) error { return m.Memory().Remap(m.hvas(page, 1), m.spare.Range.Start) },
			back: func(m *Machine) error { return m.Memory().Remap(m.spare.Range, m.hvas(page, 1).Start) },
		},
	} {
		for _, policy := range []shadow.Policy{shadow.Precise, shadow.Lazy} {
			t.Run(strings.ReplaceAll(name, " ", "-")+"/"+policy.String(), func(t *testing.T) {
				log := trace.NewLog(1000)
				m, f := newFailing(t, Config{VCPUs: 2, Policy: policy, Touch: Wait, Spare: addr.PageSize, Log: log},
					"counter", guests.Args{"pages": stormPages, "rounds": 1 << 62})
				if err := errors.Join(m.LogDirty(true), m.Start(testContext(t))); err != nil {
					t.Fatal(err)
				}
				s := newSnapshot(t, m)
				// Each request of the change, of its opposite, and of undoing
				// them, until there is none so late.
				k := 1
				for refused := true; refused; k++ {
					f.calls, f.at, f.n = 0, k, 1
					seq := log.Len()
					err := tt.do(m)
					early := f.calls >= k
					if early && tt.reported != errors.Is(err, errRefused) {
						t.Errorf("request %d was refused, and the change returned %v", k, err)
					} else if !early && err != nil {
						t.Fatal(err)
					}
					if err := tt.back(m); errors.Is(err, errRefused) {
						if !strings.Contains(err.Error(), "slot") {
							t.Errorf("request %d was refused, which the error does not tell: %v", k, err)
						}
					} else if err != nil {
						t.Fatal(err)
					}
					if refused = f.calls >= k; refused && !tells(log, seq) {
						t.Errorf("request %d was refused, which is not in the trace", k)
					}
					f.n = 0
					// The next change heals: after it the guests have what they need.
					if err := m.Memory().Discard(m.hvas(stormPages+2, 1)); err != nil {
						t.Fatal(err)
					}
					if err := m.tracker.Check(); err != nil {
						t.Errorf("after request %d: %v", k, err)
					}
					if n := m.Slots().Len(); n != 2 {
						t.Errorf("after request %d there are %d slots, want 2", k, n)
					}
					advances(t, m)
					h, err := m.Harvest(testContext(t))
					if err != nil {
						t.Fatal(err)
					}
					s.apply(t, h)
					if err := h.Commit(); err != nil {
						t.Error(err)
					}
				}
				if policy == shadow.Precise && k < 6 {
					t.Errorf("only %d requests could be refused", k-2)
				}
				m.Pause()
				defer m.Resume()
				h, err := m.Harvest(testContext(t))
				if err != nil {
					t.Fatal(err)
				}
				s.apply(t, h)
				s.compare(t, "at the end")
				checkCounts(t, m, "at the end")
				if err := h.Commit(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// tells reports whether a refusal is in the log since seq.
func tells(log *trace.Log, seq uint64) bool {
	events, _ := log.Since(seq)
	return slices.ContainsFunc(events, func(e trace.Event) bool { return strings.Contains(e.Err, errRefused.Error()) })
}

// TestRefusedThenBack has KVM refuse to cut a slot. The guest that uses what it shows
// waits, and must be told when memory comes back, though no slot changes then.
func TestRefusedThenBack(t *testing.T) {
	m, f := newFailing(t, Config{Touch: Wait, Log: trace.NewLog(100)}, "probe", nil)
	ctx := testContext(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	f.at, f.n = f.calls+1, 2 // before the change, and again after it
	if err := m.Memory().Unmap(m.hvas(5, 1)); !errors.Is(err, errRefused) {
		t.Fatalf("unmap returned %v, want that a slot could not follow", err)
	}
	stored := make(chan error, 1)
	go func() { stored <- m.Probe(0).Store(ctx, gpaOf(5), 7) }()
	for touches(m) == 0 {
		time.Sleep(100 * time.Microsecond)
	}
	before := m.Slots().Generation()
	if err := errors.Join(m.Memory().Map(m.hvas(5, 1)), <-stored); err != nil {
		t.Fatal(err)
	}
	if got := m.mustLoad(t, gpaOf(5)); got != 7 {
		t.Errorf("the guest stored %d, want 7", got)
	}
	if m.Slots().Generation() != before {
		t.Error("the slots have changed: the test is of another case")
	}
}
