//go:build gvm_defects

package epoch

import (
	"context"
	"errors"
	"testing"

	"github.com/secondmmu/gvm/vm"
)

// harmless are the defects that a source makes up for.
var harmless = map[vm.DirtySource]map[string]bool{
	// A slot that is made anew has all its pages in the log.
	vm.ManualAllSet: {HarvestAfterDeletion: true},
	// What was in a ring stays there when its slot goes.
	vm.Ring: {HarvestAfterDeletion: true},
	// What the host's page tables know does not go with a slot; and they see the
	// machine's own stores, and zeroed pages that are written again.
	vm.WriteProtect: {HarvestAfterDeletion: true, NoMarkOnVMMWrites: true},
}

// TestDefectsAreFound has every defect lose pages with every source, if it can.
func TestDefectsAreFound(t *testing.T) {
	for _, defect := range Defects() {
		for _, source := range vm.DirtySources() {
			if harmless[source][defect] {
				continue
			}
			t.Run(defect+"/"+source.String(), func(t *testing.T) {
				c := stamped(t, vm.Config{Dirty: source}, 1000)
				c.Defect = defect
				ctx, cancel := context.WithCancelCause(testContext(t))
				found := errors.New("found")
				report := c.OnEpoch
				c.OnEpoch = func(e *Epoch) {
					if report(e); len(e.Missing) > 0 {
						cancel(found)
					}
				}
				r, err := Run(ctx, c)
				if err == nil {
					t.Errorf("of %d epochs, %d operations and %d pages none is missing", r.Epochs, r.HostOps.Ops, r.Pages)
				} else if !errors.Is(err, found) {
					t.Error(err)
				}
			})
		}
	}
}
