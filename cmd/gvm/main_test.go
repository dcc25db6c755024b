package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// beGVM is the environment variable that makes the test binary gvm itself.
const beGVM = "GVM_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(beGVM) != "" {
		main()
	}
	gvmtest.Main(m)
}

// golden compares got with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

// result is what came of a run of gvm.
type result struct {
	status         int
	stdout, stderr string
}

// gvm executes a command line in this process.
func gvm(ctx context.Context, stdin string, args ...string) result {
	var stdout, stderr bytes.Buffer
	status := execute(ctx, append([]string{"gvm"}, args...), strings.NewReader(stdin), &stdout, &stderr)
	return result{status, stdout.String(), stderr.String()}
}

// check compares a result that is all diagnostics with the status and a part of
// the message that it should have.
func (r result) check(t *testing.T, status int, message string) {
	t.Helper()
	if r.status != status || r.stdout != "" || !strings.Contains(r.stderr, message) {
		t.Errorf("status %d, standard output %q, standard error %q; want %d, nothing, and a message with %q", r.status, r.stdout, r.stderr, status, message)
	}
	for line := range strings.Lines(r.stderr) {
		if !strings.HasPrefix(line, "gvm: ") || !strings.HasSuffix(line, "\n") {
			t.Errorf("line %q of standard error does not begin with %q", line, "gvm: ")
		}
	}
}

func TestUsage(t *testing.T) {
	for line, want := range map[string]string{
		"":                                     `which command? (see "gvm --help")`,
		"nosuch":                               `there is no command "nosuch" (see "gvm --help")`,
		"--nosuch":                             "not defined: -nosuch",
		"guests --nosuch":                      `not defined: -nosuch (see "gvm guests --help")`,
		"guests hello":                         `guests takes no argument "hello"`,
		"doctor --nosuch":                      "not defined: -nosuch",
		"doctor now":                           `doctor takes no argument "now"`,
		"demo --nosuch":                        "not defined: -nosuch",
		"demo now":                             `demo takes no argument "now"`,
		"run":                                  `which guest? "gvm guests" lists them, and the file of an image will do (see "gvm run --help")`,
		"run nosuch":                           `there is no guest "nosuch"; there are hello, counter`,
		"run help":                             `there is no guest "help"`,
		"run nosuch.elf":                       "; and there is no file nosuch.elf",
		"run ./vmlinux":                        "stat ./vmlinux: no such file or directory",
		"run ./testdata":                       "read ./testdata: it is not a regular file",
		"run main.go x=1":                      `"x=1" behind the image: its command line is --append`,
		"run --append x hello":                 "--append is for images",
		"run --mode fast main.go":              "it is not one of default, real, protected",
		"run --at here main.go":                `"here" is not an address`,
		"run --at 0xe0000 --mode long main.go": "is where the machine's tables are",
		"run --initrd nosuch main.go":          "stat nosuch: no such file or directory",
		"run --initrd main.go main.go":         "a flat image is given no modules",
		"run --mem 1M main.go":                 "1048576 bytes of RAM are not what a PC can have",
		"run --vcpus 65 main.go":               "65 vCPUs are not in 1 to 64",
		"run --vcpus 0 main.go":                "0 vCPUs are too few",
		"run --nosuch hello":                   "not defined: -nosuch",
		"run hello --json":                     "flags go before the guest: put --json before hello",
		"run hello status=1 --mem 16":          "flags go before the guest: put --mem before hello",
		"run hello -h":                         "flags go before the guest: put -h before hello",
		"run hello status":                     `parameter "status" is not of the form NAME=VALUE`,
		"run hello status=256":                 "256 is not in 0 to 255",
		"run hello status=zero":                `"zero" is not a number`,
		"run hello pages=1":                    `guest hello has no parameter "pages"; it has status`,
		"run touch order=back":                 `"back" is not sequential, random, strided`,
		"run spin pages=1":                     "guest spin has no parameters",
		"run --mem 8K counter pages=3":         "3 pages are more than the 2 of RAM",
		"run --mem 0 hello":                    `invalid value "0" for flag -mem: it is nothing`,
		"run --mem 5K hello":                   "it is not a multiple of the page size, 4096 bytes",
		"run --mem 17179869183G hello":         "are more than the 274875809792",
		"run --mem 17179869184G hello":         "it is too large",
		"run --mem 99999999999999M hello":      "it is too large",
		"run --mem -1 hello":                   "a size is a number of MiB",
		"run --mem much hello":                 "a size is a number of MiB",
		"run --mem= hello":                     "a size is a number of MiB",
		"run --mem 256G hello":                 "are more than the 274875809792 that a guest's page tables can map",
		"run --mem":                            "flag needs an argument: -mem",
		"run --vcpus 0 hello":                  "0 vCPUs are not in 1 to 32",
		"run --vcpus 33 hello":                 "33 vCPUs are not in 1 to 32",
		"run --vcpus -1 hello":                 "-1 vCPUs are not in 1 to 32",
		"run --vcpus many hello":               `invalid value "many" for flag -vcpus`,
		"run --backing tape hello":             "it is not one of anonymous, memfd",
		"run --touch go hello":                 "it is not one of stop, float, wait",
		"run --timeout -1s hello":              "a timeout of -1s is negative",
		"run --timeout 1 hello":                `invalid value "1" for flag -timeout`,
		"run --host-ops nosuch.ops hello":      "open nosuch.ops: no such file or directory",
		"run --pace 0s hello":                  "a pace of 0s is not positive",
		"run --seed -1 hello":                  `invalid value "-1" for flag -seed`,
		"run hello --host-ops random":          "flags go before the guest: put --host-ops before hello",
		"help nosuch":                          `there is no command or topic "nosuch"`,
		"help run hello":                       `there is no command or topic "run hello"`,
		"help host-ops run":                    `there is no command or topic "host-ops run"`,
		"run --json=perhaps hello":             `invalid boolean value "perhaps" for -json`,
	} {
		t.Run(line, func(t *testing.T) {
			r := gvm(t.Context(), "", strings.Fields(line)...)
			r.check(t, statusUsage, want)
			if strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("the message is %q, want one line", r.stderr)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	for line, want := range map[string]string{
		"--help":           "gvm [global options] command [command options]",
		"-h":               "GLOBAL OPTIONS:",
		"--help run":       "gvm run [command options] GUEST [NAME=VALUE ...]",
		"--help nosuch":    "GLOBAL OPTIONS:",
		"run --help":       "give the guest SIZE of RAM: in MiB",
		"run -h":           "(default: 16M; for an image, 128M)",
		"run --help hello": "gvm run [command options] GUEST [NAME=VALUE ...] | FILE",
		"guests --help":    "gvm guests [command options]",
		"doctor --help":    "gvm doctor [command options]",
		"demo --help":      "gvm demo [command options]",
		"help":             `"gvm help host-ops"`,
		"help run":         `"gvm help host-ops"`,
		"help trace show":  "gvm trace show [command options] FILE",
		"help host-ops":    "A script has one operation a line",
	} {
		t.Run(line, func(t *testing.T) {
			r := gvm(t.Context(), "", strings.Fields(line)...)
			if r.status != 0 || r.stderr != "" || !strings.Contains(r.stdout, want) {
				t.Errorf("status %d, standard error %q; want 0 and none. The help, which should have %q, is\n%s", r.status, r.stderr, want, r.stdout)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	for _, line := range []string{"--version", "--version run hello"} {
		r := gvm(t.Context(), "", strings.Fields(line)...)
		if r.status != 0 || r.stderr != "" || !strings.HasPrefix(r.stdout, "gvm ") || !strings.Contains(r.stdout, "built with go1.") {
			t.Errorf("gvm %s: %+v, want a line with the version of gvm and of Go", line, r)
		}
	}
}

// TestUnwritable runs commands that cannot write their result.
func TestUnwritable(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		gvmtest.Lack(t, gvmtest.Root, err)
	}
	defer full.Close()
	for _, line := range []string{
		"--help", "--version", "guests", "guests --json", "doctor", "doctor --json", "run --help", "help host-ops", "help run",
		"demo", "demo --json", "run hello", "run --json hello", "run --stdin echo",
	} {
		t.Run(line, func(t *testing.T) {
			if args := strings.Fields(line); args[0] == "demo" || args[0] == "run" && args[1] != "--help" {
				gvmtest.Need(t, gvmtest.KVM)
			}
			var stderr bytes.Buffer
			status := execute(t.Context(), strings.Fields("gvm "+line), strings.NewReader("hello"), full, &stderr)
			if status != statusFailed || !strings.HasSuffix(stderr.String(), "write /dev/full: no space left on device\n") {
				t.Errorf("status %d, standard error %q; want %d and the error of the write", status, stderr.String(), statusFailed)
			}
		})
	}
}

func TestInterruptedBefore(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	gvm(ctx, "", "doctor").check(t, statusFailed, "gvm: interrupted: context canceled\n")
}

func TestLack(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		want string
	}{
		"no device":        {&fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.ENOENT}, "modprobe kvm_intel"},
		"no driver":        {&fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.ENXIO}, "modprobe kvm_intel"},
		"not permitted":    {&fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.EACCES}, "usermod -aG kvm"},
		"no memory":        {unix.ENOMEM, "less memory"},
		"another is using": {unix.EBUSY, "stop the other hypervisor"},
		"no capability":    {errors.ErrUnsupported, "a newer kernel"},
		"anything else":    {io.ErrUnexpectedEOF, `"gvm doctor" tells`},
	} {
		t.Run(name, func(t *testing.T) {
			lack, ok := errors.AsType[*lackError](fmt.Errorf("run: %w", lack(fmt.Errorf("make a machine: %w", tt.err))))
			if !ok || !errors.Is(lack, tt.err) || !strings.Contains(lack.remedy, tt.want) || strings.Contains(lack.remedy, "\n") {
				t.Errorf("lack(%v) is %+v, want a line with %q for a remedy", tt.err, lack, tt.want)
			}
		})
	}
}
