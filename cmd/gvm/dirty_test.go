package main

import (
	"encoding/json"
	"fmt"
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/vm"
)

func TestDirty(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	heat := filepath.Join(t.TempDir(), "heat.png")
	r := gvm(t.Context(), "", "dirty", "--verify", "--host-ops", "random", "--heatmap", heat, "stamp", "pages=64")
	t.Log("\n" + r.stdout)
	if r.status != 0 || r.stderr != "" {
		t.Errorf("status %d, standard error %q", r.status, r.stderr)
	}
	for _, s := range vm.DirtySources() {
		if !strings.Contains(r.stdout, s.String()+", which sees ") && !strings.Contains(r.stdout, s.String()+": not run: ") {
			t.Errorf("nothing is said of %v", s)
		}
	}
	f, err := os.Open(heat)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := png.Decode(f); err != nil {
		t.Errorf("the heat map: %v", err)
	}
}

// TestDirtyJSON decodes all lines, with 50 epochs of each of two sources.
func TestDirtyJSON(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	script := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(script, []byte("every 1ms discard random 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := gvm(t.Context(), "", "dirty", "--json", "--verify", "--tracker", "ring,bitmap", "--ring-entries", "256", "--epochs", "50", "--interval", "1ms", "--host-ops", script)
	if r.status != 0 || r.stderr != "" {
		t.Fatalf("status %d, standard error %q", r.status, r.stderr)
	}
	kinds, pages := map[string]int{}, map[string]uint64{}
	for text := range strings.Lines(r.stdout) {
		var kind struct{ Kind, Source string }
		if err := json.Unmarshal([]byte(text), &kind); err != nil {
			t.Fatal(err)
		}
		kinds[kind.Source+" "+kind.Kind]++
		d := json.NewDecoder(strings.NewReader(text))
		d.DisallowUnknownFields()
		switch kind.Kind {
		case "epoch":
			var line epochLine
			if err := d.Decode(&line); err != nil || line.Number != kinds[kind.Source+" epoch"] || line.Rounds == 0 && !line.Failed || line.Missing == nil {
				t.Errorf("an epoch is %s, %v", text, err)
			}
			pages[kind.Source] += line.Pages
		case "result":
			var line resultLine
			if err := d.Decode(&line); err != nil || line.Epochs != 50 || line.HostOps.Ops == 0 || line.Missing != 0 || line.Error != "" {
				t.Errorf("the result is %s, %v", text, err)
			}
			if n := pages[kind.Source]; n == 0 || line.Pages != n {
				t.Errorf("the epochs have %d pages, and the result %d", n, line.Pages)
			}
		}
	}
	if got, want := fmt.Sprint(kinds), "map[bitmap epoch:50 bitmap result:1 ring epoch:50 ring result:1]"; got != want {
		t.Errorf("the lines are %s, want %s", got, want)
	}
}

// TestDirtyScriptPages has a script be about a page that the machine does not have, which is
// found out when there is a machine.
func TestDirtyScriptPages(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	script := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(script, []byte("at 1ms discard 256\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"dirty --mem 1M", "trace run --mem 1M", "run --mem 1M"} {
		args := append(strings.Fields(command), "--host-ops", script, "stamp")
		if r := gvm(t.Context(), "", args...); r.status != statusUsage || !strings.Contains(r.stderr, script+":1:") {
			t.Errorf("gvm %s: status %d, standard error %q", command, r.status, r.stderr)
		}
	}
}

func TestDirtyUsage(t *testing.T) {
	script := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(script, []byte("at 1ms discard 1\nat 1ms discrad 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"--epochs 0":                        "0 epochs are not 1 or more",
		"--interval -1s":                    "an interval of -1s is negative",
		"--tracker bitmap,maps":             `there is no tracker "maps"; there are bitmap, manual`,
		"--ring-entries 4294967295":         "4294967295 entries of a ring are too many",
		"--host-ops " + script:              script + `:2:8: there is no operation "discrad"; did you mean discard?`,
		"--host-ops " + script + ".missing": "no such file",
		"nobody":                            `there is no guest "nobody"`,
		"stamp pages=100000":                "100000 pages are more than",
		"--vcpus 0":                         "0 vCPUs are not in 1 to",
		"--backing sand":                    "it is not one of anonymous",
		"--mem 1":                           "", // which makes sense: see below
	} {
		t.Run(line, func(t *testing.T) {
			r := gvm(t.Context(), "", append([]string{"dirty"}, strings.Fields(line)...)...)
			if want == "" {
				if r.status == statusUsage {
					t.Errorf("status %d, standard error %q", r.status, r.stderr)
				}
				return
			}
			if r.status != statusUsage || !strings.Contains(r.stderr, want) || r.stdout != "" {
				t.Errorf("status %d, standard output %q, standard error %q; want %q", r.status, r.stdout, r.stderr, want)
			}
		})
	}
}
