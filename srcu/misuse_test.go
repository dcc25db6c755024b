package srcu

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// panics returns what f panics with, or "" if it returns.
func panics(f func()) (text string) {
	defer func() {
		if p := recover(); p != nil {
			text = fmt.Sprint(p)
		}
	}()
	f()
	return ""
}

// works fails the test if the domain does not do all that it is for.
func works(t *testing.T, d *Domain) {
	t.Helper()
	b := newBed(d, false, (*Domain).Synchronize)
	for _, c := range []check{checkOpenSections, checkCookieUnderWay, checkBarrierWaits} {
		if err := c(b); err != nil {
			t.Errorf("after misuse: %v", err)
		}
	}
}

// TestS21MisuseIsReported lists what misuse that can be seen is answered with. The
// domain goes on to work. What only a debug build can see is in TestDebug.
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
		}, "2"},
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
				if got := panics(func() { tt.misuse(d) }); !strings.Contains(got, tt.want) {
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
	for _, fl := range flavours {
		for i := range 2 {
			d := fl.domain()
			if debug {
				if got, want := panics(func() { d.ReadUnlock(i) }), "closed already or of another domain"; !strings.Contains(got, want) {
					t.Errorf("%s: ReadUnlock panics with %q, want %q in it", fl.name, got, want)
				}
				continue
			}
			d.ReadUnlock(i)
			const want = "ReadUnlock was called without ReadLock, or twice"
			for _, w := range waits {
				if got := panics(func() { w.wait(d) }); !strings.Contains(got, want) {
					t.Errorf("%s: the next grace period panics with %q, want %q in it", fl.name, got, want)
				}
			}
		}
	}
}

// TestS21ReadersMix: the kinds of readers are one flavour, and may be mixed.
func TestS21ReadersMix(t *testing.T) {
	d := New()
	r := d.NewReader()
	own, down, registered := d.ReadLock(), d.DownRead(), r.ReadLock()
	done := background(d.Synchronize)
	for i, unlock := range []func(){
		func() { d.ReadUnlock(own) }, func() { r.ReadUnlock(registered) }, func() { d.UpRead(down) },
	} {
		if closedWithin(done, patience) {
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
			done := background(d.Synchronize)
			eventually(under(d, scan2))
			return func() { d.ReadUnlock(idx); <-done }
		}, func(e *BusyError) bool { return *e == BusyError{Readers: 1, GracePeriod: true} }},
		"StartPoll": {func(d *Domain) func() {
			idx := d.ReadLock()
			c := d.StartPoll()
			return func() {
				d.ReadUnlock(idx)
				eventually(func() bool { return d.Poll(c) })
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
		} {
			if got, want := panics(use), "srcu: "+what+" of a domain after its Cleanup"; got != want {
				t.Errorf("%s: panics with %q, want %q", fl.name, got, want)
			}
		}
		for what, use := range map[string]func(){
			"DownRead":   func() { d.DownRead() },
			"ReadUnlock": func() { d.ReadUnlock(0) },
			"UpRead":     func() { d.UpRead(0) },
		} {
			if panics(use) == "" {
				t.Errorf("%s: %s of a domain after its Cleanup does not panic", fl.name, what)
			}
		}
		if err := d.Cleanup(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: a second Cleanup: %v, want %v", fl.name, err, os.ErrClosed)
		}
	}
}

func TestCleanupOfTheDefaultDomain(t *testing.T) {
	if got, want := panics(func() { _ = Default().Cleanup() }), "srcu: Cleanup of the default domain"; got != want {
		t.Errorf("panics with %q, want %q", got, want)
	}
}
