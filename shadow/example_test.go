package shadow_test

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
)

// A tracker follows the mappings of a guest's memory: with slots, which go to a
// backend such as KVM, and with translations, through which the VMM itself uses the
// memory. What it writes is in the dirty log.
func ExampleTracker() {
	memory := mm.New(nil)
	defer memory.Close()
	region, err := memory.NewRegion(mm.RegionConfig{Name: "ram", Size: 8 * addr.PageSize})
	if err != nil {
		fmt.Println(err)
		return
	}
	tracker := shadow.NewTracker(memory, noBackend{}, 32, nil)
	as := memory.AddressSpace()
	if err := as.Register(context.Background(), tracker); err != nil {
		fmt.Println(err)
		return
	}
	defer tracker.UnregisterNoRelease()
	as.RLock()
	err = tracker.AddWindow(shadow.Window{Name: "ram", GFN: 0x100, NPages: 8, HVA: region.Range.Start})
	as.RUnlock()
	if err != nil {
		fmt.Println(err)
		return
	}

	view := tracker.Table().NewView(context.Background())
	defer view.Close()
	const gpa = addr.GPA(0x102000)
	if err := view.Store64(gpa, 42); err != nil {
		fmt.Println(err)
	}
	page := addr.HVAs(region.Range.Start+2*addr.PageSize, addr.PageSize)
	if err := memory.Unmap(page); err != nil {
		fmt.Println(err)
	}
	for s := range tracker.Slots().All() {
		fmt.Println("slot", s.ID, s.GFNs())
	}
	_, err = view.Load64(gpa)
	fmt.Println(err, errors.Is(err, syscall.EFAULT))
	if err := memory.Map(page); err != nil {
		fmt.Println(err)
	}
	v, err := view.Load64(gpa)
	fmt.Println("mapped again:", v, err)

	harvest, err := tracker.Table().Dirty().Begin()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("dirty:", harvest.Dirty())
	if err := harvest.Commit(); err != nil { // the pages have been copied
		fmt.Println(err)
	}
	// Output:
	// slot 0 gfn [0x100, 0x102)
	// slot 1 gfn [0x103, 0x108)
	// read-only access to 8 bytes at gpa 0x102000: no memory slot shows it true
	// mapped again: 0 <nil>
	// dirty: gfn [0x102, 0x103)
}

// Memslots without a tracker have the rules of KVM's request.
func ExampleMemslots_Set() {
	slots := shadow.NewMemslots(noBackend{}, 32, nil)
	ram := shadow.Slot{ID: 0, GFN: 0, NPages: 16, HVA: 0x7f0000000000, Access: addr.ReadWrite}
	fmt.Println(slots.Set(ram))
	over := shadow.Slot{ID: 1, GFN: 8, NPages: 16, HVA: 0x7f0000100000, Access: addr.Read}
	fmt.Println(slots.Set(over))
	ram.GFN = 0x100
	fmt.Println(slots.Set(ram), slots.Set(over))
	for s := range slots.Slots().All() {
		fmt.Println(s)
	}
	// Output:
	// <nil>
	// create slot 1 gfn [0x8, 0x18) -> hva [0x7f0000100000, 0x7f0000110000) read-only: slot 0 gfn [0x0, 0x10) -> hva [0x7f0000000000, 0x7f0000010000) read-write: another slot has some of the frames
	// <nil> <nil>
	// slot 1 gfn [0x8, 0x18) -> hva [0x7f0000100000, 0x7f0000110000) read-only
	// slot 0 gfn [0x100, 0x110) -> hva [0x7f0000000000, 0x7f0000010000) read-write
}
