package notifier

import "github.com/secondmmu/gvm/internal/gvmtest"

// intervalMutants are the defects of intervals, and of mirrors, that the checks
// of this package are known to see. No check needs luck, or two processors.
var intervalMutants = []gvmtest.Mutant[mutant]{
	ofIntervals("NM22", undoForgetsIntervals, "the chain refuses, and intervals are left invalidating", "TestR30ChainRefuses", checkChainRefuses),
	ofIntervals("NM23", activeIsBoolean, "the first end closes all brackets", "TestN18NoWakeUpIsLost", checkAllWoken),
	ofIntervals("NM24", seqAtEveryStart, "every start that hits adds to the sequence", "TestN18NoWakeUpIsLost", checkAllWoken),
	ofIntervals("NM25", beginUnlocked, "ReadBegin does not see an invalidation", "TestN18NoWakeUpIsLost", checkAllWoken),
	ofIntervals("NM25", beginUntilEven, "ReadBegin waits for other intervals", "TestN21DisjointIntervalsDoNotMeet", checkDisjoint),
	ofMirrors("NM26", seqAfterUnlock, "SetSeq without the lock"),
	ofMirrors("NM26", seqForEntries, "SetSeq only if something was established"),
	ofMirrors("NM27", retryUnlocked, "ReadRetry without the lock"),
	ofIntervals("NM28", insertAtOnce, "an insertion changes the tree that is being walked", "TestN19DeferredChangesReachTheTree", checkTreeStandsStill),
	ofIntervals("NM29", removeDoesNotWait, "Remove does not wait for the invalidation", "TestN20RemovedIntervalIsNotTouched", checkRemoveWaits),
	ofIntervals("NM30", insertWithZero, "an interval begins with the sequence 0", "TestR35SequencesDifferAtRest", checkOddBegin),
	ofIntervals("NM31", endInclusive, "a neighbour of the range is hit", "TestBracketsHitWhatTheyOverlap", checkNeighbours),
}

func ofIntervals(id string, defect mutant, what, by string, check intervalCheck) gvmtest.Mutant[mutant] {
	return gvmtest.Mutant[mutant]{ID: id, Defect: defect, What: what, By: by, Check: func(m mutant) error {
		return check(func() *intervalBed { return newIntervalBed(m, firstSeq) })
	}}
}

func ofMirrors(id string, defect mirrorDefect, what string) gvmtest.Mutant[mutant] {
	return gvmtest.Mutant[mutant]{ID: id, What: what, By: "TestN17MirrorIsNeverStale", Check: func(mutant) error {
		return checkMirror(func() *intervalBed {
			b := newIntervalBed(sound, firstSeq)
			b.defect = defect
			return b
		})
	}}
}
