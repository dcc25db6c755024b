package srcu

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ShardSize is the size in bytes of a shard of a domain: two cache lines,
// because processors fetch them in pairs.
const ShardSize = 128

// cell is a set of counters with one writer at a time.
type cell struct {
	locks, unlocks [2]uint64 // by rank; written by inc, read by atomic loads
}

type shard struct {
	cell
	_ [ShardSize - 32]byte
}

// Domain is one set of readers and the updaters that wait for them. The zero
// Domain is ready for use; one made by New has faster readers. A Domain must not
// be copied after first use.
type Domain struct {
	idx    atomic.Uint64 // its low bit is the rank that new sections enter
	plain  []shard       // shards, if they are incremented by plain stores; otherwise empty
	shards []shard       // by P; empty in the zero Domain and after Cleanup
	_      [ShardSize - 56]byte

	// rest is for readers that have no shard: those of a zero Domain, and those
	// on a P that came later than the domain. Its counters are added to
	// atomically, which is a fence of its own.
	rest cell

	handles   atomic.Pointer[[]*Reader] // replaced as a whole, with handlesMu held
	handlesMu sync.Mutex

	gp   sync.Mutex    // held during a grace period: idx must stand still in a scan
	seq  atomic.Uint64 // grace periods ended, and the state of the one under way; written with gp held
	rush atomic.Int64  // callers in SynchronizeExpedited: a grace period does not sleep

	requests atomic.Uint64 // demands for a grace period
	gpStart  atomic.Int64  // when the one under way began, in nanoseconds since epoch; 0: none is
	longest  atomic.Int64  // the longest so far, in nanoseconds

	stall     atomic.Pointer[stallRule] // nil: defaultStallRule
	callbacks callbacks
	dead      atomic.Bool // cleaned up

	mutant mutant // a defect, in tests of the tests; none otherwise
}

// epoch is what monotonic times are counted from.
var epoch = time.Now()

// New returns a domain with a shard for each CPU that the process may use.
func New() *Domain {
	d := &Domain{shards: make([]shard, max(runtime.NumCPU(), runtime.GOMAXPROCS(0)))}
	if asymmetric {
		d.plain = d.shards
	}
	return d
}

var defaultDomain = New()

// Default returns the domain of the process, for everything that has no reason
// to have its own. It takes ShardSize bytes for each CPU.
func Default() *Domain { return defaultDomain }

// ReadLock opens a read section and returns its token, which goes to ReadUnlock
// once. It never fails, blocks, loops or allocates.
//
// Inside, the goroutine may block, and may open more sections; tokens are given
// back in any order. It must not call Synchronize, SynchronizeExpedited, Barrier
// or Cleanup of the same domain, nor wait for whoever does or for a lock that
// they hold. ReadUnlock is called by the same goroutine; a section that ends in
// another one is opened by DownRead.
func (d *Domain) ReadLock() (idx int) {
	idx = d.lock()
	if debug {
		return d.opened(idx, true)
	}
	return idx
}

// ReadUnlock closes the section that ReadLock opened with the token idx.
func (d *Domain) ReadUnlock(idx int) {
	if debug {
		idx = d.closed(idx)
	}
	d.unlock(idx)
}

// DownRead is ReadLock for a section that is closed by UpRead, on any goroutine.
// Handing it over has to synchronize, as a channel does.
func (d *Domain) DownRead() (idx int) {
	idx = d.lock()
	if debug {
		return d.opened(idx, false)
	}
	return idx
}

// UpRead closes the section that DownRead opened with the token idx.
func (d *Domain) UpRead(idx int) {
	if debug {
		idx = d.closed(idx)
	}
	d.unlock(idx)
}

// lock counts the begin of a section. The plain increment has no rival: until
// procUnpin the goroutine has its P, and so the shard, to itself. It is in memory
// order before the loads of the section for the compiler, because of the call
// that follows it, and for the processor as the package comment argues.
func (d *Domain) lock() (idx int) {
	pid := procPin()
	i := d.idx.Load() & 1
	if pid >= len(d.plain) { // compared as int, for which the compiler moves the branch out of the way
		return d.lockSlow(pid, i)
	}
	d.plain[pid].locks[i]++
	procUnpin()
	return int(i)
}

// unlock counts the end of a section.
func (d *Domain) unlock(idx int) {
	i := uint(idx)
	if i > 1 {
		panic(badToken(idx))
	}
	pid := procPin()
	if pid >= len(d.plain) {
		d.unlockSlow(pid, idx)
		return
	}
	d.plain[pid].unlocks[i]++
	procUnpin()
}

// lockSlow is lock by an atomic addition, which is a fence: where the increments
// are not plain, and for a P that has no shard.
//
//go:noinline
func (d *Domain) lockSlow(pid int, i uint64) (idx int) {
	procUnpin()
	d.alive("ReadLock")
	atomic.AddUint64(&d.cell(pid).locks[i], 1)
	return int(i)
}

//go:noinline
func (d *Domain) unlockSlow(pid, idx int) {
	procUnpin()
	d.alive("ReadUnlock")
	atomic.AddUint64(&d.cell(pid).unlocks[idx&1], 1)
}

func (d *Domain) cell(pid int) *cell {
	if pid < len(d.shards) {
		return &d.shards[pid].cell
	}
	return &d.rest
}

//go:noinline
func badToken(idx int) string {
	return fmt.Sprintf("srcu: ReadUnlock with the token %d, which ReadLock does not give", idx)
}

func (d *Domain) alive(what string) {
	if d.dead.Load() {
		panic("srcu: " + what + " of a domain after its Cleanup")
	}
}

// Reader is a reader of a domain with counters of its own: for a loop that opens
// sections all its life, such as that of a vCPU or of a device. Its sections cost
// less than the domain's and guarantee the same. It belongs to one goroutine at
// a time.
type Reader struct {
	_ [ShardSize]byte // whatever lies before it, of other goroutines
	cell
	d *Domain
	_ [ShardSize]byte
}

// NewReader registers a reader. The caller closes it.
func (d *Domain) NewReader() *Reader {
	d.handlesMu.Lock()
	defer d.handlesMu.Unlock()
	d.alive("NewReader")
	r := &Reader{d: d}
	next := append([]*Reader{r}, d.readers()...)
	d.handles.Store(&next)
	return r
}

// ReadLock opens a read section and returns its token; see [Domain.ReadLock].
func (r *Reader) ReadLock() (idx int) {
	i := r.d.idx.Load() & 1
	inc(&r.locks[i])
	if debug {
		return r.d.opened(int(i), true)
	}
	return int(i)
}

// ReadUnlock closes the section that ReadLock of the same reader opened with the
// token idx.
func (r *Reader) ReadUnlock(idx int) {
	if debug {
		idx = r.d.closed(idx)
	}
	if uint(idx) < 2 && asymmetric {
		r.unlocks[idx]++ // as inc does
		return
	}
	r.unlockSlow(idx)
}

// unlockSlow keeps what is rare out of ReadUnlock, which is compiled into its
// callers only as long as it is this small.
//
//go:noinline
func (r *Reader) unlockSlow(idx int) {
	if idx < 0 || idx > 1 {
		panic(badToken(idx))
	}
	inc(&r.unlocks[idx])
}

// Close takes the reader off its domain. Its sections are closed: otherwise
// Close panics. After it the reader is not used.
func (r *Reader) Close() {
	if r.locks != r.unlocks {
		panic("srcu: Close of a Reader inside a section")
	}
	d := r.d
	d.handlesMu.Lock()
	defer d.handlesMu.Unlock()
	next := slices.DeleteFunc(slices.Clone(d.readers()), func(o *Reader) bool { return o == r })
	d.handles.Store(&next)
	r.d = nil
}

// BusyError is why a domain was not cleaned up.
type BusyError struct {
	Readers     uint64 // sections that are open
	Handles     int    // readers that are registered
	Callbacks   int    // callbacks that are queued or running
	GracePeriod bool   // one is under way, or was asked for and has not begun
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("srcu: the domain is in use: %d sections are open, %d readers are registered, %d callbacks are waiting, grace period pending: %v",
		e.Readers, e.Handles, e.Callbacks, e.GracePeriod)
}

// Cleanup ends the use of a domain. It returns a *BusyError, and changes
// nothing, if the domain is in use: new readers and callbacks have been stopped
// before, and Barrier called. Whatever is called afterwards panics, but for a
// second Cleanup, which returns os.ErrClosed. The default domain is always in
// use.
func (d *Domain) Cleanup() error {
	if d == defaultDomain {
		panic("srcu: Cleanup of the default domain")
	}
	if d.dead.Load() {
		return fmt.Errorf("srcu: clean up a domain: %w", os.ErrClosed)
	}
	queued, ran, done := d.callbacks.state(d)
	busy := BusyError{Callbacks: int(queued - ran), Readers: d.inside(), Handles: len(d.readers()), GracePeriod: !done || d.seq.Load()&seqState != idle}
	if d.mutant == cleanupIgnoresReaders {
		busy.Readers = 0
	}
	if busy != (BusyError{}) {
		return &busy
	}
	d.gp.Lock() // whoever ran the last grace period may be about to let go of it
	defer d.gp.Unlock()
	d.dead.Store(true)
	d.plain, d.shards = nil, nil
	return nil
}

// inside returns the number of sections that are open. It is exact if none is
// opened or closed meanwhile.
func (d *Domain) inside() uint64 {
	readers := d.readers()
	return d.insideRank(readers, 0) + d.insideRank(readers, 1)
}

// insideRank is inside for one rank. One in which more sections were closed than
// opened counts as empty.
func (d *Domain) insideRank(readers []*Reader, i uint64) uint64 {
	unlocks := d.sum(readers, i, (*cell).closedIn)
	locks := d.sum(readers, i, (*cell).openedIn)
	return uint64(max(int64(locks-unlocks), 0))
}

// Stats is what a domain has done and is doing.
type Stats struct {
	GracePeriods uint64        // ended
	Requests     uint64        // by Synchronize, SynchronizeExpedited, StartPoll, GetState, and batches of callbacks
	Queued, Run  uint64        // callbacks; run are counted by the batch
	Longest      time.Duration // the longest grace period that has ended
	Waiting      time.Duration // for how long the grace period under way has been; 0: none is
	WaitingRank  int           // the rank that it waits for; -1: none
	Readers      uint64        // sections that are open
}

// Stats returns the domain's statistics, which are not taken at one instant.
func (d *Domain) Stats() Stats {
	seq := d.seq.Load()
	s := Stats{
		GracePeriods: seq >> seqShift, Requests: d.requests.Load(), Longest: time.Duration(d.longest.Load()),
		WaitingRank: -1, Readers: d.inside(),
	}
	s.Queued, s.Run, _ = d.callbacks.state(d)
	if start := d.gpStart.Load(); start != 0 {
		s.Waiting = time.Since(epoch) - time.Duration(start)
		s.WaitingRank = int(1 - d.idx.Load()&1) // before and after the flip it is the rank not in use
	}
	return s
}
