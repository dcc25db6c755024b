package notifier

import (
	"context"
	"slices"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
)

// MapKind is what kind of pages a reverse map is of.
type MapKind uint8

// The kinds, in the order in which their locks are taken.
const (
	HugeMap MapKind = iota // a file of huge pages
	FileMap                // any other file
	AnonMap                // anonymous pages that processes share since a fork, or that one has
)

// ReverseMap stands for pages that several address spaces may have mapped: a
// file, or a group of anonymous pages. It is Linux's address_space and anon_vma
// as far as notifiers go: a lock. Who changes the pages themselves for everybody
// who maps them, as a hole that is punched into a file does, holds no mapping
// lock for that, but this one.
type ReverseMap struct {
	kind  MapKind
	lock  rwLock
	taken bool // by the holder of allLocks, which protects it
}

// NewReverseMap returns the reverse map of a new file or group.
func NewReverseMap(kind MapKind) *ReverseMap {
	return &ReverseMap{kind: kind, lock: newRWLock(lockorder.HugeMap + lockorder.Class(kind))}
}

// RLock blocks until no registration with an address space that has the pages
// mapped is under way, and keeps others from beginning until RUnlock: brackets
// may run meanwhile in those address spaces.
func (m *ReverseMap) RLock() { _ = m.lock.rlock(context.Background()) }

// RUnlock gives the lock back after RLock.
func (m *ReverseMap) RUnlock() { m.lock.runlock() }

// Region is a range of addresses of an address space, and the reverse maps of
// what may be mapped there: Linux's vma as far as notifiers go. Linux also marks
// every region as locked while it registers, for page faults that take the lock
// of a region alone; here they take the mapping lock.
type Region struct {
	Range addr.HVARange
	Maps  []*ReverseMap
}

// AddRegion tells the address space of a region. The caller holds the mapping
// lock for writing.
func (as *AddressSpace) AddRegion(r *Region) { as.regions = append(as.regions, r) }

// RemoveRegion takes back what AddRegion told. The caller holds the mapping lock
// for writing.
func (as *AddressSpace) RemoveRegion(r *Region) {
	as.regions = slices.DeleteFunc(as.regions, func(o *Region) bool { return o == r })
}

// allLocks is held while somebody takes the locks of several reverse maps, and
// until they are given back. Two address spaces share maps, and would else meet
// them in different orders.
var allLocks = newRWLock(lockorder.AllLocks)

// takeAllLocks takes every lock that a bracket of as can run under, besides the
// mapping lock, which the caller holds for writing: when it returns nil no
// bracket is in flight, and none begins until dropAllLocks. It looks at ctx
// before each lock and while it waits for one; if ctx is done it holds nothing,
// and the error is EINTR. It allocates nothing unless it has to wait.
//
// It is Linux's mm_take_all_locks. It costs time by the region, so registration
// uses it and unregistration does not.
func (as *AddressSpace) takeAllLocks(ctx context.Context) error {
	if as.mutant != noAllLocksMutex {
		if err := allLocks.lock(ctx); err != nil {
			return interrupted("wait for other registrations", err)
		}
	}
	for kind := HugeMap; kind <= AnonMap; kind++ {
		for _, r := range as.regions {
			for _, m := range r.Maps {
				if m.kind != kind || m.taken && as.mutant != lockMapTwice {
					continue
				}
				if err := m.lock.lock(ctx); err != nil {
					as.dropAllLocks()
					return interrupted("wait for the brackets in flight to end", err)
				}
				m.taken = true
			}
		}
	}
	return nil
}

func (as *AddressSpace) dropAllLocks() {
	for _, r := range as.regions {
		for _, m := range r.Maps {
			if m.taken {
				m.taken = false
				m.lock.unlock()
			}
		}
	}
	if as.mutant != noAllLocksMutex {
		allLocks.unlock()
	}
}
