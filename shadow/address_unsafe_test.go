package shadow

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

func addressOf(p []byte) addr.HVA { return addr.HVA(uintptr(unsafe.Pointer(&p[0]))) }

// load and store use the first word of p as one access.
func load(p []byte) uint64     { return atomic.LoadUint64((*uint64)(unsafe.Pointer(&p[0]))) }
func store(p []byte, v uint64) { atomic.StoreUint64((*uint64)(unsafe.Pointer(&p[0])), v) }

func protectNone(p []byte) error { return unix.Mprotect(p, unix.PROT_NONE) }
