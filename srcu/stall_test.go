package srcu

import (
	"bytes"
	"log"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// stalls has the stalls of a domain sent to a channel.
func stalls(d *Domain, after time.Duration) <-chan Stall {
	c := make(chan Stall, 100) // more than there should be
	d.OnStall(after, func(s Stall) { c <- s })
	return c
}

func receive(t *testing.T, c <-chan Stall) (s Stall) {
	t.Helper()
	select {
	case s = <-c:
	case <-time.After(gvmtest.Limit):
		t.Error("a stall is not reported")
	}
	return s
}

// awaitWaiting waits for the grace period under way to have gone on for that much
// longer.
func awaitWaiting(d *Domain, longer time.Duration) {
	until := d.Stats().Waiting + longer
	await("a grace period to go on", func() bool { return d.Stats().Waiting > until })
}

// TestS21StallIsReportedOnce has a section outlast the limit in each wait of a
// grace period, in both, and in the next grace period.
func TestS21StallIsReportedOnce(t *testing.T) {
	each(t, func(t *testing.T, b bed) {
		const after = time.Millisecond
		r1, close1 := b.newReader()
		defer close1()
		r2, close2 := b.newReader()
		defer close2()
		reports := stalls(b.d, after)
		for range 2 {
			used := b.d.idx.Load() & 1
			first, second := lockInRank(b.d, r1, 1-used), r2.ReadLock()
			done := gvmtest.Background(func() { b.wait(b.d) })
			s := receive(t, reports)
			want := Stall{Domain: b.d, Rank: int(rank(first)), Sections: 1}
			if _, registered := r1.(*Reader); registered {
				want.Readers = 1
			}
			if s.Domain != want.Domain || s.Rank != want.Rank || s.Sections != want.Sections || s.Readers != want.Readers {
				t.Errorf("the report is %+v, want that of %+v", s, want)
			}
			if s.Waited < after || s.Waited > b.d.Stats().Waiting {
				t.Errorf("the report is of %v, want at least %v, and less than Stats says later, %v", s.Waited, after, b.d.Stats().Waiting)
			}
			var sum int64
			for _, n := range s.Shards {
				sum += n
			}
			if sum != 1-int64(want.Readers) {
				t.Errorf("the report has %v by shard, want %d", s.Shards, 1-want.Readers)
			}
			switch {
			case !debug && s.Opened != nil:
				t.Errorf("the report knows where sections were opened: %q", s.Opened)
			case debug && (len(s.Opened) != 1 || !strings.Contains(s.Opened[0], "invariants_test.go")): // lockInRank
				t.Errorf("the report says that sections were opened at %q, want 1 in lockInRank", s.Opened)
			}
			awaitWaiting(b.d, 3*after)
			r1.ReadUnlock(first)
			awaitFlip(b.d, second)
			awaitWaiting(b.d, 3*after)
			r2.ReadUnlock(second)
			<-done
			if n := len(reports); n > 0 {
				t.Errorf("a grace period is reported %d times more", n)
			}
		}
	})
}

// TestS21NoStallIsReported has a grace period go on for some time, with a limit
// that is longer, and without one.
func TestS21NoStallIsReported(t *testing.T) {
	for _, after := range []time.Duration{time.Hour, 0, -1} {
		eachReader(t, func(t *testing.T, b bed) {
			reports := stalls(b.d, after)
			idx := b.d.DownRead()
			done := gvmtest.Background(func() { b.wait(b.d) })
			awaitFlip(b.d, idx)
			awaitWaiting(b.d, 2*time.Millisecond)
			b.d.UpRead(idx)
			<-done
			if n := len(reports); n > 0 {
				t.Errorf("with a limit of %v, %d stalls are reported: %+v", after, n, <-reports)
			}
		})
	}
}

// TestS21WaitingInsideASectionIsAStall has goroutines wait for their own sections. A
// report that closes the section lets them go on.
func TestS21WaitingInsideASectionIsAStall(t *testing.T) {
	for what, wait := range map[string]func(*Domain){
		"Synchronize":          (*Domain).Synchronize,
		"SynchronizeExpedited": (*Domain).SynchronizeExpedited,
		"Barrier": func(d *Domain) {
			d.Call(new(Head), func(*Head) {})
			d.Barrier()
		},
	} {
		eachReader(t, func(t *testing.T, b bed) {
			idx := b.d.DownRead() // of which a debug build does not say that it is the goroutine's own
			reported := 0
			b.d.OnStall(time.Millisecond, func(s Stall) {
				reported++
				b.d.UpRead(idx)
			})
			wait(b.d)
			if reported != 1 {
				t.Errorf("%s inside a section is reported %d times, want once", what, reported)
			}
		})
	}
}

// TestS21StallReportThatPanics leaves no grace period under way.
func TestS21StallReportThatPanics(t *testing.T) {
	eachReader(t, func(t *testing.T, b bed) {
		b.d.OnStall(time.Millisecond, func(Stall) { panic("stalled") })
		idx := b.d.DownRead()
		if got := gvmtest.Panics(func() { b.wait(b.d) }); got != "stalled" {
			t.Errorf("Synchronize panics with %q, want the report's panic", got)
		}
		b.d.OnStall(0, nil)
		b.d.UpRead(idx)
		works(t, b.d)
	})
}

// lockedBuffer is written by one goroutine and read by another.
type lockedBuffer struct {
	mu  sync.Mutex // protects buf
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *lockedBuffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf.Reset()
}

// TestStallIsLogged: unless OnStall says otherwise, that is what is done.
func TestStallIsLogged(t *testing.T) {
	var text lockedBuffer
	old, writer, flags := slog.Default(), log.Writer(), log.Flags()
	slog.SetDefault(slog.New(slog.NewTextHandler(&text, nil)))
	defer func() {
		slog.SetDefault(old)
		log.SetOutput(writer) // which SetDefault has changed
		log.SetFlags(flags)
	}()
	var d Domain
	d.OnStall(time.Millisecond, nil)
	idx := d.DownRead()
	done := gvmtest.Background(d.Synchronize)
	awaitFlip(&d, idx)
	gvmtest.Eventually(func() bool { return text.String() != "" })
	d.UpRead(idx)
	<-done
	if n := strings.Count(text.String(), "\n"); n != 1 {
		t.Errorf("a stall is logged in %d lines, want 1:\n%s", n, text.String())
	}
	for _, want := range []string{"level=WARN", "a grace period is stalled by read sections", "domain=0x", "waited=", "rank=0", "sections=1", "readers=0", "shards=map[-1:1]"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("a stall is logged as %q, want %q in it", text.String(), want)
		}
	}
	text.Reset()
	logStall(Stall{Domain: Default()})
	if want := "domain=default"; !strings.Contains(text.String(), want) {
		t.Errorf("a stall of the default domain is logged as %q, want %q in it", text.String(), want)
	}
	if d := New(); d.stall.Load() != nil || defaultStallRule.after != 21*time.Second {
		t.Errorf("a new domain has a rule %v, and the default is %v; want none, and 21 s", d.stall.Load(), defaultStallRule.after)
	}
}
