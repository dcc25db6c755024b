package srcu

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// The invariants S1 to S23 that the package promises have a test each, named for
// them. Where an invariant is about what one schedule does, it is a check: a
// function that makes the schedule, step by step, and returns an error if the
// domain breaks the invariant. The checks run here on every flavour of reader
// and of waiting, and in TestMutants on domains with a defect.

func TestMain(m *testing.M) { gvmtest.Main(m) }

var torture = flag.Duration("torture", 0, "torture for this long, have readers leave sleeping updaters for as long or a million times, and make ten million runs of each litmus test, which takes minutes")

// A reader is a *Domain or a *Reader.
type reader interface {
	ReadLock() int
	ReadUnlock(int)
}

// A bed is what a check lies in: a new domain, a way to read in it, and a way to
// wait for its readers.
type bed struct {
	d         *Domain
	newReader func() (r reader, done func())
	wait      func(*Domain)
	patience  time.Duration // how long what must not happen is given to happen all the same
}

// A check returns an error if the domain breaks an invariant. It leaves nobody
// inside and no goroutine behind, whether it does or not.
type check func(bed) error

// flavours are the ways in which sections are counted.
var flavours = []struct {
	name   string
	domain func() *Domain
	handle bool
}{
	{name: "domain", domain: New},
	{name: "zero", domain: func() *Domain { return new(Domain) }},
	{name: "Ps to come", domain: fewShards},
	{name: "reader", domain: New, handle: true},
	{name: "near wrap", domain: nearWrap},
}

var waits = []struct {
	name string
	wait func(*Domain)
}{
	{"normal", (*Domain).Synchronize},
	{"expedited", (*Domain).SynchronizeExpedited},
}

// fewShards returns a domain with a shard for the first P only, as if the others
// had come after it was made.
func fewShards() *Domain {
	d := New()
	d.shards = d.shards[:1]
	if asymmetric {
		d.plain = d.shards
	}
	return d
}

// nearWrap returns a domain that has been used so much that everything it counts
// is about to wrap.
func nearWrap() *Domain {
	const last = ^uint64(0)
	d := New()
	full := cell{locks: [2]uint64{last, last - 1}, unlocks: [2]uint64{last, last - 1}}
	for i := range d.shards {
		d.shards[i].cell = full
	}
	d.rest = full
	d.idx.Store(last - 1)
	d.seq.Store((last>>seqShift - 1) << seqShift)
	d.requests.Store(last)
	d.callbacks.needed = last>>seqShift - 1
	d.callbacks.queued, d.callbacks.ran = last, last
	return d
}

// each runs a test for every way to read and every way to wait.
func each(t *testing.T, f func(t *testing.T, b bed)) {
	for _, fl := range flavours {
		for _, w := range waits {
			t.Run(fmt.Sprintf("readers=%s/wait=%s", fl.name, w.name), func(t *testing.T) {
				f(t, newBed(fl.domain(), fl.handle, w.wait))
			})
		}
	}
}

// eachReader runs a test that waits in a way of its own for every way to read.
func eachReader(t *testing.T, f func(t *testing.T, b bed)) {
	for _, fl := range flavours {
		t.Run("readers="+fl.name, func(t *testing.T) {
			f(t, newBed(fl.domain(), fl.handle, (*Domain).Synchronize))
		})
	}
}

func newBed(d *Domain, handle bool, wait func(*Domain)) bed {
	b := bed{d: d, newReader: func() (reader, func()) { return d, func() {} }, wait: wait, patience: gvmtest.Grace}
	if handle {
		b.newReader = func() (reader, func()) {
			r := d.NewReader()
			return r, r.Close
		}
	}
	return b
}

// eachCheck runs checks for every way to read and every way to wait.
func eachCheck(t *testing.T, checks ...check) {
	for _, c := range checks {
		each(t, func(t *testing.T, b bed) {
			if err := c(b); err != nil {
				t.Error(err)
			}
		})
	}
}

// await is gvmtest.Eventually for what the rest of a test or check stands on. There
// is no way back from it: somebody would be left inside, and somebody waiting.
func await(what string, cond func() bool) {
	if !gvmtest.Eventually(cond) {
		panic(fmt.Sprintf("the test waited %v in vain for %s", gvmtest.Limit, what))
	}
}

// rank returns the rank in which a section is counted, of which its token tells.
func rank(token int) uint64 { return uint64(token & 1) }

// never waits for a condition that is not to come true, and reports whether it
// did not.
func (b bed) never(cond func() bool) bool {
	for deadline := time.Now().Add(b.patience); time.Now().Before(deadline); runtime.Gosched() {
		if cond() {
			return false
		}
	}
	return true
}

// early reports whether what must not end yet does so all the same. It does not
// sleep: that takes longer than patience asks for.
func (b bed) early(done <-chan struct{}) bool {
	return !b.never(func() bool { return gvmtest.Closed(done) })
}

// lockInRank opens a section as a reader does that fetched idx when i was the
// rank in use. Nobody else may look at the domain at the same time.
func lockInRank(d *Domain, r reader, i uint64) (token int) {
	now := d.idx.Load()
	d.idx.Store(i)
	defer d.idx.Store(now)
	return r.ReadLock()
}

// awaitScan waits for a grace period to reach a state, in which somebody keeps it.
func awaitScan(d *Domain, state uint64) {
	await("a grace period to wait for an open section", func() bool { return d.seq.Load()&seqState == state })
}

// awaitFlip waits for a grace period to have flipped, and so to wait for the
// section of a token that was open before.
func awaitFlip(d *Domain, token int) {
	await("a grace period to flip", func() bool {
		return d.seq.Load()&seqState == scan2 && d.idx.Load()&1 != rank(token)
	})
}

// A book says who is in a section: a word for each reader, odd while it is inside.
type book []struct {
	word atomic.Uint64
	_    [ShardSize - 8]byte
}

func (b book) turn(i int) { b[i].word.Add(1) }

func (b book) now() []uint64 {
	words := make([]uint64, len(b))
	for i := range b {
		words[i] = b[i].word.Load()
	}
	return words
}

// open returns how many readers are still in the section in which they were then.
func (b book) open(then []uint64) (n int) {
	for i, word := range then {
		if word&1 == 1 && b[i].word.Load() == word {
			n++
		}
	}
	return n
}

// crowd has n readers open short sections, nested and not, and enter them in a
// book, and somebody wait for them again and again, until stop is called.
func crowd(b bed, n int) (bk book, stop func()) {
	bk = make(book, n)
	var done atomic.Bool
	var readers sync.WaitGroup
	updater := gvmtest.Background(func() {
		for !done.Load() {
			b.wait(b.d)
			runtime.Gosched()
		}
	})
	for i := range n {
		readers.Go(func() {
			r, closeReader := b.newReader()
			defer closeReader()
			for round := 0; !done.Load(); round++ {
				outer := r.ReadLock()
				bk.turn(i)
				if round%4 == i%4 {
					runtime.Gosched()
				}
				if round%3 == 0 {
					inner := r.ReadLock()
					runtime.Gosched()
					r.ReadUnlock(inner)
				}
				bk.turn(i)
				r.ReadUnlock(outer)
				if round%64 == 0 {
					runtime.Gosched()
				}
			}
		})
	}
	return bk, func() {
		done.Store(true)
		<-updater // while there are readers
		readers.Wait()
	}
}

// rounds scales the length of a test.
func rounds(n int) int {
	if testing.Short() || debug {
		return max(n/4, 1)
	}
	return n
}

func TestS1NoSectionSeesAFreedObject(t *testing.T) {
	each(t, func(t *testing.T, b bed) {
		p := newPool(4, 1)
		var done atomic.Bool
		var readers sync.WaitGroup
		for range 3 {
			readers.Go(func() {
				r, closeReader := b.newReader()
				defer closeReader()
				for !done.Load() {
					idx := r.ReadLock()
					o := p.reach(0)
					serial := o.serial
					for range 3 {
						runtime.Gosched() // a reader may lose its processor inside a section
						if age := o.age.Load(); age > 1 || o.serial != serial || o.check != ^serial {
							t.Errorf("a section holds an object of age %d, %x that was %x", age, o.serial, serial)
							done.Store(true)
						}
					}
					r.ReadUnlock(idx)
				}
			})
		}
		for n := rounds(400); n > 0 && !done.Load(); n-- {
			old := p.replace(0)
			b.wait(b.d)
			p.retire(old)
		}
		done.Store(true)
		readers.Wait()
		if err := p.account(); err != nil {
			t.Error(err)
		}
	})
}

func TestS3SynchronizeWaitsForEveryOpenSection(t *testing.T) {
	eachCheck(t, checkOpenSections, checkOneAtATime)
	each(t, func(t *testing.T, b bed) {
		bk, stop := crowd(b, 4)
		defer stop()
		var updaters sync.WaitGroup
		for range 2 {
			updaters.Go(func() {
				for range rounds(100) {
					then := bk.now()
					b.wait(b.d)
					if n := bk.open(then); n > 0 {
						t.Errorf("a grace period ended with %d sections open that were open when it was asked for", n)
						return
					}
				}
			})
		}
		updaters.Wait()
	})
}

// checkOpenSections opens sections, in one rank and in both, and has somebody wait.
func checkOpenSections(b bed) error {
	for _, order := range [][]uint64{{0}, {1}, {0, 1}, {1, 0}} {
		r, closeReader := b.newReader()
		var tokens [2]int
		for _, i := range order {
			tokens[i] = lockInRank(b.d, r, i)
		}
		done := gvmtest.Background(func() { b.wait(b.d) })
		var err error
		for _, i := range order {
			if err == nil && b.early(done) {
				err = fmt.Errorf("a grace period ended with a section of rank %d open", i)
			}
			r.ReadUnlock(tokens[i])
		}
		<-done
		closeReader()
		if err != nil {
			return err
		}
	}
	return nil
}

func TestS4SynchronizeIsBoundedUnderShortReaders(t *testing.T) {
	eachCheck(t, checkLaterSections, checkIdxStandsStill)
	each(t, func(t *testing.T, b bed) {
		var done atomic.Bool
		var readers sync.WaitGroup
		for range runtime.GOMAXPROCS(0) {
			readers.Go(func() {
				r, closeReader := b.newReader()
				defer closeReader()
				// Sections that overlap for ever: at no instant is it outside of all.
				idx := r.ReadLock()
				for !done.Load() {
					for range 16 {
						next := r.ReadLock()
						r.ReadUnlock(idx)
						idx = next
					}
					runtime.Gosched()
				}
				r.ReadUnlock(idx)
			})
		}
		for range rounds(20) {
			if !gvmtest.ClosedWithin(gvmtest.Background(func() { b.wait(b.d) }), gvmtest.Limit) {
				t.Error("a grace period does not end while there are short sections")
				break
			}
		}
		done.Store(true)
		readers.Wait()
	})
}

// checkLaterSections has a section opened while a grace period waits for another
// one, and kept open. The grace period does not wait for it.
func checkLaterSections(b bed) error {
	r1, close1 := b.newReader()
	defer close1()
	r2, close2 := b.newReader()
	defer close2()
	r2.ReadUnlock(r2.ReadLock())
	first := r1.ReadLock()
	done := gvmtest.Background(func() { b.wait(b.d) })
	awaitFlip(b.d, first)
	second := r2.ReadLock()
	late := rank(second) == rank(first)
	r1.ReadUnlock(first)
	if !late && !gvmtest.ClosedWithin(done, gvmtest.Limit) {
		late = true
	}
	r2.ReadUnlock(second)
	<-done
	if late {
		return fmt.Errorf("a section that was opened after the flip is waited for in rank %d", rank(first))
	}
	return nil
}

// checkIdxStandsStill has a section open in the rank that is not in use. Until it
// is closed, new sections do not enter that rank: idx stays.
func checkIdxStandsStill(b bed) error {
	r, closeReader := b.newReader()
	defer closeReader()
	before := b.d.idx.Load()
	token := lockInRank(b.d, r, 1-before&1)
	done := gvmtest.Background(func() { b.wait(b.d) })
	b.never(func() bool { return b.d.idx.Load() != before })
	after := b.d.idx.Load()
	r.ReadUnlock(token)
	<-done
	if after != before {
		return fmt.Errorf("idx went from %d to %d with a section open in rank %d", before, after, 1-before&1)
	}
	return nil
}

// TestS5ReadersNeverWait holds every lock of a domain, in each of the two waits of
// a grace period, and opens sections all the same.
func TestS5ReadersNeverWait(t *testing.T) {
	each(t, func(t *testing.T, b bed) {
		for _, state := range []uint64{scan1, scan2} {
			asleep, closeAsleep := b.newReader()
			r, closeReader := b.newReader()
			i := b.d.idx.Load() & 1
			if state == scan1 {
				i = 1 - i
			}
			token := lockInRank(b.d, asleep, i)
			done := gvmtest.Background(func() { b.wait(b.d) }) // it holds gp
			awaitScan(b.d, state)
			b.d.handlesMu.Lock()
			b.d.callbacks.mu.Lock()
			sections := gvmtest.Background(func() {
				for range 1000 {
					r.ReadUnlock(r.ReadLock())
				}
			})
			if !gvmtest.ClosedWithin(sections, gvmtest.Limit) {
				t.Errorf("a reader waits for a lock in wait %d of a grace period", state)
			}
			b.d.callbacks.mu.Unlock()
			b.d.handlesMu.Unlock()
			<-sections
			asleep.ReadUnlock(token)
			<-done
			closeAsleep()
			closeReader()
		}
	})
}

func TestS5ReadSectionDoesNotAllocate(t *testing.T) {
	if debug {
		gvmtest.OtherBuild(t, "a debug build records every section")
	}
	d := New()
	r := d.NewReader()
	defer r.Close()
	var zero Domain
	for name, section := range map[string]func(){
		"domain":      func() { d.ReadUnlock(d.ReadLock()) },
		"zero domain": func() { zero.ReadUnlock(zero.ReadLock()) },
		"handed over": func() { d.UpRead(d.DownRead()) },
		"reader":      func() { r.ReadUnlock(r.ReadLock()) },
		"domain, and a grace period": func() {
			d.ReadUnlock(d.ReadLock())
			d.Synchronize()
		},
	} {
		if n := testing.AllocsPerRun(1000, section); n != 0 {
			t.Errorf("a section (%s) allocates %v times, want 0", name, n)
		}
	}
}

// TestS6UnlockOnAnotherShard closes sections on another shard than they were opened
// on: on every other one, counted by hand, and by two goroutines that spin at the
// same time and so are on two Ps.
func TestS6UnlockOnAnotherShard(t *testing.T) {
	d := new(Domain)
	d.shards = make([]shard, 3)
	for i := range uint64(2) {
		for opened := range d.shards {
			for closed := range d.shards {
				openOn(d, opened, i)
				if d.drained(i) || !d.drained(1-i) {
					t.Errorf("with a section of rank %d open on shard %d: rank %d is drained: %v, rank %d: %v", i, opened, i, d.drained(i), 1-i, d.drained(1-i))
				}
				closeOn(d, closed, i)
				if !d.drained(i) {
					t.Errorf("rank %d is not drained after a section was opened on shard %d and closed on shard %d", i, opened, closed)
				}
			}
		}
	}
	if err := checkBetweenSums(new(Domain), 100*time.Millisecond, openOn, closeOn); err != nil {
		t.Error(err)
	}
	if runtime.GOMAXPROCS(0) < 2 {
		t.Log("one P: no section can end on another")
		return
	}
	const enough = 20
	crossed, sections := 0, 0
	for deadline := time.Now().Add(gvmtest.Limit); crossed < enough && time.Now().Before(deadline); sections++ {
		if crosses(t, New()) {
			crossed++
		}
	}
	t.Logf("%d of %d sections ended on another shard", crossed, sections)
	if crossed < enough {
		t.Errorf("in %v only %d sections ended on another shard: the test has seen nothing", gvmtest.Limit, crossed)
	}
}

// crosses has one goroutine open a section and, while it spins, another one close
// it, and reports whether that was on another shard.
func crosses(t *testing.T, d *Domain) bool {
	var token, turn atomic.Int32
	spin := func(until int32) {
		for n := 1; turn.Load() != until; n++ {
			if n%(1<<14) == 0 {
				runtime.Gosched() // or the other one has no P
			}
		}
	}
	opener := gvmtest.Background(func() {
		token.Store(int32(d.DownRead()))
		turn.Store(1)
		spin(2)
	})
	closer := gvmtest.Background(func() {
		spin(1)
		open := rank(int(token.Load()))
		for i := range uint64(2) {
			if drained := d.drained(i); drained != (i != open) {
				t.Errorf("rank %d is drained: %v, with a section open in rank %d", i, drained, open)
			}
		}
		d.UpRead(int(token.Load()))
		turn.Store(2)
	})
	<-opener
	<-closer
	d.Synchronize()
	for i := range d.shards {
		if d.shards[i].locks != d.shards[i].unlocks {
			return true
		}
	}
	return false
}

// Counting by hand, to choose the shard.
func openOn(d *Domain, shard int, i uint64)  { atomic.AddUint64(&d.shards[shard].locks[i], 1) }
func closeOn(d *Domain, shard int, i uint64) { atomic.AddUint64(&d.shards[shard].unlocks[i], 1) }

// checkBetweenSums has one section open for all of its time, and in each scan
// another one, which begins on the first shard and ends on the last: the rank is
// never empty.
func checkBetweenSums(d *Domain, budget time.Duration, open, close func(d *Domain, shard int, i uint64)) error {
	return duringScans(d, budget, func(last int) (before, during func()) {
		open(d, last, 0)
		return func() {}, func() {
			open(d, 0, 0)
			close(d, last, 0)
		}
	})
}

// checkClosedBetweenSums has one section open for all of its time, and in each
// scan a registered reader is closed whose section was closed before.
func checkClosedBetweenSums(d *Domain, budget time.Duration) error {
	return duringScans(d, budget, func(last int) (before, during func()) {
		openOn(d, last, 0)
		var r *Reader
		return func() {
			r = d.NewReader()
			r.ReadUnlock(r.ReadLock())
		}, func() { r.Close() }
	})
}

// duringScans scans rank 0, in which a section is open, and has something done in
// the middle of each scan. There are so many shards that a scan takes some time.
func duringScans(d *Domain, budget time.Duration, prepare func(last int) (before, during func())) error {
	const last = 1<<15 - 1
	d.shards = make([]shard, last+1)
	before, during := prepare(last)
	before()
	var (
		scan atomic.Int64 // that was begun; -1: no more
		done atomic.Int64 // the scan in which something was done last
		took atomic.Int64 // how long the last scan took
	)
	took.Store(1)
	helper := gvmtest.Background(func() {
		for seen := int64(0); seen >= 0; runtime.Gosched() {
			if now := scan.Load(); now > seen {
				// Anywhere in the scan, which began just now.
				for at := time.Now().Add(time.Duration(rand.Int64N(took.Load()))); time.Now().Before(at); {
				}
				during()
				done.Store(now)
				seen = now
			} else if now < 0 {
				seen = now
			}
		}
	})
	empty := func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("%v", p)
			}
		}()
		if d.drained(0) {
			return errors.New("a rank with an open section is empty")
		}
		return nil
	}
	var err error
	n := int64(0)
	for deadline := time.Now().Add(budget); err == nil && time.Now().Before(deadline); {
		if done.Load() == n {
			if n > 0 {
				before()
			}
			n++
			scan.Store(n)
		}
		start := time.Now()
		err = empty()
		took.Store(max(1, int64(min(time.Since(start), time.Millisecond))))
		if err != nil {
			err = fmt.Errorf("scan %d: %w", n, err)
		}
	}
	await("the helper to do its part", func() bool { return done.Load() == n })
	scan.Store(-1)
	<-helper
	return err
}

func TestS6ReaderClosedBetweenSums(t *testing.T) {
	if err := checkClosedBetweenSums(new(Domain), 100*time.Millisecond); err != nil {
		t.Error(err)
	}
}

func TestS7StalledReaderIsNotMissed(t *testing.T) { eachCheck(t, checkStalledReader) }

// checkStalledReader has a reader fetch idx, and count itself only after k grace
// periods.
func checkStalledReader(b bed) error {
	for k := 1; k <= 5; k++ {
		r, closeReader := b.newReader()
		fetched := b.d.idx.Load() & 1
		for range k {
			b.wait(b.d)
		}
		token := lockInRank(b.d, r, fetched)
		done := gvmtest.Background(func() { b.wait(b.d) })
		early := b.early(done)
		r.ReadUnlock(token)
		<-done
		closeReader()
		if early {
			return fmt.Errorf("a reader that stalled for %d grace periods before it counted itself was missed", k)
		}
	}
	return nil
}

func TestS8OutermostSectionIsWaitedFor(t *testing.T) {
	eachCheck(t, checkTokenRank)
	for _, outerFirst := range []bool{false, true} {
		each(t, func(t *testing.T, b bed) {
			r, closeReader := b.newReader()
			defer closeReader()
			outer := r.ReadLock()
			done := gvmtest.Background(func() { b.wait(b.d) })
			awaitFlip(b.d, outer)
			inner := r.ReadLock()
			if rank(inner) == rank(outer) {
				t.Error("both sections are in one rank after a flip: the test sees nothing")
			}
			if outerFirst {
				// The inner one is younger than the grace period.
				r.ReadUnlock(outer)
				if !gvmtest.ClosedWithin(done, gvmtest.Limit) {
					t.Error("a grace period waits for a section that was opened after its flip")
				}
				r.ReadUnlock(inner)
			} else {
				r.ReadUnlock(inner)
				if b.early(done) {
					t.Error("a grace period ended with the inner section, inside the outer one")
				}
				r.ReadUnlock(outer)
			}
			<-done
		})
	}
}

// checkTokenRank closes a section after the flip: it is counted in the rank of
// its token.
func checkTokenRank(b bed) error {
	r, closeReader := b.newReader()
	before := b.d.idx.Load()
	token := r.ReadLock()
	b.d.idx.Add(1)
	r.ReadUnlock(token)
	if !b.d.drained(rank(token)) {
		return fmt.Errorf("a section of rank %d is closed, idx went from %d to %d meanwhile, and it counts as open", rank(token), before, b.d.idx.Load())
	}
	closeReader()
	return nil
}

func TestS9SleepingReaderBlocksOnlyItsOwnDomain(t *testing.T) {
	each(t, func(t *testing.T, b bed) {
		r, closeReader := b.newReader()
		defer closeReader()
		idx := r.ReadLock()
		own := gvmtest.Background(func() { b.wait(b.d) })
		for _, fl := range flavours {
			other := fl.domain()
			other.Call(new(Head), func(*Head) {})
			if !gvmtest.ClosedWithin(gvmtest.Background(func() { b.wait(other); other.Barrier() }), gvmtest.Limit) {
				t.Errorf("a grace period of %q waits for the reader of another domain", fl.name)
			}
		}
		if b.early(own) {
			t.Error("the reader's own domain does not wait for it")
		}
		r.ReadUnlock(idx)
		<-own
	})
}

func TestS10EveryCallbackRunsOnceAfterItsGracePeriod(t *testing.T) {
	eachCheck(t, checkCallbackAfterItsGracePeriod)
	each(t, func(t *testing.T, b bed) {
		bk, stop := crowd(b, 3)
		defer stop()
		type object struct {
			Head
			runs atomic.Int32
		}
		objects := make([]object, rounds(400))
		var callers sync.WaitGroup
		const ncallers = 4
		for c := range ncallers {
			callers.Go(func() {
				for i := c; i < len(objects); i += ncallers {
					then := bk.now()
					b.d.Call(&objects[i].Head, func(h *Head) {
						if h != &objects[i].Head {
							t.Error("a callback is called with the head of another")
						}
						if n := bk.open(then); n > 0 {
							t.Errorf("a callback runs with %d sections open that were open when it was queued", n)
						}
						objects[i].runs.Add(1)
					})
					if i%8 == c {
						runtime.Gosched()
					}
				}
			})
		}
		callers.Wait()
		b.d.Barrier()
		for i := range objects {
			if n := objects[i].runs.Load(); n != 1 {
				t.Errorf("callback %d ran %d times, want once", i, n)
			}
		}
		if s := b.d.Stats(); s.Queued != s.Run {
			t.Errorf("%d callbacks were queued and %d run", s.Queued, s.Run)
		}
	})
}

// checkCallbackAfterItsGracePeriod queues a callback while a grace period is in
// its second wait, with a section open that this grace period does not wait for.
func checkCallbackAfterItsGracePeriod(b bed) error {
	r1, close1 := b.newReader()
	defer close1()
	r2, close2 := b.newReader()
	defer close2()
	first := r1.ReadLock()
	done := gvmtest.Background(func() { b.wait(b.d) })
	awaitFlip(b.d, first)
	second := r2.ReadLock()
	var h Head
	ran := make(chan struct{})
	demands := b.d.requests.Load()
	b.d.Call(&h, func(*Head) { close(ran) })
	await("a demand for a callback's grace period", func() bool { return b.d.requests.Load() != demands })
	r1.ReadUnlock(first)
	<-done
	early := b.early(ran)
	r2.ReadUnlock(second)
	<-ran
	b.d.Barrier()
	if early {
		return errors.New("a callback ran at the end of a grace period that was under way when it was queued")
	}
	return nil
}

func TestS11BarrierWaitsForEarlierCallbacks(t *testing.T) {
	eachCheck(t, checkBarrierWaits)
	each(t, func(t *testing.T, b bed) {
		_, stop := crowd(b, 2)
		defer stop()
		var called, returned atomic.Int64
		var callers sync.WaitGroup
		for range 3 {
			callers.Go(func() {
				for range rounds(20) {
					heads := make([]Head, 8)
					var own atomic.Int64
					for i := range heads {
						b.d.Call(&heads[i], func(*Head) {
							if i%4 == 0 {
								runtime.Gosched()
							}
							own.Add(1)
							returned.Add(1)
						})
						called.Add(1)
					}
					before := called.Load()
					b.d.Barrier()
					if n := own.Load(); n != int64(len(heads)) {
						t.Errorf("Barrier returned after %d callbacks of its caller's %d", n, len(heads))
					}
					if n := returned.Load(); n < before {
						t.Errorf("Barrier returned after %d callbacks, and %d were queued before it was called", n, before)
					}
				}
			})
		}
		callers.Wait()
	})
}

// checkBarrierWaits calls Barrier while a callback is running, the only one.
func checkBarrierWaits(b bed) error {
	var h Head
	running, leave := make(chan struct{}), make(chan struct{})
	b.d.Call(&h, func(*Head) {
		close(running)
		<-leave
	})
	<-running
	done := gvmtest.Background(b.d.Barrier)
	early := b.early(done)
	close(leave)
	<-done
	await("a callback that has returned to be counted", func() bool { s := b.d.Stats(); return s.Queued == s.Run })
	if early {
		return errors.New("Barrier returned while an earlier callback was running")
	}
	return nil
}

func TestS12BarrierTerminatesInAStormOfCalls(t *testing.T) {
	each(t, func(t *testing.T, b bed) {
		var stop atomic.Bool
		var storm sync.WaitGroup
		storm.Go(func() {
			for !stop.Load() {
				b.wait(b.d)
			}
		})
		for range 2 {
			// A callback that queues itself again, for ever.
			var again func(*Head)
			storm.Add(1)
			again = func(h *Head) {
				if stop.Load() {
					storm.Done()
					return
				}
				b.d.Call(h, again)
			}
			b.d.Call(new(Head), again)
			// And a caller that is faster than the grace periods.
			storm.Go(func() {
				for !stop.Load() {
					b.d.Call(new(Head), func(*Head) {})
					runtime.Gosched()
				}
			})
		}
		for range 2 {
			if !gvmtest.ClosedWithin(gvmtest.Background(b.d.Barrier), gvmtest.Limit) {
				t.Error("Barrier does not return while there are new callbacks")
				break
			}
		}
		stop.Store(true)
		storm.Wait()
		b.d.Barrier()
	})
}

func TestS13CookieOutlivesTheGracePeriodUnderWay(t *testing.T) { eachCheck(t, checkCookieUnderWay) }

// checkCookieUnderWay takes a cookie in each of the two waits of a grace period.
func checkCookieUnderWay(b bed) error {
	for _, state := range []uint64{scan1, scan2} {
		r, closeReader := b.newReader()
		i := b.d.idx.Load() & 1
		if state == scan1 {
			i = 1 - i
		}
		token := lockInRank(b.d, r, i)
		done := gvmtest.Background(func() { b.wait(b.d) })
		awaitScan(b.d, state)
		c := b.d.GetState()
		r.ReadUnlock(token)
		<-done
		closeReader()
		if b.d.Poll(c) {
			return fmt.Errorf("the end of a grace period satisfied a cookie that was taken in its wait %d", state)
		}
		b.wait(b.d)
		if !b.d.Poll(c) {
			return errors.New("a cookie is not satisfied by a whole grace period")
		}
	}
	return nil
}

func TestS14PollIsMonotonicAndGuarantees(t *testing.T) {
	eachCheck(t, checkPollStays)
	each(t, func(t *testing.T, b bed) {
		bk, stop := crowd(b, 3)
		defer stop()
		for range rounds(50) {
			then := bk.now()
			c := b.d.StartPoll()
			await("a cookie of StartPoll to come true", func() bool { return b.d.Poll(c) })
			if n := bk.open(then); n > 0 {
				t.Fatalf("Poll reports true with %d sections open that were open when the cookie was taken", n)
			}
		}
		b.d.Barrier()
	})
}

// checkPollStays polls cookies that came true some grace periods ago.
func checkPollStays(b bed) error {
	type aged struct {
		Cookie
		age int
	}
	cookies := []aged{{CompletedState, 0}}
	for range 8 {
		cookies = append(cookies, aged{b.d.GetState(), 0})
		b.wait(b.d)
		for i := range cookies {
			cookies[i].age++
			if !b.d.Poll(cookies[i].Cookie) {
				return fmt.Errorf("Poll reports false for a cookie, %d grace periods after it was taken", cookies[i].age)
			}
		}
	}
	return nil
}

func TestS15StartPollNeedsNobodyElse(t *testing.T) {
	eachReader(t, func(t *testing.T, b bed) {
		seq := b.d.seq.Load()
		state := b.d.GetState()
		if !b.never(func() bool { return b.d.Poll(state) || b.d.seq.Load() != seq }) {
			t.Error("GetState started a grace period")
		}
		c := b.d.StartPoll()
		await("a cookie of StartPoll to come true", func() bool { return b.d.Poll(c) })
		if !b.d.Poll(state) {
			t.Error("the grace period of StartPoll does not satisfy an older cookie")
		}
	})
}

// TestS16GracePeriodsAreShared has many wait at once. One that has asked, and not
// yet looked at seq when the grace period of the others begins, needs another one.
func TestS16GracePeriodsAreShared(t *testing.T) {
	const n = 50
	// cost returns the number of grace periods that end while n calls at once wait,
	// of a domain that is held up until everybody has asked.
	cost := func(b bed, goOn func()) uint64 {
		seq, demands := b.d.seq.Load()&^seqState, b.d.requests.Load()
		var all sync.WaitGroup
		for range n {
			all.Go(func() { b.wait(b.d) })
		}
		await("everybody to ask", func() bool { return b.d.requests.Load()-demands == n })
		goOn()
		all.Wait()
		return (b.d.seq.Load() - seq) >> seqShift
	}
	each(t, func(t *testing.T, b bed) {
		b.d.gp.Lock() // none can begin
		if got := cost(b, b.d.gp.Unlock); got < 1 || got > 2 {
			t.Errorf("%d calls at once cost %d grace periods, want 1 or 2", n, got)
		}
	})
	each(t, func(t *testing.T, b bed) {
		// One is under way, which does not count for them.
		r, closeReader := b.newReader()
		defer closeReader()
		idx := r.ReadLock()
		done := gvmtest.Background(func() { b.wait(b.d) })
		awaitFlip(b.d, idx)
		if got := cost(b, func() { r.ReadUnlock(idx) }); got < 2 || got > 3 {
			t.Errorf("%d calls during a grace period cost %d with it, want 2 or 3", n, got)
		}
		<-done
	})
}

// TestS17NormalAndExpeditedMix has both wait for the same sections. That they
// keep S1 to S16 alike is what the table of all other tests says.
func TestS17NormalAndExpeditedMix(t *testing.T) {
	eachReader(t, func(t *testing.T, b bed) {
		bk, stop := crowd(b, 3)
		defer stop()
		var updaters sync.WaitGroup
		for _, w := range slices.Concat(waits, waits) {
			updaters.Go(func() {
				for range rounds(50) {
					then := bk.now()
					w.wait(b.d)
					if n := bk.open(then); n > 0 {
						t.Errorf("%s: a grace period ended with %d sections open", w.name, n)
						return
					}
				}
			})
		}
		updaters.Wait()
		if n := b.d.rush.Load(); n != 0 {
			t.Errorf("%d callers are in a hurry when all have returned", n)
		}
	})
}

func TestS18CleanupOfAnIdleDomain(t *testing.T) {
	each(t, func(t *testing.T, b bed) {
		r, closeReader := b.newReader()
		r.ReadUnlock(r.ReadLock())
		b.wait(b.d)
		var h Head
		b.d.Call(&h, func(*Head) {})
		closeReader()
		b.d.Barrier()
		if err := b.d.Cleanup(); err != nil {
			t.Fatal(err)
		}
		if b.d.shards != nil || b.d.plain != nil {
			t.Error("Cleanup keeps the shards")
		}
		if err := b.d.Cleanup(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("a second Cleanup: %v, want %v", err, os.ErrClosed)
		}
	})
	// Nothing of what has been seen to be over may be in the way.
	for range rounds(2000) {
		d := New()
		c := d.StartPoll()
		var h Head
		d.Call(&h, func(*Head) {})
		await("a cookie of StartPoll to come true", func() bool { return d.Poll(c) })
		d.Barrier()
		if err := d.Cleanup(); err != nil {
			t.Fatalf("after Poll was true, and Barrier: %v", err)
		}
	}
}

// TestS19CountersWrap counts over the end of the range. The flavour "near wrap"
// of all other tests does so too.
func TestS19CountersWrap(t *testing.T) {
	eachCheck(t, checkWrappedSum)
	d := nearWrap()
	var cookies [2][]Cookie // of the same grace periods, taken during the one before, and after it
	for range 4 {
		idx := d.ReadLock()
		done := gvmtest.Background(d.Synchronize)
		awaitFlip(d, idx)
		cookies[0] = append(cookies[0], d.GetState())
		d.ReadUnlock(idx)
		<-done
		cookies[1] = append(cookies[1], d.GetState())
		for range 3 {
			d.ReadUnlock(d.ReadLock())
		}
	}
	for range 4 {
		var h Head
		d.Call(&h, func(*Head) {})
		d.Barrier()
	}
	for i := range cookies[0] {
		if a, b := cookies[0][i], cookies[1][i]; !SameState(a, b) {
			t.Errorf("cookies %#x and %#x of one grace period differ", a, b)
		}
		if !d.Poll(cookies[0][i]) || !d.Poll(cookies[1][i]) {
			t.Errorf("cookie %d is not satisfied", i)
		}
	}
	s := d.Stats()
	for name, n := range map[string]uint64{"idx": d.idx.Load(), "seq": d.seq.Load(), "queued": s.Queued, "run": s.Run, "requests": s.Requests} {
		if n > 1000 {
			t.Errorf("%s is %d and has not wrapped: the test has seen nothing", name, n)
		}
	}
}

// checkWrappedSum has one section open, and the sum of the opened ones at 0.
func checkWrappedSum(b bed) error {
	var d Domain
	d.mutant = b.d.mutant
	d.rest = cell{locks: [2]uint64{^uint64(0), ^uint64(0)}, unlocks: [2]uint64{^uint64(0), ^uint64(0)}}
	atomic.AddUint64(&d.rest.locks[0], 1)
	if d.drained(0) {
		return errors.New("a rank whose count of opened sections has wrapped, and that of closed ones has not, is empty")
	}
	atomic.AddUint64(&d.rest.unlocks[0], 1)
	if !d.drained(0) {
		return errors.New("a rank whose counts have both wrapped is not empty")
	}
	return nil
}

func TestS20MemoryPerDomain(t *testing.T) {
	const word = 8
	size := func(v any) int { return int(reflect.TypeOf(v).Size()) }
	if got := size(cell{}); got != 4*word {
		t.Errorf("the counters take %d bytes, want 4 words", got)
	}
	if got := size(shard{}); got != ShardSize {
		t.Errorf("a shard takes %d bytes, want ShardSize, %d", got, ShardSize)
	}
	if got := size(Domain{}); got > 4*ShardSize {
		t.Errorf("a Domain takes %d bytes without its shards, want at most %d", got, 4*ShardSize)
	}
	if got := size(Reader{}); got > 3*ShardSize {
		t.Errorf("a Reader takes %d bytes, want at most %d", got, 3*ShardSize)
	}
	if f, _ := reflect.TypeFor[Reader]().FieldByName("cell"); f.Offset < ShardSize || size(Reader{})-int(f.Offset)-4*word < ShardSize {
		t.Errorf("the counters of a Reader are not %d bytes away from others", ShardSize)
	}
	if rest, _ := reflect.TypeFor[Domain]().FieldByName("rest"); rest.Offset < ShardSize {
		t.Errorf("rest is at %d, in the lines of idx that every reader loads", rest.Offset)
	}
	if got, want := len(New().shards), max(runtime.NumCPU(), runtime.GOMAXPROCS(0)); got != want {
		t.Errorf("a domain has %d shards, want %d", got, want)
	}
	if got := len(new(Domain).shards); got != 0 {
		t.Errorf("the zero domain has %d shards, want none", got)
	}
	var before, after runtime.MemStats
	domains := make([]*Domain, 256)
	runtime.ReadMemStats(&before)
	for i := range domains {
		domains[i] = New()
	}
	runtime.ReadMemStats(&after)
	shards := len(domains[0].shards) * ShardSize
	got, most := int(after.TotalAlloc-before.TotalAlloc)/len(domains), (size(Domain{})+shards)*5/4 // the allocator rounds up
	t.Logf("a domain takes %d bytes, %d of them in %d shards", got, shards, len(domains[0].shards))
	if got > most {
		t.Errorf("a domain takes %d bytes of the heap, want at most %d", got, most)
	}
}

// TestS22LastReaderLeavesWhileTheUpdaterSleeps: readers wake nobody, the updater
// looks again by itself, so that there is no wake-up to lose. What is left to
// see is that it does look again, whenever the section ends.
func TestS22LastReaderLeavesWhileTheUpdaterSleeps(t *testing.T) {
	const (
		domains  = 8 // that sleep at the same time
		million  = 1_000_000
		variants = 5 * 2 // each
	)
	length := 30 * time.Millisecond
	if *torture > 0 {
		length = *torture / variants
	}
	seed := gvmtest.Seed(t)
	var total, totalWaited int
	for v, fl := range flavours {
		for w, how := range waits {
			t.Run(fmt.Sprintf("readers=%s/wait=%s", fl.name, how.name), func(t *testing.T) {
				var (
					mu           sync.Mutex
					left, waited int // last readers that left, and those of them for whom somebody waited
					worst        time.Duration
				)
				deadline := time.Now().Add(length)
				var all sync.WaitGroup
				for n := range domains {
					b := newBed(fl.domain(), fl.handle, how.wait)
					rng := rand.New(rand.NewPCG(seed, uint64(v<<16|w<<8|n)))
					all.Go(func() {
						for more := true; more; {
							late, took, noticed := leave(b, rng)
							mu.Lock()
							left++
							if late {
								waited++
							}
							worst = max(worst, took)
							more = noticed && waited < million/variants && time.Now().Before(deadline)
							mu.Unlock()
							if !noticed {
								t.Errorf("Synchronize has not noticed in %v that the last reader has left", gvmtest.Limit)
							}
						}
					})
				}
				all.Wait()
				total, totalWaited = total+left, totalWaited+waited
				t.Logf("%d times, in %d somebody waited by then, and noticed in at most %v", left, waited, worst)
			})
		}
	}
	t.Logf("%d last readers left, and for %d somebody waited by then", total, totalWaited)
	if totalWaited == 0 {
		t.Error("no reader left while somebody waited: the test has seen nothing")
	}
}

// leave has the last reader leave while somebody waits for it, at any moment: while
// he looks again and again, as he goes to sleep, and while he sleeps. It reports
// whether he had come to wait by then, how long he took to notice, and whether he
// did.
func leave(b bed, rng *rand.Rand) (waited bool, took time.Duration, noticed bool) {
	r, closeReader := b.newReader()
	defer closeReader()
	idx := r.ReadLock()
	done := gvmtest.Background(func() { b.wait(b.d) })
	switch n := rng.IntN(64); {
	case n == 0:
		time.Sleep(time.Duration(rng.IntN(int(3 * time.Millisecond)))) // until one in a hurry sleeps, too
	case n < 32:
		time.Sleep(time.Duration(rng.IntN(int(200 * time.Microsecond))))
	default:
		for range rng.IntN(64) {
			runtime.Gosched()
		}
	}
	waited = b.d.seq.Load()&seqState == scan2
	r.ReadUnlock(idx)
	left := time.Now()
	noticed = gvmtest.ClosedWithin(done, gvmtest.Limit)
	return waited, time.Since(left), noticed
}

// TestS23DelayOfTheDefaultDomainIsVisible has the reader of one address space
// sleep, and the updater of another wait for it.
func TestS23DelayOfTheDefaultDomainIsVisible(t *testing.T) {
	d := Default()
	if s := d.Stats(); s.Waiting != 0 || s.WaitingRank != -1 {
		t.Errorf("an idle domain waits for %v, for rank %d", s.Waiting, s.WaitingRank)
	}
	idx := d.ReadLock()
	done := gvmtest.Background(d.Synchronize)
	const delay = 5 * time.Millisecond
	awaitFlip(d, idx)
	if !gvmtest.Eventually(func() bool { return d.Stats().Waiting >= delay }) {
		t.Errorf("Stats says %+v, of a grace period that has waited for %v", d.Stats(), delay)
	}
	if s := d.Stats(); s.WaitingRank != int(rank(idx)) || s.Readers != 1 {
		t.Errorf("Stats says that %d sections are open, and rank %d is waited for; want 1, %d", s.Readers, s.WaitingRank, rank(idx))
	}
	d.ReadUnlock(idx)
	<-done
	if s := d.Stats(); s.Waiting != 0 || s.WaitingRank != -1 || s.Longest < delay || s.Readers != 0 {
		t.Errorf("Stats says %+v after a grace period of more than %v", s, delay)
	}
}
