package hmm

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/notifier"
)

// The invariants M1 to M18 have a test each, named for them. Where one is about what a
// schedule does, it is a check: a function that makes the schedule step by step, and
// returns an error if the package breaks the invariant. The checks run as tests on the
// package as it is, and in TestMutants with a defect.

// consumer has the driver's lock checked against the order.
func (d *device) lock() {
	lockorder.Acquire(lockorder.Consumer)
	d.mu.Lock()
}

func (d *device) unlock() {
	d.mu.Unlock()
	lockorder.Release(lockorder.Consumer)
}

// world is an address space with a registry of its own, page tables, and what was found
// to be wrong.
type world struct {
	*notifier.AddressSpace
	mutant mutant
	reg    *registry
	tables *model
	file   *notifier.ReverseMap // of all regions: under its lock brackets need no mapping lock

	mu      sync.Mutex // protects what follows
	wrong   []error
	reports []error
	hmms    map[*HMM]int // how often each was freed
}

func newWorld(m mutant, regions ...region) *world {
	w := &world{mutant: m, reg: newRegistry(), tables: newModel(regions...), file: notifier.NewReverseMap(notifier.FileMap), hmms: map[*HMM]int{}}
	w.AddressSpace = notifier.New(notifier.Options{Report: func(err error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.reports = append(w.reports, err)
	}})
	w.reg.mutant = m
	w.reg.free = func(h *HMM) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.hmms[h]++
	}
	w.Lock()
	w.AddRegion(&notifier.Region{Range: at(0, 1), Maps: []*notifier.ReverseMap{w.file}})
	w.Unlock()
	w.tables.bracket = func(r addr.HVARange, change func()) { w.bracket(r, change) }
	return w
}

func (w *world) errorf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.wrong) < 8 {
		w.wrong = append(w.wrong, fmt.Errorf(format, args...))
	}
}

// must adds err, if there is one, to what is wrong.
func (w *world) must(err error) {
	if err != nil {
		w.errorf("%w", err)
	}
}

func (w *world) broken() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.wrong)+len(w.reports) > 0
}

// err returns what is wrong, and what was reported.
func (w *world) err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return errors.Join(append(slices.Clone(w.wrong), w.reports...)...)
}

// freed returns how often an HMM was freed, in all.
func (w *world) freed() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, times := range w.hmms {
		n += times
	}
	return n
}

// background is gvmtest.Background. A panic is something that is wrong.
func (w *world) background(f func()) <-chan struct{} {
	return gvmtest.Background(func() {
		defer func() {
			if p := recover(); p != nil {
				w.errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		f()
	})
}

// guard is background, and waits. A goroutine that panics takes with it what the check of
// the lock order takes it to hold.
func (w *world) guard(f func()) { <-w.background(f) }

// bracket runs change in a bracket of r under the lock of the file.
func (w *world) bracket(r addr.HVARange, change func()) {
	w.must(w.invalidate(&notifier.Invalidation{Range: r, Event: notifier.Clear, After: addr.ReadWrite}, change))
}

func (w *world) invalidate(inv *notifier.Invalidation, change func()) error {
	w.file.RLock()
	defer w.file.RUnlock()
	if err := w.InvalidateRangeStart(inv); err != nil {
		return err
	}
	defer w.InvalidateRangeEnd(inv)
	if change != nil {
		change()
	}
	return nil
}

// pulse gives the pages of r another content.
func (w *world) pulse(r addr.HVARange) {
	w.bracket(r, func() { w.tables.set(r, PTEPresent|PTEWritable) })
}

func (w *world) register(d *device) {
	w.must(w.reg.register(context.Background(), &d.Mirror, w.AddressSpace, d))
}

// newMirror registers a device.
func (w *world) newMirror() *device {
	d := newDevice(w.tables)
	w.register(d)
	return d
}

// newInterval inserts a device.
func (w *world) newInterval(r addr.HVARange) *device {
	d := newDevice(w.tables)
	w.must(w.Insert(context.Background(), d, r.Start, r.Bytes()))
	return d
}

// newRange returns a range that asks for what asked says.
func (w *world) newRange(r addr.HVARange, asked Entry) *Range {
	return &Range{Range: r, Tables: w.tables, Entries: make([]Entry, r.NPages()), Default: asked, Owner: theDevice}
}

// begun is newRange and Begin.
func (w *world) begun(r addr.HVARange, asked Entry) *Range {
	x := w.newRange(r, asked)
	w.must(w.reg.begin(x, w.AddressSpace))
	return x
}

// newRequest returns a request that asks for what asked says.
func (w *world) newRequest(d *device, r addr.HVARange, asked Entry) *Request {
	return &Request{
		Range: r, Tables: w.tables, AddressSpace: w.AddressSpace, Interval: d, Entries: make([]Entry, r.NPages()),
		Default: asked, Owner: theDevice, mutant: w.mutant,
	}
}

// reading runs f with the mapping lock held for reading.
func (w *world) reading(f func()) {
	w.RLock()
	defer w.RUnlock()
	f()
}

// refs compares the references of the HMM with what they are to be.
func (w *world) refs(when string, h *HMM, want int64) {
	if got := h.refs.Load(); got != want {
		w.errorf("%s there are %d references, want %d", when, got, want)
	}
	w.must(h.Check())
}

// exit gives the first user back, and checks that nothing keeps the structure.
func (w *world) exit() { w.must(w.PutUser()) }

// close ends a check: the address space exits, unless it has, and nothing is to be left
// of it, nor of its HMM.
func (w *world) close() {
	if w.Stats().Users > 0 {
		w.exit()
	}
	notifier.Synchronize()
	if st := w.Stats(); st.Users != 0 || st.Count != 0 {
		w.errorf("at the end there are %d users, and the count is %d; want 0", st.Users, st.Count)
	}
	if n := len(w.reg.hmms); n != 0 {
		w.errorf("at the end %d HMMs can be found", n)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for h, times := range w.hmms {
		if times != 1 || h.refs.Load() != 0 {
			w.wrong = append(w.wrong, fmt.Errorf("an HMM was freed %d times, with %d references", times, h.refs.Load()))
		}
	}
}

// finish is close and err, for a check that has found nothing wrong yet. Otherwise what
// is left is not looked at: it may be anything.
func (w *world) finish() error {
	if !w.broken() {
		w.guard(w.close)
	}
	return w.err()
}

// stop is a place where a schedule holds somebody up.
type stop struct{ reached, leave chan struct{} }

func newStop() *stop { return &stop{make(chan struct{}), make(chan struct{})} }

// pass is called by who is held up, once.
func (s *stop) pass() {
	close(s.reached)
	<-s.leave
}

// once returns a step function that holds the first one up that comes to a step.
func (s *stop) once(step string) func(string, *HMM) {
	var met atomic.Bool
	return func(name string, _ *HMM) {
		if name == step && met.CompareAndSwap(false, true) {
			s.pass()
		}
	}
}

// soon returns a context that is done soon, so that what waits comes back.
func soon() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), time.Millisecond)
}

// pass fails the test if a check returns an error.
func pass(t *testing.T, checks ...func(mutant) error) {
	t.Helper()
	for _, check := range checks {
		if err := check(sound); err != nil {
			t.Error(err)
		}
	}
}
