package epoch

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/vm"
)

const ramPages = 16

// stamped returns a run of the guest stamp under random operations, verified.
func stamped(t *testing.T, c vm.Config, epochs int) Config {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	g, err := guests.Lookup("stamp")
	if err != nil {
		t.Fatal(err)
	}
	c.RAM = ramPages * addr.PageSize
	seed := gvmtest.Seed(t)
	return Config{
		Machine: c, Guest: g, Args: guests.Args{"pages": ramPages - 2, "seed": seed>>1 | 1},
		Epochs: epochs, Interval: time.Millisecond, Rest: 2, Random: true, Seed: seed, Verify: true,
		OnEpoch: func(e *Epoch) {
			for _, m := range e.Missing {
				t.Logf("epoch %d of %s: missing %v", e.Number, e.Source, m)
			}
		},
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

var epochs = flag.Int("epochs", 60, "of each run of TestNothingIsMissing")

// TestNothingIsMissing has every source, with one vCPU and with two, with both policies and
// every backing, lose nothing.
func TestNothingIsMissing(t *testing.T) {
	for _, source := range vm.DirtySources() {
		for vcpus := 1; vcpus <= 2; vcpus++ {
			backing := mm.Backing((2*int(source) + vcpus) % 4)
			policy := shadow.Policy((int(source) + vcpus) % 2)
			t.Run(fmt.Sprintf("source=%v/vcpus=%d/backing=%v/policy=%v", source, vcpus, backing, policy), func(t *testing.T) {
				c := stamped(t, vm.Config{Dirty: source, VCPUs: vcpus, Backing: backing, Policy: policy}, *epochs)
				r, err := Run(testContext(t), c)
				if err != nil {
					t.Fatal(err)
				}
				if r.Missing != 0 {
					t.Errorf("%d pages are missing", r.Missing)
				}
				if r.Epochs != c.Epochs || r.Verified+r.Failed != r.Epochs || r.Verified == 0 || r.Failed == 0 || r.Pages == 0 || r.HostOps.Ops == 0 {
					t.Errorf("the run is of too little: %+v", r)
				}
				t.Logf("%d epochs, %d operations, %d pages, %d of them spurious", r.Epochs, r.HostOps.Ops, r.Pages, r.Spurious)
			})
		}
	}
}

// TestGuestEnds: a guest that exits by itself ends the run, verified.
func TestGuestEnds(t *testing.T) {
	c := stamped(t, vm.Config{}, 1000)
	c.Args["limit"] = 1000
	r, err := Run(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Exited || r.Epochs == 0 || r.Verified == 0 || r.Missing != 0 {
		t.Errorf("the guest ended, and the run is %+v", r)
	}
}

// TestScript carries a script out, and names its line where one of its operations fails.
func TestScript(t *testing.T) {
	script := func(text string) *hostops.Script {
		s, err := hostops.Parse("ops", text)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	c := stamped(t, vm.Config{}, 20)
	c.Random, c.Script = false, script("every 1ms discard random 2\nevery 2ms unmap 3\nthen map 3\n")
	r, err := Run(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	if n := r.HostOps.Kinds[hostops.Discard].Done; n == 0 || r.Missing != 0 {
		t.Errorf("the run of a script is %+v", r)
	}
	c.Script = script("every 3ms unmap random 2\non fault map it\n") // or nothing would come back
	if r, err = Run(testContext(t), c); err != nil || r.HostOps.Kinds[hostops.Map].Done == 0 || r.Missing != 0 {
		t.Errorf("the guest is given back what it misses: %+v, %v", r, err)
	}
	c.Script = script("at 1ms discard 1\nat 2ms punch 3\n") // anonymous memory has no file
	if _, err = Run(testContext(t), c); err == nil || !strings.Contains(err.Error(), "ops:2") {
		t.Errorf("line 2 fails: %v", err)
	}
}

func TestRunEnds(t *testing.T) {
	c := stamped(t, vm.Config{}, 1<<30)
	ctx, cancel := context.WithCancelCause(testContext(t))
	stop := errors.New("enough")
	c.OnEpoch = func(e *Epoch) {
		if e.Number == 5 {
			cancel(stop)
		}
	}
	r, err := Run(ctx, c)
	if !errors.Is(err, stop) || r == nil || r.Epochs < 5 {
		t.Errorf("a run that is stopped in epoch 5: %v, %+v", err, r)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{
		{},
		{Epochs: 1, Interval: -1},
		{Epochs: 1, Script: &hostops.Script{}, Random: true},
	} {
		if _, err := Run(context.Background(), c); !errors.Is(err, vm.ErrConfig) {
			t.Errorf("a run of %+v: %v", c, err)
		}
	}
}
