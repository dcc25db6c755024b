package hmm

import "github.com/secondmmu/gvm/addr"

// PageTables is the primary MMU, as far as a mirror has to know it. Its methods
// have types of package addr and of the language only, so that whoever implements
// it need not import this package.
//
// They are called with the mapping lock held for reading, except Fault where it
// says so. They may be called on several goroutines at a time.
type PageTables interface {
	// Region returns what hva lies in: a part of it that holds hva, with the
	// permissions that mappings in it can have. attrs has RegionMapped, and
	// what else is true of the region; if it is 0 there is none, and r is a part
	// of the gap.
	Region(hva addr.HVA) (r addr.HVARange, access addr.Access, attrs uint32)

	// Walk calls fn for the pages of r, in the order of their addresses and
	// without gaps, in runs that have the same pte: a set of PTE flags. The
	// frames of a run follow each other from pfn. Walk ends early if fn returns
	// false, and changes nothing. r lies in one region; owner is whose device
	// memory is not foreign. No lock is held that Fault takes while fn runs.
	//
	// A run of absent pages is a hole: what is asked of one of its pages may be
	// done to all of them.
	Walk(r addr.HVARange, owner any, fn func(run addr.HVARange, pfn addr.PFN, pte uint32) bool) error

	// Fault makes the pages of r present, as an access of the CPU would, or
	// waits until one is that is migrating; for write they become writable. It
	// changes no other pages but those that share a hole or a huge page with
	// them. What became of them is found by another Walk.
	//
	// With nonblocking it may give up with EAGAIN where it would have to wait.
	// Without, it may be called with no lock held, and is then told nothing
	// about whether r still lies in a region. An error that is none of ENOMEM
	// and that EAGAIN is taken for EFAULT.
	Fault(r addr.HVARange, write, nonblocking bool) error
}

// What a region is.
const (
	RegionMapped  uint32 = 1 << iota // there is one
	RegionSpecial                    // I/O, raw frame numbers, or a mix of those and pages
	// From bit OrderShift on: the order of its pages.
)

// What a page table entry is. An absent page has none of the flags. A zero page is
// present, and not writable.
const (
	PTEPresent   uint32 = 1 << iota // the CPU finds a page
	PTEWritable                     // a store reaches that page, without a fault
	PTESwapped                      // the content is elsewhere
	PTEMigrating                    // the page is being moved
	PTEDevice                       // it is in the memory of the owner's device, which the CPU does not reach
	PTEForeign                      // it is of no use to anybody but who made it: in the memory of another device, poisoned
	PTESpecial                      // what is present is not a page
	PTEHinted                       // the page is present, but protected to see who uses it
	// From bit OrderShift on: the order of the mapping. A run of an order begins
	// and ends at multiples of it, or at the ends of the walk.
)

// OrderShift is where an order begins in attributes of regions and entries.
const OrderShift = 24

// find returns what the CPU finds at an entry.
func find(pte uint32) Entry {
	switch {
	case pte&PTEPresent == 0 || pte&PTEHinted != 0:
		return 0
	case pte&PTEWritable == 0:
		return EntryValid
	}
	return EntryValid | EntryWrite
}
