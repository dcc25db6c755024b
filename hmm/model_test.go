package hmm

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// model is page tables whose frames are generations: each time that a page gets
// another content it gets another frame, which none has had before. So an entry is
// stale if and only if its frame is not the page's.
type model struct {
	// bracket runs a change of pages inside a bracket; nil runs it alone. It is
	// called where a fault puts another page in the place of one that is there.
	bracket func(r addr.HVARange, change func())

	// hook is told of each call and each run, before it does anything.
	hook func(point string)

	mu         sync.Mutex // protects what follows; a leaf
	regions    []region
	pages      map[addr.HVA]page // those that are not absent
	generation addr.PFN
	walked     []addr.HVARange // runs, as they were yielded
	faulted    []fault
	waits      bool // faults that may not block say that they would
}

type region struct {
	r      addr.HVARange
	access addr.Access
	attrs  uint32
}

// page is a page table entry. The frame is 0 unless it has one.
type page struct {
	pte   uint32
	frame addr.PFN
}

// zeroFrame is the frame of the zero page.
const zeroFrame addr.PFN = 1

type fault struct {
	r           addr.HVARange
	write       bool
	nonblocking bool
}

const base addr.HVA = 0x40000000 // aligned to huge pages

// at returns n pages from page i.
func at(i, n uint64) addr.HVARange {
	return addr.HVAs(base+addr.HVA(i*addr.PageSize), n*addr.PageSize)
}

func newModel(regions ...region) *model {
	return &model{regions: regions, pages: map[addr.HVA]page{}, generation: 1000}
}

// plain is a region of n pages that can be read and written.
func plain(i, n uint64) region { return region{at(i, n), addr.ReadWrite, RegionMapped} }

func (m *model) told(point string) {
	if m.hook != nil {
		m.hook(point)
	}
}

// region returns the region of hva, or a gap.
func (m *model) region(hva addr.HVA) region {
	gap := addr.HVARange{Start: 0, End: ^addr.HVA(0) &^ addr.PageMask}
	for _, g := range m.regions {
		switch {
		case hva < g.r.Start:
			gap.End = min(gap.End, g.r.Start)
		case hva < g.r.End:
			return g
		default:
			gap.Start = max(gap.Start, g.r.End)
		}
	}
	return region{r: gap}
}

func (m *model) Region(hva addr.HVA) (addr.HVARange, addr.Access, uint32) {
	m.told("region")
	m.mu.Lock()
	defer m.mu.Unlock()
	g := m.region(hva)
	return g.r, g.access, g.attrs
}

// setRegions replaces the regions.
func (m *model) setRegions(regions ...region) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.regions = regions
}

// set makes the pages of r what pte says, with frames of their own if it has some, and
// returns the first.
func (m *model) set(r addr.HVARange, pte uint32) addr.PFN {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.setLocked(r, pte)
}

func (m *model) setLocked(r addr.HVARange, pte uint32) (first addr.PFN) {
	order := pte >> OrderShift
	if order > 0 { // frames of a huge page are aligned as it is
		m.generation = (m.generation | (1<<order - 1))
	}
	first = m.generation + 1
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		switch {
		case pte == 0:
			delete(m.pages, hva)
		case pte&(PTEPresent|PTEDevice|PTEMigrating) != 0:
			m.generation++
			m.pages[hva] = page{pte, m.generation}
		default:
			m.pages[hva] = page{pte: pte}
		}
	}
	return first
}

// setZero maps the zero page.
func (m *model) setZero(r addr.HVARange) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		m.pages[hva] = page{PTEPresent, zeroFrame}
	}
}

// page returns what is at hva.
func (m *model) page(hva addr.HVA) page {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pages[hva]
}

// run returns the longest run from hva on, up to end, whose frames follow each other.
func (m *model) run(hva, end addr.HVA) (addr.HVARange, page) {
	m.mu.Lock()
	defer m.mu.Unlock()
	first := m.pages[hva]
	r := addr.HVARange{Start: hva, End: hva + addr.PageSize}
	next := first
	for ; r.End < end; r.End += addr.PageSize {
		if next.frame != 0 {
			next.frame++
		}
		if m.pages[r.End] != next {
			break
		}
	}
	m.walked = append(m.walked, r)
	return r, first
}

func (m *model) Walk(r addr.HVARange, owner any, fn func(addr.HVARange, addr.PFN, uint32) bool) error {
	for hva := r.Start; hva < r.End; {
		m.told("walk")
		run, p := m.run(hva, r.End)
		if p.pte&PTEDevice != 0 && owner != theDevice {
			p = page{pte: PTEForeign}
		}
		if !fn(run, p.frame, p.pte) {
			return nil
		}
		hva = run.End
	}
	return nil
}

// theDevice owns the device memory.
var theDevice any = "the device"

var errModel = errors.New("the model says no")

func (m *model) Fault(r addr.HVARange, write, nonblocking bool) error {
	m.told("fault")
	m.mu.Lock()
	m.faulted = append(m.faulted, fault{r, write, nonblocking})
	waits := m.waits && nonblocking
	m.mu.Unlock()
	if waits {
		return fmt.Errorf("%v: %w", r, syscall.EAGAIN)
	}
	for hva := r.Start; hva < r.End; {
		next, err := m.touch(hva, write)
		if err != nil {
			return fmt.Errorf("%v: %w", hva, err)
		}
		hva = next
	}
	m.told("faulted")
	return nil
}

// touch makes one page present, or the huge page that it is a part of.
func (m *model) touch(hva addr.HVA, write bool) (next addr.HVA, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	g, p := m.region(hva), m.pages[hva]
	size := addr.HVA(addr.PageSize) << max(g.attrs>>OrderShift, p.pte>>OrderShift)
	whole := addr.HVARange{Start: hva &^ (size - 1), End: hva&^(size-1) + size}
	pte := PTEPresent | g.attrs>>OrderShift<<OrderShift
	if write {
		pte |= PTEWritable
	}
	switch {
	case g.attrs&RegionMapped == 0 || g.access&addr.Read == 0 || write && g.access&addr.Write == 0:
		return 0, errModel
	case p.pte&(PTEDevice|PTEForeign|PTESpecial) != 0:
		return 0, errModel
	case p.pte == 0 || p.pte == PTESwapped:
		m.setLocked(whole, pte)
	case p.pte&PTEMigrating != 0:
		m.pages[hva] = page{PTEPresent, p.frame}
	case p.pte&PTEHinted != 0:
		m.pages[hva] = page{p.pte &^ PTEHinted, p.frame}
	case !write || p.pte&PTEWritable != 0:
	case p.frame == zeroFrame:
		m.replace(whole, pte)
	default:
		for ; whole.Start < whole.End; whole.Start += addr.PageSize {
			p := m.pages[whole.Start]
			m.pages[whole.Start] = page{p.pte | PTEWritable, p.frame}
		}
	}
	return whole.End, nil
}

// replace breaks a copy-on-write. The caller holds the lock, which is given back
// meanwhile.
func (m *model) replace(r addr.HVARange, pte uint32) {
	if m.bracket == nil {
		m.setLocked(r, pte)
		return
	}
	m.mu.Unlock()
	defer m.mu.Lock()
	m.bracket(r, func() { m.set(r, pte) })
}

// faults returns what was faulted in since it was last called.
func (m *model) faults() []fault {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() { m.faulted = nil }()
	return m.faulted
}

// runs returns what was walked since it was last called.
func (m *model) runs() []addr.HVARange {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() { m.walked = nil }()
	return m.walked
}

// stale returns what an entry that is installed for hva has wrong.
func (m *model) stale(hva addr.HVA, e Entry) error {
	p := m.page(hva)
	switch {
	case e&EntryValid == 0:
		return fmt.Errorf("%v: the entry %v is installed", hva, e)
	case e.PFN() != p.frame || p.pte&(PTEPresent|PTEDevice) == 0:
		return fmt.Errorf("%v: the entry %v is installed, and the page is %v of pte %#x", hva, e, p.frame, p.pte)
	case e&EntryWrite != 0 && p.pte&PTEWritable == 0:
		return fmt.Errorf("%v: the entry %v is installed, and the page is not writable", hva, e)
	}
	return nil
}

// device is what has a mirror: entries under a lock. It is the driver of both layers.
type device struct {
	notifier.Interval
	Mirror
	tables *model
	defect defect
	locked func() // called when somebody is about to take the lock, in Populate

	mu      sync.Mutex // the driver's lock; class Consumer
	entries map[addr.HVA]Entry

	onSync    func(*notifier.Invalidation) error // before it does anything; may be nil
	onRelease func()
}

// defect is one of a driver.
type defect uint8

const seqForEntries defect = 1 // MM17: the sequence is set only if entries are dropped

func newDevice(tables *model) *device {
	return &device{tables: tables, entries: map[addr.HVA]Entry{}}
}

func (d *device) drop(r addr.HVARange) (dropped bool) {
	for hva := range d.entries {
		if hva >= r.Start && hva < r.End {
			delete(d.entries, hva)
			dropped = true
		}
	}
	return dropped
}

// Sync is of a driver of layer L.
func (d *device) Sync(inv *notifier.Invalidation) error {
	if d.onSync != nil {
		if err := d.onSync(inv); err != nil {
			return err
		}
	}
	d.lock()
	defer d.unlock()
	d.drop(inv.Range)
	return nil
}

func (d *device) Release() {
	if d.onRelease != nil {
		d.onRelease()
	}
	d.lock()
	defer d.unlock()
	clear(d.entries)
}

// Invalidate is of a driver of layer I.
func (d *device) Invalidate(inv *notifier.Invalidation, seq uint64) bool {
	d.lock()
	defer d.unlock()
	if d.defect != seqForEntries {
		d.SetSeq(seq)
	}
	if d.drop(inv.Range) {
		d.SetSeq(seq)
	}
	return true
}

// Lock and Unlock are for Populate.
func (d *device) Lock() {
	if d.locked != nil {
		d.locked()
	}
	d.lock()
}

func (d *device) Unlock() { d.unlock() }

// install installs the entries of a range that are valid, as the results allow.
func (d *device) install(r addr.HVARange, entries []Entry) error {
	for i, e := range entries {
		if e.Access() != addr.NoAccess {
			d.entries[r.Start+addr.HVA(i*addr.PageSize)] = e
		}
	}
	return nil
}

// check returns the entries that are stale.
func (d *device) check() error {
	d.lock()
	defer d.unlock()
	var wrong []error
	for hva, e := range d.entries {
		if err := d.tables.stale(hva, e); err != nil {
			wrong = append(wrong, err)
		}
	}
	slices.SortFunc(wrong, func(a, b error) int { return len(a.Error()) - len(b.Error()) })
	return errors.Join(wrong...)
}
