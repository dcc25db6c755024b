package perf

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// attrSize tells the kernel which version of struct perf_event_attr it is given.
const attrSize = uint32(unsafe.Sizeof(unix.PerfEventAttr{}))
