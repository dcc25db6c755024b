package notifier

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/secondmmu/gvm/internal/lockorder"
)

// mutantCase is a defect and the check that has to notice it.
type mutantCase struct {
	id     string               // as in the table of defects, "NM8"
	mutant mutant               // sound if the defect is one of whoever uses the package, or if it does not apply
	what   string               // the defect
	by     string               // the test that notices it
	check  func(m mutant) error // an error if it was noticed; with sound it returns nil. A defect of a user it injects itself
	na     string               // why it does not apply; then check is nil
}

// chainMutants are the defects of the chain and of lifetimes.
var chainMutants = []mutantCase{
	{id: "NM1", mutant: allocAlways, what: "subscriptions allocated each time", by: "N2 one allocation", check: checkOneAllocation},
	{id: "NM2", mutant: allocInsideAllLocks, what: "allocated inside all-locks", by: "N2 one allocation", check: checkOneAllocation},
	{id: "NM3", mutant: noAllLocks, what: "linked without all-locks", by: "N1 every end has its start", check: checkRegistrationAwaitsBrackets},
	{id: "NM4", mutant: publishBeforeAllLocks, what: "published although all-locks failed", by: "N3 failure changes nothing", check: checkFailureChangesNothing},
	{id: "NM5", mutant: countBeforeAllLocks, what: "count++ before a step that fails", by: "N3 failure changes nothing", check: checkFailureChangesNothing},
	{id: "NM6", mutant: noAllLocksMutex, what: "no mutex around all-locks", by: "N6 two address spaces", check: checkNoDeadlock},
	{id: "NM6", mutant: lockMapTwice, what: "a shared lock taken twice", by: "N5 shared locks once", check: checkLocksOneByOne},
	{id: "NM7", mutant: unregisterAllLocks, what: "Unregister takes all locks", by: "Unregister takes no locks", check: checkUnregisterTakesNoLocks},
	{id: "NM8", mutant: claimByLink, what: "Release guarded by the link", by: "N7 release once", check: checkExitDuringUnregister},
	{id: "NM8", mutant: claimByLink, what: "the same, exit first", by: "N7 release once", check: checkUnregisterDuringExit},
	{id: "NM9", mutant: unlinkBeforeRelease, what: "unlinked before Release", by: "N8 release comes first", check: checkUnregisterDuringExit},
	{id: "NM9", mutant: exitSweeps, what: "exit unlinks what others claimed", by: "N8 release comes first", check: checkExitDuringUnregister},
	{id: "NM10", mutant: claimOutside, what: "claimed outside the section", by: "N8 release comes first", check: checkClaimedInside},
	{id: "NM10", mutant: loserWaitsOnce, what: "Unregister, second, waits for the exit alone", by: "N10 nothing runs after it", check: checkUnregisterAwaitsLateWalks},
	{id: "NM10", mutant: loserWaitsOnce, what: "the exit, second, waits for Unregister alone", by: "N10 nothing runs after it", check: checkExitAwaitsLateWalks},
	{id: "NM11", mutant: exitUnlinksOutside, what: "exit unlinks after its section", by: "N11 self-detach", check: checkFreedAfterExit},
	{id: "NM12", mutant: exitDoesNotWait, what: "exit skips the grace period", by: "N8 release comes first", check: checkExitAwaitsMethods},
	{id: "NM13", mutant: dropBeforeWait, what: "Unregister drops its count first", by: "N14 count", check: checkCountDuringRelease},
	{id: "NM14", mutant: detachReleases, what: "UnregisterNoRelease calls Release", by: "UnregisterNoRelease", check: checkDetach},
	{id: "NM14", mutant: detachLeavesLinked, what: "detached in Release, linked until its end", by: "N11 nobody finds it", check: checkDetachedIsNotFound},
	{id: "NM15", mutant: unlinkClearsNext, what: "unlink clears next", by: "N25 walkers go on", check: checkWalkersGoOn},
	{id: "NM16", what: "Synchronize is a grace period", by: "N12 synchronize", check: func(mutant) error { return checkFreesHaveReturned(chains.Synchronize) }},
	{id: "NM17", mutant: pinUsers, what: "a notifier is a user", by: "N14 count", check: checkUsersLeave},
	{id: "NM18", mutant: putFreesAtOnce, what: "Put frees at once", by: "N15 sharing", check: checkSharing},
	{id: "NM18", mutant: putReleases, what: "Put calls Release", by: "N15 sharing", check: checkSharing},
	{id: "NM19", mutant: compareKindsByType, what: "kinds compared by content", by: "N15 sharing", check: checkSharing},
	{id: "NM19", mutant: shareUnlinked, what: "Get finds what was given back", by: "N15 sharing", check: checkSharing},
	{id: "NM20", mutant: stopAtFirst, what: "walk stops at the first refusal", by: "N16 who is told", check: checkWhoIsTold},
	{id: "NM20", mutant: undoTellsNobody, what: "after a refusal nobody gets the end", by: "N16 who is told", check: checkWhoIsTold},
	{id: "NM20", mutant: undoTellsEarlier, what: "only earlier ones get the end", by: "N16 who is told", check: checkWhoIsTold},
	{id: "NM21", mutant: endAnything, what: "an end after a refusal is passed on", by: "N16 who is told", check: checkEndAfterRefusal},
	{id: "NM32", what: "a non-blockable callback sleeps", by: "N16 who is told", check: func(mutant) error { return checkReaperNeverWaits(true) }},
}

// racy are the defects that are data races of this package's own state, whatever
// else they are: the race detector notices them, and fails the test.
var racy = map[mutant]string{
	noAllLocksMutex: "the marks of the maps are what the mutex protects",
}

// TestMutants has each check find the defect that it is there for, and find
// nothing without it.
func TestMutants(t *testing.T) {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "mutant\tdefect\tcaught by\tafter\n")
	for _, c := range slices.Concat(chainMutants, intervalMutants) {
		row := func(by string, after any) { fmt.Fprintf(w, "%s\t%s\t%s\t%v\n", c.id, c.what, by, after) }
		if c.check == nil {
			row("not applicable", c.na)
			continue
		}
		if why, ok := racy[c.mutant]; ok && raceDetector {
			row("the race detector, not run", why)
			continue
		}
		if c.mutant == noAllLocksMutex && lockorder.Enabled {
			row("the order of locks, not run", "two reverse maps are locked outside all-locks")
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
		t.Logf("%s: %v", c.id, err)
	}
	w.Flush()
	t.Logf("\n%s", &out)
}

// TestMutantsAreAllThere: every defect that an address space can have is in the
// table, so that none is without a check.
func TestMutantsAreAllThere(t *testing.T) {
	for m := sound + 1; m <= endInclusive; m++ {
		if !slices.ContainsFunc(slices.Concat(chainMutants, intervalMutants), func(c mutantCase) bool { return c.mutant == m }) {
			t.Errorf("no check looks for defect %d", m)
		}
	}
}
