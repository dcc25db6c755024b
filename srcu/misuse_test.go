package srcu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// works fails the test if the domain does not do all that it is for.
func works(t *testing.T, d *Domain) {
	t.Helper()
	b := newBed(d, false, (*Domain).Synchronize)
	b.patience /= 5 // there are many who ask
	for _, c := range []check{checkOpenSections, checkCookieUnderWay, checkBarrierWaits} {
		if err := c(b); err != nil {
			t.Errorf("after misuse: %v", err)
		}
	}
}

// TestS21MisuseIsReported lists what misuse that can be seen is answered with. The
// domain goes on to work. What only a debug build can see is in
// TestS21DebugBuild.
func TestS21MisuseIsReported(t *testing.T) {
	bad := func(token int) string {
		if debug {
			return fmt.Sprintf("with the token %d, whose section is closed already or of another domain", token)
		}
		return fmt.Sprintf("srcu: ReadUnlock with the token %d, which ReadLock does not give", token)
	}
	for name, tt := range map[string]struct {
		misuse func(d *Domain)
		want   string // part of the panic's text
	}{
		"token 2":       {func(d *Domain) { d.ReadUnlock(2) }, bad(2)},
		"token -1":      {func(d *Domain) { d.ReadUnlock(-1) }, bad(-1)},
		"UpRead, token": {func(d *Domain) { d.UpRead(7) }, bad(7)},
		"Reader, token": {func(d *Domain) {
			r := d.NewReader()
			defer r.Close()
			r.ReadUnlock(2)
		}, bad(2)},
		"Reader, token -1": {func(d *Domain) {
			r := d.NewReader()
			defer r.Close()
			r.ReadUnlock(-1)
		}, bad(-1)},
		"Close inside": {func(d *Domain) {
			r := d.NewReader()
			defer r.Close()
			idx := r.ReadLock()
			defer r.ReadUnlock(idx)
			r.Close()
		}, "srcu: Close of a Reader inside a section"},
		"a Head twice": {func(d *Domain) {
			var h Head
			runs := 0
			idx := d.ReadLock()
			d.Call(&h, func(*Head) { runs++ })
			defer func() {
				d.ReadUnlock(idx)
				d.Barrier()
				if runs != 1 {
					panic(fmt.Sprintf("the callback ran %d times, want once", runs))
				}
			}()
			d.Call(&h, func(*Head) { runs = 100 })
		}, "srcu: Call with a Head that is queued already"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			for _, fl := range flavours {
				d := fl.domain()
				if got := gvmtest.Panics(func() { tt.misuse(d) }); !strings.Contains(got, tt.want) {
					t.Errorf("%s: panics with %q, want %q in it", fl.name, got, tt.want)
				}
				works(t, d)
			}
		})
	}
}

// TestS21UnlockWithoutLock: without a debug build it is the next scan of the rank
// that notices, and nobody who waits is left hanging.
func TestS21UnlockWithoutLock(t *testing.T) {
	eachReader(t, func(t *testing.T, b bed) {
		for i := range 2 {
			r, _ := b.newReader() // it cannot be closed, if it has to be registered
			if debug {
				if got, want := gvmtest.Panics(func() { r.ReadUnlock(i) }), "closed already or of another domain"; !strings.Contains(got, want) {
					t.Errorf("ReadUnlock panics with %q, want %q in it", got, want)
				}
				continue
			}
			seq, periods := b.d.seq.Load(), b.d.Stats().GracePeriods
			c := b.d.GetState()
			r.ReadUnlock(i)
			const want = "ReadUnlock was called without ReadLock, or twice"
			for range 2 {
				for _, w := range waits {
					if got := gvmtest.Panics(func() { w.wait(b.d) }); !strings.Contains(got, want) {
						t.Errorf("%s: the next grace period panics with %q, want %q in it", w.name, got, want)
					}
					// None has ended, and none is under way.
					if b.d.seq.Load() != seq || b.d.Poll(c) {
						t.Errorf("%s: seq went from %#x to %#x, and Poll reports %v", w.name, seq, b.d.seq.Load(), b.d.Poll(c))
					}
					if s := b.d.Stats(); s.Waiting != 0 || s.WaitingRank != -1 || s.GracePeriods != periods || s.Readers != 0 {
						t.Errorf("%s: Stats says %+v, want nobody waiting, and nobody waited for", w.name, s)
					}
				}
			}
			b.d.Barrier() // waits for no grace period
			works(t, New())

			// With the counts put right, the domain is as good as new.
			lockInRank(b.d, r, uint64(i))
			works(t, b.d)
		}
	})
}

// TestS21UnlockWithoutLockWhileManyWait has a grace period panic with others behind
// it: each of them finds out by itself.
func TestS21UnlockWithoutLockWhileManyWait(t *testing.T) {
	if debug {
		gvmtest.OtherBuild(t, "a debug build does not let a section be closed twice")
	}
	each(t, func(t *testing.T, b bed) {
		b.d.rest.unlocks[0]++
		demands := b.d.requests.Load()
		b.d.gp.Lock()
		const n = 8
		var texts [n]string
		var all sync.WaitGroup
		for i := range texts {
			all.Go(func() { texts[i] = gvmtest.Panics(func() { b.wait(b.d) }) })
		}
		await("everybody to ask", func() bool { return b.d.requests.Load()-demands == n })
		b.d.gp.Unlock()
		all.Wait()
		for _, got := range texts {
			if want := "ReadUnlock was called without ReadLock, or twice"; !strings.Contains(got, want) {
				t.Errorf("one of %d that wait at once panics with %q, want %q in it", n, got, want)
			}
		}
		if n := b.d.rush.Load(); n != 0 {
			t.Errorf("%d callers are in a hurry when all have returned", n)
		}
		if err := b.d.Cleanup(); err != nil {
			t.Errorf("Cleanup: %v", err)
		}
	})
}

// TestS21UnlockWithoutLockEndsTheProcess runs this binary again, to have the
// goroutine that runs callbacks find that a section was closed without being opened.
func TestS21UnlockWithoutLockEndsTheProcess(t *testing.T) {
	if debug {
		gvmtest.OtherBuild(t, "a debug build does not let a section be closed twice")
	}
	const variable = "SRCU_TEST_UNLOCK_WITHOUT_LOCK"
	uses := map[string]func(*Domain){
		"Call":      func(d *Domain) { d.Call(new(Head), func(*Head) {}) },
		"StartPoll": func(d *Domain) { d.StartPoll() },
	}
	if use := uses[os.Getenv(variable)]; use != nil {
		d := New()
		d.ReadUnlock(0)
		use(d)
		time.Sleep(gvmtest.Limit)
		return
	}
	for what := range uses {
		cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), variable+"="+what)
		out, err := cmd.CombinedOutput()
		if want := "panic: srcu: 1 more sections were closed than opened in rank 0"; err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v\n%s\nwant %q in it", what, err, out, want)
		}
	}
}

// TestS21ReadersMix: the kinds of readers are one flavour, and may be mixed.
func TestS21ReadersMix(t *testing.T) {
	d := New()
	b := newBed(d, false, (*Domain).Synchronize)
	r := d.NewReader()
	own, down, registered := d.ReadLock(), d.DownRead(), r.ReadLock()
	done := gvmtest.Background(d.Synchronize)
	for i, unlock := range []func(){
		func() { d.ReadUnlock(own) }, func() { r.ReadUnlock(registered) }, func() { d.UpRead(down) },
	} {
		if b.early(done) {
			t.Errorf("a grace period ended when %d sections of 3 were closed", i)
		}
		unlock()
	}
	<-done
	r.Close()
}

// TestS18CleanupRefuses has a domain in use in every way, one after the other.
func TestS18CleanupRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		use  func(d *Domain) (end func())
		seen func(*BusyError) bool
	}{
		"section": {func(d *Domain) func() {
			idx := d.ReadLock()
			return func() { d.ReadUnlock(idx) }
		}, func(e *BusyError) bool { return *e == BusyError{Readers: 1} }},
		"section in the other rank": {func(d *Domain) func() {
			idx := lockInRank(d, d, 1-d.idx.Load()&1)
			return func() { d.ReadUnlock(idx) }
		}, func(e *BusyError) bool { return *e == BusyError{Readers: 1} }},
		"sections": {func(d *Domain) func() {
			r := d.NewReader()
			i, j := r.ReadLock(), d.DownRead()
			return func() { d.UpRead(j); r.ReadUnlock(i); r.Close() }
		}, func(e *BusyError) bool { return *e == BusyError{Readers: 2, Handles: 1} }},
		"registered reader": {func(d *Domain) func() {
			return d.NewReader().Close
		}, func(e *BusyError) bool { return *e == BusyError{Handles: 1} }},
		"grace period": {func(d *Domain) func() {
			idx := d.ReadLock()
			done := gvmtest.Background(d.Synchronize)
			awaitScan(d, scan2)
			return func() { d.ReadUnlock(idx); <-done }
		}, func(e *BusyError) bool { return *e == BusyError{Readers: 1, GracePeriod: true} }},
		"StartPoll": {func(d *Domain) func() {
			idx := d.ReadLock()
			c := d.StartPoll()
			return func() {
				d.ReadUnlock(idx)
				await("a cookie of StartPoll to come true", func() bool { return d.Poll(c) })
			}
		}, func(e *BusyError) bool { return *e == BusyError{Readers: 1, GracePeriod: true} }},
		"StartPoll, not begun": {func(d *Domain) func() {
			c := &d.callbacks
			c.mu.Lock()
			defer c.mu.Unlock()
			needed := c.needed
			c.needed, c.working = d.seq.Load()>>seqShift+1, true // and nobody is there yet
			return func() { c.needed, c.working = needed, false }
		}, func(e *BusyError) bool { return *e == BusyError{GracePeriod: true} }},
		"callback that is queued": {func(d *Domain) func() {
			idx := d.ReadLock()
			d.Call(new(Head), func(*Head) {})
			return func() { d.ReadUnlock(idx); d.Barrier() }
		}, func(e *BusyError) bool { return e.Readers == 1 && e.Callbacks == 1 }},
		"callback that is running": {func(d *Domain) func() {
			running, leave := make(chan struct{}), make(chan struct{})
			d.Call(new(Head), func(*Head) { close(running); <-leave })
			<-running
			return func() { close(leave); d.Barrier() }
		}, func(e *BusyError) bool { return e.Readers == 0 && e.Callbacks == 1 }},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			for _, fl := range flavours {
				d := fl.domain()
				end := tt.use(d)
				err := d.Cleanup()
				if busy := (*BusyError)(nil); !errors.As(err, &busy) || !tt.seen(busy) {
					t.Errorf("%s: Cleanup: %v", fl.name, err)
				}
				end()
				works(t, d)
				if err := d.Cleanup(); err != nil {
					t.Errorf("%s: Cleanup afterwards: %v", fl.name, err)
				}
			}
		})
	}
}

// TestS21UseAfterCleanup: everything panics and says what it was.
func TestS21UseAfterCleanup(t *testing.T) {
	for _, fl := range flavours {
		d := fl.domain()
		if err := d.Cleanup(); err != nil {
			t.Fatal(err)
		}
		for what, use := range map[string]func(){
			"ReadLock":             func() { d.ReadLock() },
			"Synchronize":          d.Synchronize,
			"SynchronizeExpedited": d.SynchronizeExpedited,
			"Call":                 func() { d.Call(new(Head), func(*Head) {}) },
			"Barrier":              d.Barrier,
			"GetState":             func() { d.GetState() },
			"StartPoll":            func() { d.StartPoll() },
			"Poll":                 func() { d.Poll(CompletedState) },
			"NewReader":            func() { d.NewReader() },
			"OnStall":              func() { d.OnStall(0, nil) },
		} {
			if got, want := gvmtest.Panics(use), "srcu: "+what+" of a domain after its Cleanup"; got != want {
				t.Errorf("%s: panics with %q, want %q", fl.name, got, want)
			}
		}
		unlock := "srcu: ReadUnlock of a domain after its Cleanup"
		if debug {
			unlock = "closed already or of another domain" // before it comes to that
		}
		for what, tt := range map[string]struct {
			use  func()
			want string
		}{
			"DownRead":   {func() { d.DownRead() }, "srcu: ReadLock of a domain after its Cleanup"},
			"ReadUnlock": {func() { d.ReadUnlock(0) }, unlock},
			"UpRead":     {func() { d.UpRead(0) }, unlock},
		} {
			if got := gvmtest.Panics(tt.use); !strings.Contains(got, tt.want) {
				t.Errorf("%s: %s panics with %q, want %q in it", fl.name, what, got, tt.want)
			}
		}
		if err := d.Cleanup(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: a second Cleanup: %v, want %v", fl.name, err, os.ErrClosed)
		}
	}
}

func TestCleanupOfTheDefaultDomain(t *testing.T) {
	if got, want := gvmtest.Panics(func() { _ = Default().Cleanup() }), "srcu: Cleanup of the default domain"; got != want {
		t.Errorf("panics with %q, want %q", got, want)
	}
}
