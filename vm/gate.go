package vm

import (
	"sync"

	"golang.org/x/sys/unix"
)

// gate keeps vCPUs out of the guest while something happens that they must not
// see in the middle: QEMU's accelerator inhibit, for one machine.
//
// A vCPU is inside from enter to leave, which it calls around KVM_RUN. Hold
// raises holds, which keeps vCPUs from entering, kicks those that are inside and
// waits until there are none.
//
// A kick cannot be lost. Both sides change a vCPU's immediate-exit flag with mu
// held, enter clears it as it lets the vCPU in, and Hold sets it before it sends
// the signal: the signal finds the thread in KVM_RUN, or KVM_RUN finds the flag.
type gate struct {
	mu      sync.Mutex
	changed sync.Cond      // signalled when inside becomes empty, holds 0, or stopped true
	holds   int            // protected by mu
	inside  map[*vcpu]bool // protected by mu
	stopped bool           // vCPUs are not let in, and are not kept waiting; protected by mu
}

func (g *gate) init() {
	g.changed.L = &g.mu
	g.inside = make(map[*vcpu]bool)
}

// enter lets v into the guest, after all holds. It reports false if the gate has
// been stopped; v is not inside then.
func (g *gate) enter(v *vcpu) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.holds > 0 && !g.stopped {
		g.changed.Wait()
	}
	if g.stopped {
		return false
	}
	v.cpu.SetImmediateExit(false)
	g.inside[v] = true
	return true
}

// leave lets v out.
func (g *gate) leave(v *vcpu) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.inside, v)
	if len(g.inside) == 0 {
		g.changed.Broadcast()
	}
}

// Hold returns when no vCPU is inside, and none enters until Release. Holds
// nest. It is not called by a vCPU that is inside.
func (g *gate) Hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holds++
	g.kickLocked()
	for len(g.inside) > 0 {
		g.changed.Wait()
	}
}

// Release ends one Hold.
func (g *gate) Release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.holds == 0 {
		panic("vm: a gate is released that nobody holds")
	}
	if g.holds--; g.holds == 0 {
		g.changed.Broadcast()
	}
}

// stop makes every vCPU leave, and enter report false until restart.
func (g *gate) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = true
	g.kickLocked()
	g.changed.Broadcast()
}

func (g *gate) restart() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = false
}

// kickLocked makes every vCPU that is inside leave KVM_RUN.
//
// The signal is the one that the Go runtime preempts goroutines with: it is
// handled in every Go program, at any time, and means nothing by itself.
func (g *gate) kickLocked() {
	for v := range g.inside {
		v.cpu.SetImmediateExit(true)
		// The thread exists, because the vCPU is inside; so this cannot fail.
		_ = unix.Tgkill(unix.Getpid(), v.tid, unix.SIGURG)
	}
}
