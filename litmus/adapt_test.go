package litmus

import (
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// TestAdapt plays rounds whose changes take a known time, with and without vCPUs kept out
// meanwhile, and counts what overlaps.
func TestAdapt(t *testing.T) {
	const (
		instances = 16
		body      = 20 // turns that an instance takes without its gap
	)
	for name, tt := range map[string]struct {
		lag, change int // turns from the round's beginning to the host's, and that the change takes
		out         bool
		want        float64 // of iterations, effective
	}{
		"a discard":                {lag: 300, change: 200_000, want: 0.3},
		"a quick one":              {lag: 300, change: 2000, want: 0.05},
		"a slow one":               {lag: 300, change: 5_000_000, want: 0.3},
		"a move":                   {lag: 300, change: 400_000, out: true, want: 0.03},
		"a move, by a slow host":   {lag: 200_000, change: 400_000, out: true, want: 0.015},
		"a discard, by a slow one": {lag: 200_000, change: 100_000, want: 0.1},
	} {
		b := &bed{t: parse(t, "litmus t\npage x\nguest P0\n r0 = load x\n r1 = load x\nhost H0\n discard x\nforbidden x == 1\n"), c: &Config{Instances: instances},
			rng: gvmtest.Rand(t), startSpan: span{turns: 64}, hostSpan: span{turns: 64}, delay: make([]int, 1), gap: make([]int, 1), split: make([]int, 1), hostWait: make([]int, 1)}
		all, effective := 0, 0
		for range 1000 {
			b.jitter()
			begin := tt.lag + b.hostWait[0]
			end := begin + tt.change
			at := b.delay[0]
			var before, after, overlapping int
			for range instances {
				first := at
				at += body
				if b.split[0] > 0 {
					at += b.gap[0]
				}
				if tt.out && first < begin && at > begin || tt.out && first >= begin && first < end {
					at = max(at, end) // the vCPU was not in the guest
					first = min(first, begin)
				}
				switch {
				case at < begin:
					before++
				case first >= end || tt.out && first >= begin:
					after++
				default:
					overlapping++
				}
				if b.split[0] == 0 {
					at += b.gap[0]
				}
			}
			b.adapt(before, after, overlapping)
			all, effective = all+instances, effective+overlapping
		}
		if got := float64(effective) / float64(all); got < tt.want {
			t.Errorf("%s: %.2f of iterations are effective, want %.2f (spans of %.0f and %.0f turns)", name, got, tt.want, b.startSpan.turns, b.hostSpan.turns)
		} else {
			t.Logf("%s: %.2f of iterations are effective (spans of %.0f and %.0f turns)", name, got, b.startSpan.turns, b.hostSpan.turns)
		}
	}
}
