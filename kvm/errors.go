package kvm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Error is a request that the kernel refused.
type Error struct {
	Op     string     // the request as the kernel spells it: "KVM_CREATE_VM"
	Detail string     // what it was about: a slot, a capability; may be empty
	Errno  unix.Errno // what it answered
}

func (e *Error) Error() string {
	if e.Detail == "" {
		return e.Op + ": " + e.Errno.Error()
	}
	return e.Op + ": " + e.Detail + ": " + e.Errno.Error()
}

// Unwrap lets errors.Is find the errno and, through it, fs.ErrPermission.
func (e *Error) Unwrap() error { return e.Errno }

// about says what the request that failed with err was about. It is for the
// error of a call just made, which nobody else has seen yet.
func about(err error, detail string) error {
	var e *Error
	if errors.As(err, &e) {
		e.Detail = detail
	}
	return err
}

// errnoOf returns the errno that a function of package unix failed with.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}

func closedError(op string) error { return fmt.Errorf("%s: %w", op, os.ErrClosed) }

// VersionError is a device that speaks another version of the KVM API.
type VersionError struct {
	Path string
	Got  int // the answer to KVM_GET_API_VERSION
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("%s speaks version %d of the KVM API, not %d", e.Path, e.Got, APIVersion)
}

// UnsupportedError is a capability that was required and that KVM lacks.
type UnsupportedError struct {
	Cap Cap
}

func (e *UnsupportedError) Error() string { return fmt.Sprintf("KVM does not support %v", e.Cap) }

// Is makes the error match [errors.ErrUnsupported].
func (e *UnsupportedError) Is(target error) bool { return target == errors.ErrUnsupported }

// MSRError is an MSR that KVM would not read or write. It has no errno: KVM
// takes a list in order, stops at the first such MSR and counts the ones before.
type MSRError struct {
	Op    string // "KVM_GET_MSRS" or "KVM_SET_MSRS"
	Index uint32 // the MSR refused
	Done  int    // how many MSRs before it were read or written
}

func (e *MSRError) Error() string {
	return fmt.Sprintf("%s: MSR 0x%x refused, %d before it done", e.Op, e.Index, e.Done)
}
