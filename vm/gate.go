package vm

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/internal/lockorder"
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
//
// An access that the guest began and a vCPU's thread completes from outside is
// the guest's all the same. The thread calls begin and end around each try. Pause
// is a Hold for whoever wants the guest's memory to stand still, and waits for
// such accesses too:
//
//	vCPU's thread                    Pause
//	begin: accesses++
//	                                 pauses++
//	the access                       waits for accesses == 0
//	end: accesses--
//	                                 returns
//	begin waits for pauses == 0
//
// Hold, which comes from inside an invalidation, does not wait for them. It must
// not: begin is outside of the mapping lock, and a try inside waits for the
// invalidation to end. It need not: an access that holds the mapping lock is not
// there at the time, and one that will get it comes after the change. Between
// tries, while an access waits for a page, it does not count: so whoever pauses
// the guest may take its time, and may give the page back.
type gate struct {
	mu       sync.Mutex
	changed  sync.Cond        // signalled when inside becomes empty, or smaller while there are flushes, and when accesses, holds or pauses 0, or stopped true
	holds    int              // Pauses are counted too; protected by mu
	pauses   int              // protected by mu
	accesses int              // tries between begin and end; protected by mu
	needed   bool             // a vCPU was inside, or has come, since holds began; protected by mu
	since    time.Time        // when holds began; protected by mu
	paused   PauseStats       // protected by mu
	flushes  int              // goroutines that wait in flush; protected by mu
	entries  uint64           // of vCPUs, so far; protected by mu
	inside   map[*vcpu]uint64 // which of the entries it was; protected by mu
	stopped  bool             // vCPUs are not let in, and are not kept waiting; protected by mu
}

func (g *gate) init() {
	g.changed.L = &g.mu
	g.inside = make(map[*vcpu]uint64)
}

// enter lets v into the guest, after all holds. It reports false if the gate has
// been stopped; v is not inside then.
func (g *gate) enter(v *vcpu) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.holds > 0 && !g.stopped {
		g.needed = true
		g.changed.Wait()
	}
	if g.stopped {
		return false
	}
	v.cpu.SetImmediateExit(false)
	g.entries++
	g.inside[v] = g.entries
	return true
}

// leave lets v out.
func (g *gate) leave(v *vcpu) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.inside, v)
	if len(g.inside) == 0 || g.flushes > 0 {
		g.changed.Broadcast()
	}
}

// flush returns when every vCPU that was inside when it was called has left the guest
// once since. It may be inside again.
func (g *gate) flush() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flushes++
	defer func() { g.flushes-- }()
	last := g.entries
	g.kickLocked()
	for g.anyInsideLocked(last) {
		g.changed.Wait()
	}
}

// anyInsideLocked reports whether a vCPU is inside since the last of the entries, or an
// earlier one.
func (g *gate) anyInsideLocked(last uint64) bool {
	for _, entry := range g.inside {
		if entry <= last {
			return true
		}
	}
	return false
}

// begin lets a vCPU's thread try an access of the guest, after all pauses. It
// reports false if the gate has been stopped before that; the access stays
// pending then.
//
// Preconditions: those of waiting for the mapping lock, which the try takes. A
// Hold does not keep it out.
func (g *gate) begin() bool {
	lockorder.Wait(lockorder.MmapLock) // whoever has paused the guest may want any lock before it resumes
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.pauses > 0 && !g.stopped {
		g.changed.Wait()
	}
	if g.pauses > 0 {
		return false
	}
	g.accesses++
	return true
}

// end ends a try that begin has let in.
func (g *gate) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.accesses--; g.accesses == 0 {
		g.changed.Broadcast()
	}
}

// Hold returns when no vCPU is inside, and none enters until Release. Holds
// nest. It is not called by a vCPU that is inside.
func (g *gate) Hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holdLocked()
	for len(g.inside) > 0 {
		g.changed.Wait()
	}
}

func (g *gate) holdLocked() {
	if g.holds++; g.holds == 1 {
		g.since, g.needed = time.Now(), len(g.inside) > 0
	}
	g.kickLocked()
}

// Release ends one Hold.
func (g *gate) Release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.releaseLocked()
}

func (g *gate) releaseLocked() {
	if g.holds == 0 {
		panic("vm: a gate is released that nobody holds")
	}
	if g.holds--; g.holds == 0 {
		if g.needed {
			g.paused.add(time.Since(g.since))
		}
		g.changed.Broadcast()
	}
}

// Pause is Hold, and no access is tried on a vCPU's behalf either when it
// returns, nor until Resume. It is not called by a vCPU's thread between begin
// and end.
//
// Preconditions: no mapping lock is held, nor any lock that is taken inside of
// one: a try may be waiting for it.
func (g *gate) Pause() {
	lockorder.Wait(lockorder.MmapLock)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holdLocked()
	g.pauses++
	for len(g.inside) > 0 || g.accesses > 0 {
		g.changed.Wait()
	}
}

// Resume ends one Pause.
func (g *gate) Resume() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pauses == 0 {
		panic("vm: a machine is resumed that nobody has paused")
	}
	if g.pauses--; g.pauses == 0 {
		g.changed.Broadcast()
	}
	g.releaseLocked()
}

// stats returns how long vCPUs have been kept out so far.
func (g *gate) stats() PauseStats {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.paused.Since(PauseStats{})
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
