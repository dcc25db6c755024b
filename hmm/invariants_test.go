package hmm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

const asked, askedWrite = ReqFault, ReqFault | ReqWrite

// TestM1ReferencesAddUp: the references of an HMM are those of its mirrors, its ranges
// and whoever holds one, after every step.
func TestM1ReferencesAddUp(t *testing.T) { pass(t, checkReferences, checkRefusalPuts) }

func checkReferences(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		h := w.reg.lookup(w.AddressSpace, byHolder)
		w.refs("with a mirror and a holder", h, 2)
		other := w.newMirror()
		w.refs("with another mirror", h, 3)
		h.Get()
		w.refs("after Get", h, 4)
		r := w.begun(at(0, 4), asked)
		w.refs("after Begin", h, 5)
		w.reading(func() {
			if n, err := r.Snapshot(); n != 4 || err != nil {
				w.errorf("Snapshot returned %d, %v", n, err)
			}
		})
		w.refs("after Snapshot", h, 5)
		w.bracket(at(2, 4), nil)
		w.refs("after a bracket", h, 5)
		if r.Done() {
			w.errorf("after a bracket Done reports true")
		}
		w.refs("after Done", h, 4)
		if r.Done() {
			w.errorf("a second Done reports true")
		}
		w.refs("after a second Done", h, 4)
		w.tables.setRegions(region{at(0, 8), addr.NoAccess, RegionMapped})
		err := w.reg.populate(context.Background(), r, w.AddressSpace, d, nil)
		if !errors.Is(err, syscall.EPERM) {
			w.errorf("Populate of what is not readable returned %v", err)
		}
		w.refs("after a Populate that failed", h, 4)
		h.Put()
		other.Unregister()
		w.refs("with a mirror and a holder again", h, 2)
		h.Put()
		d.Unregister()
	})
	return w.finish()
}

// checkRefusalPuts has a bracket refused while the list of mirrors is being changed.
func checkRefusalPuts(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		h := d.hmm.Load()
		h.mirrorsLock.Lock()
		err := w.invalidate(&notifier.Invalidation{Range: at(0, 1), Event: notifier.Clear, NonBlockable: true}, nil)
		h.mirrorsLock.Unlock()
		if !errors.Is(err, syscall.EAGAIN) {
			w.errorf("the bracket was opened although the syncer would have slept: %v", err)
		}
		w.refs("after a refusal", h, 1)
		d.Unregister()
	})
	return w.finish()
}

// TestM2FreedOnceAfterAGracePeriod: an HMM is freed once, when nobody walks the chain any
// more who may stand on it, and the count of the address space is what it was.
func TestM2FreedOnceAfterAGracePeriod(t *testing.T) { pass(t, checkFreedAfterGracePeriod) }

// checkFreedAfterGracePeriod puts the last reference while somebody stands on a node.
func checkFreedAfterGracePeriod(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		on := newStop()
		w.reg.step = on.once("syncer start")
		bracket := w.background(func() { w.bracket(at(0, 1), nil) })
		<-on.reached
		d.Unregister()
		if n := w.freed(); n != 0 {
			w.errorf("the HMM is freed under somebody who walks the chain")
		}
		if h := w.reg.lookup(w.AddressSpace, byHolder); h != nil {
			w.errorf("after the last Put the HMM is still found")
		}
		close(on.leave)
		<-bracket
		notifier.Synchronize()
		if n := w.freed(); n != 1 {
			w.errorf("the HMM was freed %d times", n)
		}
		if n := w.Stats().Count; n != 1 {
			w.errorf("the count of the address space is %d, want that of its users", n)
		}
	})
	return w.finish()
}

// TestM3OneHMM: at most one HMM of an address space can be found, and however many want
// to make it get the same.
func TestM3OneHMM(t *testing.T) {
	pass(t, checkOneHMM, checkHalfMade, checkDyingIsNotFound, checkSuccessorStays, checkCallbackOfADyingHMM)
}

// checkOneHMM has several find none at the same time.
func checkOneHMM(m mutant) error {
	const creators = 4
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		var none, all sync.WaitGroup
		none.Add(creators)
		w.reg.step = func(name string, _ *HMM) {
			if name == "absent" {
				none.Done()
				none.Wait()
			}
		}
		devices := make([]*device, creators)
		for i := range devices {
			devices[i] = newDevice(w.tables)
			all.Go(func() { w.register(devices[i]) })
		}
		all.Wait()
		h := w.reg.lookup(w.AddressSpace, byHolder)
		for _, d := range devices {
			if d.hmm.Load() != h {
				w.errorf("a mirror has the HMM %p, and %p is found", d.hmm.Load(), h)
			}
		}
		w.refs("with those who met", h, creators+1)
		if w.broken() {
			return
		}
		h.Put()
		for _, d := range devices {
			d.Unregister()
		}
	})
	return w.finish()
}

// checkHalfMade looks for an HMM whose notifiers are not registered yet.
func checkHalfMade(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		w.reg.step = func(name string, _ *HMM) {
			if name != "allocated" && name != "half registered" && name != "registered" {
				return
			}
			if h := w.reg.lookup(w.AddressSpace, byHolder); h != nil {
				w.errorf("the HMM is found when it is %s", name)
				h.Put()
			}
		}
		w.newMirror().Unregister()
	})
	return w.finish()
}

// checkDyingIsNotFound looks for an HMM whose last reference has just been put.
func checkDyingIsNotFound(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		w.reg.step = func(name string, _ *HMM) {
			if name == "zero" && w.reg.lookup(w.AddressSpace, byHolder) != nil {
				w.errorf("an HMM is found whose last reference has been put")
			}
		}
		w.newMirror().Unregister()
	})
	return w.finish()
}

// checkSuccessorStays makes a successor before the last Put of the first has ended.
func checkSuccessorStays(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		first, second := w.newMirror(), newDevice(w.tables)
		on := newStop()
		w.reg.step = on.once("detached")
		unregistered := w.background(first.Unregister)
		<-on.reached
		w.register(second)
		close(on.leave)
		<-unregistered
		h := second.hmm.Load()
		if found := w.reg.lookup(w.AddressSpace, byHolder); found != h {
			w.errorf("the HMM %p is found, want the successor %p", found, h)
			return
		}
		w.refs("of the successor", h, 2)
		h.Put()
		second.Unregister()
	})
	return w.finish()
}

// checkCallbackOfADyingHMM puts the last reference while a method of the subscriber has
// begun and has no reference yet.
func checkCallbackOfADyingHMM(m mutant) error {
	for _, step := range []string{"gate start", "syncer start", "gate end", "tested"} {
		if m != testForNil && step == "tested" {
			continue // there only is this step where a pointer is tested
		}
		w := newWorld(m, plain(0, 8))
		w.guard(func() {
			d := w.newMirror()
			on := newStop()
			w.reg.step = on.once(step)
			bracket := w.background(func() { w.bracket(at(0, 1), nil) })
			<-on.reached
			d.Unregister()
			close(on.leave)
			<-bracket
		})
		if err := w.finish(); err != nil {
			return fmt.Errorf("held up at %q: %w", step, err)
		}
	}
	return nil
}

// TestM4UnregisterTwice: of several that unregister one mirror one puts its reference,
// and Sync has ended for all of them.
func TestM4UnregisterTwice(t *testing.T) {
	pass(t, checkUnregisterTwice, checkUnregisterKeepsItsHMM)
}

func checkUnregisterTwice(m mutant) error {
	const callers = 4
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		h := w.reg.lookup(w.AddressSpace, byHolder)
		var loaded sync.WaitGroup
		loaded.Add(callers)
		w.reg.step = func(name string, _ *HMM) {
			if name == "loaded" {
				loaded.Done()
				loaded.Wait()
			}
		}
		var all []<-chan struct{}
		for range callers {
			all = append(all, w.background(d.Unregister))
		}
		for _, done := range all {
			<-done
		}
		w.reg.step = nil
		if w.broken() {
			return
		}
		w.refs("when all have unregistered", h, 1)
		d.Unregister()
		w.refs("when one has once more", h, 1)
		h.Put()
	})
	return w.finish()
}

// checkUnregisterKeepsItsHMM has somebody overtake an Unregister that has loaded the HMM
// and does not have its lock yet.
func checkUnregisterKeepsItsHMM(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		on := newStop()
		w.reg.step = on.once("loaded")
		slow := w.background(d.Unregister)
		<-on.reached
		d.Unregister()
		freed := w.background(notifier.Synchronize)
		gvmtest.ClosedWithin(freed, gvmtest.GraceFor(m))
		close(on.leave)
		<-slow
		<-freed
	})
	return w.finish()
}

// TestM6Exited: after the exit every call returns what its column of the table says, and
// none blocks.
func TestM6Exited(t *testing.T) { pass(t, checkExited) }

func checkExited(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d, interval := w.newMirror(), w.newInterval(at(0, 8))
		h := w.reg.lookup(w.AddressSpace, byHolder)
		begun, filled := w.begun(at(0, 4), asked), w.begun(at(0, 4), asked)
		w.reading(func() {
			_, err := filled.Fault(false)
			w.must(err)
		})
		q := w.newRequest(interval, at(0, 4), asked)
		q.Seq = interval.ReadBegin()
		w.exit()
		w.refs("after the exit", h, 4)

		want := func(call string, err error, errno syscall.Errno) {
			if !errors.Is(err, errno) {
				w.errorf("after the exit %s returns %v, want %v", call, err, errno)
			}
		}
		ctx := context.Background()
		want("Register", w.reg.register(ctx, new(Mirror), w.AddressSpace, d), syscall.ESRCH)
		late := w.newRange(at(0, 4), asked)
		want("Begin", w.reg.begin(late, w.AddressSpace), syscall.EFAULT)
		if late.Done() {
			w.errorf("Done of a range that has not begun reports true")
		}
		if begun.WaitValid(ctx) || begun.Valid() || filled.Valid() {
			w.errorf("after the exit a range is valid")
		}
		w.reading(func() {
			_, err := begun.Snapshot()
			want("Snapshot", err, syscall.EFAULT)
			_, err = begun.Fault(false)
			want("Fault", err, syscall.EFAULT)
			_, err = begun.Fault(true)
			want("Fault that must not block", err, syscall.EFAULT)
			want("RangeFault", RangeFault(q), syscall.EFAULT)
		})
		want("Range.Populate", w.reg.populate(ctx, late, w.AddressSpace, d, nil), syscall.EFAULT)
		want("Request.Populate", q.Populate(ctx, d, nil), syscall.EFAULT)
		w.refs("after all calls", h, 4)
		if begun.Done() || filled.Done() {
			w.errorf("after the exit Done reports true")
		}
		d.Unregister()
		w.refs("after Unregister", h, 1)
		h.Put()
		want("Register without an HMM", w.reg.register(ctx, new(Mirror), w.AddressSpace, d), syscall.ESRCH)
		interval.Remove()
	})
	return w.finish()
}

// TestM7ExitRaces: whatever the exit meets, nothing is left, freed twice, or waits for
// ever. What it meets by chance is in TestM8StormIsCoherent.
func TestM7ExitRaces(t *testing.T) {
	for name, meet := range map[string]func(w *world, d *device){
		"Unregister that has begun": func(w *world, d *device) {
			on := newStop()
			w.reg.step = on.once("loaded")
			unregistered := w.background(d.Unregister)
			<-on.reached
			exited := w.background(w.exit)
			gvmtest.ClosedWithin(exited, gvmtest.Grace) // it waits for the section of Unregister
			close(on.leave)
			<-unregistered
			<-exited
		},
		"Unregister after the release of ranges": func(w *world, d *device) {
			on := newStop()
			w.reg.step = on.once("syncer release")
			exited := w.background(w.exit)
			<-on.reached
			d.Unregister()
			close(on.leave)
			<-exited
		},
		"Register after the release of ranges": func(w *world, d *device) {
			w.reg.step = func(name string, _ *HMM) {
				if name != "syncer release" {
					return
				}
				if err := w.reg.register(context.Background(), new(Mirror), w.AddressSpace, d); !errors.Is(err, syscall.ESRCH) {
					w.errorf("Register during the exit returns %v", err)
				}
			}
			w.exit()
			d.Unregister()
		},
		"Done": func(w *world, d *device) {
			r := w.begun(at(0, 4), asked)
			on := newStop()
			w.reg.step = on.once("gate release")
			exited := w.background(w.exit)
			<-on.reached
			d.Unregister()
			r.Done()
			close(on.leave)
			<-exited
		},
		"a fault, whose user is the last": func(w *world, d *device) {
			r := w.newRange(at(0, 4), asked)
			w.tables.hook = func(point string) {
				if point == "fault" {
					w.exit()
				}
			}
			err := w.reg.populate(context.Background(), r, w.AddressSpace, d, func(entries []Entry) error { return d.install(r.Range, entries) })
			if err != nil || w.Stats().Users != 0 || len(d.entries) != 0 {
				w.errorf("Populate returned %v, there are %d users, and %d entries are installed", err, w.Stats().Users, len(d.entries))
			}
			d.Unregister()
		},
		"a snapshot": func(w *world, d *device) {
			r := w.begun(at(0, 4), 0)
			w.tables.hook = func(point string) {
				if point == "walk" {
					w.guard(w.exit)
				}
			}
			w.reading(func() {
				// The exit cannot give the mappings up before the lock is given back.
				if _, err := r.Snapshot(); err != nil {
					w.errorf("Snapshot returns %v", err)
				}
			})
			if r.Valid() || r.Done() {
				w.errorf("what was found in the exit is valid")
			}
			d.Unregister()
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(sound, plain(0, 8))
			w.guard(func() { meet(w, w.newMirror()) })
			if err := w.finish(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestM9PulseAtEveryPoint: a change that begins and ends at any point of a look leads to
// another look, or has its entries dropped.
func TestM9PulseAtEveryPoint(t *testing.T) { pass(t, checkPulsesOfRanges, checkPulsesOfRequests) }

// pulseAt makes a hook that gives two pages another content at the nth point.
func pulseAt(w *world, nth int, points *[]string) func(point string) {
	return func(point string) {
		if *points = append(*points, point); len(*points) == nth {
			w.pulse(at(0, 2))
		}
	}
}

// checkPulsesOfRanges has a change at each point of Range.Populate. The last points are
// just before the driver's lock is taken, and after Populate.
func checkPulsesOfRanges(m mutant) error {
	return eachPoint(func(nth int) (points []string, err error) {
		w := newWorld(m, plain(0, 8))
		w.guard(func() {
			d := w.newMirror()
			r := w.newRange(at(0, 4), askedWrite)
			hook := pulseAt(w, nth, &points)
			w.tables.hook = hook
			d.locked = func() { hook("locking") }
			w.must(w.reg.populate(context.Background(), r, w.AddressSpace, d, func(entries []Entry) error { return d.install(r.Range, entries) }))
			hook("done")
			w.must(d.check())
			d.Unregister()
		})
		return points, w.finish()
	})
}

// checkPulsesOfRequests does the same with Request.Populate, whose steps are points too.
func checkPulsesOfRequests(m mutant) error {
	return errors.Join(pulsesOfRequests(m, false, 0), pulsesOfRequests(m, true, 0))
}

func pulsesOfRequests(m mutant, dropLock bool, defect defect) error {
	return eachPoint(func(nth int) (points []string, err error) {
		w := newWorld(m, plain(0, 8))
		w.guard(func() {
			d := w.newInterval(at(0, 8))
			d.defect = defect
			q := w.newRequest(d, at(0, 4), askedWrite)
			q.DropLock = dropLock
			w.tables.waits = dropLock
			hook := pulseAt(w, nth, &points)
			w.tables.hook, d.locked = hook, func() { hook("locking") }
			q.step = func(step string) {
				if step != "installing" { // which is with the driver's lock held
					hook(step)
				}
			}
			w.must(q.Populate(context.Background(), d, func(entries []Entry) error { return d.install(q.Range, entries) }))
			hook("done")
			w.must(d.check())
			d.Remove()
		})
		return points, w.finish()
	})
}

// eachPoint runs a schedule with a change at its first point, at its second, and so on,
// until it has no more.
func eachPoint(run func(nth int) (points []string, err error)) error {
	for nth := 1; ; nth++ {
		points, err := run(nth)
		if err != nil {
			return fmt.Errorf("a change at point %d of %q: %w", nth, points, err)
		}
		if nth >= len(points) {
			return nil
		}
	}
}

// TestM9PulseDuringInstallation: a change that begins while entries are being installed
// waits for the driver's lock, and has them dropped.
func TestM9PulseDuringInstallation(t *testing.T) {
	w := newWorld(sound, plain(0, 8))
	d := w.newInterval(at(0, 8))
	q := w.newRequest(d, at(0, 4), asked)
	var pulsed <-chan struct{}
	w.must(q.Populate(context.Background(), d, func(entries []Entry) error {
		pulsed = w.background(func() { w.pulse(at(0, 2)) })
		if gvmtest.ClosedWithin(pulsed, gvmtest.Grace) {
			w.errorf("a change is made while the driver holds its lock")
		}
		return d.install(q.Range, entries)
	}))
	<-pulsed
	w.must(d.check())
	if len(d.entries) != 2 {
		w.errorf("%d entries are installed, want those that have not changed", len(d.entries))
	}
	d.Remove()
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

// TestM9ChangesAreCounted: a range sees a change that has ended before it asks.
func TestM9ChangesAreCounted(t *testing.T) { pass(t, checkPulseIsSeen, checkBorders) }

func checkPulseIsSeen(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		r := w.begun(at(0, 4), asked)
		w.reading(func() {
			_, err := r.Fault(false)
			w.must(err)
		})
		if !r.Valid() {
			w.errorf("what has not changed is not valid")
		}
		w.pulse(at(1, 1))
		if r.Valid() || r.Done() {
			w.errorf("what has changed is valid, since the change has ended")
		}
		d.Unregister()
	})
	return w.finish()
}

// checkBorders has changes next to a range, and of its first and last page.
func checkBorders(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		for _, tt := range []struct {
			changing addr.HVARange
			valid    bool
		}{
			{at(1, 1), true}, {at(4, 1), true}, {at(0, 2), true}, {at(4, 4), true},
			{at(2, 1), false}, {at(3, 1), false}, {at(0, 3), false}, {at(3, 5), false}, {at(0, 8), false},
		} {
			r := w.begun(at(2, 2), asked)
			w.reading(func() {
				_, err := r.Fault(false)
				w.must(err)
			})
			w.bracket(tt.changing, nil)
			if got := r.Done(); got != tt.valid {
				w.errorf("after a change of %v the range %v has validity %v", tt.changing, r.Range, got)
			}
		}
		d.Unregister()
	})
	return w.finish()
}

// TestM10WaitersAreWoken: who waits for a range to become valid is woken by the end of
// the last bracket and by the exit.
func TestM10WaitersAreWoken(t *testing.T) { pass(t, checkLastEnd, checkExitWakes, checkTimeout) }

// checkLastEnd opens two brackets and closes first the one that does not overlap.
func checkLastEnd(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		var waited <-chan struct{}
		valid := false
		on := newStop()
		w.bracket(at(0, 2), func() {
			r := w.begun(at(0, 4), asked)
			w.guard(func() { w.bracket(at(6, 1), nil) })
			if valid, _, _ := r.state(); valid {
				w.errorf("the range is valid while a bracket of its pages is open")
			}
			w.guard(func() {
				w.RLock()
				defer w.RUnlock()
				if _, err := r.Snapshot(); !errors.Is(err, syscall.EAGAIN) {
					w.errorf("Snapshot while a bracket is open returns %v", err)
				}
			})
			w.reg.step = on.once("waiting")
			waited = w.background(func() {
				valid = r.WaitValid(context.Background())
				r.Done()
			})
			if m == sound {
				<-on.reached
				close(on.leave)
			}
		})
		if m == sound {
			if !gvmtest.ClosedWithin(waited, gvmtest.LimitFor(m)) || !valid {
				w.errorf("after the last end the range is not valid, or who waited for it has not been woken")
			}
		} else if !gvmtest.ClosedWithin(waited, gvmtest.LimitFor(m)) {
			close(on.leave)
			<-waited
		}
		d.Unregister()
	})
	return w.finish()
}

// checkExitWakes has the address space exit while a bracket is open.
func checkExitWakes(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		on, inside := newStop(), newStop()
		bracket := w.background(func() { w.bracket(at(0, 2), inside.pass) })
		<-inside.reached
		r := w.begun(at(0, 4), asked)
		w.reg.step = on.once("waiting")
		waited := w.background(func() {
			if r.WaitValid(ctx) {
				w.errorf("after the exit the range is valid")
			}
		})
		<-on.reached
		close(on.leave)
		w.exit()
		if !gvmtest.ClosedWithin(waited, gvmtest.LimitFor(m)) {
			w.errorf("the exit does not wake who waits")
			cancel()
			<-waited
		}
		close(inside.leave)
		<-bracket
		r.Done()
		d.Unregister()
	})
	return w.finish()
}

// checkTimeout has a wait end because its context does.
func checkTimeout(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		r := w.newRange(at(0, 4), asked)
		w.bracket(at(0, 1), func() {
			w.must(w.reg.begin(r, w.AddressSpace))
			waited := w.background(func() {
				ctx, cancel := soon()
				defer cancel()
				if r.WaitValid(ctx) {
					w.errorf("the range is valid while a bracket of its pages is open")
				}
				r.Done()
				if err := w.reg.populate(ctx, r, w.AddressSpace, d, nil); !errors.Is(err, syscall.EBUSY) || !errors.Is(err, context.DeadlineExceeded) {
					w.errorf("Populate, which has no time left, returns %v", err)
				}
			})
			<-waited
		})
		d.Unregister()
	})
	return w.finish()
}

// TestM11RefusalIsUndone: after a driver has refused a bracket it does not count as open.
func TestM11RefusalIsUndone(t *testing.T) { pass(t, checkRefusalIsUndone) }

func checkRefusalIsUndone(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d, told := w.newMirror(), w.newMirror()
		d.onSync = func(inv *notifier.Invalidation) error {
			if inv.NonBlockable {
				return syscall.EAGAIN
			}
			return nil
		}
		told.onSync = func(inv *notifier.Invalidation) error {
			if inv.NonBlockable {
				w.errorf("a driver is told of a change that another has refused before")
			}
			return nil
		}
		early := w.begun(at(0, 4), asked)
		reap := &notifier.Invalidation{Range: at(0, 2), Event: notifier.Unmap, NonBlockable: true}
		if err := w.invalidate(reap, nil); !errors.Is(err, notifier.ErrWouldBlock) {
			w.errorf("the bracket is opened, or fails for another reason: %v", err)
		}
		h := d.hmm.Load()
		if n := h.Stats().Active; n != 0 {
			w.errorf("after a refusal %d brackets count as open", n)
		}
		late := w.begun(at(0, 4), asked)
		for _, r := range []*Range{early, late} {
			ctx, cancel := soon()
			if !r.WaitValid(ctx) {
				w.errorf("after a refusal the range does not become valid")
			}
			cancel()
			w.reading(func() {
				_, err := r.Fault(false)
				w.must(err)
			})
			if !r.Done() {
				w.errorf("after a refusal the range is not valid")
			}
		}
		w.refs("at the end", h, 2)
		d.Unregister()
		told.Unregister()
	})
	return w.finish()
}

// TestM14Release: the driver's Release may wait for what causes changes, and may
// unregister its mirror; changes reach it until it has returned.
func TestM14Release(t *testing.T) { pass(t, checkReleaseMayWait, checkReleaseIsTold) }

func checkReleaseMayWait(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d, other := w.newMirror(), w.newMirror()
		var bracket <-chan struct{}
		d.onRelease = func() {
			bracket = w.background(func() { w.bracket(at(0, 1), nil) })
			if !gvmtest.ClosedWithin(bracket, gvmtest.LimitFor(m)) {
				w.errorf("Release waits for a change that waits for Release")
				return
			}
			d.Unregister()
		}
		other.onRelease = func() { panic("no release") }
		h := w.reg.lookup(w.AddressSpace, byHolder)
		w.exit()
		<-bracket
		if got := w.takeReports(); len(got) != 1 || !strings.Contains(got[0].Error(), "no release") {
			w.errorf("of a driver that panics in Release was reported: %v", got)
		}
		if w.broken() {
			return
		}
		w.refs("after one has unregistered in its Release", h, 2)
		other.Unregister()
		h.Put()
	})
	return w.finish()
}

// takeReports returns what was reported since it was last called.
func (w *world) takeReports() []error {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() { w.reports = nil }()
	return w.reports
}

// checkReleaseIsTold changes a page that a driver which is being released still shows.
func checkReleaseIsTold(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		d := w.newMirror()
		r := w.newRange(at(0, 4), asked)
		w.must(w.reg.populate(context.Background(), r, w.AddressSpace, d, func(entries []Entry) error { return d.install(r.Range, entries) }))
		d.onRelease = func() {
			<-w.background(func() { w.pulse(at(0, 1)) })
			w.must(d.check())
		}
		w.exit()
		d.Unregister()
	})
	return w.finish()
}

// TestM15OnlyWhatWasAskedFor: a snapshot faults nothing in. A fault takes what was asked
// for, and what shares its hole or its huge page.
func TestM15OnlyWhatWasAskedFor(t *testing.T) { pass(t, checkTouches, checkWalkGoesOn) }

func checkTouches(m mutant) error {
	const hugeAt = 512
	w := newWorld(m, plain(0, 16), region{at(hugeAt, 1024), addr.ReadWrite, RegionMapped | 9<<OrderShift})
	w.guard(func() {
		tables := w.tables
		tables.set(at(0, 1), PTEPresent|PTEWritable)
		tables.set(at(4, 1), PTEPresent)
		tables.set(at(5, 3), PTESwapped)
		tables.set(at(8, 4), PTEPresent)
		// Pages 1 to 3 and 12 to 15 are holes.
		d, owner := w.newInterval(at(0, 2048)), w.newMirror()
		look := func(r addr.HVARange, ask map[int]Entry, want ...fault) {
			for _, list := range []bool{false, true} {
				before := maps(tables)
				var err error
				q := w.newRequest(d, r, 0)
				x := w.begun(r, 0)
				q.Mask, x.Mask = ^Entry(0), ^Entry(0)
				for i, e := range ask {
					q.Entries[i], x.Entries[i] = e, e
				}
				q.Seq = d.ReadBegin()
				w.reading(func() {
					if list {
						_, err = x.Fault(false)
					} else {
						err = RangeFault(q)
					}
				})
				x.Done()
				w.must(err)
				if diff := cmp.Diff(want, tables.faults(), cmp.AllowUnexported(fault{})); diff != "" {
					w.errorf("asked for %v, faults were taken (-want +got):\n%s", ask, diff)
				}
				tables.mu.Lock()
				tables.pages = before
				tables.mu.Unlock()
			}
		}
		look(at(0, 16), nil)
		look(at(0, 16), map[int]Entry{2: asked}, fault{at(1, 3), false, false})
		look(at(0, 16), map[int]Entry{1: asked, 3: askedWrite}, fault{at(1, 3), true, false})
		look(at(2, 1), map[int]Entry{0: asked}, fault{at(2, 1), false, false})
		look(at(0, 16), map[int]Entry{0: askedWrite, 4: asked, 5: asked, 7: asked}, fault{at(5, 1), false, false}, fault{at(7, 1), false, false})
		look(at(0, 16), map[int]Entry{5: asked, 6: asked, 7: askedWrite}, fault{at(5, 2), false, false}, fault{at(7, 1), true, false})
		look(at(0, 16), map[int]Entry{9: askedWrite, 10: askedWrite}, fault{at(9, 2), true, false})
		look(at(hugeAt, 512), map[int]Entry{7: asked}, fault{at(hugeAt, 512), false, false})
		tables.set(at(hugeAt, 1024), PTEPresent|9<<OrderShift)
		look(at(hugeAt, 1024), map[int]Entry{600: askedWrite}, fault{at(hugeAt+512, 512), true, false})
		look(at(hugeAt+500, 24), map[int]Entry{1: askedWrite}, fault{at(hugeAt+500, 12), true, false})

		// A snapshot of everything, with everything asked for.
		r := w.begun(at(0, 16), askedWrite)
		before := maps(tables)
		w.reading(func() {
			_, err := r.Snapshot()
			w.must(err)
		})
		if diff := cmp.Diff(before, maps(tables), cmp.AllowUnexported(page{})); diff != "" || len(tables.faults()) > 0 {
			w.errorf("a snapshot has changed pages (-before +after):\n%s", diff)
		}
		r.Done()
		owner.Unregister()
		d.Remove()
	})
	return w.finish()
}

// maps returns a copy of the pages.
func maps(m *model) map[addr.HVA]page {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := make(map[addr.HVA]page, len(m.pages))
	for hva, p := range m.pages {
		c[hva] = p
	}
	return c
}

// checkWalkGoesOn sees where a walk goes on after a fault, and that it does not when a
// change has begun meanwhile.
func checkWalkGoesOn(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		w.tables.set(at(0, 2), PTEPresent|PTEWritable)
		w.tables.set(at(2, 1), PTESwapped)
		w.tables.set(at(3, 1), PTEPresent)
		w.tables.set(at(4, 4), PTESwapped)
		d := w.newInterval(at(0, 8))
		q := w.newRequest(d, at(0, 8), askedWrite)
		q.Seq = d.ReadBegin()
		w.reading(func() { w.must(RangeFault(q)) })
		last := addr.HVA(0)
		for _, run := range w.tables.runs() {
			if run.Start < last {
				w.errorf("the walk has been at %v and reads %v again", last, run)
			}
			last = run.Start
		}

		w.tables.faults()
		w.tables.set(at(4, 4), PTESwapped)
		w.tables.set(at(6, 1), PTEPresent|PTEWritable)
		w.tables.hook = func(point string) {
			if point == "faulted" {
				w.bracket(at(0, 1), nil)
			}
		}
		clear(q.Entries)
		q.Seq = d.ReadBegin()
		w.reading(func() {
			if err := RangeFault(q); !errors.Is(err, syscall.EBUSY) {
				w.errorf("with a change during the first fault RangeFault returns %v", err)
			}
		})
		if n := len(w.tables.faults()); n != 1 {
			w.errorf("the walk goes on for %d faults after a change has begun", n-1)
		}
		d.Remove()
	})
	return w.finish()
}

// TestM16RetryAsksAgain: what another try asks for is what the first one did, and not
// what the first one found.
func TestM16RetryAsksAgain(t *testing.T) { pass(t, checkRefilled) }

func checkRefilled(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		w.tables.set(at(0, 1), PTEPresent|PTEWritable)
		d := w.newInterval(at(0, 8))
		q := w.newRequest(d, at(0, 2), 0)
		q.Mask, q.Entries[1] = askedWrite, asked
		w.tables.hook = func(point string) {
			if point == "faulted" {
				w.tables.hook = nil
				w.bracket(at(0, 1), func() { w.tables.set(at(0, 1), 0) })
			}
		}
		w.must(q.Populate(context.Background(), d, func([]Entry) error { return nil }))
		got := slices.Clone(q.Entries)
		if diff := cmp.Diff([]fault{{at(1, 1), false, false}}, w.tables.faults(), cmp.AllowUnexported(fault{})); diff != "" {
			w.errorf("in two tries faults were taken (-want +got):\n%s", diff)
		}
		clear(q.Entries)
		q.Entries[1] = asked
		w.must(q.Populate(context.Background(), d, func([]Entry) error { return nil }))
		if !slices.Equal(got, q.Entries) {
			w.errorf("two tries found %v, and one %v", got, q.Entries)
		}
		d.Remove()
	})
	return w.finish()
}

// TestM17TwoGoroutines: a range that is used by two goroutines is noticed.
func TestM17TwoGoroutines(t *testing.T) {
	w := newWorld(sound, plain(0, 8))
	d := w.newMirror()
	r := w.begun(at(0, 4), asked)
	other := func() (p any) {
		defer func() { p = recover() }()
		r.Valid()
		return nil
	}
	var got any
	w.tables.hook = func(string) {
		done := w.background(func() { got = other() })
		<-done
	}
	w.reading(func() {
		_, err := r.Snapshot()
		w.must(err)
	})
	if want := "hmm: Valid of a Range that another goroutine is using"; got != want {
		t.Errorf("the panic is %v, want %q", got, want)
	}
	<-w.background(func() { r.Done() }) // one after the other is no mistake
	d.Unregister()
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

// TestM18FailedCreation: if the HMM cannot be made, whatever the step, it cannot be found
// and nothing is left of it.
func TestM18FailedCreation(t *testing.T) { pass(t, checkFailedCreation) }

func checkFailedCreation(m mutant) error {
	for _, step := range []string{"absent", "allocated", "half registered"} {
		w := newWorld(m, plain(0, 8))
		w.guard(func() {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			w.reg.step = func(name string, _ *HMM) {
				if name == step {
					cancel()
				}
			}
			d := newDevice(w.tables)
			if err := w.reg.register(ctx, &d.Mirror, w.AddressSpace, d); !errors.Is(err, syscall.EINTR) {
				w.errorf("interrupted, Register returns %v", err)
			}
			if n := w.Stats().Count; n != 1 {
				w.errorf("interrupted, Register leaves a count of %d", n)
			}
			if len(w.reg.hmms) != 0 || d.hmm.Load() != nil {
				w.errorf("interrupted, Register leaves an HMM to be found, or to the mirror")
			}
			d.Unregister()
			w.reg.step = nil
			w.bracket(at(0, 1), nil)
			w.register(d)
			w.refs("after another Register", d.hmm.Load(), 1)
			d.Unregister()
		})
		if err := w.finish(); err != nil {
			return fmt.Errorf("interrupted when %s: %w", step, err)
		}
	}
	return nil
}

// TestH34LockIsDropped: where a fault has to wait, RangeFaultUnlocked gives the mapping
// lock back, and does not keep what it found before if that has changed meanwhile.
func TestH34LockIsDropped(t *testing.T) { pass(t, checkLockIsDropped) }

func checkLockIsDropped(m mutant) error {
	w := newWorld(m, plain(0, 8))
	w.guard(func() {
		w.tables.set(at(0, 1), PTEPresent|PTEWritable)
		w.tables.waits = true
		d := w.newInterval(at(0, 8))
		q := w.newRequest(d, at(0, 2), asked)
		faults := 0
		w.tables.hook = func(point string) {
			if point != "fault" {
				return
			}
			if faults++; faults == 2 { // that which may block
				w.Lock()
				defer w.Unlock()
				w.pulse(at(0, 1))
			}
		}
		err := RangeFaultUnlocked(q)
		if err == nil {
			w.must(d.install(q.Range, q.Entries))
			if err := d.check(); err != nil && !d.ReadRetry(q.Seq) {
				w.errorf("after a change in between RangeFaultUnlocked succeeds: %w", err)
			}
		} else if !errors.Is(err, syscall.EBUSY) {
			w.errorf("after a change in between RangeFaultUnlocked returns %v", err)
		}
		clear(d.entries)
		clear(q.Entries)
		older := q.Seq
		w.must(RangeFaultUnlocked(q))
		if q.Seq == older || d.ReadRetry(q.Seq) || !d.ReadRetry(older) {
			w.errorf("RangeFaultUnlocked does not begin with a sequence of its own")
		}
		d.Remove()
	})
	return w.finish()
}

// TestPopulateIsBounded: Populate ends when its time is over and the page tables do not
// stand still, and otherwise does not look at the time.
func TestPopulateIsBounded(t *testing.T) {
	w := newWorld(sound, plain(0, 8))
	d := w.newInterval(at(0, 8))
	q := w.newRequest(d, at(0, 2), asked)
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	tries := 0
	w.tables.hook = func(point string) {
		if point == "faulted" {
			if tries++; tries == 3 {
				cancel()
			}
			w.bracket(at(0, 1), func() { w.tables.set(at(0, 1), 0) })
		}
	}
	err := q.Populate(ctx, d, nil)
	if !errors.Is(err, syscall.EBUSY) || !errors.Is(err, context.Canceled) || tries != 3 {
		t.Errorf("after %d tries Populate returns %v", tries, err)
	}
	w.tables.hook = nil
	q.Entries = make([]Entry, 2)
	errInstall := errors.New("no room")
	if err := q.Populate(ctx, d, func([]Entry) error { return errInstall }); !errors.Is(err, errInstall) {
		t.Errorf("Populate returns %v, want the error of install", err)
	}
	d.Remove()
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

// TestPopulateReturnsTheExitsError: a Populate that is the last user of the address space
// returns what the exit says, beside what it says itself.
func TestPopulateReturnsTheExitsError(t *testing.T) {
	errExit, errInstall := errors.New("the mappings cannot be given up"), errors.New("no room")
	for _, install := range []error{nil, errInstall} {
		w := newWorld(sound, plain(0, 8))
		w.AddressSpace = notifier.New(notifier.Options{Teardown: func() error { return errExit }})
		d := w.newInterval(at(0, 8))
		q := w.newRequest(d, at(0, 2), asked)
		err := q.Populate(context.Background(), d, func([]Entry) error {
			if err := w.PutUser(); err != nil {
				t.Errorf("the first user goes, and PutUser returns %v", err)
			}
			return install
		})
		if !errors.Is(err, errExit) || !errors.Is(err, install) && install != nil {
			t.Errorf("Populate returns %v, want %v and %v", err, errExit, install)
		}
		d.Remove()
	}
}
