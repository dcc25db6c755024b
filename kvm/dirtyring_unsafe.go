package kvm

import "unsafe"

// dirtyGfn is struct kvm_dirty_gfn, an entry of a dirty ring, which is shared with
// KVM: see ringReader.
type dirtyGfn struct {
	flags  uint32 // accessed atomically
	slot   uint32
	offset uint64
}

const sizeofDirtyGfn = uint64(unsafe.Sizeof(dirtyGfn{}))

// dirtyGfnsOf returns the entries that mem is.
//
// Preconditions: mem starts at a multiple of 8.
func dirtyGfnsOf(mem []byte) []dirtyGfn {
	return unsafe.Slice((*dirtyGfn)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/int(sizeofDirtyGfn))
}
