//go:build gvm_debug

package hmm

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/notifier"
)

// TestLockOrderIsChecked does what would wait for ever sooner or later, and panics at once
// in a debug build.
func TestLockOrderIsChecked(t *testing.T) {
	const section = "waits for whoever holds an invalidation"
	inBracket := func(w *world, f func()) { w.bracket(at(0, 1), f) }
	for name, tt := range map[string]struct {
		do   func(w *world, d *device)
		want string
	}{
		"Unregister in a bracket": {func(w *world, d *device) { inBracket(w, d.Unregister) }, section},
		"Register in a bracket": {func(w *world, d *device) {
			inBracket(w, func() { w.register(newDevice(w.tables)) })
		}, section},
		"the first Register in a bracket": {func(w *world, _ *device) {
			other := newWorld(sound)
			inBracket(w, func() { other.register(newDevice(w.tables)) })
		}, "the mapping lock is taken"},
		"Unregister with the driver's lock": {func(_ *world, d *device) { d.lock(); d.Unregister() }, section},
		"WaitValid with the driver's lock": {func(w *world, d *device) {
			r := w.begun(at(0, 1), 0)
			d.lock()
			r.WaitValid(context.Background())
		}, section},
		"Populate with the driver's lock": {func(w *world, d *device) {
			r := w.newRange(at(0, 1), 0)
			d.lock()
			_ = w.reg.populate(context.Background(), r, w.AddressSpace, d, nil)
		}, section},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(sound, plain(0, 8))
			d := w.newMirror()
			got := make(chan string)
			go func() { // a goroutine of its own, which takes what it holds with it
				defer func() { got <- fmt.Sprint(recover()) }()
				tt.do(w, d)
			}()
			if msg := <-got; !strings.Contains(msg, tt.want) {
				t.Errorf("panic is %q, want %q in it", msg, tt.want)
			}
		})
	}
	t.Run("Unregister in Sync", func(t *testing.T) {
		w := newWorld(sound, plain(0, 8))
		d := w.newMirror()
		d.onSync = func(*notifier.Invalidation) error { d.Unregister(); return nil }
		w.bracket(at(0, 1), nil)
		if got := w.takeReports(); len(got) != 1 || !strings.Contains(got[0].Error(), section) {
			t.Errorf("reported was %v, want %q", got, section)
		}
		d.onSync = nil
		d.Unregister()
	})
}
