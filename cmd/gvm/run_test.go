package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

const greeting = "Hello from a guest in long mode at CPL 3.\n"

func TestRun(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for line, want := range map[string]result{
		"hello":                              {0, greeting, ""},
		"hello status=7":                     {7, greeting, ""},
		"hello status=0xff":                  {255, greeting, ""},
		"--vcpus 2 loop":                     {0, "", ""},
		"--mem 4K --backing memfd hello":     {0, greeting, ""},
		"--touch float --timeout 60s hello":  {0, greeting, ""},
		"--touch wait --mem 3G -- hello":     {0, greeting, ""},
		"touch order=random write=yes":       {0, "", ""},
		"stamp limit=1000":                   {0, "", ""},
		"counter pages=4096 rounds=2 mark=1": {0, "", ""},
	} {
		t.Run(line, func(t *testing.T) {
			if got := gvm(t.Context(), "", append([]string{"run"}, strings.Fields(line)...)...); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// TestRunFile has a guest's RAM be a file, which is written to if it is shared.
func TestRunFile(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	const ram = 16 << 12
	for backing, shared := range map[string]bool{"file": true, "file-private": false} {
		name := filepath.Join(t.TempDir(), backing)
		if err := os.WriteFile(name, make([]byte, ram), 0o600); err != nil {
			t.Fatal(err)
		}
		line := "run --mem 64K --backing " + backing + " --ram-file " + name + " stamp pages=4 limit=100"
		if r := gvm(t.Context(), "", strings.Fields(line)...); r != (result{}) {
			t.Errorf("gvm %s: %+v", line, r)
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if written := !bytes.Equal(got, make([]byte, ram)); written != shared || len(got) != ram {
			t.Errorf("%s: the file has been written to: %v, want %v; it has %d bytes", backing, written, shared, len(got))
		}
		if err := os.Truncate(name, ram-1); err != nil {
			t.Fatal(err)
		}
		if r := gvm(t.Context(), "", strings.Fields(line)...); r.status != statusUsage || !strings.Contains(r.stderr, name) {
			t.Errorf("with a file that is too short: %+v", r)
		}
	}
}

// runJSON executes "gvm run --json" and decodes what it prints.
func runJSON(t *testing.T, line string) (runReport, result) {
	t.Helper()
	r := gvm(t.Context(), "", append([]string{"run", "--json"}, strings.Fields(line)...)...)
	var report runReport
	d := json.NewDecoder(strings.NewReader(r.stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&report); err != nil || d.More() {
		t.Fatalf("gvm run --json %s: %v: standard output %q is not one report; standard error %q", line, err, r.stdout, r.stderr)
	}
	return report, r
}

func TestRunJSON(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	report, r := runJSON(t, "--vcpus 2 counter rounds=500")
	if r.status != 0 || r.stderr != "" || report.Guest != "counter" || report.Status == nil || *report.Status != 0 || report.Error != "" ||
		len(report.VCPUs) != 2 || report.VCPUs[0].Progress != 500 || report.VCPUs[1].Progress != 500 ||
		report.Seconds <= 0 || report.Seconds > 60 {
		t.Errorf("counter: %+v, from %+v", report, r)
	}
	if report, r = runJSON(t, "hello status=9"); r.status != 9 || *report.Status != 9 || r.stderr != greeting {
		t.Errorf("hello: %+v, from %+v; want status 9, and the console on standard error", report, r)
	}
	var keys map[string]any
	if err := json.Unmarshal([]byte(r.stdout), &keys); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"guest", "status", "error", "vcpus", "seconds"} {
		if _, ok := keys[key]; !ok {
			t.Errorf("hello: %q is not in %s", key, r.stdout)
		}
	}
}

func TestRunTwoAtOnce(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	var both sync.WaitGroup
	for status := range 2 {
		both.Go(func() {
			got := gvm(t.Context(), "", "run", "hello", fmt.Sprintf("status=%d", status))
			if want := (result{status, greeting, ""}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
	both.Wait()
}

// TestRunStopped stops endless guests.
func TestRunStopped(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, guest := range []string{"spin", "stamp", "probe"} {
		t.Run(guest, func(t *testing.T) {
			for _, timeout := range []string{"300ms", "10s"} { // a machine may be slow
				report, r := runJSON(t, "--vcpus 2 --timeout "+timeout+" "+guest)
				message := "the run was stopped: timed out after " + timeout
				if r.status != statusFailed || r.stderr != "gvm: "+message+"\n" || report.Error != message || report.Status != nil || report.Seconds < 0.3 {
					t.Errorf("%+v, from %+v", report, r)
				}
				if guest == "probe" || report.VCPUs[0].Progress > 0 {
					return
				}
				t.Logf("it made no progress in %v s", report.Seconds)
			}
			t.Error("it made no progress")
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		ctx, interrupt := context.WithCancel(t.Context())
		defer time.AfterFunc(50*time.Millisecond, interrupt).Stop()
		gvm(ctx, "", "run", "spin").check(t, statusFailed, "gvm: interrupted: the run was stopped: context canceled\n")
	})
}

func TestRunStdin(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	input := strings.Repeat("All characters but one: \x00\xff\r\n", 20)
	for name, tt := range map[string]struct{ input, want string }{
		"to its end":          {input, input},
		"nothing":             {"", ""},
		"end of transmission": {input + "\x04" + "not echoed", input},
	} {
		t.Run(name, func(t *testing.T) {
			if got, want := gvm(t.Context(), tt.input, "run", "--timeout", "20s", "--stdin", "echo"), (result{0, tt.want, ""}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
	t.Run("unreadable", func(t *testing.T) {
		var stdout, stderr bytes.Buffer
		stdin := iotest.ErrReader(io.ErrUnexpectedEOF)
		status := execute(t.Context(), []string{"gvm", "run", "--timeout", "20s", "--stdin", "echo"}, stdin, &stdout, &stderr)
		result{status, stdout.String(), stderr.String()}.check(t, statusFailed, "the run was stopped: standard input: unexpected EOF")
	})
}

func TestRunMoreMemoryThanThereIs(t *testing.T) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	gib := (info.Totalram+info.Totalswap)*uint64(info.Unit)>>30 + 1
	if gib<<30 > guests.MaxRAM {
		t.Skipf("this machine has all the memory that a guest can have, and more: %d GiB", gib)
	}
	gvm(t.Context(), "", "run", "--mem", fmt.Sprint(gib, "G"), "hello").check(t, statusLack, "cannot allocate memory\ngvm: ask for less memory")
}

func TestRunReportOfAllValues(t *testing.T) {
	status := 255
	var b bytes.Buffer
	if err := writeJSON(&b, runReport{
		Guest: "g", Status: &status, Error: "<&>", VCPUs: []vcpuReport{{math.MaxUint64}}, Seconds: 0.5,
		HostOps: &hostops.Stats{Ops: 3, Kinds: map[hostops.Kind]hostops.Count{hostops.Map: {Done: 1, Failed: 2}}}, Seed: 1<<53 - 1, Strays: new(uint64(0)),
	}); err != nil {
		t.Fatal(err)
	}
	golden(t, "run.json", b.String())
}
