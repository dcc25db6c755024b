package shadow

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/srcu"
)

// Host says what is mapped.
type Host interface {
	// Walk calls fn for runs of equal access that cover all of r, in order. It
	// is called with the mapping lock held.
	Walk(r addr.HVARange, fn func(r addr.HVARange, access addr.Access))

	// Lookup returns the access that the mapping of hva allows, and the longest
	// run of addresses around hva and in within, all of whose mappings allow
	// just that. It takes the mapping lock; if ctx is done before it has it, it
	// returns an error that is EINTR.
	Lookup(ctx context.Context, hva addr.HVA, within addr.HVARange) (run addr.HVARange, access addr.Access, err error)
}

// Table translates guest addresses for the threads of the VMM: what the second
// level of page tables is for a vCPU. A thread that finds its translation there
// uses the page inside a read section of the table's srcu domain, and may sleep in
// the middle of it; one that does not takes the fault path, which makes the
// translation from the slots and the host's mappings.
//
// Its methods that use memory are those of [View], for any goroutine at any time;
// a View of one's own is faster. None of them is called in a bracket of the address
// space, with a lock of the order held, or inside a Use: the fault path takes the
// mapping lock, whose holder waits for uses to end.
//
// # Why nobody uses a page that has gone
//
// A change is bracketed. When the bracket opens the table records its range, takes
// out the translations of the range, and waits until every section that may have
// found one has ended; only then does the change happen. A section that opens
// later finds no translation. A fault makes none while the bracket is open, and
// none from what it looked at before the bracket opened:
//
//	fault                            bracket
//	seq := t.seq.Load()
//	slot, host mapping := look up
//	                                 open: record the range, zap, wait
//	                                 the mapping changes
//	                                 end: seq++, forget the range
//	under t.mu: seq != t.seq         (required: what was looked up is stale)
//
// Both comparisons are needed: the sequence alone misses a bracket that is still
// open, the record alone one that has opened and closed. The sequence is loaded
// before anything is looked up, and they are compared with t.mu held, which the
// bracket takes to zap after it has recorded its range. So either the fault sees
// the record, or the zap sees the translation.
//
// A change of the slots does the same with the set: it is Updating from before the
// zap to the end, and a fault compares the set, too.
type Table struct {
	user

	slots  *Memslots    // immutable
	host   Host         // immutable
	domain *srcu.Domain // immutable; a section is open while a translation is used
	log    *dirty.Log   // immutable

	zaps   atomic.Uint64 // changes when a translation was taken out, or is to be made young again; see translation
	seq    atomic.Uint64 // brackets ended; written with bracketMu held
	active atomic.Int32  // brackets that are open; written with bracketMu held, after seq

	bracketMu sync.Mutex // protects what follows; a leaf
	open      []bracket
	ended     chan struct{} // closed when a bracket has ended; nil: nobody waits

	mu       sync.Mutex                      // protects the translations, and what follows
	root     [rootLen]atomic.Pointer[level3] // looked up without mu, in a section
	pages    int                             // that are translated
	tables   [levels + 1]int                 // by level
	unwaited srcu.Cookie                     // the grace period after the last zap
	released bool
	counts   Stats

	step func(name string) // called at each step of a fault, and in a bracket, in tests
}

// bracket is a change that is about to be made, or just was.
type bracket struct {
	addr.HVARange
	zapped bool // nothing is translated there
}

// NewTable returns an empty table for the slots of m, which has none yet and no
// other table. The caller tells it of changes: see [Tracker], which does.
func NewTable(m *Memslots, host Host) *Table {
	t := &Table{slots: m, host: host, domain: srcu.New(), unwaited: srcu.CompletedState}
	t.log = dirty.NewLog(t.domain)
	t.user = user{t: t, ctx: context.Background()}
	m.table = t
	return t
}

// at tells a test where a fault or a bracket is.
func (t *Table) at(step string) {
	if t.step != nil {
		t.step(step)
	}
}

// Dirty returns the log of the pages that were written through the table, and of
// what others report to it. Its Begin is not called with a lock of the order held,
// nor inside a Use.
func (t *Table) Dirty() *dirty.Log { return t.log }

// begin opens a bracket: no translation of the range is used when it returns, nor
// made before end. It returns how many pages were translated.
func (t *Table) begin(r addr.HVARange) (zapped int) {
	if t.slots.mutant != bracketUnrecorded {
		t.bracketMu.Lock()
		if t.slots.mutant == newestBracketOnly {
			t.open = t.open[:0]
		}
		t.open = append(t.open, bracket{HVARange: r})
		t.active.Store(int32(len(t.open)))
		t.bracketMu.Unlock()
	}
	if t.slots.mutant != changeBeforeZap {
		zapped = t.zapHVAs(r)
	}
	t.bracketMu.Lock()
	defer t.bracketMu.Unlock()
	if i := slices.Index(t.open, bracket{HVARange: r}); i >= 0 {
		t.open[i].zapped = true
	}
	return zapped
}

// end closes the bracket that begin opened for the range.
func (t *Table) end(r addr.HVARange) {
	if t.slots.mutant == changeBeforeZap {
		t.zapHVAs(r)
	}
	t.bracketMu.Lock()
	defer t.bracketMu.Unlock()
	i := slices.Index(t.open, bracket{r, true})
	if i < 0 {
		return // it was opened before the table was told of brackets
	}
	t.open = slices.Delete(t.open, i, i+1)
	switch t.slots.mutant {
	case seqStays:
	case seqAfterRecord:
		t.active.Store(int32(len(t.open)))
		t.at("between")
		t.seq.Add(1)
	default:
		// A fault that reads active and then seq must not find the bracket
		// gone and the sequence unchanged.
		t.seq.Add(1)
		t.active.Store(int32(len(t.open)))
	}
	if t.ended != nil && t.slots.mutant != endUntold {
		close(t.ended)
		t.ended = nil
	}
}

// conflict reports whether a look at the mapping of hva that began with seq is no
// longer, or not yet, good for a translation.
func (t *Table) conflict(hva addr.HVA, seq uint64) bool {
	open := t.active.Load() > 0 && t.inBracket(hva)
	switch t.slots.mutant {
	case seqAlone:
		open = false
	case recordAlone:
		return open
	}
	return open || t.seq.Load() != seq
}

func (t *Table) inBracket(hva addr.HVA) bool {
	t.bracketMu.Lock()
	defer t.bracketMu.Unlock()
	return t.openAtLocked(hva)
}

func (t *Table) openAtLocked(hva addr.HVA) bool {
	return slices.ContainsFunc(t.open, func(b bracket) bool { return b.Start <= hva && hva < b.End })
}

// await returns when hva is in no open bracket. The error is EINTR if ctx is done
// before that.
func (t *Table) await(ctx context.Context, hva addr.HVA) error {
	for {
		t.bracketMu.Lock()
		if !t.openAtLocked(hva) {
			t.bracketMu.Unlock()
			return nil
		}
		ended := t.endOfBracketLocked()
		t.bracketMu.Unlock()
		if err := wait(ctx, ended, "the change of the mapping"); err != nil {
			return err
		}
	}
}

// endOfBracket returns a channel that is closed when a bracket ends, or all have been
// ended by the release.
func (t *Table) endOfBracket() <-chan struct{} {
	t.bracketMu.Lock()
	defer t.bracketMu.Unlock()
	return t.endOfBracketLocked()
}

func (t *Table) endOfBracketLocked() <-chan struct{} {
	if t.ended == nil {
		t.ended = make(chan struct{})
	}
	return t.ended
}

func wait(ctx context.Context, c <-chan struct{}, what string) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of %s: %w: %w", what, syscall.EINTR, context.Cause(ctx))
	}
}

// zapHVAs takes out the translations of the pages in r, at all frames that show
// them, and returns how many there were, when none of them is used. It does not take
// the lock where no slot shows a byte of r.
func (t *Table) zapHVAs(r addr.HVARange) (zapped int) {
	locked := false
	for s := range t.slots.Slots().slots.inHVAs(r) {
		if !locked {
			t.lock()
			locked = true
		}
		both := s.HVAs().Intersect(addr.HVARange{Start: r.Start &^ addr.PageMask, End: (r.End + addr.PageMask) &^ addr.PageMask})
		zapped += t.zap(frames(s.gfn(both.Start), both.NPages()))
		if t.slots.mutant == firstSlotOnly {
			break
		}
	}
	if locked {
		t.flush(zapped)
	}
	return zapped
}

// zapFrames takes out the translations of frames, and returns when none of them is
// used.
func (t *Table) zapFrames(ranges []addr.GFNRange) {
	t.lock()
	zapped := 0
	for _, r := range ranges {
		zapped += t.zap(r)
	}
	t.flush(zapped)
}

func (t *Table) lock() {
	t.mu.Lock()
	t.counts.Locked++
}

// flush gives t.mu back and waits until no translation is used that was zapped
// under it: the TLB flush of this MMU. One that another goroutine has zapped and
// waits for at the moment may be one of the caller's range, which was found empty
// for that reason: it is waited for as well.
func (t *Table) flush(zapped int) {
	t.counts.Zapped += uint64(zapped)
	if zapped > 0 {
		t.unwaited = t.domain.GetState()
	}
	c := t.unwaited
	if t.domain.Poll(c) || zapped == 0 && t.slots.mutant == ownZapsOnly {
		t.mu.Unlock()
		return
	}
	t.counts.Flushes++
	t.mu.Unlock()
	if t.slots.mutant != noGracePeriod {
		t.domain.SynchronizeExpedited()
	}
}

// fault makes a translation of gfn that allows want, or returns why there can be
// none. It blocks while the mapping changes.
func (t *Table) fault(ctx context.Context, gfn addr.GFN, want addr.Access) error {
	lockorder.Wait(lockorder.MmapLock)
	for {
		retry, err := t.tryFault(ctx, gfn, want)
		if err != nil || !retry {
			return err
		}
		if t.slots.mutant != retryForever && ctx.Err() != nil {
			return fmt.Errorf("the mapping keeps changing: %w: %w", syscall.EINTR, context.Cause(ctx))
		}
	}
}

var (
	errNoSlot   error = &errnoError{"no memory slot shows it", syscall.EFAULT}
	errReadOnly error = &errnoError{"its memory slot is read-only", syscall.EFAULT}
	errUnmapped error = &errnoError{"the host's mapping does not allow it", syscall.EFAULT}
)

// tryFault is fault, unless what it looks up is about to change or has changed
// meanwhile.
func (t *Table) tryFault(ctx context.Context, gfn addr.GFN, want addr.Access) (retry bool, err error) {
	seq := t.seq.Load()
	t.at("looked at seq")
	set := t.slots.Slots()
	if set.updating {
		return true, wait(ctx, set.changed, "the change of the memory slots")
	}
	s := set.slots.find(gfn)
	if s == nil || s.Access&want != want {
		// It may be that the slots are cut for a change that is under way.
		if hva, ok := set.HVA(gfn.GPA()); ok && t.conflict(hva, seq) {
			return true, t.await(ctx, hva)
		}
		switch {
		case t.isReleased():
			return false, notifier.ErrExited
		case s == nil:
			return false, errNoSlot
		}
		return false, errReadOnly
	}
	hva := s.hva(gfn)
	if t.conflict(hva, seq) {
		t.tally(&t.counts.Retries)
		return true, t.await(ctx, hva)
	}
	block := levelBlock(gfn, levels).Intersect(s.GFNs())
	run, access, err := t.host.Lookup(ctx, hva, s.cut(block).HVAs())
	if err != nil {
		return false, err
	}
	if t.slots.mutant == seqAfterLookup {
		seq = t.seq.Load()
	}
	access &= s.Access
	if access&want != want {
		if t.conflict(hva, seq) {
			return true, t.await(ctx, hva)
		}
		return false, errUnmapped
	}
	t.at("looked up")
	e, level := makeEntry(set, s, gfn, run, access)

	if t.slots.mutant == compareUnlocked && !t.conflict(hva, seq) {
		t.at("compared")
		seq = t.seq.Load()
	}
	t.lock()
	defer t.mu.Unlock()
	unlocked := t.slots.mutant == compareUnlocked
	if (t.conflict(hva, seq) || t.slots.Slots() != set) && !unlocked {
		t.counts.Retries++
		return true, nil
	}
	if t.released {
		return false, notifier.ErrExited
	}
	t.counts.Faults++
	t.install(gfn, e, level)
	return false, nil
}

func (t *Table) isReleased() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.released
}

func (t *Table) tally(n *uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*n++
}

// levelBlock returns the frames that an entry of a level translates with gfn.
func levelBlock(gfn addr.GFN, level int) addr.GFNRange {
	n := levelPages(level)
	return frames(gfn&^addr.GFN(n-1), n)
}

// makeEntry returns the translation of gfn, and the highest level at which it can be
// installed: all of the block is in s, is mapped alike, and is shown nowhere else.
func makeEntry(set *Slots, s *Slot, gfn addr.GFN, run addr.HVARange, access addr.Access) (entry, int) {
	flags := present
	if access&addr.Write != 0 {
		flags |= writable
	}
	for level := levels; level > 1; level-- {
		block := levelBlock(gfn, level)
		if block.Intersect(s.GFNs()) != block {
			continue
		}
		if hvas := s.cut(block).HVAs(); run.Contains(hvas) && !isAliased(set, hvas) {
			return entry(hvas.Start) | flags, level
		}
	}
	if isAliased(set, addr.HVAs(s.hva(gfn), addr.PageSize)) {
		flags |= aliased
	}
	return entry(s.hva(gfn)) | flags, 1
}

// isAliased reports whether more than one slot shows a byte of r.
func isAliased(set *Slots, r addr.HVARange) bool {
	n := 0
	for range set.slots.inHVAs(r) {
		if n++; n > 1 {
			return true
		}
	}
	return false
}

// mark records that the page of gfn, which e translates, is about to be written, at
// every frame that shows it. The caller is in the section in which it writes.
func (t *Table) mark(gfn addr.GFN, e entry) {
	if t.slots.mutant == storesUnlogged {
		return
	}
	t.log.Mark(gfn)
	if e&aliased == 0 || t.slots.mutant == aliasUnlogged {
		return
	}
	page := addr.HVAs(e.hva(), addr.PageSize)
	for s := range t.slots.Slots().slots.inHVAs(page) {
		t.log.Mark(s.gfn(page.Start))
	}
}

// release takes all translations out for good. Who waits for one is told that the
// address space has exited.
func (t *Table) release() {
	t.lock()
	t.released = true
	t.flush(t.zap(allGFNs))
	for t.slots.mutant == releaseAwaitsEnds && t.active.Load() > 0 {
		runtime.Gosched()
	}
	t.bracketMu.Lock()
	defer t.bracketMu.Unlock()
	t.open = nil // of a bracket that is open now the end may never come
	t.seq.Add(1)
	t.active.Store(0)
	if t.ended != nil {
		close(t.ended)
		t.ended = nil
	}
}

// testYoung reports whether the page at hva was used, at any of its frames, since
// its young bits were last cleared.
func (t *Table) testYoung(hva addr.HVA) (was bool) {
	t.visitHVAs(addr.HVAs(hva, 1), func(c *cell) { was = was || c.load()&young != 0 })
	return was
}

// clearYoung clears the young bits of the pages in r, and reports whether one was
// set. A translation of a large block has one for all of its pages.
func (t *Table) clearYoung(r addr.HVARange) (was bool) {
	t.visitHVAs(r, func(c *cell) {
		if c.clearYoung() {
			was = true
		}
	})
	if was {
		t.zaps.Add(1) // so that views look at the bits again
	}
	return was
}

// TakeYoung returns the frames whose translations were used since the young bits were
// cleared last, by this or by a subscriber's ClearYoung, and clears them: the working set of
// the VMM's own threads. A translation of a large block is young as a whole. It waits for
// nobody, and nobody has to wait for it.
func (t *Table) TakeYoung() *dirty.Set {
	set := new(dirty.Set)
	t.visit(addr.GFNRange{Start: 0, End: maxGFN + 1}, func(c *cell, gfn addr.GFN, level int) {
		if c.clearYoung() {
			set.AddRange(levelBlock(gfn, level))
		}
	})
	t.zaps.Add(1) // so that views look at the bits again
	return set
}

// visitHVAs calls fn for the place of each translation of a page in r.
func (t *Table) visitHVAs(r addr.HVARange, fn func(c *cell)) {
	for s := range t.slots.Slots().slots.inHVAs(r) {
		both := s.HVAs().Intersect(r)
		first, last := s.gfn(both.Start), s.gfn(both.End-1)
		t.visit(addr.GFNRange{Start: first, End: last + 1}, func(c *cell, _ addr.GFN, _ int) { fn(c) })
		if t.slots.mutant == firstSlotOnly {
			break
		}
	}
}

// Stats is what a table has and has done.
type Stats struct {
	Pages  int // that are translated
	Tables int // of all levels, and the root
	Bytes  int // that these take

	Faults  uint64 // translations made
	Retries uint64 // faults that were overtaken by a change
	Zapped  uint64 // pages whose translations were taken out
	Flushes uint64 // grace periods waited for
	Locked  uint64 // times that the lock of the translations was taken to change them
}

// Stats returns the state of the table.
func (t *Table) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := t.counts
	st.Pages = t.pages
	st.Tables, st.Bytes = 1, rootBytes
	for level, n := range t.tables {
		st.Tables += n
		st.Bytes += n * tableBytes[level]
	}
	return st
}

// Check returns an error for every invariant of the table that does not hold,
// joined, or nil:
//
//   - Every translation is of a frame that a slot shows, at the address and with
//     no more access than the slot has, unless the slots are Updating.
//   - A frame has a translation at one level only.
//   - No page in an open bracket, of which the start has returned, is translated.
//   - The pages that are counted, in each table and in all, are those that are
//     translated.
func (t *Table) Check() error { return t.check(nil) }

// check is Check, and each translation has no more access than allowed says of its
// addresses, unless that is nil.
func (t *Table) check(allowed func(addr.HVARange) addr.Access) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bracketMu.Lock()
	defer t.bracketMu.Unlock()
	var errs []error
	report := func(format string, args ...any) { errs = append(errs, fmt.Errorf("shadow: "+format, args...)) }
	set := t.slots.Slots()
	pages, tables := 0, [levels + 1]int{}
	check := func(e entry, gfn addr.GFN, level int) int {
		if e == 0 {
			return 0
		}
		block := levelBlock(gfn, level)
		s := set.slots.find(gfn)
		at := addr.HVAs(e.hva(), block.NPages()<<addr.PageShift)
		switch {
		case e&present == 0:
			report("%v has bits %#x at level %d, but no translation", gfn, uint64(e), level)
		case set.updating:
		case s == nil || s.GFNs().Intersect(block) != block:
			report("%v is translated to %v, and no slot shows all of it", block, at)
		case s.hva(gfn) != e.hva() || s.Access&e.access() != e.access():
			report("%v is translated to %v %v, and shown by %v", block, at, e.access(), *s)
		}
		if allowed != nil && e.access()&^allowed(at) != 0 {
			report("%v is translated to %v %v, and the host has it as %v", block, at, e.access(), allowed(at))
		}
		for _, b := range t.open {
			if b.zapped && b.Overlaps(at) {
				report("%v is translated to %v, where a bracket of %v is open", block, at, b.HVARange)
			}
		}
		return int(block.NPages())
	}
	for i4 := range t.root {
		three := t.root[i4].Load()
		if three == nil {
			continue
		}
		tables[3]++
		for i3 := range three.below {
			gfn3 := addr.GFN(i4)<<(2*levelShift+level3Shift) | addr.GFN(i3)<<(2*levelShift)
			sum3 := check(three.large[i3].load(), gfn3, 3)
			if two := three.below[i3].Load(); two != nil {
				tables[2]++
				if sum3 > 0 {
					report("%v is translated at level 3, and has a table", gfn3)
				}
				for i2 := range two.leaf {
					gfn2 := gfn3 | addr.GFN(i2)<<levelShift
					sum2 := check(two.large[i2].load(), gfn2, 2)
					if one := two.leaf[i2].Load(); one != nil {
						tables[1]++
						if sum2 > 0 {
							report("%v is translated at level 2, and has a table", gfn2)
						}
						for i1 := range one {
							sum2 += check(one[i1].load(), gfn2|addr.GFN(i1), 1)
						}
					}
					if sum2 != int(two.pages[i2]) {
						report("%v has %d pages, and the table says %d", levelBlock(gfn2, 2), sum2, two.pages[i2])
					}
					sum3 += sum2
				}
			}
			if sum3 != int(three.pages[i3]) {
				report("%v has %d pages, and the table says %d", levelBlock(gfn3, 3), sum3, three.pages[i3])
			}
			pages += sum3
		}
	}
	if pages != t.pages || tables != t.tables {
		report("%d pages are translated in %v tables by level, and the counts are %d and %v", pages, tables, t.pages, t.tables)
	}
	if n := int(t.active.Load()); n != len(t.open) {
		report("%d brackets are open, and the count is %d", len(t.open), n)
	}
	return errors.Join(errs...)
}
