package srcu

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// An object is what readers reach. The garbage collector would keep what they
// hold alive, so that too short a grace period showed nowhere: objects are
// therefore recycled by hand, and poisoned while nobody may look at them.
type object struct {
	Head
	pool   *pool
	cookie Cookie // when it is waited for with Poll
	next   *object
	freed  bool // on the free list

	age atomic.Int32 // reachable, unlinked, reclaimed

	// Plain words, written while the object cannot be reached: reading them is a
	// race, which the detector reports, if the object is reclaimed too early.
	serial, check uint64 // one is the complement of the other, but for the poison
}

const (
	reachable = 0
	unlinked  = 1 // no new section finds it
	reclaimed = 2 // a grace period has passed since
)

const poison = 0x6b6b6b6b6b6b6b6b

// A pool is the objects: those in slots can be reached, those on the list are free.
type pool struct {
	slots []atomic.Pointer[object]

	mu      sync.Mutex // protects what follows
	free    *object
	made    int
	serial  uint64
	trouble []string // objects that were freed and not reclaimed, or twice
}

func newPool(spare, slots int) *pool {
	p := &pool{slots: make([]atomic.Pointer[object], slots)}
	for range spare {
		p.free = &object{pool: p, next: p.free, freed: true}
		p.made++
	}
	for i := range p.slots {
		p.slots[i].Store(p.take())
	}
	return p
}

func (p *pool) reach(slot int) *object { return p.slots[slot].Load() }

func (p *pool) take() *object {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := p.free
	if o == nil {
		o = &object{pool: p, freed: true}
		p.made++
	} else {
		p.free = o.next
	}
	p.serial++
	o.next, o.freed = nil, false
	o.serial, o.check = p.serial, ^p.serial
	o.age.Store(reachable)
	return o
}

// replace puts another object into a slot and returns the old one, unlinked.
func (p *pool) replace(slot int) *object {
	old := p.slots[slot].Swap(p.take())
	old.age.Store(unlinked)
	return old
}

// retire poisons an object and puts it on the free list, at its front, so that
// it is soon another one. A grace period has passed since it was unlinked.
func (p *pool) retire(o *object) {
	age := o.age.Swap(reclaimed)
	o.serial, o.check = poison, poison
	p.mu.Lock()
	defer p.mu.Unlock()
	if age != unlinked || o.freed {
		p.trouble = append(p.trouble, fmt.Sprintf("an object of age %d is freed, already free: %v", age, o.freed))
	}
	o.freed = true
	o.next, p.free = p.free, o
}

// account reports objects that were lost or freed wrongly. Nobody uses the pool.
func (p *pool) account() error {
	n := len(p.slots)
	for o := p.free; o != nil && n <= p.made; o = o.next {
		n++
	}
	if n != p.made {
		p.trouble = append(p.trouble, fmt.Sprintf("%d objects can be reached or are free, of %d made", n, p.made))
	}
	if len(p.trouble) > 0 {
		return fmt.Errorf("%d times: %s", len(p.trouble), p.trouble[0])
	}
	return nil
}

// Kinds of readers.
const (
	short    = iota
	sleeping // blocks inside
	moving   // changes thread and P inside
	nesting  // opens up to four sections and closes them in any order
	handing  // has another goroutine close what it opened
	handle   // is registered, for a while
	readerKinds
)

var readerNames = [readerKinds]string{"short", "sleeping", "moving", "nesting", "handed over", "handle"}

// Kinds of updaters: by what they let pass before they retire an object.
const (
	normal = iota
	expedited
	calling
	polling
	updaterKinds
)

var updaterNames = [updaterKinds]string{"Synchronize", "SynchronizeExpedited", "Call", "StartPoll and Poll"}

// A tally is what a torture has seen.
type tally struct {
	ages     [4]atomic.Uint64 // of what a section held, at its worst; the last is for more
	changed  atomic.Uint64    // sections that saw an object change in their hands
	sections [readerKinds]atomic.Uint64
	retired  [updaterKinds]atomic.Uint64
	barriers atomic.Uint64
}

// A grip is an object in a section's hands.
type grip struct {
	o      *object
	serial uint64
	worst  int32
}

func (p *pool) grab(rng *rand.Rand) grip {
	o := p.reach(rng.IntN(len(p.slots)))
	return grip{o: o, serial: o.serial}
}

func (g *grip) look() { g.worst = max(g.worst, g.o.age.Load()) }

// release looks for the last time.
func (g *grip) release(ty *tally) {
	g.look()
	ty.ages[min(int(g.worst), len(ty.ages)-1)].Add(1)
	if g.o.serial != g.serial || g.o.check != ^g.serial {
		ty.changed.Add(1)
	}
}

// complete reports whether every kind of reader and updater has done its part.
func (ty *tally) complete() bool {
	for i := range ty.sections {
		if ty.sections[i].Load() == 0 {
			return false
		}
	}
	for i := range ty.retired {
		if ty.retired[i].Load() == 0 {
			return false
		}
	}
	return true
}

// TestTorture has readers of every kind hold objects that updaters of every kind
// unlink and reclaim, on a machine whose number of Ps changes, until it has seen
// all of them and some time has passed. With -torture it goes on for as long as
// asked.
func TestTorture(t *testing.T) {
	total := 800 * time.Millisecond
	switch {
	case *torture > 0:
		total = *torture
	case testing.Short():
		total /= 4
	}
	seed := gvmtest.Seed(t)
	for _, fl := range flavours {
		if fl.handle {
			continue // every domain has readers of that kind
		}
		t.Run("domain="+strings.ReplaceAll(fl.name, " ", "_"), func(t *testing.T) {
			runTorture(t, fl.domain(), total/time.Duration(len(flavours)-1), seed)
		})
	}
}

func runTorture(t *testing.T, d *Domain, length time.Duration, seed uint64) {
	var (
		p        = newPool(64, 8)
		ty       tally
		done     atomic.Bool
		readers  sync.WaitGroup
		updaters sync.WaitGroup
		handed   = make(chan func(), 16)
		idx, seq = d.idx.Load(), d.seq.Load()
		before   = d.Stats()
		workers  uint64
	)
	random := func() *rand.Rand {
		workers++
		return rand.New(rand.NewPCG(seed, workers))
	}

	for kind := range readerKinds {
		for range 2 {
			rng := random()
			readers.Go(func() {
				for !done.Load() {
					tortureReader(d, p, &ty, kind, rng, handed)
					ty.sections[kind].Add(1)
				}
			})
		}
	}
	var closers sync.WaitGroup
	for range 2 {
		closers.Go(func() {
			for f := range handed {
				f()
			}
		})
	}
	for first := range 3 {
		rng := random()
		updaters.Go(func() {
			var polled []*object
			for turn := first; !done.Load(); turn++ {
				polled = tortureUpdater(d, p, &ty, turn%updaterKinds, rng, polled)
			}
			for _, o := range polled {
				await("a cookie of StartPoll to come true", func() bool { return d.Poll(o.cookie) })
				p.retire(o)
				ty.retired[polling].Add(1)
			}
		})
	}
	updaters.Go(func() {
		ps := runtime.GOMAXPROCS(0)
		defer runtime.GOMAXPROCS(ps)
		for n := 0; !done.Load(); n++ {
			time.Sleep(10 * time.Millisecond)
			runtime.GOMAXPROCS(1 + n%(runtime.NumCPU()+2)) // up to Ps that have no shard
		}
	})

	start := time.Now()
	time.Sleep(length)
	seen := gvmtest.Eventually(ty.complete)
	lasted := time.Since(start).Round(time.Millisecond)
	done.Store(true)
	updaters.Wait() // while there are readers, and some of them asleep
	readers.Wait()
	close(handed)
	closers.Wait()
	d.Barrier()

	s := d.Stats()
	queued, run := s.Queued-before.Queued, s.Run-before.Run
	periods, flips := (d.seq.Load()-seq)>>seqShift, d.idx.Load()-idx
	forbidden := ty.ages[2].Load() + ty.ages[3].Load() + ty.changed.Load()

	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "grace periods\t%d in %v, of %d asked for; the longest %v\n", periods, lasted, s.Requests-before.Requests, s.Longest.Round(time.Microsecond))
	fmt.Fprintf(w, "flips\t%d\n", flips)
	fmt.Fprintf(w, "callbacks\t%d queued, %d run; %d barriers\n", queued, run, ty.barriers.Load())
	fmt.Fprintf(w, "sections\t%s\n", counts(readerNames[:], ty.sections[:]))
	fmt.Fprintf(w, "objects\t%d made, retired after: %s\n", p.made, counts(updaterNames[:], ty.retired[:]))
	fmt.Fprint(w, "age\tsections that held an object, by its age when they let go of it\n")
	for age, what := range []string{"could be reached", "unlinked: the view was stale, as it may be", "reclaimed: a grace period ended too early; broken unless 0", "more: broken unless 0"} {
		fmt.Fprintf(w, "  %d\t%d\t%s\n", age, ty.ages[age].Load(), what)
	}
	fmt.Fprintf(w, "changed\t%d\tobjects that changed in a section's hands; broken unless 0\n", ty.changed.Load())
	fmt.Fprintf(w, "forbidden outcomes\t%d\n", forbidden)
	w.Flush()
	t.Logf("\n%s", &out)

	if forbidden > 0 {
		t.Errorf("%d forbidden outcomes", forbidden)
	}
	if periods != flips {
		t.Errorf("%d grace periods flipped idx %d times", periods, flips)
	}
	if queued != run {
		t.Errorf("%d callbacks were queued and %d run", queued, run)
	}
	if !seen {
		t.Errorf("in %v some kind of reader or updater has not come by once", lasted)
	}
	if err := p.account(); err != nil {
		t.Error(err)
	}
	if err := d.Cleanup(); err != nil {
		t.Error(err)
	}
}

func counts(names []string, n []atomic.Uint64) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("%s %d", names[i], n[i].Load()))
	}
	return strings.Join(list, ", ")
}

// tortureReader opens a section, or a few, and holds what it finds.
func tortureReader(d *Domain, p *pool, ty *tally, kind int, rng *rand.Rand, handed chan<- func()) {
	switch kind {
	case short:
		for range 64 {
			idx := d.ReadLock()
			g := p.grab(rng)
			g.look()
			g.release(ty)
			d.ReadUnlock(idx)
		}
		runtime.Gosched()
	case sleeping:
		idx := d.ReadLock()
		g := p.grab(rng)
		for range 3 {
			time.Sleep(time.Duration(rng.IntN(int(time.Millisecond))))
			g.look()
		}
		g.release(ty)
		d.ReadUnlock(idx)
	case moving:
		idx := d.ReadLock()
		g := p.grab(rng)
		for range 4 {
			runtime.LockOSThread()
			runtime.Gosched()
			g.look()
			runtime.UnlockOSThread()
			runtime.Gosched()
			g.look()
		}
		g.release(ty)
		d.ReadUnlock(idx)
	case nesting:
		type nested struct {
			grip
			idx int
		}
		var open []nested
		for range 1 + rng.IntN(4) {
			idx := d.ReadLock()
			open = append(open, nested{p.grab(rng), idx})
			runtime.Gosched()
		}
		rng.Shuffle(len(open), func(i, j int) { open[i], open[j] = open[j], open[i] })
		for i := range open {
			runtime.Gosched()
			open[i].release(ty)
			d.ReadUnlock(open[i].idx)
		}
	case handing:
		idx := d.DownRead()
		g := p.grab(rng)
		g.look()
		handed <- func() {
			g.look()
			runtime.Gosched()
			g.release(ty)
			d.UpRead(idx)
		}
	case handle:
		r := d.NewReader()
		defer r.Close()
		for range 1 + rng.IntN(64) {
			idx := r.ReadLock()
			g := p.grab(rng)
			if rng.IntN(8) == 0 {
				runtime.Gosched()
			}
			g.look()
			inner := r.ReadLock()
			g.release(ty)
			r.ReadUnlock(idx)
			r.ReadUnlock(inner)
		}
	}
}

// tortureUpdater replaces an object and retires the old one after a grace
// period, which it waits for in its way. It returns the objects that are polled.
func tortureUpdater(d *Domain, p *pool, ty *tally, kind int, rng *rand.Rand, polled []*object) []*object {
	old := p.replace(rng.IntN(len(p.slots)))
	switch kind {
	case normal:
		d.Synchronize()
		p.retire(old)
		ty.retired[kind].Add(1)
	case expedited:
		d.SynchronizeExpedited()
		p.retire(old)
		ty.retired[kind].Add(1)
	case calling:
		d.Call(&old.Head, func(*Head) {
			p.retire(old)
			ty.retired[kind].Add(1)
		})
		if rng.IntN(8) == 0 {
			d.Barrier()
			ty.barriers.Add(1)
		}
	case polling:
		old.cookie = d.StartPoll()
		polled = append(polled, old)
		for len(polled) > 0 && d.Poll(polled[0].cookie) {
			p.retire(polled[0])
			ty.retired[kind].Add(1)
			polled = polled[1:]
		}
	}
	return polled
}

// A litmus test has a reader, inside a section, and an updater, that waits for a
// grace period, write and read two variables. A variable is 1 in a run if its
// value is the number of the run, so that none needs to be put back to 0.
type litmus struct {
	name, reader, updater string
	forbidden             [2]bool // r1, r2

	read func(v *vars, run uint64) (r1, r2 bool)
	// update returns what it read, which is in place of the reader's r2.
	update func(v *vars, run uint64, wait func()) (r2, reads bool)
}

type vars struct {
	_ [ShardSize]byte
	x atomic.Uint64
	_ [ShardSize]byte
	y atomic.Uint64
	_ [ShardSize]byte
}

func writeWaitWrite(v *vars, run uint64, wait func()) (bool, bool) {
	v.x.Store(run)
	wait()
	v.y.Store(run)
	return false, false
}

var litmusTests = []litmus{{
	name:   "after",
	reader: "r1=y; r2=x", updater: "x=1; wait; y=1", forbidden: [2]bool{true, false},
	read: func(v *vars, run uint64) (r1, r2 bool) {
		r1 = v.y.Load() == run
		return r1, v.x.Load() == run
	},
	update: writeWaitWrite,
}, {
	name:   "before",
	reader: "r1=x; r2=y", updater: "x=1; wait; y=1", forbidden: [2]bool{false, true},
	read: func(v *vars, run uint64) (r1, r2 bool) {
		r1 = v.x.Load() == run
		return r1, v.y.Load() == run
	},
	update: writeWaitWrite,
}, {
	name:   "neither",
	reader: "r1=x; y=1", updater: "x=1; wait; r2=y", forbidden: [2]bool{false, false},
	read: func(v *vars, run uint64) (r1, r2 bool) {
		r1 = v.x.Load() == run
		v.y.Store(run)
		return r1, false
	},
	update: func(v *vars, run uint64, wait func()) (r2, reads bool) {
		v.x.Store(run)
		wait()
		return v.y.Load() == run, true
	},
}}

// A meeting has two goroutines go on at the same instant, as near as can be.
type meeting struct {
	arrived atomic.Uint64
	spins   int // that are worth while before the other one is let onto this P
}

func newMeeting() *meeting {
	if runtime.GOMAXPROCS(0) == 1 {
		return &meeting{spins: 1}
	}
	return &meeting{spins: 1 << 11}
}

func (m *meeting) wait(round uint64) {
	m.arrived.Add(1)
	for n := 1; m.arrived.Load() < 2*round; n++ {
		if n%m.spins == 0 {
			runtime.Gosched()
		}
	}
}

// run makes runs of a litmus test, as many as asked for or as there is time for,
// and returns how often each outcome was seen.
func (l litmus) run(b bed, runs uint64, length time.Duration) (seen [2][2]uint64) {
	var (
		v      vars
		meet   = newMeeting()
		last   atomic.Uint64 // the run to stop at
		result [2]struct {   // of the last run and of the one before
			r1, r2 bool
			_      [ShardSize]byte
		}
	)
	done := gvmtest.Background(func() {
		r, closeReader := b.newReader()
		defer closeReader()
		for run := uint64(1); ; run++ {
			res := &result[run&1]
			meet.wait(run)
			if run == last.Load() {
				return
			}
			for range run % 16 * 32 {
				meet.arrived.Load() // vary who comes first
			}
			idx := r.ReadLock()
			res.r1, res.r2 = l.read(&v, run)
			r.ReadUnlock(idx)
		}
	})
	wait := func() { b.wait(b.d) }
	deadline := time.Now().Add(length)
	var r2, reads bool // what the updater read
	for run := uint64(1); ; run++ {
		if run > runs || time.Now().After(deadline) {
			last.Store(run)
		}
		meet.wait(run)
		// The reader is done with the run before this one.
		if before := result[1-run&1]; run > 1 {
			if !reads {
				r2 = before.r2
			}
			seen[bit(before.r1)][bit(r2)]++
		}
		if run == last.Load() {
			break
		}
		for range run / 16 % 16 * 32 {
			meet.arrived.Load()
		}
		r2, reads = l.update(&v, run, wait)
	}
	<-done
	return seen
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// outcomes returns how many of the outcomes of a litmus test were seen.
func outcomes(seen [2][2]uint64) (n int) {
	for _, row := range seen {
		for _, times := range row {
			n += bit(times > 0)
		}
	}
	return n
}

// TestS2Litmus makes many runs of three tests of the guarantee. That the marked
// outcome is never seen says something only where the others are.
func TestS2Litmus(t *testing.T) {
	runs, length := uint64(math.MaxUint64), 10*time.Millisecond
	if *torture > 0 {
		runs, length = 10_000_000/uint64(len(flavours)*len(waits))+1, math.MaxInt64
	}
	for _, l := range litmusTests {
		var sum [2][2]uint64
		each(t, func(t *testing.T, b bed) {
			for r1, row := range l.run(b, runs, length) {
				for r2, n := range row {
					sum[r1][r2] += n
				}
			}
		})
		var out strings.Builder
		fmt.Fprintf(&out, "reader: lock; %s; unlock   updater: %s\n", l.reader, l.updater)
		for r1, row := range sum {
			for r2, n := range row {
				mark := " "
				if r1 == bit(l.forbidden[0]) && r2 == bit(l.forbidden[1]) {
					mark = "*"
					if n > 0 {
						t.Errorf("%s: the forbidden outcome r1=%d, r2=%d was seen %d times", l.name, r1, r2, n)
					}
				}
				fmt.Fprintf(&out, "  %s r1=%d r2=%d  %9d\n", mark, r1, r2, n)
			}
		}
		t.Logf("%s\n%s  *: forbidden", l.name, &out)
		if allowed := 4 - 1; *torture > 0 && outcomes(sum) < allowed {
			t.Errorf("%s: only %d of %d outcomes were seen: the test says nothing of the others", l.name, outcomes(sum), allowed)
		}
	}
}
