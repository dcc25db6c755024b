package gvmtest

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLeaksAreSeen leaves something of each kind behind, one after the other.
func TestLeaksAreSeen(t *testing.T) {
	before := resources()
	if leaks(before) != 0 {
		t.Fatal("something is left behind before the test")
	}
	fd, err := unix.MemfdCreate("gvm-leak", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if leaks(before) == 0 {
		t.Error("an open descriptor goes unnoticed")
	}
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if leaks(before) == 0 {
		t.Error("a guest's mapping goes unnoticed")
	}
	if err := unix.Munmap(mem); err != nil {
		t.Fatal(err)
	}
	if leaks(before) != 0 {
		t.Error("something is left behind at the end")
	}
}

// TestRequireForbidsSkips runs this binary again, for a feature that no machine
// has, with and without GVM_REQUIRE.
func TestRequireForbidsSkips(t *testing.T) {
	if os.Getenv("GVMTEST_NEED") != "" {
		Need(t, "unobtainium")
		return
	}
	for require, want := range map[string]string{"": "SKIP", "kvm,unobtainium": "FAIL"} {
		cmd := exec.Command(os.Args[0], "-test.v", "-test.run", "^TestRequireForbidsSkips$")
		cmd.Env = append(os.Environ(), "GVMTEST_NEED=1", "GVM_REQUIRE="+require)
		out, err := cmd.CombinedOutput()
		if !strings.Contains(string(out), "--- "+want) || (err != nil) != (want == "FAIL") {
			t.Errorf("with GVM_REQUIRE=%q: %v\n%s\nwant %s", require, err, out, want)
		}
	}
}
