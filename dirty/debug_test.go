//go:build gvm_debug

package dirty

import (
	"strings"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/srcu"
)

// TestBeginInsideSection: a debug build of package srcu sees that it waits for
// itself. The marks are in the harvest that never was, and the log says so.
func TestBeginInsideSection(t *testing.T) {
	l := NewLog(srcu.New())
	l.inSection(func() {
		l.Mark(4)
		got := gvmtest.Panics(func() { _, _ = l.Begin() })
		if want := "srcu: SynchronizeExpedited waits for the section that its own goroutine opened at "; !strings.HasPrefix(got, want) {
			t.Errorf("Begin inside a section panics with %q, want %q", got, want)
		}
	})
	if _, err := l.Begin(); err != ErrOpen {
		t.Errorf("Begin after that says %v, want ErrOpen", err)
	}
}
