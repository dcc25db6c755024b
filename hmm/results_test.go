package hmm

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// look is one of the ways to look at page tables.
type look uint8

const (
	snapshot  look = iota // of layer L
	listFault             // of layer L, that may block
	noWait                // of layer L, that may not
	request               // of layer I
	numLooks
)

var lookNames = [numLooks]string{"Range.Snapshot", "Range.Fault", "Range.Fault that must not block", "RangeFault"}

func (l look) String() string { return lookNames[l] }

// outcome is what a look leaves behind.
type outcome struct {
	Errno   syscall.Errno // 0: success
	Entries string        // without frames, separated by commas
}

func (o outcome) String() string { return fmt.Sprintf("%v, entries %s", o.Errno, o.Entries) }

// flags describes entries without their frames.
func flags(entries []Entry) string {
	var all []string
	for _, e := range entries {
		all = append(all, (e &^ frameMask).String())
	}
	return strings.Join(all, ", ")
}

// run looks at r, which is in the world's page tables, and checks what is the same for
// all: the references, and who holds the mapping lock afterwards.
func (l look) run(w *world, d *device, r addr.HVARange, def, mask Entry, order uint8, entries []Entry) outcome {
	var err error
	h := w.reg.lookup(w.AddressSpace, byHolder)
	defer h.Put()
	refs := h.refs.Load()
	if l == request {
		q := w.newRequest(d, r, def)
		q.Mask, q.Entries, q.Seq = mask, entries, d.ReadBegin()
		w.reading(func() { err = RangeFault(q) })
	} else {
		x := w.newRange(r, def)
		x.Mask, x.Entries, x.Order = mask, entries, order
		if err = w.reg.begin(x, w.AddressSpace); err == nil {
			w.refs("after Begin", h, refs+1)
			w.RLock()
			var n int
			switch l {
			case snapshot:
				n, err = x.Snapshot()
			default:
				n, err = x.Fault(l == noWait)
			}
			var e *Error
			if !errors.As(err, &e) || !e.Unlocked {
				w.RUnlock()
			}
			if err == nil && n != len(entries) || err != nil && n != 0 {
				w.errorf("%v returned %d, %v for %d entries", l, n, err, len(entries))
			}
			if valid := x.Done(); valid != (err == nil) {
				w.errorf("%v returned %v, and Done %v", l, err, valid)
			}
		}
	}
	w.refs("after "+l.String(), h, refs)
	w.Lock() // which nobody holds any more
	//lint:ignore SA2001 who holds it would have been met
	w.Unlock()
	o := outcome{Entries: flags(entries)}
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			w.errorf("%v returned %T, want an *Error", l, err)
			return o
		}
		o.Errno = e.Errno
	}
	return o
}

// TestM5Results has every row of the table of what a walk meets, for each look: what it
// returns, what it leaves in the entries, and that references are what they were.
func TestM5Results(t *testing.T) { pass(t, checkResults) }

// result is a row. The range is pages 1 to 4 of the world, and what is met is at page 2.
// Snapshot and notAsked ask for nothing, the others for all pages.
type result struct {
	name    string
	r       addr.HVARange // not pages 1 to 4
	regions []region      // not one plain region of 8 pages
	set     func(m *model)
	order   uint8
	write   bool // what is asked for is to write too

	snapshot, list, noWait outcome // of Range.Snapshot, and of Range.Fault
	notAsked, asked        outcome // of RangeFault
}

func ok(entries string) outcome                         { return outcome{0, entries} }
func fails(errno syscall.Errno, entries string) outcome { return outcome{errno, entries} }

// parts returns the regions of pages 0 and 1, of page 2, which is as the row has it, and
// of pages 3 to 7.
func parts(middle ...region) []region {
	return slices.Concat([]region{plain(0, 2)}, middle, []region{plain(3, 5)})
}

// results are the rows of the table in the package comment, in its order. All pages but
// page 2 are present and writable.
var results = []result{
	{
		name: "an empty range", r: at(1, 0),
		snapshot: fails(syscall.EINVAL, ""), list: fails(syscall.EINVAL, ""), noWait: fails(syscall.EINVAL, ""),
		notAsked: fails(syscall.EINVAL, ""), asked: fails(syscall.EINVAL, ""),
	},
	{
		name: "a range that is not aligned", r: addr.HVARange{Start: base, End: base + 4*addr.PageSize + 1},
		snapshot: fails(syscall.EINVAL, "0, 0, 0, 0"), list: fails(syscall.EINVAL, "valid, valid, valid, valid"), noWait: fails(syscall.EINVAL, "valid, valid, valid, valid"),
		notAsked: fails(syscall.EINVAL, "0, 0, 0, 0"), asked: fails(syscall.EINVAL, "valid, valid, valid, valid"),
	},
	{
		name: "the start is in no region", regions: []region{plain(2, 6)},
		snapshot: fails(syscall.EFAULT, "error, 0, 0, 0"), list: fails(syscall.EFAULT, "error, 0, 0, 0"), noWait: fails(syscall.EFAULT, "error, 0, 0, 0"),
		notAsked: ok("error, valid write, valid write, valid write"), asked: fails(syscall.EFAULT, "error, 0, 0, 0"),
	},
	{
		name: "a gap inside the range", regions: parts(),
		snapshot: fails(syscall.EFAULT, "valid write, error, 0, 0"), list: fails(syscall.EFAULT, "valid write, error, 0, 0"), noWait: fails(syscall.EFAULT, "valid write, error, 0, 0"),
		notAsked: ok("valid write, error, valid write, valid write"), asked: fails(syscall.EFAULT, "valid write, error, 0, 0"),
	},
	{
		name: "a special region", regions: parts(region{at(2, 1), addr.ReadWrite, RegionMapped | RegionSpecial}),
		snapshot: fails(syscall.EFAULT, "valid write, special, 0, 0"), list: fails(syscall.EFAULT, "valid write, special, 0, 0"), noWait: fails(syscall.EFAULT, "valid write, special, 0, 0"),
		notAsked: ok("valid write, error, valid write, valid write"), asked: fails(syscall.EFAULT, "valid write, error, 0, 0"),
	},
	{
		name: "a region of huge pages", r: at(512, 4), regions: []region{{at(512, 512), addr.ReadWrite, RegionMapped | 9<<OrderShift}},
		snapshot: ok("0, 0, 0, 0"), list: ok("valid order 9, valid order 9, valid order 9, valid order 9"), noWait: ok("valid order 9, valid order 9, valid order 9, valid order 9"),
		notAsked: ok("0, 0, 0, 0"), asked: ok("valid order 9, valid order 9, valid order 9, valid order 9"),
	},
	{
		name: "a range of other pages than the region's", r: at(512, 4), regions: []region{{at(512, 512), addr.ReadWrite, RegionMapped | 9<<OrderShift}}, order: 1,
		snapshot: fails(syscall.EINVAL, "0, 0"), list: fails(syscall.EINVAL, "0, 0"), noWait: fails(syscall.EINVAL, "0, 0"),
		notAsked: ok("0, 0, 0, 0"), asked: ok("valid order 9, valid order 9, valid order 9, valid order 9"),
	},
	{
		name: "a region that is not readable", regions: parts(region{at(2, 1), addr.NoAccess, RegionMapped}),
		snapshot: fails(syscall.EPERM, "0, 0, 0, 0"), list: fails(syscall.EPERM, "0, 0, 0, 0"), noWait: fails(syscall.EPERM, "0, 0, 0, 0"),
		notAsked: ok("valid write, error, valid write, valid write"), asked: fails(syscall.EFAULT, "valid write, error, 0, 0"),
	},
	{
		name: "a region that is writable only", regions: parts(region{at(2, 1), addr.Write, RegionMapped}), write: true,
		snapshot: fails(syscall.EPERM, "0, 0, 0, 0"), list: fails(syscall.EPERM, "0, 0, 0, 0"), noWait: fails(syscall.EPERM, "0, 0, 0, 0"),
		notAsked: ok("valid write, error, valid write, valid write"), asked: fails(syscall.EFAULT, "valid write, error, 0, 0"),
	},
	{
		name: "a region that is not writable", regions: parts(region{at(2, 1), addr.Read, RegionMapped}), write: true,
		set:      func(m *model) { m.set(at(2, 1), PTEPresent) },
		snapshot: ok("valid write, valid, valid write, valid write"), list: fails(syscall.EPERM, "valid write, 0, 0, 0"), noWait: fails(syscall.EPERM, "valid write, 0, 0, 0"),
		notAsked: ok("valid write, valid, valid write, valid write"), asked: fails(syscall.EPERM, "valid write, 0, 0, 0"),
	},
	{
		name:     "a page that is absent",
		set:      func(m *model) { m.set(at(2, 1), 0) },
		snapshot: ok("valid write, 0, valid write, valid write"), list: ok("valid write, valid, valid write, valid write"), noWait: ok("valid write, valid, valid write, valid write"),
		notAsked: ok("valid write, 0, valid write, valid write"), asked: ok("valid write, valid, valid write, valid write"),
	},
	{
		name:     "a page that is swapped out",
		set:      func(m *model) { m.set(at(2, 1), PTESwapped) },
		snapshot: ok("valid write, 0, valid write, valid write"), list: ok("valid write, valid, valid write, valid write"), noWait: ok("valid write, valid, valid write, valid write"),
		notAsked: ok("valid write, 0, valid write, valid write"), asked: ok("valid write, valid, valid write, valid write"),
	},
	{
		name:     "a page that is being moved",
		set:      func(m *model) { m.set(at(2, 1), PTEMigrating) },
		snapshot: ok("valid write, 0, valid write, valid write"), list: ok("valid write, valid, valid write, valid write"), noWait: ok("valid write, valid, valid write, valid write"),
		notAsked: ok("valid write, 0, valid write, valid write"), asked: ok("valid write, valid, valid write, valid write"),
	},
	{
		name: "a page of the own device", write: true,
		set:      func(m *model) { m.set(at(2, 1), PTEDevice) },
		snapshot: ok("valid write, valid device, valid write, valid write"), list: ok("valid write, valid device, valid write, valid write"), noWait: ok("valid write, valid device, valid write, valid write"),
		notAsked: ok("valid write, valid device, valid write, valid write"), asked: ok("valid write, valid device, valid write, valid write"),
	},
	{
		name:     "an entry of somebody else",
		set:      func(m *model) { m.set(at(2, 1), PTEForeign) },
		snapshot: ok("valid write, error, valid write, valid write"), list: fails(syscall.EFAULT, "valid write, error, 0, 0"), noWait: fails(syscall.EFAULT, "valid write, error, 0, 0"),
		notAsked: ok("valid write, error, valid write, valid write"), asked: fails(syscall.EFAULT, "valid write, error, 0, 0"),
	},
	{
		name:     "what is present is not a page",
		set:      func(m *model) { m.set(at(2, 1), PTEPresent|PTEWritable|PTESpecial) },
		snapshot: ok("valid write, error, valid write, valid write"), list: fails(syscall.EFAULT, "valid write, error, 0, 0"), noWait: fails(syscall.EFAULT, "valid write, error, 0, 0"),
		notAsked: ok("valid write, error, valid write, valid write"), asked: fails(syscall.EFAULT, "valid write, error, 0, 0"),
	},
	{
		name:     "the zero page",
		set:      func(m *model) { m.setZero(at(2, 1)) },
		snapshot: ok("valid write, valid, valid write, valid write"), list: ok("valid write, valid, valid write, valid write"), noWait: ok("valid write, valid, valid write, valid write"),
		notAsked: ok("valid write, valid, valid write, valid write"), asked: ok("valid write, valid, valid write, valid write"),
	},
	{
		name:     "a page that is protected as a hint",
		set:      func(m *model) { m.set(at(2, 1), PTEPresent|PTEWritable|PTEHinted) },
		snapshot: ok("valid write, 0, valid write, valid write"), list: ok("valid write, valid write, valid write, valid write"), noWait: ok("valid write, valid write, valid write, valid write"),
		notAsked: ok("valid write, 0, valid write, valid write"), asked: ok("valid write, valid write, valid write, valid write"),
	},
	{
		name: "a fault that would block",
		set: func(m *model) {
			m.set(at(2, 1), PTESwapped)
			m.waits = true
		},
		snapshot: ok("valid write, 0, valid write, valid write"), list: ok("valid write, valid, valid write, valid write"), noWait: fails(syscall.EAGAIN, "valid write, 0, 0, 0"),
		notAsked: ok("valid write, 0, valid write, valid write"), asked: ok("valid write, valid, valid write, valid write"),
	},
	{
		name: "a fault that fails",
		set: func(m *model) {
			m.set(at(2, 1), PTESwapped)
			m.hook = func(point string) {
				if point == "fault" {
					m.setRegions(region{at(0, 8), addr.NoAccess, RegionMapped})
				}
			}
		},
		snapshot: ok("valid write, 0, valid write, valid write"), list: fails(syscall.EFAULT, "valid write, 0, 0, 0"), noWait: fails(syscall.EFAULT, "valid write, 0, 0, 0"),
		notAsked: ok("valid write, 0, valid write, valid write"), asked: fails(syscall.EFAULT, "valid write, 0, 0, 0"),
	},
}

// checkResults runs each row for each look.
func checkResults(m mutant) error {
	for _, row := range results {
		ask := ReqFault
		if row.write {
			ask |= ReqWrite
		}
		for _, tt := range []struct {
			look look
			ask  Entry
			want outcome
		}{
			{snapshot, 0, row.snapshot},
			{listFault, ask, row.list},
			{noWait, ask, row.noWait},
			{request, 0, row.notAsked},
			{request, ask, row.asked},
		} {
			if err := checkResult(m, row, tt.look, tt.ask, tt.want); err != nil {
				return fmt.Errorf("%s, %v asking for %v: %w", row.name, tt.look, tt.ask, err)
			}
		}
	}
	return nil
}

func checkResult(m mutant, row result, l look, ask Entry, want outcome) error {
	regions, r := row.regions, row.r
	if regions == nil {
		regions = []region{plain(0, 8)}
	}
	if r == (addr.HVARange{}) {
		r = at(1, 4)
	}
	w := newWorld(m, regions...)
	w.tables.set(at(0, 8), PTEPresent|PTEWritable)
	if row.set != nil {
		row.set(w.tables)
	}
	w.guard(func() {
		d, mirror := w.newInterval(at(0, 1024)), w.newMirror()
		shift, order := uint(addr.PageShift), row.order
		if l != request {
			shift += uint(order)
		}
		entries := make([]Entry, r.Bytes()>>shift)
		for i := range entries {
			entries[i] = ask
		}
		if got := l.run(w, d, r, 0, ^Entry(0), order, entries); got != want {
			w.errorf("got  %v\nwant %v", got, want)
		}
		mirror.Unregister()
		d.Remove()
	})
	return w.finish()
}

// TestM5ChangedMeanwhile: what has changed before or during the look is EAGAIN or EBUSY;
// entries before the place have been found, the others are as they were.
func TestM5ChangedMeanwhile(t *testing.T) {
	for l := snapshot; l < numLooks; l++ {
		t.Run(l.String(), func(t *testing.T) {
			w := newWorld(sound, plain(0, 8))
			d, mirror := w.newInterval(at(0, 8)), w.newMirror()
			w.tables.set(at(0, 8), PTEPresent|PTEWritable)
			w.tables.set(at(3, 1), PTESwapped)
			w.tables.hook = func(point string) {
				if point == "faulted" {
					w.bracket(at(1, 1), nil)
				}
			}
			entries := slices.Repeat([]Entry{ReqFault}, 4)
			want := map[look]outcome{
				snapshot:  ok("valid write, valid write, 0, valid write"), // it takes no fault
				listFault: fails(syscall.EAGAIN, "valid write, valid write, valid, valid"),
				noWait:    fails(syscall.EAGAIN, "valid write, valid write, valid, valid"),
				request:   fails(syscall.EBUSY, "valid write, valid write, valid, valid"),
			}[l]
			if got := l.run(w, d, at(1, 4), 0, ^Entry(0), 0, entries); got != want {
				t.Errorf("got  %v\nwant %v", got, want)
			}
			mirror.Unregister()
			d.Remove()
			if err := w.finish(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestM5BeforeTheWalk: a range that is changing, and a sequence that is old, are noticed
// before anything is written.
func TestM5BeforeTheWalk(t *testing.T) {
	w := newWorld(sound, plain(0, 8))
	d, mirror := w.newInterval(at(0, 8)), w.newMirror()
	q := w.newRequest(d, at(0, 4), asked)
	q.Seq = d.ReadBegin()
	w.bracket(at(0, 1), nil)
	w.reading(func() {
		if err := RangeFault(q); !errors.Is(err, syscall.EBUSY) {
			w.errorf("with an old sequence RangeFault returns %v", err)
		}
	})
	r := w.begun(at(0, 4), asked)
	w.bracket(at(0, 1), func() {
		w.guard(func() {
			w.RLock()
			defer w.RUnlock()
			if _, err := r.Fault(false); !errors.Is(err, syscall.EAGAIN) {
				w.errorf("while a bracket is open Fault returns %v", err)
			}
		})
	})
	if n := len(w.tables.runs()); n > 0 {
		w.errorf("%d runs were walked in vain", n)
	}
	r.Done()
	mirror.Unregister()
	d.Remove()
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

// pageState is a state of a page, as M13 goes through them.
type pageState struct {
	name     string
	set      func(m *model, r addr.HVARange)
	found    Entry // what the CPU finds, without a frame
	hopeless bool  // what is asked fails
	own      bool  // what is found is there for the device, and nothing is faulted
	faultGet Entry // what is found after a read fault; a write fault makes it writable too
}

func state(pte uint32) func(*model, addr.HVARange) {
	return func(m *model, r addr.HVARange) { m.set(r, pte) }
}

var pageStates = []pageState{
	{name: "absent", set: state(0), faultGet: EntryValid},
	{name: "swapped", set: state(PTESwapped), faultGet: EntryValid},
	{name: "migrating", set: state(PTEMigrating), faultGet: EntryValid},
	{name: "own device, read-only", set: state(PTEDevice), found: EntryValid | EntryDevice, own: true},
	{name: "own device", set: state(PTEDevice | PTEWritable), found: EntryValid | EntryWrite | EntryDevice, own: true},
	{name: "foreign", set: state(PTEForeign), found: EntryError, hopeless: true},
	{name: "not a page", set: state(PTEPresent | PTESpecial), found: EntryError, hopeless: true},
	{name: "not a page, writable", set: state(PTEPresent | PTEWritable | PTESpecial), found: EntryError, hopeless: true},
	{name: "hinted", set: state(PTEPresent | PTEWritable | PTEHinted), faultGet: EntryValid | EntryWrite},
	{name: "hinted, read-only", set: state(PTEPresent | PTEHinted), faultGet: EntryValid},
	{name: "zero", set: func(m *model, r addr.HVARange) { m.setZero(r) }, found: EntryValid},
	{name: "read-only", set: state(PTEPresent), found: EntryValid},
	{name: "writable", set: state(PTEPresent | PTEWritable), found: EntryValid | EntryWrite},
}

var regionKinds = map[string]region{
	"plain":     plain(0, 1),
	"read-only": {at(0, 1), addr.Read, RegionMapped},
	"none":      {at(4, 1), addr.ReadWrite, RegionMapped},
	"special":   {at(0, 1), addr.ReadWrite, RegionMapped | RegionSpecial},
	"closed":    {at(0, 1), addr.NoAccess, RegionMapped},
	"writeonly": {at(0, 1), addr.Write, RegionMapped},
}

// algebra says what a look at one page returns, in the words of the specification and
// not in those of the walk.
func algebra(l look, kind string, s pageState, def, mask, entry Entry) (errno syscall.Errno, found Entry) {
	effective := entry&mask | def
	wanted := effective&ReqFault != 0 && l != snapshot
	write := wanted && effective&ReqWrite != 0
	switch kind {
	case "closed", "writeonly":
		switch {
		case l != request:
			return syscall.EPERM, 0
		case wanted:
			return syscall.EFAULT, EntryError
		}
		return 0, EntryError
	case "none", "special":
		found = EntryError
		if kind == "special" && l != request {
			found = EntrySpecial
		}
		if l != request || wanted {
			errno = syscall.EFAULT
		}
		return errno, found
	}
	switch {
	case s.own, !wanted:
		return 0, s.found
	case s.hopeless:
		return syscall.EFAULT, EntryError
	case s.found&EntryValid != 0 && (!write || s.found&EntryWrite != 0):
		return 0, s.found
	case write && kind == "read-only":
		return syscall.EPERM, 0
	case write:
		return 0, EntryValid | EntryWrite
	case s.found&EntryValid != 0:
		return 0, s.found
	}
	return 0, s.faultGet
}

// TestM13FlagAlgebra goes through all defaults, masks, entries, page states, regions and
// looks.
func TestM13FlagAlgebra(t *testing.T) { pass(t, checkAlgebra) }

func checkAlgebra(m mutant) error {
	w := newWorld(m)
	w.tables.bracket = nil // a fault that replaces the zero page changes nothing that has been found before
	w.guard(func() {
		d, mirror := w.newInterval(at(0, 8)), w.newMirror()
		all := []Entry{0, ReqFault, ReqWrite, ReqFault | ReqWrite}
		// An entry may hold anything that an earlier look has left in it.
		entries := append(slices.Clone(all), EntryError|EntryDevice|5<<orderShift|77)
		n := 0
		for kind, g := range regionKinds {
			w.tables.setRegions(g)
			for _, s := range pageStates {
				if kind == "read-only" && s.found&EntryWrite != 0 {
					continue // no page of it is writable
				}
				for _, def := range all {
					for _, mask := range all {
						for _, entry := range entries {
							for l := snapshot; l < numLooks; l++ {
								if n++; lockorder.Enabled && n%17 != 0 {
									continue // a debug build takes a hundred times as long
								}
								s.set(w.tables, at(0, 1))
								e := []Entry{entry}
								errno, found := algebra(l, kind, s, def, mask, entry)
								want := outcome{errno, found.String()}
								if got := l.run(w, d, at(0, 1), def, mask, 0, e); got != want && !w.broken() {
									w.errorf("%v of a page that is %s in a region that is %s, default %v, mask %v, entry %v: got %v, want %v",
										l, s.name, kind, def, mask, entry, got, want)
								}
								if w.broken() {
									return
								}
							}
						}
					}
				}
			}
		}
		mirror.Unregister()
		d.Remove()
	})
	return w.finish()
}

// TestM12AccessIsWhatWasFound: of no page more is installed than the CPU could do when
// it was looked at, whatever was asked.
func TestM12AccessIsWhatWasFound(t *testing.T) {
	for _, s := range pageStates {
		for _, ask := range []Entry{0, asked, askedWrite} {
			w := newWorld(sound, plain(0, 8))
			d := w.newInterval(at(0, 8))
			s.set(w.tables, at(0, 8))
			q := w.newRequest(d, at(0, 8), ask)
			q.Seq = d.ReadBegin()
			w.reading(func() {
				if err := RangeFault(q); err != nil {
					clear(q.Entries)
				}
			})
			w.must(d.install(q.Range, q.Entries))
			w.must(d.check())
			for hva, e := range d.entries {
				if e.Access() == addr.ReadWrite && e&EntryWrite == 0 || e&EntryValid == 0 {
					w.errorf("%v: %v is installed as %v", hva, e, e.Access())
				}
			}
			d.Remove()
			if err := w.finish(); err != nil {
				t.Errorf("pages are %s, asked for %v: %v", s.name, ask, err)
			}
		}
	}
	for e, want := range map[Entry]addr.Access{
		0: addr.NoAccess, EntryWrite: addr.NoAccess, EntryError: addr.NoAccess, EntrySpecial: addr.NoAccess,
		EntryValid: addr.Read, EntryValid | EntryWrite: addr.ReadWrite, EntryValid | EntryDevice: addr.Read,
	} {
		if got := e.Access(); got != want {
			t.Errorf("Access of %v is %v, want %v", e, got, want)
		}
	}
}

// TestFramesFollowEachOther: the entries of a run, of a huge page, and of a range of
// huge pages have their own frames.
func TestFramesFollowEachOther(t *testing.T) {
	w := newWorld(sound, plain(0, 512), region{at(512, 1024), addr.ReadWrite, RegionMapped | 9<<OrderShift})
	first := w.tables.set(at(0, 3), PTEPresent)
	huge := w.tables.set(at(512, 512), PTEPresent|PTEWritable|9<<OrderShift)
	next := w.tables.set(at(1024, 512), PTEPresent|PTEWritable|9<<OrderShift)
	mirror := w.newMirror()
	look := func(r addr.HVARange, order uint8) []Entry {
		x := &Range{Range: r, Tables: w.tables, Order: order, Entries: make([]Entry, r.NPages()>>order)}
		w.must(w.reg.begin(x, w.AddressSpace))
		defer x.Done()
		w.reading(func() {
			_, err := x.Snapshot()
			w.must(err)
		})
		return x.Entries
	}
	const rw, order9 = EntryValid | EntryWrite, Entry(9) << orderShift
	for _, tt := range []struct {
		got, want []Entry
	}{
		{look(at(0, 4), 0), []Entry{EntryValid | Entry(first), EntryValid | Entry(first+1), EntryValid | Entry(first+2), 0}},
		{look(at(515, 2), 0), []Entry{rw | order9 | Entry(huge+3), rw | order9 | Entry(huge+4)}},
		{look(at(512, 1024), 9), []Entry{rw | order9 | Entry(huge), rw | order9 | Entry(next)}},
	} {
		if diff := cmp.Diff(tt.want, tt.got); diff != "" {
			t.Errorf("entries (-want +got):\n%s", diff)
		}
	}
	if e := rw | order9 | 5; e.PFN() != 5 || e.Order() != 9 || e.String() != "valid write pfn 0x5 order 9" {
		t.Errorf("an entry has frame %v, order %d, and reads %q", e.PFN(), e.Order(), e)
	}
	mirror.Unregister()
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}
