package audit

import (
	"context"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/vm"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), gvmtest.StormLasts(0)+2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// TestAudit wants no divergence, and every view compared.
func TestAudit(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	c := Config{Seed: gvmtest.Seed(t), Duration: gvmtest.StormLasts(3 * time.Second), VCPUs: 2}
	c.OnRound = func(r *Round) {
		t.Logf("%v: %d epochs, %d operations, %d strays in %.1f s", r, r.Epochs, r.Ops, r.Strays, r.Seconds)
		if len(r.Divergences) > 0 {
			var text strings.Builder
			if err := r.WriteText(&text); err != nil {
				t.Error(err)
			}
			t.Error(text.String())
		}
	}
	r, err := Run(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d rounds, %d epochs, %d operations: compared %v", r.Rounds, r.Epochs, r.Ops, r.Checks)
	if r.Rounds > 20 {
		for _, v := range Views() {
			if r.Checks[v] == 0 && v != KVM {
				t.Errorf("of %s nothing was compared", v)
			}
		}
	}
}

// TestRoundAgain runs a round by itself: its plan follows from seed and number.
func TestRoundAgain(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	seed := gvmtest.Seed(t)
	var plans []Round
	for range 2 {
		_, err := Run(testContext(t), Config{Seed: seed, Round: 3, VCPUs: 2, OnRound: func(r *Round) {
			plans = append(plans, Round{Number: r.Number, Guest: r.Guest, VCPUs: r.VCPUs, Backing: r.Backing, Source: r.Source, Policy: r.Policy, Watch: r.Watch, Others: r.Others, Alias: r.Alias, Pages: r.Pages, Slots: r.Slots})
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(plans) != 2 || plans[0].Number != 3 || !reflect.DeepEqual(plans[0], plans[1]) {
		t.Errorf("round 3 was %+v", plans)
	}
}

// TestDivergencesAreFound breaks one view at a time, and wants it found.
func TestDivergencesAreFound(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	raw := func(nr uintptr, r addr.HVARange, arg uintptr) error {
		if _, _, errno := unix.Syscall(nr, uintptr(r.Start), uintptr(r.Bytes()), arg); errno != 0 {
			return errno
		}
		return nil
	}
	for name, tt := range map[string]struct {
		config vm.Config
		do     func(m *vm.Machine, r addr.HVARange) error // to the third page of RAM
		view   View
	}{
		"a slot stays":             {vm.Config{Disconnected: true}, func(m *vm.Machine, r addr.HVARange) error { return m.Memory().Unmap(r) }, Slots},
		"a slot stays writable":    {vm.Config{Disconnected: true}, func(m *vm.Machine, r addr.HVARange) error { return m.Memory().Protect(r, addr.Read) }, Slots},
		"somebody protects a page": {vm.Config{}, func(_ *vm.Machine, r addr.HVARange) error { return raw(unix.SYS_MPROTECT, r, unix.PROT_READ) }, Maps},
		"somebody unmaps a page":   {vm.Config{}, func(_ *vm.Machine, r addr.HVARange) error { return raw(unix.SYS_MUNMAP, r, 0) }, Maps},
		"somebody uses a reservation": {vm.Config{}, func(m *vm.Machine, r addr.HVARange) error {
			return errors.Join(m.Memory().Unmap(r), raw(unix.SYS_MPROTECT, r, unix.PROT_READ))
		}, Maps},
	} {
		t.Run(name, func(t *testing.T) {
			tt.config.RAM = 8 * addr.PageSize
			m, err := vm.New(tt.config)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := m.Close(); err != nil {
					t.Error(err)
				}
			}()
			a := &auditor{round: &Round{VCPUs: 1, Checks: map[View]uint64{}}, rng: rand.New(rand.NewPCG(1, 1))}
			check := func() (found []View) {
				all := a.pages(m)
				a.slots(m, all)
				if err := a.maps(m); err != nil {
					t.Fatal(err)
				}
				for _, d := range a.round.Divergences {
					found = append(found, d.View)
				}
				return found
			}
			if found := check(); found != nil {
				t.Fatalf("before anything was done: %v", a.round.Divergences)
			}
			hva, _ := m.Slots().HVA(guests.RAMBase + 2*addr.PageSize)
			r := addr.HVAs(hva, addr.PageSize)
			if err := tt.do(m, r); err != nil {
				t.Fatal(err)
			}
			if found := check(); !slices.Equal(found, []View{tt.view}) {
				t.Errorf("found are %v, want one of %s", a.round.Divergences, tt.view)
			}
			// Memory gives its addresses back as one range, holes or not.
		})
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{{}, {VCPUs: guests.MaxVCPUs + 1}, {VCPUs: 1, Round: -1}, {VCPUs: 1, Duration: -1}} {
		if _, err := Run(context.Background(), c); !errors.Is(err, vm.ErrConfig) {
			t.Errorf("an audit of %+v: %v", c, err)
		}
	}
}
