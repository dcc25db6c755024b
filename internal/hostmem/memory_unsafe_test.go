package hostmem

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

func mapPages(t testing.TB, n, prot int) addr.HVA {
	return mapped(t, -1, n, prot, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

func mapFile(t testing.TB, f *os.File, n int) addr.HVA {
	return mapped(t, int(f.Fd()), n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

func mapped(t testing.TB, fd, n, prot, flags int) addr.HVA {
	t.Helper()
	p, err := unix.Mmap(fd, 0, n*addr.PageSize, prot, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(p); err != nil {
			t.Error(err)
		}
	})
	return addr.HVA(uintptr(unsafe.Pointer(unsafe.SliceData(p))))
}
