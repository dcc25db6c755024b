package mm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// Addresses go to the kernel and come back as integers: nothing here is memory
// of the Go heap, and the collector never sees a pointer to it.

func mmap(r addr.HVARange, prot, flags, fd int, offset int64) (addr.HVA, error) {
	p, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(r.Start), uintptr(r.Bytes()), uintptr(prot), uintptr(flags), uintptr(fd), uintptr(offset))
	if errno != 0 {
		return 0, fmt.Errorf("mmap of %d bytes: %w", r.Bytes(), errno)
	}
	return addr.HVA(p), nil
}

func munmap(r addr.HVARange) error {
	if r.Empty() {
		return nil
	}
	if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(r.Start), uintptr(r.Bytes()), 0); errno != 0 {
		return fmt.Errorf("munmap of %v: %w", r, errno)
	}
	return nil
}

const reservation = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE

// reserve takes n bytes of addresses, aligned to addr.HugeSize as n is, without
// memory.
func reserve(n uint64) (addr.HVARange, error) {
	p, err := mmap(addr.HVAs(0, n+addr.HugeSize), unix.PROT_NONE, reservation, -1, 0)
	if err != nil {
		return addr.HVARange{}, err
	}
	all := addr.HVAs(p, n+addr.HugeSize)
	r := addr.HVAs((p+addr.HugeSize-1)&^(addr.HugeSize-1), n)
	for _, rest := range []addr.HVARange{{Start: all.Start, End: r.Start}, {Start: r.End, End: all.End}} {
		if err := munmap(rest); err != nil {
			return addr.HVARange{}, err
		}
	}
	return r, nil
}

// reserveFixed puts a reservation in the place of whatever is mapped at r.
func reserveFixed(r addr.HVARange) error {
	_, err := mmap(r, unix.PROT_NONE, reservation|unix.MAP_FIXED, -1, 0)
	return err
}

// mapFixed maps what x says in the place of whatever is mapped there. file is that of its
// object, or nil if it has none.
func mapFixed(x Extent, file *os.File) error {
	flags, fd := unix.MAP_FIXED|unix.MAP_NORESERVE, -1
	if file == nil {
		flags |= unix.MAP_ANONYMOUS
	} else {
		fd = int(file.Fd())
	}
	if x.object == nil || x.private {
		flags |= unix.MAP_PRIVATE
	} else {
		flags |= unix.MAP_SHARED
	}
	_, err := mmap(x.Range, protOf(x.Access), flags, fd, x.offset)
	return err
}

func protOf(access addr.Access) int {
	prot := unix.PROT_NONE
	if access&addr.Read != 0 {
		prot |= unix.PROT_READ
	}
	if access&addr.Write != 0 {
		prot |= unix.PROT_WRITE
	}
	return prot
}

func mprotect(r addr.HVARange, access addr.Access) error {
	if _, _, errno := unix.Syscall(unix.SYS_MPROTECT, uintptr(r.Start), uintptr(r.Bytes()), uintptr(protOf(access))); errno != 0 {
		return fmt.Errorf("mprotect: %w", errno)
	}
	return nil
}

func madvise(r addr.HVARange, advice int) error {
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), uintptr(advice)); errno != 0 {
		return fmt.Errorf("madvise: %w", errno)
	}
	return nil
}

// mremapKeep moves the pages of from to the address to and leaves an empty
// mapping behind.
func mremapKeep(from addr.HVARange, to addr.HVA) error {
	const flags = unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED | unix.MREMAP_DONTUNMAP
	if _, _, errno := unix.Syscall6(unix.SYS_MREMAP, uintptr(from.Start), uintptr(from.Bytes()), uintptr(from.Bytes()), flags, uintptr(to), 0); errno != 0 {
		return fmt.Errorf("mremap: %w", errno)
	}
	return nil
}

// reserveHole puts a reservation in r if nothing at all is mapped there, and reports
// whether it did.
func reserveHole(r addr.HVARange) (hole bool, err error) {
	_, err = mmap(r, unix.PROT_NONE, reservation|unix.MAP_FIXED_NOREPLACE, -1, 0)
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	return err == nil, err
}

// memoryFile makes a memory file of n bytes.
func memoryFile(name string, n uint64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(int64(n)); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
