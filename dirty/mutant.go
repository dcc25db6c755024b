package dirty

import (
	"sync/atomic"

	"github.com/secondmmu/gvm/addr"
)

// mutant is a defect that tests switch on in a log, to see that they notice. It is
// looked at where a harvest comes by, or a chunk is marked first, and never by
// another Mark. The names in comments are those that the tests report;
// the other defects in the table are of those who use the package.
type mutant uint8

const (
	sound                mutant = iota
	noGracePeriod               // DM1: a harvest does not wait for those who are marking
	takeByCopy                  // DM2: a harvest copies a bitmap and then clears it
	touchByStore                // DM6: the bitmap of a chunk is installed over that of another writer
	growFromStale               // DM7: the list of directories grows from what it was before the lock was taken
	abortOverwrites             // DM8: an abort replaces the set of other frames
	abortOverwritesTree         // DM8: an abort replaces bitmaps of the tree
	abortForgetsDiscards        // DM9: an abort puts back the dirty frames only
	commitClears                // DM10: a commit clears the tree
	discardUnmarks              // DM11: a discard takes back dirty marks
	discardsFirst               // DM12: a harvest takes the discards before the marks
	discardsLate                // DM13: a discard during the grace period is not dirty
)

// point is a place at which a test may want to do something. None of them is
// reached with a lock held.
type point uint8

const (
	growing      point = iota // a directory is going to be added
	touching                  // a bitmap is allocated, and not installed
	takingBitmap              // a bitmap is going to be taken
	copied                    // by copyAndClear, and not cleared
	takingSets                // the bitmaps were taken, the sets are going to be
	taken                     // all was taken, the grace period has not begun
	discarding                // discardsFirst has taken the discards
)

// reach calls the hook of a test.
func (l *Log) reach(p point) {
	if l.hook != nil {
		l.hook(p)
	}
}

// copyAndClear is how takeByCopy takes a bitmap.
func (l *Log) copyAndClear(b *bitmap) *bitmap {
	c := b.load()
	l.reach(copied)
	for w := range b {
		atomic.StoreUint64(&b[w], 0)
	}
	return c
}

// takeDiscarded takes the discarded set alone.
func (l *Log) takeDiscarded(h *Harvest) {
	l.mu.Lock()
	h.discarded, l.discarded = l.discarded, Set{}
	l.mu.Unlock()
	l.reach(discarding)
}

// unmark takes back the marks of frames.
func (l *Log) unmark(r addr.GFNRange) {
	l.others.RemoveRange(r)
	l.eachBitmap(func(c uint32, _ *atomic.Pointer[bitmap], b *bitmap) {
		for lo := range uint32(chunkFrames) {
			if r.Contains(addr.GFN(c)<<chunkShift + addr.GFN(lo)) {
				atomic.AndUint64(&b[lo/64], ^(uint64(1) << (lo % 64)))
			}
		}
	})
}

// putBack puts the bitmaps of a set into the tree, over those that are there.
func (l *Log) putBack(s *Set) {
	l.eachBitmap(func(c uint32, slot *atomic.Pointer[bitmap], _ *bitmap) {
		if p, _ := s.at(c); p.words != nil {
			slot.Store(p.words.clone())
		}
	})
}
