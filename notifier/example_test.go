package notifier_test

import (
	"context"
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// shadowed is a view of the mappings that has to be kept coherent.
type shadowed struct{ notifier.Notifier }

func (s *shadowed) InvalidateRangeStart(inv *notifier.Invalidation) error {
	fmt.Println("drop what is known of", inv.Range, "because of", inv.Event)
	return nil
}

func (s *shadowed) InvalidateRangeEnd(inv *notifier.Invalidation) {
	fmt.Println("what is there now can be looked up")
}

func (s *shadowed) Release() { fmt.Println("drop everything") }

// A change of mappings is announced before it is made, and after.
func Example() {
	as := notifier.New(notifier.Options{Teardown: func() error { fmt.Println("the mappings go"); return nil }})
	if err := as.Register(context.Background(), new(shadowed)); err != nil {
		fmt.Println(err)
		return
	}
	inv := &notifier.Invalidation{Range: addr.HVAs(0x10000, addr.PageSize), Event: notifier.Clear, After: addr.ReadWrite}
	as.Lock()
	if err := as.InvalidateRangeStart(inv); err == nil {
		fmt.Println("madvise(MADV_DONTNEED)")
		as.InvalidateRangeEnd(inv)
	}
	as.Unlock()
	if err := as.PutUser(); err != nil {
		fmt.Println(err)
	}
	// Output:
	// drop what is known of hva [0x10000, 0x11000) because of clear
	// madvise(MADV_DONTNEED)
	// what is there now can be looked up
	// drop everything
	// the mappings go
}

// Those who want the same subscriber of an address space share one.
func ExampleKind() {
	kind := notifier.NewKind(
		func(*notifier.AddressSpace) (*shadowed, error) { return new(shadowed), nil },
		func(*shadowed) { fmt.Println("freed") },
	)
	as, ctx := notifier.New(notifier.Options{}), context.Background()
	a, errA := kind.Get(ctx, as)
	b, errB := kind.Get(ctx, as)
	if errA != nil || errB != nil {
		fmt.Println(errA, errB)
		return
	}
	fmt.Println("the same:", a == b)
	kind.Put(a)
	kind.Put(b)
	notifier.Synchronize()
	// Output:
	// the same: true
	// freed
}
