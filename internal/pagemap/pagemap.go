// Package pagemap reads the page tables of the calling process, as far as
// /proc/self/pagemap shows them, and write-protects what it has read.
package pagemap

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/secondmmu/gvm/addr"
)

// Categories is a set of properties of a page. The bits are the PAGE_IS_ bits of
// <linux/fs.h>.
type Categories uint64

const (
	WPAllowed Categories = 1 << iota // registered for asynchronous write protection
	Written                          // not write-protected, so perhaps written to
	File                             // of a file or shared memory, not anonymous
	Present                          // in memory and mapped
	Swapped                          // in swap
	PFNZero                          // the zero page, mapped by a load
	Huge                             // mapped by an entry of a higher level
	SoftDirty                        // written to since /proc/self/clear_refs was reset
)

var categoryNames = [...]string{
	"wpallowed", "written", "file", "present", "swapped", "pfnzero", "huge", "soft-dirty",
}

// String returns the names of c joined by "|", and "none" for the empty set.
func (c Categories) String() string {
	if c == 0 {
		return "none"
	}
	var names []string
	for i, name := range categoryNames {
		if c&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if rest := c >> len(categoryNames) << len(categoryNames); rest != 0 {
		names = append(names, fmt.Sprintf("%#x", uint64(rest)))
	}
	return strings.Join(names, "|")
}

// Flags changes what a scan does.
type Flags uint64

const (
	// WPMatching write-protects each page that the scan selects, so that
	// Written tells of stores after the scan. Selecting and protecting are one
	// step: no store falls between them.
	WPMatching Flags = 1 << iota

	// CheckWPAsync fails the scan with EPERM at a page that is not registered
	// for asynchronous write protection, which WPMatching alone passes over.
	CheckWPAsync
)

// Request says which pages a scan selects and what it reports of them.
type Request struct {
	Range addr.HVARange // page-aligned
	Flags Flags

	// A page is selected if, after the bits of Inverted have been flipped, it
	// is in all categories of All and, unless Any is empty, in one of Any.
	All, Any, Inverted Categories

	Report Categories // the others are left out of Region.Categories
}

// Region is a run of selected pages that have the reported categories in common.
type Region struct {
	Range      addr.HVARange
	Categories Categories
}

// PageMap is an open /proc/self/pagemap. It is safe for concurrent use.
type PageMap struct {
	file *os.File
	conn syscall.RawConn // of file
}

// Open opens the page tables of the calling process.
func Open() (*PageMap, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &PageMap{f, conn}, nil
}

// Scan writes the regions of req.Range, in the order of their addresses, to
// regions and returns how many there are and where the scan ended. It ends
// early, to be resumed from end, only where regions is full. With no regions it
// reports nothing and serves for its flags alone.
//
// Scan wraps PAGEMAP_SCAN; kernels before 6.7 answer ENOTTY.
func (p *PageMap) Scan(req Request, regions []Region) (n int, end addr.HVA, err error) {
	if n, end, err = p.scan(req, regions); err != nil {
		err = fmt.Errorf("PAGEMAP_SCAN of %v: %w", req.Range, err)
	}
	return n, end, err
}

// Close closes p. Pages that were write-protected stay so.
func (p *PageMap) Close() error { return p.file.Close() }
