package vm

import (
	"math/bits"
	"time"
)

// PauseStats is how long vCPUs were kept out of the guest, by changes of slots and by
// Pause: from when the first of them was asked to leave until they were let in again.
// Times in which no vCPU was in the guest, or wanted to be, do not count.
type PauseStats struct {
	Count  uint64        `json:"count"`
	Total  time.Duration `json:"total"`
	Max    time.Duration `json:"max"`
	Median time.Duration `json:"median"` // to within an eighth: the upper end of the bucket that it lies in
	P99    time.Duration `json:"p99"`    // likewise

	buckets [pauseBuckets]uint64
}

// A bucket is an eighth of a power of two of nanoseconds. Times below 8 have one each.
const (
	pauseOctave  = 8
	pauseBuckets = 64 * pauseOctave
)

func bucketOf(d time.Duration) int {
	n := uint64(max(d, 0))
	if n < pauseOctave {
		return int(n)
	}
	shift := bits.Len64(n) - 4
	return shift*pauseOctave + int(n>>shift)
}

// bucketEnd returns the longest time that belongs to bucket b.
func bucketEnd(b int) time.Duration {
	if b < 2*pauseOctave {
		return time.Duration(b)
	}
	shift := b/pauseOctave - 1
	return time.Duration(uint64(b%pauseOctave+pauseOctave+1)<<shift - 1)
}

func (s *PauseStats) add(d time.Duration) {
	s.Count++
	s.Total += d
	s.Max = max(s.Max, d)
	s.buckets[bucketOf(d)]++
}

// quantile returns the shortest time that a fraction q of all was not longer than.
func (s *PauseStats) quantile(q float64) time.Duration {
	rank, seen := uint64(q*float64(s.Count)), uint64(0)
	for b, n := range s.buckets {
		if seen += n; n > 0 && seen > rank {
			return min(bucketEnd(b), s.Max)
		}
	}
	return s.Max
}

// Since returns what has been added to an earlier s. Max is that of all.
func (s PauseStats) Since(earlier PauseStats) PauseStats {
	s.Count -= earlier.Count
	s.Total -= earlier.Total
	for b := range s.buckets {
		s.buckets[b] -= earlier.buckets[b]
	}
	s.Median, s.P99 = s.quantile(0.5), s.quantile(0.99)
	return s
}
