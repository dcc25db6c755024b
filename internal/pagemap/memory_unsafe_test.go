package pagemap

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// mapPages maps npages for the length of the test, anonymous if fd is -1. A
// touch of one page maps no other of anonymous memory.
func mapPages(t *testing.T, npages, fd, sharing int) ([]byte, addr.HVARange) {
	t.Helper()
	if fd < 0 {
		sharing |= unix.MAP_ANON
	}
	b, err := unix.Mmap(fd, 0, npages*addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, sharing)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	if err := unix.Madvise(b, unix.MADV_NOHUGEPAGE); err != nil && err != unix.EINVAL { // EINVAL: there are no huge pages
		t.Fatal(err)
	}
	return b, addr.HVAs(addr.HVA(uintptr(unsafe.Pointer(&b[0]))), uint64(len(b)))
}
