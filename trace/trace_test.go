package trace

import (
	"sync"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestSince(t *testing.T) {
	for name, tt := range map[string]struct {
		keep, record int
		since        uint64
		first, lost  uint64 // first: sequence number of the first event returned
	}{
		"all are kept":              {keep: 8, record: 3, since: 0, first: 1},
		"after a number":            {keep: 8, record: 3, since: 2, first: 3},
		"exactly full":              {keep: 3, record: 3, since: 0, first: 1},
		"oldest are lost":           {keep: 3, record: 5, since: 0, first: 3, lost: 2},
		"asked for fewer than kept": {keep: 3, record: 5, since: 3, first: 4},
	} {
		t.Run(name, func(t *testing.T) {
			l := NewLog(tt.keep)
			for range tt.record {
				l.Record(Event{Kind: HostOp})
			}
			events, lost := l.Since(tt.since)
			if lost != tt.lost {
				t.Errorf("lost %d events, want %d", lost, tt.lost)
			}
			if want := uint64(tt.record) - tt.first + 1; uint64(len(events)) != want {
				t.Fatalf("got %d events, want %d", len(events), want)
			}
			for i, e := range events {
				if want := tt.first + uint64(i); e.Seq != want {
					t.Errorf("event %d has sequence number %d, want %d", i, e.Seq, want)
				}
			}
		})
	}
}

func TestNilLogKeepsNothing(t *testing.T) {
	var l *Log
	l.Record(Event{Kind: HostOp})
	if events, lost := l.Since(0); len(events) != 0 || lost != 0 || l.Len() != 0 || l.NewOp() != 0 {
		t.Errorf("a nil log returned %v, lost %d, length %d", events, lost, l.Len())
	}
}

func TestConcurrentRecordsHaveNoGap(t *testing.T) {
	l := NewLog(4000)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				l.Record(Event{Kind: Touch})
			}
		})
	}
	wg.Wait()
	events, lost := l.Since(0)
	if lost != 0 || len(events) != 4000 {
		t.Fatalf("got %d events and lost %d, want 4000 and 0", len(events), lost)
	}
	for i, e := range events {
		if e.Seq != uint64(i+1) || i > 0 && e.Time < events[i-1].Time {
			t.Fatalf("event %d has number %d and time %v", i, e.Seq, e.Time)
		}
	}
}

func BenchmarkRecord(b *testing.B) {
	l := NewLog(1024)
	b.ReportAllocs()
	for b.Loop() {
		l.Record(Event{Kind: HostOp, Name: "discard"})
	}
}
