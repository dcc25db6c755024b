//go:build linux && amd64 && !race && !srcu_fenced

package srcu

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// From <linux/membarrier.h>.
const (
	membarrierPrivateExpedited         = 1 << 3
	membarrierRegisterPrivateExpedited = 1 << 4
)

// asymmetric says that updaters issue the fences of readers. It is set before
// the first reader and never again: readers without fences and updaters without
// membarrier would be no protocol at all.
var asymmetric = registerMembarrier()

func registerMembarrier() bool {
	_, _, errno := unix.RawSyscall(unix.SYS_MEMBARRIER, membarrierRegisterPrivateExpedited, 0, 0)
	return errno == 0
}

// membarrier returns after every running thread of the process has executed a
// full fence. One that does not run has executed one as it was switched out.
func membarrier() {
	if _, _, errno := unix.RawSyscall(unix.SYS_MEMBARRIER, membarrierPrivateExpedited, 0, 0); errno != 0 {
		panic("srcu: membarrier was registered and is now refused: " + errno.Error())
	}
}

// inc adds 1 to a counter that nobody else writes at the same time. The plain
// store is read by atomic loads of updaters; the compiler keeps its place among
// the calls and atomic operations around it, and the processor's reordering is
// the subject of the package comment.
func inc(counter *uint64) {
	if asymmetric {
		*counter++
	} else {
		atomic.AddUint64(counter, 1)
	}
}
