package vm

import (
	"testing"
	"time"
)

func TestPauseBuckets(t *testing.T) {
	last := -1
	for b := range pauseBuckets {
		end := bucketEnd(b)
		if end < 0 { // longer than a Duration
			break
		}
		if got := bucketOf(end); got != b {
			t.Fatalf("bucket %d ends at %d, which is of bucket %d", b, end, got)
		}
		if got := bucketOf(end + 1); end+1 > 0 && got != b+1 {
			t.Fatalf("bucket %d ends at %d, and the next time is of bucket %d", b, end, got)
		}
		last = b
	}
	if got := bucketOf(1<<63 - 1); got != last {
		t.Errorf("the longest time is of bucket %d, and the last that has an end is %d", got, last)
	}
	if got := bucketOf(-1); got != 0 {
		t.Errorf("a negative time is of bucket %d", got)
	}
}

func TestPauseStats(t *testing.T) {
	var s PauseStats
	for i := range 1000 {
		s.add(time.Duration(i+1) * time.Microsecond)
	}
	early := s
	if s = s.Since(PauseStats{}); s.Count != 1000 || s.Total != 500500*time.Microsecond || s.Max != time.Millisecond {
		t.Errorf("of 1 to 1000 us: %d, %v, longest %v", s.Count, s.Total, s.Max)
	}
	near := func(what string, got, want time.Duration) {
		t.Helper()
		if got < want || got > want+want/8 {
			t.Errorf("%s is %v, want %v or an eighth more", what, got, want)
		}
	}
	near("the median", s.Median, 501*time.Microsecond)
	near("p99", s.P99, 991*time.Microsecond)
	for range 10 {
		s.add(time.Second)
	}
	s = s.Since(early)
	if s.Count != 10 || s.Total != 10*time.Second {
		t.Errorf("since then: %d, %v", s.Count, s.Total)
	}
	near("the median since then", s.Median, time.Second)
	if got := (PauseStats{}).Since(PauseStats{}); got.Median != 0 || got.P99 != 0 {
		t.Errorf("of nothing: %v, %v", got.Median, got.P99)
	}
}
