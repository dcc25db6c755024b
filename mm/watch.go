package mm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/notifier"
)

// Changes that a Memory has not made itself, and learns of from a watch.
const (
	OpStray       Op = "stray"        // one that is about to be read of: it may be any, of anything
	OpStrayRemove Op = "stray-remove" // madvise(2) with MADV_DONTNEED, MADV_FREE or MADV_REMOVE
	OpStrayUnmap  Op = "stray-unmap"  // munmap(2), or mmap(2) with MAP_FIXED over it
	OpStrayRemap  Op = "stray-remap"  // mremap(2)
	OpStrayFork   Op = "stray-fork"   // fork(2)
	OpStrayZap    Op = "stray-zap"    // KVM dropped its mappings; why is not known
	OpStrayGap    Op = "stray-gap"    // changes may have been missed
)

// ErrWatched is why memory cannot be watched, or its writes logged: the kernel has one
// userfaultfd for a range. It is EBUSY for errors.Is.
var ErrWatched = fmt.Errorf("the memory is registered with another userfaultfd, of an EventWatch or of a WriteLog: %w", unix.EBUSY)

// watched returns the error of a registration.
func watched(err error) error {
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: %w", ErrWatched, err)
	}
	return err
}

// Evidence is how a change is known.
type Evidence uint8

// The classes of evidence, from the best to the weakest. An operation of a Memory is
// known exactly, and nobody reports it.
const (
	Exact Evidence = iota // it was made by an operation of Memory
	Event                 // the kernel has told of the call, and held its thread until that was read
	Trace                 // KVM's tracepoint says that pages went, afterwards, and not why
)

var evidences = [...]string{Exact: "exact", Event: "event", Trace: "trace"}

func (e Evidence) String() string {
	if int(e) < len(evidences) {
		return evidences[e]
	}
	return fmt.Sprintf("evidence(%d)", uint8(e))
}

// Fate is what a stray change has left in a range.
type Fate uint8

const (
	Stays    Fate = iota // the mapping is there, and as far as is known it is the guest's
	Reserved             // there was a hole; a reservation is in it now
	Foreign              // something that others have mapped: using it would use their memory
	Moved                // pages went from there to another place of guest memory, which guests follow
	Unknown              // it could not be found out; nothing is assumed to be the guest's
)

var fates = [...]string{Stays: "stays", Reserved: "reserved", Foreign: "foreign", Moved: "moved", Unknown: "unknown"}

func (f Fate) String() string {
	if int(f) < len(fates) {
		return fates[f]
	}
	return fmt.Sprintf("fate(%d)", uint8(f))
}

// Stray is a change of guest memory's mappings that no operation of its Memory has made,
// and that was followed: slots, translations and the dirty log are as after an operation.
type Stray struct {
	Change                    // what, of which range, and when it was followed
	Evidence Evidence         // how it is known
	Fate     Fate             // what is at Range now
	Content  notifier.Content // what was announced of the content of Range

	// Late says that whoever made the change went on before its bracket was open: he and
	// others have used the memory meanwhile as it was or as it is, and a harvest of the
	// dirty log may have come in between, after which the next one has the pages.
	Late bool

	// Err is what went wrong in following it: what subscribers reported, or why something
	// could not be looked up. Nothing is retried.
	Err error
}

// Hazard reports whether the change has taken memory from the guest that had to stay.
// Until it was followed, the guest or the VMM may have used memory that is not the
// guest's, or may not have had what was promised.
func (s Stray) Hazard() bool { return s.Fate == Reserved || s.Fate == Foreign || s.Fate == Unknown }

func (s Stray) String() string {
	text := fmt.Sprintf("%v, known by %v: %v, content %v", s.Change, s.Evidence, s.Fate, s.Content)
	if s.Late {
		text += ", late"
	}
	if s.Err != nil {
		text += ", but: " + s.Err.Error()
	}
	return text
}

// logStray is what is done with a change if nobody wants to be told.
func logStray(s Stray) {
	level := slog.LevelWarn
	if s.Hazard() || s.Err != nil {
		level = slog.LevelError
	}
	slog.Log(context.Background(), level, "guest memory was changed by code that does not know it", "change", s.String())
}

// Follow returns when every change that the watches can know of, and that others made
// before the call, has been followed and reported; at once if there is no watch. What is
// made meanwhile may be among them. It takes the mapping lock for writing, and is not
// called by a Report.
func (m *Memory) Follow() {
	m.as.Lock()
	events, traced := m.events, m.traced
	if events != nil {
		events.followLocked()
		events.again(true)
	}
	if traced != nil {
		traced.followLocked()
	}
	m.as.Unlock()
	if events != nil {
		events.reports.tell()
	}
	if traced != nil {
		traced.reports.tell()
	}
}

// strays is what a watch has followed, on its way to whoever wants to be told.
type strays struct {
	report func(Stray)

	telling sync.Mutex // held while report is called, so that changes are told in order
	mu      sync.Mutex // protects what follows; a leaf
	waiting []Stray
}

// later has s told.
func (q *strays) later(s Stray) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, s)
}

// tell returns when all that waited has been told. The caller holds no lock.
func (q *strays) tell() {
	q.telling.Lock()
	defer q.telling.Unlock()
	q.mu.Lock()
	told := q.waiting
	q.waiting = nil
	q.mu.Unlock()
	for _, s := range told {
		q.report(s)
	}
}

// parts returns the parts of r that lie in regions.
func (m *Memory) parts(r addr.HVARange) (parts []addr.HVARange) {
	for _, region := range m.regions {
		if part := region.Range.Intersect(r); !part.Empty() {
			parts = append(parts, part)
		}
	}
	return parts
}

// span returns the smallest range that has all regions in it.
func (m *Memory) span() (all addr.HVARange) {
	for i, r := range m.regions {
		if i == 0 {
			all = r.Range
		}
		all = addr.HVARange{Start: min(all.Start, r.Range.Start), End: max(all.End, r.Range.End)}
	}
	return all
}

// made carries out what follows a change that others have made, between brackets, and
// returns s with what came of it. becomes returns what is mapped now; nil: what was. The
// caller holds the mapping lock for writing.
func (m *Memory) made(s Stray, brackets []notifier.Invalidation, becomes func(*Change) []Extent) Stray {
	began := uint64(0) // what is made of the range later is not a part of this
	if m.traced != nil {
		began = perf.Now()
	}
	m.brackets = append(m.brackets[:0], brackets...)
	req := request{op: s.Op, r: s.Range, to: s.To, stray: true}
	err := m.carryOut(req, func() error {
		s.Change = m.changed(req)
		if becomes != nil {
			why := s.Change // on the heap: extents may refer to it
			for _, x := range becomes(&why) {
				m.extents.set(x)
			}
		}
		return nil
	})
	if len(brackets) > 0 {
		s.Content = m.brackets[0].Content
	}
	s.Err = errors.Join(s.Err, err)
	if m.traced != nil && s.Evidence == Event {
		m.traced.followed(s, began)
	}
	return s
}

// lose follows that s.Range is not the guest's any more. The caller holds the mapping lock
// for writing.
func (m *Memory) lose(s Stray) Stray {
	gone := []notifier.Invalidation{{Range: s.Range, Event: notifier.Unmap, After: addr.NoAccess, Content: notifier.Gone}}
	return m.made(s, gone, func(c *Change) []Extent {
		return []Extent{{Range: s.Range, Why: c, foreign: s.Fate != Reserved}}
	})
}

// piece is a part of a region, and what was found there.
type piece struct {
	r    addr.HVARange
	fate Fate
	err  error
}

// fill puts reservations into the holes of r, and calls add for all of it: they are
// Reserved, and the rest is Foreign.
func (m *Memory) fill(r addr.HVARange, add func(piece)) {
	if r.Empty() {
		return
	}
	switch hole, err := reserveHole(r); {
	case err != nil:
		add(piece{r, Unknown, err})
	case hole:
		if m.events != nil {
			err = m.events.register(r)
		}
		add(piece{r, Reserved, err})
	case r.NPages() == 1 || occupied(r):
		add(piece{r: r, fate: Foreign})
	default:
		middle := r.Start + addr.HVA(r.NPages()/2*addr.PageSize)
		m.fill(addr.HVARange{Start: r.Start, End: middle}, add)
		m.fill(addr.HVARange{Start: middle, End: r.End}, add)
	}
}

// occupied reports whether something is mapped in all of r. It wraps msync(2) with
// MS_ASYNC, which does nothing else.
func occupied(r addr.HVARange) bool {
	_, _, errno := unix.Syscall(unix.SYS_MSYNC, uintptr(r.Start), uintptr(r.Bytes()), unix.MS_ASYNC)
	return errno == 0
}
