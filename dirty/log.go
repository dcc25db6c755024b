package dirty

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/srcu"
)

// A directory has the bitmaps of dirChunks chunks: 4 KiB of pointers. The tree of
// a log has no more than directories of them.
const (
	dirChunks   = 512
	directories = int(chunks / dirChunks)
)

type directory [dirChunks]atomic.Pointer[bitmap]

// Log is the dirty log of one VM. It is made by NewLog.
//
// What writers do is not ordered among them by the log. A Mark whose read section
// ends before the end of the grace period of a Begin is synchronized before the
// return of that Begin, and so is the store that the section makes after it.
type Log struct {
	domain *srcu.Domain

	// top is the list of directories, by the bits of a gfn above theirs; nil is one
	// without a mark so far. The list that it points to is not changed. It is
	// replaced with mu held.
	top atomic.Pointer[[]*directory]

	mu sync.Mutex // a leaf of the lock order; protects what follows

	others    Set // dirty frames that are not in the tree, or not only there
	discarded Set
	phase     phase
	open      *Harvest // in phase harvesting, otherwise nil

	mutant mutant      // a defect, in tests of the tests; none otherwise
	hook   func(point) // called on the way, in tests; nil otherwise
}

// phase is how far a harvest is.
type phase uint8

const (
	idle       phase = iota
	taking           // Begin takes the marks
	waiting          // and waits for the grace period
	harvesting       // Begin has returned the harvest, which is open
)

// ErrOpen is the error of Begin while another harvest is open. It is EBUSY.
var ErrOpen = fmt.Errorf("dirty: a harvest is open, and neither committed nor aborted: %w", syscall.EBUSY)

// NewLog returns an empty log for writers that have their read sections in domain.
func NewLog(domain *srcu.Domain) *Log {
	l := &Log{domain: domain}
	l.top.Store(new([]*directory))
	return l
}

// Mark records that gfn is written. The caller is inside a read section of the
// log's domain, stores to the page after Mark, and leaves the section after that.
// For what goes wrong otherwise see the package comment. Mark panics if gfn is not
// below Limit.
//
// It waits for nobody, except where a directory is allocated. A frame that is
// marked already costs a few loads, and no store.
func (l *Log) Mark(gfn addr.GFN) {
	c := uint64(gfn) >> chunkShift
	b := l.find(c)
	if b == nil {
		if gfn >= Limit {
			panic(notBelowLimit("Mark", gfn))
		}
		b = l.touch(c)
	}
	w, bit := &b[gfn/64%chunkWords], uint64(1)<<(gfn%64)
	if atomic.LoadUint64(w)&bit == 0 {
		atomic.OrUint64(w, bit)
	}
}

// find returns the bitmap of chunk c, or nil.
func (l *Log) find(c uint64) *bitmap {
	top := *l.top.Load()
	if i := c / dirChunks; i < uint64(len(top)) && top[i] != nil {
		return top[i][c%dirChunks].Load()
	}
	return nil
}

// touch returns the bitmap of chunk c, after adding one if there is none.
func (l *Log) touch(c uint64) *bitmap {
	i := int(c / dirChunks)
	top := *l.top.Load()
	if i >= len(top) || top[i] == nil {
		top = l.grow(i)
	}
	slot := &top[i][c%dirChunks]
	fresh := new(bitmap)
	l.reach(touching)
	if l.mutant == touchByStore {
		slot.Store(fresh)
		return fresh
	}
	for !slot.CompareAndSwap(nil, fresh) {
		if b := slot.Load(); b != nil { // otherwise a harvest took it in between
			return b
		}
	}
	return fresh
}

// grow adds directory i, unless somebody else has, and returns the list of them.
// A mark that is made meanwhile is in a directory of the old list, and all of
// those are in the new one.
func (l *Log) grow(i int) []*directory {
	stale := *l.top.Load()
	l.reach(growing)
	l.mu.Lock()
	defer l.mu.Unlock()
	top := *l.top.Load()
	if l.mutant == growFromStale {
		top = stale
	}
	if i < len(top) && top[i] != nil {
		return top
	}
	next := make([]*directory, max(len(top), i+1))
	copy(next, top)
	next[i] = new(directory)
	l.top.Store(&next)
	return next
}

// MarkRange is Mark for the frames [r.Start, r.End). Chunks of which r has all
// frames cost nothing each; for those together a mutex is taken, for a moment.
func (l *Log) MarkRange(r addr.GFNRange) {
	if r.Empty() {
		return
	}
	if r.End > Limit {
		panic(notBelowLimit("MarkRange", r))
	}
	head, first, end, tail := split(r)
	l.markPiece(head)
	if first < end {
		l.mu.Lock()
		l.others.replace(first, end, whole)
		l.mu.Unlock()
	}
	l.markPiece(tail)
}

func (l *Log) markPiece(p piece) {
	if p.empty() {
		return
	}
	b := l.find(uint64(p.chunk))
	if b == nil {
		b = l.touch(uint64(p.chunk))
	}
	first, last := p.words()
	for w := first; w <= last; w++ {
		if m := p.mask(w); atomic.LoadUint64(&b[w])&m != m {
			atomic.OrUint64(&b[w], m)
		}
	}
}

// Discard records that the content of the frames [r.Start, r.End) goes: from then
// on they read zero, or as their file. Dirty marks stay. The caller calls it before
// the content goes, and is from before the call until it has gone inside a read
// section of the log's domain, which [srcu.Domain.DownRead] can open and another
// goroutine close. The only alternative is that no Begin is called meanwhile.
//
// It takes what [Set.AddRange] takes.
func (l *Log) Discard(r addr.GFNRange) {
	if !r.Empty() && r.End > Limit {
		panic(notBelowLimit("Discard", r))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.discarded.AddRange(r)
	if l.phase == waiting && l.mutant != discardsLate {
		l.others.AddRange(r)
	}
	if l.mutant == discardUnmarks {
		l.unmark(r)
	}
}

// Merge records that the frames of set are dirty, as others have found out, such
// as KVM for what the guest wrote. The stores are done: a log of KVM's is got
// before it is merged. Merge needs no read section. It takes what [Set.Union] takes.
func (l *Log) Merge(set *Set) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.others.Union(set)
}

// Contains reports whether gfn is marked, and not taken by a harvest. Unless the
// writers are held up, that may be over when it returns.
func (l *Log) Contains(gfn addr.GFN) bool {
	if l.inTree(gfn) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.others.Contains(gfn)
}

// inTree reports whether the tree has a mark of gfn. Like a writer it is inside a
// section, because a bitmap that it has found may be taken by a harvest, which
// changes it without atomics when the sections have ended.
func (l *Log) inTree(gfn addr.GFN) bool {
	idx := l.domain.ReadLock()
	defer l.domain.ReadUnlock(idx)
	b := l.find(uint64(gfn) >> chunkShift)
	return b != nil && atomic.LoadUint64(&b[gfn/64%chunkWords])>>(gfn%64)&1 != 0
}

// Peek returns copies of the marks and discards that no harvest has taken, and
// leaves them where they are. They are not of one instant: it is for whoever wants
// to show them, not to copy pages by them. A Begin waits for it.
func (l *Log) Peek() (dirty, discarded *Set) {
	dirty = l.copyTree()
	l.mu.Lock()
	defer l.mu.Unlock()
	dirty.Union(&l.others)
	return dirty, l.discarded.Clone()
}

// copyTree returns the marks in the tree. It is inside a section for the reason
// that inTree is.
func (l *Log) copyTree() *Set {
	idx := l.domain.ReadLock()
	defer l.domain.ReadUnlock(idx)
	s := new(Set)
	l.eachBitmap(func(c uint32, _ *atomic.Pointer[bitmap], b *bitmap) {
		marks := b.load()
		s.spans = push(s.spans, span{c, c + 1, partOf(marks, marks.count())})
	})
	return s
}

// eachBitmap calls f with the place of each bitmap in the tree, in ascending order.
func (l *Log) eachBitmap(f func(c uint32, slot *atomic.Pointer[bitmap], b *bitmap)) {
	for i, dir := range *l.top.Load() {
		if dir == nil {
			continue
		}
		for j := range dir {
			if b := dir[j].Load(); b != nil {
				f(uint32(i*dirChunks+j), &dir[j], b)
			}
		}
	}
}

// Stats is what a log consists of.
type Stats struct {
	Directories int    // allocated; they stay
	Chunks      int    // bitmaps in the tree, each of a chunk that was marked since the last Begin
	Bytes       uint64 // of memory, all counted but what belongs to a harvest
	Open        bool   // a harvest is: from the call of Begin to the return of Commit or Abort
}

// Stats returns the statistics of l, which are not taken at one instant.
func (l *Log) Stats() Stats {
	const pointerBytes = 8
	var s Stats
	top := *l.top.Load()
	for _, dir := range top {
		if dir != nil {
			s.Directories++
		}
	}
	l.eachBitmap(func(uint32, *atomic.Pointer[bitmap], *bitmap) { s.Chunks++ })
	l.mu.Lock()
	defer l.mu.Unlock()
	s.Open = l.phase != idle
	s.Bytes = uint64(len(top)*pointerBytes+s.Directories*dirChunks*pointerBytes+s.Chunks*bitmapBytes) + l.others.Bytes() + l.discarded.Bytes()
	return s
}
