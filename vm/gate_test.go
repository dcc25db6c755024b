package vm

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/kvm"
)

// newGate returns a gate and a vCPU without KVM, whose kicks go to this thread.
func newGate() (*gate, *vcpu) {
	g := new(gate)
	g.init()
	return g, &vcpu{cpu: new(kvm.VCPU), tid: unix.Gettid()}
}

// returns reports whether f returns, and waits for it a while if it should.
func returns(done chan struct{}, should bool) bool {
	patience := 10 * time.Millisecond
	if should {
		patience = 30 * time.Second
	}
	select {
	case <-done:
		return true
	case <-time.After(patience):
		return false
	}
}

func async(f func()) chan struct{} {
	done := make(chan struct{})
	go func() { f(); close(done) }()
	return done
}

func TestGate(t *testing.T) {
	g, v := newGate()
	if !g.enter(v) {
		t.Fatal("an open gate lets nobody in")
	}
	held := async(g.Hold)
	if returns(held, false) {
		t.Error("Hold returned with a vCPU inside")
	}
	g.leave(v)
	if !returns(held, true) {
		t.Fatal("Hold waits with no vCPU inside")
	}
	g.Hold()
	entered := async(func() { g.enter(v) })
	g.Release()
	if returns(entered, false) {
		t.Error("a vCPU entered with one of two holds left")
	}
	g.Release()
	if !returns(entered, true) {
		t.Fatal("a vCPU waits at a gate that nobody holds")
	}
	g.leave(v)

	g.Hold()
	var let bool
	entered = async(func() { let = g.enter(v) })
	g.stop()
	if !returns(entered, true) || let {
		t.Error("a stopped gate keeps a vCPU waiting, or lets it in")
	}
	g.restart()
	g.Release()
	if !g.enter(v) {
		t.Error("a gate that was restarted lets nobody in")
	}
	g.leave(v)

	defer func() {
		if recover() == nil {
			t.Error("a release without a hold goes unnoticed")
		}
	}()
	g.Release()
}

// pausing calls Pause and returns when it has begun to keep others out.
func pausing(g *gate) (paused chan struct{}) {
	paused = async(g.Pause)
	for begun := false; !begun; time.Sleep(100 * time.Microsecond) {
		g.mu.Lock()
		begun = g.pauses > 0
		g.mu.Unlock()
	}
	return paused
}

// TestGateAccesses has a vCPU's thread complete accesses while the gate is held,
// and while the machine is paused.
func TestGateAccesses(t *testing.T) {
	g, v := newGate()
	if !g.begin() {
		t.Fatal("an open gate keeps an access out")
	}
	held := async(g.Hold)
	if !returns(held, true) {
		t.Fatal("Hold waits for an access, which may be waiting for its invalidation")
	}
	g.Release()
	paused := pausing(g)
	if returns(paused, false) {
		t.Error("Pause returned in the middle of an access")
	}
	g.end()
	if !returns(paused, true) {
		t.Fatal("Pause waits with no access in progress")
	}

	g.Pause()
	begun := async(func() { g.begin() })
	entered := async(func() { g.enter(v) })
	g.Resume()
	if returns(begun, false) || returns(entered, false) {
		t.Error("an access or a vCPU was let in with one of two pauses left")
	}
	g.Resume()
	if !returns(begun, true) || !returns(entered, true) {
		t.Fatal("an access or a vCPU waits for a pause that is over")
	}
	g.end()
	g.leave(v)

	g.Hold()
	if !g.begin() {
		t.Error("a hold keeps an access out")
	}
	g.end()
	g.Release()

	g.Pause()
	var let bool
	begun = async(func() { let = g.begin() })
	g.stop()
	if !returns(begun, true) || let {
		t.Error("a stopped gate keeps an access waiting for a pause, or lets it in")
	}
	g.Resume()
	if !g.begin() {
		t.Error("an access that need not wait is kept out by a stopped gate")
	}
	g.end()

	defer func() {
		if recover() == nil {
			t.Error("a resume without a pause goes unnoticed")
		}
	}()
	g.Hold()
	g.Resume()
}

// TestKickBeforeRun holds the gate between a vCPU's entry and its KVM_RUN. The
// signal of the kick is spent by then; KVM_RUN has to return all the same.
func TestKickBeforeRun(t *testing.T) {
	m := newMachine(t, Config{}, "spin", nil)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	v := m.vcpus[0]
	v.tid = unix.Gettid()
	for range 100 {
		if !m.gate.enter(v) {
			t.Fatal("the gate is closed")
		}
		held := async(m.gate.Hold)
		for spun := false; !spun; {
			m.gate.mu.Lock()
			spun = m.gate.holds > 0
			m.gate.mu.Unlock()
		}
		rescue := time.AfterFunc(hangs, func() {
			t.Error("KVM_RUN did not see the kick")
			v.cpu.SetImmediateExit(true)
			_ = unix.Tgkill(unix.Getpid(), v.tid, unix.SIGURG)
		})
		_, err := v.cpu.Run()
		rescue.Stop()
		if !errors.Is(err, unix.EINTR) {
			t.Fatalf("KVM_RUN after a kick returned %v, want EINTR", err)
		}
		m.gate.leave(v)
		<-held
		m.gate.Release()
		if t.Failed() {
			break
		}
	}
}

// TestPendingAccessKeepsTheGuestOut cancels the run's context without stopping
// the gate, which comes a moment later: the vCPU must not enter the guest with
// an access that is not completed.
func TestPendingAccessKeepsTheGuestOut(t *testing.T) {
	m := newMachine(t, Config{Touch: Wait}, "counter", guests.Args{"pages": 2, "rounds": 100})
	if err := m.Memory().Unmap(m.hvas(1, 1)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	v := m.vcpus[0]
	for range 3 {
		if err := v.run(ctx); err != nil {
			t.Fatal(err)
		}
		if v.pending == nil || v.pending.Write {
			t.Fatalf("the pending access is %v, want the read of the first increment", v.pending)
		}
	}
	if err := m.Memory().Map(m.hvas(1, 1)); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m)
	if got := m.mustLoad(t, gpaOf(1)); got != 100 {
		t.Errorf("the page counts %d, want 100", got)
	}
}
