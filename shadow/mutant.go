package shadow

// mutant is a defect that tests switch on in the slots of a VM, to see that they
// notice. The names in comments are those that the tests report; the other defects
// of that list are of those who use the package, or do not apply.
type mutant uint8

const (
	sound             mutant = iota
	seqAfterLookup           // VM1: the sequence is read after the host's mapping was looked up
	compareUnlocked          // VM2: a fault compares before it takes the lock, and not under it
	seqAlone                 // VM2: it compares the sequence, and does not look at open brackets
	recordAlone              // VM2: it looks at open brackets, and does not compare the sequence
	seqAfterRecord           // VM3: a bracket is forgotten before the sequence grows
	seqStays                 // VM3: the end of a bracket leaves the sequence
	newestBracketOnly        // VM4: a bracket is recorded in the place of those that are open
	bracketUnrecorded        // VM6: a bracket is not recorded
	deleteWithoutZap         // VM7: a slot goes, and its translations stay
	updateUnmarked           // VM7: a fault uses a set that is about to change
	viewsRemember            // VM19, VM22: a view goes on with a translation that was zapped
	noGracePeriod            // VM8, VM9: a bracket does not wait for whoever uses what it has zapped
	ownZapsOnly              // VM9: it does not wait for what another bracket has zapped
	changeBeforeZap          // the zap comes after the change
	firstSlotOnly            // VM10: of the slots that show a range only the first is looked at
	zapRoundsDown            // VM11: the last frame of a range is not zapped
	aliasUnlogged            // V9: a write is logged at one frame of a page that several show
	storesUnlogged           // a write is not logged
	generationStays          // VM19: a new set has the generation of the old one
	retryForever             // VM20: a fault whose context is done goes on
	createFirst              // VM23: a transaction creates slots before it deletes others
	undoNothing              // K4: a transaction that fails is not undone
	publishIntended          // K4: and publishes what it was to do
	collectAfterwards        // V13: a slot's log is read when the slot has gone, and that there is none is taken for nothing
	contentUnrecorded        // what a change did to content is not recorded
	returnsUnrecorded        // what comes back with the content that it had is not recorded
	harvestInBracket         // a harvest does not wait for brackets to end
	coarseForGood            // slots that are coarse stay so
	fineAtOnce               // they are precise again as soon as there are numbers enough
	piecesStand              // what would be precise is not followed while they are coarse
	slotStays                // a slot goes on showing what was unmapped
	endUntold                // the end of a bracket is not told to who waits for memory
	numbersLeak              // slot numbers are not given out again
	endLooksAgain            // VM5: the end of a bracket goes by the slots there are then
	releaseAwaitsEnds        // VM25: the release waits for open brackets to end
)
