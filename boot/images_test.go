package boot

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

var update = flag.Bool("update", false, "build the images and write down what they do under QEMU")

// buildImage builds an image in images from its source, as images/src/image.h describes it.
func buildImage(t *testing.T, name, to string) {
	t.Helper()
	args := strings.Fields("-m32 -std=gnu11 -O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -no-pie -fno-stack-protector -fcf-protection=none " +
		"-fno-asynchronous-unwind-tables -mgeneral-regs-only -nostdlib -static -s -Wl,-T,image.ld -Wl,--build-id=none -Wl,-z,max-page-size=4096 -o")
	cmd := exec.Command("cc", append(args, to, "start.S", "image.c", name+".c")...)
	cmd.Dir = "images/src"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
}

// underQEMU runs an image and returns what it prints, and on a last line its status.
func underQEMU(t *testing.T, image string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-system-x86_64", strings.Fields("-M pc -accel tcg -m 64M -smp 2 -nodefaults -no-user-config -no-reboot -display none "+
		"-chardev stdio,mux=on,id=out,signal=off -serial chardev:out -device isa-debugcon,iobase=0xe9,chardev=out -device isa-debug-exit,iobase=0xf4,iosize=4 -kernel")...)
	cmd.Args = append(cmd.Args, image)
	cmd.WaitDelay = time.Second
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	var failed *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &failed) {
		t.Fatalf("%v: %v\n%s", cmd, err, complaints.Bytes())
	}
	if complaints.Len() > 0 {
		t.Logf("QEMU says: %s", complaints.Bytes())
	}
	return fmt.Sprintf("%sexit status %d\n", strings.ReplaceAll(out.String(), "\r", ""), cmd.ProcessState.ExitCode())
}

// TestImages runs the images under QEMU, as they are stored and as their sources give them,
// and compares what they do with what is written down. Package vm's tests compare the same
// with what they do there.
func TestImages(t *testing.T) {
	gvmtest.Need(t, gvmtest.CC)
	gvmtest.Need(t, gvmtest.QEMU)
	sources, err := filepath.Glob("images/src/*.c")
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range sources {
		name := strings.TrimSuffix(filepath.Base(source), ".c")
		if name == "image" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			stored, text := "images/"+name+".elf", "images/"+name+".txt"
			built, err := filepath.Abs(filepath.Join(t.TempDir(), name))
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if built, err = filepath.Abs(stored); err != nil {
					t.Fatal(err)
				}
			}
			buildImage(t, name, built)
			got := underQEMU(t, built)
			if *update {
				if err := errors.Join(os.Chmod(built, 0o644), os.WriteFile(text, []byte(got), 0o644)); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("the image that the source gives (-%s +QEMU):\n%s", text, diff)
			}
			if diff := cmp.Diff(string(want), underQEMU(t, stored)); diff != "" {
				t.Errorf("%s (-%s +QEMU):\n%s", stored, text, diff)
			}
			image, err := os.ReadFile(stored)
			if err != nil {
				t.Fatal(err)
			}
			load(t, image, options)
		})
	}
}
