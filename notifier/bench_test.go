package notifier

import (
	"context"
	"fmt"
	"testing"

	"github.com/secondmmu/gvm/addr"
)

var page = addr.HVAs(0x1000, addr.PageSize)

// silent does nothing when told.
type silent struct{ Notifier }

func (*silent) InvalidateRangeStart(*Invalidation) error { return nil }
func (*silent) InvalidateRangeEnd(*Invalidation)         {}
func (*silent) Release()                                 {}

// BenchmarkBracket times one start and end by the number of subscribers; none
// is an address space that had one once.
func BenchmarkBracket(b *testing.B) {
	for _, n := range []int{0, 1, 8, 64} {
		b.Run(fmt.Sprintf("subscribers=%d", n), func(b *testing.B) {
			as := New(Options{})
			for range n + 1 {
				if err := as.Register(context.Background(), new(silent)); err != nil {
					b.Fatal(err)
				}
			}
			as.subs.Load().first.Load().Unregister()
			inv := &Invalidation{Range: page, Event: Clear}
			as.Lock()
			for b.Loop() {
				if as.InvalidateRangeStart(inv) == nil {
					as.InvalidateRangeEnd(inv)
				}
			}
			as.Unlock()
		})
	}
}
