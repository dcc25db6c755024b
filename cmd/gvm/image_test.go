package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/trace"
)

const images = "../../boot/images/"

// TestRunImages runs what package boot's tests compare with QEMU.
func TestRunImages(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, name := range []string{"interrupts", "paging", "processors"} {
		text, err := os.ReadFile(images + name + ".txt")
		if err != nil {
			t.Fatal(err)
		}
		printed, last, _ := strings.Cut(string(text), "exit status ")
		status, err := strconv.Atoi(strings.TrimSpace(last))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := gvm(t.Context(), "", "run", "--timeout", "20s", "--vcpus", "2", images+name+".elf"), (result{status, printed, ""}); got != want {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
		}
	}
}

// writeImage writes a flat image, and returns its name.
func writeImage(t *testing.T, code ...byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, code, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestRunImageOptions runs an image with what can be asked for beside it.
func TestRunImageOptions(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	dir := t.TempDir()
	serial, recording := filepath.Join(dir, "serial"), filepath.Join(dir, "recording")
	// It echoes a character from its serial port, greets on the debug console, and halts.
	echo := writeImage(t,
		0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, // mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz to the in
		0xba, 0xf8, 0x03, 0xec, 0xee, // mov $0x3f8, %dx; in %dx, %al; out %al, %dx
		0xb0, '!', 0xe6, 0xe9, 0xf4, // mov $'!', %al; out %al, $0xe9; hlt
	)
	if got, want := gvm(t.Context(), "x", "run", "--timeout", "20s", "--stdin", "--serial", serial, "--trace", recording, echo), (result{0, "!", ""}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got, err := os.ReadFile(serial); err != nil || string(got) != "x" {
		t.Errorf("the serial port sent %q, %v", got, err)
	}
	f, err := os.Open(recording)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rec, err := trace.Read(recording, f)
	if err != nil || rec.Header.Guest != echo || len(rec.Events) == 0 {
		t.Errorf("the recording is of %q and has %d events, %v", rec.Header.Guest, len(rec.Events), err)
	}

	report, r := runJSON(t, "--timeout 20s --mem 4M "+writeImage(t, 0xb0, 3, 0xe6, 0xf4))
	if r.status != 7 || report.Format != "flat" || report.Status == nil || *report.Status != 7 || len(report.VCPUs) != 0 {
		t.Errorf("%+v, from %+v", report, r)
	}
	gvm(t.Context(), "", "run", "--serial", dir, echo).check(t, statusFailed, "is a directory")
}

// TestRunImageHostOps changes pages under an image that uses them: it increments words of
// 16 pages until one is found 0 again, whose page has been discarded.
func TestRunImageHostOps(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	image := writeImage(t,
		0xbf, 0x00, 0x00, 0x20, 0x00, // mov $0x200000, %edi
		0xff, 0x07, // inc (%edi)
		0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add $0x1000, %edi
		0x81, 0xff, 0x00, 0x00, 0x21, 0x00, // cmp $0x210000, %edi
		0x75, 0xf0, // jne to the inc
		0x46,                               // inc %esi: the rounds
		0x3b, 0x35, 0x00, 0x50, 0x20, 0x00, // cmp 0x205000, %esi
		0x74, 0xe2, // je to the first
		0xb0, 0x15, 0xe6, 0xf4, // mov $21, %al; out %al, $0xf4
	)
	script := filepath.Join(t.TempDir(), "ops")
	if err := os.WriteFile(script, []byte("every 1ms discard 517\nat 2ms unmap 520\non fault map it\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ops := range []string{script, "random"} {
		args := []string{"run", "--timeout", "20s", "--mem", "4M", "--mode", "protected", "--host-ops", ops, image}
		if ops == "random" {
			args = append([]string{"run", "--pace", "5ms", "--seed", "5"}, args[1:]...)
		}
		if got := gvm(t.Context(), "", args...); ops == script && got != (result{43, "", ""}) {
			t.Errorf("--host-ops %s: %+v, want status 43", ops, got)
		} else if got.status == statusUsage || got.status == statusLack {
			t.Errorf("--host-ops %s: %+v", ops, got)
		}
	}
}

// TestBadImage has an image that is at fault.
func TestBadImage(t *testing.T) {
	bad := make([]byte, 0x40)
	copy(bad, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(bad[0x10:], 2)
	gvm(t.Context(), "", "run", writeImage(t, bad...)).check(t, statusFailed, "elf image: e_machine, at offset 0x12: 0 is not x86")
}

// TestTerminal types at a guest.
func TestTerminal(t *testing.T) {
	for name, tt := range map[string]struct {
		typed, want string
		left        bool
	}{
		"text":            {"hello\r\x03", "hello\r\x03", false},
		"left":            {"ab\x01xcd", "ab", true},
		"the escape":      {"a\x01\x01x", "a\x01x", false},
		"something else":  {"a\x01b", "ab", false},
		"nothing":         {"", "", false},
		"only the escape": {"\x01", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(tt.typed), iotest.OneByteReader(strings.NewReader(tt.typed))} {
				got, err := io.ReadAll(&terminal{r: r})
				if string(got) != tt.want || errors.Is(err, errLeft) != tt.left || err != nil && !tt.left {
					t.Errorf("the guest is given %q, %v; want %q", got, err, tt.want)
				}
			}
		})
	}
}

// TestOpenTerminal types at a pseudoterminal, which is as before in the end.
func TestOpenTerminal(t *testing.T) {
	r := strings.NewReader("x")
	if got, restore, err := openTerminal(r); got != io.Reader(r) || err != nil {
		t.Errorf("what is no terminal: %v, %v", got, err)
	} else {
		restore()
	}

	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		gvmtest.Lack(t, gvmtest.Terminal, err)
	}
	defer keyboard.Close()
	if err := unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(int(keyboard.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		gvmtest.Lack(t, gvmtest.Terminal, err)
	}
	defer tty.Close()
	modes := func() unix.Termios {
		m, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return *m
	}
	before := modes()
	typed, restore, err := openTerminal(tty)
	if err != nil {
		t.Fatal(err)
	}
	if modes() == before {
		t.Error("the terminal is as it was")
	}
	if _, err := keyboard.WriteString("a\x03\r\x01x"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(typed); string(got) != "a\x03\r" || !errors.Is(err, errLeft) {
		t.Errorf("the guest is given %q, %v", got, err)
	}
	restore()
	if modes() != before {
		t.Error("the terminal is not as before")
	}
}
