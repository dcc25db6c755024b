package srcu_test

import (
	"fmt"
	"sync/atomic"

	"github.com/secondmmu/gvm/srcu"
)

// An updater replaces what readers look at, waits for those who may still look
// at the old one, and reuses that.
func Example() {
	d := srcu.New()
	var current atomic.Pointer[[]string]
	current.Store(&[]string{"boot", "ram"})

	idx := d.ReadLock()
	for _, name := range *current.Load() {
		fmt.Println(name)
	}
	d.ReadUnlock(idx)

	old := current.Swap(&[]string{"boot"})
	d.Synchronize()
	clear(*old) // nobody looks at it any more
	fmt.Println(len(*current.Load()), "left")

	// Output:
	// boot
	// ram
	// 1 left
}

// The object carries the Head that its callback hangs on: to free it later takes
// no memory and does not wait.
func ExampleDomain_Call() {
	type mapping struct {
		head srcu.Head
		name string
	}
	d := srcu.New()
	var current atomic.Pointer[mapping]
	current.Store(&mapping{name: "old"})

	old := current.Swap(&mapping{name: "new"})
	d.Call(&old.head, func(*srcu.Head) { fmt.Println("free", old.name) })

	d.Barrier()
	fmt.Println("keep", current.Load().name)

	// Output:
	// free old
	// keep new
}

// An updater that has other things to do asks from time to time.
func ExampleDomain_StartPoll() {
	d := srcu.New()
	idx := d.ReadLock()
	cookie := d.StartPoll()
	fmt.Println("inside:", d.Poll(cookie))
	d.ReadUnlock(idx)

	for !d.Poll(cookie) {
		d.Synchronize() // or anything else
	}
	fmt.Println("outside:", d.Poll(cookie))

	// Output:
	// inside: false
	// outside: true
}

// A loop that opens sections all its life has counters of its own.
func ExampleReader() {
	d := srcu.New()
	var generation atomic.Uint64

	r := d.NewReader()
	defer r.Close()
	for range 3 {
		idx := r.ReadLock()
		fmt.Println("run with slots of generation", generation.Load())
		r.ReadUnlock(idx)
		generation.Add(1)
	}

	// Output:
	// run with slots of generation 0
	// run with slots of generation 1
	// run with slots of generation 2
}
