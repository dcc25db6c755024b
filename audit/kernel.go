package audit

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/internal/tracefs"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/trace"
	"github.com/secondmmu/gvm/vm"
)

// zaps is what KVM drops of a machine's memory, by a record of its tracepoint that is the
// audit's own: no watch has it.
type zaps struct {
	recorder   *perf.Recorder // nil: none
	clock      perf.Clock     // of the log
	start, end tracefs.Field
	of         []addr.HVARange
	waiting    []zap
	lost       uint64
	reports    []mm.Stray // that may be of what waits
	before     []mm.Stray // the same, of the epoch before: one may be read before its zap
}

type zap struct {
	at time.Duration // of the log
	r  addr.HVARange
}

// open begins to record, for RAM and spare memory.
func (z *zaps) open(m *vm.Machine, log *trace.Log) error {
	const system, name = "kvm", "kvm_unmap_hva_range"
	fs, err := tracefs.Open()
	if err != nil {
		return err
	}
	defer fs.Close()
	tp, err := fs.Tracepoint(system, name)
	if err != nil {
		return err
	}
	var errs [2]error
	z.start, errs[0] = tp.Field("start")
	z.end, errs[1] = tp.Field("end")
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	var filter []string
	for _, r := range []*mm.Region{m.RAM(), m.Spare()} {
		if r != nil {
			z.of = append(z.of, r.Range)
			filter = append(filter, fmt.Sprintf("(start < %#x && end > %#x)", uint64(r.Range.End), uint64(r.Range.Start)))
		}
	}
	z.clock = perf.NewClock(log.Start())
	z.recorder, err = perf.NewRecorder(perf.RecorderConfig{
		Tracepoints: []perf.Tracepoint{{ID: tp.ID, Filter: strings.Join(filter, " || ")}}, Pages: 64, Wakeup: 1 << 20,
	})
	return err
}

func (z *zaps) close() {
	if z.recorder != nil {
		_ = z.recorder.Close()
	}
}

// read takes what was recorded so far.
func (z *zaps) read() error {
	if z.recorder == nil {
		return nil
	}
	return z.recorder.Read(func(rec perf.Record) {
		z.lost += rec.Lost
		start, ok := z.start.Uint(rec.Raw)
		end, ok2 := z.end.Uint(rec.Raw)
		if rec.Lost > 0 || !ok || !ok2 {
			return
		}
		z.waiting = append(z.waiting, zap{z.clock.Since(rec.Time), addr.HVARange{Start: addr.HVA(start), End: addr.HVA(end)}})
	})
}

// kernel has somebody account for every range that KVM dropped: an operation at whose time
// it was, and near whose pages; or a report that came afterwards. Pages that were not mapped
// need nobody. Strays is called before. Nothing is compared where the trace has a gap.
func (a *auditor) kernel(m *vm.Machine) {
	z := &a.zaps
	for _, p := range z.waiting {
		if a.gap {
			break
		}
		a.round.Checks[Kernel]++
		if p.explained(a.ops) || p.reported(z.reports, a.log.Start()) || p.reported(z.before, a.log.Start()) || !a.mapped(m, p.r) {
			continue
		}
		a.divergeAtHVA(m, Kernel, max(p.r.Start, m.RAM().Range.Start), "KVM has dropped %v after %v, and nobody knows why", p.r, p.at)
	}
	if z.lost > 0 {
		a.diverge(Kernel, "%d records of the kernel's are lost", z.lost)
	}
	z.waiting, z.before, z.reports, z.lost = z.waiting[:0], z.reports, nil, 0
}

// explained reports whether an operation accounts for p: KVM drops up to 2 MiB where the
// kernel splits a mapping.
func (p zap) explained(ops map[uint64]*operation) bool {
	for _, o := range ops {
		if p.at < o.begin || o.end != 0 && p.at > o.end {
			continue
		}
		for _, r := range o.ranges {
			if r.Start&^(addr.HugeSize-1) < p.r.End && p.r.Start < (r.End+addr.HugeSize-1)&^(addr.HugeSize-1) {
				return true
			}
		}
	}
	return false
}

// reported reports whether a watch has told of p.
func (p zap) reported(reports []mm.Stray, start time.Time) bool {
	for _, s := range reports {
		if s.Range.Overlaps(p.r) && s.Time.Sub(start) >= p.at {
			return true
		}
	}
	return false
}

// mapped reports whether any of r is guest memory that is mapped.
func (a *auditor) mapped(m *vm.Machine, r addr.HVARange) bool {
	for _, of := range a.zaps.of {
		if part := of.Intersect(r); !part.Empty() {
			for _, x := range m.Memory().Extents(part) {
				if x.Mapped {
					return true
				}
			}
		}
	}
	return false
}

// lacks reports whether err is that the machine has no means to watch.
func lacks(err error) bool {
	_, ok := errors.AsType[*vm.WatchError](err)
	return ok && (errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission))
}
