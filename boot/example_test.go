package boot_test

import (
	"fmt"

	"github.com/secondmmu/gvm/boot"
)

// A flat image of two bytes, in 64-bit mode.
func Example() {
	plan, err := boot.Load([]byte{0xeb, 0xfe}, boot.Options{Layout: boot.Layout{RAM: 16 << 20}, Mode: boot.Long})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, s := range plan.Segments {
		fmt.Printf("0x%06x 0x%04x %s\n", uint64(s.GPA), s.Size, s.Name)
	}
	fmt.Printf("begins at 0x%x in mode %v\n", plan.CPU.Entry, plan.CPU.Mode)
	// Output:
	// 0x0e0000 0x6000 page tables
	// 0x0e6000 0x0020 descriptors
	// 0x0e7000 0x1000 task state
	// 0x0f0000 0x00e8 MP tables
	// 0x0f2000 0x0024 ACPI root pointer
	// 0x0f2100 0x029a ACPI tables
	// 0x100000 0x0002 the image
	// begins at 0x100000 in mode long
}
