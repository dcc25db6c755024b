package vm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/trace"
)

// vcpu is one vCPU and what its thread knows.
type vcpu struct {
	m   *Machine
	id  int
	cpu *kvm.VCPU

	// tid is the vCPU's thread. It is written before the thread enters the gate
	// and read by whoever holds the gate's lock and sees the vCPU inside.
	tid int

	// What follows belongs to the vCPU's thread, and to Wait after that ended.
	exited  bool
	status  int
	pending *kvm.MMIOExit // an access that waited when the run was stopped, or nil
	faults  faults
}

// Start lets the vCPUs run, each on a thread of its own, until all have exited,
// one has failed, ctx is done, or the machine is closed. A machine whose run has
// ended without all vCPUs having exited can be started again, and goes on.
func (m *Machine) Start(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return errors.New("start a machine: it is closed")
	case !m.booted:
		return errors.New("start a machine: there is no guest in it")
	case m.off:
		return errors.New("start a machine: its guest has turned it off")
	case m.cancel != nil:
		return errors.New("start a machine: it is running")
	}
	ctx, cancel := context.WithCancel(ctx)
	m.cancel, m.done, m.err = cancel, make(chan struct{}), nil
	m.gate.restart()
	stopped := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() { m.gate.stop(); close(stopped) })

	var threads sync.WaitGroup
	for _, v := range m.vcpus {
		threads.Go(func() {
			if err := v.run(ctx); err != nil {
				m.fail(err)
			}
		})
	}
	done := m.done
	go func() {
		threads.Wait()
		if !unhook() {
			<-stopped // so that it cannot stop the next run
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if err := context.Cause(ctx); err != nil && m.err == nil && !m.exited() {
			m.err = fmt.Errorf("the run was stopped: %w", err)
		}
		cancel()
		m.cancel = nil
		close(done)
	}()
	return nil
}

// fail ends the run with err, unless it has failed already.
func (m *Machine) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
	}
	m.cancel()
}

// turnOff ends the run, with the status that the guest asks for. What it asks for later,
// on another vCPU, comes too late.
func (m *Machine) turnOff(status int) {
	m.gate.stop() // at once: the guest does not get to its next instruction
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.off {
		m.off, m.status = true, status&0xff
	}
	m.cancel()
}

// exited reports whether the guest has turned the machine off, or has exited on every vCPU.
// No vCPU thread runs.
func (m *Machine) exited() bool {
	if m.off {
		return true
	}
	for _, v := range m.vcpus {
		if !v.exited {
			return false
		}
	}
	return true
}

// Done returns a channel that is closed when the run that was started last has
// ended; nil before the first.
func (m *Machine) Done() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.done
}

// Wait returns when the run that was started last has ended. The status is the
// one that the machine was turned off with, or the
// first that is not 0 among those that vCPUs exited with, in their order. The
// error is how the run failed: an *[ExitError], what OnMark or the console
// returned, or the cause of the context.
func (m *Machine) Wait() (status int, err error) {
	done := m.Done()
	if done == nil {
		return 0, errors.New("wait for a machine: it has not been started")
	}
	<-done
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return m.status, m.err
	}
	for _, v := range m.vcpus {
		if v.status != 0 {
			return v.status, m.err
		}
	}
	return 0, m.err
}

// Run is Start and Wait.
func (m *Machine) Run(ctx context.Context) (status int, err error) {
	if err := m.Start(ctx); err != nil {
		return 0, err
	}
	return m.Wait()
}

// run runs the vCPU until its guest exits or the gate is stopped.
func (v *vcpu) run(ctx context.Context) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	v.tid = unix.Gettid()
	if e := v.pending; e != nil {
		v.pending = nil
		if err := v.touch(ctx, e); err != nil {
			return err
		}
	}
	lockorder.Wait(lockorder.MmapLock) // at the gate, which may be held throughout an invalidation
	// With an access pending the guest must not run: the context may be done
	// before the gate is stopped, and KVM would complete the access as it is.
	for !v.exited && v.pending == nil && v.m.gate.enter(v) {
		changes := v.m.memory.Changes()
		lockorder.Acquire(lockorder.Guest)
		exit, err := v.cpu.Run()
		lockorder.Release(lockorder.Guest)
		v.m.gate.leave(v)
		v.recordExit(exit, err)
		switch {
		case err == nil:
			err = v.handle(ctx, exit)
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			err = nil // a kick, or a preemption signal of the Go runtime
		case errors.Is(err, unix.EFAULT):
			err = v.handleFault(ctx, changes)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// recordExit records why the vCPU has left the guest.
func (v *vcpu) recordExit(exit kvm.Exit, err error) {
	if v.m.config.Log == nil {
		return
	}
	e := trace.Event{Kind: trace.Exit, VCPU: v.id}
	switch {
	case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		e.Name = "kick"
	case errors.Is(err, unix.EFAULT):
		e.Name = "EFAULT"
	case err != nil:
		e.Name = "failure"
	default:
		e.Name = exit.Reason().String()
	}
	if mmio, ok := exit.(*kvm.MMIOExit); ok {
		gfn := mmio.GPA.GFN()
		e.GFN, e.Acc = addr.GFNRange{Start: gfn, End: gfn + 1}, addr.Read
		if mmio.Write {
			e.Acc = addr.ReadWrite
		}
	}
	v.m.config.Log.Record(e)
}

// handle does what an exit asks for. With an error the vCPU cannot go on.
func (v *vcpu) handle(ctx context.Context, exit kvm.Exit) error {
	v.faults = faults{} // the guest got on
	switch e := exit.(type) {
	case *kvm.IOExit:
		return v.portIO(e)
	case *kvm.MMIOExit:
		if v.m.config.Board != Bare {
			if _, err := v.m.hva(e.GPA); err != nil { // it is not RAM
				v.m.devices.pc.memory(e)
				return nil
			}
		}
		return v.touch(ctx, e)
	case *kvm.DirtyRingFullExit:
		return v.m.rings.makeRoom()
	case *kvm.HLTExit:
		// There is no interrupt controller, or KVM would wait: nothing would wake it.
		v.exited = true
		return nil
	case *kvm.ShutdownExit:
		return v.exitError(exit, "the guest met a fault that it has no handler for")
	case *kvm.InternalErrorExit:
		return v.exitError(exit, "KVM could not emulate an instruction of the guest")
	default:
		return v.exitError(exit, "the machine cannot continue")
	}
}
