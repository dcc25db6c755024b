package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/trace"
)

// recording is a recording of every kind of event.
const recording = "../../trace/testdata/jsonl.golden"

// readTrace reads a recording that a command has printed.
func readTrace(t *testing.T, r result) *trace.Recording {
	t.Helper()
	if r.status != 0 || r.stderr != "" {
		t.Fatalf("status %d, standard error %q", r.status, r.stderr)
	}
	rec, err := trace.Read("standard output", strings.NewReader(r.stdout))
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

// TestTraceRun takes a page away from a guest and gives it back, and looks for what belongs
// together: the operations, their notifications, zaps and slots, and what the guest met.
func TestTraceRun(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	script := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(script, []byte("at 5ms unmap 3\non fault map it\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	rec := readTrace(t, gvm(t.Context(), "", "trace", "run", "--format", "jsonl", "--timeout", "1s", "--host-ops", script, "stamp", "pages=8"))
	if h := rec.Header; h.Guest != "stamp pages=8" || h.VCPUs != 1 || h.RAM.NPages() != 256 || h.HostOps != script || h.Seed == 0 || time.Since(h.Start) > time.Hour {
		t.Errorf("the header is %+v", h)
	}
	page := rec.Header.RAM.Start + 3
	kinds := map[uint64][]string{}
	lost := false
	for _, e := range trace.Page(rec.Events, page) {
		lost = lost || e.Kind == trace.Lost
		switch e.Kind {
		case trace.Exit, trace.Hold, trace.Release: // of which there may be any number
		default:
			kinds[e.Op] = append(kinds[e.Op], strings.TrimSpace(e.Kind.String()+" "+e.Name))
		}
	}
	const unmap, mapped = 1, 2
	for op, want := range map[uint64][]string{
		unmap: {"host-op unmap", "invalidate-start unmap", "zap", "slot-delete", "slot-create", "slot-create", "invalidate-end unmap", "host-op-end unmap", "guest-touch waits"},
		// What is recorded at once on two threads comes in any order.
		mapped: {"host-op map", "invalidate-start map", "zap", "slot-delete", "slot-delete", "slot-create", "invalidate-end map", "host-op-end map", "guest-touch resumed"},
	} {
		slices.Sort(kinds[op])
		slices.Sort(want)
		if !slices.Equal(kinds[op], want) && !lost {
			t.Errorf("of operation %d there is %q, want %q", op, kinds[op], want)
		}
	}
}

// TestTraceRunFormats records random operations under two vCPUs in each format.
func TestTraceRunFormats(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, policy := range []string{"precise", "lazy"} {
		for _, format := range trace.Formats() {
			t.Run(policy+"/"+format.String(), func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "trace")
				r := gvm(t.Context(), "", "trace", "run", "--format", format.String(), "--policy", policy, "-o", file, "--timeout", "300ms", "--vcpus", "2",
					"--host-ops", "random", "--seed", "7", "stamp", "pages=64")
				if r != (result{}) {
					t.Fatalf("got %+v, want nothing", r)
				}
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				for _, want := range []string{"stamp pages=64", "zap"} {
					if !bytes.Contains(text, []byte(want)) {
						t.Errorf("%q is not in the file, which begins with\n%.2000s", want, text)
					}
				}
			})
		}
	}
}

// TestTraceRunEnds: a recording is whole however the run ends.
func TestTraceRunEnds(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	script := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(script, []byte("at 1ms unmap 1\nat 2ms protect 1 none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	take := filepath.Join(t.TempDir(), "take")
	if err := os.WriteFile(take, []byte("at 1ms unmap 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]struct {
		status int
		stderr string
	}{
		"hello":                          {0, greeting},
		"hello status=7":                 {statusFailed, greeting + "gvm: the guest exited with status 7\n"},
		"--timeout 20ms spin":            {0, ""},
		"--host-ops " + script + " spin": {statusFailed, script + ":2: protect 1 none (op 2)"},
		"--touch stop --host-ops " + take + " counter pages=8 rounds=1000000000": {statusFailed, "the guest used RAM that the host has taken away"},
	} {
		t.Run(line, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "trace")
			r := gvm(t.Context(), "", append([]string{"trace", "run", "--format", "jsonl", "-o", file}, strings.Fields(line)...)...)
			if r.status != want.status || r.stdout != "" || !strings.Contains(r.stderr, want.stderr) || want.stderr == "" && r.stderr != "" {
				t.Errorf("status %d, standard output %q, standard error %q; want %d and %q", r.status, r.stdout, r.stderr, want.status, want.stderr)
			}
			if r := gvm(t.Context(), "", "trace", "show", file); r.status != 0 || !strings.Contains(r.stdout, "+ slot") {
				t.Errorf("it is shown with status %d and %q as\n%s", r.status, r.stderr, r.stdout)
			}
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		ctx, interrupt := context.WithCancel(t.Context())
		defer time.AfterFunc(50*time.Millisecond, interrupt).Stop()
		r := gvm(ctx, "", "trace", "run", "spin")
		if r.status != statusFailed || r.stderr != "gvm: interrupted: the run was stopped: context canceled\n" || !strings.Contains(r.stdout, "+ slot") {
			t.Errorf("got %+v", r)
		}
	})
	t.Run("unwritable", func(t *testing.T) {
		r := gvm(t.Context(), "", "trace", "run", "-o", "/dev/full", "spin")
		r.check(t, statusFailed, "write /dev/full: no space left on device")
	})
}

func TestTraceShow(t *testing.T) {
	for _, format := range []string{"text", "jsonl", "chrome"} {
		want, err := os.ReadFile("../../trace/testdata/" + format + ".golden")
		if err != nil {
			t.Fatal(err)
		}
		if got := gvm(t.Context(), "", "trace", "show", "--format", format, recording); got != (result{0, string(want), ""}) {
			t.Errorf("--format %s: got %+v, want\n%s", format, got, want)
		}
	}
	file := filepath.Join(t.TempDir(), "trace.html")
	if got := gvm(t.Context(), "", "trace", "show", "--format", "html", "-o", file, recording); got != (result{}) {
		t.Errorf("got %+v, want nothing", got)
	}
	page, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(page, []byte("<!DOCTYPE html>")) {
		t.Errorf("%v; the page begins with %.100q", err, page)
	}
	if n := len(readTrace(t, gvm(t.Context(), "", "trace", "show", "--format", "jsonl", "--page", "0x206", recording)).Events); n != 2 {
		t.Errorf("there are %d events of page 0x206, want 2", n)
	}
	var doc map[string]any
	if err := json.Unmarshal([]byte(gvm(t.Context(), "", "trace", "show", "--format", "chrome", "--page", "517", recording).stdout), &doc); err != nil {
		t.Errorf("--format chrome: %v", err)
	}
}

func TestTraceShowFails(t *testing.T) {
	text, err := os.ReadFile(recording)
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut")
	if err := os.WriteFile(cut, text[:len(text)-9], 0o600); err != nil {
		t.Fatal(err)
	}
	gvm(t.Context(), "", "trace", "show", cut).check(t, statusFailed, fmt.Sprintf("%s:%d: the line has no end: the recording was cut off", cut, bytes.Count(text, []byte("\n"))))
	gvm(t.Context(), "", "trace", "show", "../../trace/testdata/text.golden").check(t, statusFailed, "text.golden:1: this is not the header of a recording")
	gvm(t.Context(), "", "trace", "show", "-o", "/dev/full", recording).check(t, statusFailed, "write /dev/full: no space left on device")
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Errorf("what is no file of ours has been removed: %v", err)
	}
	gvm(t.Context(), "", "trace", "show", "-o", t.TempDir(), recording).check(t, statusFailed, "is a directory")
}

func TestTraceUsage(t *testing.T) {
	script := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(script, []byte("at 1ms discrad 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"":                                    `trace what? There are run, show (see "gvm trace --help")`,
		"play":                                `there is no command "trace play"; there are run, show`,
		"--nosuch":                            `not defined: -nosuch (see "gvm trace --help")`,
		"run":                                 `which guest? "gvm guests" lists them (see "gvm trace run --help")`,
		"run --nosuch hello":                  `not defined: -nosuch (see "gvm trace run --help")`,
		"run nobody":                          `there is no guest "nobody"`,
		"run hello -o f":                      "flags go before the guest: put -o before hello",
		"run --format xml hello":              "it is not one of text, jsonl, chrome, html",
		"run --policy slow hello":             "it is not one of precise, lazy",
		"run --timeout -1s hello":             "a timeout of -1s is negative",
		"run --pace 0s hello":                 "a pace of 0s is not positive",
		"run --events 0 hello":                "0 events are not in 1 to 16777216",
		"run --vcpus 99 hello":                "99 vCPUs are not in 1 to 32",
		"run --host-ops " + script + " hello": script + `:1:8: there is no operation "discrad"; did you mean discard?`,
		"run --host-ops " + script + ".not hello": "no such file",
		"show":                    `which recording? (see "gvm trace show --help")`,
		"show a b":                `one recording at a time, and flags go before it: there is "b", too`,
		"show --page five a":      `page "five" is not a guest frame number`,
		"show --page -1 a":        `page "-1" is not a guest frame number`,
		"show --format xml a":     "it is not one of text, jsonl, chrome, html",
		"show " + script + ".not": "no such file",
	} {
		t.Run(line, func(t *testing.T) {
			gvm(t.Context(), "", append([]string{"trace"}, strings.Fields(line)...)...).check(t, statusUsage, want)
		})
	}
}

func TestTraceHelp(t *testing.T) {
	for line, want := range map[string]string{
		"trace --help":      "gvm trace [command options]",
		"trace run --help":  "gvm trace run [command options] GUEST [NAME=VALUE ...]",
		"trace show --help": "gvm trace show [command options] FILE",
		"--help":            "record what happened to which page of a guest",
	} {
		t.Run(line, func(t *testing.T) {
			r := gvm(t.Context(), "", strings.Fields(line)...)
			if r.status != 0 || r.stderr != "" || !strings.Contains(r.stdout, want) {
				t.Errorf("status %d, standard error %q; want 0 and none. The help, which should have %q, is\n%s", r.status, r.stderr, want, r.stdout)
			}
		})
	}
}
