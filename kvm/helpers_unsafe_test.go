package kvm

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

func hvaOf(mem []byte) addr.HVA {
	return addr.HVA(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
}

// word returns the four bytes at mem[at] as a word that a guest may change.
func word(mem []byte, at int) *uint32 { return (*uint32)(unsafe.Pointer(&mem[at])) }

// alignedBytes returns n zero bytes that start at a multiple of 8.
func alignedBytes(n int) []byte {
	words := make([]uint64, (n+7)/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), n)
}

// takeSignal takes a signal of set that is pending for the thread.
func takeSignal(set unix.Sigset_t) error {
	var now unix.Timespec
	_, _, errno := unix.Syscall6(unix.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&set)), 0,
		uintptr(unsafe.Pointer(&now)), 8, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
