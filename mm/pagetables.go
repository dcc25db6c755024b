package mm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/pagemap"
)

// PageTables is the host's page tables of a memory, as far as user space can see and
// use them: /proc/self/pagemap shows them, and madvise(2) takes faults. It is the
// primary MMU that a mirror of package hmm copies from, whose interface PageTables it
// implements, without either package knowing the other.
//
// It shows no frame numbers, which take a privilege. A mirror in user space maps the
// host address, and what the page tables tell it is whether it may.
type PageTables struct {
	m  *Memory
	pm *pagemap.PageMap
}

// PageTables opens the page tables of the memory. They are closed by Close, when
// nobody uses them any more; operations on a memory that has been closed find no
// regions. Kernels before 6.7 cannot show them, which the error then says.
func (m *Memory) PageTables() (*PageTables, error) {
	p, err := pagemap.Open()
	if err != nil {
		return nil, fmt.Errorf("open the page tables of guest memory: %w", err)
	}
	if _, _, err := p.Scan(pagemap.Request{}, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("open the page tables of guest memory: %w", err), p.Close())
	}
	return &PageTables{m, p}, nil
}

// Close gives the descriptor back.
func (p *PageTables) Close() error { return p.pm.Close() }

// What Region and Walk say, in the bits of package hmm.
const (
	RegionMapped = 1 << 0 // Region: there is one

	PTEPresent  = 1 << 0 // Walk: a page is mapped
	PTEWritable = 1 << 1 // a store reaches it, and no copy of it
	PTESwapped  = 1 << 2 // the content is elsewhere, or the page may not be had at all

	PTEHuge = hugeOrder << 24 // mapped by an entry of level 2: the order of that

	hugeOrder = 9
)

// Region returns the extent that hva lies in, with its permissions, and RegionMapped.
// Where nothing is mapped, which reservations count as, it returns 0 and a part of the
// gap. The caller holds the mapping lock, for reading or writing.
func (p *PageTables) Region(hva addr.HVA) (r addr.HVARange, access addr.Access, attrs uint32) {
	m := p.m
	gap := addr.HVARange{Start: hva &^ addr.PageMask, End: ^addr.HVA(0) &^ addr.PageMask}
	i := m.extents.find(hva)
	if i == len(m.extents) {
		return gap, addr.NoAccess, 0
	}
	switch x := m.extents[i]; {
	case hva < x.Range.Start:
		gap.End = x.Range.Start
		return gap, addr.NoAccess, 0
	case !x.Mapped:
		return x.Range, addr.NoAccess, 0
	default:
		return x.Range, x.Access, RegionMapped
	}
}

// Walk calls fn for runs of pages of r whose entries are alike, until it returns false.
// Of the memory nothing is known to the device of an owner, and pfn is always 0. The
// caller holds the mapping lock; r lies in one region.
//
// A page that is present counts as writable if its region is, but for three kinds. The
// zero page is replaced by a store, and so is a page of a file in a private mapping. And
// a page that is write-protected for a userfaultfd must be stored to by way of the CPU,
// or whoever protected it will not know. One kind cannot be told: what the kernel has
// merged (see Memory.Mergeable) counts as writable, and a store replaces it.
func (p *PageTables) Walk(r addr.HVARange, _ any, fn func(run addr.HVARange, pfn addr.PFN, pte uint32) bool) error {
	writable := p.writable(r.Start)
	req := pagemap.Request{
		Range:  r,
		Any:    pagemap.Present | pagemap.Swapped,
		Report: pagemap.Present | pagemap.Swapped | pagemap.PFNZero | pagemap.Huge | pagemap.Written | pagemap.File,
	}
	var found [32]pagemap.Region
	for at := r.Start; at < r.End; {
		req.Range.Start = at
		n, end, err := p.pm.Scan(req, found[:])
		if err != nil {
			return err
		}
		for _, f := range found[:n] {
			if at < f.Range.Start && !fn(addr.HVARange{Start: at, End: f.Range.Start}, 0, 0) || !fn(f.Range, 0, pteOf(f.Categories, writable(f.Categories))) {
				return nil
			}
			at = f.Range.End
		}
		if at < end {
			if !fn(addr.HVARange{Start: at, End: end}, 0, 0) {
				return nil
			}
			at = end
		}
	}
	return nil
}

// writable returns a function that reports whether a store in the region of hva reaches
// a page of these categories.
func (p *PageTables) writable(hva addr.HVA) func(pagemap.Categories) bool {
	_, access, _ := p.Region(hva)
	not := pagemap.PFNZero
	for x := range p.m.extents.in(addr.HVAs(hva, 1)) {
		if x.private {
			not |= pagemap.File
		}
	}
	return func(c pagemap.Categories) bool {
		return access&addr.Write != 0 && c&not == 0 && c&pagemap.Written != 0
	}
}

// pteOf returns what an entry of these categories is, if it is present, and writable
// or not.
func pteOf(c pagemap.Categories, writable bool) (pte uint32) {
	if c&pagemap.Present == 0 {
		return PTESwapped
	}
	pte = PTEPresent
	if writable {
		pte |= PTEWritable
	}
	if c&pagemap.Huge != 0 {
		pte |= PTEHuge
	}
	return pte
}

// Fault makes the pages of r present, and for write writable, as accesses of the CPU
// would. The kernel may map neighbours too where it has a huge page for them. With
// nonblocking the error is EAGAIN if a page would have to be brought in from swap; with
// no more than a page to be zeroed or found in its file, a fault does not wait.
//
// Fault wraps madvise with MADV_POPULATE_READ or MADV_POPULATE_WRITE. It returns what the
// kernel says: EINVAL if the mapping does not permit it, and from kernels before 5.14
// always; ENOMEM if nothing is mapped, or there is no memory; EFAULT if an access would
// raise SIGBUS.
func (p *PageTables) Fault(r addr.HVARange, write, nonblocking bool) error {
	if nonblocking {
		n, _, err := p.pm.Scan(pagemap.Request{Range: r, All: pagemap.Swapped, Report: pagemap.Swapped}, make([]pagemap.Region, 1))
		switch {
		case err != nil:
			return err
		case n > 0:
			return fmt.Errorf("fault in %v: a page is in swap: %w", r, unix.EAGAIN)
		}
	}
	return populate(r, write)
}
