//go:build gvm_debug

package lockorder

import (
	"fmt"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestOrder(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func()
		want string // part of the panic; empty: there is none
	}{
		"in order":          {func() { Acquire(MmapLock); Acquire(Section); Acquire(Consumer); Acquire(Chain) }, ""},
		"any release order": {func() { Acquire(MmapLock); Acquire(Chain); Release(MmapLock); Release(Chain); Wait(MmapLock) }, ""},
		"sections nest":     {func() { Acquire(Section); Acquire(Section) }, ""},
		"all locks nest":    {func() { Acquire(AllLocks); Acquire(FileMap); Acquire(FileMap); Acquire(AnonMap) }, ""},
		"two reverse maps":  {func() { Acquire(FileMap); Acquire(FileMap) }, "(file) is taken"},
		"twice":             {func() { Acquire(MmapLock); Acquire(MmapLock) }, "the mapping lock is taken"},
		"against the order": {func() { Acquire(Consumer); Acquire(MmapLock) }, "the mapping lock is taken"},
		"wait inside":       {func() { Acquire(Consumer); Wait(Section) }, "inside a subscriber's lock"},
		"wait for oneself":  {func() { Acquire(Section); Wait(Section) }, "inside an invalidation"},
		"wait outside":      {func() { Acquire(MmapLock); Wait(Section) }, ""},
		"not held":          {func() { Release(Chain) }, "does not hold it"},
	} {
		t.Run(name, func(t *testing.T) {
			got := make(chan string)
			go func() { // a goroutine of its own, which holds nothing yet
				defer func() { got <- fmt.Sprint(recover()) }()
				tt.do()
			}()
			msg := <-got
			if tt.want == "" && msg != "<nil>" || !strings.Contains(msg, tt.want) {
				t.Errorf("panic is %q, want %q in it", msg, tt.want)
			}
			if tt.want != "" && !strings.Contains(msg, "on_test.go:") {
				t.Errorf("panic %q does not name the place", msg)
			}
		})
	}
}
