package hmm

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// walk is one look at page tables; it is a part of what it is for, so that it is not
// allocated each time. Layer L is that of a Range, layer I that of a Request.
type walk struct {
	walkOf

	at      addr.HVA      // everything below has been found and written
	access  addr.Access   // of the region that is walked
	pending addr.HVARange // what is to be faulted in before the walk goes on; empty: nothing
	need    Entry         // for what: ReqFault, or ReqFault and ReqWrite
	failed  *Error        // what the walk has ended with
	visitor func(run addr.HVARange, pfn addr.PFN, pte uint32) bool
}

// walkOf is what a walk is of. It does not change during it.
type walkOf struct {
	op      string
	r       addr.HVARange
	shift   uint // from an address to the page that an entry is for
	tables  PageTables
	entries []Entry

	def, mask Entry
	owner     any

	list        bool                   // of layer L
	report      bool                   // nothing is asked for
	nonblocking bool                   // faults give up where they would have to wait
	droppable   *notifier.AddressSpace // and then are tried without its mapping lock; nil: then the walk ends

	look   interface{ stale() bool } // reports whether something has changed since the begin
	mutant mutant
}

// maxFaults is how often a fault at one address may succeed without the page being
// there afterwards. Then something else takes it away each time, and whoever bounds
// the whole look is to decide.
const maxFaults = 64

// run walks. A fault ends the pass that meets its page, and the next one goes on there:
// not at the start, where entries are answers already and would be read as questions.
func (w *walk) run() *Error {
	if w.visitor == nil {
		w.visitor = w.visit
	}
	w.at, w.failed = w.r.Start, nil
	for last, times := w.r.Start, 0; ; times++ {
		if (w.mutant != recheckOmitted || times == 0) && w.look.stale() {
			return w.busy("a change has begun")
		}
		w.pass()
		if w.failed != nil {
			return w.failed
		}
		if w.pending.Empty() {
			return nil
		}
		if w.faultIn(); w.failed != nil {
			return w.failed
		}
		if w.at != last {
			last, times = w.at, 0
		}
		if times >= maxFaults {
			return w.busy("it is taken away as often as it is faulted in")
		}
		if w.mutant == restartAtStart {
			w.at = w.r.Start
		}
	}
}

// busy is the error of a look that is to be tried again. Entries from w.at on are still
// what was asked.
func (w *walk) busy(why string) *Error {
	errno := syscall.EBUSY
	if w.list {
		errno = syscall.EAGAIN
	}
	return &Error{Op: w.op, Range: w.r, At: w.at, Why: why, Errno: errno}
}

// pass walks from w.at until the end, a failure, or something to fault in.
func (w *walk) pass() {
	w.pending = addr.HVARange{}
	for w.at < w.r.End && w.failed == nil {
		region, access, attrs := w.tables.Region(w.at)
		part := region.Intersect(addr.HVARange{Start: w.at, End: w.r.End})
		if part.Empty() || part.Start != w.at || !part.Aligned() {
			panic(fmt.Sprintf("hmm: %T says that the region of %v is %v", w.tables, w.at, region))
		}
		w.access = access
		if w.skip(part, attrs) {
			continue
		}
		if err := w.tables.Walk(part, w.owner, w.visitor); err != nil {
			w.fail(addr.HVARange{Start: w.at, End: w.at}, 0, errnoOf(err), "the page tables cannot be read", err)
			return
		}
		switch {
		case w.failed != nil || !w.pending.Empty():
			return
		case w.at != part.End:
			panic(fmt.Sprintf("hmm: %T walks %v and ends at %v", w.tables, part, w.at))
		}
	}
}

// skip deals with a part of the range that cannot be walked, and reports whether it was
// one. Where something is asked for, or the layer does not have it, that is a failure.
func (w *walk) skip(part addr.HVARange, attrs uint32) bool {
	const base = addr.PageShift
	order := uint(attrs >> OrderShift)
	switch {
	case attrs&RegionMapped == 0:
		w.refuse(part, EntryError, "there is no region")
	case attrs&RegionSpecial != 0 && w.list:
		w.refuse(part, EntrySpecial, "the region is not of pages")
	case attrs&RegionSpecial != 0:
		w.refuse(part, EntryError, "the region is not of pages")
	case w.access&addr.Read == 0 && w.list:
		// "If the vma does not allow read access, then assume that it does not allow
		// write access either" (hmm_vma_get_pfns): no MMU here has one without the other.
		clear(w.entries)
		w.fail(part, 0, w.errno(syscall.EPERM), "the region is not readable", nil)
	case w.access&addr.Read == 0:
		w.refuse(part, EntryError, "the region is not readable")
	case w.list && w.shift != base && w.shift != base+order:
		w.fail(part, 0, syscall.EINVAL, "the region has pages of another size", nil)
	default:
		return false
	}
	return true
}

// refuse gives the entries of a part the flag of why they cannot be had, and fails
// unless that is an answer.
func (w *walk) refuse(part addr.HVARange, flag Entry, why string) {
	if w.mutant != skipAsked && (w.list || w.wants(part, 0) != 0) {
		w.fail(part, flag, w.errno(syscall.EFAULT), why, nil)
		return
	}
	w.set(part, flag, 0)
}

// errno is errno, but for a defect.
func (w *walk) errno(errno syscall.Errno) syscall.Errno {
	if w.mutant == permSwapped {
		return syscall.EPERM ^ syscall.EFAULT ^ errno
	}
	return errno
}

// fail ends the walk: the entries of part get the flag, and those behind it are 0.
func (w *walk) fail(part addr.HVARange, flag Entry, errno syscall.Errno, why string, err error) {
	w.failed = &Error{Op: w.op, Range: w.r, At: part.Start, Why: why, Errno: errno, Err: err}
	w.set(part, flag, 0)
	clear(w.entries[w.index(part.End):])
}

// index returns the entry of the page at hva.
func (w *walk) index(hva addr.HVA) int { return int((hva - w.r.Start) >> w.shift) }

// set writes the entries of part, and counts them as found. The frames of valid ones
// follow each other from pfn.
func (w *walk) set(part addr.HVARange, e Entry, pfn addr.PFN) {
	step := Entry(0)
	if e&EntryValid != 0 && pfn != 0 {
		e |= Entry(pfn) & frameMask
		step = 1 << (w.shift - addr.PageShift)
	}
	for i, end := w.index(part.Start), w.index(part.End); i < end; i++ {
		w.entries[i] = e
		e += step
	}
	w.at = part.End
}

// nothingAsked reports whether nothing can be asked for, whatever is in the entries.
func (w *walk) nothingAsked() bool {
	return w.report || (w.def|w.mask)&ReqFault == 0 && w.mutant == sound
}

// want returns what has to be done for a page that e asks for and that the CPU finds as
// found says: ReqFault, ReqFault and ReqWrite, or nothing.
func (w *walk) want(e, found Entry) (need Entry) {
	asked := e&w.mask | w.def
	if w.mutant != sound {
		asked = w.mutant.asked(e, w.mask, w.def)
	}
	switch {
	case asked&ReqFault == 0:
		return 0
	case asked&ReqWrite != 0 && found&EntryWrite == 0:
		return ReqFault | ReqWrite
	case found&EntryValid == 0:
		return ReqFault
	}
	return 0
}

// wants adds up what has to be done for the pages of part.
func (w *walk) wants(part addr.HVARange, found Entry) (need Entry) {
	if w.nothingAsked() {
		return 0
	}
	for _, e := range w.entries[w.index(part.Start):w.index(part.End)] {
		need |= w.want(e, found)
	}
	return need
}

// visit is given a run of pages, and deals with it in units. It reports whether to go on.
func (w *walk) visit(run addr.HVARange, pfn addr.PFN, pte uint32) bool {
	if run.Start != w.at || run.Empty() || !run.Aligned() || run.End > w.r.End {
		panic(fmt.Sprintf("hmm: %T yields %v at %v", w.tables, run, w.at))
	}
	found, usable := find(pte), true
	switch {
	case pte&PTEDevice != 0:
		found = EntryDevice | find(pte&^PTEHinted|PTEPresent)
	case pte&PTEForeign != 0, pte&(PTESpecial|PTEPresent) == PTESpecial|PTEPresent:
		found, usable = 0, false
	case found != 0:
		found |= Entry(pte>>OrderShift) << orderShift
	}
	for w.at < run.End {
		unit, need := w.unit(run, pte, found)
		frame := pfn
		if pfn != 0 {
			frame += addr.PFN((w.at - run.Start) >> addr.PageShift)
		}
		switch {
		case !usable && need != 0:
			w.fail(unit, EntryError, w.errno(syscall.EFAULT), "the entry is not of a page that can be had", nil)
			return false
		case !usable:
			w.set(unit, EntryError, 0)
		case need == 0 || pte&PTEDevice != 0:
			w.set(unit, found, frame)
		case need&ReqWrite != 0 && w.access&addr.Write == 0:
			w.fail(addr.HVARange{Start: unit.Start, End: unit.Start}, 0, w.errno(syscall.EPERM), "the region is not writable", nil)
			return false
		default:
			if w.mutant == faultNeighbours {
				unit.End += addr.PageSize
			}
			w.pending, w.need = unit, need
			return false
		}
	}
	return true
}

// unit returns what is dealt with as one, from w.at on, and what it needs: all of a hole,
// a huge page, and of other pages as many as need the same.
func (w *walk) unit(run addr.HVARange, pte uint32, found Entry) (unit addr.HVARange, need Entry) {
	unit = addr.HVARange{Start: w.at, End: run.End}
	order := uint(pte >> OrderShift)
	switch {
	case w.nothingAsked():
		return unit, 0
	case pte == 0:
		return unit, w.wants(unit, found)
	case order != 0:
		size := addr.HVA(addr.PageSize) << order
		unit.End = min(unit.End, w.at&^(size-1)+size)
		return unit, w.wants(unit, found)
	}
	entries := w.entries[w.index(unit.Start):w.index(unit.End)]
	need = w.want(entries[0], found)
	n := 1
	for n < len(entries) && w.want(entries[n], found) == need {
		n++
	}
	unit.End = unit.Start + addr.HVA(n)<<w.shift
	return unit, need
}

// faultIn faults in what is pending. w.at is there already.
func (w *walk) faultIn() {
	write := w.need&ReqWrite != 0
	err := w.tables.Fault(w.pending, write, w.nonblocking)
	nowhere := addr.HVARange{Start: w.at, End: w.at}
	switch blocks := w.nonblocking && errors.Is(err, syscall.EAGAIN); {
	case err == nil:
		return
	case blocks && w.droppable != nil:
		w.droppable.RUnlock()
		err = w.tables.Fault(w.pending, write, false)
		w.droppable.RLock()
		if q, ok := w.look.(*Request); ok && w.mutant == unlockedNewSeq {
			q.Seq = q.Interval.ReadBegin()
		}
		if err == nil {
			return
		}
	case blocks:
		w.fail(nowhere, 0, syscall.EAGAIN, "a fault would block", err)
		w.failed.Unlocked = true
		return
	}
	errno := syscall.EFAULT
	if errors.Is(err, syscall.ENOMEM) {
		errno = syscall.ENOMEM
	}
	w.fail(nowhere, 0, w.errno(errno), "it cannot be faulted in", err)
}

// errnoOf returns the errno that err wraps, or EFAULT.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return syscall.EFAULT
}
