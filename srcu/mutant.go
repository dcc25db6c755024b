package srcu

// mutant is a defect that tests switch on in a domain, to see that they notice.
// It is looked at where updaters come by, never in a reader's way. The names in
// comments are those that the tests report.
type mutant uint8

const (
	sound                 mutant = iota
	noScan1                      // SM1: wait only for the rank that was retired
	noFlip                       // SM2: wait only for the rank not in use, and do not flip
	locksFirst                   // SM3: sum opened sections before closed ones
	joinRunning                  // SM9: a grace period under way counts
	flipFirst                    // SM10: flip before the first wait
	noMutex                      // SM11: grace periods overlap
	barrierSynchronizes          // SM12: Barrier is Synchronize
	barrierSkipsRunning          // SM14: Barrier overlooks the callback that is running
	callbacksEarly               // SM15: callbacks run after a grace period that began before they were queued
	requeue                      // SM16: a Head can be queued twice
	pollExactly                  // SM17: a cookie is reached only by its own number
	missRest                     // SM18: sections counted outside the shards are overlooked
	cleanupIgnoresReaders        // SM20: Cleanup does not look at readers
	noMembarrier                 // SM21: readers go without fences, and so does the updater
	unlocksAtLeast               // SM23: more closed than opened will do
	listPerSum                   // the list of registered readers is loaded for each of the two sums
)
