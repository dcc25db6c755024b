// Package addr has the address types that the rest of gvm speaks in: one type
// for each space, so that a guest frame number cannot be passed where a host
// address is meant, and half-open ranges over the two spaces in which gvm
// compares ranges.
//
// The names are those of Linux's KVM: gva, gpa and gfn belong to the guest, hva
// and pfn to the host.
package addr

import "fmt"

// PageSize is the size in bytes of the pages that gvm tracks. It is the base
// page of x86-64, whatever larger pages either side uses to map memory.
const (
	PageShift = 12
	PageSize  = 1 << PageShift
	PageMask  = PageSize - 1
)

// HugeSize is the size in bytes of a level-2 page. Guest RAM is reserved in
// ranges aligned to it, because a host operation that splits a mapping makes
// KVM drop everything it holds in the aligned block of this size around the
// split, and memory that is not the guest's should not be in that block.
const HugeSize = 2 << 20

type (
	GVA uint64 // guest virtual address, in bytes
	GPA uint64 // guest physical address, in bytes
	GFN uint64 // guest frame number: a GPA without its low PageShift bits
	HVA uint64 // host virtual address, in bytes
	PFN uint64 // host page frame number
)

// GFN returns the frame that gpa lies in.
func (gpa GPA) GFN() GFN { return GFN(gpa >> PageShift) }

// Offset returns the position of gpa in its frame, in bytes.
func (gpa GPA) Offset() uint64 { return uint64(gpa) & PageMask }

// GPA returns the address of the frame's first byte.
func (gfn GFN) GPA() GPA { return GPA(gfn << PageShift) }

func (gva GVA) String() string { return fmt.Sprintf("gva 0x%x", uint64(gva)) }
func (gpa GPA) String() string { return fmt.Sprintf("gpa 0x%x", uint64(gpa)) }
func (gfn GFN) String() string { return fmt.Sprintf("gfn 0x%x", uint64(gfn)) }
func (hva HVA) String() string { return fmt.Sprintf("hva 0x%x", uint64(hva)) }
func (pfn PFN) String() string { return fmt.Sprintf("pfn 0x%x", uint64(pfn)) }

// HVARange is the host address range [Start, End), in bytes. It is empty if End
// is not above Start.
type HVARange struct {
	Start HVA `json:"start"`
	End   HVA `json:"end"`
}

// GFNRange is the run of guest frames [Start, End). It is empty if End is not
// above Start.
type GFNRange struct {
	Start GFN `json:"start"`
	End   GFN `json:"end"`
}

// HVAs returns the range of n bytes from start. It saturates where start+n
// would wrap, so that a wrapped request is seen as too long, not as empty.
func HVAs(start HVA, n uint64) HVARange {
	end := start + HVA(n)
	if end < start {
		end = ^HVA(0)
	}
	return HVARange{start, end}
}

// Bytes returns the length of r in bytes.
func (r HVARange) Bytes() uint64 {
	if r.End <= r.Start {
		return 0
	}
	return uint64(r.End - r.Start)
}

// NPages returns the number of whole pages in r.
func (r HVARange) NPages() uint64 { return r.Bytes() >> PageShift }

// Empty reports whether r holds no byte.
func (r HVARange) Empty() bool { return r.End <= r.Start }

// Aligned reports whether both ends of r lie on page borders.
func (r HVARange) Aligned() bool { return (r.Start|r.End)&PageMask == 0 }

// Contains reports whether every byte of s lies in r.
func (r HVARange) Contains(s HVARange) bool { return r.Start <= s.Start && s.End <= r.End }

// Overlaps reports whether r and s have a byte in common.
func (r HVARange) Overlaps(s HVARange) bool { return !r.Intersect(s).Empty() }

// Intersect returns the bytes that are in both r and s.
func (r HVARange) Intersect(s HVARange) HVARange {
	return HVARange{max(r.Start, s.Start), min(r.End, s.End)}
}

func (r HVARange) String() string {
	return fmt.Sprintf("hva [0x%x, 0x%x)", uint64(r.Start), uint64(r.End))
}

// NPages returns the number of frames in r.
func (r GFNRange) NPages() uint64 {
	if r.End <= r.Start {
		return 0
	}
	return uint64(r.End - r.Start)
}

// Empty reports whether r holds no frame.
func (r GFNRange) Empty() bool { return r.End <= r.Start }

// Contains reports whether gfn lies in r.
func (r GFNRange) Contains(gfn GFN) bool { return r.Start <= gfn && gfn < r.End }

// Overlaps reports whether r and s have a frame in common.
func (r GFNRange) Overlaps(s GFNRange) bool { return !r.Intersect(s).Empty() }

// Intersect returns the frames that are in both r and s.
func (r GFNRange) Intersect(s GFNRange) GFNRange {
	return GFNRange{max(r.Start, s.Start), min(r.End, s.End)}
}

func (r GFNRange) String() string {
	return fmt.Sprintf("gfn [0x%x, 0x%x)", uint64(r.Start), uint64(r.End))
}

// Access says what may be done with a page through a mapping.
type Access uint8

const (
	Read  Access = 1 << iota // loads, and instruction fetches
	Write                    // stores; never without Read

	NoAccess  Access = 0
	ReadWrite        = Read | Write
)

func (a Access) String() string {
	switch a {
	case NoAccess:
		return "none"
	case Read:
		return "read-only"
	case ReadWrite:
		return "read-write"
	}
	return fmt.Sprintf("access(%d)", uint8(a))
}
