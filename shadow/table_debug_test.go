//go:build gvm_debug

package shadow

import (
	"fmt"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/addr"
)

// TestUseOfAnotherPageInside: a fault inside a Use is a panic in a debug build, because
// whoever changes mappings may be waiting for the use.
func TestUseOfAnotherPageInside(t *testing.T) {
	b := newBed(sound, bedPages)
	defer b.close()
	defer func() {
		if p := recover(); p == nil || !strings.Contains(fmt.Sprint(p), "a guest page in use") {
			t.Errorf("panic is %v", p)
		}
	}()
	_ = b.table.Use(gpa(1), 8, addr.Read, func([]byte) error {
		_, err := b.table.Load64(gpa(2))
		return err
	})
}
