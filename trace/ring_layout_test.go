package trace

import (
	"testing"
	"unsafe"
)

// TestLayout: a cell is two cache lines, and no other ring's tail is in one with a ring's.
func TestLayout(t *testing.T) {
	if n := unsafe.Sizeof(cell{}); n != 128 {
		t.Errorf("a cell has %d bytes, want 128", n)
	}
	var r ring
	if before, size := unsafe.Offsetof(r.tail)-unsafe.Offsetof(r.taken), unsafe.Sizeof(r); before < 64 || size-unsafe.Offsetof(r.tail) < 64 {
		t.Errorf("a ring of %d bytes has its tail at %d", size, unsafe.Offsetof(r.tail))
	}
}
