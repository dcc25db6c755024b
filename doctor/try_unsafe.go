package doctor

import (
	"unsafe"

	"github.com/secondmmu/gvm/addr"
)

// rangeOf returns the addresses of mem, which lies outside the Go heap.
func rangeOf(mem []byte) addr.HVARange {
	return addr.HVAs(addr.HVA(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))), uint64(len(mem)))
}
