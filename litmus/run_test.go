package litmus

import (
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

var (
	iterations = flag.Uint64("iterations", 0, "run each test for so many iterations; 0: a few hundred, or fewer")
	all        = flag.Bool("all", false, "run all built-in tests, however long that takes")
	only       = flag.String("litmus", "", "run all built-in tests whose names contain this, and no others")
)

// quick is a run that is long enough to see that a test works.
func quick(t *testing.T, x *Test) Config {
	c := Config{Iterations: *iterations, Duration: 20 * time.Second, Seed: gvmtest.Seed(t) | 1}
	if c.Iterations == 0 {
		c.Iterations, c.Duration = 200, 150*time.Millisecond
	}
	if !x.hasHosts() && c.Iterations < 10_000 {
		c.Instances = 32
	}
	return c
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func runTest(t *testing.T, x *Test, c Config) *Result {
	t.Helper()
	r, err := Run(testContext(t), x, c)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + b.String())
	return r
}

// TestBuiltin runs the collection, as much of it as the time allows. Nothing forbidden is seen.
func TestBuiltin(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	sample(t, 12*time.Second, All(), func(t *testing.T, x *Test) {
		if r := runTest(t, x, quick(t, x)); r.Verdict.Bad() {
			t.Errorf("the verdict is %q: %s", r.Verdict, r.Reason)
		}
	})
}

// TestSensitive runs the forms in which a forbidden outcome must be seen.
func TestSensitive(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	var forms []*Test
	for _, x := range All() {
		forms = append(forms, x.Sensitive...)
	}
	sample(t, 12*time.Second, forms, func(t *testing.T, f *Test) {
		c := quick(t, f)
		c.Iterations, c.Duration = 1<<20, 20*time.Second // it ends when it has seen what it must
		if r := runTest(t, f, c); r.Verdict != Seen && r.Verdict != NotRun {
			t.Errorf("the verdict is %q: %s", r.Verdict, r.Reason)
		}
	})
}

// sample calls run for tests in random order, until all have run or the time is over. On a
// real processor all have.
func sample(t *testing.T, budget time.Duration, tests []*Test, run func(*testing.T, *Test)) {
	tests = slices.DeleteFunc(slices.Clone(tests), func(x *Test) bool { return !strings.Contains(x.FullName(), *only) })
	rng := gvmtest.Rand(t)
	rng.Shuffle(len(tests), func(i, j int) { tests[i], tests[j] = tests[j], tests[i] })
	begin := time.Now()
	for i, x := range tests {
		if !*all && *iterations == 0 && *only == "" && time.Since(begin) > budget {
			t.Logf("%d of %d were run: -all runs all", i, len(tests))
			return
		}
		t.Run(x.FullName(), func(t *testing.T) { run(t, x) })
	}
}

// TestExamples runs tests that are not part of the collection, as a newcomer would write them,
// and their forms.
func TestExamples(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, x := range examples(t) {
		c := quick(t, x)
		if r := runTest(t, x, c); r.Verdict != OK {
			t.Errorf("%s: the verdict is %q: %s", x.Name, r.Verdict, r.Reason)
		}
		for _, f := range x.Sensitive {
			c.Iterations, c.Duration = 1<<20, 20*time.Second
			if r := runTest(t, f, c); r.Verdict != Seen {
				t.Errorf("%s: the verdict is %q: %s", f.FullName(), r.Verdict, r.Reason)
			}
		}
	}
}

// examples parses the examples.
func examples(t *testing.T) (list []*Test) {
	files, err := filepath.Glob("../examples/litmus/*.litmus")
	if err != nil || len(files) < 3 {
		t.Fatalf("there are the examples %v, %v; want three", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		x, err := Parse(file, string(text))
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, x)
	}
	return list
}

// TestExamplesParse reads the examples where they cannot run.
func TestExamplesParse(t *testing.T) { examples(t) }

// TestRequired has a test require what cannot be.
func TestRequired(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	x := parse(t, strings.Replace(smallest, "forbidden", "required", 1))
	r := runTest(t, x, quick(t, x))
	if r.Verdict != Missing || !r.Verdict.Bad() || !strings.Contains(r.Reason, `"P0:r0 == 1"`) {
		t.Errorf("the verdict is %q: %s", r.Verdict, r.Reason)
	}
}

// TestForbidden runs a test that is wrong, and looks at what is kept.
func TestForbidden(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	x := parse(t, strings.Replace(smallest, "r0 == 1", "r0 == 0", 1))
	c := quick(t, x)
	c.CPUs = []int{0}
	r := runTest(t, x, c)
	if r.Verdict != Violated || len(r.Sightings) != maxSightings || r.Text != x.Text || r.Seed != c.Seed || r.Sightings[0].Round != 1 || r.Outcomes[0].Count != r.Iterations {
		t.Errorf("the result is %+v", r)
	}
}

// TestGuestWaitsForGood has the host take a page and not give it back: the round ends all the
// same.
func TestGuestWaitsForGood(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	x := parse(t, "litmus t\npage x = 5\nguest P0\n store x 1\n r0 = load x\nhost H0\n unmap x\nobserve x\nforbidden P0:r0 > 1\n")
	if r := runTest(t, x, quick(t, x)); r.Verdict != OK || r.Rounds == 0 {
		t.Errorf("the verdict is %q: %s", r.Verdict, r.Reason)
	}
}

// TestFailingStatement has the kernel refuse what the host does.
func TestFailingStatement(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	x := parse(t, "litmus t\npage x\nguest P0\n r0 = load x\nhost H0\n unmap x\n discard x\nforbidden P0:r0 == 1\n")
	r, err := Run(testContext(t), x, quick(t, x))
	if err == nil || !strings.Contains(err.Error(), "litmus test t: round 1: test.litmus:7: discard x: ") {
		t.Errorf("the result is %+v, %v", r, err)
	}
}

// TestStopped runs a test whose context is done.
func TestStopped(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	x := parse(t, "litmus t\nmachine dirty bitmap\npage x\nguest P0\n r0 = load x\nhost H0\n log off\nforbidden P0:r0 == 1\n")
	ctx, cancel := context.WithCancelCause(testContext(t))
	cancel(errors.New("enough"))
	if r, err := Run(ctx, x, quick(t, x)); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("the result is %+v, %v", r, err)
	}
}
