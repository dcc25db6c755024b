package uffd

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// mapPages maps npages of anonymous memory for the length of the test.
func mapPages(t *testing.T, npages int) addr.HVARange {
	t.Helper()
	b, err := unix.Mmap(-1, 0, npages*addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return addr.HVAs(addr.HVA(uintptr(unsafe.Pointer(&b[0]))), uint64(len(b)))
}
