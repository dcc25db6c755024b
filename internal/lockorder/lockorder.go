// Package lockorder is the order in which gvm's locks are taken: the one place
// where it is written down. In a debug build, with the tag gvm_debug, the order
// is checked wherever a lock of it is taken, and a goroutine that breaks it
// panics with the place; otherwise the functions do nothing and cost nothing.
//
// It follows Linux: mm/mmap_lock, the locks of mm_take_all_locks, and the rules
// of mm/mmu_notifier.c, with lockdep's way of checking an order by classes of
// locks instead of by locks.
package lockorder

// Class is the locks of one kind. A goroutine that holds a lock may take locks
// of later classes only.
type Class uint8

// The classes, from outer to inner.
const (
	// MmapLock is the mapping lock of an address space.
	MmapLock Class = iota + 1

	// AllLocks is held by whoever takes every lock that an invalidation of one
	// address space can run under. There is one in the process: two takers
	// with locks in common would meet them in different orders.
	AllLocks

	// HugeMap, FileMap and AnonMap are the locks of reverse maps. Only the
	// holder of AllLocks has several of one class.
	HugeMap
	FileMap
	AnonMap

	// Section is an invalidation, from its start to its end. It counts as a
	// lock because others wait for its end. Sections nest.
	Section

	// Mirrors is the list of who is told on behalf of a subscriber. It is held
	// while they are told, and they take locks of class Consumer then.
	Mirrors

	// Consumer is the locks of subscribers, which their methods take.
	Consumer

	// Page is a guest page that somebody uses through the shadow table. It
	// counts as a lock because whoever takes the page away waits for its end.
	Page

	// Chain is the lock of an address space's subscriptions, and other locks
	// that are held for a few instructions.
	Chain

	// Guest is held by a vCPU that is in the guest. None is taken inside,
	// because whoever changes slots waits for it to be left. It is entered with
	// none held either, because that may have to wait for the end of an
	// invalidation.
	Guest
)

var names = [...]string{
	MmapLock: "the mapping lock",
	AllLocks: "all-locks",
	HugeMap:  "a reverse map's lock (huge pages)",
	FileMap:  "a reverse map's lock (file)",
	AnonMap:  "a reverse map's lock (anonymous)",
	Section:  "an invalidation",
	Mirrors:  "a list of mirrors",
	Consumer: "a subscriber's lock",
	Page:     "a guest page in use",
	Chain:    "the chain's lock",
	Guest:    "the guest",
}

func (c Class) String() string { return names[c] }
