//go:build gvm_debug

package srcu

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// here returns the place of its caller, as panics name it.
func here() string {
	_, file, line, _ := runtime.Caller(1)
	return fmt.Sprintf("%s:%d", file, line)
}

// TestS21DebugBuild lists misuse that a debug build sees. The domain goes on to work.
func TestS21DebugBuild(t *testing.T) {
	elsewhere := func(f func()) (text string) {
		<-gvmtest.Background(func() { text = gvmtest.Panics(f) })
		return text
	}
	waiters := map[string]func(*Domain){
		"Synchronize":          (*Domain).Synchronize,
		"SynchronizeExpedited": (*Domain).SynchronizeExpedited,
		"Barrier":              (*Domain).Barrier,
	}
	for _, fl := range flavours {
		d := fl.domain()
		for what, wait := range waiters {
			r, closeReader := newBed(d, fl.handle, nil).newReader()
			idx, site := r.ReadLock(), here()
			got, want := gvmtest.Panics(func() { wait(d) }), "srcu: "+what+" waits for the section that its own goroutine opened at "+site
			if got != want {
				t.Errorf("%s: %s inside a section panics with %q, want %q", fl.name, what, got, want)
			}
			r.ReadUnlock(idx)
			closeReader()
		}

		idx := d.ReadLock()
		d.ReadUnlock(idx)
		got, site := gvmtest.Panics(func() { d.ReadUnlock(idx) }), here()
		if want := fmt.Sprintf("srcu: ReadUnlock at %s with the token %d, whose section is closed already or of another domain", site, idx); got != want {
			t.Errorf("%s: a token used twice panics with %q, want %q", fl.name, got, want)
		}
		if got, want := gvmtest.Panics(func() { d.UpRead(idx) }), "misuse_debug_test.go"; !strings.Contains(got, want) {
			t.Errorf("%s: UpRead with a token used twice panics with %q, want %q in it, where the call is", fl.name, got, want)
		}

		idx, site = d.ReadLock(), here()
		if got, want := gvmtest.Panics(func() { New().ReadUnlock(idx) }), "closed already or of another domain"; !strings.Contains(got, want) {
			t.Errorf("%s: the token of another domain panics with %q, want %q in it", fl.name, got, want)
		}
		if got, want := elsewhere(func() { d.ReadUnlock(idx) }), "of a section that another goroutine opened at "+site; !strings.Contains(got, want) {
			t.Errorf("%s: ReadUnlock by another goroutine panics with %q, want %q in it", fl.name, got, want)
		}
		d.ReadUnlock(idx)

		idx = d.DownRead()
		if got := elsewhere(func() { d.UpRead(idx) }); got != "" {
			t.Errorf("%s: UpRead by another goroutine panics with %q", fl.name, got)
		}
		works(t, d)
	}
}
