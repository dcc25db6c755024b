package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/trace"
)

// writeScript writes a script and returns its name.
func writeScript(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestRunHostOps has times, marks and faults set operations off.
func TestRunHostOps(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	script := writeScript(t, "at 1ms unmap 4..8\non fault map it\non mark 3000 discard 1\nevery 10ms protect random 2 read\nthen protect it write\n")
	for _, timeout := range []string{"300ms", "3s", "15s"} { // a machine may be slow
		report, r := runJSON(t, "--vcpus 2 --timeout "+timeout+" --host-ops "+script+" --seed 5 counter pages=16 rounds=1000000000000 mark=1000")
		if r.status != statusFailed || report.Error != "the run was stopped: timed out after "+timeout || report.Seed != 5 || report.HostOps == nil {
			t.Fatalf("%+v, from %+v", report, r)
		}
		missing := false
		for _, k := range []hostops.Kind{hostops.Unmap, hostops.Map, hostops.Discard, hostops.Protect} {
			c := report.HostOps.Kinds[k]
			if missing = missing || c.Done == 0; c.Failed+c.Skipped != 0 {
				t.Errorf("of %s there are %+v", k, c)
			}
		}
		if !missing {
			return
		}
		t.Logf("in %s there were %+v", timeout, report)
	}
	t.Error("some operations were never carried out")
}

// TestRunHostOpsRandom runs random operations twice, with a seed that is given, and one that
// is chosen.
func TestRunHostOpsRandom(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, seed := range []string{"", "--seed 7 "} {
		report, r := runJSON(t, "--backing memfd --host-ops random --pace 200us "+seed+"--mem 256K counter rounds=100000")
		if r.status != 0 || r.stderr != "" || report.HostOps == nil || report.HostOps.Ops == 0 || report.Seed == 0 || seed != "" && report.Seed != 7 {
			t.Errorf("%+v, from %+v", report, r)
		}
	}
	r := gvm(t.Context(), "", strings.Fields("run --host-ops random --seed 9 --timeout 50ms spin")...)
	r.check(t, statusFailed, "gvm: the operations of the host were those of --seed 9\ngvm: the run was stopped: timed out after 50ms\n")
}

// TestRunHostOpsFails: an operation that fails ends the run, and is named.
func TestRunHostOpsFails(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	script := writeScript(t, "at 1ms unmap 1\nat 2ms protect 1 none\n")
	gvm(t.Context(), "", "run", "--host-ops", script, "spin").check(t, statusFailed, "gvm: the run was stopped: "+script+":2: protect 1 none (op 2): ")

	report, r := runJSON(t, "--host-ops "+script+" spin")
	if r.status != statusFailed || report.Status != nil || !strings.Contains(report.Error, script+":2: ") || report.HostOps.Kinds[hostops.Protect].Failed != 1 {
		t.Errorf("%+v, from %+v", report, r)
	}

	// What a guest's touch means is as on a machine without operations, if that is asked for.
	take := writeScript(t, "at 1ms unmap 1\n")
	gvm(t.Context(), "", "run", "--touch", "stop", "--host-ops", take, "stamp").check(t, statusFailed, "the guest used RAM that the host has taken away")
}

// TestRunHostOpsFile: operations change the file that RAM is mapped from, and leave it as
// long as it was.
func TestRunHostOpsFile(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	const ram = 16 << 12
	name := filepath.Join(t.TempDir(), "ram")
	if err := os.WriteFile(name, make([]byte, ram), 0o600); err != nil {
		t.Fatal(err)
	}
	script := writeScript(t, "at 0s fill 2 0x5a\nat 1ms truncate 8\n")
	r := gvm(t.Context(), "", strings.Fields("run --mem 64K --backing file --ram-file "+name+" --host-ops "+script+" --timeout 100ms spin")...)
	r.check(t, statusFailed, "timed out after 100ms")
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != ram || got[2<<12] != 0x5a {
		t.Errorf("the file has %d bytes, and page 2 begins with %#x; want %d and 0x5a", len(got), got[2<<12], ram)
	}
}

// shownCommand is the lines of an example that say how it is run.
var shownCommand = regexp.MustCompile(`(?m)^#\tgvm (.*)$`)

// TestHostOpsExamples runs the examples as they say, and wants each of their operations
// carried out.
func TestHostOpsExamples(t *testing.T) {
	names, err := filepath.Glob("../../examples/host-ops/*.ops")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		lines := shownCommand.FindAllStringSubmatch(string(text), -1)
		if len(lines) == 0 {
			t.Errorf("%s does not say how it is run", name)
		}
		for _, line := range lines {
			t.Run(filepath.Base(name)+"/"+strings.Fields(line[1])[0], func(t *testing.T) { runExample(t, name, line[1]) })
		}
	}
}

func runExample(t *testing.T, name, line string) {
	script, random, err := readHostOps(name)
	if err != nil || random {
		t.Fatal(err)
	}
	shown := strings.TrimPrefix(name, "../../")
	if !strings.Contains(line, " --host-ops "+shown+" ") {
		t.Fatalf("the command is for another script: gvm %s", line)
	}
	line = strings.Replace(line, shown, name, 1)
	isTrace := strings.HasPrefix(line, "trace run --timeout 100ms ")
	if !isTrace && !strings.HasPrefix(line, "dirty --epochs 5 ") {
		t.Fatalf("it does not say how long it runs: gvm %s", line)
	}
	var missing string
	for _, zeros := range []string{"", "0", "00"} { // a machine may be slow
		args := strings.Fields(line)
		if isTrace {
			args[3] = "100" + zeros + "ms"
			args = slices.Insert(args, 2, "--format", "jsonl")
		} else {
			args[2] += zeros
			args = slices.Insert(args, 1, "--json")
		}
		r := gvm(t.Context(), "", args...)
		if r.status == statusUsage {
			t.Fatalf("gvm %s: %s", line, r.stderr)
		}
		gvmtest.Need(t, gvmtest.KVM)
		if strings.Contains(r.stderr, "invalid argument") {
			gvmtest.Lack(t, gvmtest.Advice, errors.New(r.stderr))
		}
		if r.status != 0 || r.stderr != "" {
			t.Fatalf("gvm %s: status %d, standard error %q", line, r.status, r.stderr)
		}
		if missing = missingOps(t, script, r, isTrace); missing == "" {
			break
		}
	}
	if missing != "" {
		t.Errorf("gvm %s: not carried out: %s", line, missing)
	}
}

// missingOps returns an operation of the script of which a result does not say that it was
// carried out, or "".
func missingOps(t *testing.T, script *hostops.Script, r result, isTrace bool) string {
	t.Helper()
	done := map[hostops.Kind]bool{}
	if isTrace {
		for _, e := range readTrace(t, r).Events {
			done[hostops.Kind(e.Name)] = done[hostops.Kind(e.Name)] || e.Kind == trace.HostOpEnd
		}
		done[hostops.Store], done[hostops.Fill] = true, true // which are no changes of mappings
	} else {
		var result struct {
			HostOps hostops.Stats `json:"host_ops"`
		}
		d := json.NewDecoder(strings.NewReader(r.stdout)) // what is last is the result
		for d.More() {
			if err := d.Decode(&result); err != nil {
				t.Fatal(err)
			}
		}
		for kind, c := range result.HostOps.Kinds {
			done[kind] = c.Done > 0
		}
	}
	for _, l := range script.Lines {
		if !done[l.Op.Kind] {
			return l.String()
		}
	}
	return ""
}
