package vm

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
)

// BenchmarkCostUnderGuest times operations that leave the slots alone on one page that a
// running guest has mapped and writes, next to their system calls: KVM drops its mapping
// in both, which takes an interrupt of the guest. Only the operation is timed. Before
// each one the guest has been through all of its pages, so the page is mapped again.
func BenchmarkCostUnderGuest(b *testing.B) {
	gvmtest.Need(b, gvmtest.KVM)
	call := func(nr uintptr, args ...uintptr) error {
		var a [6]uintptr
		copy(a[:], args)
		if _, _, errno := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}
	const fixed = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE | unix.MAP_FIXED
	for _, c := range []struct {
		op           mm.Op
		backing      mm.Backing
		raw, tracked func(m *mm.Memory, r addr.HVARange) error
	}{
		{mm.OpDiscard, mm.Anonymous,
			func(_ *mm.Memory, r addr.HVARange) error {
				return call(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), unix.MADV_DONTNEED)
			},
			(*mm.Memory).Discard},
		{mm.OpRemove, mm.SharedAnonymous,
			func(_ *mm.Memory, r addr.HVARange) error {
				return call(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), unix.MADV_REMOVE)
			},
			(*mm.Memory).Remove},
		{mm.OpMap, mm.Anonymous,
			func(_ *mm.Memory, r addr.HVARange) error {
				return call(unix.SYS_MMAP, uintptr(r.Start), uintptr(r.Bytes()), unix.PROT_READ|unix.PROT_WRITE, fixed, ^uintptr(0), 0)
			},
			(*mm.Memory).Map},
	} {
		for _, impl := range []struct {
			name string
			do   func(m *mm.Memory, r addr.HVARange) error
		}{{"raw", c.raw}, {"tracked", c.tracked}} {
			b.Run(fmt.Sprintf("op=%s/impl=%s", c.op, impl.name), func(b *testing.B) {
				const pages, page = 8, 5
				m := newMachine(b, Config{Touch: Wait, Backing: c.backing}, "counter", guests.Args{"pages": pages, "rounds": 1 << 62})
				if err := m.Start(context.Background()); err != nil {
					b.Fatal(err)
				}
				r := m.hvas(page, 1)
				var spent time.Duration
				n := 0
				for ; b.Loop(); n++ {
					m.awaitRounds(b, 2)
					begin := time.Now()
					err := impl.do(m.Memory(), r)
					spent += time.Since(begin)
					if err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(spent.Nanoseconds())/float64(n), "ns/op")
			})
		}
	}
}

// awaitRounds returns when the guest, a counter, has ended n more rounds.
func (m *Machine) awaitRounds(b *testing.B, n uint64) {
	b.Helper()
	for begin := m.mustLoad(b, guests.ResultGPA(0, 0)); m.mustLoad(b, guests.ResultGPA(0, 0)) < begin+n; {
		if ended(m) {
			b.Fatal("the run has ended")
		}
		runtime.Gosched()
	}
}
