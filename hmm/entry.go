package hmm

import (
	"fmt"
	"strings"

	"github.com/secondmmu/gvm/addr"
)

// Entry is what is asked of one page, before a walk, and what it was found to be,
// after. The two share bits, as in Linux (enum hmm_pfn_flags): the walk overwrites
// the question with the answer.
//
//	bit   63     62      61     60       59      58-54  53-0
//	ask   fault  write
//	found valid  write   error  special  device  order  frame number
type Entry uint64

// What is asked of a page.
const (
	ReqFault Entry = EntryValid // make it present
	ReqWrite Entry = EntryWrite // make it writable; counts together with ReqFault only
)

// What a page was found to be.
const (
	EntryValid   Entry = 1 << 63 // the CPU may read it
	EntryWrite   Entry = 1 << 62 // the CPU may write it now; if not set it may still be writable after a fault
	EntryError   Entry = 1 << 61 // it cannot be had
	EntrySpecial Entry = 1 << 60 // there is no page, but a device's registers or the like; of a Range only
	EntryDevice  Entry = 1 << 59 // the frame is in the memory of the device that looks

	orderShift = 54
	orderBits  = 1<<5 - 1
	frameMask  = 1<<orderShift - 1
)

// PFN returns the frame of a valid entry, 0 where the page tables do not show
// frames. It carries no reference: the page may be gone, but for what keeps the
// mirror coherent.
func (e Entry) PFN() addr.PFN { return addr.PFN(e & frameMask) }

// Order returns the size of the mapping that a valid entry is a part of, which is
// 2^order pages and is aligned to that.
func (e Entry) Order() uint8 { return uint8(e >> orderShift & orderBits) }

// Access returns what a mirror may allow.
func (e Entry) Access() addr.Access {
	switch {
	case e&EntryValid == 0:
		return addr.NoAccess
	case e&EntryWrite == 0:
		return addr.Read
	}
	return addr.ReadWrite
}

var entryFlags = [...]struct {
	flag Entry
	name string
}{{EntryValid, "valid"}, {EntryWrite, "write"}, {EntryError, "error"}, {EntrySpecial, "special"}, {EntryDevice, "device"}}

// String returns the flags of e, and of a valid entry the frame and the order; "0"
// if e is 0. A request reads like what it asks for.
func (e Entry) String() string {
	var words []string
	for _, f := range entryFlags {
		if e&f.flag != 0 {
			words = append(words, f.name)
		}
	}
	if e&frameMask != 0 {
		words = append(words, e.PFN().String())
	}
	if o := e.Order(); o != 0 {
		words = append(words, fmt.Sprintf("order %d", o))
	}
	if words == nil {
		return "0"
	}
	return strings.Join(words, " ")
}
