//go:build gvm_debug

package notifier

import (
	"context"
	"fmt"
	"strings"
	"testing"
)

// TestLockOrderIsChecked does what would wait for ever sooner or later, and panics
// at once in a debug build.
func TestLockOrderIsChecked(t *testing.T) {
	ctx := context.Background()
	for name, tt := range map[string]struct {
		do   func(w *world, s *brackets)
		want string
	}{
		"Unregister with the mapping lock": {func(w *world, s *brackets) { w.Lock(); s.Unregister() }, "waits for whoever holds the mapping lock"},
		"Unregister in a bracket": {func(w *world, s *brackets) {
			w.RLock()
			_ = w.InvalidateRangeStart(clearing(page))
			s.Unregister()
		}, "waits for whoever holds the mapping lock"},
		"PutUser with the mapping lock":  {func(w *world, _ *brackets) { w.Lock(); _ = w.PutUser() }, "waits for whoever holds the mapping lock"},
		"Synchronize with a reverse map": {func(w *world, _ *brackets) { w.file.RLock(); Synchronize() }, "inside a reverse map's lock (file)"},
		"Register in a bracket": {func(w *world, _ *brackets) {
			w.file.RLock()
			_ = w.InvalidateRangeStart(clearing(page))
			_ = w.Register(ctx, new(base))
		}, "the mapping lock is taken"},
		"RegisterLocked in a bracket": {func(w *world, _ *brackets) {
			w.Lock()
			_ = w.InvalidateRangeStart(clearing(page))
			_ = w.RegisterLocked(ctx, new(base))
		}, "all-locks is taken"},
		"the mapping lock twice":            {func(w *world, _ *brackets) { w.RLock(); w.RLock() }, "the mapping lock is taken"},
		"the mapping lock in a reverse map": {func(w *world, _ *brackets) { w.file.RLock(); w.RLock() }, "the mapping lock is taken"},
		"two reverse maps":                  {func(w *world, _ *brackets) { w.file.RLock(); NewReverseMap(HugeMap).RLock() }, "a reverse map's lock (huge pages) is taken"},
		"a bracket without a lock":          {func(w *world, _ *brackets) { _ = w.InvalidateRangeStart(clearing(page)) }, "without the mapping lock"},
		"ReadBegin in a bracket": {func(w *world, _ *brackets) {
			i := &spanOver{invalidate: func(*Invalidation) bool { return true }}
			_ = w.Insert(ctx, i, page.Start, 1)
			w.RLock()
			_ = w.InvalidateRangeStart(clearing(page))
			i.ReadBegin()
		}, "waits for whoever holds an invalidation"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(sound)
			s := &brackets{starter: willing, ender: func(*Invalidation) {}}
			w.register(s)
			got := make(chan string)
			go func() { // a goroutine of its own, which takes what it holds with it
				defer func() { got <- fmt.Sprint(recover()) }()
				tt.do(w, s)
			}()
			if msg := <-got; !strings.Contains(msg, tt.want) || !strings.Contains(msg, "lockorder_debug_test.go:") {
				t.Errorf("panic is %q, want %q in it, and the place", msg, tt.want)
			}
		})
	}
}
