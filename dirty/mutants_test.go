package dirty

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

// No check needs luck, or two processors: what happens in between is done by a
// hook, or waited for.
var mutants = []gvmtest.Mutant[mutant]{
	{ID: "DM1", Defect: noGracePeriod, What: "a harvest does not wait", By: "V10 store meets harvest", Check: storeMeetsHarvest((*bed).storeSlowly)},
	{ID: "DM2", Defect: takeByCopy, What: "copied first, then cleared (VM12)", By: "V10 marks during Begin", Check: checkMarksDuringBegin},
	{ID: "DM3", What: "a mark after the store", By: "V10 store meets harvest", Check: storeMeetsHarvest((*bed).storeBeforeMark)},
	{ID: "DM4", What: "a section that ends before the store", By: "V10 store meets harvest", Check: storeMeetsHarvest((*bed).storeOutside)},
	{ID: "DM5", What: "a mark that is not atomic", By: "V10 marks in one word", Check: marksInOneWord((*bed).markPlainly)},
	{ID: "DM6", Defect: touchByStore, What: "a chunk installed over another", By: "V10 marks during a first mark", Check: checkFirstMarks},
	{ID: "DM7", Defect: growFromStale, What: "directories grow from a stale list", By: "V10 marks during a first mark", Check: checkFirstMarks},
	{ID: "DM8", Defect: abortOverwrites, What: "an abort replaces the other frames", By: "V10 abort loses nothing", Check: checkAbort},
	{ID: "DM8", Defect: abortOverwritesTree, What: "an abort replaces bitmaps", By: "V10 abort loses nothing", Check: checkAbort},
	{ID: "DM9", Defect: abortForgetsDiscards, What: "an abort forgets the discards", By: "V10 abort loses nothing", Check: checkAbort},
	{ID: "DM10", Defect: commitClears, What: "a commit clears later marks", By: "V10 commit loses nothing", Check: checkCommit},
	{ID: "DM11", Defect: discardUnmarks, What: "a discard takes back dirty marks", By: "V10 store after discard", Check: checkStoreAfterDiscard},
	{ID: "DM12", Defect: discardsFirst, What: "discards taken before the marks", By: "V10 discards during Begin", Check: checkDiscardsDuringBegin},
	{ID: "DM13", Defect: discardsLate, What: "a discard in the wait is not dirty", By: "V10 discard between mark and store", Check: checkDiscardBeforeStore},
	{ID: "DM14", What: "a discard recorded afterwards", By: "V10 discard meets harvests", Check: discardMeetsHarvests((*bed).discardAfterwards)},
	{ID: "DM15", What: "a discard outside of a section", By: "V10 discard meets harvests", Check: discardMeetsHarvests((*bed).discardOutside)},
}

// TestMutants has each check find the defect that it is there for, and find
// nothing without it.
func TestMutants(t *testing.T) { gvmtest.RunMutants(t, mutants) }

// TestChecksPassUsers has the checks that inject defects of users find nothing
// with users who have none.
func TestChecksPassUsers(t *testing.T) {
	for name, check := range map[string]func(mutant) error{
		"store meets harvest":    storeMeetsHarvest((*bed).storeSlowly),
		"marks in one word":      marksInOneWord((*bed).markAtomically),
		"discard meets harvests": discardMeetsHarvests((*bed).discardSlowly),
	} {
		if err := check(sound); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMutantsAreAllThere: every defect that a log can have is in the table, so
// that none is without a check.
func TestMutantsAreAllThere(t *testing.T) { gvmtest.EveryMutant(t, discardsLate, mutants) }

// pending is a harvest that is being made by another goroutine.
type pending struct{ done chan error }

// startHarvest makes a harvest on another goroutine. It returns when that waits, if
// a section is open that it has to wait for, and else when it is through.
func (b *bed) startHarvest() pending {
	open := b.domain.Stats().Readers > 0
	p := pending{make(chan error, 1)}
	go func() { p.done <- b.harvest((*Harvest).Commit) }()
	for len(p.done) == 0 && !(open && b.domain.Stats().Waiting > 0) {
		time.Sleep(20 * time.Microsecond)
	}
	return p
}

func (p pending) join() error { return <-p.done }

// storeMeetsHarvest has a store be interrupted half way, by a harvest that begins.
// When the harvest is committed the copy has to be as new as what it was when Begin
// was called, and after another one it has to be the memory.
func storeMeetsHarvest(store func(b *bed, i int, v uint64, halfway func())) func(mutant) error {
	return func(m mutant) error {
		b := newBed(m, 4, 5)
		var harvest pending
		var before uint64
		store(b, 0, 1, func() {
			before = b.mem[0].Load()
			harvest = b.startHarvest()
		})
		if err := harvest.join(); err != nil {
			return err
		}
		if got := b.copy[0]; got < before {
			return fmt.Errorf("%v held %d before Begin, and its copy is %d after Commit", b.frames[0], before, got)
		}
		return b.settle()
	}
}

func (b *bed) storeSlowly(i int, v uint64, halfway func()) {
	b.inSection(func() {
		b.Mark(b.frames[i])
		halfway()
		b.mem[i].Store(v)
	})
}

func (b *bed) storeBeforeMark(i int, v uint64, halfway func()) {
	b.inSection(func() {
		b.mem[i].Store(v)
		halfway()
		b.Mark(b.frames[i])
	})
}

func (b *bed) storeOutside(i int, v uint64, halfway func()) {
	b.inSection(func() { b.Mark(b.frames[i]) })
	halfway()
	b.mem[i].Store(v)
}

// marksInOneWord has a mark be interrupted by one of a frame whose bit is in the
// same word.
func marksInOneWord(mark func(b *bed, gfn addr.GFN, halfway func())) func(mutant) error {
	return func(m mutant) error {
		b := newBed(m, 4, 5, 6)
		b.store(0, 1)
		b.inSection(func() {
			mark(b, b.frames[1], func() { b.store(2, 2) })
			b.mem[1].Store(3)
		})
		return b.settle()
	}
}

func (b *bed) markAtomically(gfn addr.GFN, halfway func()) {
	halfway()
	b.Mark(gfn)
}

func (b *bed) markPlainly(gfn addr.GFN, halfway func()) {
	w := &b.find(uint64(gfn) >> chunkShift)[gfn/64%chunkWords]
	old := atomic.LoadUint64(w)
	halfway()
	atomic.StoreUint64(w, old|1<<(gfn%64))
}

// everyPoint runs a check once for each point, with do called the first time that
// the point is reached.
func everyPoint(m mutant, frames []addr.GFN, do func(b *bed), run func(b *bed) error) error {
	for p := growing; p <= discarding; p++ {
		b := newBed(m, frames...)
		b.hook = func(at point) {
			if at == p {
				b.hook = nil
				do(b)
			}
		}
		if err := run(b); err != nil {
			return fmt.Errorf("something happened at point %d: %w", p, err)
		}
	}
	return nil
}

// checkMarksDuringBegin has frames be stored to while a harvest takes the marks:
// one that is marked already, one of the same word, and one of another chunk.
func checkMarksDuringBegin(m mutant) error {
	do := func(b *bed) { b.store(0, 2); b.store(1, 2); b.store(2, 2) }
	return everyPoint(m, []addr.GFN{4, 5, 9 * chunk}, do, func(b *bed) error {
		b.store(0, 1)
		if err := b.harvest((*Harvest).Commit); err != nil {
			return err
		}
		return b.settle()
	})
}

// checkFirstMarks has the first mark of a chunk, and of a directory, be interrupted
// by others: of the same chunk, and of another directory.
func checkFirstMarks(m mutant) error {
	do := func(b *bed) { b.store(1, 2); b.store(2, 2) }
	return everyPoint(m, []addr.GFN{4, 5, 3 * dirChunks * chunk}, do, func(b *bed) error {
		b.store(0, 1)
		return b.settle()
	})
}

// checkAbort aborts a harvest that has a mark and a discard, after a mark of the
// same chunk, a merge and another discard. What is then committed has all of them.
func checkAbort(m mutant) error {
	b := newBed(m, 4, 5, 6, 7, 8)
	for i := range b.frames {
		b.store(i, 1)
	}
	if err := b.settle(); err != nil {
		return err
	}
	b.store(0, 2)
	b.discard(3, 3)
	saved := slices.Clone(b.copy)
	h, err := b.Begin()
	if err != nil {
		return err
	}
	b.store(1, 2)
	b.mem[2].Store(2) // by a guest, and then told by its hypervisor
	b.Merge(setOf(gfns(b.frames[2], b.frames[2]+1)))
	b.discard(4, 4)
	b.copy = saved
	if err := h.Abort(); err != nil {
		return err
	}
	return b.settle()
}

// checkCommit commits a harvest after marks of what it has, of the same chunk and
// of another one, after a merge and a discard.
func checkCommit(m mutant) error {
	b := newBed(m, 4, 5, 6, 7, 9*chunk)
	for i := range b.frames {
		b.store(i, 1)
	}
	h, err := b.Begin()
	if err != nil {
		return err
	}
	b.apply(h)
	b.store(0, 2)
	b.mem[1].Store(2)
	b.Merge(setOf(gfns(b.frames[1], b.frames[1]+1)))
	b.discard(2, 2)
	b.store(4, 2)
	if err := h.Commit(); err != nil {
		return err
	}
	return b.settle()
}

// checkStoreAfterDiscard discards a frame that is marked, by a writer that stores
// when the content has gone.
func checkStoreAfterDiscard(m mutant) error {
	b := newBed(m, 4)
	b.storeSlowly(0, 1, func() { b.discard(0, 0) })
	return b.settle()
}

// checkDiscardsDuringBegin has a frame be discarded and then stored to while a
// harvest takes the marks, and another one stored to and then discarded.
func checkDiscardsDuringBegin(m mutant) error {
	do := func(b *bed) {
		b.discard(0, 0)
		b.store(0, 2)
		b.store(1, 2)
		b.discard(1, 1)
	}
	return everyPoint(m, []addr.GFN{4, 5, 6}, do, func(b *bed) error {
		for i := range b.frames {
			b.store(i, 1)
		}
		if err := b.harvest((*Harvest).Commit); err != nil {
			return err
		}
		return b.settle()
	})
}

// checkDiscardBeforeStore discards a frame while a harvest, which has its mark,
// waits for the store.
func checkDiscardBeforeStore(m mutant) error {
	b := newBed(m, 4)
	var harvest pending
	b.storeSlowly(0, 1, func() {
		harvest = b.startHarvest()
		b.discard(0, 0)
	})
	if err := harvest.join(); err != nil {
		return err
	}
	return b.settle()
}

// discardMeetsHarvests has a discard be interrupted half way: by a harvest that
// begins, and by a store to the frame once the content has gone, followed by a
// harvest.
func discardMeetsHarvests(discard func(b *bed, before, after func())) func(mutant) error {
	return func(m mutant) error {
		interruptions := map[string]func(b *bed) pending{
			"a harvest": (*bed).startHarvest,
			"a store and a harvest": func(b *bed) pending {
				b.store(0, 2)
				return b.startHarvest()
			},
		}
		var errs []error
		for what, interrupt := range interruptions {
			for _, gone := range []bool{false, true} {
				b := newBed(m, 4)
				b.store(0, 1)
				if err := b.settle(); err != nil {
					return err
				}
				var harvest pending
				at := func(now bool) func() {
					return func() {
						if now == gone {
							harvest = interrupt(b)
						}
					}
				}
				discard(b, at(false), at(true))
				if err := errors.Join(harvest.join(), b.settle()); err != nil {
					errs = append(errs, fmt.Errorf("after %s, content gone: %v: %w", what, gone, err))
				}
			}
		}
		return errors.Join(errs...)
	}
}

func (b *bed) discardSlowly(before, after func()) {
	b.inSection(func() {
		b.Discard(gfns(b.frames[0], b.frames[0]+1))
		before()
		b.mem[0].Store(0)
		after()
	})
}

func (b *bed) discardOutside(before, after func()) {
	b.Discard(gfns(b.frames[0], b.frames[0]+1))
	before()
	b.mem[0].Store(0)
	after()
}

func (b *bed) discardAfterwards(before, after func()) {
	before()
	b.mem[0].Store(0)
	after()
	b.inSection(func() { b.Discard(gfns(b.frames[0], b.frames[0]+1)) })
}
