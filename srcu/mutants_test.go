package srcu

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// budget is what a check that has to be lucky may take for one mutant.
const budget = 500 * time.Millisecond

// need is what a check cannot do without. Where it is missing, the defect may go
// unseen.
type need uint8

const (
	nothing    need = iota
	processors      // two of them
	// luck, and two processors: on two that are otherwise idle SM6 was seen in 15 of
	// 20 runs and SM21 in 18, beside three busy processes in 14 and in 7.
	luck
)

// A domainMutant is a gvmtest.Mutant before its check has a bed. The defect of an
// updater is switched on in the domain; that of a reader is a reader of this file,
// which counts as it should not.
type domainMutant struct {
	id, defect string
	mutant     mutant
	domain     func() *Domain         // nil: New
	reader     func(d *Domain) reader // nil: the domain itself
	check      check                  // nil: see why
	by         string                 // the invariant that the check is of
	long       bool                   // a domain without the defect is looked at by a test of its own
	need       need                   // of the check; package model needs nothing
	why        string                 // there is no check
}

// mutants are the defects that the checks of this package are known to see.
var mutants = []domainMutant{
	{id: "SM1", defect: "no first wait", mutant: noScan1, check: checkStalledReader, by: "S7 stalled reader"},
	{id: "SM2", defect: "no flip", mutant: noFlip, check: checkOpenSections, by: "S3 open sections"},
	{id: "SM3", defect: "opened summed first", mutant: locksFirst, check: checkSums(openOn, closeOn), by: "S6 sections between the sums", long: true, need: processors},
	{id: "SM4", defect: "one counter, up and down", check: checkSums(openOn, countDown), by: "S6 sections between the sums", long: true, need: processors},
	{id: "SM5", defect: "closed in the current rank", reader: func(d *Domain) reader { return currentRank{d} }, check: checkTokenRank, by: "S8 rank of the token"},
	{id: "SM6", defect: "no fence after counting", mutant: noMembarrier, reader: func(d *Domain) reader { return plainReader{d} }, check: checkStoreBuffers(budget), by: "S2 store buffers", long: true, need: luck},
	{id: "SM7", defect: "no fence before counting", why: "stores are not reordered with earlier accesses on amd64, others add atomically: package model"},
	{id: "SM8", defect: "no fence after the flip", why: "every atomic operation of an updater is one: package model"},
	{id: "SM9", defect: "joins a grace period", mutant: joinRunning, check: checkCookieUnderWay, by: "S13 cookie under way"},
	{id: "SM10", defect: "flip before the first wait", mutant: flipFirst, check: checkIdxStandsStill, by: "S4 idx stands still"},
	{id: "SM11", defect: "grace periods overlap", mutant: noMutex, check: checkOneAtATime, by: "S3 one at a time"},
	{id: "SM12", defect: "Barrier is Synchronize", mutant: barrierSynchronizes, check: checkBarrierWaits, by: "S11 Barrier waits"},
	{id: "SM13", defect: "Barrier counts from 0", why: "Barrier counts nothing down: there is one queue, in order"},
	{id: "SM14", defect: "Barrier skips a running one", mutant: barrierSkipsRunning, check: checkBarrierWaits, by: "S11 Barrier waits"},
	{id: "SM15", defect: "callbacks early", mutant: callbacksEarly, check: checkCallbackAfterItsGracePeriod, by: "S10 its grace period"},
	{id: "SM16", defect: "a Head queued twice", mutant: requeue, check: checkHeadTwice, by: "S21 a Head twice"},
	{id: "SM17", defect: "Poll compares exactly", mutant: pollExactly, check: checkPollStays, by: "S14 Poll stays true"},
	{id: "SM18", defect: "counters overlooked", mutant: missRest, domain: func() *Domain { return new(Domain) }, check: checkOpenSections, by: "S3 open sections"},
	{id: "SM18'", defect: "a list for each sum", mutant: listPerSum, check: func(b bed) error { return checkClosedBetweenSums(b.d, budget) }, by: "S6 reader closed in between", long: true, need: processors},
	{id: "SM19", defect: "counters taken away", reader: func(d *Domain) reader { return &vanishing{Reader: d.NewReader()} }, check: checkOpenSections, by: "S3 open sections"},
	{id: "SM20", defect: "Cleanup ignores readers", mutant: cleanupIgnoresReaders, check: checkCleanupSeesReaders, by: "S18 Cleanup sees readers"},
	{id: "SM21", defect: "neither fence nor membarrier", mutant: noMembarrier, check: checkStoreBuffers(budget), by: "S2 store buffers", long: true, need: luck},
	{id: "SM22", defect: "wake-up before counting", why: "readers wake nobody"},
	{id: "SM23", defect: "closed >= opened", mutant: unlocksAtLeast, check: checkWrappedSum, by: "S19 wrapped sum"},
	{id: "SM24", defect: "idx kept across sections", reader: func(d *Domain) reader { return &keepsIdx{d: d} }, check: checkLaterSections, by: "S4 later sections"},
}

// TestMutants has each check find the defect that it is there for, and find
// nothing in a domain without it.
func TestMutants(t *testing.T) {
	list := make([]gvmtest.Mutant[bool], len(mutants))
	for i, m := range mutants {
		list[i] = m.row()
	}
	gvmtest.RunMutants(t, list)
}

// row is the mutant in the table: there it has its defect if that is true.
func (m domainMutant) row() gvmtest.Mutant[bool] {
	row := gvmtest.Mutant[bool]{ID: m.id, Defect: true, What: m.defect, By: m.by, NA: m.why}
	if m.mutant == noMembarrier && m.reader == nil && (debug || !asymmetric) {
		row.By, row.NA = "", "in this build a fence comes with every section"
	}
	if row.NA != "" {
		return row
	}
	if m.need == luck || m.need == processors && !twoProcessors() {
		row.Chance = "package model; not seen here"
	}
	row.Check = func(defective bool) error {
		if m.long && !defective {
			return nil
		}
		d := New()
		if m.domain != nil {
			d = m.domain()
		}
		b := newBed(d, false, (*Domain).Synchronize)
		if defective {
			d.mutant = m.mutant
			b.patience = gvmtest.Limit // a check that sees the defect does not wait for so long
		}
		if defective && m.reader != nil {
			b.newReader = func() (reader, func()) { return m.reader(d), func() {} }
		}
		return m.check(b)
	}
	return row
}

func twoProcessors() bool { return runtime.GOMAXPROCS(0) >= 2 && runtime.NumCPU() >= 2 }

// currentRank closes a section in the rank that is in use, not in its own.
type currentRank struct{ d *Domain }

func (r currentRank) ReadLock() int  { return r.d.lock() }
func (r currentRank) ReadUnlock(int) { r.d.unlock(int(r.d.idx.Load() & 1)) }

// keepsIdx looks at idx once, and never again.
type keepsIdx struct {
	d       *Domain
	fetched bool
	i       uint64
}

func (r *keepsIdx) ReadLock() int {
	if !r.fetched {
		r.i, r.fetched = r.d.idx.Load()&1, true
	}
	atomic.AddUint64(&r.d.rest.locks[r.i], 1)
	return int(r.i)
}

func (r *keepsIdx) ReadUnlock(idx int) { atomic.AddUint64(&r.d.rest.unlocks[idx], 1) }

// plainReader counts on the first shard with plain stores in every build, also
// in one whose updaters take every increment for a fence.
type plainReader struct{ d *Domain }

//go:norace
func (r plainReader) ReadLock() int {
	i := r.d.idx.Load() & 1
	r.d.shards[0].locks[i]++
	return int(i)
}

//go:norace
func (r plainReader) ReadUnlock(idx int) { r.d.shards[0].unlocks[idx]++ }

// vanishing is off its domain's list before its sections are closed: what Close
// panics about.
type vanishing struct{ *Reader }

func (r *vanishing) ReadLock() int {
	defer r.d.handles.Store(new([]*Reader))
	i := r.d.idx.Load() & 1
	inc(&r.locks[i])
	return int(i)
}

func (r *vanishing) ReadUnlock(idx int) { inc(&r.unlocks[idx]) }

// countDown closes a section by taking 1 off what opening it has added.
func countDown(d *Domain, shard int, i uint64) {
	atomic.AddUint64(&d.shards[shard].locks[i], ^uint64(0))
}

// checkSums is checkBetweenSums as a check.
func checkSums(open, close func(d *Domain, shard int, i uint64)) check {
	return func(b bed) error { return checkBetweenSums(b.d, budget, open, close) }
}

// checkOneAtATime has somebody ask for a grace period while one is under way: until
// that one has ended, idx and seq are its own.
func checkOneAtATime(b bed) error {
	r, closeReader := b.newReader()
	defer closeReader()
	token := r.ReadLock()
	first := gvmtest.Background(func() { b.wait(b.d) })
	awaitFlip(b.d, token)
	idx, seq := b.d.idx.Load(), b.d.seq.Load()
	second := gvmtest.Background(func() { b.wait(b.d) })
	var err error
	if !b.never(func() bool { return b.d.idx.Load() != idx || b.d.seq.Load() != seq }) {
		err = fmt.Errorf("during a grace period idx went from %d to %d and seq from %#x to %#x", idx, b.d.idx.Load(), seq, b.d.seq.Load())
	}
	r.ReadUnlock(token)
	<-first
	<-second
	return err
}

// checkHeadTwice queues a Head that is queued. Nobody is there to run callbacks.
func checkHeadTwice(b bed) error {
	d := Domain{mutant: b.d.mutant}
	d.callbacks.working = true
	var h Head
	d.Call(&h, func(*Head) {})
	if gvmtest.Panics(func() { d.Call(&h, func(*Head) {}) }) == "" {
		return errors.New("a Head that is queued already is queued again")
	}
	return nil
}

// checkCleanupSeesReaders cleans up a domain with a section open.
func checkCleanupSeesReaders(b bed) error {
	r, closeReader := b.newReader()
	defer closeReader()
	idx := r.ReadLock()
	err := b.d.Cleanup()
	if err == nil {
		return errors.New("a domain with an open section is cleaned up") // and the section cannot be closed
	}
	r.ReadUnlock(idx)
	return nil
}

// checkStoreBuffers looks for a section that a grace period misses although it
// did not see what was written before: its increment was in the reader's store
// buffer. The buffer empties in order, and slowly after stores to cold lines. The
// updater aims at the instant at which the reader loads.
func checkStoreBuffers(budget time.Duration) check {
	return func(b bed) error { return storeBuffers(b, budget) }
}

func storeBuffers(b bed, budget time.Duration) error {
	if !twoProcessors() {
		return nil // both would have one store buffer
	}
	var (
		v     vars // y is the last run whose grace period has ended
		meet  = newMeeting()
		last  atomic.Uint64 // the run to stop at
		err   error         // set by the reader before that
		tally [2]struct {   // of the last run and of the one before
			early bool // the reader did not see x
			_     [ShardSize]byte
		}
	)
	done := gvmtest.Background(func() {
		r, closeReader := b.newReader()
		defer closeReader()
		rng := rand.New(rand.NewPCG(0, 0))
		cold := make([]uint64, 1<<20)
		for i := range cold {
			cold[i] = 1 // have them there: a page fault is a fence
		}
		var lines [40]int
		for run := uint64(1); ; run++ {
			for i := range lines {
				lines[i] = rng.IntN(len(cold))
			}
			meet.wait(run)
			if run == last.Load() {
				return
			}
			for _, i := range lines {
				cold[i] = run
			}
			idx := r.ReadLock()
			early := v.x.Load() != run
			for n := 0; early && n < 400; n++ { // the grace period has to wait
				if v.y.Load() == run {
					err = fmt.Errorf("run %d: a grace period ended with a section open that had not seen what was written before", run)
					last.Store(run + 1)
					break
				}
			}
			r.ReadUnlock(idx)
			tally[run&1].early = early
		}
	})
	deadline := time.Now().Add(budget)
	pause := 0
	for run := uint64(1); ; run++ {
		if time.Now().After(deadline) {
			last.CompareAndSwap(0, run)
		}
		meet.wait(run)
		if run == last.Load() {
			break
		}
		if tally[1-run&1].early {
			pause = max(pause-1, 0)
		} else {
			pause++
		}
		for range pause {
			meet.arrived.Load()
		}
		v.x.Store(run)
		b.wait(b.d)
		v.y.Store(run)
	}
	<-done
	return err
}

// TestS2StoreBuffers has the check that finds the mutants without fences look at
// the real thing.
func TestS2StoreBuffers(t *testing.T) {
	length := 40 * time.Millisecond
	if *torture > 0 {
		length = *torture / time.Duration(len(flavours))
	}
	for _, fl := range flavours {
		t.Run("readers="+fl.name, func(t *testing.T) {
			if err := storeBuffers(newBed(fl.domain(), fl.handle, (*Domain).Synchronize), length); err != nil {
				t.Error(err)
			}
		})
	}
}
