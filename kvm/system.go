package kvm

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// APIVersion is the version of the KVM API that this package speaks, and the
// only one that Linux has offered since 2.6.22.
const APIVersion = 12

// System is the KVM subsystem of this host.
type System struct {
	fd fd
}

// Open opens /dev/kvm.
func Open() (*System, error) { return OpenPath("/dev/kvm") }

// OpenPath opens the device node path and checks that it speaks APIVersion of
// the KVM API: if not, the error is a [*VersionError]. If there is no such node
// or it may not be used, errors.Is finds [fs.ErrNotExist] or [fs.ErrPermission].
//
// OpenPath wraps KVM_GET_API_VERSION.
func OpenPath(path string) (*System, error) {
	raw, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	s := new(System)
	s.fd.init(raw, nil)
	version, err := call(&s.fd, reqGetAPIVersion, 0)
	if err != nil {
		s.Close()
		return nil, about(err, path)
	}
	if version != APIVersion {
		s.Close()
		return nil, &VersionError{Path: path, Got: version}
	}
	return s, nil
}

// Close closes the device. VMs made from it go on.
func (s *System) Close() error { return s.fd.close() }

// CheckExtension returns what KVM says of c: 0 if it lacks c, and otherwise 1 or
// a quantity that depends on c. A VM may support more or less than the system.
//
// CheckExtension wraps KVM_CHECK_EXTENSION.
func (s *System) CheckExtension(c Cap) (int, error) { return checkExtension(&s.fd, c) }

func checkExtension(f *fd, c Cap) (int, error) {
	n, err := call(f, reqCheckExtension, uintptr(c))
	if err != nil {
		return 0, about(err, c.String())
	}
	return n, nil
}

// Require returns an [*UnsupportedError] for the first of caps that KVM lacks.
func (s *System) Require(caps ...Cap) error {
	for _, c := range caps {
		n, err := s.CheckExtension(c)
		if err != nil {
			return err
		}
		if n <= 0 {
			return &UnsupportedError{Cap: c}
		}
	}
	return nil
}

// SupportedCPUID returns the CPUID that KVM and this host can give to a vCPU.
//
// SupportedCPUID wraps KVM_GET_SUPPORTED_CPUID.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	return getCPUID(&s.fd, reqGetSupportedCPUID, 64)
}

// MSRIndexList returns the indices of the MSRs that VCPU.MSRs can read.
//
// MSRIndexList wraps KVM_GET_MSR_INDEX_LIST.
func (s *System) MSRIndexList() ([]uint32, error) {
	return getMSRList(&s.fd, reqGetMSRIndexList, 128)
}

// MSRFeatureIndexList returns the indices of the MSRs that describe features of
// this host's virtualization.
//
// MSRFeatureIndexList wraps KVM_GET_MSR_FEATURE_INDEX_LIST.
func (s *System) MSRFeatureIndexList() ([]uint32, error) {
	return getMSRList(&s.fd, reqGetMSRFeatureIndexList, 32)
}

// maxList bounds the lists that KVM is offered room for. Its own bound on the
// entries of a CPUID is 256; lists of MSRs are a few hundred.
const maxList = 1 << 14

// getCPUID offers room for n entries, and more for as long as KVM asks for it.
func getCPUID(f *fd, req request[cpuidHeader], n int) ([]CPUIDEntry, error) {
	for ; ; n *= 2 {
		h, entries := flex[cpuidHeader, CPUIDEntry](n)
		h.nent = uint32(n)
		_, err := ioctl(f, req, h)
		if err == nil {
			return entries[:min(int(h.nent), n)], nil
		}
		if !errors.Is(err, unix.E2BIG) || n >= maxList {
			return nil, about(err, fmt.Sprintf("room for %d entries", n))
		}
	}
}

// getMSRList is getCPUID for a list of MSRs.
func getMSRList(f *fd, req request[msrListHeader], n int) ([]uint32, error) {
	for ; ; n *= 2 {
		h, indices := flex[msrListHeader, uint32](n)
		h.nmsrs = uint32(n)
		_, err := ioctl(f, req, h)
		if err == nil {
			return indices[:min(int(h.nmsrs), n)], nil
		}
		if !errors.Is(err, unix.E2BIG) || n >= maxList {
			return nil, about(err, fmt.Sprintf("room for %d indices", n))
		}
	}
}

// CreateVM makes a VM with no memory and no vCPUs. The VM belongs to this
// process's address space: a child after fork cannot use it.
//
// CreateVM wraps KVM_CREATE_VM, and repeats it for as long as it says EINTR. KVM
// registers an MMU notifier for the VM, which takes every lock of the address
// space and gives up if a signal is pending; a Go program cannot prevent that,
// since its runtime preempts threads by signals.
func (s *System) CreateVM() (*VM, error) {
	size, err := call(&s.fd, reqGetVCPUMmapSize, 0)
	if err != nil {
		return nil, err
	}
	if uintptr(size) < sizeofRunArea {
		return nil, fmt.Errorf("KVM_GET_VCPU_MMAP_SIZE: a run area of %d bytes cannot hold struct kvm_run, which has %d", size, sizeofRunArea)
	}
	raw, err := call(&s.fd, reqCreateVM, 0)
	for errors.Is(err, unix.EINTR) {
		raw, err = call(&s.fd, reqCreateVM, 0)
	}
	if err != nil {
		return nil, err
	}
	vm := &VM{runSize: size}
	vm.fd.init(raw, nil)
	return vm, nil
}
