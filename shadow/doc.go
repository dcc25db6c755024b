// Package shadow is the secondary MMU of a VMM: what the process keeps for itself of
// the mappings of its guest's memory, and keeps coherent with them. It is the part
// that KVM's memory slots and shadow page tables have in the kernel, for the views
// that the kernel does not know of.
//
//	Window     guest RAM as the guest was promised it: frames, and host addresses
//	Slots      the memory slots that there are: an immutable set, with a generation
//	Memslots   who changes them, by transactions that end as a whole or not at all
//	Table      translations, for threads of the VMM that use guest memory
//	Tracker    the subscriber that has all of them follow the host's mappings
//
// A [Tracker] subscribes to the notifier of an address space. It knows the guest's RAM
// as [Window]s, and derives from them and from what the host has mapped the slots
// that should be there. When a bracket opens, it takes out the translations of the
// range, waits until nobody uses one, and takes from the slots what will no longer be
// backed; when it closes, it makes the slots fit what is mapped then. The slots are
// installed through a [Backend], all changes of one step behind its gate, so that no
// vCPU runs while a slot is absent only for a moment.
//
// The package makes no system call.
//
// # Policies
//
// That slots follow the mappings is the policy [Precise]. With [Lazy] they show all of
// each window, whatever is mapped, and change only when windows are added or move.
//
//	                              Precise                           Lazy
//	unmap, protect, map           slots change, vCPUs are held out  nothing
//	the guest uses what is gone   an exit that names the address    EFAULT, and no address
//	the guest's instruction       its access can be completed       can be run again
//	slots                         one for each piece that is mapped one for each window
//
// There are only so many slot numbers. When precise slots would need more than the
// limit of the tracker they become coarse: as lazy ones are, so that what is mapped
// can be used, and nothing else. The tracker goes on to note what would be precise, and
// makes the slots so when half of the limit is enough. See [Tracker.Coarse].
//
// # Invariants
//
//   - The published set is what the backend has, also after a failure.
//   - Outside brackets every slot lies in a window. One that is precise covers mapped
//     memory that allows what the slot allows; coarse ones cover all of each window.
//   - From the moment that InvalidateRangeStart for Unmap or Protect returned
//     nil, no slot that is precise allows an access that the change takes away.
//   - Outside brackets slots of the policy Precise are coarse only if precise ones
//     would be more than half of the limit.
//   - From the moment that InvalidateRangeStart returned, for any event, until
//     InvalidateRangeEnd, no page of the range is used through the table.
//   - Every translation is of a frame that a slot shows, and allows no more.
//   - Each store through the table is in the dirty log when it is made.
//
// [Tracker.Check] tests them.
//
// # How this differs from KVM
//
//   - Slots follow inside brackets, whereas KVM publishes none while one is open: it
//     decides at the start and at the end, by looking slots up, whether a bracket
//     concerns it, and both have to see the same. Here a bracket is recorded by its
//     host addresses, and its end takes back what its start has recorded.
//   - A transaction takes out the translations of frames that will show something
//     else, not all of the slots that are made anew.
//   - All events are alike to the table: each start zaps.
//   - A translation has a host address where KVM's has a host frame. So a page that
//     is only dropped, and comes back by another fault of the process, would not have
//     to be zapped; it is, so that what was written before a discard is told from
//     what was written after it.
//   - Writes are logged by the page, each time, whatever the size of the translation.
//     A harvest takes no look at translations.
//
// # Locks
//
// Package internal/lockorder has the order.
//
//	Memslots.mu            a subscriber's lock: windows, slots, and the order of sets.
//	                       With it held the tracker waits for vCPUs to leave the guest,
//	                       and for uses of pages to end
//	    Table.mu           translations; nothing is called with it held
//	        bracketMu      the brackets that are open; a leaf
//
// A use of a page, in a read section of the table's domain, counts as a lock, because
// it is waited for with the mapping lock and Memslots.mu held: inside, neither is
// taken. A fault holds none of them while it looks up the host's mapping, which takes
// the mapping lock.
package shadow
