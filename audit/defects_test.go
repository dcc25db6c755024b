//go:build gvm_defects

package audit

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// defects are rules that are broken, and the views that may show it.
var defects = []string{
	"event-dropped",          // a change by others is not followed
	"event-twice",            // an operation is followed as a change by others
	"no-zap-of-alias",        // translations of a page are taken out at one of its frames
	"stale-slot",             // a slot goes on showing what was unmapped
	"harvest-after-deletion", // the log of a slot goes with it
}

// TestDefectsAreFound wants each defect found. On a machine with two quiet processors it takes
// seconds, and an emulated one no more than a minute.
func TestDefectsAreFound(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, defect := range defects {
		t.Run(defect, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(testContext(t))
			found := errors.New("found")
			begin := time.Now()
			r, err := Run(ctx, Config{Seed: gvmtest.Seed(t), Duration: 2 * time.Minute, VCPUs: 2, Defect: defect, OnRound: func(r *Round) {
				if len(r.Divergences) > 0 {
					var text strings.Builder
					if err := r.WriteText(&text); err != nil {
						t.Error(err)
					}
					t.Logf("after %.1f s: %s", time.Since(begin).Seconds(), text.String())
					cancel(found)
				}
			}})
			switch {
			case errors.Is(context.Cause(ctx), found):
			case err != nil:
				t.Error(err)
			default:
				t.Errorf("of %d rounds, %d epochs and %d changes nothing diverges", r.Rounds, r.Epochs, r.Changes())
			}
		})
	}
}
