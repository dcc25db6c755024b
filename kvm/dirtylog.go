package kvm

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// DirtyLogFlags are how the dirty bitmaps of a VM work. Which ones a host has is
// the answer to CapManualDirtyLogProtect2.
type DirtyLogFlags uint64

const (
	DirtyLogManualProtect DirtyLogFlags = 1 << iota // VM.GetDirtyLog copies, VM.ClearDirtyLog clears
	DirtyLogInitiallySet                            // a log begins with all bits set; needs DirtyLogManualProtect
)

func (f DirtyLogFlags) String() string {
	return flagString(uint64(f), "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", "KVM_DIRTY_LOG_INITIALLY_SET")
}

// EnableManualDirtyLogProtect sets how the bitmaps of the VM work; flags of 0 are
// the classic way. It concerns all slots at once, and DirtyLogInitiallySet those
// whose log begins later.
//
// With DirtyLogInitiallySet nothing is write-protected when a log begins, because
// all of its bits are set: a page is logged from its first ClearDirtyLog on.
//
// EnableManualDirtyLogProtect wraps KVM_ENABLE_CAP of
// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
func (vm *VM) EnableManualDirtyLogProtect(flags DirtyLogFlags) error {
	if err := vm.EnableCap(CapManualDirtyLogProtect2, 0, uint64(flags)); err != nil {
		return about(err, fmt.Sprintf("%v, %v", CapManualDirtyLogProtect2, flags))
	}
	return nil
}

// DirtyLogWords returns the length of the bitmap of npages pages, which KVM counts
// in whole words.
func DirtyLogWords(npages uint64) int { return int((npages + 63) / 64) }

// dirtyLog is struct kvm_dirty_log.
type dirtyLog struct {
	slot   uint32
	_      uint32
	bitmap *uint64
}

// clearDirtyLog is struct kvm_clear_dirty_log.
type clearDirtyLog struct {
	slot      uint32
	numPages  uint32
	firstPage uint64
	bitmap    *uint64
}

// GetDirtyLog copies the dirty bitmap of a slot that has MemLogDirtyPages: page n
// of the slot, counted from its start, is bit n%64 of bitmap[n/64]. The bitmap has
// DirtyLogWords of the slot's pages, not more and not fewer; a bitmap of another
// length is EINVAL, and KVM is not asked.
//
// The classic log is cleared, and the pages that were in it are write-protected
// again, before GetDirtyLog returns. A page that the guest writes afterwards is in
// the next log:
//
//	GetDirtyLog, copy the pages
//
// With DirtyLogManualProtect nothing is cleared, and nothing protected. A page that
// is copied before its bit is cleared may be written in between, and no log will
// say so; the order that loses nothing is
//
//	GetDirtyLog, ClearDirtyLog, copy the pages
//
// Both while the guest runs. Of its stores the log has all; it may also have pages
// that the guest has only read, which KVM then had mapped as writable. Stores of
// anybody else are in no log: those of this process or another to the host's pages,
// and those of devices.
//
// The log goes with the slot, or with its flag: to delete a slot or to take
// MemLogDirtyPages from it discards every bit that has not been read. A slot that
// is moved in guest memory keeps its log.
//
// The error is ENOENT if there is no slot or it has no log, EINVAL if there can be
// no such slot, and ENXIO if the VM has dirty rings.
//
// GetDirtyLog wraps KVM_GET_DIRTY_LOG. It allocates nothing, unless it fails.
func (vm *VM) GetDirtyLog(slot uint32, bitmap []uint64) error {
	vm.slotsMu.RLock()
	defer vm.slotsMu.RUnlock()
	arg := dirtyLog{slot: slot}
	if npages, ok := vm.npages[slot]; ok { // else there is no bitmap for KVM to copy
		if err := checkBitmap(reqGetDirtyLog.name, slot, npages, bitmap); err != nil {
			return err
		}
		arg.bitmap = &bitmap[0]
	}
	if _, err := ioctl(&vm.fd, reqGetDirtyLog, &arg); err != nil {
		return about(err, fmt.Sprintf("slot %d", slot))
	}
	return nil
}

// ClearDirtyLog clears those bits of a slot's log that are set in bitmap, and
// write-protects their pages, before it returns; it leaves the other bits and pages
// alone. Bit 0 of bitmap[0] is page firstPage of the slot, and the bitmap has
// DirtyLogWords of npages.
//
// KVM works by words of 64 pages: firstPage is a multiple of 64, and so is npages
// unless the pages end where the slot does. Anything else is EINVAL, and so are
// pages beyond the slot. For the order of calls see GetDirtyLog; the other errors
// are the same.
//
// ClearDirtyLog wraps KVM_CLEAR_DIRTY_LOG. It allocates nothing, unless it fails.
func (vm *VM) ClearDirtyLog(slot uint32, firstPage uint64, npages uint32, bitmap []uint64) error {
	if err := checkBitmap(reqClearDirtyLog.name, slot, uint64(npages), bitmap); err != nil {
		return err
	}
	arg := clearDirtyLog{slot: slot, numPages: npages, firstPage: firstPage}
	if len(bitmap) > 0 {
		arg.bitmap = &bitmap[0]
	}
	if _, err := ioctl(&vm.fd, reqClearDirtyLog, &arg); err != nil {
		return about(err, fmt.Sprintf("slot %d, pages [%d, %d)", slot, firstPage, firstPage+uint64(npages)))
	}
	return nil
}

// checkBitmap refuses a bitmap of which KVM would use more than there is, or less.
func checkBitmap(op string, slot uint32, npages uint64, bitmap []uint64) error {
	if len(bitmap) == DirtyLogWords(npages) {
		return nil
	}
	detail := fmt.Sprintf("slot %d, %d pages, bitmap of %d words", slot, npages, len(bitmap))
	return &Error{Op: op, Detail: detail, Errno: unix.EINVAL}
}
