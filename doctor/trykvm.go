package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/vm"
)

// tryKVM makes a VM and asks it for what it can.
func tryKVM() (capabilities, error) {
	sys, err := kvm.Open()
	if err != nil {
		return nil, err
	}
	defer sys.Close()
	m, err := sys.CreateVM()
	if err != nil {
		return nil, err
	}
	defer m.Close()
	caps := make(capabilities)
	for _, u := range usedCapabilities {
		if caps[u.cap], err = m.CheckExtension(u.cap); err != nil {
			return nil, err
		}
	}
	for _, c := range []kvm.Cap{kvm.CapNrVCPUs, kvm.CapMaxVCPUs} {
		if caps[c], err = m.CheckExtension(c); err != nil {
			return nil, err
		}
	}
	return caps, nil
}

// timeGuest takes one of kvmMeasures, by its name, in nanoseconds.
func timeGuest(ctx context.Context, measure string) (float64, error) {
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	const ring0 = true
	switch measure {
	case instructionCPL3:
		ns, err := timeStep(ctx, "loop", "iterations", !ring0)
		return ns / instructionsPerLoop, err
	case instructionCPL0:
		ns, err := timeStep(ctx, "loop", "iterations", ring0)
		return ns / instructionsPerLoop, err
	case exitCPL3:
		return timeStep(ctx, "exits", "exits", !ring0)
	case exitCPL0:
		return timeStep(ctx, "exits", "exits", ring0)
	case bootHello:
		return medianOf(7, func() (time.Duration, error) { return timeBoot(ctx) })
	case kickVCPU:
		return timeRunning(ctx, "spin", nil, 51, func(m *vm.Machine) (time.Duration, error) {
			start := time.Now()
			m.Pause()
			d := time.Since(start)
			m.Resume()
			return d, nil
		})
	case slotCut:
		return timeRunning(ctx, "spin", nil, 25, func(m *vm.Machine) (time.Duration, error) {
			page := addr.HVAs(m.RAM().Range.Start+machineRAM/2, addr.PageSize)
			start := time.Now()
			err := errors.Join(m.Memory().Unmap(page), m.Memory().Map(page))
			return time.Since(start), err
		})
	case discardRunning:
		return timeRunning(ctx, "stamp", guests.Args{"pages": 1}, 51, func(m *vm.Machine) (time.Duration, error) {
			page := addr.HVAs(m.RAM().Range.Start, addr.PageSize)
			start := time.Now()
			err := m.Memory().Discard(page)
			return time.Since(start), err
		})
	}
	return 0, fmt.Errorf("there is no measure %q", measure)
}

const (
	machineRAM          = 16 << 20
	instructionsPerLoop = 2 // of the guest loop
)

// newMachine makes a machine with a guest in it.
func newMachine(guest string, args guests.Args, ring0 bool) (*vm.Machine, error) {
	g, err := guests.Lookup(guest)
	if err != nil {
		return nil, err
	}
	m, err := vm.New(vm.Config{RAM: machineRAM, Ring0: ring0})
	if err != nil {
		return nil, err
	}
	if err := m.Boot(g, args); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// timeRun returns how long a guest runs to its end.
func timeRun(ctx context.Context, guest string, args guests.Args, ring0 bool) (time.Duration, error) {
	m, err := newMachine(guest, args, ring0)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	start := time.Now()
	_, err = m.Run(ctx)
	return time.Since(start), err
}

// timeBoot returns how long it takes from nothing to the end of a guest.
func timeBoot(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	m, err := newMachine("hello", nil, false)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	_, err = m.Run(ctx)
	return time.Since(start), err
}

// timeStep returns how long a guest takes for one of its steps, whose number is
// its parameter. It does so many that starting it does not count, and not so
// many more that it takes long where it is emulated.
func timeStep(ctx context.Context, guest, steps string, ring0 bool) (float64, error) {
	const enough = 5 * time.Millisecond
	n := uint64(100)
	run := func() (time.Duration, error) {
		return timeRun(ctx, guest, guests.Args{steps: n}, ring0)
	}
	for {
		d, err := run()
		if err != nil {
			return 0, err
		}
		if d >= enough {
			break
		}
		n *= 4
	}
	ns, err := medianOf(3, run)
	return ns / float64(n), err
}

// timeRunning returns the median of n results of f, each for a machine whose
// guest is running and has got on since the result before.
func timeRunning(ctx context.Context, guest string, args guests.Args, n int, f func(*vm.Machine) (time.Duration, error)) (float64, error) {
	m, err := newMachine(guest, args, false)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	if err := m.Start(ctx); err != nil {
		return 0, err
	}
	return medianOf(n, func() (time.Duration, error) {
		if err := awaitProgress(m); err != nil {
			return 0, err
		}
		return f(m)
	})
}

// awaitProgress returns when the guest has begun and ended one more step.
func awaitProgress(m *vm.Machine) error {
	before, err := m.Result(0, 0)
	now := before
	for n := 0; err == nil && now < before+2; n++ {
		select {
		case <-m.Done():
			_, err := m.Wait()
			return cmp.Or(err, errors.New("the guest has ended"))
		default:
		}
		// A step takes microseconds, and whoever sleeps may wake on the CPU of the
		// guest, which is then not running when it is measured. But this may be
		// the only CPU.
		if n < 1000 {
			runtime.Gosched()
		} else {
			time.Sleep(20 * time.Microsecond)
		}
		now, err = m.Result(0, 0)
	}
	return err
}

// medianOf returns the median of n results of f, in nanoseconds.
func medianOf(n int, f func() (time.Duration, error)) (float64, error) {
	times := make([]time.Duration, n)
	for i := range times {
		var err error
		if times[i], err = f(); err != nil {
			return 0, err
		}
	}
	return float64(median(times)), nil
}

// median sorts times and returns the one in the middle.
func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}
