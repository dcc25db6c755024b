package shadow

import (
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

var mutants = []gvmtest.Mutant[mutant]{
	{ID: "VM1", Defect: seqAfterLookup, What: "the sequence is read after the look", By: "V7 every placement", Check: checkPulses},
	{ID: "VM2", Defect: compareUnlocked, What: "compared outside of the lock", By: "V7 every placement", Check: checkPulses},
	{ID: "VM2", Defect: seqAlone, What: "open brackets are not looked at", By: "V7 every placement", Check: checkOpenBrackets},
	{ID: "VM2", Defect: recordAlone, What: "the sequence is not compared", By: "V7 every placement", Check: checkPulses},
	{ID: "VM3", Defect: seqAfterRecord, What: "a bracket is forgotten before seq grows", By: "V7 every placement", Check: checkForgotten},
	{ID: "VM3", Defect: seqStays, What: "the end leaves the sequence", By: "V7 every placement", Check: checkPulses},
	{ID: "VM4", Defect: newestBracketOnly, What: "the newest bracket is recorded alone", By: "V7 every placement", Check: checkOpenBrackets},
	{ID: "VM5", Defect: endLooksAgain, What: "the end goes by the slots of then", By: "V3 brackets balance", Check: checkBalance},
	{ID: "VM6", Defect: bracketUnrecorded, What: "a bracket is not recorded", By: "V7 every placement", Check: checkOpenBrackets},
	{ID: "VM7", Defect: deleteWithoutZap, What: "a slot goes, its translations stay", By: "V2 deleted slots", Check: checkDeletedSlots},
	{ID: "VM7", Defect: updateUnmarked, What: "a set does not say that it changes", By: "V14 nobody sees an update", Check: checkUpdateUnseen},
	{ID: "VM8", Defect: noGracePeriod, What: "no grace period after a zap", By: "zap waits for holders", Check: checkHolder},
	{ID: "VM8", Defect: noGracePeriod, What: "the same, under load", By: "V1 nothing older is read", Check: checkNoneGoneIsUsed},
	{ID: "VM9", Defect: ownZapsOnly, What: "no wait for what others zapped", By: "zap waits for holders", Check: checkSecondBracket},
	{ID: "VM9", Defect: changeBeforeZap, What: "zapped after the change", By: "V8 two slots hit", Check: checkWholeRange},
	{ID: "VM10", Defect: firstSlotOnly, What: "only the first slot is zapped", By: "V8 two slots hit", Check: checkWholeRange},
	{ID: "VM10", Defect: firstSlotOnly, What: "only the first slot is aged", By: "V9 aliases", Check: checkAliases},
	{ID: "V10", Defect: storesUnlogged, What: "stores are not logged", By: "V9 aliases", Check: checkAliases},
	{ID: "VM10", Defect: aliasUnlogged, What: "only one frame of a page is logged", By: "V9 aliases", Check: checkAliases},
	{ID: "VM10", Defect: aliasUnlogged, What: "what the guest writes is reported at one frame", By: "the guest's aliases", Check: checkGuestAliases},
	{ID: "VM11", Defect: zapRoundsDown, What: "the end is rounded down", By: "V8 two slots hit", Check: checkWholeRange},
	{ID: "VM12-15", NA: "they are of KVM's bitmap: package kvm; the log of this package has its own table, in package dirty"},
	{ID: "VM16-18", NA: "they are of KVM's dirty ring: package kvm"},
	{ID: "VM19", Defect: generationStays, What: "the generation stays", By: "V18 generations", Check: checkGenerations},
	{ID: "VM19", Defect: updateUnmarked, What: "nor is there a flag", By: "V18 generations", Check: checkGenerations},
	{ID: "VM20", Defect: retryForever, What: "a fault ignores its context", By: "retry ends", Check: checkRetryEnds},
	{ID: "VM21", NA: "writes are logged by the page, whatever the size of the translation"},
	{ID: "VM22", Defect: viewsRemember, What: "a view's last translation outlives a zap", By: "views forget", Check: checkViewsForget},
	{ID: "VM23", Defect: createFirst, What: "slots are created before others go", By: "transactions", Check: checkTransactions},
	{ID: "VM24", NA: "the order of locks, which a debug build checks"},
	{ID: "VM25", Defect: releaseAwaitsEnds, What: "the release waits for brackets", By: "V20 teardown", Check: checkTeardown},
	{ID: "VM26", NA: "it is of whoever reads events of userfaultfd"},
	{ID: "K4", Defect: undoNothing, What: "a refused transaction is left half done", By: "transactions", Check: checkTransactions},
	{ID: "K4", Defect: publishIntended, What: "what was intended is published", By: "transactions", Check: checkTransactions},
	{ID: "V13", Defect: collectAfterwards, What: "a log is read when its slot has gone", By: "V13 nothing is lost", Check: checkSlotLogs},
	{ID: "", Defect: contentUnrecorded, What: "changes of content are not recorded", By: "content is recorded", Check: checkContent},
	{ID: "", Defect: returnsUnrecorded, What: "what comes back is not recorded", By: "content is recorded", Check: checkContent},
	{ID: "", Defect: harvestInBracket, What: "a harvest comes in a bracket", By: "harvest awaits brackets", Check: checkHarvestInBracket},
	{ID: "", Defect: coarseForGood, What: "coarse slots stay coarse", By: "the limit", Check: checkLimit},
	{ID: "", Defect: fineAtOnce, What: "coarse slots do not wait for half of the numbers", By: "the limit", Check: checkLimit},
	{ID: "", Defect: piecesStand, What: "what would be precise is not followed", By: "the limit", Check: checkLimit},
	{ID: "", Defect: collectAfterwards, What: "a log is read when the slots are coarse", By: "the limit", Check: checkLimitLogs},
	{ID: "", Defect: endUntold, What: "the end of a bracket wakes nobody", By: "ends are told", Check: checkEnds},
	{ID: "", Defect: slotStays, What: "a slot shows what was unmapped", By: "no slot shows a hole", Check: checkHole},
	{ID: "", Defect: numbersLeak, What: "slot numbers are not recycled", By: "numbers are recycled", Check: checkNumbers},
}

// TestMutants has each check find the defect that it is there for, and find
// nothing without it.
func TestMutants(t *testing.T) { gvmtest.RunMutants(t, mutants) }

// TestMutantsAreAllThere: every defect that slots can have is in the table.
func TestMutantsAreAllThere(t *testing.T) { gvmtest.EveryMutant(t, releaseAwaitsEnds, mutants) }
