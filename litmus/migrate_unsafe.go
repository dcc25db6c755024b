package litmus

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// migrate moves a page to another NUMA node: to the first, or from there to the second. That
// it cannot be moved at the moment is no error.
func migrate(page addr.HVA) error {
	const moveOwn = 1 << 1 // MPOL_MF_MOVE
	call := func(nodes *int32, status *int32) error {
		// The arrays have one element each. All are on the stack or the heap of Go and are
		// used during the call only; the page is an integer to the kernel.
		pages := [1]uint64{uint64(page)}
		_, _, errno := unix.Syscall6(unix.SYS_MOVE_PAGES, 0, 1, uintptr(unsafe.Pointer(&pages)),
			uintptr(unsafe.Pointer(nodes)), uintptr(unsafe.Pointer(status)), moveOwn)
		if errno != 0 {
			return fmt.Errorf("move_pages: %w", errno)
		}
		return nil
	}
	var at, to int32
	if err := call(nil, &at); err != nil {
		return err
	}
	if at == 0 {
		to = 1
	}
	return call(&to, &at)
}
