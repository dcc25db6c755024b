// Package uffd wraps userfaultfd, through which the kernel hands page faults and
// changes of the address space to the program that they happen in.
package uffd

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// Features is a set of what a userfaultfd can do beyond reporting missing pages
// of anonymous memory. The bits and names are those of <linux/userfaultfd.h>.
type Features uint64

const (
	PagefaultFlagWP   Features = 1 << iota // write-protect faults, of anonymous memory
	EventFork                              // fork is reported; takes CAP_SYS_PTRACE
	EventRemap                             // mremap is reported
	EventRemove                            // madvise that discards is reported
	MissingHugetlbfs                       // missing faults of hugetlbfs
	MissingShmem                           // missing faults of shared memory
	EventUnmap                             // munmap is reported
	Sigbus                                 // a fault is a SIGBUS instead of a message
	ThreadID                               // a fault names its thread
	MinorHugetlbfs                         // minor faults of hugetlbfs
	MinorShmem                             // minor faults of shared memory
	ExactAddress                           // a fault's address keeps its offset in the page
	WPHugetlbfsShmem                       // write-protect faults of hugetlbfs and shared memory
	WPUnpopulated                          // pages not there yet can be write-protected
	Poison                                 // UFFDIO_POISON
	WPAsync                                // the kernel resolves write-protect faults and remembers them
	Move                                   // UFFDIO_MOVE
	firstUnknownShift = iota
)

var featureNames = [firstUnknownShift]string{
	"PAGEFAULT_FLAG_WP",
	"EVENT_FORK",
	"EVENT_REMAP",
	"EVENT_REMOVE",
	"MISSING_HUGETLBFS",
	"MISSING_SHMEM",
	"EVENT_UNMAP",
	"SIGBUS",
	"THREAD_ID",
	"MINOR_HUGETLBFS",
	"MINOR_SHMEM",
	"EXACT_ADDRESS",
	"WP_HUGETLBFS_SHMEM",
	"WP_UNPOPULATED",
	"POISON",
	"WP_ASYNC",
	"MOVE",
}

// Names returns the features of f by the kernel's names, in the order of their
// bits. All bits without a name here are one last element, in hexadecimal.
func (f Features) Names() []string {
	names := []string{}
	for i, name := range featureNames {
		if f&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if rest := f >> firstUnknownShift << firstUnknownShift; rest != 0 {
		names = append(names, fmt.Sprintf("%#x", uint64(rest)))
	}
	return names
}

// String returns the names of f joined by "|", and "none" for the empty set.
func (f Features) String() string {
	if f == 0 {
		return "none"
	}
	return strings.Join(f.Names(), "|")
}

// Origin is what made a descriptor.
type Origin string

const (
	Syscall Origin = "userfaultfd(2)"
	Device  Origin = "/dev/userfaultfd"
)

// FD is a userfaultfd of the calling process. It is safe for concurrent use.
type FD struct {
	file         *os.File
	conn         syscall.RawConn // of file
	offered      Features
	origin       Origin
	kernelFaults bool
}

// Open makes a userfaultfd with the features want, and nothing registered.
//
// It asks the system call first, then the device, and settles last for a
// descriptor that handles only faults raised in user mode, which every process
// may have; see [FD.KernelFaults].
//
// The error is EINVAL if the kernel does not offer all of want, and EPERM if
// want has EventFork and the process lacks CAP_SYS_PTRACE.
func Open(want Features) (*FD, error) {
	u := &FD{}
	raw, err := u.create()
	if err != nil {
		return nil, err
	}
	if u.offered, err = handshake(raw, want); err != nil {
		unix.Close(raw)
		return nil, fmt.Errorf("UFFDIO_API with features %v: %w", want, err)
	}
	u.file = os.NewFile(uintptr(raw), string(u.origin))
	if u.conn, err = u.file.SyscallConn(); err != nil {
		u.file.Close()
		return nil, err
	}
	return u, nil
}

// create makes a descriptor and notes in u where it is from.
func (u *FD) create() (raw int, err error) {
	u.origin, u.kernelFaults = Syscall, true
	raw, err = newBySyscall(0)
	if !errors.Is(err, unix.EPERM) {
		return raw, err
	}
	u.origin = Device
	raw, errDevice := newByDevice()
	if errDevice == nil {
		return raw, nil
	}
	u.origin, u.kernelFaults = Syscall, false
	raw, errUser := newBySyscall(userModeOnly)
	if errUser == nil {
		return raw, nil
	}
	return -1, fmt.Errorf("%w; %w; %w", err, errDevice, errUser)
}

// newFlags are what both ways of making a descriptor are given. Not blocking
// lets the Go runtime wait for messages.
const newFlags = unix.O_CLOEXEC | unix.O_NONBLOCK

// userModeOnly is UFFD_USER_MODE_ONLY.
const userModeOnly = 1

func newBySyscall(flags uintptr) (raw int, err error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, newFlags|flags, 0, 0)
	switch {
	case errno == 0:
		return int(fd), nil
	case flags == userModeOnly:
		return -1, fmt.Errorf("%s for user mode: %w", Syscall, errno)
	}
	return -1, fmt.Errorf("%s: %w", Syscall, errno)
}

// newByDevice wraps USERFAULTFD_IOC_NEW.
func newByDevice() (raw int, err error) {
	dev, err := unix.Open(string(Device), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", Device, err)
	}
	defer unix.Close(dev)
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), reqNew, newFlags)
	if errno != 0 {
		return -1, fmt.Errorf("USERFAULTFD_IOC_NEW of %s: %w", Device, errno)
	}
	return int(fd), nil
}

// Offered returns all features of this kernel, whether u has them or not.
func (u *FD) Offered() Features { return u.offered }

// Origin says what made u.
func (u *FD) Origin() Origin { return u.origin }

// KernelFaults reports whether u handles faults that the kernel runs into on
// the program's behalf, such as those of a guest inside KVM_RUN. If it does
// not, such a fault is EFAULT for the system call and u hears nothing of it.
func (u *FD) KernelFaults() bool { return u.kernelFaults }

// Mode says which faults of a range are meant by [FD.Register].
type Mode uint64

// ModeWP selects stores to write-protected pages.
const ModeWP Mode = 1 << 1

// Register subscribes u to the faults of r that mode selects. It lasts until r
// is unmapped or u is closed. Both ends of r are page-aligned.
//
// Register wraps UFFDIO_REGISTER.
func (u *FD) Register(r addr.HVARange, mode Mode) error {
	if err := u.register(r, mode); err != nil {
		return fmt.Errorf("UFFDIO_REGISTER of %v: %w", r, err)
	}
	return nil
}

// WriteProtect write-protects the pages of r, which is registered with ModeWP; with the
// feature WPUnpopulated, or in memory that is not private and anonymous, also those that
// are not there. Both ends of r are page-aligned.
//
// WriteProtect wraps UFFDIO_WRITEPROTECT. It is EAGAIN while the address space changes by
// way of an event that nobody has read.
func (u *FD) WriteProtect(r addr.HVARange) error {
	if err := u.writeProtect(r); err != nil {
		return fmt.Errorf("UFFDIO_WRITEPROTECT of %v: %w", r, err)
	}
	return nil
}

// Close ends all registrations; a thread waiting in a fault of u goes on.
func (u *FD) Close() error { return u.file.Close() }
