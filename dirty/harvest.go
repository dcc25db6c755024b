package dirty

import (
	"errors"
	"sync/atomic"
)

// ErrEnded is the error of Commit and Abort of a harvest that was committed or
// aborted before.
var ErrEnded = errors.New("dirty: the harvest was committed or aborted before")

// Harvest is what a log had when [Log.Begin] was called. It is ended by Commit or
// by Abort, once; until then its log has no other.
type Harvest struct {
	log              *Log
	dirty, discarded Set // not changed after Begin
}

// Begin takes all marks and discards out of the log. When it returns, all stores
// that were marked before the call are done, and those of marks in the harvest are:
// the pages may be copied. Marks that are made from then on, and some that are made
// during the call, are in the next harvest.
//
// The error is ErrOpen if a harvest is open. One that is dropped without Commit or
// Abort stays open for ever.
//
// Begin waits for the read sections of the domain that are open, and is not called
// inside of one. If SynchronizeExpedited panics, which tells of a defect that makes
// a domain worthless, so does Begin, and the log stays as if a harvest were open.
//
// It takes a step for each directory, of 512 chunks; and for each chunk that is
// marked, some hundred nanoseconds. Bitmaps are not copied.
func (l *Log) Begin() (*Harvest, error) {
	if err := l.setPhase(idle, taking); err != nil {
		return nil, err
	}
	h := &Harvest{log: l}
	var others Set
	if l.mutant == discardsFirst {
		l.takeDiscarded(h)
	}
	l.takeBitmaps(h)
	l.takeSets(h, &others) // after the bitmaps: see the package comment
	l.reach(taken)
	if l.mutant != noGracePeriod {
		l.domain.SynchronizeExpedited()
	}

	// The bitmaps are the harvest's alone from here on, and so is all else in h.
	spans := h.dirty.spans[:0]
	for _, sp := range h.dirty.spans {
		sp.part = partOf(sp.words, sp.words.count())
		spans = push(spans, sp)
	}
	h.dirty.spans = spans
	h.dirty.absorb(&others)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.phase, l.open = harvesting, h
	return h, nil
}

// setPhase goes from one phase to the next, unless l is in another one.
func (l *Log) setPhase(from, to phase) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.phase != from {
		return ErrOpen
	}
	l.phase = to
	return nil
}

// takeBitmaps moves the bitmaps of the tree to h, where they are not counted yet:
// writers that found them in the tree may still set bits.
func (l *Log) takeBitmaps(h *Harvest) {
	l.eachBitmap(func(c uint32, slot *atomic.Pointer[bitmap], b *bitmap) {
		l.reach(takingBitmap)
		if l.mutant == takeByCopy {
			b = l.copyAndClear(b)
		} else {
			b = slot.Swap(nil)
		}
		h.dirty.spans = append(h.dirty.spans, span{c, c + 1, part{words: b}})
	})
}

// takeSets moves the sets to others and h. Discards are dirty from now on, until
// the grace period has ended.
func (l *Log) takeSets(h *Harvest, others *Set) {
	l.reach(takingSets)
	l.mu.Lock()
	defer l.mu.Unlock()
	*others, l.others = l.others, Set{}
	if l.mutant != discardsFirst {
		h.discarded, l.discarded = l.discarded, Set{}
	}
	l.phase = waiting
}

// Dirty returns the frames to copy. The set is to be read, and not changed.
func (h *Harvest) Dirty() *Set { return &h.dirty }

// Discarded returns the frames whose content is gone. Those that are in Dirty too
// are to be copied nevertheless. The set is to be read, and not changed.
func (h *Harvest) Discarded() *Set { return &h.discarded }

// Commit ends the harvest: what it has is safe, and forgotten. Marks made since
// Begin stay in the log. The error is ErrEnded, and nothing happens, if the harvest
// has ended.
func (h *Harvest) Commit() error {
	return h.end(func(l *Log) {
		if l.mutant == commitClears {
			l.eachBitmap(func(_ uint32, slot *atomic.Pointer[bitmap], _ *bitmap) { slot.Store(nil) })
		}
	})
}

// Abort ends the harvest and puts all it has back into the log, along with what
// has been marked and discarded since Begin: the next harvest has both. The error
// is ErrEnded, and nothing happens, if the harvest has ended.
//
// It copies the bitmaps of the harvest.
func (h *Harvest) Abort() error {
	return h.end(func(l *Log) {
		switch l.mutant {
		case abortOverwrites:
			l.others = *h.dirty.Clone()
		case abortOverwritesTree:
			l.putBack(&h.dirty)
		default:
			l.others.Union(&h.dirty)
		}
		if l.mutant != abortForgetsDiscards {
			l.discarded.Union(&h.discarded)
		}
	})
}

// end has f say what becomes of the harvest, with mu held.
func (h *Harvest) end(f func(*Log)) error {
	l := h.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open != h {
		return ErrEnded
	}
	f(l)
	l.phase, l.open = idle, nil
	return nil
}
