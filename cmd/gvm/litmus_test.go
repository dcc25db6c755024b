package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/litmus"
)

func TestLitmusList(t *testing.T) {
	r := gvm(t.Context(), "", "litmus", "list")
	if r.status != 0 || r.stderr != "" || strings.Count(r.stdout, "\n") != 1+len(litmus.All()) || !strings.Contains(r.stdout, "\ncorr-replace ") {
		t.Errorf("status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}
	r = gvm(t.Context(), "", "litmus", "list", "--json")
	var tests []litmusTest
	d := json.NewDecoder(strings.NewReader(r.stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&tests); err != nil || r.status != 0 || len(tests) != len(litmus.All()) {
		t.Fatalf("status %d, %v, %d tests", r.status, err, len(tests))
	}
	for _, x := range tests {
		if x.Name == "" || x.About == "" || x.Guests == 0 || x.Needs == nil || x.Sensitive == nil || x.Text != "" {
			t.Errorf("a test is %+v", x)
		}
	}
}

func TestLitmusShow(t *testing.T) {
	r := gvm(t.Context(), "", "litmus", "show", "add-move")
	for _, want := range []string{"litmus add-move\n", "# It needs nothing but KVM.\n", "; line 9: r1 = add x 1\n", "lock xadd"} {
		if r.status != 0 || r.stderr != "" || !strings.Contains(r.stdout, want) {
			t.Errorf("status %d, standard error %q; want %q in\n%s", r.status, r.stderr, want, r.stdout)
		}
	}
	if r := gvm(t.Context(), "", "litmus", "show", "mp/backwards"); r.status != 0 || !strings.Contains(r.stdout, "; line 19: store y 1\n") {
		t.Errorf("a form: status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}
	var x litmusTest
	r = gvm(t.Context(), "", "litmus", "show", "--json", "../../examples/litmus/first.litmus")
	if err := json.Unmarshal([]byte(r.stdout), &x); err != nil || x.Name != "first" || !strings.Contains(x.Text, "discard x") || !strings.Contains(x.Code, "; guest P0") {
		t.Errorf("status %d, %v:\n%s", r.status, err, r.stdout)
	}
}

func TestLitmusUsage(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.litmus")
	if err := os.WriteFile(bad, []byte("litmus bad\npage x\nguest P0\n\tr0 = lod x\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"":                         "litmus what? There are list, run, show",
		"all":                      `there is no command "litmus all"; there are list, run, show`,
		"list all":                 `list takes no argument "all"`,
		"show":                     `which test? "gvm litmus list" lists them`,
		"show mp sb":               "which test?",
		"show nosuch":              `there is no litmus test "nosuch"`,
		"run corr-replac":          "did you mean corr-replace?",
		"run mp --json":            "flags go before the tests: put --json before mp",
		"run ./nosuch":             "open ./nosuch: no such file or directory",
		"run " + bad:               bad + ":4:7: expected a statement of the guest with a result, not \"lod\"; did you mean load?",
		"run --pin 0,x mp":         `"x" is not the number of a CPU`,
		"run --duration -1s mp":    "a duration of -1s is negative",
		"run --instances 1025 mp":  "1025 instances are not in 1 to 1024",
		"run --iterations many mp": `invalid value "many" for flag -iterations`,
	} {
		gvm(t.Context(), "", append([]string{"litmus"}, strings.Fields(line)...)...).check(t, statusUsage, want)
	}
}

// TestLitmusRun runs two tests and a form, as text and as JSON.
func TestLitmusRun(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	r := gvm(t.Context(), "", "litmus", "run", "--iterations", "100", "--instances", "32", "--duration", "1s", "--seed", "9", "--pin", "0", "sb-fence", "pageout-swap", "write-move")
	t.Log("\n" + r.stdout)
	if r.status != 0 || r.stderr != "" || !strings.HasPrefix(r.stdout, "sb-fence\n") || !strings.Contains(r.stdout, "\n3 runs: ") || !strings.HasSuffix(r.stdout, "\nseed 9\n") {
		t.Errorf("status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}
	r = gvm(t.Context(), "", "litmus", "run", "--json", "--iterations", "100", "--instances", "32", "--duration", "20s", "--sensitive", "sb-fence")
	var all litmusResult
	d := json.NewDecoder(strings.NewReader(r.stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&all); err != nil || r.status != 0 || r.stderr != "" {
		t.Fatalf("status %d, standard error %q, %v, standard output\n%s", r.status, r.stderr, err, r.stdout)
	}
	if len(all.Results) != 2 || all.Verdicts[litmus.OK] != 1 || all.Verdicts[litmus.Seen] != 1 || all.Seed == 0 || all.Results[0].Iterations < 100 || all.Results[1].Form != "loads-first" {
		t.Errorf("the result is %+v", all)
	}
}

// TestLitmusForbidden runs a test that is wrong: exit status 1, and what it takes to see it
// again is kept.
func TestLitmusForbidden(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	dir := t.TempDir()
	file := filepath.Join(dir, "wrong.litmus")
	if err := os.WriteFile(file, []byte("litmus wrong\npage x\nguest P0\n\tr0 = load x\nforbidden P0:r0 == 0\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	keep := filepath.Join(dir, "kept")
	r := gvm(t.Context(), "", "litmus", "run", "--iterations", "64", "--keep", keep, file)
	if r.status != statusFailed || r.stderr != "" || !strings.Contains(r.stdout, " ! P0:r0=0  forbidden\n") {
		t.Errorf("status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}
	again := gvm(t.Context(), "", "litmus", "run", "--iterations", "64", filepath.Join(keep, "wrong.litmus"))
	if again.status != statusFailed {
		t.Errorf("the test that was kept: status %d, standard error %q", again.status, again.stderr)
	}
	var kept litmus.Result
	text, err := os.ReadFile(filepath.Join(keep, "wrong.json"))
	if err == nil {
		err = json.Unmarshal(text, &kept)
	}
	if err != nil || kept.Verdict != litmus.Violated || len(kept.Sightings) == 0 || kept.Seed == 0 {
		t.Errorf("kept is %+v, %v", kept, err)
	}
	r = gvm(t.Context(), "", "litmus", "run", "migrate")
	if r.status != statusLack && r.status != 0 {
		t.Errorf("a test that the machine may lack something for: status %d, %s", r.status, r.stderr)
	}
}

// TestLitmusInterrupted stops a run: what there is so far is printed.
func TestLitmusInterrupted(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	r := gvm(ctx, "", "litmus", "run", "--duration", "0", "--iterations", "1000000000", "mp")
	if r.status != statusFailed || !strings.HasPrefix(r.stdout, "mp\n") || !strings.Contains(r.stdout, "\n1 runs: 1 ") || !strings.Contains(r.stderr, "gvm: litmus test mp: ") {
		t.Errorf("status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}
	if r := gvm(t.Context(), "", "litmus", "run", "--pin", "1023", "mp"); r.status != statusUsage || !strings.Contains(r.stderr, "pin a thread to CPU 1023") {
		t.Errorf("on a CPU that there is not: status %d, standard error %q", r.status, r.stderr)
	}
}
