package hostops

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// play runs a script for some time, which passes as a test has it, tells its runner what
// happens meanwhile, and returns what was done and when.
func play(t *testing.T, text string, lasts time.Duration, meanwhile func(*Runner)) (done []string, err error) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := newGuest(t, guestConfig{spare: 4})
		start := time.Now()
		r := mustRunner(t, Config{Target: g.Target, Script: mustParse(t, text), OnOp: func(rec Record) {
			done = append(done, fmt.Sprintf("%v %v", time.Since(start), rec))
		}})
		ctx, cancel := context.WithTimeout(t.Context(), lasts)
		defer cancel()
		ended := gvmtest.Background(func() { err = r.Run(ctx) })
		if meanwhile != nil {
			meanwhile(r)
		}
		<-ended
		mustRestore(t, r, g)
	})
	return done, err
}

func TestRun(t *testing.T) {
	for name, tt := range map[string]struct {
		script    string
		lasts     time.Duration // 0: a second
		meanwhile func(*Runner)
		want      []string
		err       error // nil: it ends by itself
	}{
		"nothing": {script: "# nothing"},
		"at, in the order of time": {
			script: "at 5ms unmap 1\nat 0s store 2 3\nat 2ms discard all\nat 5ms map 1",
			want:   []string{"0s line 2: store 2 3 (op 1)", "2ms line 3: discard 0..16 (op 2)", "5ms line 1: unmap 1 (op 3)", "5ms line 4: map 1 (op 4)"},
		},
		"then": {
			script: "at 1ms unmap 1..3\nthen map it\nthen store it+8 5\nthen fill it 1\nat 1ms pageout 4",
			want: []string{"1ms line 1: unmap 1..3 (op 1)", "1ms line 2: map 1..3 (op 2)", "1ms line 3: store 1+8 5 (op 3)",
				"1ms line 4: fill 1 1 (op 4)", "1ms line 5: pageout 4 (op 5)"},
		},
		"every": {
			script: "every 10ms discard 1\nat 20ms store 1 1", lasts: 35 * time.Millisecond, err: context.DeadlineExceeded,
			want: []string{"10ms line 1: discard 1 (op 1)", "20ms line 1: discard 1 (op 2)", "20ms line 2: store 1 1 (op 3)", "30ms line 1: discard 1 (op 4)"},
		},
		"marks": {
			script: "on mark 3 discard 1\non mark pageout 2\nthen populate it read", err: context.DeadlineExceeded,
			meanwhile: func(r *Runner) {
				time.Sleep(time.Millisecond)
				r.Mark(3)
				synctest.Wait()
				time.Sleep(time.Millisecond)
				r.Mark(4)
			},
			want: []string{"1ms line 1: discard 1 (op 1)", "1ms line 2: pageout 2 (op 2)", "1ms line 3: populate 2 read (op 3)",
				"2ms line 2: pageout 2 (op 4)", "2ms line 3: populate 2 read (op 5)"},
		},
		"faults": {
			script: "at 0s unmap 4..8\non fault map it\nthen store it 7", err: context.DeadlineExceeded,
			meanwhile: func(r *Runner) {
				time.Sleep(time.Millisecond)
				r.Fault(5)
				r.Fault(5) // it waits already
				r.Fault(7)
				r.Fault(16) // there is no such page
				r.Mark(1)   // of which there is nothing in the script
			},
			want: []string{"0s line 1: unmap 4..8 (op 1)", "1ms line 2: map 5 (op 2)", "1ms line 3: store 5 7 (op 3)",
				"1ms line 2: map 7 (op 4)", "1ms line 3: store 7 7 (op 5)"},
		},
		"an error ends it": {
			script: "every 2ms protect 1 none\nat 5ms map 1\nat 3ms unmap 1", err: unix.ENOMEM,
			want: []string{"2ms line 1: protect 1 none (op 1)", "3ms line 3: unmap 1 (op 2)", "4ms line 1: protect 1 none (op 3)"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.lasts == 0 {
				tt.lasts = time.Second
			}
			got, err := play(t, tt.script, tt.lasts, tt.meanwhile)
			if !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
				t.Errorf("it ended with %v, want %v", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("done (-want +got):\n%s", diff)
			}
		})
	}
}

// TestMissedTimes: what is due while an operation takes long is carried out once.
func TestMissedTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuest(t, guestConfig{})
		start := time.Now()
		var at []time.Duration
		r := mustRunner(t, Config{Target: g.Target, Script: mustParse(t, "every 10ms discard 1"), OnOp: func(Record) {
			if at = append(at, time.Since(start)); len(at) == 1 {
				time.Sleep(25 * time.Millisecond)
			}
		}})
		ctx, cancel := context.WithTimeout(t.Context(), 45*time.Millisecond)
		defer cancel()
		if err := r.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		ms := time.Millisecond
		if want := []time.Duration{10 * ms, 35 * ms, 40 * ms}; !slices.Equal(at, want) {
			t.Errorf("carried out at %v, want %v", at, want)
		}
	})
}

// TestRunRandom: a random stream has its pace, and a run of it ends with its context.
func TestRunRandom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuest(t, guestConfig{})
		var at []time.Time
		r := mustRunner(t, Config{
			Target: g.Target, Random: NewRandom(RandomConfig{Seed: 1, Pages: 16}), Pace: time.Second,
			OnOp: func(Record) { at = append(at, time.Now()) },
		})
		start := time.Now()
		cause := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 5500*time.Millisecond, cause)
		defer cancel()
		if err := r.Run(ctx); !errors.Is(err, cause) {
			t.Errorf("it ended with %v, want %v", err, cause)
		}
		at = slices.Compact(at)
		for i := range at {
			if want := start.Add(time.Duration(i) * time.Second); !at[i].Equal(want) {
				t.Errorf("step %d is at %v, want %v", i, at[i], want)
			}
		}
		if len(at) != 6 {
			t.Errorf("%d steps in 5.5 s, want 6", len(at))
		}
		mustRestore(t, r, g)
	})
}

// TestStep: a step does not wait, and what comes faster than steps is dropped and counted.
func TestStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuest(t, guestConfig{})
		r := mustRunner(t, Config{Target: g.Target, Script: mustParse(t, "at 5ms unmap 1\non mark 7 discard 2")})
		ops := func(want uint64) {
			t.Helper()
			if err := r.Step(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := r.Stats().Ops; got != want {
				t.Errorf("%d operations, want %d", got, want)
			}
		}
		ops(0)
		time.Sleep(5 * time.Millisecond)
		ops(1)
		ops(1)
		for range maxEvents + 3 {
			r.Mark(7)
		}
		ops(1 + maxEvents)
		ops(1 + maxEvents)
		want := Stats{Ops: 1 + maxEvents, Kinds: map[Kind]Count{Unmap: {Done: 1}, Discard: {Done: maxEvents}}, Dropped: 3}
		if diff := cmp.Diff(want, r.Stats()); diff != "" {
			t.Errorf("stats (-want +got):\n%s", diff)
		}
		r.Mark(7)
		mustRestore(t, r, g)
		ops(1 + maxEvents) // the mark was forgotten
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r.Mark(7)
		if err := r.Step(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("a step whose context is done returns %v", err)
		}
	})
}

// TestRandomPages: the pages of a script that are random are those of its seed, and all
// of RAM in the long run.
func TestRandomPages(t *testing.T) {
	run := func(seed uint64) (ranges []Range) {
		g := newGuest(t, guestConfig{pages: 5})
		text := strings.Repeat("at 0s discard random 2\n", 100)
		r := mustRunner(t, Config{Target: g.Target, Script: mustParse(t, text), Seed: seed, OnOp: func(rec Record) { ranges = append(ranges, rec.Range) }})
		if err := r.Step(context.Background()); err != nil {
			t.Fatal(err)
		}
		return ranges
	}
	first := run(1)
	if again := run(1); !slices.Equal(first, again) {
		t.Errorf("one seed chooses %v, and then %v", first, again)
	}
	if slices.Equal(first, run(2)) {
		t.Error("two seeds choose the same pages")
	}
	for start := range uint64(4) {
		if !slices.Contains(first, Range{start, start + 2}) {
			t.Errorf("a hundred runs of 2 in 5 pages, and none begins at %d", start)
		}
	}
}

func TestNewRunnerErrors(t *testing.T) {
	g := newGuest(t, guestConfig{})
	spare := newGuest(t, guestConfig{spare: 2})
	script := func(text string) *Script { return mustParse(t, "# one\n"+text) }
	for want, c := range map[string]Config{
		"ops.txt:2: unmap 12..17 is about pages that RAM does not have: it has 16":             {Script: script("at 0s unmap 12..17")},
		"ops.txt:2: truncate 17 is about pages that RAM does not have: it has 16":              {Script: script("at 0s truncate 17")},
		"ops.txt:2: map random 17 is about more pages than the 16 of RAM":                      {Script: script("at 0s map random 17")},
		"ops.txt:2: remap 1 to spare needs a spare region, and the machine has none":           {Script: script("at 0s remap 1 to spare")},
		"ops.txt:2: remap-keep 1 needs a spare region, and the machine has none":               {Script: script("at 0s remap-keep 1")},
		"run operations of the host: there must be a script, or a random stream, and not both": {},
		"run operations of the host: they are about 17 pages, and RAM has 16":                  {Random: NewRandom(RandomConfig{Pages: 17})},
		"run operations of the host: they are about 0 pages, and RAM has 16":                   {Random: NewRandom(RandomConfig{})},
		"run operations of the host: they need 3 spare pages, and the machine has 2":           {Target: spare.Target, Random: NewRandom(RandomConfig{Pages: 1, Spare: 3})},
	} {
		if c.Target.Memory == nil {
			c.Target = g.Target
		}
		if _, err := NewRunner(c); err == nil || err.Error() != want {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
}

// TestOneAtATime: who steps while a step is in progress is told so.
func TestOneAtATime(t *testing.T) {
	g := newGuest(t, guestConfig{})
	var r *Runner
	said := ""
	r = mustRunner(t, Config{Target: g.Target, Script: mustParse(t, "at 0s unmap 1"), OnOp: func(Record) {
		said = gvmtest.Panics(func() { _ = r.Step(context.Background()) })
	}})
	if err := r.Step(context.Background()); err != nil {
		t.Fatal(err)
	}
	if want := "hostops: Run, Step and Restore are called one at a time"; said != want {
		t.Errorf("it panics with %q, want %q", said, want)
	}
}

// TestRecordJSON: the names are for programs, and stay.
func TestRecordJSON(t *testing.T) {
	for want, rec := range map[string]Record{
		`{"n":7,"line":4,"op":"protect","range":{"start":16,"end":20},"arg":"none","took":1500}`: {
			N: 7, Line: 4, Kind: Protect, Range: Range{16, 20}, Arg: "none", Took: 1500},
		`{"n":8,"op":"guard","range":{"start":1,"end":2},"err":"EINVAL","skipped":true,"took":0}`: {
			N: 8, Kind: Guard, Range: Range{1, 2}, Err: "EINVAL", Skipped: true},
	} {
		if got, err := json.Marshal(rec); err != nil || string(got) != want {
			t.Errorf("%v is %s (%v), want %s", rec, got, err, want)
		}
	}
}

// examples are the scripts that users are shown. Package main runs them under real guests.
const examples = "../examples/host-ops/*.ops"

// TestExamples runs the examples on a guest that writes all of its pages, in turn, and waits
// where one is missing.
func TestExamples(t *testing.T) {
	names, err := filepath.Glob(examples)
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		t.Run(filepath.Base(name), func(t *testing.T) {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			script, err := Parse(name, string(text))
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) { runExample(t, script) })
		})
	}
}

func runExample(t *testing.T, script *Script) {
	g := newGuest(t, guestConfig{spare: 4})
	lines := map[int]bool{}
	r := mustRunner(t, Config{Target: g.Target, Script: script, OnOp: func(rec Record) { lines[rec.Line] = true }})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var runErr error
	ended := gvmtest.Background(func() { runErr = r.Run(ctx) })
	rounds := 0
	for ctx.Err() == nil {
		r.Mark(uint32(1000 * rounds)) // as counter does, with mark=1000
		for page := range g.pages() {
			for tries := 0; ctx.Err() == nil; tries++ {
				err := g.Store64(page, 0, uint64(rounds))
				if err == nil {
					break
				}
				if !errors.Is(err, unix.EFAULT) {
					t.Fatal(err)
				}
				r.Fault(page)
				// An operation is recorded when it is done.
				if _, ok := r.Last(page); tries > 10 && !ok {
					t.Errorf("page %d is not there, and nobody has taken it", page)
				}
				time.Sleep(100 * time.Microsecond)
			}
		}
		rounds++
		time.Sleep(time.Millisecond)
	}
	<-ended
	if errors.Is(runErr, unix.EINVAL) {
		gvmtest.Lack(t, gvmtest.Advice, runErr)
	}
	if !errors.Is(runErr, context.DeadlineExceeded) {
		t.Errorf("it ended with %v", runErr)
	}
	for _, l := range script.Lines {
		if !lines[l.N] {
			t.Errorf("line %d was never carried out: %v", l.N, l)
		}
	}
	if rounds < 10 {
		t.Errorf("the guest went %d times through its pages, want at least 10", rounds)
	}
	mustRestore(t, r, g)
}
