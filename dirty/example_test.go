package dirty_test

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/srcu"
)

// Two sources say what is dirty, and a third one what need not be copied. The
// ranges may be of any size.
func ExampleSet() {
	var set dirty.Set
	set.AddBitmap(0x100, []uint64{0b1011}) // KVM's log of a slot that begins at gfn 0x100
	set.AddRange(addr.GFNRange{Start: 0x8000, End: 1 << 28})
	fmt.Println(&set)

	var balloon dirty.Set
	balloon.AddRange(addr.GFNRange{Start: 0x10000, End: 1 << 28})
	set.Subtract(&balloon)
	for r := range set.Runs() {
		fmt.Println("copy", r)
	}
	fmt.Println(set.Len(), "frames")

	// Output:
	// gfn [0x100, 0x102), gfn [0x103, 0x104), gfn [0x8000, 0x10000000)
	// copy gfn [0x100, 0x102)
	// copy gfn [0x103, 0x104)
	// copy gfn [0x8000, 0x10000)
	// 32771 frames
}

// A snapshot that fails gives back what it has taken.
func ExampleLog() {
	domain := srcu.New()
	log := dirty.NewLog(domain)
	memory := map[addr.GFN]string{}
	store := func(gfn addr.GFN, s string) {
		idx := domain.ReadLock()
		defer domain.ReadUnlock(idx)
		log.Mark(gfn) // before the store
		memory[gfn] = s
	}
	store(4, "boot")
	store(5, "stack")

	harvest, err := log.Begin()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("first: ", harvest.Dirty())
	store(9, "heap")
	if _, err := log.Begin(); err != nil {
		fmt.Println(err)
	}
	if err := harvest.Abort(); err != nil { // the disk is full
		fmt.Println(err)
	}

	if harvest, err = log.Begin(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("second:", harvest.Dirty())
	if err := harvest.Commit(); err != nil {
		fmt.Println(err)
	}

	// Output:
	// first:  gfn [0x4, 0x6)
	// dirty: a harvest is open, and neither committed nor aborted: device or resource busy
	// second: gfn [0x4, 0x6), gfn [0x9, 0xa)
}
