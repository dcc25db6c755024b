package perf

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attrSize tells the kernel which version of struct perf_event_attr it is given.
const attrSize = uint32(unsafe.Sizeof(unix.PerfEventAttr{}))

// Where struct perf_event_mmap_page, the control page of a ring, has its two positions:
// how many bytes the kernel has written, and how many have been read.
const (
	dataHead = 1024
	dataTail = 1032
)

func (g *ring) word(offset uintptr) *uint64 {
	return (*uint64)(unsafe.Pointer(&g.memory[offset])) // a page is mapped there, so it is aligned
}

// position returns what has been read and what has been written.
func (g *ring) position() (tail, head uint64) {
	return *g.word(dataTail), atomic.LoadUint64(g.word(dataHead))
}

// release gives the kernel the room before tail back.
func (g *ring) release(tail uint64) { atomic.StoreUint64(g.word(dataTail), tail) }

// countLost reads how many records are lost, if the kernel counts them.
func (g *ring) countLost() (lost uint64, ok bool) {
	var counts [2]uint64 // passes, losses
	b := unsafe.Slice((*byte)(unsafe.Pointer(&counts)), unsafe.Sizeof(counts))
	for _, fd := range g.fds {
		n, err := unix.Read(fd, b)
		if err != nil || n != len(b) {
			return 0, false
		}
		lost += counts[1]
	}
	return lost, true
}

// setFilter wraps PERF_EVENT_IOC_SET_FILTER, which a descriptor takes once.
func setFilter(fd int, filter string) error {
	text, err := unix.BytePtrFromString(filter)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(text))); errno != 0 {
		return errno
	}
	return nil
}
