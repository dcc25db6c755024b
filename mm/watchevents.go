package mm

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/pagemap"
	"github.com/secondmmu/gvm/internal/uffd"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

// EventConfig says what an [EventWatch] does.
type EventConfig struct {
	// Report is called with each change that was followed, in order, by a goroutine of
	// the watch, or by what ends it, with no lock held. It may carry out operations of the Memory, such as a
	// Map of what is gone, but must not call Follow, end the watch or close the Memory, which
	// wait for it. While it runs, further changes are followed late. nil logs them.
	Report func(Stray)

	// Forks has forks of the process reported, which changes nothing but the sharing of
	// pages; it takes CAP_SYS_PTRACE. Memory.Fork is EBUSY then: it would wait for this
	// process to read of it, with the thread that makes the call in the way of the
	// garbage collector. So would whoever forks by a raw system call of Go.
	Forks bool

	patience, settle, late time.Duration // in tests, instead of the constants
}

// EventWatch follows changes of a Memory's mappings that code makes which does not know
// the Memory. The kernel tells of them through a userfaultfd, with which all regions are
// registered, and holds the thread that makes a change until that has been read:
//
//	call                                      told of              order
//	madvise MADV_DONTNEED, _FREE, _REMOVE     OpStrayRemove        read, then changed
//	munmap, mmap with MAP_FIXED               OpStrayUnmap         changed, then read
//	mremap                                    OpStrayRemap         changed, then read
//	fork, if EventConfig.Forks                OpStrayFork          changed, then read
//	mprotect                                  nothing
//	madvise MADV_PAGEOUT, _COLLAPSE, _GUARD_* nothing
//	fallocate, ftruncate, write to the file   nothing
//	reclaim, migration, merging               nothing
//
// The registration is for write protection and nothing is ever protected, so that it
// causes no faults. What else it costs: the kernel does not map the neighbours of a page
// of shared memory that is touched, and does not collapse shared memory, nor anonymous
// memory that is not all there, to huge pages.
//
// # What is done
//
// A change is announced as an operation would be, in brackets, with the mapping lock held.
// Before the message has been read it is not known which change it tells of. So that the
// message of a discard can be read with its bracket open, one is opened that fits all: the
// start of a remap of every region, for which vCPUs leave the guest and translations are
// taken out, and which ends as one that has failed. This costs a walk of the chain and a
// stop of all vCPUs for each change, or each few that come at once.
//
// Content is taken to be changed, with two exceptions. What was unmapped is gone. And
// private anonymous memory of which no page is present nor in swap after a discard is
// zero.
//
// Nothing tells when a discard is done, as its thread goes on when the message has been
// read, and may have lost its processor. So it is waited for, a few milliseconds. If its
// pages have not been seen to go by then, because they stay (it was MADV_FREE, or it
// failed), or were not there before, the range counts as changed for a second more: at its
// end once, without another report, and whenever Follow is called. A thread that has not
// got on by then is the one thing that is not followed.
//
// Where nothing is mapped any more, a reservation is put, unless something takes the place
// first, and the slots of a guest are cut. Where others have mapped something, the slots
// are cut too, and Close leaves that mapping alone. Map takes such a range back, and
// unmaps whatever is there. Pages that mremap moved to a place in guest memory are
// followed there as those of Remap are, and count as changed: while they could not be
// found, they could not be saved.
//
// # No deadlock
//
// The reader takes no lock that anybody holds across a system call. An operation of the
// Memory says before its system call what the kernel is going to tell; the reader reads
// that at once and drops it. Any other thread that makes a change waits for a bracket, which
// may in turn have to wait for that thread: it may hold the mapping lock, or use a page of
// the guest. So the reader waits for the bracket only so long, and then reads, and the
// change is followed late.
//
// A thread that makes a change by a system call which the Go runtime does not know of
// (syscall.RawSyscall) keeps its processor from the reader. If it is the only one, or the
// garbage collector wants to begin, they wait for each other; nothing here can help it.
type EventWatch struct {
	m      *Memory
	fd     *uffd.FD
	pm     *pagemap.PageMap
	config EventConfig

	reports strays
	closed  atomic.Bool
	done    chan struct{} // closed when the watch has ended
	gone    sync.WaitGroup

	// Each holds one token at most. A token may be stale; what it is about is under mu.
	began chan struct{} // for the reader: an operation is in its system call
	kick  chan struct{} // for the follower: there is something to do
	taken chan struct{} // for the follower: the messages that the bracket was opened for were read

	// What follows is protected by the mapping lock.
	ended     bool
	covering  []notifier.Invalidation // that fits all; kept to be used again
	unsettled []unsettled             // apart from each other

	// mu is a leaf, held across reads of fd, which do not block: a message is read and
	// told apart in one step, as the operation that it belongs to may be done in the next.
	mu      sync.Mutex
	own     [3]uffd.Message // what the operation in its system call causes; nothing if it is zero
	ownID   uint64          // the number of that operation in the trace
	told    []addr.HVARange // of a Remove of own, what was told so far
	ready   chan<- struct{} // the reader waits for it to be closed, which a bracket does; or nil
	pending []message       // read, and not followed
	moving  moving          // what the operation in its system call moves
	mutant  eventMutant
	read    int // messages, for mutant
}

// eventMutant is a defect of an EventWatch, to see that it is noticed.
type eventMutant uint8

const (
	soundEvents  eventMutant = iota
	eventDropped             // some messages are not followed
	eventTwice               // some messages of operations are followed, too
)

// mutantEvery is how many messages there are to each that a mutant is about.
const mutantEvery = 4

// moving is pages that an operation moves, or nothing.
type moving struct {
	from addr.HVARange
	to   addr.HVA
}

// unsettled is a range of which pages may go until then, without a message.
type unsettled struct {
	r     addr.HVARange
	until time.Time
}

// message is a message that is not of an operation's.
type message struct {
	uffd.Message
	late   bool   // it was read without a bracket
	moving        // what an operation was moving meanwhile
	op     uint64 // the number in the trace of what follows it
}

// patience is how long a thread that changes mappings is kept waiting for a bracket which
// may be waiting for it. Brackets take less by orders of magnitude.
const patience = 100 * time.Millisecond

// settleTime is how long the pages of a discard are waited for, with the mapping lock held;
// and lateTime how long they are given to go.
const (
	settleTime = 5 * time.Millisecond
	lateTime   = time.Second
)

// WatchEvents has the changes that others make to the mappings of the memory followed, of
// all regions and of those that are made later, until Close or the end of the memory. There
// is one such watch for a memory at a time.
//
// The error is ErrWatched if there is another one, or a WriteLog of a part; EPERM where a
// process may not have a userfaultfd, or Forks is not permitted; and errors.Is finds
// errors.ErrUnsupported before Linux 6.7.
func (m *Memory) WatchEvents(c EventConfig) (_ *EventWatch, err error) {
	fail := func(err error) (*EventWatch, error) { return nil, fmt.Errorf("watch guest memory: %w", err) }
	if c.Report == nil {
		c.Report = logStray
	}
	c.patience, c.settle, c.late = cmp.Or(c.patience, patience), cmp.Or(c.settle, settleTime), cmp.Or(c.late, lateTime)
	w := &EventWatch{
		m: m, config: c, reports: strays{report: c.Report},
		done: make(chan struct{}), began: make(chan struct{}, 1), kick: make(chan struct{}, 1), taken: make(chan struct{}, 1),
	}
	features := uffd.EventRemove | uffd.EventUnmap | uffd.EventRemap |
		uffd.PagefaultFlagWP | uffd.WPAsync | uffd.WPHugetlbfsShmem | uffd.WPUnpopulated
	if c.Forks {
		features |= uffd.EventFork
	}
	if w.fd, err = uffd.Open(features); err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w; %w, but by Linux 6.7 and later", err, errors.ErrUnsupported)
		}
		return fail(err)
	}
	if w.pm, err = pagemap.Open(); err != nil {
		return fail(errors.Join(err, w.fd.Close()))
	}
	if err := w.begin(); err != nil {
		return fail(errors.Join(err, w.fd.Close(), w.pm.Close()))
	}
	return w, nil
}

// begin registers what there is, and starts.
func (w *EventWatch) begin() error {
	m := w.m
	m.as.Lock()
	defer m.as.Unlock()
	switch {
	case m.closed:
		return os.ErrClosed
	case m.events != nil:
		return ErrWatched
	}
	for _, r := range m.regions {
		if err := w.register(r.Range); err != nil {
			return fmt.Errorf("%v: %w", r, err)
		}
	}
	m.events = w
	w.gone.Go(w.reader)
	w.gone.Go(w.follow)
	return nil
}

// register has the kernel tell of changes of r, all of which is mapped or reserved.
func (w *EventWatch) register(r addr.HVARange) error { return watched(w.fd.Register(r, uffd.ModeWP)) }

// Close ends the watch: what is changed from now on is not followed. A thread that waits
// for its change to be read goes on. It returns when all that was read has been followed
// and reported. A TraceWatch that is there as well takes what the kernel does then for
// changes, so it is closed first. Close takes the mapping lock for writing, and is called once: a second Close
// returns os.ErrClosed. The end of the memory ends the watch too, but does not close it.
func (w *EventWatch) Close() error {
	if w.closed.Swap(true) {
		return fmt.Errorf("close the watch of guest memory: %w", os.ErrClosed)
	}
	w.m.as.Lock()
	err := w.endLocked()
	w.m.as.Unlock()
	w.wait()
	return err
}

// endLocked ends the watch, if it has not ended. Nothing of an operation is in flight: the
// caller holds the mapping lock for writing. Once he has given it back, he calls wait.
func (w *EventWatch) endLocked() error {
	if w.ended {
		return nil
	}
	w.ended = true
	err := w.fd.Close()
	if errors.Is(err, os.ErrClosed) {
		err = nil // the reader has failed, and said so
	}
	w.followLocked()
	w.again(true)
	w.m.events = nil
	close(w.done)
	return errors.Join(err, w.pm.Close())
}

// wait returns when the watch has ended and what it followed is reported.
func (w *EventWatch) wait() {
	w.gone.Wait()
	w.reports.tell()
}

// reader is the goroutine that reads messages.
func (w *EventWatch) reader() {
	var err error
	for err == nil {
		if err = w.fd.Wait(); err != nil {
			break
		}
		why := w.await()
		var some bool
		some, err = w.take(why)
		if why == covered {
			w.taken <- struct{}{}
		} else if some {
			w.wake()
		}
	}
	if !errors.Is(err, os.ErrClosed) {
		// Nobody is to wait for a reader that has gone.
		err = errors.Join(fmt.Errorf("nothing is followed any more: %w", err), w.fd.Close())
		w.reportLater(Stray{Change: Change{Op: OpStrayGap, Time: time.Now()}, Evidence: Event, Fate: Unknown, Err: err})
	}
}

// reason is why messages may be read.
type reason uint8

const (
	covered reason = iota // a bracket is open that fits all, until the follower has been told that they are read
	calling               // an operation is in its system call, and may wait for it
	overdue               // no bracket came for too long
)

// wake has the follower look.
func (w *EventWatch) wake() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// await blocks until messages may be read, and returns why.
func (w *EventWatch) await() reason {
	ready := make(chan struct{})
	w.mu.Lock()
	if w.callingLocked() {
		w.mu.Unlock()
		return calling
	}
	w.ready = ready
	w.mu.Unlock()
	w.wake()
	enough := time.NewTimer(w.config.patience)
	defer enough.Stop()
	for {
		why := overdue
		select {
		case <-ready:
			return covered
		case <-w.began:
			why = calling
		case <-enough.C:
		case <-w.done:
		}
		if why, ok := w.without(why); ok {
			return why
		}
	}
}

// without has the reader not wait for a bracket any more, and returns why messages may be
// read then. If the reason was that an operation is in its system call, and it is not, ok is
// false, and he waits on.
func (w *EventWatch) without(why reason) (_ reason, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.ready == nil:
		return covered, true // a moment ago
	case why == calling && !w.callingLocked():
		return why, false
	}
	w.ready = nil
	return why, true
}

// callingLocked reports whether an operation is in a system call that the kernel tells of.
func (w *EventWatch) callingLocked() bool { return w.own[0].Kind != 0 }

// take reads messages, keeps those that are not an operation's, and reports whether there
// are any to follow. With a bracket it reads all there are. Else it reads once, and for an
// operation only if that is still in its system call: whoever comes next may get a bracket.
func (w *EventWatch) take(why reason) (some bool, err error) {
	var read [16]uffd.Message
	for n := 1; n > 0 && err == nil; {
		w.mu.Lock()
		if n = 0; why != calling || w.callingLocked() {
			n, err = w.fd.Read(read[:])
		}
		for _, msg := range read[:n] {
			op := w.ownID
			own := w.ownLocked(msg)
			if w.mutant != soundEvents {
				w.read++
				own = own != (w.read%mutantEvery == 0 && own == (w.mutant == eventTwice))
			}
			if !own {
				op = w.m.log.NewOp()
				w.pending = append(w.pending, message{msg, why != covered, w.moving, op})
			}
			w.m.log.Record(trace.Event{Kind: trace.Kernel, Op: op, Name: eventName(msg.Kind), HVA: msg.Range})
		}
		some = len(w.pending) > 0
		w.mu.Unlock()
		if why != covered {
			break
		}
	}
	return some, err
}

// ownLocked reports whether a message is one that the operation in its system call was
// going to cause. The kernel tells of a Remove mapping by mapping, and of all else once.
func (w *EventWatch) ownLocked(msg uffd.Message) bool {
	for i := range w.own {
		own := &w.own[i]
		if own.Kind != msg.Kind {
			continue
		}
		if msg.Kind == uffd.Remove {
			if !own.Range.Contains(msg.Range) {
				return false
			}
			for _, r := range w.told {
				if r.Overlaps(msg.Range) {
					return false
				}
			}
			w.told = append(w.told, msg.Range)
			return true
		}
		if *own == msg {
			own.Kind = told
			return true
		}
	}
	return false
}

// eventName is what a message is called in the trace.
func eventName(k uffd.Kind) string {
	switch k {
	case uffd.Remove:
		return "uffd-remove"
	case uffd.Unmap:
		return "uffd-unmap"
	case uffd.Remap:
		return "uffd-remap"
	case uffd.Fork:
		return "uffd-fork"
	}
	return "uffd-" + k.String()
}

// told is the kind of a message of an operation that has been read.
const told uffd.Kind = 0xff

// causes returns what the kernel will tell of the system calls of an operation; nothing,
// as zeros, if there is none.
func (req request) causes() (own [3]uffd.Message) {
	is := func(kind uffd.Kind, r addr.HVARange) uffd.Message {
		return uffd.Message{Kind: kind, Range: r, Child: -1}
	}
	switch req.op {
	case OpDiscard, OpFree, OpRemove:
		own[0] = is(uffd.Remove, req.r)
	case OpUnmap, OpMap:
		own[0] = is(uffd.Unmap, req.r)
	case OpRemap, OpRemapKeep:
		own[0], own[1], own[2] = is(uffd.Remap, req.r), is(uffd.Unmap, addr.HVAs(req.to, req.r.Bytes())), is(uffd.Unmap, req.r)
		own[0].To = req.to
	}
	return own
}

// call makes the system calls of an operation. The caller holds the mapping lock for writing.
func (w *EventWatch) call(req request, do func() error) error {
	own := req.causes()
	if own[0].Kind == 0 {
		return do()
	}
	w.mu.Lock()
	w.own, w.ownID, w.told = own, req.id, w.told[:0]
	if own[0].Kind == uffd.Remap {
		w.moving = moving{req.r, req.to}
	}
	w.mu.Unlock()
	select {
	case w.began <- struct{}{}:
	default:
	}
	err := do()
	w.mu.Lock()
	w.own, w.moving = [3]uffd.Message{}, moving{}
	w.mu.Unlock()
	// What has been mapped is not registered. This comes before anybody looks for what
	// others have mapped.
	for _, msg := range own {
		if msg.Kind != uffd.Unmap {
			continue
		}
		if err := w.register(msg.Range); err != nil {
			w.reportLater(Stray{Change: Change{Op: OpStrayGap, Range: msg.Range, Time: time.Now()}, Evidence: Event, Err: fmt.Errorf("from here on it is not watched: %w", err)})
		}
	}
	return err
}

// follow is the goroutine that follows what was read.
func (w *EventWatch) follow() {
	for {
		select {
		case <-w.done:
			return
		case <-w.kick:
		}
		w.m.as.Lock()
		if !w.ended {
			w.cover()
			w.followLocked()
		}
		w.m.as.Unlock()
		w.reports.tell()
	}
}

// cover opens a bracket that fits all, if the reader waits for one, and follows what is
// read. The caller holds the mapping lock for writing.
func (w *EventWatch) cover() {
	m := w.m
	if !w.awaited() {
		return
	}
	w.covering = w.covering[:0]
	for _, r := range m.regions {
		w.covering = append(w.covering, notifier.Invalidation{Range: r.Range, Event: notifier.Remap, After: addr.NoAccess, To: r.Range.Start, Content: notifier.Kept})
	}
	all := m.span()
	m.doing = request{op: OpStray, r: all, stray: true}
	id := m.begun(OpStray, all)
	m.reports.collect()
	_ = m.bracketed(id, w.covering, func() error {
		w.mu.Lock()
		ready := w.ready
		w.ready = nil
		w.mu.Unlock()
		if ready != nil {
			close(ready)
			<-w.taken
			w.followLocked()
		}
		return errCovered
	})
	if err := m.ended(id, OpStray, all, false, m.reports.collected()); err != nil {
		w.reportLater(Stray{Change: Change{Op: OpStray, Range: all, Time: time.Now()}, Evidence: Event, Content: notifier.Kept, Err: err})
	}
}

// errCovered has the bracket that fits all end as one in which no pages were moved.
var errCovered = errors.New("the bracket was opened in case")

func (w *EventWatch) awaited() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ready != nil
}

// followLocked follows what was read. The caller holds the mapping lock for writing.
func (w *EventWatch) followLocked() {
	w.again(false)
	for {
		w.mu.Lock()
		pending := w.pending
		w.pending = nil
		w.mu.Unlock()
		if len(pending) == 0 {
			return
		}
		for _, msg := range pending {
			w.m.followed = msg.op
			w.followOne(msg)
		}
		w.m.followed = 0
	}
}

func (w *EventWatch) followOne(msg message) {
	switch msg.Kind {
	case uffd.Remove:
		for _, r := range w.m.parts(msg.Range) {
			w.removed(r, msg)
		}
	case uffd.Unmap:
		w.takenAway(OpStrayUnmap, msg.Range, 0, msg.late)
	case uffd.Remap:
		w.remapped(msg)
	case uffd.Fork:
		w.forked(msg)
	default:
		w.gap(fmt.Errorf("the kernel tells of what is not known: %v", msg.Message))
	}
}

// made follows a change, and has it reported.
func (w *EventWatch) made(s Stray, brackets []notifier.Invalidation, becomes func(*Change) []Extent) {
	s.Evidence = Event
	w.reportLater(w.m.made(s, brackets, becomes))
}

// removed follows a discard of r, which lies in a region.
func (w *EventWatch) removed(r addr.HVARange, msg message) {
	m := w.m
	shared, anonymous := false, true
	for x := range m.extents.in(r) {
		shared, anonymous = shared || x.Shared(), anonymous && x.object == nil
	}
	sure, err := w.settle(r, shared, msg.late)
	s := Stray{Change: Change{Op: OpStrayRemove, Range: r}, Fate: Stays, Late: msg.late, Err: err}
	w.made(s, w.changed(r), func(*Change) []Extent {
		// In the bracket nobody stores by the table. What a guest stores comes to the dirty
		// log after this.
		if some, err := w.there(r, shared); anonymous && !some && err == nil {
			m.brackets[0].Content = notifier.Zeroed
		}
		return nil
	})
	if !sure {
		w.later(r)
	}
	// The pages may have been discarded where they are, or where they were.
	if both := msg.from.Intersect(r); !both.Empty() {
		for _, part := range m.parts(addr.HVAs(msg.to+(both.Start-msg.from.Start), both.Bytes())) {
			w.once(part)
			w.later(part)
		}
	}
}

// changed returns the brackets in which r, and what shows the same memory, has changed.
func (w *EventWatch) changed(r addr.HVARange) []notifier.Invalidation {
	m := w.m
	brackets := []notifier.Invalidation{m.cleared(r, uncertain)}
	for y := range m.aliases(r) { // it may have been the memory that was freed, and not only its mapping
		if y.Shared() {
			brackets = append(brackets, m.cleared(y.Range, uncertain))
		}
	}
	return brackets
}

// once follows that r has changed, and is not reported.
func (w *EventWatch) once(r addr.HVARange) {
	if s := w.m.made(Stray{Change: Change{Op: OpStrayRemove, Range: r}}, w.changed(r), nil); s.Err != nil {
		s.Evidence = Event
		w.reportLater(s)
	}
}

// later has r counted as changed for some time.
func (w *EventWatch) later(r addr.HVARange) {
	w.unsettled = slices.DeleteFunc(w.unsettled, func(u unsettled) bool {
		if u.r.Start > r.End || r.Start > u.r.End || w.m.region(u.r) != w.m.region(r) {
			return false
		}
		r = addr.HVARange{Start: min(r.Start, u.r.Start), End: max(r.End, u.r.End)}
		return true
	})
	w.unsettled = append(w.unsettled, unsettled{r, time.Now().Add(w.config.late)})
	time.AfterFunc(w.config.late+time.Millisecond, w.wake)
}

// again follows once more what may have changed since it was followed, if its time is
// over, or in any case. The caller holds the mapping lock for writing.
func (w *EventWatch) again(all bool) {
	if len(w.unsettled) == 0 {
		return
	}
	now := time.Now()
	w.unsettled = slices.DeleteFunc(w.unsettled, func(u unsettled) bool {
		over := now.After(u.until)
		if over || all {
			w.once(u.r)
		}
		return over
	})
}

// there reports whether any page of r is. Of shared memory the pages themselves are meant.
func (w *EventWatch) there(r addr.HVARange, shared bool) (bool, error) {
	const there = pagemap.Present | pagemap.Swapped
	var found [1]pagemap.Region
	n, _, err := w.pm.Scan(pagemap.Request{Range: r, Any: there, Report: there}, found[:])
	if n > 0 || err != nil || !shared {
		return n > 0, err
	}
	some, err := resident(r)
	if errors.Is(err, unix.ENOMEM) {
		return true, nil // a hole, of which there is another message
	}
	return some, err
}

// settle waits until no page of r is there, but not for long, and reports whether it is
// sure that the discard is done: the last page, with which it ends, has been seen to go,
// when nobody could have brought others back.
func (w *EventWatch) settle(r addr.HVARange, shared, late bool) (sure bool, err error) {
	was, err := w.there(addr.HVAs(r.End-addr.PageSize, addr.PageSize), shared)
	if err != nil {
		return false, err
	}
	for deadline := time.Now().Add(w.config.settle); ; time.Sleep(settleTime / 100) {
		some, err := w.there(r, shared)
		if err != nil {
			return false, err
		}
		if !some || time.Now().After(deadline) {
			return was && !some && !late, nil
		}
	}
}

// takenAway follows an unmapping of r, or that its pages moved away to to.
func (w *EventWatch) takenAway(op Op, r addr.HVARange, to addr.HVA, late bool) {
	for _, part := range w.m.parts(r) {
		pieces, err := w.look(part)
		if err != nil {
			pieces = []piece{{r: part, fate: Unknown}}
		}
		for _, p := range pieces {
			if p.fate == Stays {
				continue // it has been mapped again, by an operation, or reserved
			}
			s := Stray{Change: Change{Op: op, Range: p.r}, Fate: p.fate, Late: late, Err: errors.Join(err, p.err)}
			if op == OpStrayRemap {
				s.To = to + (p.r.Start - r.Start)
			}
			w.lost(s)
		}
	}
}

// lost follows that s.Range is not the guest's any more, and has it reported.
func (w *EventWatch) lost(s Stray) {
	s.Evidence = Event
	w.reportLater(w.m.lose(s))
}

// remapped follows pages that mremap(2) has moved.
func (w *EventWatch) remapped(msg message) {
	m := w.m
	from, target := msg.Range, addr.HVAs(msg.To, msg.Range.Bytes())
	s := Stray{Change: Change{Op: OpStrayRemap, Range: from, To: msg.To}, Late: msg.late}
	if m.region(from) == nil || m.region(target) == nil {
		// What moved out of guest memory, or into it, is not the guest's.
		w.takenAway(OpStrayRemap, from, msg.To, msg.late)
		for _, part := range m.parts(from) {
			w.emptied(part, msg.late)
		}
		for _, part := range m.parts(target) {
			in := s
			in.Range, in.To, in.Fate = part, 0, Foreign
			w.lost(in)
		}
		return
	}
	pieces, err := w.look(from)
	if s.Err = err; err != nil {
		pieces = []piece{{r: from, fate: Unknown}}
	}
	if err == nil && len(pieces) == 1 && pieces[0].fate == Stays { // MREMAP_DONTUNMAP
		s.Fate = Stays
		w.made(s, []notifier.Invalidation{m.replaced(target), m.cleared(from, dropped)}, func(*Change) []Extent { return m.moved(from, msg.To) })
		return
	}
	// The content is what it was. But whoever harvested since the pages went could not read
	// them where they had been, and has to come back.
	s.Fate = Moved
	w.made(s, []notifier.Invalidation{
		{Range: from, Event: notifier.Remap, After: addr.NoAccess, To: msg.To, Content: notifier.Changed},
		m.replaced(target),
	}, func(c *Change) []Extent {
		xs := m.moved(from, msg.To)
		for _, p := range pieces {
			xs = append(xs, Extent{Range: p.r, Why: c, foreign: p.fate != Reserved})
		}
		return xs
	})
}

// emptied follows that the pages of r have moved out of guest memory where the mapping
// has stayed.
func (w *EventWatch) emptied(r addr.HVARange, late bool) {
	for x := range w.m.extents.in(r) {
		if x.Mapped {
			w.made(Stray{Change: Change{Op: OpStrayRemap, Range: x.Range}, Fate: Stays, Late: late}, []notifier.Invalidation{w.m.cleared(x.Range, dropped)}, nil)
		}
	}
}

// forked follows that another process has a copy of the memory.
func (w *EventWatch) forked(msg message) {
	err := unix.Close(msg.Child)
	brackets := w.m.copied(nil)
	w.made(Stray{Change: Change{Op: OpStrayFork, Range: w.m.span()}, Fate: Stays, Late: msg.late, Err: err}, brackets, nil)
}

// gap has all content taken to be changed.
func (w *EventWatch) gap(err error) {
	for _, r := range w.m.regions {
		w.made(Stray{Change: Change{Op: OpStrayGap, Range: r.Range}, Fate: Stays, Late: true, Err: err}, []notifier.Invalidation{w.m.cleared(r.Range, uncertain)}, nil)
	}
}

// look finds out what is mapped in r: what is registered is the guest's, and stays; where
// there is a hole a reservation is put; and all else is foreign.
func (w *EventWatch) look(r addr.HVARange) (pieces []piece, err error) {
	add := func(p piece) {
		if n := len(pieces); n > 0 && pieces[n-1].fate == p.fate && pieces[n-1].r.End == p.r.Start && p.err == nil {
			pieces[n-1].r.End = p.r.End
		} else if !p.r.Empty() {
			pieces = append(pieces, p)
		}
	}
	var found [32]pagemap.Region
	for at := r.Start; at < r.End; {
		n, end, err := w.pm.Scan(pagemap.Request{Range: addr.HVARange{Start: at, End: r.End}, All: pagemap.WPAllowed, Report: pagemap.WPAllowed}, found[:])
		if err != nil {
			return nil, err
		}
		for _, f := range found[:n] {
			w.m.fill(addr.HVARange{Start: at, End: f.Range.Start}, add)
			add(piece{r: f.Range, fate: Stays})
			at = f.Range.End
		}
		w.m.fill(addr.HVARange{Start: at, End: end}, add)
		at = end
	}
	return pieces, nil
}

// reportLater has s reported by the follower, or whoever comes first.
func (w *EventWatch) reportLater(s Stray) {
	w.reports.later(s)
	w.wake()
}
