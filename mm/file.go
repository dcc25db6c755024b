package mm

import (
	"errors"
	"fmt"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// open opens the file that the region's configuration asks for, and returns what it is:
// nil if there is none. With an error the region may have a descriptor.
func (r *Region) open() (o *object, err error) {
	if !r.Backing.named() && (r.RegionConfig.File != nil || r.Offset != 0) {
		return nil, fmt.Errorf("it would not show the file; backings %v and %v do: %w", File, FilePrivate, unix.EINVAL)
	}
	switch {
	case !r.Backing.hasFile():
		return nil, nil
	case r.Backing.named():
		r.file, err = r.duplicate()
	default:
		r.file, err = memoryFile("gvm-"+r.Name, r.Size)
	}
	if err != nil {
		return nil, err
	}
	st, mode, err := inspect(int(r.file.Fd()), r.file.Name())
	if err != nil {
		return nil, err
	}
	return &object{
		file: r.file, writable: mode == unix.O_RDWR, id: fileID{uint64(st.Dev), st.Ino},
		size: (st.Size + addr.PageMask) &^ addr.PageMask, // the page that the file ends in is all there
	}, nil
}

// known returns the object of the regions that show the same file as o, or o.
func (m *Memory) known(o *object) *object {
	for _, r := range m.regions {
		if o != nil && r.object != nil && r.object.id == o.id {
			return r.object
		}
	}
	return o
}

// merge makes o what it is with another descriptor of its file.
func (o *object) merge(p *object) {
	o.size = max(o.size, p.size)
	if p.writable && !o.writable {
		o.file, o.writable = p.file, true
	}
}

// inspect returns the status of an open file, and how it was opened.
func inspect(fd int, name string) (st unix.Stat_t, mode int, err error) {
	if err := unix.Fstat(fd, &st); err != nil {
		return st, 0, fmt.Errorf("fstat of %s: %w", name, err)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return st, 0, fmt.Errorf("fcntl of %s: %w", name, err)
	}
	return st, flags & unix.O_ACCMODE, nil
}

// duplicate returns the region's own descriptor of the file that it was given, or what is
// wrong with that.
func (r *Region) duplicate() (*os.File, error) {
	given := r.RegionConfig.File
	if given == nil {
		return nil, fmt.Errorf("no file is given to map: %w", unix.EINVAL)
	}
	if r.Offset < 0 || r.Offset%addr.PageSize != 0 || r.Offset+int64(r.Size) < r.Offset {
		return nil, fmt.Errorf("the offset %d in %s is negative, no multiple of %d, or too large: %w", r.Offset, given.Name(), addr.PageSize, unix.EINVAL)
	}
	conn, err := given.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	if conn.Control(func(raw uintptr) {
		if err = r.suits(int(raw), given.Name()); err == nil {
			fd, err = unix.FcntlInt(raw, unix.F_DUPFD_CLOEXEC, 0)
		}
	}) != nil {
		return nil, fmt.Errorf("%s: %w", given.Name(), os.ErrClosed) // the one reason not to call it
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), given.Name()), nil
}

// suits reports why the region cannot be a mapping of the open file fd.
func (r *Region) suits(fd int, name string) error {
	st, mode, err := inspect(fd, name)
	if err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("fstatfs of %s: %w", name, err)
	}
	switch end := r.Offset + int64(r.Size); {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%s is not a regular file: %w", name, unix.EINVAL)
	case fs.Type == unix.HUGETLBFS_MAGIC:
		return fmt.Errorf("%s is on hugetlbfs, whose mappings do not change page by page: %w", name, unix.EINVAL)
	case st.Size < end:
		return fmt.Errorf("%s has %d bytes, and the region ends at byte %d of it; make the file longer first, or the region smaller: %w", name, st.Size, end, unix.EINVAL)
	case mode == unix.O_WRONLY:
		return fmt.Errorf("%s is open for writing only; open it for reading too: %w", name, unix.EACCES)
	case mode != unix.O_RDWR && !r.Backing.private():
		return fmt.Errorf("%s is open for reading only; open it for writing too, or map it with backing %v: %w", name, FilePrivate, unix.EACCES)
	}
	return nil
}

// fileID tells files apart.
type fileID struct{ dev, ino uint64 }

// deallocate makes a hole of the bytes of o that x shows.
func (x Extent) deallocate() error {
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(x.object.file.Fd()), mode, x.offset, int64(x.Range.Bytes())); err != nil {
		return x.noHole(fmt.Errorf("fallocate: %w", err))
	}
	return nil
}

// noHole says of which extent err could not make a hole, and what to do.
func (x Extent) noHole(err error) error {
	if x.object.file != nil && errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%v: the file system of %s cannot punch holes; keep the file on one that can, such as tmpfs, ext4, xfs or btrfs, or store zeros: %w", x.Range, x.object.file.Name(), err)
	}
	return fmt.Errorf("%v: %w", x.Range, err)
}

// aliases yields the extents outside of r that show what those in r do. A Map of what a
// Remap has moved away makes one, and so does another region with the same file.
func (m *Memory) aliases(r addr.HVARange) iter.Seq[Extent] {
	return func(yield func(Extent) bool) {
		for x := range m.extents.in(r) {
			for y := range m.showing(x.object, x.offset, x.offset+int64(x.Range.Bytes())) {
				if !r.Contains(y.Range) && !yield(y) {
					return
				}
			}
		}
	}
}

// unpinned reports which of the extents is in a pinned region.
func (m *Memory) unpinned(xs iter.Seq[Extent]) error {
	for x := range xs {
		if r := m.region(x.Range); r.Pinned {
			return fmt.Errorf("%v of %v shows the same memory: %w", x.Range, r, ErrPinned)
		}
	}
	return nil
}

// freeable reports why the part of its object that x shows cannot be freed.
func (m *Memory) freeable(x Extent) error {
	if o := x.object; o.file != nil && !o.writable {
		return o.readOnly()
	}
	return m.unpinned(m.aliases(x.Range))
}

// readOnly is why the file of o can be neither cut nor punched.
func (o *object) readOnly() error {
	return fmt.Errorf("%s is open for reading only; open it for writing too: %w", o.file.Name(), unix.EBADF)
}
