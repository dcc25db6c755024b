package mm

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/internal/tracefs"
	"github.com/secondmmu/gvm/trace"
)

// sightSource is a tracepoint that is recorded in the log, and from which nothing follows. It
// tells of a range of host addresses, of one of them if there is only a start, or of what a
// guest has used.
type sightSource struct {
	zapSource
	gfn string // a guest frame number
	gpa string // or a guest physical address
}

// kvmSights returns the tracepoints of this host that are worth it. Which of the two of
// faults are passed depends on the host: with nested paging both.
func kvmSights() []sightSource {
	sources := []sightSource{
		{zapSource: zapSource{system: "kvm", name: "kvm_age_hva", start: "start", end: "end"}},
		{zapSource: zapSource{system: "kvm", name: "kvm_test_age_hva", start: "hva"}},
		{zapSource: zapSource{system: "kvmmmu", name: "kvm_mmu_spte_requested"}, gfn: "gfn"},
	}
	if nestedPaging() {
		sources = append(sources, sightSource{zapSource: zapSource{system: "kvm", name: "kvm_page_fault"}, gpa: "fault_address"})
	}
	return sources
}

// nestedPaging reports whether KVM has the processor translate guest physical addresses.
// Otherwise the address of a fault is a virtual one of the guest's.
func nestedPaging() bool {
	for _, file := range []string{"kvm_intel/parameters/ept", "kvm_amd/parameters/npt"} {
		if text, err := os.ReadFile("/sys/module/" + file); err == nil && strings.TrimSpace(string(text)) == "Y" {
			return true
		}
	}
	return false
}

// momentOf returns trace.Event.At of a record. What was before the log was made is as of its
// first nanosecond.
func momentOf(c perf.Clock, ns uint64) time.Duration { return max(c.Since(ns), 1) }

// sights records in the log what is seen. A nil *sights sees nothing.
type sights struct {
	log      *trace.Log
	clock    perf.Clock // its
	recorder *perf.Recorder
	points   map[uint64]sight // by ID

	ended atomic.Bool
	mu    sync.Mutex // held while records are read, by one goroutine at a time; a leaf
}

// sight is a tracepoint that is recorded.
type sight struct {
	sightSource
	first  tracefs.Field // of what it tells of
	second tracefs.Field // the end, or the length, if it has one
}

// sightsInterval is how long what is seen waits to be logged. A guest that boots faults on
// thousands of pages, and a wakeup for each would cost as much as the fault.
const sightsInterval = 10 * time.Millisecond

// openSights begins to record those of the tracepoints that there are; nil if there are none.
func openSights(log *trace.Log, clock perf.Clock, tfs *tracefs.FS, rs []addr.HVARange, sources []sightSource) (*sights, error) {
	s := &sights{log: log, clock: clock, points: map[uint64]sight{}}
	config := perf.RecorderConfig{Pages: ringPages, Wakeup: ringPages * addr.PageSize / 64 / 4} // a quarter of a ring
	for _, source := range sources {
		tp, err := tfs.Tracepoint(source.system, source.name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		p := sight{sightSource: source}
		names, fields := []string{source.start + source.gfn + source.gpa, source.end + source.length}, []*tracefs.Field{&p.first, &p.second}
		known := true
		for i, name := range names {
			if name != "" {
				*fields[i], err = tp.Field(name)
				known = known && err == nil
			}
		}
		if !known {
			continue // another kernel's tracepoint of that name
		}
		point := perf.Tracepoint{ID: tp.ID}
		if source.start != "" {
			point.Filter = source.filter(rs)
		}
		config.Tracepoints = append(config.Tracepoints, point)
		s.points[tp.ID] = p
	}
	if len(s.points) == 0 {
		return nil, nil
	}
	var err error
	if s.recorder, err = perf.NewRecorder(config); err != nil {
		return nil, err
	}
	return s, nil
}

// watch is the goroutine that logs what is seen, until end.
func (s *sights) watch() {
	for !s.ended.Load() {
		if s.recorder.Wait(sightsInterval) != nil {
			break // nothing depends on what is seen
		}
		s.read()
	}
	s.read()
	_ = s.recorder.Close()
}

// end has watch log what has been seen, and return.
func (s *sights) end() error {
	if s == nil {
		return nil
	}
	s.ended.Store(true)
	return s.recorder.Interrupt()
}

// read logs what has been seen.
func (s *sights) read() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	lost := uint64(0)
	_ = s.recorder.Read(func(rec perf.Record) { // what is cut, or closed, is not logged
		if lost += rec.Lost; rec.Lost > 0 {
			return
		}
		if e, ok := s.points[rec.ID].event(&rec); ok {
			e.At = momentOf(s.clock, rec.Time)
			s.log.Record(e)
		}
	})
	if lost > 0 {
		s.log.Record(trace.Event{Kind: trace.Kernel, Name: trace.KernelLost, Pages: lost})
	}
}

// event returns what a record tells of, if it is of guest memory of this process.
func (p sight) event(rec *perf.Record) (e trace.Event, ok bool) {
	e = trace.Event{Kind: trace.Kernel, Name: p.name}
	v, ok := p.first.Uint(rec.Raw)
	switch {
	case !ok:
	case p.gfn != "" || p.gpa != "":
		gfn := addr.GFN(v)
		if p.gpa != "" {
			gfn = addr.GPA(v).GFN()
		}
		e.GFN = addr.GFNRange{Start: gfn, End: gfn + 1}
		ok = rec.PID == os.Getpid()
	default:
		end := v + 1
		if p.end+p.length != "" {
			end, ok = p.second.Uint(rec.Raw)
		}
		if p.length != "" {
			end += v
		}
		e.HVA = pagesOf(v, end)
	}
	return e, ok
}
