package notifier_test

import (
	"context"
	"fmt"
	"sync"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// device is hardware with page tables of its own, which map what the host maps
// in one range.
type device struct {
	notifier.Interval
	mu     sync.Mutex
	mapped string // what the range is, as far as the device knows; protected by mu
}

func (d *device) Invalidate(_ *notifier.Invalidation, seq uint64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.SetSeq(seq)
	d.mapped = ""
	return true
}

// A device maps what the host maps. It looks that up with no lock held, and
// looks again if it changed meanwhile.
func ExampleInterval() {
	as := notifier.New(notifier.Options{})
	buffer := addr.HVAs(0x7f0000000000, 16*addr.PageSize)
	d := new(device)
	if err := as.Insert(context.Background(), d, buffer.Start, buffer.Bytes()); err != nil {
		fmt.Println(err)
		return
	}
	defer d.Remove()

	host := "anonymous memory" // what the host maps
	remap := func() {
		as.Lock()
		defer as.Unlock()
		inv := &notifier.Invalidation{Range: buffer, Event: notifier.Unmap}
		if err := as.InvalidateRangeStart(inv); err != nil {
			fmt.Println(err)
			return
		}
		host = "a file"
		as.InvalidateRangeEnd(inv)
	}

	for try := 1; ; try++ {
		seq := d.ReadBegin()
		found := host
		fmt.Printf("try %d finds %s\n", try, found)
		if try == 1 {
			remap() // of all times, now
		}
		d.mu.Lock()
		retry := d.ReadRetry(seq)
		if !retry {
			d.mapped = found
		}
		d.mu.Unlock()
		if !retry {
			break
		}
	}
	fmt.Println("the device maps", d.mapped)

	// Output:
	// try 1 finds anonymous memory
	// try 2 finds a file
	// the device maps a file
}
