package gvmtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLeaksAreSeen leaves something of each kind behind, one after the other.
func TestLeaksAreSeen(t *testing.T) {
	before := resources()
	if leaks(before) != 0 {
		t.Fatal("something is left behind before the test")
	}
	fd, err := unix.MemfdCreate("gvm-leak", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if leaks(before) == 0 {
		t.Error("an open descriptor goes unnoticed")
	}
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if leaks(before) == 0 {
		t.Error("a guest's mapping goes unnoticed")
	}
	if err := unix.Munmap(mem); err != nil {
		t.Fatal(err)
	}
	if leaks(before) != 0 {
		t.Error("something is left behind at the end")
	}
}

// TestRequireForbidsSkips runs this binary again, for a feature that no machine
// has, with and without GVM_REQUIRE.
func TestRequireForbidsSkips(t *testing.T) {
	if os.Getenv("GVMTEST_NEED") != "" {
		Need(t, "unobtainium")
		return
	}
	for require, want := range map[string]string{"": "SKIP", "kvm,unobtainium": "FAIL"} {
		cmd := exec.Command(os.Args[0], "-test.v", "-test.run", "^TestRequireForbidsSkips$")
		cmd.Env = append(os.Environ(), "GVMTEST_NEED=1", "GVM_REQUIRE="+require)
		out, err := cmd.CombinedOutput()
		if !strings.Contains(string(out), "--- "+want) || (err != nil) != (want == "FAIL") {
			t.Errorf("with GVM_REQUIRE=%q: %v\n%s\nwant %s", require, err, out, want)
		}
	}
}

// recorder is a test that only notes what is said to it.
type recorder struct {
	testing.TB
	errors, logs []string
}

func (r *recorder) Helper() {}
func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}
func (r *recorder) Logf(format string, args ...any) {
	r.logs = append(r.logs, fmt.Sprintf(format, args...))
}

type defect uint8

func TestRunMutants(t *testing.T) {
	always := func(defect) error { return errors.New("noticed\nmore of it") }
	never := func(defect) error { return nil }
	exact := func(d defect) error {
		if d == 0 {
			return nil
		}
		return always(d)
	}
	for name, tt := range map[string]struct {
		m    Mutant[defect]
		row  string // how it begins
		fail string // nothing: the test passes
	}{
		"is noticed":             {m: Mutant[defect]{Defect: 1, By: "a test", Check: exact}, row: "M1 what a test"},
		"survives":               {m: Mutant[defect]{Defect: 1, By: "a test", Check: never}, row: "M1 what nobody", fail: "M1 survives: what"},
		"is noticed without it":  {m: Mutant[defect]{Defect: 1, By: "a test", Check: always}, row: "M1 what a test", fail: "M1: without the defect: noticed\nmore of it"},
		"is of a user":           {m: Mutant[defect]{By: "a test", Check: always}, row: "M1 what a test"},
		"is of a user, survives": {m: Mutant[defect]{By: "a test", Check: never}, row: "M1 what nobody", fail: "M1 survives: what"},
		"needs luck, has it":     {m: Mutant[defect]{Defect: 1, By: "a test", Check: exact, Chance: "missed"}, row: "M1 what a test"},
		"needs luck":             {m: Mutant[defect]{Defect: 1, By: "a test", Check: never, Chance: "missed"}, row: "M1 what missed"},
		"does not apply":         {m: Mutant[defect]{NA: "a reason"}, row: "M1 what not applicable a reason"},
		"is not run":             {m: Mutant[defect]{Defect: 1, By: "somebody else", NA: "a reason"}, row: "M1 what somebody else a reason"},
	} {
		t.Run(name, func(t *testing.T) {
			var r recorder
			tt.m.ID, tt.m.What = "M1", "what"
			RunMutants(&r, []Mutant[defect]{tt.m})
			table := strings.Split(r.logs[len(r.logs)-1], "\n")
			if got := strings.Join(strings.Fields(table[2]), " "); !strings.HasPrefix(got, tt.row) {
				t.Errorf("the row is %q, want %q", got, tt.row)
			}
			if got := strings.Join(r.errors, "; "); got != tt.fail {
				t.Errorf("the test fails with %q, want %q", got, tt.fail)
			}
		})
	}
}

func TestEveryMutant(t *testing.T) {
	var r recorder
	EveryMutant(&r, 4, []Mutant[defect]{{Defect: 3}, {Defect: 1}, {}, {Defect: 3}})
	if want := []string{"no check looks for defect 2", "no check looks for defect 4"}; !slices.Equal(r.errors, want) {
		t.Errorf("it fails with %q, want %q", r.errors, want)
	}
}

// TestSeed: a random test can be repeated by what it has logged.
func TestSeed(t *testing.T) {
	defer func(seed uint64) { *seedFlag = seed }(*seedFlag)
	var r recorder
	*seedFlag = 0
	seed := Seed(&r)
	*seedFlag = seed
	first, again := Rand(&r).Uint64(), Rand(&r).Uint64()
	if first != again {
		t.Errorf("with -seed %d the first number is %d, and then %d", seed, first, again)
	}
	if want := slices.Repeat([]string{fmt.Sprintf("-seed %d", seed)}, 3); !slices.Equal(r.logs, want) {
		t.Errorf("logged: %q, want %q", r.logs, want)
	}
}

func TestWaiting(t *testing.T) {
	leave := make(chan struct{})
	done := Background(func() { <-leave })
	if Closed(done) || ClosedWithin(done, Grace) {
		t.Error("closed before the function has returned")
	}
	close(leave)
	if !Eventually(func() bool { return Closed(done) }) || !ClosedWithin(done, Limit) {
		t.Error("not closed when the function has returned")
	}
	for _, wait := range []func(defect) time.Duration{LimitFor[defect], GraceFor[defect]} {
		if got := wait(1); got <= Grace || got >= Limit {
			t.Errorf("a check that has a defect to find waits %v, want between %v and %v", got, Grace, Limit)
		}
	}
	if LimitFor(defect(0)) != Limit || GraceFor(defect(0)) != Grace {
		t.Errorf("without a defect a check waits %v and %v, want %v and %v", LimitFor(defect(0)), GraceFor(defect(0)), Limit, Grace)
	}
}

func TestPanics(t *testing.T) {
	for want, f := range map[string]func(){
		"":     func() {},
		"text": func() { panic("text") },
		"EOF":  func() { panic(errors.New("EOF")) },
	} {
		if got := Panics(f); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
