package kvm

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawIoctl is what the wrappers are measured against: the system call alone.
func rawIoctl(raw int, nr uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(raw), nr, uintptr(arg))
	return errno
}

// BenchmarkRun times a KVM_RUN that returns at once.
func BenchmarkRun(b *testing.B) {
	b.Run("exit=immediate", func(b *testing.B) {
		c := newMachine(b).vcpu
		c.SetImmediateExit(true)
		b.Run("impl=kvm", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Run(); err != errRunEINTR {
					b.Fatal(err)
				}
			}
		})
		b.Run("impl=raw", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if errno := rawIoctl(c.fd.raw, reqRun.nr, nil); errno != unix.EINTR {
					b.Fatal(errno)
				}
			}
		})
	})
}

// BenchmarkRegs times one reading of the general registers.
func BenchmarkRegs(b *testing.B) {
	c := newMachine(b).vcpu
	b.Run("impl=kvm", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.Regs(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("impl=raw", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var r Regs
			if errno := rawIoctl(c.fd.raw, reqGetRegs.nr, unsafe.Pointer(&r)); errno != 0 {
				b.Fatal(errno)
			}
		}
	})
}
