package mm

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/pagemap"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/internal/tracefs"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

// TraceConfig says what a [TraceWatch] does.
type TraceConfig struct {
	// Report is called with each change that was followed, as EventConfig.Report is.
	Report func(Stray)
}

// TraceWatch follows changes of a Memory's mappings by what KVM does about them: it drops
// its own mappings of a range, and passes the tracepoint kvm_unmap_hva_range as it does.
// That is so for every change, whoever makes it, the kernel included:
//
//	what                                          followed as            content
//	munmap, mremap to elsewhere                   OpStrayZap, Reserved   gone
//	mmap with MAP_FIXED over                      OpStrayZap, Stays      changed
//	madvise DONTNEED, FREE, REMOVE, GUARD_INSTALL OpStrayZap, Stays      changed
//	fallocate PUNCH_HOLE, ftruncate, mprotect     OpStrayZap, Stays      changed
//	reclaim, migration, merging, copy-on-write    OpStrayZap, Stays      changed
//	stores, writes to the file                    nothing
//	anything while the process has no VM          nothing
//
// The tracepoint says of which range, afterwards, and not why. So reclaim cannot be told
// from a discard, nor one mapping from another in its place, nor a permission that went:
// where all of the range is mapped, the slots stay, and the content counts as changed. That
// is too much for what the kernel does by itself, and costs the copying of some pages; to
// take it for kept would lose pages whenever it is wrong. If an EventWatch has been there
// as well, a discard of private anonymous memory would have been told of; then pages that
// are present have kept their content, and only others count as changed.
//
// What belongs to an operation is told by its time and its range, in blocks of 2 MiB, since
// KVM drops that much where the kernel splits a mapping. A stray change inside of these two
// is taken for a part of the operation. A WriteLog write-protects what it logs, which KVM
// drops too: under a watch everything that is logged would be reported as changed.
//
// KVM's aging of pages is not followed: it changes no mapping.
//
// Records that find no room are counted by the kernel, and followed as an OpStrayGap, in
// which all content is changed.
//
// If the Memory has a log, each record is an event there, with the number of the operation
// that it is a part of, or of the one that follows it. So are some more tracepoints of KVM
// then, if there are such: those of aging, in the regions, and of faults of guests. These are
// told of some milliseconds late, and nothing follows from them.
type TraceWatch struct {
	m        *Memory
	source   zapSource
	recorder *perf.Recorder
	start    tracefs.Field
	end      tracefs.Field // where the range ends, or its length
	sights   *sights       // what is recorded in the log besides; nil: nothing
	clock    perf.Clock    // of the log, if there is one
	config   TraceConfig

	reports strays
	closed  atomic.Bool
	gone    sync.WaitGroup

	// What follows is protected by the mapping lock.
	ended bool
	calls calls
	zaps  []zap // of one reading; kept to be used again
}

// zap is one passing of the tracepoint.
type zap struct {
	time uint64 // nanoseconds of CLOCK_MONOTONIC
	r    addr.HVARange
}

// zapSource is a tracepoint that tells of ranges, by the names of its fields.
type zapSource struct {
	system, name string
	start, end   string
	length       string // instead of end
}

var kvmZaps = zapSource{system: "kvm", name: "kvm_unmap_hva_range", start: "start", end: "end"}

// filter is what the kernel evaluates to find those records that have to do with rs.
func (s zapSource) filter(rs []addr.HVARange) string {
	var terms []string
	for _, r := range rs {
		term := fmt.Sprintf("%s < %#x && %s > %#x", s.start, uint64(r.End), s.end, uint64(r.Start))
		if s.end == "" {
			term = fmt.Sprintf("%s < %#x && %s >= %#x", s.start, uint64(r.End), s.start, uint64(r.Start))
		}
		terms = append(terms, "("+term+")")
	}
	return strings.Join(terms, " || ")
}

// ringPages is the size in pages of the ring of a CPU: some four thousand records.
const ringPages = 64

// WatchTrace has changes of the memory followed by the tracepoint of KVM, in all regions
// that there are now, until Close or the end of the memory. There is one such watch for a
// memory at a time, which is EBUSY otherwise.
//
// The error is fs.ErrNotExist where the kernel's KVM has no such tracepoint, or is not
// loaded, and EPERM or EACCES without the permission to open tracefs and to record what all
// threads do: CAP_SYS_ADMIN, or CAP_PERFMON and a tracefs that is mounted and can be read.
func (m *Memory) WatchTrace(c TraceConfig) (*TraceWatch, error) {
	return m.watchTrace(c, kvmZaps, kvmSights()...)
}

// watchTrace is WatchTrace by a tracepoint, with others that are recorded in the log.
func (m *Memory) watchTrace(c TraceConfig, source zapSource, others ...sightSource) (*TraceWatch, error) {
	if c.Report == nil {
		c.Report = logStray
	}
	w := &TraceWatch{m: m, source: source, config: c, reports: strays{report: c.Report}}
	m.as.Lock()
	defer m.as.Unlock()
	if err := w.open(others); err != nil {
		return nil, fmt.Errorf("watch guest memory by tracepoint %s:%s: %w", source.system, source.name, err)
	}
	m.traced = w
	w.gone.Go(w.follow)
	if w.sights != nil {
		w.gone.Go(w.sights.watch)
	}
	return w, nil
}

// open begins to record. The caller holds the mapping lock for writing.
func (w *TraceWatch) open(others []sightSource) error {
	m := w.m
	switch {
	case m.closed:
		return os.ErrClosed
	case m.traced != nil:
		return fmt.Errorf("the memory has such a watch: %w", unix.EBUSY)
	case len(m.regions) == 0:
		return fmt.Errorf("there is no region to watch: %w", unix.EINVAL)
	}
	fs, err := tracefs.Open()
	if err != nil {
		return err
	}
	defer fs.Close()
	tp, err := fs.Tracepoint(w.source.system, w.source.name)
	if err != nil {
		return err
	}
	if w.start, err = tp.Field(w.source.start); err != nil {
		return err
	}
	if w.end, err = tp.Field(cmp.Or(w.source.length, w.source.end)); err != nil {
		return err
	}
	var rs []addr.HVARange
	for _, r := range m.regions {
		rs = append(rs, r.Range)
	}
	w.recorder, err = perf.NewRecorder(perf.RecorderConfig{Tracepoints: []perf.Tracepoint{{ID: tp.ID, Filter: w.source.filter(rs)}}, Pages: ringPages})
	if err != nil || m.log == nil {
		return err
	}
	w.clock = perf.NewClock(m.log.Start())
	if w.sights, err = openSights(m.log, w.clock, fs, rs, others); err != nil {
		return errors.Join(err, w.recorder.Close())
	}
	return nil
}

// Close ends the watch. It returns when all that was recorded has been followed and
// reported, which takes the mapping lock for writing. It is called once: a second Close
// returns os.ErrClosed. The end of the memory ends the watch too, but does not close it.
func (w *TraceWatch) Close() error {
	if w.closed.Swap(true) {
		return fmt.Errorf("close the watch of guest memory: %w", os.ErrClosed)
	}
	w.m.as.Lock()
	err := w.endLocked()
	w.m.as.Unlock()
	w.wait()
	return err
}

// endLocked ends the watch, if it has not ended. The caller holds the mapping lock for
// writing; once he has given it back, he calls wait.
func (w *TraceWatch) endLocked() error {
	if w.ended {
		return nil
	}
	w.ended = true
	err := errors.Join(w.recorder.Interrupt(), w.sights.end())
	w.followLocked()
	w.m.traced = nil
	return err
}

// wait returns when the watch has ended and what it followed is reported.
func (w *TraceWatch) wait() {
	w.gone.Wait()
	w.reports.tell()
}

// follow is the goroutine that follows what is recorded.
func (w *TraceWatch) follow() {
	for {
		err := w.recorder.Wait(-1)
		w.m.as.Lock()
		ended := w.ended
		if !ended {
			w.followZapsLocked()
		}
		if !ended && err != nil {
			ended = true
			w.reports.later(Stray{Change: Change{Op: OpStrayGap, Time: time.Now()}, Evidence: Trace, Fate: Unknown, Err: fmt.Errorf("nothing is followed any more: %w", err)})
		}
		w.m.as.Unlock()
		w.reports.tell()
		if ended {
			break
		}
	}
	if err := w.recorder.Close(); err != nil {
		w.config.Report(Stray{Change: Change{Op: OpStrayGap, Time: time.Now()}, Evidence: Trace, Fate: Unknown, Err: err})
	}
}

// followLocked follows what is recorded, and logs what is seen besides. The caller holds the
// mapping lock for writing.
func (w *TraceWatch) followLocked() {
	w.followZapsLocked()
	w.sights.read()
}

// followZapsLocked follows what is recorded. The caller holds the mapping lock for writing, so
// that no operation is in flight: each that a record can be of has been remembered.
func (w *TraceWatch) followZapsLocked() {
	lost := uint64(0)
	w.zaps = w.zaps[:0]
	err := w.recorder.Read(func(rec perf.Record) {
		if lost += rec.Lost; rec.Lost > 0 {
			return
		}
		start, ok := w.start.Uint(rec.Raw)
		end, ok2 := w.end.Uint(rec.Raw)
		if !ok || !ok2 {
			lost++ // it is not known what it was of
			return
		}
		if w.source.length != "" {
			end += start
		}
		z := zap{rec.Time, pagesOf(start, end)}
		if op, ok := w.calls.explain(z); ok {
			w.told(op, z)
		} else {
			w.zaps = append(w.zaps, z)
		}
	})
	if lost > 0 || err != nil {
		op := w.m.log.NewOp()
		w.told(op, w.zaps...)
		if lost > 0 {
			w.m.log.Record(trace.Event{Kind: trace.Kernel, Op: op, Name: trace.KernelLost, Pages: lost})
		}
		w.m.followed = op
		w.gap(errors.Join(fmt.Errorf("%d records of changes are lost", lost), err))
		w.m.followed = 0
		return
	}
	// One bracket for what touches: a huge page goes page by page.
	slices.SortFunc(w.zaps, func(a, b zap) int { return cmp.Compare(a.r.Start, b.r.Start) })
	for i := 0; i < len(w.zaps); {
		first, r := i, w.zaps[i].r
		for i++; i < len(w.zaps) && w.zaps[i].r.Start <= r.End; i++ {
			r.End = max(r.End, w.zaps[i].r.End)
		}
		w.m.followed = w.m.log.NewOp()
		w.told(w.m.followed, w.zaps[first:i]...)
		for _, part := range w.m.parts(r) {
			w.zapped(part)
		}
	}
	w.m.followed = 0
}

// pagesOf returns the pages that have addresses from start to end.
func pagesOf(start, end uint64) addr.HVARange {
	r := addr.HVARange{Start: addr.HVA(start) &^ addr.PageMask, End: (addr.HVA(end) + addr.PageMask) &^ addr.PageMask}
	if end > ^uint64(addr.PageMask) { // of everything
		r.End = ^addr.HVA(addr.PageMask)
	}
	return r
}

// told records zaps in the trace, as of an operation.
func (w *TraceWatch) told(op uint64, zaps ...zap) {
	if w.m.log == nil {
		return
	}
	for _, z := range zaps {
		w.m.log.Record(trace.Event{Kind: trace.Kernel, Op: op, Name: w.source.name, HVA: z.r, At: momentOf(w.clock, z.time)})
	}
}

// zapped follows that pages of r went, which lies in a region.
func (w *TraceWatch) zapped(r addr.HVARange) {
	if w.m.events != nil || occupied(r) { // what was unmapped, the other watch follows
		w.m.judge(r, w.stays)
		return
	}
	w.m.fill(r, func(p piece) {
		if p.fate == Foreign { // something is mapped, and nothing says that it is not the guest's
			w.m.judge(p.r, w.stays)
			return
		}
		if !w.m.mappedSome(p.r) {
			return // a reservation that was there before
		}
		s := Stray{Change: Change{Op: OpStrayZap, Range: p.r}, Evidence: Trace, Fate: p.fate, Late: true, Err: p.err}
		w.reports.later(w.m.lose(s))
	})
}

// stays follows that pages went from r, where the mapping is.
func (w *TraceWatch) stays(r addr.HVARange, content func(Extent) notifier.Content) {
	if !w.m.mappedSome(r) {
		return
	}
	s := Stray{Change: Change{Op: OpStrayZap, Range: r}, Evidence: Trace, Fate: Stays, Late: true}
	w.reports.later(w.m.made(s, []notifier.Invalidation{w.m.cleared(r, content)}, nil))
}

// gap has all content taken to be changed, and where nothing is mapped, slots cut.
func (w *TraceWatch) gap(err error) {
	for _, region := range w.m.regions {
		s := Stray{Change: Change{Op: OpStrayGap, Range: region.Range}, Evidence: Trace, Fate: Stays, Late: true, Err: err}
		w.reports.later(w.m.made(s, []notifier.Invalidation{w.m.cleared(region.Range, uncertain)}, nil))
		if !occupied(region.Range) {
			w.zapped(region.Range)
		}
	}
}

// judge calls fn for runs of r, which is mapped, and with what can be known of the content
// after pages went.
func (m *Memory) judge(r addr.HVARange, fn func(addr.HVARange, func(Extent) notifier.Content)) {
	anonymous := true
	for x := range m.extents.in(r) {
		anonymous = anonymous && x.object == nil
	}
	if m.events == nil || !anonymous {
		fn(r, uncertain)
		return
	}
	var found [32]pagemap.Region
	for at := r.Start; at < r.End; {
		n, end, err := m.events.pm.Scan(pagemap.Request{Range: addr.HVARange{Start: at, End: r.End}, All: pagemap.Present, Report: pagemap.Present}, found[:])
		if err != nil {
			fn(addr.HVARange{Start: at, End: r.End}, uncertain)
			return
		}
		for _, f := range found[:n] {
			if at < f.Range.Start {
				fn(addr.HVARange{Start: at, End: f.Range.Start}, uncertain)
			}
			fn(f.Range, kept)
			at = f.Range.End
		}
		if at < end {
			fn(addr.HVARange{Start: at, End: end}, uncertain)
			at = end
		}
	}
}

// mappedSome reports whether any of r is the guest's.
func (m *Memory) mappedSome(r addr.HVARange) bool {
	for x := range m.extents.in(r) {
		if x.Mapped {
			return true
		}
	}
	return false
}

// call makes the system calls of an operation, and remembers when. The caller holds the
// mapping lock for writing.
func (w *TraceWatch) call(req request, do func() error) error {
	begin := perf.Now()
	err := do()
	rs := []addr.HVARange{req.r, addr.HVAs(req.to, req.r.Bytes())}
	for i := range w.m.brackets {
		rs = append(rs, w.m.brackets[i].Range)
	}
	for i := range rs { // as much as KVM may drop
		rs[i].Start &^= addr.HugeSize - 1
		rs[i].End = (rs[i].End + addr.HugeSize - 1) &^ (addr.HugeSize - 1)
	}
	w.calls.add(call{begin, perf.Now(), rs, req.id})
	return err
}

// followed remembers a change that an EventWatch has followed just now, and began to at a
// time. A zap of the range that came before that tells nothing more, unless the content was kept.
func (w *TraceWatch) followed(s Stray, began uint64) {
	if s.Content != notifier.Kept {
		w.calls.add(call{0, began, []addr.HVARange{s.Range}, w.m.doing.id})
	}
}

// calls is what was changed lately, and is known by better evidence.
type calls struct {
	ring [1024]call // call n is at n % len
	n    int
}

// call is a time, in nanoseconds of CLOCK_MONOTONIC, both ends included, and what may have
// been changed in it.
type call struct {
	begin, end uint64
	rs         []addr.HVARange
	op         uint64 // the number in the trace of what changed it
}

func (c *calls) add(o call) {
	c.ring[c.n%len(c.ring)] = o
	c.n++
}

// explain reports whether a zap was part of a call that is remembered, and of which operation.
func (c *calls) explain(z zap) (op uint64, ok bool) {
	for i := c.n - 1; i >= max(0, c.n-len(c.ring)); i-- {
		o := &c.ring[i%len(c.ring)]
		if z.time < o.begin || z.time > o.end {
			continue
		}
		for _, r := range o.rs {
			if r.Contains(z.r) {
				return o.op, true
			}
		}
	}
	return 0, false
}
