package pagemap

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// reqScan is PAGEMAP_SCAN, composed as <asm-generic/ioctl.h> does: direction
// (both), size of the argument, type, number.
const reqScan = 3<<30 | unsafe.Sizeof(scanArg{})<<16 | 'f'<<8 | 16

// scanArg is struct pm_scan_arg. Being a pointer, vec follows a buffer that lies
// on a goroutine's stack when the stack moves.
type scanArg struct {
	size     uint64
	flags    Flags
	rng      addr.HVARange // start, end
	walkEnd  addr.HVA      // out
	vec      *Region       // struct page_region
	vecLen   uint64
	maxPages uint64
	inverted Categories // category_inverted
	all      Categories // category_mask
	any      Categories // category_anyof_mask
	report   Categories // return_mask
}

func (p *PageMap) scan(req Request, regions []Region) (n int, end addr.HVA, err error) {
	arg := scanArg{
		size:     uint64(unsafe.Sizeof(scanArg{})),
		flags:    req.Flags,
		rng:      req.Range,
		vecLen:   uint64(len(regions)),
		inverted: req.Inverted,
		all:      req.All,
		any:      req.Any,
		report:   req.Report,
	}
	if len(regions) > 0 { // the kernel refuses a vec of no elements
		arg.vec = &regions[0]
	}
	var (
		r     uintptr
		errno unix.Errno
	)
	if p.conn.Control(func(raw uintptr) {
		r, _, errno = unix.Syscall(unix.SYS_IOCTL, raw, reqScan, uintptr(unsafe.Pointer(&arg)))
	}) != nil {
		return 0, 0, os.ErrClosed // Control fails for no other reason
	}
	if errno != 0 {
		return 0, 0, errno
	}
	return int(r), arg.walkEnd, nil
}
