// Package mm maps the host memory that backs a guest, and changes its mappings
// in the one way that keeps every other view of them coherent: bracketed by the
// notifications of an address space.
//
// A [Memory] is made of regions. A [Region] is a range of host addresses that is
// reserved for the guest until the memory is closed: an operation that takes
// pages away puts an inaccessible reservation in their place, in the same
// system call. The range of a live KVM slot must never be left unmapped, because
// the next allocation of the process may land in the hole, and the guest would
// then read and write that.
//
// Of every byte of a region an [Extent] says whether it is mapped, with which
// permissions, and which operation made it so.
//
// # Content
//
// Subscribers are told what an operation does to the content of a range, which depends
// on its backing. A page that was stored to, and what is read there afterwards:
//
//	                               memfd,                       memfd-private,
//	                    anonymous  file       shared-anonymous  file-private
//	Unmap               gone       gone       gone              gone
//	Map                 zeroed     changed 1  zeroed            changed 2
//	Map past the end               gone                         gone
//	Protect             kept       kept       kept              kept
//	Discard             zeroed     kept       kept              changed 2
//	Free                changed 3  -          -                 -
//	Punch               -          zeroed     -                 changed 4
//	Remove              -          zeroed     zeroed            -
//	PageOut, Collapse,
//	Unmergeable         kept       kept       kept              kept
//	Guard               gone       kept       kept              gone
//	Unguard             zeroed     kept       kept              changed 2
//	Truncate, shrink    -          gone       -                 gone
//	Truncate, grow      -          zeroed     -                 zeroed
//	Remap, at to        kept       kept       kept              kept
//	RemapKeep, at from  zeroed     kept       kept              changed 2
//	RemapKeep, at to    changed    changed    changed           changed
//	Fork                kept       -          -                 kept
//	Mergeable, Populate nothing is announced, and the content is kept
//
// A dash is EINVAL, but for Fork, which announces nothing of shared memory. 1: what the
// file has at the offset of the range. 2: what the file has. 3: what was there, or zero
// from some time on. 4: what was there; zero if it was not stored to. Content is changed,
// too, where a range has memory of more than one kind.
//
// A memory file and a file of the caller's differ in what the file system can do. Not
// all of them punch holes: where one does not, Punch and Remove fail with EOPNOTSUPP, and
// nothing has changed. Nor do all have huge pages to collapse to, and what is paged out of
// a file is written to it first.
//
// # Changes by others
//
// A mapping can be changed by code that knows nothing of this package, and pages by the
// kernel. Two watches see that, each a part of it, and have subscribers told as of an
// operation: an [EventWatch] by userfaultfd, and a [TraceWatch] by a tracepoint of KVM.
// Without them the slots go on showing what was mapped, and nobody knows.
//
// # Locks
//
// Package internal/lockorder has the order. The extents are protected by the
// mapping lock of the address space, which Unmap, Map, Protect and the other
// operations take for writing, ReadAt, WriteAt, Load64, Store64 and Extents for
// reading. These cannot be called from a subscriber; Walk, which takes no lock,
// is there for it. All brackets run with the mapping lock held: no file is
// mapped in two address spaces, so no reverse map is needed.
package mm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

// Backing says what kind of memory a region is mapped from.
type Backing uint8

const (
	Anonymous       Backing = iota // private and anonymous: a discarded page reads zero
	Memfd                          // a shared mapping of a memory file: a discarded page comes back as it was, a punched one reads zero
	SharedAnonymous                // shared and anonymous: as Memfd, but what is unmapped is lost, and holes are made by Remove
	MemfdPrivate                   // a private mapping of a memory file: a page that was stored to is a copy, and the file's again once discarded
	File                           // a shared mapping of RegionConfig.File, otherwise as Memfd: stores reach the file
	FilePrivate                    // a private mapping of RegionConfig.File, otherwise as MemfdPrivate: the file is as it was
)

var backings = [...]string{
	Anonymous: "anonymous", Memfd: "memfd", SharedAnonymous: "shared-anonymous", MemfdPrivate: "memfd-private",
	File: "file", FilePrivate: "file-private",
}

// Backings returns all of them.
func Backings() []Backing {
	all := make([]Backing, len(backings))
	for i := range all {
		all[i] = Backing(i)
	}
	return all
}

func (b Backing) String() string {
	if int(b) < len(backings) {
		return backings[b]
	}
	return fmt.Sprintf("backing(%d)", uint8(b))
}

// hasFile reports whether regions of that backing show a file that has a descriptor.
func (b Backing) hasFile() bool { return b == Memfd || b == MemfdPrivate || b.named() }

// named reports whether that file is the caller's.
func (b Backing) named() bool { return b == File || b == FilePrivate }

// private reports whether a store to such a region makes a copy of the page of its file.
func (b Backing) private() bool { return b == MemfdPrivate || b == FilePrivate }

// ErrPinned is returned for an operation on a pinned region.
var ErrPinned = errors.New("the region is pinned: its mappings do not change")

// RegionConfig describes a region.
type RegionConfig struct {
	Name    string // for messages, and the name of the memory file
	Size    uint64 // bytes; a positive multiple of the page size
	Backing Backing

	// File is what File and FilePrivate map, from Offset on: a regular file, with Size
	// bytes from there on, open for reading, and for File for writing too. NewRegion
	// duplicates the descriptor: the caller closes his own when he likes, and the
	// region has its own until it goes. nil for other backings.
	//
	// Regions may show the same file, also the same bytes of it: operations of one
	// announce what becomes of the others. Stores are not announced, so what one writes
	// of a shared file is not in the dirty set of another.
	File   *os.File
	Offset int64 // bytes; a multiple of the page size; 0 for other backings

	// Pinned makes operations refuse the region. It is for memory whose change
	// under a guest cannot be made coherent: guest page tables, on hosts that
	// shadow them.
	Pinned bool

	// Reserved leaves the region unmapped at first: addresses to Map or to
	// Remap into.
	Reserved bool
}

// Region is a range of host addresses that belongs to a guest.
type Region struct {
	RegionConfig
	Range addr.HVARange // Range.Start is aligned to addr.HugeSize

	object   *object       // of its file, or nil
	file     *os.File      // a descriptor of that; the region's own
	reserved addr.HVARange // what was taken from the process's address space: Range and padding behind it
}

func (r *Region) String() string { return fmt.Sprintf("region %q %v", r.Name, r.Range) }

// Memory is the host memory of one guest. Its methods may be called from any
// goroutine.
type Memory struct {
	as    *notifier.AddressSpace
	log   *trace.Log
	start time.Time // when it was made; immutable

	reports reports

	changes atomic.Uint64 // carried out so far; written with the mapping lock held

	// What follows is protected by the mapping lock of as.
	closed   bool
	regions  []*Region
	extents  extents
	history  history
	brackets []notifier.Invalidation // of the operation in progress; kept to be used again
	doing    request                 // the operation that is carried out, or was last
	followed uint64                  // the number in the trace that what follows a change by others has; 0: each its own
	events   *EventWatch             // that follows changes by others; nil: none
	traced   *TraceWatch             // the same
}

// New returns a memory without regions, in an address space of its own. What is
// done to it is recorded in log, which may be nil.
func New(log *trace.Log) *Memory {
	m := &Memory{log: log, start: time.Now()}
	m.as = notifier.New(notifier.Options{Teardown: m.teardown, Report: m.reports.add})
	return m
}

// reports is what subscribers did wrong. During an operation it is collected,
// for its error; what comes at other times is logged.
type reports struct {
	collecting atomic.Bool // an operation is in progress; it becomes false with mu held

	mu   sync.Mutex // protects what follows; a leaf
	errs []error
}

func (r *reports) add(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.collecting.Load() {
		r.errs = append(r.errs, err)
		return
	}
	slog.Error(err.Error())
}

func (r *reports) collect() { r.collecting.Store(true) }

// collected returns what was added since collect.
func (r *reports) collected() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.collecting.Store(false)
	err := errors.Join(r.errs...)
	r.errs = nil
	return err
}

// AddressSpace returns the address space whose subscribers are told of changes.
func (m *Memory) AddressSpace() *notifier.AddressSpace { return m.as }

// NewRegion reserves addresses for a region and maps it, unless c says to
// reserve them only. Memory is not allocated before it is touched.
func (m *Memory) NewRegion(c RegionConfig) (*Region, error) {
	fail := func(err error) (*Region, error) {
		return nil, fmt.Errorf("make region %q of %d bytes, %v: %w", c.Name, c.Size, c.Backing, err)
	}
	if c.Size == 0 || c.Size%addr.PageSize != 0 {
		return fail(fmt.Errorf("the size is not a positive multiple of %d: %w", addr.PageSize, unix.EINVAL))
	}
	padded := (c.Size + addr.HugeSize - 1) &^ (addr.HugeSize - 1)
	if padded < c.Size || padded+addr.HugeSize < padded {
		return fail(unix.ENOMEM)
	}
	m.as.Lock()
	defer m.as.Unlock()
	if m.closed {
		return fail(os.ErrClosed)
	}
	if int(c.Backing) >= len(backings) {
		return fail(fmt.Errorf("there is no such backing: %w", unix.EINVAL))
	}
	r := &Region{RegionConfig: c}
	var err error
	if r.reserved, err = reserve(padded); err != nil {
		return fail(err)
	}
	r.Range = addr.HVAs(r.reserved.Start, c.Size)
	opened, err := r.open()
	if err != nil {
		return fail(errors.Join(err, r.free()))
	}
	r.object = m.known(opened)
	x := Extent{Range: r.Range}
	if !c.Reserved {
		x = r.mapping(r.Range)
		if err := mapFixed(x, r.file); err != nil {
			return fail(errors.Join(err, r.free()))
		}
	}
	if r.object != opened {
		r.object.merge(opened)
	}
	if m.events != nil {
		if err := m.events.register(r.Range); err != nil {
			return fail(errors.Join(err, r.free()))
		}
	}
	m.regions = append(m.regions, r)
	m.extents.set(x)
	return r, nil
}

// File returns the file that the region shows, or nil if it has none. It belongs to the
// region, which closes it, also if it was opened from RegionConfig.File.
//
// Who writes to the file changes what mappings of it show, but for pages that a private
// one has copies of, and nobody is told. Who changes its size other than by Truncate takes
// memory away behind the back of the guest, or has Map find less than it announces: an
// access to what is missing is EFAULT, as for a guest, and nothing is corrupted.
func (r *Region) File() *os.File { return r.file }

// mapping is what the part s of the region is when it is mapped as at first, if its
// file is as long as it was.
func (r *Region) mapping(s addr.HVARange) Extent {
	x := Extent{Range: s, Mapped: true, access: addr.ReadWrite}
	switch {
	case r.Backing.hasFile():
		x.object, x.offset, x.private = r.object, r.Offset+int64(s.Start-r.Range.Start), r.Backing.private()
	case r.Backing == SharedAnonymous:
		x.object = &object{size: int64(s.Bytes())}
	}
	return x.settled()
}

// backed is x in two parts, before and after the end of its file. Either may be empty.
func (x Extent) backed() [2]Extent {
	o := x.object
	if o == nil {
		return [2]Extent{0: x}
	}
	end := x.Range.Start + addr.HVA(min(max(o.size-x.offset, 0), int64(x.Range.Bytes())))
	rest := x.cut(addr.HVARange{Start: end, End: x.Range.End})
	rest.ended = o.ended
	return [2]Extent{x.cut(addr.HVARange{Start: x.Range.Start, End: end}), rest.settled()}
}

// free gives the region's addresses and its file back.
func (r *Region) free() error { return r.freeAround(nil) }

// freeAround is free, but for those addresses that others have mapped something at, which
// xs says.
func (r *Region) freeAround(xs extents) (err error) {
	at := r.reserved.Start
	for x := range xs.in(r.reserved) {
		if x.foreign {
			err = errors.Join(err, munmap(addr.HVARange{Start: at, End: x.Range.Start}))
			at = x.Range.End
		}
	}
	err = errors.Join(err, munmap(addr.HVARange{Start: at, End: r.reserved.End}))
	if r.file != nil {
		err = errors.Join(err, r.file.Close())
	}
	return err
}

// Close ends the use of the memory. Its operations return os.ErrClosed from now
// on, as does a second Close. When the last user of the address space has gone,
// which is here unless somebody else holds one, its subscribers are released,
// and all addresses and files are given back. Nothing may use the memory then:
// the slots that refer to it must be gone, which is what Release of a subscriber
// is for.
func (m *Memory) Close() error {
	m.as.Lock()
	closed := m.closed
	m.closed = true
	m.as.Unlock()
	if closed {
		return fmt.Errorf("close guest memory: %w", os.ErrClosed)
	}
	return m.as.PutUser()
}

// teardown gives everything back.
func (m *Memory) teardown() error {
	m.as.Lock()
	var errs []error
	events, traced := m.events, m.traced
	if traced != nil {
		errs = append(errs, traced.endLocked())
	}
	if events != nil {
		errs = append(errs, events.endLocked())
	}
	for _, r := range m.regions {
		errs = append(errs, r.freeAround(m.extents))
	}
	m.regions, m.extents = nil, nil
	m.as.Unlock()
	if traced != nil {
		traced.wait() // for a goroutine that may want the lock
	}
	if events != nil {
		events.wait()
	}
	return errors.Join(errs...)
}

// region returns the region that all of r lies in, or nil.
func (m *Memory) region(r addr.HVARange) *Region {
	for _, region := range m.regions {
		if region.Range.Contains(r) {
			return region
		}
	}
	return nil
}

// Extents returns a copy of the extents that overlap r, cut to it, in the order
// of their addresses.
func (m *Memory) Extents(r addr.HVARange) []Extent {
	m.as.RLock()
	defer m.as.RUnlock()
	return slices.Collect(m.extents.in(r))
}

// Walk calls fn for every run of addresses in r that have the same permissions,
// in the order of their addresses. Where nothing is mapped, or nothing is known
// of the addresses, there are none. The caller holds the mapping lock, as a
// subscriber does in its methods.
func (m *Memory) Walk(r addr.HVARange, fn func(r addr.HVARange, access addr.Access)) {
	at := r.Start
	for x := range m.extents.in(r) {
		if at < x.Range.Start {
			fn(addr.HVARange{Start: at, End: x.Range.Start}, addr.NoAccess)
		}
		fn(x.Range, x.Access)
		at = x.Range.End
	}
	if at < r.End {
		fn(addr.HVARange{Start: at, End: r.End}, addr.NoAccess)
	}
}

// Lookup returns the access that the mapping of hva allows, and the longest run of
// addresses around hva and in within, all of which have mappings that allow just
// that. Where nothing is mapped, or nothing is known of the address, that is
// NoAccess. It takes the mapping lock for reading; if ctx is done before it has
// it, it returns an error that is EINTR.
func (m *Memory) Lookup(ctx context.Context, hva addr.HVA, within addr.HVARange) (run addr.HVARange, access addr.Access, err error) {
	if err := m.as.RLockContext(ctx); err != nil {
		return addr.HVARange{}, addr.NoAccess, fmt.Errorf("look up the mapping of %v: %w", hva, err)
	}
	defer m.as.RUnlock()
	run, access = m.extents.around(hva, within)
	return run, access, nil
}

// Changes returns the number of changes carried out so far, and of those of others that
// were followed. It takes no lock: a change may be in flight that is not counted yet.
func (m *Memory) Changes() uint64 { return m.changes.Load() }

// LastChange returns the newest operation that had to do with the page of hva,
// if it is among those that are remembered: all that took a permission away
// which is still missing, and the newest few hundred of the others.
func (m *Memory) LastChange(hva addr.HVA) (Change, bool) {
	m.as.RLock()
	defer m.as.RUnlock()
	page := addr.HVAs(hva&^addr.PageMask, addr.PageSize)
	if c, ok := m.history.last(page); ok {
		return c, true
	}
	for x := range m.extents.in(page) {
		if x.Why != nil {
			return *x.Why, true
		}
	}
	return Change{}, false
}
