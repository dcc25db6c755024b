// Package tracefs looks up tracepoints in the kernel's tracefs, without leaving
// a mount behind.
package tracefs

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// mountPoint is where tracefs is usually mounted, if it is.
const mountPoint = "/sys/kernel/tracing"

// FS is an open tracefs. It is safe for concurrent use.
type FS struct {
	root *os.File
	conn syscall.RawConn // of root
}

// Open mounts a tracefs that nobody else can see and that ends with Close, which
// takes CAP_SYS_ADMIN, or else opens the one mounted on /sys/kernel/tracing.
func Open() (*FS, error) {
	root, err := mount()
	if err != nil {
		var errMounted error
		if root, errMounted = openMounted(); errMounted != nil {
			return nil, fmt.Errorf("%w; %w", err, errMounted)
		}
	}
	conn, err := root.SyscallConn()
	if err != nil {
		root.Close()
		return nil, err
	}
	return &FS{root, conn}, nil
}

// mount returns the root of a mount that is attached nowhere.
func mount() (*os.File, error) {
	ctx, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen tracefs: %w", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, fmt.Errorf("fsconfig tracefs: %w", err)
	}
	root, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("fsmount tracefs: %w", err)
	}
	return os.NewFile(uintptr(root), "tracefs"), nil
}

func openMounted() (*os.File, error) {
	root, err := os.Open(mountPoint)
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(root.Fd()), &fs); err != nil {
		root.Close()
		return nil, fmt.Errorf("statfs %s: %w", mountPoint, err)
	}
	if fs.Type != unix.TRACEFS_MAGIC {
		root.Close()
		return nil, fmt.Errorf("tracefs on %s: %w", mountPoint, unix.ENOENT)
	}
	return root, nil
}

// TracepointID returns the number by which perf_event_open knows a tracepoint.
// A tracepoint that the kernel lacks, or whose module is not loaded, is
// fs.ErrNotExist.
func (fs *FS) TracepointID(system, name string) (uint64, error) {
	path := "events/" + system + "/" + name + "/id"
	text, err := fs.readFile(path)
	if err != nil {
		return 0, err
	}
	id, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("tracefs %s: %w", path, err)
	}
	return id, nil
}

func (fs *FS) readFile(path string) (string, error) {
	var (
		raw int
		err error
	)
	if fs.conn.Control(func(root uintptr) {
		raw, err = unix.Openat(int(root), path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}) != nil {
		err = os.ErrClosed // Control fails for no other reason
	}
	if err != nil {
		return "", fmt.Errorf("tracefs: open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(raw), "tracefs/"+path)
	defer f.Close()
	text, err := io.ReadAll(f)
	return string(text), err
}

// Close closes fs, and with it a mount that Open made.
func (fs *FS) Close() error { return fs.root.Close() }
