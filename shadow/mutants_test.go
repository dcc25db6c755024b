package shadow

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
	id     string // as in the table of defects, "VM8"
	mutant mutant // sound if it does not apply
	what   string // the defect
	by     string // the test that notices it
	check  func(m mutant) error
	na     string // why it does not apply; then check is nil
}

var mutants = []mutantCase{
	{id: "VM1", mutant: seqAfterLookup, what: "the sequence is read after the look", by: "V7 every placement", check: checkPulses},
	{id: "VM2", mutant: compareUnlocked, what: "compared outside of the lock", by: "V7 every placement", check: checkPulses},
	{id: "VM2", mutant: seqAlone, what: "open brackets are not looked at", by: "V7 every placement", check: checkOpenBrackets},
	{id: "VM2", mutant: recordAlone, what: "the sequence is not compared", by: "V7 every placement", check: checkPulses},
	{id: "VM3", mutant: seqAfterRecord, what: "a bracket is forgotten before seq grows", by: "V7 every placement", check: checkForgotten},
	{id: "VM3", mutant: seqStays, what: "the end leaves the sequence", by: "V7 every placement", check: checkPulses},
	{id: "VM4", mutant: newestBracketOnly, what: "the newest bracket is recorded alone", by: "V7 every placement", check: checkOpenBrackets},
	{id: "VM5", mutant: endLooksAgain, what: "the end goes by the slots of then", by: "V3 brackets balance", check: checkBalance},
	{id: "VM6", mutant: bracketUnrecorded, what: "a bracket is not recorded", by: "V7 every placement", check: checkOpenBrackets},
	{id: "VM7", mutant: deleteWithoutZap, what: "a slot goes, its translations stay", by: "V2 deleted slots", check: checkDeletedSlots},
	{id: "VM7", mutant: updateUnmarked, what: "a set does not say that it changes", by: "V14 nobody sees an update", check: checkUpdateUnseen},
	{id: "VM8", mutant: noGracePeriod, what: "no grace period after a zap", by: "zap waits for holders", check: checkHolder},
	{id: "VM8", mutant: noGracePeriod, what: "the same, under load", by: "V1 nothing older is read", check: checkNoneGoneIsUsed},
	{id: "VM9", mutant: ownZapsOnly, what: "no wait for what others zapped", by: "zap waits for holders", check: checkSecondBracket},
	{id: "VM9", mutant: changeBeforeZap, what: "zapped after the change", by: "V8 two slots hit", check: checkWholeRange},
	{id: "VM10", mutant: firstSlotOnly, what: "only the first slot is zapped", by: "V8 two slots hit", check: checkWholeRange},
	{id: "VM10", mutant: firstSlotOnly, what: "only the first slot is aged", by: "V9 aliases", check: checkAliases},
	{id: "VM10", mutant: aliasUnlogged, what: "only one frame of a page is logged", by: "V9 aliases", check: checkAliases},
	{id: "VM11", mutant: zapRoundsDown, what: "the end is rounded down", by: "V8 two slots hit", check: checkWholeRange},
	{id: "VM12-15", na: "they are of KVM's bitmap; the log of this package has its own table, in package dirty"},
	{id: "VM16-18", na: "they are of KVM's dirty ring"},
	{id: "VM19", mutant: generationStays, what: "the generation stays", by: "V18 generations", check: checkGenerations},
	{id: "VM19", mutant: updateUnmarked, what: "nor is there a flag", by: "V18 generations", check: checkGenerations},
	{id: "VM20", mutant: retryForever, what: "a fault ignores its context", by: "retry ends", check: checkRetryEnds},
	{id: "VM21", na: "writes are logged by the page, whatever the size of the translation"},
	{id: "VM22", na: "a table is the only cache of translations"},
	{id: "VM23", mutant: createFirst, what: "slots are created before others go", by: "transactions", check: checkTransactions},
	{id: "VM24", na: "the order of locks, which a debug build checks"},
	{id: "VM25", mutant: releaseAwaitsEnds, what: "the release waits for brackets", by: "V20 teardown", check: checkTeardown},
	{id: "VM26", na: "it is of whoever reads events of userfaultfd"},
	{id: "K4", mutant: undoNothing, what: "a refused transaction is left half done", by: "transactions", check: checkTransactions},
	{id: "K4", mutant: publishIntended, what: "what was intended is published", by: "transactions", check: checkTransactions},
	{id: "", mutant: numbersLeak, what: "slot numbers are not recycled", by: "numbers are recycled", check: checkNumbers},
}

// TestMutants has each check find the defect that it is there for, and find
// nothing without it.
func TestMutants(t *testing.T) {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "mutant\tdefect\tcaught by\tafter\n")
	for _, c := range mutants {
		row := func(by string, after any) { fmt.Fprintf(w, "%s\t%s\t%s\t%v\n", c.id, c.what, by, after) }
		if c.check == nil {
			row("not applicable", c.na)
			continue
		}
		if err := c.check(sound); err != nil {
			t.Errorf("%s: without the defect: %v", c.id, err)
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
		t.Logf("%s, %s: %v", c.id, c.what, err)
	}
	w.Flush()
	t.Logf("\n%s", &out)
}

// TestMutantsAreAllThere: every defect that slots can have is in the table.
func TestMutantsAreAllThere(t *testing.T) {
	for m := sound + 1; m <= releaseAwaitsEnds; m++ {
		if !slices.ContainsFunc(mutants, func(c mutantCase) bool { return c.mutant == m }) {
			t.Errorf("no check looks for defect %d", m)
		}
	}
}
