package litmus

import (
	"os"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// TestMerge has the kernel merge pages, for which root may have to start ksmd, and runs the test of
// that.
func TestMerge(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	const run = "/sys/kernel/mm/ksm/run"
	x, err := Lookup("merge")
	if err != nil {
		t.Fatal(err)
	}
	if ThisHost().Lacks(x) != nil {
		gvmtest.Need(t, gvmtest.Root)
		before, err := os.ReadFile(run)
		if err != nil {
			t.Logf("not run: the kernel has no KSM: %v", err)
			return
		}
		if err := os.WriteFile(run, []byte("1"), 0); err != nil {
			gvmtest.Lack(t, gvmtest.Root, err)
		}
		defer func() {
			if err := os.WriteFile(run, before, 0); err != nil {
				t.Error(err)
			}
		}()
	}
	if r := runTest(t, x, quick(t, x)); r.Verdict != OK {
		t.Errorf("the verdict is %q: %s", r.Verdict, r.Reason)
	}
}
