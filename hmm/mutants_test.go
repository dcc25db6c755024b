package hmm

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

// mutantCase is a defect and the check that has to notice it.
type mutantCase struct {
	id     string               // as in the table of defects, "MM8"; "seed" for what only the review has
	mutant mutant               // sound if the defect is one of a driver, or if it does not apply
	what   string               // the defect
	by     string               // the test that notices it
	check  func(m mutant) error // an error if it was noticed; with sound it returns nil. A defect of a driver it injects itself
	na     string               // why it does not apply; then check is nil
}

// mutantCases are the defects. Those that the patch under review has, or that its review
// is about, say so.
var mutantCases = []mutantCase{
	{id: "MM1", mutant: refusalKeepsReference, what: "early return in a callback without Put (patch: two)", by: "M1 references", check: checkRefusalPuts},
	{id: "MM2", mutant: freeAtOnce, what: "freed at the last Put, without a grace period (patch)", by: "M2 freed once", check: checkFreedAfterGracePeriod},
	{id: "MM3", mutant: findByAddressSpace, what: "callback finds the HMM by the address space, and asserts it (patch)", by: "M3 one HMM", check: checkCallbackOfADyingHMM},
	{id: "review", mutant: testForNil, what: "nil test in a callback, for protection (patch)", by: "M3 one HMM", check: checkCallbackOfADyingHMM},
	{id: "review", mutant: doneByAddressSpace, what: "asymmetric: Done puts what a lookup by address space gets", by: "M1 references", check: checkReferences},
	{id: "MM4", mutant: getAlways, what: "lookup takes a reference where none is left", by: "M3 one HMM", check: checkDyingIsNotFound},
	{id: "MM5", mutant: forgetAnybody, what: "last Put erases a successor", by: "M3 one HMM", check: checkSuccessorStays},
	{id: "MM6", mutant: loserFails, what: "who is second to create gets ENOMEM (patch)", by: "M3 one HMM", check: checkOneHMM},
	{id: "MM6", mutant: loserLeaks, what: "who is second to create gets two references", by: "M3 one HMM", check: checkOneHMM},
	{id: "MM6", mutant: loserHasNone, what: "who is second to create gets no reference", by: "M3 one HMM", check: checkOneHMM},
	{id: "MM6", mutant: createAgain, what: "who is second to create makes another one", by: "M3 one HMM", check: checkOneHMM},
	{id: "MM7", mutant: publishEarly, what: "found before its notifiers are registered (patch)", by: "M3 one HMM", check: checkHalfMade},
	{id: "MM7", mutant: publishEarly, what: "the same, and creation fails", by: "M18 failed creation", check: checkFailedCreation},
	{id: "MM8", mutant: testOutside, what: "mirror's HMM tested outside the lock (patch)", by: "M4 unregister twice", check: checkUnregisterTwice},
	{id: "MM8", mutant: loadOutside, what: "loaded outside a read section, and freed", by: "M4 unregister twice", check: checkUnregisterKeepsItsHMM},
	{id: "MM9", mutant: beginDrops, what: "range's reference dropped on success", by: "M1 references", check: checkReferences},
	{id: "MM9", mutant: beginKeeps, what: "range's reference kept on error", by: "M6 exited", check: checkExited},
	{id: "MM9", mutant: doneOnError, what: "Done on an error path, and a Put (patch)", by: "M1 references", check: checkReferences},
	{id: "MM10", mutant: doneKeeps, what: "Done does not drop", by: "M1 references", check: checkReferences},
	{id: "MM10", mutant: doneTwice, what: "a second Done drops again", by: "M1 references", check: checkReferences},
	{id: "MM11", mutant: levelFlag, what: "level flag instead of a sequence (2019)", by: "M9 changes are counted", check: checkPulseIsSeen},
	{id: "MM11", mutant: levelFlag, what: "the same, in the whole loop", by: "M9 pulse at every point", check: checkPulsesOfRanges},
	{id: "MM12", mutant: anyEndWillDo, what: "any end makes ranges valid", by: "M10 waiters", check: checkLastEnd},
	{id: "MM13", mutant: refusalStaysOpen, what: "a refused bracket stays counted", by: "M11 refusal", check: checkRefusalIsUndone},
	{id: "MM14", mutant: releaseInside, what: "driver released with mirrorsLock held", by: "M14 release", check: checkReleaseMayWait},
	{id: "H19", mutant: unlinkBeforeRelease, what: "mirror not told while its driver is released (patch, 2019)", by: "M14 release", check: checkReleaseIsTold},
	{id: "MM15", mutant: deadWakesNobody, what: "exit does not wake waiters", by: "M10 waiters", check: checkExitWakes},
	{id: "MM16", mutant: retryOmitted, what: "ReadRetry omitted", by: "M9 pulse at every point", check: checkPulsesOfRequests},
	{id: "MM16", mutant: retryOutside, what: "ReadRetry outside the lock", by: "M9 pulse at every point", check: checkPulsesOfRequests},
	{id: "MM16", mutant: retrySecondBegin, what: "ReadRetry of a second ReadBegin", by: "M9 pulse at every point", check: checkPulsesOfRequests},
	{id: "MM17", what: "driver: seq not set without entries", by: "M9 pulse at every point", check: func(mutant) error { return pulsesOfRequests(sound, false, seqForEntries) }},
	{id: "MM18", mutant: notRefilled, what: "request flags not refilled", by: "M16 retry asks again", check: checkRefilled},
	{id: "MM19", mutant: restartAtStart, what: "walk restarts at the start", by: "M15 only what was asked", check: checkWalkGoesOn},
	{id: "MM20", mutant: permSwapped, what: "EPERM and EFAULT swapped", by: "M5 results", check: checkResults},
	{id: "MM20", mutant: skipAsked, what: "region skipped although asked for", by: "M5 results", check: checkResults},
	{id: "MM21", mutant: unlockTwice, what: "mapping lock given back twice", by: "M5 results", check: checkResults},
	{id: "MM22", mutant: writeAlone, what: "WRITE honoured without FAULT", by: "M13 flag algebra", check: checkAlgebra},
	{id: "MM22", mutant: maskLast, what: "mask applied after the default", by: "M13 flag algebra", check: checkAlgebra},
	{id: "MM23", mutant: overlapMisses, what: "last page of a range or change missed", by: "M9 changes are counted", check: checkBorders},
	{id: "MM23", mutant: overlapTouches, what: "neighbour of a change hit", by: "M9 changes are counted", check: checkBorders},
	{id: "MM24", mutant: installUnlocked, what: "installed after the unlock", by: "M9 pulse at every point", check: checkPulsesOfRequests},
	{id: "H27", mutant: recheckOmitted, what: "sequence not checked after a fault", by: "M15 only what was asked", check: checkWalkGoesOn},
	{id: "M15", mutant: faultNeighbours, what: "fault takes the next page too", by: "M15 only what was asked", check: checkTouches},
	{id: "H34", mutant: unlockedNewSeq, what: "new sequence with what was found before", by: "H34 lock is dropped", check: checkLockIsDropped},
	{id: "MM6", what: "loser of creation leaks its own object", na: "who is second has not allocated: it looks again with the mapping lock held"},
	{id: "review", what: "HMM found in a callback has no address space", na: "HMM.as is set before it is found, and never changes"},
	{id: "review", what: "loop in Register against a racing Unregister", na: "an HMM without references is not found, and a successor is made"},
}

// TestMutants has each check find the defect that it is there for, and find nothing
// without it.
func TestMutants(t *testing.T) {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "mutant\tdefect\tcaught by\tafter\n")
	for _, c := range mutantCases {
		row := func(by string, after any) { fmt.Fprintf(w, "%s\t%s\t%s\t%v\n", c.id, c.what, by, after) }
		if c.check == nil {
			row("not applicable", c.na)
			continue
		}
		if c.mutant != sound {
			if err := c.check(sound); err != nil {
				t.Errorf("%s: without the defect: %v", c.id, err)
			}
		}
		begin := time.Now()
		err := c.check(c.mutant)
		after := time.Since(begin).Round(time.Microsecond)
		if err == nil {
			row("nobody", after)
			t.Errorf("%s survives: %s", c.id, c.what)
			continue
		}
		row(c.by, after)
		first, _, _ := strings.Cut(err.Error(), "\n")
		t.Logf("%s: %s", c.id, first)
	}
	w.Flush()
	t.Logf("\n%s", &out)
}

// TestMutantsAreAllThere: every defect is in the table, so that none is without a check.
func TestMutantsAreAllThere(t *testing.T) {
	for m := sound + 1; m < mutants; m++ {
		if !slices.ContainsFunc(mutantCases, func(c mutantCase) bool { return c.mutant == m }) {
			t.Errorf("no check looks for defect %d", m)
		}
	}
}
