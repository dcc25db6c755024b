package hmm

import (
	"sync"
	"syscall"

	"github.com/secondmmu/gvm/addr"
)

// mutant is a defect that tests switch on in a registry or in a request, to see that
// they notice. The names in comments are those that the tests report; MM17 is a defect
// of drivers.
type mutant uint8

const (
	sound mutant = iota

	// Of the HMM.
	refusalKeepsReference // MM1: a callback returns early without a Put
	freeAtOnce            // MM2: the last Put frees without a grace period
	findByAddressSpace    // MM3: a callback finds the HMM by the address space, and asserts that it does
	testForNil            // review: a callback tests a pointer instead of taking a reference; and MM2
	getAlways             // MM4: a lookup takes a reference although there is none left
	forgetAnybody         // MM5: the last Put takes a successor out of the table
	loserFails            // MM6: who finds that another was first to make the HMM gets ENOMEM
	loserLeaks            // MM6: it has two references
	loserHasNone          // MM6: it has none
	createAgain           // MM6: it makes another one
	publishEarly          // MM7: the HMM can be found before its notifiers are registered
	testOutside           // MM8: Unregister believes what it loaded before it took the lock
	loadOutside           // MM8: it takes the lock of an HMM that may have been freed

	// Of ranges and brackets.
	beginDrops          // MM9: Begin puts the reference when it succeeds
	beginKeeps          // MM9: it keeps the reference when it fails
	doneOnError         // MM9: Done on an error path, and a Put after it
	doneKeeps           // MM10: Done does not put
	doneTwice           // MM10: the second Done puts again
	doneByAddressSpace  // review: Done puts what a lookup finds, which has its own reference
	levelFlag           // MM11: a range is valid when the last bracket has ended, whatever happened before
	anyEndWillDo        // MM12: any end makes ranges valid
	refusalStaysOpen    // MM13: a refused bracket stays counted
	releaseInside       // MM14: drivers are released with mirrorsLock held
	unlinkBeforeRelease // H19: a mirror is not told of changes any more while its driver is released
	deadWakesNobody     // MM15: the exit does not wake who waits
	unlockTwice         // MM21: the lock is given back a second time after a fault that would have blocked
	overlapMisses       // MM23: the last page of a range does not count as overlapped
	overlapTouches      // MM23: a change next to a range counts as overlapping

	// Of walks and of Populate.
	retryOmitted     // MM16: ReadRetry is not called
	retryOutside     // MM16: it is called before the lock is taken
	retrySecondBegin // MM16: with what a second ReadBegin returned
	notRefilled      // MM18: what was asked is not restored for another try
	restartAtStart   // MM19: after a fault the walk begins anew, and reads its answers as questions
	permSwapped      // MM20: EPERM and EFAULT are swapped
	skipAsked        // MM20: a region that cannot be had is skipped although it was asked for
	writeAlone       // MM22: ReqWrite counts without ReqFault
	maskLast         // MM22: the mask applies to the default too
	installUnlocked  // MM24: entries are installed when the lock has been given back
	recheckOmitted   // H27: the sequence is not checked after a fault
	faultNeighbours  // M15: a fault takes the next page too
	unlockedNewSeq   // H34: when the lock is had again the sequence is read anew, and what was found before is kept

	mutants
)

// secondMutant is what a defect makes of finding that somebody else has made h.
func (reg *registry) secondMutant(h *HMM) (*HMM, error) {
	switch reg.mutant {
	case loserFails:
		h.put(byMirror)
		return nil, syscall.ENOMEM
	case loserLeaks:
		h.tryGet(byMirror)
	case loserHasNone:
		h.put(byMirror)
	}
	return h, nil
}

// overlap is Overlaps with a defect at the border.
func (m mutant) overlap(r, changing addr.HVARange) bool {
	switch m {
	case overlapMisses:
		return r.Start < changing.End-addr.PageSize && changing.Start < r.End-addr.PageSize
	case overlapTouches:
		return r.Start <= changing.End && changing.Start <= r.End
	}
	return r.Overlaps(changing)
}

// installMutant is install with a defect.
func (q *Request) installMutant(lock sync.Locker, install func([]Entry) error) (done bool, err error) {
	seq := q.Seq
	switch q.mutant {
	case retrySecondBegin:
		seq = q.Interval.ReadBegin()
	case retryOutside:
		if q.Interval.ReadRetry(seq) {
			return false, nil
		}
		q.at("checked")
	}
	lock.Lock()
	if q.mutant != retryOmitted && q.mutant != retryOutside && q.Interval.ReadRetry(seq) {
		lock.Unlock()
		return false, nil
	}
	if q.mutant == installUnlocked {
		lock.Unlock()
		q.at("checked")
		return true, install(q.Entries)
	}
	defer lock.Unlock()
	return true, install(q.Entries)
}

// asked is what an entry asks for, with a defect.
func (m mutant) asked(e, mask, def Entry) Entry {
	asked := e&mask | def
	switch {
	case m == maskLast:
		return (e | def) & mask
	case m == writeAlone && asked&ReqWrite != 0:
		return asked | ReqFault
	}
	return asked
}
