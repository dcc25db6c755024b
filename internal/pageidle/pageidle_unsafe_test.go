package pageidle

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

// TestOwnFrames looks the frames of this process up, which the kernel tells root.
func TestOwnFrames(t *testing.T) {
	gvmtest.Need(t, gvmtest.Root)
	b, err := unix.Mmap(-1, 0, 2*addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	b[0] = 1
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/bitmap", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := open(dir+"/bitmap", "/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	frames, err := m.Frames(addr.HVAs(addr.HVA(uintptr(unsafe.Pointer(&b[0]))), uint64(len(b))))
	if err != nil || frames[0] == 0 || frames[1] != 0 {
		t.Errorf("of a page that was stored to and one that was not, the frames are %v, %v", frames, err)
	}
}
