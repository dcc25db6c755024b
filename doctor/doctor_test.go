package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

func TestMain(m *testing.M) { gvmtest.Main(m) }

// golden compares got with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, got, 0o666); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

func TestGolden(t *testing.T) {
	m := completeMachine()
	m.files["proc/swaps"].Data = []byte(swapsHeader)
	m.files["sys/kernel/mm/ksm/run"].Data = []byte("0\n")
	r, err := m.examine(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.Checks = append([]Check{{Name: "essential", Status: Missing, Required: true, Detail: "not there", Remedy: "get one"}}, r.Checks...)

	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.txt", text.Bytes())

	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "report.json", append(b, '\n'))
}

func TestWriteTextError(t *testing.T) {
	want := errors.New("full")
	if err := new(Report).WriteText(failingWriter{want}); err != want {
		t.Errorf("WriteText = %v, want %v", err, want)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// TestExamine examines the machine that the test runs on.
func TestExamine(t *testing.T) {
	before := globals(t)
	r := examineHere(t)
	if after := globals(t); after != before {
		t.Errorf("the examination changed %s into %s", before, after)
	}
	for name, feature := range map[string]gvmtest.Feature{
		"kvm":         gvmtest.KVM,
		"userfaultfd": gvmtest.UFFD,
		"tracepoints": gvmtest.Tracepoints,
	} {
		t.Run(name, func(t *testing.T) {
			gvmtest.Need(t, feature)
			if feature != gvmtest.KVM {
				gvmtest.Need(t, gvmtest.KVM) // has the tracepoints
				gvmtest.Need(t, gvmtest.Root)
			}
			for _, c := range r.Checks {
				if c.Name == name && c.Status == Missing {
					t.Errorf("check is %+v on a machine that has %s", c, feature)
				}
			}
		})
	}
}

// examineHere checks what is true of every report.
func examineHere(t *testing.T) *Report {
	t.Helper()
	r, err := Examine(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r.Kernel == "" || r.CPU == "" || r.CPUs == 0 || r.MemoryBytes == 0 {
		t.Errorf("%q, %q, %d CPUs, %d bytes of memory: one is not known", r.Kernel, r.CPU, r.CPUs, r.MemoryBytes)
	}
	seen := map[string]bool{}
	for _, c := range r.Checks {
		if seen[c.Name] {
			t.Errorf("two checks are named %q", c.Name)
		}
		seen[c.Name] = true
		if (c.Status == OK) != (c.Remedy == "") || c.Detail == "" || strings.Contains(c.Detail+c.Remedy, "\n") {
			t.Errorf("check is %+v, want one line of detail, and one of remedy if it is not ok", c)
		}
	}
	seen = map[string]bool{}
	for _, m := range r.Measures {
		if seen[m.Name] {
			t.Errorf("two measures are named %q", m.Name)
		}
		seen[m.Name] = true
		if m.Value <= 0 || m.Unit != "ns" && m.Unit != "us" || m.Detail == "" {
			t.Errorf("measure is %+v, want a time and what it is of", m)
		}
	}
	if !seen["page-discard"] {
		t.Errorf("measures are %+v, want the cost of a discard among them", r.Measures)
	}
	return r
}

// globals is the state of the machine that an examination comes near.
func globals(t *testing.T) string {
	t.Helper()
	var all []byte
	for _, name := range []string{"/proc/self/mounts", "/proc/swaps"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return string(all)
}

// TestExamineUnprivileged runs itself as a user without privileges.
func TestExamineUnprivileged(t *testing.T) {
	const child = "GVM_TEST_UNPRIVILEGED"
	if os.Getenv(child) != "" {
		examineHere(t)
		return
	}
	gvmtest.Need(t, gvmtest.Root)
	// The path by way of /proc needs no access to the directory of the binary.
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run=^TestExamineUnprivileged$")
	cmd.Env = append(os.Environ(), child+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestExamineCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := Examine(ctx); r != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("Examine = %v, %v; want nil, %v", r, err, context.Canceled)
	}
}

func TestSizeString(t *testing.T) {
	for n, want := range map[uint64]string{
		0:             "0 bytes",
		1023:          "1023 bytes",
		1 << 10:       "1 KiB",
		1<<20 - 1<<10: "1023 KiB",
		3 << 19:       "1.5 MiB",
		25274793984:   "23.54 GiB",
		5 << 50:       "5120 TiB",
	} {
		if got := sizeString(n); got != want {
			t.Errorf("sizeString(%d) = %q, want %q", n, got, want)
		}
	}
}
