// Package hmm keeps a second set of page tables coherent with those of an address
// space: Linux's heterogeneous memory management (mm/hmm.c) on top of package
// notifier, for a device that shares the memory of the process.
//
// The device cannot walk the page tables of the host. Its driver copies the part
// that it needs, and is told when that changes. There are two ways to do so, which
// Linux had one after the other. They share the walk and its results.
//
// A driver with a [Mirror] is told of every change of the address space, and
// copies by way of a [Range]. This is Linux 4.14 to 5.4, with the reference counts
// that it got in "mm/hmm: use reference counting for HMM struct"
// (hmm-reference-counting-review.txt) and after the review of that patch:
//
//	m.Register(ctx, as, driver)
//	r.Begin(as)                      r has a reference from now on
//	for {
//		r.WaitValid(ctx)             no change of the range is under way
//		as.RLock
//		r.Fault(false)               may sleep, may cause changes
//		as.RUnlock
//		driver.Lock
//		if r.Valid() { install(r.Entries); break }
//		driver.Unlock                it changed meanwhile
//	}
//	driver.Unlock
//	r.Done()                         and gives it back
//
// A driver with a [notifier.Interval] of its own makes a [Request]. This is Linux
// since 5.5, hmm_range_fault; see [RangeFault], and [Request.Populate] for the whole
// loop. [Range.Populate] is the loop above.
//
// # Objects
//
//	object    is                             has a reference to              and is kept by
//	HMM       one of an address space        the count of the address space  its references
//	Mirror    one of a device and a space    the HMM, Register to Unregister the driver
//	Range     one look at the page tables    the HMM, Begin to Done          the driver, on one goroutine at a time
//	Request   the same, without an HMM       nothing; Populate is a user     the driver, on one goroutine at a time
//
// A mirror or a range thus keeps the HMM, and that the address space. So nobody
// who holds a reference can find that the address space has gone, and nobody asks:
// the tests of hmm->mm for NULL in the patch protect nothing, as its review says.
// That the address space has exited is another matter, and is known by its
// Release having run: [HMM] outlives that, and so do mirrors and ranges.
//
// The address space does not know its HMM. [Lookup] finds it in a table that keeps
// nobody: it may fail although there is one, because the last reference is just
// being put. HMM.Get is not a way to find one. It takes another reference for
// somebody who has one, and is what HMM.Put takes back: the two are symmetric,
// which is what most of the review is about.
//
// The last Put takes the HMM off the chain of the address space and out of the
// table, unless a successor is in it already, and frees it after a grace period:
// somebody who walks the chain may stand on it.
//
// # Invariants
//
//   - The references of an HMM are those of its mirrors, its ranges, whoever called
//     Lookup and Get, and the methods that run. [HMM.Check] counts them.
//   - At most one HMM of an address space can be found, and its notifiers are
//     registered before it can.
//   - An HMM is freed once, after the last Put and a grace period.
//   - A range that Begin has returned nil for has one reference until Done; one that
//     it returned an error for has none, and Done does nothing.
//   - Of every change that overlaps a range, the range knows before any driver is
//     told, and so before anything changes.
//   - What a walk found is installed only if no change has begun since before it.
//
// # Validity
//
// There were two ways to tell whether what a walk has found still stands. gvm has
// the third:
//
//	flag, one way   4.14   a start or end marks the range; it never becomes valid again
//	flag, level     5.1    marked at a start, valid again when the last bracket has ended
//	sequence        5.5    a number taken before the walk is compared after it
//
// The level flag misses a change that begins and ends between the walk and the
// question. Here a start also counts, and a range compares the count with that
// before its walk. The final question is asked with the lock held that the driver
// takes when it is told of a change, because then a change that the question misses
// finds the driver's entries when it takes the lock:
//
//	driver                           change
//	                                 start: count the range
//	lock                             lock, drop entries, unlock
//	Valid() == false                 the page goes away
//
//	lock
//	Valid() == true
//	install                          start: count the range
//	unlock
//	                                 lock, drop entries, unlock
//	                                 the page goes away
//
// # Results
//
// Errors of looks are of type *[Error]; all errors wrap an errno. "Exited" is after
// Release of the address space. The last two columns are what Linux returned at the time
// of the patch, and in 2019 (5.1 to 5.3). They are for readers of old drivers: there is
// no way to have them returned here, because they say nothing that these do not, and no
// caller of this package was written for them.
//
//	call               else    exited  patch   2019
//	Mirror.Register    nil     ESRCH   -       -
//	Mirror.Unregister  puts    puts    puts    puts
//	Range.Begin        nil     EFAULT          EFAULT
//	Range.WaitValid    valid?  false           false
//	Range.Snapshot     n       EFAULT  EINVAL  EFAULT
//	Range.Fault        n       EFAULT  EINVAL  EFAULT
//	Range.Valid        valid?  false           -
//	Range.Done         valid?  false   false   puts
//	RangeFault         nil     EFAULT
//
// A dash is a call that did not look, a gap one that was not there. In the patch
// Snapshot and Fault begin the range themselves, and with an error leave nothing to be
// done; here [Range.Populate] does.
//
// This is what a look meets, what it returns, and what is in the entries then. In the
// column "asked" something is asked for that is not there, or not as it is wanted; of
// [Range.Snapshot] nothing is asked for. Range is a Range and Request a Request, where
// they differ.
//
//	met                         not asked               asked                     the entries there
//	range empty, misaligned     EINVAL                  EINVAL                    all as they were
//	no region                   Range EFAULT            EFAULT                    error
//	I/O, raw frames, mixed      Range EFAULT            EFAULT                    Range special, Request error
//	pages not of Range.Order    Range EINVAL            Range EINVAL              0
//	region not readable         Range EPERM             Range EPERM, else EFAULT  Range all 0, Request error
//	region not writable         nil                     EPERM                     0
//	absent, swapped out         nil                     it is faulted in          0, or as found then
//	migrating                   nil                     it is waited for          0, or as found then
//	own device page             nil                     nil                       valid, device
//	foreign entry               nil                     EFAULT                    error
//	present, but not a page     nil                     EFAULT                    error
//	present, hinting-protected  nil                     it is faulted in          0, or as found then
//	changed meanwhile           Range EAGAIN, else EBUSY                          before: as found; from there: as asked
//	would block, must not       nil                     Range EAGAIN              0
//	no memory                   nil                     ENOMEM                    0
//
// A region that is writable only is not readable. After an error other than for a
// change, the entries behind the place are 0, so that no question is taken for an answer.
// Where a fault would block and must not, the mapping lock has been given back: see
// [Error.Unlocked].
//
// # Locks
//
// Package internal/lockorder has the order. The driver's own lock is of class
// Consumer. Three are of this package:
//
//	an invalidation
//	    HMM.mirrorsLock    who is told; of class Mirrors: read while drivers are told of
//	                       a change, and written by Register and Unregister, which
//	                       thereby wait for that; not held while a driver is released
//	        driver's lock  what the device has
//	            HMM.mu     ranges and open brackets; of class Chain
//	            the table  where Lookup finds an HMM; of class Chain, and not inside HMM.mu
//
// Snapshot, Fault and RangeFault are called with the mapping lock held for reading. They
// never make an HMM, as they do in the patch: that registers notifiers, for which the lock
// has to be held for writing.
package hmm
