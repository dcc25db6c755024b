package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// The tests in this file are about what only a process has: signals, a root
// directory, a user, and a standard output that the Go runtime treats specially.

// patience is how long a process may take that ought to end in milliseconds.
const patience = 20 * time.Second

// process returns gvm as a process, to be started. It is killed if it takes too
// long.
func process(t *testing.T, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	// The path by way of /proc needs no access to the directory of the binary.
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), beGVM+"=1")
	return cmd
}

// TestSignals interrupts a guest that is certainly running: it has answered.
func TestSignals(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, tt := range []struct {
		signal     syscall.Signal
		name, line string
		first      string // what is said before the end
	}{
		{unix.SIGINT, "interrupt", "run --stdin echo", ""},
		{unix.SIGTERM, "terminated", "run --stdin echo", ""},
		{unix.SIGINT, "interrupt", "run --host-ops random --seed 3 --stdin echo", "gvm: the operations of the host were those of --seed 3\n"},
	} {
		t.Run(tt.name+" of "+tt.line, func(t *testing.T) {
			var stderr bytes.Buffer
			cmd := process(t, strings.Fields(tt.line)...)
			cmd.Stderr = &stderr
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := stdin.Write([]byte("?")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(stdout, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}

			begin := time.Now()
			if err := cmd.Process.Signal(tt.signal); err != nil {
				t.Fatal(err)
			}
			rest, err := io.ReadAll(stdout)
			if err != nil {
				t.Error(err)
			}
			_ = cmd.Wait() // its error is the status
			if d := time.Since(begin); d > time.Second {
				t.Errorf("it took %v to stop", d)
			}
			want := tt.first + "gvm: interrupted: the run was stopped: " + tt.name + " signal received\n"
			if got := cmd.ProcessState.ExitCode(); got != statusFailed || stderr.String() != want || len(rest) != 0 {
				t.Errorf("%v, standard error %q, further output %q; want status %d and %q", cmd.ProcessState, &stderr, rest, statusFailed, want)
			}
		})
	}
}

// TestSecondSignal interrupts a guest whose console nobody reads: the vCPU is
// in the middle of a write, and cannot be stopped.
func TestSecondSignal(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	capacity, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096)
	if err != nil {
		t.Fatal(err)
	}
	cmd := process(t, "run", "--stdin", "echo")
	cmd.Stdin = strings.NewReader(strings.Repeat(".", capacity+1))
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for n := 0; n < capacity; time.Sleep(time.Millisecond) {
		if n, err = unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ); err != nil {
			t.Fatal(err)
		}
		if time.Since(begin) > patience {
			t.Fatalf("the guest has printed %d of %d characters in %v", n, capacity, patience)
		}
	}

	// Two signals at once may arrive as one. So there is another one after a
	// while, until the process, which does not end by itself, has ended.
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		if err := cmd.Process.Signal(unix.SIGINT); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		select {
		case <-ended:
			if s := cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != unix.SIGINT {
				t.Errorf("it ended with %v, want a death of SIGINT", cmd.ProcessState)
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestBrokenPipe runs gvm with a standard output that nobody reads.
func TestBrokenPipe(t *testing.T) {
	for _, line := range []string{"run hello", "guests", "run --help"} {
		t.Run(line, func(t *testing.T) {
			if line == "run hello" {
				gvmtest.Need(t, gvmtest.KVM)
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			r.Close()
			defer w.Close()
			var stderr bytes.Buffer
			cmd := process(t, strings.Fields(line)...)
			cmd.Stdout, cmd.Stderr = w, &stderr
			_ = cmd.Run() // its error is the status
			if cmd.ProcessState.ExitCode() != statusFailed || !strings.HasSuffix(stderr.String(), "write /dev/stdout: broken pipe\n") {
				t.Errorf("%v, standard error %q; want status %d and the error of the write", cmd.ProcessState, &stderr, statusFailed)
			}
		})
	}
}

// TestNoKVM runs gvm in a directory tree where it is alone with what it may
// find at /dev/kvm.
func TestNoKVM(t *testing.T) {
	gvmtest.Need(t, gvmtest.Root)
	binary := staticBinary(t)
	for name, tt := range map[string]struct {
		device bool        // there is something at /dev/kvm: a file, which is no device...
		mode   os.FileMode // ...with this mode
		want   string
	}{
		"no device":     {want: "open /dev/kvm: no such file or directory\ngvm: enable virtualisation in the firmware and load KVM"},
		"no permission": {device: true, mode: 0o600, want: "open /dev/kvm: permission denied\ngvm: add the user to the group of /dev/kvm"},
		"not a device":  {device: true, mode: 0o666, want: "KVM_GET_API_VERSION: /dev/kvm: inappropriate ioctl for device\ngvm: \"gvm doctor\" tells"},
	} {
		root := t.TempDir()
		write := func(name string, content []byte, mode os.FileMode) {
			name = filepath.Join(root, name)
			if err := errors.Join(
				os.MkdirAll(filepath.Dir(name), 0o755),
				os.WriteFile(name, content, 0o600),
				os.Chmod(name, mode), // whatever the umask is
			); err != nil {
				t.Fatal(err)
			}
		}
		write("gvm", binary, 0o755)
		if tt.device {
			write("dev/kvm", nil, tt.mode)
		}
		if err := os.Chmod(root, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"run hello", "run --json hello", "run --host-ops random --watch events+trace hello", "demo", "doctor"} {
			t.Run(name+"/"+line, func(t *testing.T) {
				cmd := process(t, strings.Fields(line)...)
				cmd.Path, cmd.Dir = "/gvm", "/"
				cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
				var stdout, stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = &stdout, &stderr
				err := cmd.Run()
				if cmd.ProcessState == nil {
					t.Fatal(err)
				}
				r := result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
				if line != "doctor" {
					r.check(t, statusLack, tt.want)
				} else if r.status != statusLack || !strings.Contains(r.stdout, "kvm ") || !strings.HasPrefix(r.stderr, "gvm: no guest runs on this machine: kvm: ") {
					t.Errorf("got %+v, want status %d, a report, and a message about kvm", r, statusLack)
				}
			})
		}
	}
}

// TestWatchNotPermitted runs gvm as a user who may use KVM and nothing else, and where there is
// no /proc.
func TestWatchNotPermitted(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	gvmtest.Need(t, gvmtest.Root)
	binary := staticBinary(t)
	root := t.TempDir()
	var info unix.Stat_t
	if err := errors.Join(
		unix.Stat("/dev/kvm", &info),
		os.WriteFile(filepath.Join(root, "gvm"), binary, 0o755),
		os.Chmod(root, 0o755),
		os.Mkdir(filepath.Join(root, "dev"), 0o755),
	); err != nil {
		t.Fatal(err)
	}
	device := filepath.Join(root, "dev/kvm")
	if err := unix.Mknod(device, unix.S_IFCHR|0o666, int(info.Rdev)); err != nil {
		gvmtest.Lack(t, gvmtest.Root, err)
	}
	if err := os.Chmod(device, 0o666); err != nil {
		t.Fatal(err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err == nil && fs.Flags&unix.ST_NODEV != 0 {
		gvmtest.Lack(t, gvmtest.Root, errors.New("devices in the directory for temporary files are nobody's: set TMPDIR"))
	}
	for watch, want := range map[string]string{
		"none":         "",
		"trace":        "run as root",
		"events+trace": "gvm: ", // which of several is missing depends on the machine
	} {
		t.Run(watch, func(t *testing.T) {
			cmd := process(t, "run", "--watch", watch, "hello")
			cmd.Path, cmd.Dir = "/gvm", "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			if cmd.ProcessState == nil {
				t.Fatal(err)
			}
			r := result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
			if watch == "none" {
				if want := (result{0, greeting, ""}); r != want {
					t.Errorf("got %+v, want %+v", r, want)
				}
				return
			}
			r.check(t, statusLack, want)
			if strings.Contains(r.stderr, "usermod") || strings.Contains(r.stderr, "modprobe") {
				t.Errorf("the remedy is one for KVM: %s", r.stderr)
			}
		})
	}
}

// staticBinary returns a binary that is gvm, if beGVM is set, and needs no other
// file: the test binary, unless that is linked with C or measures coverage.
func staticBinary(t *testing.T) []byte {
	t.Helper()
	file := "/proc/self/exe"
	exe, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	if exe.Section(".interp") != nil || testing.CoverMode() != "" {
		file = filepath.Join(t.TempDir(), "gvm")
		build := exec.CommandContext(t.Context(), "go", "build", "-o", file, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
	}
	binary, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return binary
}
