package hostops

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/mm"
)

// Config describes a runner. It has a Script or a Random.
type Config struct {
	Target Target

	Script *Script
	Seed   uint64 // of the pages that are "random" in Script

	Random *Random       // for this runner alone
	Pace   time.Duration // between the steps of Random, in Run; 0: 1 ms

	// OnOp is told of each operation, also of those that were skipped or failed, before
	// the next one. It is called by the goroutine that carries them out, and does not
	// call Run, Step or Restore. It may be nil.
	OnOp func(Record)
}

// Runner carries operations out. Run, Step and Restore are called by one goroutine at a
// time; the other methods may be called from any.
type Runner struct {
	config Config    // immutable
	script *schedule // or nil
	events events

	busy atomic.Bool // one of Run, Step and Restore is in progress

	// What follows is for who has made it busy.
	host *host
	rng  *rand.Rand

	mu      sync.Mutex // protects what follows; a leaf
	ops     uint64
	counts  map[Kind]Count
	history history
}

// NewRunner returns a runner that has done nothing yet. It reports a *SyntaxError if the
// script is about pages that RAM does not have, or needs a spare region that there is not.
func NewRunner(c Config) (*Runner, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.Pace == 0 {
		c.Pace = time.Millisecond
	}
	r := &Runner{config: c, host: newHost(c.Target), rng: rand.New(rand.NewPCG(c.Seed, 0)), counts: map[Kind]Count{}}
	r.events.init()
	if c.Script != nil {
		r.script = newSchedule(c.Script)
	}
	return r, nil
}

// check reports what is wrong with c.
func (c *Config) check() error {
	t := &c.Target
	switch {
	case (c.Script == nil) == (c.Random == nil):
		return errors.New("run operations of the host: there must be a script, or a random stream, and not both")
	case c.Script != nil:
		return c.Script.check(t.pages(), t.Spare != nil)
	case c.Random.config.Pages < 1 || c.Random.config.Pages > t.pages():
		return fmt.Errorf("run operations of the host: they are about %d pages, and RAM has %d", c.Random.config.Pages, t.pages())
	case c.Random.config.Spare > newSpare(t).region.NPages():
		return fmt.Errorf("run operations of the host: they need %d spare pages, and the machine has %d", c.Random.config.Spare, newSpare(t).region.NPages())
	}
	return nil
}

// enter begins a Run, Step or Restore, and returns what ends it.
func (r *Runner) enter() (leave func()) {
	if !r.busy.CompareAndSwap(false, true) {
		panic("hostops: Run, Step and Restore are called one at a time")
	}
	return func() { r.busy.Store(false) }
}

// Run carries operations out at their times, and those for marks and faults as they come,
// until nothing is left to do, which is only so for a script with no other times than "at".
// Then it returns nil. If ctx is done it returns the cause, and if an operation fails, an
// *OpError. An operation that has begun is not cut short.
//
// The start that a script counts from is that of the first Run or Step.
func (r *Runner) Run(ctx context.Context) error {
	defer r.enter()()
	for {
		if err := r.step(ctx); err != nil {
			return err
		}
		wait, more := r.config.Pace, true
		if r.script != nil {
			wait, more = r.script.wait()
		}
		if !more {
			return nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-r.events.arrived:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// Step carries out, without waiting, one step of a random stream, or what of a script is due:
// first what marks and faults since the last step ask for, then what has a time that is
// past, once each. Errors are those of Run.
func (r *Runner) Step(ctx context.Context) error {
	defer r.enter()()
	return r.step(ctx)
}

func (r *Runner) step(ctx context.Context) error {
	if r.script == nil {
		for _, o := range r.config.Random.Next() {
			if _, err := r.carryOut(ctx, 0, o, Range{}); err != nil {
				return err
			}
		}
		return nil
	}
	for _, e := range r.events.take() {
		for _, b := range r.script.on(e) {
			if err := r.block(ctx, b, Range{e.page, e.page + 1}); err != nil {
				return err
			}
		}
	}
	for _, b := range r.script.due() {
		if err := r.block(ctx, b, Range{}); err != nil {
			return err
		}
	}
	return nil
}

// block carries out lines that follow each other. For the first, "it" is the pages it.
func (r *Runner) block(ctx context.Context, b block, it Range) (err error) {
	for _, l := range b.lines {
		if it, err = r.carryOut(ctx, l.N, l.Op, it); err != nil {
			return err
		}
	}
	return nil
}

// carryOut carries o out, which is in some line, and returns its pages.
func (r *Runner) carryOut(ctx context.Context, line int, o Op, it Range) (Range, error) {
	if ctx.Err() != nil {
		return Range{}, context.Cause(ctx)
	}
	pages := r.resolve(o.Pages, it)
	rec := Record{Line: line, Kind: o.Kind, Range: r.host.concerns(o, pages), Arg: o.arg()}
	begin := time.Now()
	err := r.host.do(o, pages)
	rec.Took = time.Since(begin)
	if err != nil {
		rec.Err = err.Error()
		rec.Skipped = r.script == nil && impossible(o.Kind, err)
	}
	r.record(&rec)
	if r.config.OnOp != nil {
		r.config.OnOp(rec)
	}
	if err != nil && !rec.Skipped {
		name := ""
		if r.script != nil {
			name = r.config.Script.Name
		}
		return Range{}, &OpError{Script: name, Record: rec, Err: err}
	}
	return rec.Range, nil
}

// resolve returns what p means now.
func (r *Runner) resolve(p Pages, it Range) Range {
	all := r.config.Target.pages()
	switch p.Which {
	case AllPages:
		return Range{0, all}
	case ItPages:
		return it
	case RandomPages:
		start := r.rng.Uint64N(all - p.N + 1)
		return Range{start, start + p.N}
	}
	return p.Range
}

// impossible reports whether the backing, the kernel or, at the moment, the kernel's memory
// is not for such an operation.
func impossible(k Kind, err error) bool {
	if made(err) {
		return false
	}
	not := []error{unix.EINVAL, unix.ENOTSUP, mm.ErrPinned}
	if k == Collapse { // no huge page can be had, or one of the pages is in use
		not = append(not, unix.ENOMEM, unix.EAGAIN, unix.EBUSY)
	}
	for _, target := range not {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// record gives rec its number, and remembers it.
func (r *Runner) record(rec *Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops++
	rec.N = r.ops
	c := r.counts[rec.Kind]
	switch {
	case rec.Skipped:
		c.Skipped++
	case rec.Err != "":
		c.Failed++
	default:
		c.Done++
	}
	r.counts[rec.Kind] = c
	if !rec.Skipped {
		r.history.add(*rec)
	}
}

// Mark tells that the guest has reached a mark. It does not block, and may be called on
// the thread of a vCPU.
func (r *Runner) Mark(mark uint32) {
	r.tell(event{trigger: OnMark, mark: mark})
}

// Fault tells that a vCPU touches a page that is not there, of which a vCPU that waits may
// tell again and again. It does not block, and may be called on the thread of a vCPU. A
// page that RAM does not have is ignored.
func (r *Runner) Fault(page uint64) {
	if page < r.config.Target.pages() {
		r.tell(event{trigger: OnFault, page: page})
	}
}

func (r *Runner) tell(e event) {
	if r.script != nil && len(r.script.on(e)) > 0 {
		r.events.add(e)
	}
}

// Restore gives back whatever is missing, so that all pages of RAM are mapped where they
// were at first and can be read and written, and the spare region is empty. Marks and faults
// that were not attended to are forgotten. It goes on after an error, but not once ctx is done,
// and returns all that went wrong. What it does is not recorded.
func (r *Runner) Restore(ctx context.Context) error {
	defer r.enter()()
	r.events.take()
	if err := r.host.restore(ctx); err != nil {
		return fmt.Errorf("give back guest memory: %w", err)
	}
	return nil
}

// Last returns the newest operation that had to do with a page of RAM, if there was any. One that
// failed is among them, because it may have been carried out in part; one that was
// skipped is not.
func (r *Runner) Last(page uint64) (Record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.history.last(page)
}

// Stats returns what has been done so far.
func (r *Runner) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Stats{Ops: r.ops, Kinds: maps.Clone(r.counts), Dropped: r.events.lost()}
}
