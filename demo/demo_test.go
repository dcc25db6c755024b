package demo

import (
	"context"
	"encoding/json"
	"flag"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/vm"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

var update = flag.Bool("update", false, "write the golden file")

// TestLinesAreTrue compares the loads that the demo prints with what the guest
// put into its result words.
func TestLinesAreTrue(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	var observed []uint64
	r, err := run(context.Background(), vm.Config{}, func(m *vm.Machine) {
		op, err := m.Result(0, guests.ProbeOp)
		if err != nil {
			t.Fatal(err)
		}
		if op != guests.ProbeLoad {
			return
		}
		v, err := m.Result(0, guests.ProbeResult)
		if err != nil {
			t.Fatal(err)
		}
		observed = append(observed, v)
	})
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	var printed []uint64
	for _, m := range regexp.MustCompile(`loads (0x[0-9a-f]+)`).FindAllStringSubmatch(text.String(), -1) {
		v, err := strconv.ParseUint(m[1], 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		printed = append(printed, v)
	}
	if diff := cmp.Diff(observed, printed); diff != "" || len(printed) == 0 {
		t.Errorf("loads (-guest's results page +printed):\n%s", diff)
	}
	if !r.OK() {
		t.Errorf("the demo failed:\n%s", text.String())
	}

	const golden = "testdata/demo.golden"
	got := regexp.MustCompile(`[0-9.]+ ms`).ReplaceAllString(text.String(), "T ms")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("the demo prints (-golden +got):\n%s", diff)
	}
}

// TestDisconnectedTrackerFails leaves the tracker out: the demo has to notice.
func TestDisconnectedTrackerFails(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	r, err := run(context.Background(), vm.Config{Disconnected: true}, func(*vm.Machine) {})
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	if r.OK() || !strings.Contains(text.String(), "FAILED") || !strings.Contains(text.String(), "host mapping is missing") {
		t.Errorf("with the tracker disconnected the demo says\n%s", text.String())
	}
}

func TestCancelledDemo(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if r, err := Run(ctx); err == nil && r.OK() {
		t.Error("a demo whose context is done is OK")
	}
}

func TestJSON(t *testing.T) {
	r := &Report{Steps: []Step{{Operation: "boot", Guest: []Answer{{Value: 1, Want: 1}}}}}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{`"steps"`, `"operation"`, `"notified"`, `"slots"`, `"guest"`, `"value"`, `"exited"`} {
		if !strings.Contains(string(b), key) {
			t.Errorf("JSON has no %s: %s", key, b)
		}
	}
}
