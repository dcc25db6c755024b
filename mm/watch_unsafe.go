package mm

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// resident reports whether a page of r, which is shared memory, is in memory, whether or
// not it is mapped here. It wraps mincore(2), whose error is ENOMEM where nothing is
// mapped.
func resident(r addr.HVARange) (bool, error) {
	var pages [1024]byte
	for r.Start < r.End {
		n := min(r.NPages(), uint64(len(pages)))
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(r.Start), uintptr(n<<addr.PageShift), uintptr(unsafe.Pointer(&pages))); errno != 0 {
			return false, fmt.Errorf("mincore of %v: %w", r, errno)
		}
		for _, page := range pages[:n] {
			if page&1 != 0 {
				return true, nil
			}
		}
		r.Start += addr.HVA(n << addr.PageShift)
	}
	return false, nil
}
