package kvm

import "sync/atomic"

// mutant is a defect that tests switch on in the reader of a dirty ring, to see
// that they notice. The names in comments are those that the tests report; the
// other defects of that list are KVM's.
type mutant uint8

const (
	sound             mutant = iota
	readBeforeFlags          // VM16: an entry is read before its flags say that it is dirty
	skipUnpublished          // VM16: an entry that is not dirty is passed over
	handBackFirst            // VM16: an entry is handed back before it is read
	handBackNothing          // VM16: an entry is read and not handed back
	freeAtOnce               // VM17: an entry is made free, which is for KVM to do
	takeHarvested            // K21: a harvested entry is taken again
	restartAtZero            // K21: each harvest begins at the start of the ring
	indexSticks              // V12: the index stays at the largest number there is
	harvestWithoutEnd        // K21: a harvest goes on for as long as there are entries
)

// harvestMutant is harvest with a defect.
func (r *ringReader) harvestMutant(fn func(slot uint32, offset uint64)) (n int) {
	mask := uint32(len(r.entries) - 1)
	if r.mutant == restartAtZero {
		r.fetch = 0
	}
	reach := func() {
		if r.hook != nil {
			r.hook()
		}
	}
	for seen := 0; seen < len(r.entries) || r.mutant == harvestWithoutEnd && seen < 8*len(r.entries); seen++ {
		e := &r.entries[r.fetch&mask]
		slot, offset := e.slot, e.offset
		if r.mutant == readBeforeFlags {
			reach()
		}
		flags := atomic.LoadUint32(&e.flags)
		dirty := flags&(gfnDirty|gfnReset) == gfnDirty
		if r.mutant == takeHarvested {
			dirty = flags != 0
		}
		if !dirty && r.mutant == skipUnpublished && flags == 0 {
			r.fetch++
			continue
		}
		if !dirty {
			return n
		}
		switch r.mutant {
		case readBeforeFlags:
		case handBackFirst:
			atomic.StoreUint32(&e.flags, gfnReset)
			reach()
			slot, offset = e.slot, e.offset
		default:
			reach()
		}
		fn(slot, offset)
		switch r.mutant {
		case handBackFirst, handBackNothing:
		case freeAtOnce:
			atomic.StoreUint32(&e.flags, 0)
		default:
			atomic.StoreUint32(&e.flags, gfnReset)
		}
		n++
		if r.fetch != ^uint32(0) || r.mutant != indexSticks {
			r.fetch++
		}
	}
	return n
}
