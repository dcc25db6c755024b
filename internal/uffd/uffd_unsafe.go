package uffd

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// api is UFFD_API, and also the type byte of the requests.
const api = 0xAA

// The requests, composed as <asm-generic/ioctl.h> does: direction, size of the
// argument, type, number.
const (
	readWrite = 3 << 30

	reqNew      = api << 8 // number 0
	reqAPI      = readWrite | unsafe.Sizeof(apiArg{})<<16 | api<<8 | 0x3F
	reqRegister = readWrite | unsafe.Sizeof(registerArg{})<<16 | api<<8 // number 0

	reqWriteProtect = readWrite | unsafe.Sizeof(writeProtectArg{})<<16 | api<<8 | 0x06
)

// apiArg is struct uffdio_api.
type apiArg struct {
	api      uint64
	features Features // in: wanted, out: offered
	ioctls   uint64
}

// registerArg is struct uffdio_register.
type registerArg struct {
	start, len uint64
	mode       Mode
	ioctls     uint64
}

// writeProtectArg is struct uffdio_writeprotect.
type writeProtectArg struct {
	start, len uint64
	mode       uint64
}

// writeProtectModeWP is UFFDIO_WRITEPROTECT_MODE_WP: to protect, and not to undo it.
const writeProtectModeWP = 1 << 0

func handshake(raw int, want Features) (offered Features, err error) {
	arg := apiArg{api: api, features: want}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(raw), reqAPI, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return 0, errno
	}
	return arg.features, nil
}

func (u *FD) register(r addr.HVARange, mode Mode) error {
	arg := registerArg{start: uint64(r.Start), len: r.Bytes(), mode: mode}
	return u.ioctl(reqRegister, unsafe.Pointer(&arg))
}

func (u *FD) writeProtect(r addr.HVARange) error {
	arg := writeProtectArg{start: uint64(r.Start), len: r.Bytes(), mode: writeProtectModeWP}
	return u.ioctl(reqWriteProtect, unsafe.Pointer(&arg))
}

func (u *FD) ioctl(req uintptr, arg unsafe.Pointer) error {
	var errno unix.Errno
	if u.conn.Control(func(raw uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, raw, req, uintptr(arg))
	}) != nil {
		return os.ErrClosed // Control fails for no other reason
	}
	if errno != 0 {
		return errno
	}
	return nil
}
