package vm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
)

// Probe has the built-in guest probe load and store on one vCPU, so that a
// program can ask what a guest sees. It is used by one goroutine at a time,
// while the machine runs.
type Probe struct {
	m      *Machine
	vcpu   int
	posted uint64
}

// Probe returns the probe of a vCPU, whose guest is probe.
func (m *Machine) Probe(vcpu int) *Probe { return &Probe{m: m, vcpu: vcpu} }

// Load has the guest load the 8 bytes at gpa and returns what it got.
func (p *Probe) Load(ctx context.Context, gpa addr.GPA) (uint64, error) {
	if err := p.do(ctx, guests.ProbeLoad, gpa, 0); err != nil {
		return 0, err
	}
	return p.m.Result(p.vcpu, guests.ProbeResult)
}

// Store has the guest store v in the 8 bytes at gpa.
func (p *Probe) Store(ctx context.Context, gpa addr.GPA, v uint64) error {
	return p.do(ctx, guests.ProbeStore, gpa, v)
}

// Add has the guest add v to the 8 bytes at gpa.
func (p *Probe) Add(ctx context.Context, gpa addr.GPA, v uint64) error {
	return p.do(ctx, guests.ProbeAdd, gpa, v)
}

// Exit has the guest exit with a status, and does not wait for it.
func (p *Probe) Exit(status int) error {
	return p.post(guests.ProbeExit, 0, uint64(status))
}

var errEnded = errors.New("the machine's run has ended")

// do posts a request and returns when the guest has carried it out. An error is
// that of ctx, or says that the run ended before.
func (p *Probe) do(ctx context.Context, op uint64, gpa addr.GPA, value uint64) error {
	if err := p.post(op, gpa, value); err != nil {
		return err
	}
	done := p.m.Done()
	for n := 0; ; n++ {
		progress, err := p.m.Result(p.vcpu, 0)
		if err != nil {
			return err
		}
		if progress == p.posted {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-done:
			return fmt.Errorf("probe %v: %w", gpa, errEnded)
		default:
		}
		// The guest answers in well under a microsecond unless it has to fault.
		if n < 100 {
			runtime.Gosched()
		} else {
			time.Sleep(20 * time.Microsecond)
		}
	}
}

func (p *Probe) post(op uint64, gpa addr.GPA, value uint64) error {
	p.posted++
	for _, w := range []struct {
		word int
		v    uint64
	}{
		{guests.ProbeOp, op}, {guests.ProbeAddr, uint64(gpa)}, {guests.ProbeValue, value},
		{guests.ProbePosted, p.posted}, // last: the guest takes it as the word that the others are there
	} {
		if err := p.m.Store64(guests.ResultGPA(p.vcpu, w.word), w.v); err != nil {
			return err
		}
	}
	return nil
}
