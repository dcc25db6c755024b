package litmus

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/vm"
)

// Config is how a test is run. The zero value of a field means what its comment says.
type Config struct {
	Iterations uint64        // end after so many, effective ones; 0: see DefaultIterations
	Duration   time.Duration // end after so long; 0: no limit
	Seed       uint64        // of delays and jitter
	Instances  int           // of a round; 0: those of the test

	// CPUs is where threads run: the guest's first, then the host's, in order, and around
	// again. Empty: where the scheduler has them.
	CPUs []int

	// Progress is called now and then with the iterations that count. nil: it is not told.
	Progress func(done, wanted uint64)

	// Host is where the test runs. nil: ThisHost.
	Host *Host
}

// DefaultIterations returns how many iterations a test is run for: 100,000, or 10,000
// effective ones if it has threads of the host.
func DefaultIterations(t *Test) uint64 {
	if t.hasHosts() {
		return 10_000
	}
	return 100_000
}

// ErrConfig is what errors.Is finds in the error of Run for a Config that makes no sense.
var ErrConfig = errors.New("the configuration is not valid")

// patience is how long a side waits for the other one, on the slowest of machines.
const patience = 30 * time.Second

// Run runs a test, or a sensitive form of one, until it has what it wants. What the machine
// lacks is the verdict NotRun. With ctx done it returns what there is so far, and an error.
// A form ends as soon as a forbidden outcome was seen.
func Run(ctx context.Context, t *Test, c Config) (_ *Result, err error) {
	if c.Iterations == 0 {
		c.Iterations = DefaultIterations(t)
	}
	if c.Instances == 0 {
		c.Instances = t.Instances
	}
	if c.Host == nil {
		c.Host = ThisHost()
	}
	if most := t.maxInstances(); c.Instances < 0 || c.Instances > most {
		return nil, fmt.Errorf("litmus test %s: %w: %d instances are not 1 to %d", t.FullName(), ErrConfig, c.Instances, most)
	}
	r := &Result{Test: t.Name, Form: t.Form, About: t.About, Wanted: c.Iterations, Instances: c.Instances, HostOps: t.hasHosts(),
		Seed: c.Seed, CPUs: append([]int{}, c.CPUs...), Outcomes: []Outcome{}, Sightings: []Sighting{}}
	begin := time.Now()
	err = run(ctx, t, &c, r)
	r.Elapsed = time.Since(begin)
	if lack, ok := notRun(err); ok {
		r.Verdict, r.Reason = NotRun, lack.Error()
		return r, nil
	}
	if err != nil {
		return r, fmt.Errorf("litmus test %s: %w", t.FullName(), err)
	}
	return r, nil
}

func run(ctx context.Context, t *Test, c *Config, r *Result) (err error) {
	if err := c.Host.Lacks(t); err != nil {
		return err
	}
	if err := CheckKVM(); err != nil {
		return &NotRunError{Why: err.Error(), Err: err}
	}
	b, err := newBed(t, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.start(ctx); err != nil {
		return err
	}
	y := newTally(t)
	defer b.verdict(y, r)
	begin, told := time.Now(), time.Now()
	maxRounds := 64*c.Iterations/uint64(c.Instances) + 64
	for r.Effective < c.Iterations && r.Rounds < maxRounds && (c.Duration == 0 || time.Since(begin) < c.Duration) {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("stopped in round %d: %w", b.round, context.Cause(ctx))
		}
		if err := b.runRound(); err != nil {
			if b.ctx.Err() != nil && ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("round %d: %w", b.round, err)
		}
		b.count(y, r)
		if t.Form != "" && len(r.Sightings) > 0 {
			break
		}
		if c.Progress != nil && time.Since(told) > 50*time.Millisecond {
			told = time.Now()
			c.Progress(min(r.Effective, c.Iterations), c.Iterations)
		}
	}
	return b.finish()
}

// verdict says what r shows.
func (b *bed) verdict(y *tally, r *Result) {
	r.Outcomes = y.outcomes()
	forbidden := len(r.Sightings) > 0
	missing := y.missing()
	switch {
	case b.t.Form != "" && forbidden:
		r.Verdict = Seen
	case b.t.Form != "":
		r.Verdict, r.Reason = Unseen, "the forbidden outcome must appear in this form"
	case forbidden && b.t.ExpectShadow && b.c.Host.ShadowPaging():
		r.Verdict, r.Reason = Expected, "this host has shadow paging, of which it is known"
	case forbidden:
		r.Verdict = Violated
	case missing != nil:
		r.Verdict, r.Reason = Missing, fmt.Sprintf("nothing satisfies %q, which is required", missing.Cond)
	default:
		r.Verdict = OK
	}
	if forbidden {
		r.Text = b.t.Text
	}
}

// bed is a machine that a test runs on.
type bed struct {
	t      *Test
	c      *Config
	m      *vm.Machine
	rng    *rand.Rand
	pages  []*page // of t.Pages
	files  []*os.File
	hosts  []*hostThread
	before *hostThread // what carries out the setup
	pins   pins

	ctx    context.Context
	cancel context.CancelFunc
	dead   <-chan struct{} // the machine's run has ended
	round  uint64

	// crowded says that there are more threads than processors: who spins keeps another one
	// from what it is waited for.
	crowded bool

	// What host threads and the one that runs rounds share.
	begun   atomic.Uint64 // the number of the round that host threads may begin
	started atomic.Bool   // a change of the round has begun
	open    atomic.Int32  // threads whose last change of the round has not ended
	held    sync.Mutex    // one harvest at a time

	delay, gap []int // turns of delays of guest threads, in this round
	split      []int // and which statement the gap comes before, or 0
	hostWait   []int // and of host threads
	startSpan  span  // guest threads spread their instances over so many turns
	hostSpan   span  // the host waits for so many at most
	records    []byte
	finals     [][]byte // of pages, the words of all instances
	outcome    []uint64
}

// page is a page of the test.
type page struct {
	*Page
	size  uint64 // bytes
	gpa   addr.GPA
	home  *mm.Region
	away  *mm.Region // nil: it never moves
	at    atomic.Uint64
	held  addr.HVA // where it was when the round began
	fresh bool     // it is mapped anew before each round
	raw   bool     // away may have memory that nobody knows of
}

func (p *page) hva() addr.HVA { return addr.HVA(p.at.Load()) }

// now returns the addresses that the page has.
func (p *page) now() addr.HVARange { return addr.HVAs(p.hva(), p.size) }

func newBed(t *Test, c *Config) (_ *bed, err error) {
	b := &bed{t: t, c: c, rng: rand.New(rand.NewPCG(c.Seed, 0x6c69746d7573)), startSpan: span{turns: 64}, hostSpan: span{turns: 64},
		delay: make([]int, len(t.Guests)), gap: make([]int, len(t.Guests)), split: make([]int, len(t.Guests)), hostWait: make([]int, len(t.Hosts)), outcome: make([]uint64, len(t.Observed))}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	b.crowded = len(t.Guests)+max(len(t.Hosts), 1) > runtime.NumCPU()
	config := vm.Config{RAM: addr.PageSize, VCPUs: len(t.Guests), Touch: vm.Wait, Ring0: t.Machine.Ring0,
		Disconnected: t.Machine.Disconnected, Dirty: t.Machine.Dirty, OnMark: b.pin}
	if t.Machine.Lazy {
		config.Policy = shadow.Lazy
	}
	if t.Machine.Dirty == vm.WriteProtect && len(t.Pages) > 0 {
		config.Backing = t.Pages[0].Backing
		if config.Backing == mm.File || config.Backing == mm.FilePrivate {
			if config.File, err = b.tempFile(addr.PageSize); err != nil {
				return nil, err
			}
		}
	}
	if b.m, err = vm.New(config); err != nil {
		return nil, err
	}
	for i := range t.Pages {
		if err := b.addPage(&t.Pages[i]); err != nil {
			return nil, err
		}
	}
	for _, a := range t.Aliases {
		if err := b.m.Show(b.page(a.Of).home, t.address(a.Name)); err != nil {
			return nil, err
		}
	}
	code, err := Generate(t, c.Instances)
	if err != nil {
		return nil, err
	}
	if err := b.m.BootImage(t.Name, code.Bytes); err != nil {
		return nil, err
	}
	for _, x := range t.Tables {
		block := uint64(t.address(x.Maps)) / addr.HugeSize
		if err := b.m.Store64(guests.PageDirs+addr.GPA(8*block), uint64(t.address(x.Name))|pteAll); err != nil {
			return nil, err
		}
	}
	for i := range t.Guests {
		if err := b.m.Store64(line(seedWords, i), b.rng.Uint64()|1); err != nil {
			return nil, err
		}
	}
	if t.Machine.Logged {
		if err := b.m.LogDirty(true); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// pteAll is a page-table entry's bits for a page that is present, writable, and the user's.
const pteAll = 7

// tempFile makes a file without a name.
func (b *bed) tempFile(size uint64) (*os.File, error) {
	f, err := os.CreateTemp("", "gvm-litmus-")
	if err != nil {
		return nil, err
	}
	b.files = append(b.files, f)
	return f, errors.Join(os.Remove(f.Name()), f.Truncate(int64(size)))
}

func (b *bed) addPage(x *Page) (err error) {
	lines := addr.PageSize / lineBytes
	p := &page{Page: x, gpa: b.t.address(x.Name), size: max(x.NPages, uint64((b.c.Instances+lines-1)/lines)) << addr.PageShift}
	region := mm.RegionConfig{Name: x.Name, Size: p.size, Backing: x.Backing}
	if x.Backing == mm.File || x.Backing == mm.FilePrivate {
		if region.File, err = b.tempFile(p.size); err != nil {
			return err
		}
	}
	if p.home, err = b.m.Memory().NewRegion(region); err != nil {
		return err
	}
	for _, th := range append(slices.Clone(b.t.Hosts), Thread{Statements: b.t.Setup}) {
		for _, s := range th.Statements {
			if s.Loc.Name != x.Name {
				continue
			}
			switch s.Op {
			case Move, RemapKeep:
				p.raw = p.raw || s.How != Told
				p.fresh = p.fresh || s.Op == RemapKeep || s.How != Told
				if p.away == nil {
					region.Reserved, region.Name = true, x.Name+"-away"
					if p.away, err = b.m.Memory().NewRegion(region); err != nil {
						return err
					}
				}
			case Replace, Collapse, Mergeable, Map:
				p.fresh = true
			}
		}
	}
	p.at.Store(uint64(p.home.Range.Start))
	b.pages = append(b.pages, p)
	b.finals = append(b.finals, make([]byte, b.c.Instances*lineBytes))
	return b.m.Show(p.home, p.gpa)
}

// page returns the page of a name or of an alias.
func (b *bed) page(name string) *page {
	x, _ := b.t.memory(name)
	for _, p := range b.pages {
		if p.Page == x {
			return p
		}
	}
	return nil
}

// start starts the machine and the threads of the host.
func (b *bed) start(ctx context.Context) error {
	b.ctx, b.cancel = context.WithCancel(ctx)
	for i := range b.t.Hosts {
		h, err := b.newHost(&b.t.Hosts[i], i)
		if err != nil {
			return err
		}
		b.hosts = append(b.hosts, h)
	}
	var err error
	if b.before, err = b.newHost(&Thread{"setup", b.t.Setup}, 0); err != nil {
		return err
	}
	if err := b.m.Start(b.ctx); err != nil {
		return err
	}
	b.dead = b.m.Done()
	for _, h := range b.hosts[min(1, len(b.hosts)):] {
		h.stopped = make(chan struct{})
		go h.loop()
	}
	if len(b.c.CPUs) > 0 && len(b.hosts) > 0 {
		runtime.LockOSThread()
		return b.pins.set(b.c.CPUs[len(b.t.Guests)%len(b.c.CPUs)])
	}
	return nil
}

// pin puts a vCPU's thread where the configuration has it.
func (b *bed) pin(vcpu int, _ uint32) error {
	if len(b.c.CPUs) == 0 {
		return nil
	}
	return b.pins.set(b.c.CPUs[vcpu%len(b.c.CPUs)])
}

// pins is where threads could run before they were pinned. The Go runtime uses them for
// others later.
type pins struct {
	mu     sync.Mutex
	before map[int]unix.CPUSet // by thread
}

// set pins the calling thread.
func (p *pins) set(cpu int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	tid := unix.Gettid()
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("sched_getaffinity: %w", err)
	}
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("%w: pin a thread to CPU %d: sched_setaffinity: %w", ErrConfig, cpu, err)
	}
	if p.before == nil {
		p.before = map[int]unix.CPUSet{}
	}
	if _, ok := p.before[tid]; !ok {
		p.before[tid] = before
	}
	return nil
}

// undo lets all threads run where they could.
func (p *pins) undo() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for tid, set := range p.before {
		_ = unix.SchedSetaffinity(tid, &set) // the thread may have ended
	}
	p.before = nil
}

// finish has the guest end.
func (b *bed) finish() error {
	if err := b.m.Store64(goWord, allDone); err != nil {
		return err
	}
	if err := b.wait("the guest to exit", false, b.ended); err != nil {
		return err
	}
	_, err := b.m.Wait()
	return err
}

func (b *bed) close() error {
	var errs []error
	if b.cancel != nil {
		b.cancel()
	}
	for _, h := range append(slices.Clone(b.hosts), b.before) {
		if h != nil {
			errs = append(errs, h.end())
		}
	}
	if b.m != nil {
		errs = append(errs, b.m.Close())
	}
	b.pins.undo()
	if b.ctx != nil && len(b.c.CPUs) > 0 && len(b.hosts) > 0 {
		runtime.UnlockOSThread()
	}
	for _, f := range b.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// wait returns when a condition holds, which it looks at over and over. With alive it is an
// error if the machine's run ends before that.
func (b *bed) wait(what string, alive bool, done func() bool) error {
	spins := 500
	if b.crowded {
		spins = 50 // a vCPU may be waiting for this processor
	}
	for n := range 2 * spins {
		if done() {
			return nil
		}
		if n >= spins {
			runtime.Gosched()
		}
	}
	progress := uint64(0)
	for begin := time.Now(); !done(); time.Sleep(20 * time.Microsecond) {
		if p := b.progress(); p != progress {
			progress, begin = p, time.Now()
		}
		if b.ctx.Err() != nil {
			return context.Cause(b.ctx)
		}
		if alive && b.ended() {
			_, err := b.m.Wait()
			return cmp.Or(err, errors.New("the guest has exited"))
		}
		if time.Since(begin) > patience {
			return fmt.Errorf("waited %v for %s", patience, what)
		}
	}
	return nil
}

// progress changes while vCPUs that begin instances together get on: where each of them has to
// wait for a processor, a round of hundreds of instances takes long.
func (b *bed) progress() (sum uint64) {
	for i := range b.t.Guests {
		if v, err := b.m.Load64(line(barriers, i)); err == nil {
			sum += v
		}
	}
	return sum
}

// ended reports whether the machine's run has ended.
func (b *bed) ended() bool {
	select {
	case <-b.dead:
		return true
	default:
		return false
	}
}

// runRound runs one round.
func (b *bed) runRound() error {
	b.round++
	if err := b.reset(); err != nil {
		return fmt.Errorf("reset: %w", err)
	}
	b.jitter()
	phase := 3 * b.round
	errs := []error{b.m.Store64(phaseWord, phase)}
	for i := range b.t.Guests {
		errs = append(errs, b.m.Store64(line(startWords, i), uint64(b.delay[i])), b.m.Store64(line(gapWords, i), uint64(b.gap[i])),
			b.m.Store64(line(splitWords, i), uint64(b.split[i])))
	}
	b.started.Store(false)
	b.open.Store(0)
	for _, h := range b.hosts {
		if h.changes > 0 {
			b.open.Add(1)
		}
	}
	errs = append(errs, b.m.Store64(goWord, b.round))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	b.begun.Store(b.round)
	if len(b.hosts) > 0 {
		b.hosts[0].round()
	}
	for _, h := range b.hosts[min(1, len(b.hosts)):] {
		if err := b.wait("host thread "+h.th.Name, true, func() bool { return h.done.Load() == b.round }); err != nil {
			return err
		}
	}
	for _, h := range b.hosts {
		if h.err != nil {
			return h.err
		}
	}
	if err := b.giveBack(); err != nil {
		return err
	}
	for i := range b.t.Guests {
		if err := b.wait("guest thread "+b.t.Guests[i].Name, true, func() bool { return b.done(i) }); err != nil {
			return err
		}
	}
	return nil
}

// done reports whether a guest thread has ended the round.
func (b *bed) done(i int) bool {
	v, err := b.m.Load64(line(doneWords, i))
	return err == nil && v == b.round
}

// marked reports whether a guest thread has reached its mark in the round, or its end.
func (b *bed) marked(i int) bool {
	v, err := b.m.Load64(line(markWords, i))
	return err == nil && v == b.round || b.done(i)
}

// jitter chooses delays.
func (b *bed) jitter() {
	for i := range b.t.Guests {
		b.delay[i] = b.rng.IntN(int(b.startSpan.turns)/4 + 1)
		b.gap[i] = b.rng.IntN(2*int(b.startSpan.turns)/b.c.Instances + 1)
		b.split[i] = 0
		if n := len(b.t.Guests[i].Statements); n > 1 && b.rng.IntN(4) > 0 {
			b.split[i] = 1 + b.rng.IntN(n-1)
		}
		if !b.t.hasHosts() {
			b.delay[i], b.gap[i], b.split[i] = b.rng.IntN(64), 0, 0
		}
	}
	for i := range b.hostWait {
		b.hostWait[i] = b.rng.IntN(int(b.hostSpan.turns) + 1)
	}
}

// adapt changes the delays by how many instances of a round came before the change, how many
// after it, and how many overlapped it: some of each is what makes a round worth it.
//
// Where vCPUs are kept out of the guest during the change, no more than one or two can overlap it,
// however the delays are: then it is enough that the change comes in the middle.
func (b *bed) adapt(before, after, overlapping int) {
	n := b.c.Instances
	start, host := 0, 0 // 1: longer; -1: shorter
	switch {
	case before == n:
		start, host = 1, -1
	case after == n:
		start, host = -1, 1
	default:
		if after == 0 {
			start = 1
		} else if after > n/2 && overlapping > 2 {
			start = -1
		}
		if before == 0 {
			host = 1
		} else if before > n/2 {
			host = -1
		}
	}
	b.startSpan.adapt(start, maxStart)
	b.hostSpan.adapt(host, b.maxHost())
}

// span is the most turns that a delay takes.
type span struct {
	turns   float64
	settled bool // it has been right once
}

// The most turns of delays: some tenths of a millisecond, which is what most changes take. A host
// that waits for the guest by itself need not be delayed at all.
const (
	maxStart = 1 << 20
	maxHost  = 1 << 18
)

// maxHost is longer where the host sleeps, which takes nobody's time.
func (b *bed) maxHost() float64 {
	if b.crowded {
		return 4 * maxHost
	}
	return maxHost
}

// adapt makes the span longer or shorter, by much until it has been right.
func (s *span) adapt(by int, most float64) {
	up, down := 2.0, 0.5
	if s.settled {
		up, down = 1.2, 0.85
	}
	switch by {
	case 1:
		s.turns *= up
	case -1:
		s.turns *= down
	default:
		s.settled = true
	}
	s.turns = min(max(s.turns, 16), most)
}

// reset makes everything what it is at the beginning of a round.
func (b *bed) reset() error {
	memory := b.m.Memory()
	for _, h := range b.hosts {
		if err := h.reset(); err != nil {
			return err
		}
	}
	for _, p := range b.pages {
		if p.hva() != p.home.Range.Start {
			if err := memory.Remap(p.now(), p.home.Range.Start); err != nil {
				return err
			}
			p.at.Store(uint64(p.home.Range.Start))
		}
		if p.raw {
			if err := rawReserve(p.away.Range); err != nil {
				return err
			}
		}
		if p.fresh || b.missing(p) {
			if err := memory.Map(p.home.Range); err != nil {
				return err
			}
		}
		p.held = p.hva()
		if b.t.isTable(p.Name) {
			continue
		}
		buf := b.finals[slices.Index(b.pages, p)]
		for k := range b.c.Instances {
			for w, v := range p.Init {
				binary.LittleEndian.PutUint64(buf[k*lineBytes+8*w:], v)
			}
		}
		if err := memory.WriteAt(buf, p.hva()); err != nil {
			return err
		}
	}
	for _, x := range b.t.Tables {
		if err := b.point(x.Maps, x.To); err != nil {
			return err
		}
	}
	return b.setup()
}

// point changes the entry of a page table.
func (b *bed) point(maps, to string) error {
	x, _ := b.t.table(maps)
	return b.m.Store64(b.page(x.Name).gpa, uint64(b.page(to).gpa)|pteAll)
}

// missing reports whether a part of a page is not mapped, or not as at first.
func (b *bed) missing(p *page) bool {
	for _, x := range b.m.Memory().Extents(p.now()) {
		if !x.Mapped || x.Access != addr.ReadWrite {
			return true
		}
	}
	return false
}

// giveBack maps what is missing, so that guests which wait for it go on.
func (b *bed) giveBack() error {
	for _, p := range b.pages {
		if b.missing(p) {
			if err := b.m.Memory().Map(p.now()); err != nil {
				return err
			}
		}
	}
	return nil
}

// count adds the outcomes of a round.
func (b *bed) count(y *tally, r *Result) {
	n := b.c.Instances
	r.Rounds++
	size := n * recordBytes
	if b.records == nil {
		b.records = make([]byte, len(b.t.Guests)*size)
	}
	for i := range b.t.Guests {
		if b.m.ReadGuest(recordGPA(i, 0), b.records[i*size:][:size]) != nil {
			return // the boot window is always there
		}
	}
	for i, p := range b.pages {
		if b.m.Memory().ReadAt(b.finals[i], p.hva()) != nil {
			clear(b.finals[i])
		}
	}
	var before, after, overlapping int
	for k := range n {
		early, late, overlap := true, true, !b.t.hasHosts()
		for i := range b.t.Guests {
			rec := b.records[i*size+k*recordBytes:][:recordBytes]
			first, last := binary.LittleEndian.Uint64(rec[phaseBefore:]), binary.LittleEndian.Uint64(rec[phaseAfter:])
			e, l := last == 3*b.round, first == 3*b.round+2
			early, late, overlap = early && e, late && l, overlap || !e && !l
		}
		if early {
			before++
		}
		if late {
			after++
		}
		for i, ref := range b.t.Observed {
			b.outcome[i] = b.value(ref, k)
		}
		r.Iterations++
		if overlap {
			r.Effective++
			overlapping++
		}
		if y.add(b.outcome, overlap) && len(r.Sightings) < maxSightings {
			r.Sightings = append(r.Sightings, Sighting{b.t.outcomeText(b.outcome), b.round, k, slices.Clone(b.delay), slices.Clone(b.gap), slices.Clone(b.split), slices.Clone(b.hostWait)})
		}
	}
	b.adapt(before, after, overlapping)
}

// value returns a part of the outcome of an instance.
func (b *bed) value(ref Ref, k int) uint64 {
	if ref.Thread == "" {
		p := b.page(ref.Loc.Name)
		return binary.LittleEndian.Uint64(b.finals[slices.Index(b.pages, p)][k*lineBytes+8*ref.Loc.Word:])
	}
	for i := range b.t.Guests {
		if b.t.Guests[i].Name == ref.Thread {
			return binary.LittleEndian.Uint64(b.records[(i*b.c.Instances+k)*recordBytes+8*ref.Reg:])
		}
	}
	for _, h := range b.hosts {
		if h.th.Name == ref.Thread {
			return h.regs[k][ref.Reg]
		}
	}
	return 0
}

var spun atomic.Uint64

// spin passes time.
func spin(turns int) {
	var x uint64
	for i := range turns {
		x = x*31 + uint64(i)
	}
	spun.Store(x)
}
