package mm

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/pageidle"
)

// IdleLog tells which pages of host memory were used, by loads or stores of anybody: a
// guest, through KVM's page tables, this process, or others that map them. It is the
// kernel's idle page tracking, which takes CONFIG_IDLE_PAGE_TRACKING and CAP_SYS_ADMIN.
//
// It estimates. A page that was moved to another frame, or brought in, counts as used, and
// what several processes share is marked for all of them.
type IdleLog struct{ m *pageidle.Map }

// NewIdleLog returns a log, to be closed. Where the kernel has no such tracking, errors.Is
// finds errors.ErrUnsupported, and where the process may not use it, fs.ErrPermission.
func NewIdleLog() (*IdleLog, error) {
	m, err := pageidle.Open()
	if err != nil {
		return nil, fmt.Errorf("track idle pages: %w", err)
	}
	return &IdleLog{m}, nil
}

// Take calls fn for runs of pages of r that were used since the last Take of them; the
// first time, for all that are in memory. Both ends of r are page aligned. It takes a
// system call for each 64 frames that are not neighbours, and clears accessed bits in all
// page tables that map them.
func (l *IdleLog) Take(r addr.HVARange, fn func(addr.HVARange)) error {
	frames, err := l.m.Frames(r)
	if err != nil {
		return err
	}
	used, err := l.m.Used(frames)
	if err != nil {
		return err
	}
	for i := 0; i < len(used); i++ {
		first := i
		for i < len(used) && used[i] {
			i++
		}
		if first < i {
			fn(addr.HVAs(r.Start+addr.HVA(first<<addr.PageShift), uint64(i-first)<<addr.PageShift))
		}
	}
	return l.m.Mark(frames)
}

// Close gives the descriptors back.
func (l *IdleLog) Close() error { return l.m.Close() }
