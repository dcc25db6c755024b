package audit

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/trace"
	"github.com/secondmmu/gvm/vm"
)

// others is what others did to a machine's memory, and what its watches said of it, since
// the two were last compared.
type others struct {
	own addr.HVARange // the pages that only others change; immutable once they begin

	mu      sync.Mutex // protects what follows; a leaf
	changes []hostops.StrayRecord
	reports []mm.Stray
}

func (o *others) made(r hostops.StrayRecord) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.changes = append(o.changes, r)
}

func (o *others) followed(s mm.Stray) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reports = append(o.reports, s)
}

func (o *others) take() (changes []hostops.StrayRecord, reports []mm.Stray) {
	o.mu.Lock()
	defer o.mu.Unlock()
	changes, reports = o.changes, o.reports
	o.changes, o.reports = nil, nil
	return changes, reports
}

// writer stores to RAM by the machine's table, at any of its frames.
type writer struct {
	m     *vm.Machine
	pages uint64
	rng   *rand.Rand
}

func (w *writer) Step(context.Context) error {
	for range 16 {
		gpa := guests.RAMBase + addr.GPA(w.rng.Uint64N(w.pages)<<addr.PageShift+8*w.rng.Uint64N(addr.PageSize/8))
		if err := w.m.Store64(gpa, w.rng.Uint64()); err != nil && !errors.Is(err, unix.EFAULT) { // it may not be there
			return err
		}
	}
	return nil
}

func (w *writer) Restore(context.Context) error { return nil }

// operation is one of the machine's own, as the trace has it: in ranges, each as large as
// KVM may drop for it.
type operation struct {
	begin, end time.Duration
	ranges     []addr.HVARange
}

// operations adds to a.ops those that the trace has new.
func (a *auditor) operations() {
	all, lost := a.log.Since(a.seen)
	a.gap = a.gap || lost > 0
	for i := range all {
		e := &all[i]
		a.seen = e.Seq
		switch op := a.ops[e.Op]; {
		case e.Op == 0:
		case e.Kind == trace.HostOp && !isStray(e.Name):
			a.ops[e.Op] = &operation{begin: e.Time, ranges: []addr.HVARange{e.HVA}}
		case op == nil:
		case e.Kind == trace.InvalidateStart:
			op.ranges = append(op.ranges, e.HVA)
		case e.Kind == trace.HostOpEnd:
			op.end = e.Time
		}
	}
}

// isStray reports whether an operation of the trace is a change by others.
func isStray(name string) bool { return strings.HasPrefix(name, string(mm.OpStray)) }

// strays compares what others did with what was reported of it. On pages that only they
// change, each change that the kernel tells of was followed once, neither more nor less often.
// Elsewhere an operation may be in the middle of the same thing: the kernel's message is
// taken for its own, or the other way round, or the mapping is so new that the kernel has
// none. The operation announces at least as much then. There each report has a change, and
// each change a report, or an operation.
func (a *auditor) strays(m *vm.Machine) {
	changes, reports := a.others.take()
	for _, c := range changes {
		a.strayKinds[c.Kind]++
	}
	a.zaps.reports = append(a.zaps.reports, reports...)
	for _, s := range reports {
		if s.Err != nil {
			a.divergeAtHVA(m, Strays, s.Range.Start, "%v", s)
		}
	}
	if a.watch&vm.WatchEvents == 0 {
		return
	}
	made, told := map[addr.HVA]int{}, map[addr.HVA]int{}
	for _, c := range changes {
		if c.Told() {
			made[c.Range.Start]++
		}
	}
	for _, s := range reports {
		if s.Evidence != mm.Event {
			continue
		}
		justified := false
		for hva := s.Range.Start; hva < s.Range.End; hva += addr.PageSize {
			told[hva]++
			justified = justified || made[hva] > 0
		}
		a.round.Checks[Strays]++
		if !justified {
			a.divergeAtHVA(m, Strays, s.Range.Start, "nobody has made this: %v", s)
		}
	}
	for hva, n := range made {
		switch a.round.Checks[Strays]++; {
		case a.others.own.Contains(addr.HVAs(hva, addr.PageSize)):
			if told[hva] != n {
				a.divergeAtHVA(m, Strays, hva, "others have changed %v %d times, and %d changes were followed", hva, n, told[hva])
			}
		case told[hva] == 0 && !a.gap && !a.operated(hva):
			a.divergeAtHVA(m, Strays, hva, "others have changed %v %d times, and none of that was followed", hva, n)
		}
	}
}

// operated reports whether one of the operations was of the page at hva.
func (a *auditor) operated(hva addr.HVA) bool {
	for _, o := range a.ops {
		for _, r := range o.ranges {
			if r.Contains(addr.HVAs(hva, addr.PageSize)) {
				return true
			}
		}
	}
	return false
}

// divergeAtHVA is divergeAt for the frame that shows hva, if one does.
func (a *auditor) divergeAtHVA(m *vm.Machine, view View, hva addr.HVA, format string, args ...any) {
	for w := range m.Slots().Windows() {
		if r := addr.HVAs(w.HVA, w.NPages<<addr.PageShift); r.Contains(addr.HVAs(hva, addr.PageSize)) {
			a.divergeAt(view, w.GFN+addr.GFN((hva-w.HVA)>>addr.PageShift), format, args...)
			return
		}
	}
	a.diverge(view, format, args...)
}
