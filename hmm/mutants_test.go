package hmm

import (
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// mutantCases are the defects. Those that the patch under review has, or that its review
// is about, say so.
var mutantCases = []gvmtest.Mutant[mutant]{
	{ID: "MM1", Defect: refusalKeepsReference, What: "early return in a callback without Put (patch: two)", By: "M1 references", Check: checkRefusalPuts},
	{ID: "MM2", Defect: freeAtOnce, What: "freed at the last Put, without a grace period (patch)", By: "M2 freed once", Check: checkFreedAfterGracePeriod},
	{ID: "MM3", Defect: findByAddressSpace, What: "callback finds the HMM by the address space, and asserts it (patch)", By: "M3 one HMM", Check: checkCallbackOfADyingHMM},
	{ID: "review", Defect: testForNil, What: "nil test in a callback, for protection (patch)", By: "M3 one HMM", Check: checkCallbackOfADyingHMM},
	{ID: "review", Defect: doneByAddressSpace, What: "asymmetric: Done puts what a lookup by address space gets", By: "M1 references", Check: checkReferences},
	{ID: "MM4", Defect: getAlways, What: "lookup takes a reference where none is left", By: "M3 one HMM", Check: checkDyingIsNotFound},
	{ID: "MM5", Defect: forgetAnybody, What: "last Put erases a successor", By: "M3 one HMM", Check: checkSuccessorStays},
	{ID: "MM6", Defect: loserFails, What: "who is second to create gets ENOMEM (patch)", By: "M3 one HMM", Check: checkOneHMM},
	{ID: "MM6", Defect: loserLeaks, What: "who is second to create gets two references", By: "M3 one HMM", Check: checkOneHMM},
	{ID: "MM6", Defect: loserHasNone, What: "who is second to create gets no reference", By: "M3 one HMM", Check: checkOneHMM},
	{ID: "MM6", Defect: createAgain, What: "who is second to create makes another one", By: "M3 one HMM", Check: checkOneHMM},
	{ID: "MM7", Defect: publishEarly, What: "found before its notifiers are registered (patch)", By: "M3 one HMM", Check: checkHalfMade},
	{ID: "MM7", Defect: publishEarly, What: "the same, and creation fails", By: "M18 failed creation", Check: checkFailedCreation},
	{ID: "MM8", Defect: testOutside, What: "mirror's HMM tested outside the lock (patch)", By: "M4 unregister twice", Check: checkUnregisterTwice},
	{ID: "MM8", Defect: loadOutside, What: "loaded outside a read section, and freed", By: "M4 unregister twice", Check: checkUnregisterKeepsItsHMM},
	{ID: "MM9", Defect: beginDrops, What: "range's reference dropped on success", By: "M1 references", Check: checkReferences},
	{ID: "MM9", Defect: beginKeeps, What: "range's reference kept on error", By: "M6 exited", Check: checkExited},
	{ID: "MM9", Defect: doneOnError, What: "Done on an error path, and a Put (patch)", By: "M1 references", Check: checkReferences},
	{ID: "MM10", Defect: doneKeeps, What: "Done does not drop", By: "M1 references", Check: checkReferences},
	{ID: "MM10", Defect: doneTwice, What: "a second Done drops again", By: "M1 references", Check: checkReferences},
	{ID: "MM11", Defect: levelFlag, What: "level flag instead of a sequence (2019)", By: "M9 changes are counted", Check: checkPulseIsSeen},
	{ID: "MM11", Defect: levelFlag, What: "the same, in the whole loop", By: "M9 pulse at every point", Check: checkPulsesOfRanges},
	{ID: "MM12", Defect: anyEndWillDo, What: "any end makes ranges valid", By: "M10 waiters", Check: checkLastEnd},
	{ID: "MM13", Defect: refusalStaysOpen, What: "a refused bracket stays counted", By: "M11 refusal", Check: checkRefusalIsUndone},
	{ID: "MM14", Defect: releaseInside, What: "driver released with mirrorsLock held", By: "M14 release", Check: checkReleaseMayWait},
	{ID: "H19", Defect: unlinkBeforeRelease, What: "mirror not told while its driver is released (patch, 2019)", By: "M14 release", Check: checkReleaseIsTold},
	{ID: "MM15", Defect: deadWakesNobody, What: "exit does not wake waiters", By: "M10 waiters", Check: checkExitWakes},
	{ID: "MM16", Defect: retryOmitted, What: "ReadRetry omitted", By: "M9 pulse at every point", Check: checkPulsesOfRequests},
	{ID: "MM16", Defect: retryOutside, What: "ReadRetry outside the lock", By: "M9 pulse at every point", Check: checkPulsesOfRequests},
	{ID: "MM16", Defect: retrySecondBegin, What: "ReadRetry of a second ReadBegin", By: "M9 pulse at every point", Check: checkPulsesOfRequests},
	{ID: "MM17", What: "driver: seq not set without entries", By: "M9 pulse at every point", Check: func(mutant) error { return pulsesOfRequests(sound, false, seqForEntries) }},
	{ID: "MM18", Defect: notRefilled, What: "request flags not refilled", By: "M16 retry asks again", Check: checkRefilled},
	{ID: "MM19", Defect: restartAtStart, What: "walk restarts at the start", By: "M15 only what was asked", Check: checkWalkGoesOn},
	{ID: "MM20", Defect: permSwapped, What: "EPERM and EFAULT swapped", By: "M5 results", Check: checkResults},
	{ID: "MM20", Defect: skipAsked, What: "region skipped although asked for", By: "M5 results", Check: checkResults},
	{ID: "MM21", Defect: unlockTwice, What: "mapping lock given back twice", By: "M5 results", Check: checkResults},
	{ID: "MM22", Defect: writeAlone, What: "WRITE honoured without FAULT", By: "M13 flag algebra", Check: checkAlgebra},
	{ID: "MM22", Defect: maskLast, What: "mask applied after the default", By: "M13 flag algebra", Check: checkAlgebra},
	{ID: "MM23", Defect: overlapMisses, What: "last page of a range or change missed", By: "M9 changes are counted", Check: checkBorders},
	{ID: "MM23", Defect: overlapTouches, What: "neighbour of a change hit", By: "M9 changes are counted", Check: checkBorders},
	{ID: "MM24", Defect: installUnlocked, What: "installed after the unlock", By: "M9 pulse at every point", Check: checkPulsesOfRequests},
	{ID: "H27", Defect: recheckOmitted, What: "sequence not checked after a fault", By: "M15 only what was asked", Check: checkWalkGoesOn},
	{ID: "M15", Defect: faultNeighbours, What: "fault takes the next page too", By: "M15 only what was asked", Check: checkTouches},
	{ID: "H34", Defect: unlockedNewSeq, What: "new sequence with what was found before", By: "H34 lock is dropped", Check: checkLockIsDropped},
	{ID: "MM6", What: "loser of creation leaks its own object", NA: "who is second has not allocated: it looks again with the mapping lock held"},
	{ID: "review", What: "HMM found in a callback has no address space", NA: "HMM.as is set before it is found, and never changes"},
	{ID: "review", What: "loop in Register against a racing Unregister", NA: "an HMM without references is not found, and a successor is made"},
}

// TestMutants has each check find the defect that it is there for, and find nothing
// without it.
func TestMutants(t *testing.T) { gvmtest.RunMutants(t, mutantCases) }

// TestMutantsAreAllThere: every defect is in the table, so that none is without a check.
func TestMutantsAreAllThere(t *testing.T) { gvmtest.EveryMutant(t, mutants-1, mutantCases) }
