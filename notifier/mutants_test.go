package notifier

import (
	"slices"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// chainMutants are the defects of the chain and of lifetimes.
var chainMutants = []gvmtest.Mutant[mutant]{
	{ID: "NM1", Defect: allocAlways, What: "subscriptions allocated each time", By: "N2 one allocation", Check: checkOneAllocation},
	{ID: "NM2", Defect: allocInsideAllLocks, What: "allocated inside all-locks", By: "N2 one allocation", Check: checkOneAllocation},
	{ID: "NM3", Defect: noAllLocks, What: "linked without all-locks", By: "N1 every end has its start", Check: checkRegistrationAwaitsBrackets},
	{ID: "NM4", Defect: publishBeforeAllLocks, What: "published although all-locks failed", By: "N3 failure changes nothing", Check: checkFailureChangesNothing},
	{ID: "NM5", Defect: countBeforeAllLocks, What: "count++ before a step that fails", By: "N3 failure changes nothing", Check: checkFailureChangesNothing},
	{ID: "NM6", Defect: noAllLocksMutex, What: "no mutex around all-locks", By: "N6 two address spaces", Check: checkNoDeadlock},
	{ID: "NM6", Defect: lockMapTwice, What: "a shared lock taken twice", By: "N5 shared locks once", Check: checkLocksOneByOne},
	{ID: "NM7", Defect: unregisterAllLocks, What: "Unregister takes all locks", By: "Unregister takes no locks", Check: checkUnregisterTakesNoLocks},
	{ID: "NM8", Defect: claimByLink, What: "Release guarded by the link", By: "N7 release once", Check: checkExitDuringUnregister},
	{ID: "NM8", Defect: claimByLink, What: "the same, exit first", By: "N7 release once", Check: checkUnregisterDuringExit},
	{ID: "NM9", Defect: unlinkBeforeRelease, What: "unlinked before Release", By: "N8 release comes first", Check: checkUnregisterDuringExit},
	{ID: "NM9", Defect: exitSweeps, What: "exit unlinks what others claimed", By: "N8 release comes first", Check: checkExitDuringUnregister},
	{ID: "NM10", Defect: claimOutside, What: "claimed outside the section", By: "N8 release comes first", Check: checkClaimedInside},
	{ID: "NM10", Defect: loserWaitsOnce, What: "Unregister, second, waits for the exit alone", By: "N10 nothing runs after it", Check: checkUnregisterAwaitsLateWalks},
	{ID: "NM10", Defect: loserWaitsOnce, What: "the exit, second, waits for Unregister alone", By: "N10 nothing runs after it", Check: checkExitAwaitsLateWalks},
	{ID: "NM11", Defect: exitUnlinksOutside, What: "exit unlinks after its section", By: "N11 self-detach", Check: checkFreedAfterExit},
	{ID: "NM12", Defect: exitDoesNotWait, What: "exit skips the grace period", By: "N8 release comes first", Check: checkExitAwaitsMethods},
	{ID: "NM13", Defect: dropBeforeWait, What: "Unregister drops its count first", By: "N14 count", Check: checkCountDuringRelease},
	{ID: "NM14", Defect: detachReleases, What: "UnregisterNoRelease calls Release", By: "UnregisterNoRelease", Check: checkDetach},
	{ID: "NM14", Defect: detachLeavesLinked, What: "detached in Release, linked until its end", By: "N11 nobody finds it", Check: checkDetachedIsNotFound},
	{ID: "NM15", Defect: unlinkClearsNext, What: "unlink clears next", By: "N25 walkers go on", Check: checkWalkersGoOn},
	{ID: "NM16", What: "Synchronize is a grace period", By: "N12 synchronize", Check: func(mutant) error { return checkFreesHaveReturned(chains.Synchronize) }},
	{ID: "NM17", Defect: pinUsers, What: "a notifier is a user", By: "N14 count", Check: checkUsersLeave},
	{ID: "NM18", Defect: putFreesAtOnce, What: "Put frees at once", By: "N15 sharing", Check: checkSharing},
	{ID: "NM18", Defect: putReleases, What: "Put calls Release", By: "N15 sharing", Check: checkSharing},
	{ID: "NM19", Defect: compareKindsByType, What: "kinds compared by content", By: "N15 sharing", Check: checkSharing},
	{ID: "NM19", Defect: shareUnlinked, What: "Get finds what was given back", By: "N15 sharing", Check: checkSharing},
	{ID: "NM20", Defect: stopAtFirst, What: "walk stops at the first refusal", By: "N16 who is told", Check: checkWhoIsTold},
	{ID: "NM20", Defect: undoTellsNobody, What: "after a refusal nobody gets the end", By: "N16 who is told", Check: checkWhoIsTold},
	{ID: "NM20", Defect: undoTellsEarlier, What: "only earlier ones get the end", By: "N16 who is told", Check: checkWhoIsTold},
	{ID: "NM21", Defect: endAnything, What: "an end after a refusal is passed on", By: "N16 who is told", Check: checkEndAfterRefusal},
	{ID: "NM32", What: "a non-blockable callback sleeps", By: "N16 who is told", Check: func(mutant) error { return checkReaperNeverWaits(true) }},
}

// allMutants are those above and those of intervals. One of them is not run in builds
// that notice it by themselves, and fail the test.
func allMutants() []gvmtest.Mutant[mutant] {
	list := slices.Concat(chainMutants, intervalMutants)
	for i := range list {
		switch m := &list[i]; {
		case m.Defect != noAllLocksMutex:
		case gvmtest.Race:
			m.By, m.NA, m.Check = "the race detector, not run", "the marks of the maps are what the mutex protects", nil
		case lockorder.Enabled:
			m.By, m.NA, m.Check = "the order of locks, not run", "two reverse maps are locked outside all-locks", nil
		}
	}
	return list
}

// TestMutants has each check find the defect that it is there for, and find
// nothing without it.
func TestMutants(t *testing.T) { gvmtest.RunMutants(t, allMutants()) }

// TestMutantsAreAllThere: every defect that an address space can have is in the
// table, so that none is without a check.
func TestMutantsAreAllThere(t *testing.T) { gvmtest.EveryMutant(t, endInclusive, allMutants()) }
