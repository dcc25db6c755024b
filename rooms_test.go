package gvm

import (
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

const module = "github.com/secondmmu/gvm/"

// rooms is what each package may import of the module, and from outside of it
// apart from the standard library. Imports point down this list.
var rooms = []struct{ name, imports string }{
	{"cmd/gvm", "audit demo doctor epoch hostops litmus vm shadow mm notifier boot guests trace addr github.com/urfave/cli/v2 github.com/schollz/progressbar/v3 golang.org/x/term golang.org/x/sys/unix"},
	{"demo", "vm mm guests trace addr"},
	{"audit", "epoch vm hostops shadow mm kvm guests trace internal/pagemap internal/tracefs internal/perf addr golang.org/x/sys/unix"},
	{"litmus", "vm shadow mm notifier kvm guests internal/hostmem internal/doctext addr golang.org/x/sys/unix golang.org/x/arch/x86/x86asm"},
	{"epoch", "vm hostops dirty guests addr golang.org/x/sys/unix"},
	{"doctor", "vm mm kvm guests internal/uffd internal/pagemap internal/tracefs internal/perf addr golang.org/x/sys/unix"},
	{"vm", "shadow mm dirty kvm boot guests trace internal/lockorder addr golang.org/x/sys/unix golang.org/x/arch/x86/x86asm"},
	{"boot", "addr"},
	{"guests", "addr"},
	{"shadow", "notifier dirty srcu trace internal/hostmem internal/interval internal/lockorder addr"},
	{"hmm", "notifier srcu internal/lockorder addr"},
	{"hostops", "mm internal/doctext addr golang.org/x/sys/unix"},
	{"mm", "notifier trace internal/hostmem internal/uffd internal/pagemap internal/pageidle internal/tracefs internal/perf addr golang.org/x/sys/unix"},
	{"dirty", "srcu addr"},
	{"notifier", "srcu internal/interval internal/lockorder addr golang.org/x/sync/semaphore"},
	{"srcu", "internal/goid golang.org/x/sys/unix"},
	{"srcu/model", ""},
	{"trace", "addr"},
	{"kvm", "addr golang.org/x/sys/unix"},
	{"internal/uffd", "addr golang.org/x/sys/unix"},
	{"internal/pageidle", "addr"},
	{"internal/pagemap", "addr golang.org/x/sys/unix"},
	{"internal/tracefs", "golang.org/x/sys/unix"},
	{"internal/perf", "golang.org/x/sys/unix"},
	{"internal/hostmem", "addr golang.org/x/sys/unix"},
	{"internal/interval", ""},
	{"internal/lockorder", "internal/goid"},
	{"internal/goid", ""},
	{"internal/doctext", ""},
	{"internal/gvmtest", "go.uber.org/goleak golang.org/x/sys/unix"},
	{"addr", ""},
	{".", ""},
}

// TestImportsPointDown compares the imports of every package, tests aside, with
// the list above.
func TestImportsPointDown(t *testing.T) {
	found := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		room := filepath.ToSlash(filepath.Dir(path))
		i := slices.IndexFunc(rooms, func(r struct{ name, imports string }) bool { return r.name == room })
		if i < 0 {
			t.Errorf("%s is in a room that the list does not have", path)
			return nil
		}
		found[room] = true
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			name := strings.TrimPrefix(strings.Trim(spec.Path.Value, `"`), module)
			if !strings.Contains(strings.Split(name, "/")[0], ".") && !slices.ContainsFunc(rooms, func(r struct{ name, imports string }) bool { return r.name == name }) {
				continue // the standard library
			}
			if !slices.Contains(strings.Fields(rooms[i].imports), name) {
				t.Errorf("%s imports %s, which the room may not", path, name)
			}
			if j := slices.IndexFunc(rooms, func(r struct{ name, imports string }) bool { return r.name == name }); j >= 0 && j < i {
				t.Errorf("%s imports %s, which is above it", path, name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rooms {
		if !found[r.name] {
			t.Errorf("the list has a room %s, the tree has not", r.name)
		}
	}
}

// TestUnsafeIsInItsFiles checks that unsafe is imported only by files whose
// names say so.
func TestUnsafeIsInItsFiles(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			if spec.Path.Value == `"unsafe"` && !strings.Contains(path, "_unsafe") && !strings.HasSuffix(path, "layout_test.go") {
				t.Errorf("%s imports unsafe", path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestREADME runs the commands of the README's console blocks and compares what
// they print, times aside. The one that runs the tests is left to whoever runs
// this one.
func TestREADME(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	times := regexp.MustCompile(`[0-9.]+ ms`)
	ran := 0
	for _, block := range regexp.MustCompile("(?s)```console\n(.*?)```").FindAllSubmatch(text, -1) {
		for _, session := range strings.Split("\n"+string(block[1]), "\n$ ")[1:] {
			command, want, _ := strings.Cut(session, "\n")
			if command == "go test ./..." {
				continue
			}
			ran++
			t.Run(command, func(t *testing.T) {
				if strings.Contains(command, "--watch trace") {
					gvmtest.Need(t, gvmtest.Tracepoints)
				}
				out, err := exec.Command("sh", "-c", command).Output()
				if err != nil {
					t.Errorf("%s: %v", command, err)
				}
				if want == "" {
					return // nothing is shown
				}
				got := times.ReplaceAllString(string(bytes.TrimSpace(out)), "T ms")
				want = times.ReplaceAllString(strings.TrimSpace(want), "T ms")
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s prints (-README +got):\n%s", command, diff)
				}
			})
		}
	}
	if ran < 3 {
		t.Errorf("the README has %d commands to run, want at least 3", ran)
	}
}

// TestREADMEExample compares the README's Go code with the example of package
// vm, which is compiled.
func TestREADMEExample(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("vm/example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	shown := regexp.MustCompile("(?s)```go\n(.*?)```").FindSubmatch(text)
	if shown == nil {
		t.Fatal("the README shows no Go code")
	}
	for line := range strings.Lines(string(shown[1])) {
		if line = strings.TrimSpace(line); line != "" && !strings.Contains(string(example), line) {
			t.Errorf("the README has a line that the example has not: %s", line)
		}
	}
}
