package epoch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/vm"
)

// Config describes a run.
type Config struct {
	// Machine is the machine, with its dirty source. A guest that touches what is not
	// there waits, and there is a spare region for operations that move pages, whatever
	// it says of those. Its OnMark is called after operations were told of a mark, and its
	// OnTouch is replaced.
	Machine vm.Config
	Guest   guests.Guest
	Args    guests.Args

	Epochs   int           // at least 1
	Interval time.Duration // that the guest runs at least, in each; not negative
	Rest     uint64        // pages that may be left dirty when the guest is paused

	Script *hostops.Script // operations of the host; nil: none, unless Random
	Random bool            // operations at random, and no Script
	Pages  uint64          // of RAM, from the first on, that random operations are about; 0: all
	Seed   uint64          // of operations, and of snapshots that fail

	// Others returns who else changes the machine's memory, once the guest is in it. What
	// they do has to be followed by a watch of the machine. nil: nobody.
	Others func(*vm.Machine) ([]Other, error)

	Verify     bool
	WorkingSet bool   // take the working set of each epoch
	Defect     string // in a build with the tag gvm_defects; "": none

	// Alias has the guest shown its RAM a second time, from RAMEnd on: every page is at two
	// frames, and changes at both.
	Alias bool

	// Paused is called in each epoch that is verified, after the comparison, with the guest
	// paused and no operation in progress; Quiet in each epoch with the guest running and
	// no operation in progress. An error ends the run. nil: they are not.
	Paused func(*vm.Machine) error
	Quiet  func(context.Context, *vm.Machine) error

	// OnEpoch is called at the end of each epoch. nil: it is not.
	OnEpoch func(*Epoch)
}

// Other changes memory while the guest runs, in steps that a goroutine carries out one
// after the other; several of them, and the runner of operations, at the same time. None is
// in a step while the guest is paused, or Quiet is called, and what they did before has been
// followed. In the end it gives back what it took.
type Other interface {
	Step(context.Context) error
	Restore(context.Context) error
}

// Epoch is one of a run. Times are in nanoseconds.
type Epoch struct {
	Source string `json:"source"` // by its stable name
	Number int    `json:"epoch"`  // from 1
	vm.Checkpoint
	Discarded uint64 `json:"discarded"` // pages that read zero, or as their file, since

	// Failed says that the snapshot failed, on purpose, and its harvest was aborted. The
	// epoch is not verified then.
	Failed bool `json:"failed"`

	// Used is how many frames the machine itself used since the last epoch, and UsedByAll
	// how many anybody did; nil if that is not known, or was not asked for.
	Used      *uint64 `json:"used"`
	UsedByAll *uint64 `json:"used_by_all"`

	Ops      uint64    `json:"ops"`      // of the host
	Progress uint64    `json:"progress"` // of the guest, all vCPUs together, since the start
	Spurious uint64    `json:"spurious"` // pages that were reported, and were what they had been
	Missing  []Missing `json:"missing"`  // pages that should have been reported

	Dirty *dirty.Set `json:"-"` // what was reported
}

// Missing is a page that has changed and that no harvest has reported.
type Missing struct {
	GFN addr.GFN `json:"gfn"`

	// Op is the operation of the host that had to do with it last, of those since the copy
	// was last compared; empty if there was none, and it was lost as a store.
	Op string `json:"op,omitempty"`
}

func (m Missing) String() string {
	if m.Op == "" {
		return fmt.Sprintf("%v, by a store", m.GFN)
	}
	return fmt.Sprintf("%v, by %s", m.GFN, m.Op)
}

// Result is what became of a run.
type Result struct {
	Source   string         `json:"source"`
	Sees     vm.Sees        `json:"sees"`
	VCPUs    int            `json:"vcpus"`
	Epochs   int            `json:"epochs"`
	Verified int            `json:"verified"` // epochs in which the copy was compared
	Failed   int            `json:"failed"`   // epochs whose snapshot failed on purpose
	Pages    uint64         `json:"pages"`    // reported, in all epochs
	Spurious uint64         `json:"spurious"`
	Missing  uint64         `json:"missing"`
	Cost     time.Duration  `json:"cost"` // of all harvests
	Pauses   vm.PauseStats  `json:"pauses"`
	HostOps  *hostops.Stats `json:"host_ops,omitempty"`
	Exited   bool           `json:"exited"` // the guest came to its end before the run
	Seconds  float64        `json:"seconds"`
	Took     time.Duration  `json:"-"`
}

// Spare is how many bytes of addresses are enough for operations that move RAM.
const Spare = 16 * addr.PageSize

// errSnapshot is the failure of a snapshot that is made to fail.
var errSnapshot = errors.New("the snapshot is made to fail")

// run is a run in progress.
type run struct {
	config Config
	m      *vm.Machine
	runner *hostops.Runner // nil: there are no operations
	others []Other
	copy   *mirror // nil: the run is not verified
	rng    *rand.Rand

	opsMu    sync.RWMutex // read-held in a step of operations, or of others
	compared uint64       // operations carried out when the copy was last compared
	result   Result
}

// Run carries a run out. It returns what came of it until the end, or until it failed:
// because the guest did, an operation of the host, or the harvest, or because ctx was done.
// Missing pages are no error.
func Run(ctx context.Context, c Config) (_ *Result, err error) {
	r := &run{config: c, rng: rand.New(rand.NewPCG(c.Seed, 1))}
	if err := r.open(); err != nil {
		return nil, err
	}
	begin := time.Now()
	defer func() {
		r.result.Took = time.Since(begin)
		r.result.Seconds = r.result.Took.Seconds()
		err = errors.Join(err, r.m.Close())
	}()
	if err := r.begin(ctx); err != nil {
		return &r.result, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := r.m.Start(ctx); err != nil {
		return &r.result, err
	}
	defer func() {
		cancel(errDone)
		if _, failed := r.m.Wait(); !errors.Is(failed, context.Cause(ctx)) { // which is in err, if it is not errDone
			err = errors.Join(failed, err)
		}
	}()
	if err := r.epochs(ctx, cancel); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx) // of which err is a consequence
		}
		return &r.result, err
	}
	return &r.result, nil
}

// epochs carries out all epochs, under operations of the host. An operation that fails
// cancels the run.
func (r *run) epochs(ctx context.Context, cancel context.CancelCauseFunc) error {
	stopOps := r.startOps(ctx, cancel)
	defer stopOps()
	for n := 1; n <= r.config.Epochs && !r.result.Exited; n++ {
		if err := r.wait(ctx); err != nil {
			return err
		}
		if n == r.config.Epochs || r.result.Exited {
			// Nothing is to be missing from the last comparison.
			stopOps()
			if err := r.restore(ctx); err != nil {
				return err
			}
		}
		if err := r.epoch(ctx, n); err != nil {
			return err
		}
	}
	return nil
}

// restore has all memory given back.
func (r *run) restore(ctx context.Context) error {
	for _, o := range r.others {
		if err := o.Restore(ctx); err != nil {
			return err
		}
	}
	if r.runner == nil {
		return nil
	}
	return r.runner.Restore(ctx)
}

// errDone ends the guest at the end of a run.
var errDone = errors.New("the run is done")

// open makes the machine and what it runs under.
func (r *run) open() (err error) {
	c := &r.config
	if c.Epochs < 1 || c.Interval < 0 || c.Script != nil && c.Random {
		return fmt.Errorf("%w: %d epochs of %v, or a script and random operations", vm.ErrConfig, c.Epochs, c.Interval)
	}
	c.Machine.Touch = vm.Wait
	if c.Script != nil || c.Random {
		c.Machine.Spare = Spare
	}
	onMark := c.Machine.OnMark
	c.Machine.OnMark = func(vcpu int, mark uint32) error {
		if r.runner != nil {
			r.runner.Mark(mark)
		}
		if onMark != nil {
			return onMark(vcpu, mark)
		}
		return nil
	}
	c.Machine.OnTouch = func(_ int, gpa addr.GPA) {
		if r.runner != nil && gpa >= guests.RAMBase {
			r.runner.Fault(uint64(gpa-guests.RAMBase) >> addr.PageShift)
		}
	}
	if r.m, err = vm.New(c.Machine); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.m.Close())
		}
	}()
	if err := setDefect(r.m, c.Defect); err != nil {
		return err
	}
	if c.Alias {
		if err := r.m.Show(r.m.RAM(), r.m.RAMEnd()); err != nil {
			return err
		}
	}
	if err := r.m.Boot(c.Guest, c.Args); err != nil {
		return err
	}
	return r.openOps()
}

func (r *run) openOps() (err error) {
	c := &r.config
	if c.Script != nil || c.Random {
		if r.runner, err = newRunner(r.m, c.Script, c.Pages, c.Seed, 0); err != nil {
			return err
		}
	}
	if c.Others != nil {
		r.others, err = c.Others(r.m)
	}
	return err
}

// NewRunner returns what carries out operations of the host on a machine: those of a script
// or, if it is nil, random ones, for all that the machine has. For the seed and the pace see
// hostops.Config. The error is vm.ErrConfig if the script is about pages that the machine
// does not have.
func NewRunner(m *vm.Machine, script *hostops.Script, seed uint64, pace time.Duration) (*hostops.Runner, error) {
	return newRunner(m, script, 0, seed, pace)
}

// newRunner is NewRunner, with random operations on some pages of RAM; 0: all.
func newRunner(m *vm.Machine, script *hostops.Script, pages, seed uint64, pace time.Duration) (*hostops.Runner, error) {
	ops := hostops.Config{Target: Target(m), Script: script, Seed: seed, Pace: pace}
	if script == nil {
		random := hostops.RandomConfig{Seed: seed, Pages: cmp.Or(pages, m.RAM().Range.NPages()), Backing: m.RAM().Backing, Missing: 3}
		if m.Spare() != nil {
			random.Spare = m.Spare().Range.NPages()
		}
		ops.Random = hostops.NewRandom(random)
	}
	r, err := hostops.NewRunner(ops)
	if _, ok := errors.AsType[*hostops.SyntaxError](err); ok {
		err = fmt.Errorf("%w: %w", vm.ErrConfig, err)
	}
	return r, err
}

// Target is the RAM of a machine, as operations of the host see it: page n is at n pages from
// the start of RAM. What of it the guest is not shown, as the hole of a PC below 1 MiB, is
// changed too, and stores to it go nowhere.
func Target(m *vm.Machine) hostops.Target {
	at := func(page, offset uint64) (addr.GPA, bool) { return m.RAMAddr(page<<addr.PageShift + offset) }
	return hostops.Target{
		Memory: m.Memory(), RAM: m.RAM(), Spare: m.Spare(),
		HVA: func(page uint64) (addr.HVA, bool) {
			if gpa, ok := at(page, 0); ok {
				return m.Slots().HVA(gpa)
			}
			return m.RAM().Range.Start + addr.HVA(page<<addr.PageShift), page < m.RAM().Range.NPages()
		},
		Store64: func(page, offset, value uint64) error {
			if gpa, ok := at(page, offset); ok {
				return m.Store64(gpa, value)
			}
			return nil
		},
		Write: func(page, offset uint64, p []byte) error {
			if gpa, ok := at(page, offset); ok {
				return m.WriteGuest(gpa, p)
			}
			return nil
		},
	}
}

// begin has the guest's writes logged, and makes the copy, before the guest runs.
func (r *run) begin(ctx context.Context) error {
	c := &r.config
	r.result = Result{Source: c.Machine.Dirty.String(), Sees: c.Machine.Dirty.Sees(), VCPUs: max(c.Machine.VCPUs, 1)}
	if err := r.m.LogDirty(true); err != nil {
		return err
	}
	h, err := r.m.Harvest(ctx) // what was loaded, and what a source reports in the beginning
	if err != nil {
		return err
	}
	if err := h.Commit(); err != nil || !c.Verify {
		return err
	}
	all := []addr.GFNRange{
		{Start: 0, End: addr.GFN(guests.BootSize >> addr.PageShift)},
		{Start: guests.RAMBase.GFN(), End: r.m.RAMEnd().GFN()},
	}
	if c.Alias {
		n := addr.GFN(c.Machine.RAM >> addr.PageShift)
		all = append(all, addr.GFNRange{Start: all[1].End, End: all[1].End + n})
	}
	if r.copy, err = newMirror(r.m, all...); err != nil {
		return err
	}
	if c.Defect == CopyBeforeClear {
		r.copy.early, err = newMirror(r.m, all...)
	}
	return err
}

// startOps has operations carried out, and others do what they do, until the function that
// it returns is called. If one fails, it cancels the run.
func (r *run) startOps(ctx context.Context, cancel context.CancelCauseFunc) (stop func()) {
	steps := make([]func(context.Context) error, 0, 1+len(r.others))
	if r.runner != nil {
		steps = append(steps, r.runner.Step)
	}
	for _, o := range r.others {
		steps = append(steps, o.Step)
	}
	ctx, end := context.WithCancel(ctx)
	var all sync.WaitGroup
	for i, step := range steps {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(r.config.Seed, uint64(2+i)))
			for ctx.Err() == nil {
				r.opsMu.RLock()
				begin := time.Now()
				err := step(ctx)
				took := time.Since(begin)
				r.opsMu.RUnlock()
				if err != nil && ctx.Err() == nil {
					cancel(err)
					return
				}
				// The guest must get on between two operations, or there is nothing to see; and
				// so must whoever reads its memory, with several at work.
				time.Sleep(50*time.Microsecond + time.Duration(rng.Int64N(int64(300*time.Microsecond))) + time.Duration(len(steps)-1)*took)
			}
		})
	}
	return func() { end(); all.Wait() }
}

// quiesce returns when nobody is in a step, and what was done is followed.
func (r *run) quiesce() {
	r.opsMu.Lock()
	r.m.Memory().Follow()
}

// wait returns at the end of an interval, or when the guest has come to its end.
func (r *run) wait(ctx context.Context) error {
	timer := time.NewTimer(r.config.Interval)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-r.m.Done():
	}
	select {
	case <-r.m.Done():
		_, err := r.m.Wait()
		r.result.Exited = err == nil
		return err
	default:
		return context.Cause(ctx)
	}
}

// epoch takes the checkpoint of an epoch.
func (r *run) epoch(ctx context.Context, n int) (err error) {
	e := &Epoch{Source: r.result.Source, Number: n, Missing: []Missing{}, Dirty: new(dirty.Set)}
	var compare time.Duration
	failing := r.copy != nil && n < r.config.Epochs && r.rng.IntN(8) == 0
	spurious := uint64(0)
	if r.copy != nil {
		spurious = r.copy.spurious
	}
	e.Checkpoint, err = r.m.Checkpoint(ctx, vm.CheckpointConfig{
		Rest: r.config.Rest, Quiesce: r.quiesce, Resume: r.opsMu.Unlock,
		Save: func(h *dirty.Harvest, paused bool) error {
			if failing && (paused || r.rng.IntN(2) == 0) {
				e.Failed = true
				if r.config.Defect == NotTransactional {
					return nil
				}
				return errSnapshot
			}
			e.Dirty.Union(h.Dirty())
			e.Discarded += h.Discarded().Len()
			if r.copy == nil {
				return nil
			}
			if err := r.copy.apply(h); err != nil {
				return err
			}
			if !paused {
				return nil
			}
			defer func(begin time.Time) { compare = time.Since(begin) }(time.Now())
			if err := r.verify(e); err != nil || r.config.Paused == nil {
				return err
			}
			return r.config.Paused(r.m)
		},
	})
	if err != nil && !errors.Is(err, errSnapshot) {
		return err
	}
	e.Pause -= compare
	if r.config.Quiet != nil && !r.result.Exited {
		if err := r.quiet(ctx); err != nil {
			return err
		}
	}
	if r.config.WorkingSet {
		if err := r.takeWorkingSet(ctx, e); err != nil {
			return err
		}
	}
	if r.copy != nil {
		e.Spurious = r.copy.spurious - spurious
	}
	return r.account(e)
}

func (r *run) quiet(ctx context.Context) error {
	r.quiesce()
	defer r.opsMu.Unlock()
	return r.config.Quiet(ctx, r.m)
}

func (r *run) takeWorkingSet(ctx context.Context, e *Epoch) error {
	w, err := r.m.TakeWorkingSet(ctx)
	if err != nil {
		return err
	}
	e.Used = new(w.Machine.Len())
	if w.All != nil {
		e.UsedByAll = new(w.All.Len())
	}
	return nil
}

// verify compares the copy with memory. The guest is paused, and no operation in progress.
func (r *run) verify(e *Epoch) error {
	frames, err := r.copy.compare()
	if err != nil {
		return err
	}
	ops := uint64(0)
	if r.runner != nil {
		ops = r.runner.Stats().Ops
	}
	for _, gfn := range frames {
		e.Missing = append(e.Missing, Missing{GFN: gfn, Op: r.lostBy(gfn)})
	}
	r.compared = ops
	r.result.Verified++
	return nil
}

// lostBy returns the operation since the last comparison that had to do with gfn last.
func (r *run) lostBy(gfn addr.GFN) string {
	first := guests.RAMBase.GFN()
	if r.runner == nil || gfn < first {
		return ""
	}
	rec, ok := r.runner.Last(uint64(gfn-first) % (r.config.Machine.RAM >> addr.PageShift)) // of an alias, too
	if !ok || rec.N <= r.compared {
		return ""
	}
	return rec.String()
}

// account adds an epoch to the result.
func (r *run) account(e *Epoch) error {
	for i := range r.result.VCPUs {
		progress, err := r.m.Result(i, 0)
		if err != nil {
			return err
		}
		e.Progress += progress
	}
	s := &r.result
	s.Epochs++
	s.Pages += e.Pages
	s.Spurious += e.Spurious
	s.Missing += uint64(len(e.Missing))
	s.Cost += e.Cost
	s.Pauses = r.m.Pauses()
	if e.Failed {
		s.Failed++
	}
	if r.runner != nil {
		stats := r.runner.Stats()
		if e.Ops = stats.Ops; s.HostOps != nil {
			e.Ops -= s.HostOps.Ops
		}
		s.HostOps = &stats
	}
	if r.config.OnEpoch != nil {
		r.config.OnEpoch(e)
	}
	return nil
}
