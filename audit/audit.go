package audit

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/epoch"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
	"github.com/secondmmu/gvm/vm"
)

// Config describes an audit. It ends after Duration or Ops, whichever comes first, at the
// end of a round, or after the round that Round says.
type Config struct {
	Seed     uint64
	Duration time.Duration // 0: as long as it takes
	Ops      uint64        // changes by operations and by others; 0: as many as come
	Round    int           // the only round to run, from 1; 0: all, from the first on
	VCPUs    int           // at most, in a round; at least 1

	// Pressure has the kernel compact all of the machine's memory now and then, in rounds
	// whose watches can see it: pages of everybody move. It takes root.
	Pressure bool

	// Defect is a rule that is broken, by name, in a build with the tag gvm_defects; ""
	// is none.
	Defect string

	// OnRound is called at the end of each round. nil: it is not.
	OnRound func(*Round)
}

// Round is one machine and what became of it. Its JSON names are stable.
type Round struct {
	Number  int     `json:"round"`
	Guest   string  `json:"guest"`
	VCPUs   int     `json:"vcpus"`
	Backing string  `json:"backing"`
	Source  string  `json:"source"`
	Policy  string  `json:"policy"`
	Watch   string  `json:"watch"`  // how changes by others are followed: none, events, trace, events+trace
	Others  int     `json:"others"` // threads that change memory behind the machine's back
	Alias   bool    `json:"alias"`  // RAM is shown at two places
	Pages   uint64  `json:"pages"`  // of RAM
	Slots   int     `json:"slots"`  // at most; 0: as many as KVM has
	Epochs  int     `json:"epochs"`
	Ops     uint64  `json:"ops"`
	Strays  uint64  `json:"strays"` // changes by others
	Seconds float64 `json:"seconds"`

	Checks      map[View]uint64 `json:"checks"` // how many things of each view were compared
	Divergences []Divergence    `json:"divergences"`
	NotRun      string          `json:"not_run,omitempty"` // why the machine does not have what the round needs
}

// Divergence is two views that are not the same.
type Divergence struct {
	View  View     `json:"view"`
	Epoch int      `json:"epoch"`
	What  string   `json:"what"`
	Trace []string `json:"trace,omitempty"` // what has to do with the page, as of package trace, oldest first
}

func (d Divergence) String() string { return fmt.Sprintf("epoch %d, %s: %s", d.Epoch, d.View, d.What) }

// Result is what became of an audit.
type Result struct {
	Seed        uint64                         `json:"seed"`
	Rounds      int                            `json:"rounds"`
	NotRun      int                            `json:"not_run"` // rounds of which the machine lacks something
	Epochs      int                            `json:"epochs"`
	Ops         uint64                         `json:"ops"`
	Kinds       map[hostops.Kind]hostops.Count `json:"kinds"`
	Strays      map[hostops.Kind]uint64        `json:"strays"`
	Checks      map[View]uint64                `json:"checks"`
	Divergences uint64                         `json:"divergences"`
	Seconds     float64                        `json:"seconds"`
}

// Changes returns how many changes were audited: operations, and what others did.
func (r *Result) Changes() uint64 {
	n := r.Ops
	for _, strays := range r.Strays {
		n += strays
	}
	return n
}

// epochs is how many a round has: a machine is soon made, and another one is more
// different than another epoch.
const epochs = 8

// events is how many of the trace are kept.
const events = 1 << 15

// Run carries an audit out. Divergences are no error. If something fails, the error
// names the round, and the result is of the rounds before and what there is of that one.
func Run(ctx context.Context, c Config) (*Result, error) {
	if c.VCPUs < 1 || c.VCPUs > guests.MaxVCPUs || c.Round < 0 || c.Duration < 0 {
		return nil, fmt.Errorf("%w: %d vCPUs, round %d, %v", vm.ErrConfig, c.VCPUs, c.Round, c.Duration)
	}
	r := &Result{Seed: c.Seed, Kinds: map[hostops.Kind]hostops.Count{}, Strays: map[hostops.Kind]uint64{}, Checks: map[View]uint64{}}
	begin := time.Now()
	defer func() { r.Seconds = time.Since(begin).Seconds() }()
	for n := max(c.Round, 1); ; n++ {
		err := r.round(ctx, &c, n)
		if err != nil {
			return r, fmt.Errorf("seed %d, %w", c.Seed, err)
		}
		if c.Round != 0 || c.Duration > 0 && time.Since(begin) >= c.Duration || c.Ops > 0 && r.Changes() >= c.Ops {
			return r, nil
		}
	}
}

// plan returns what round n is, which follows from the seed alone.
func (c *Config) plan(n int) (*Round, epoch.Config, error) {
	rng := rand.New(rand.NewPCG(c.Seed, uint64(n)))
	pick := func(n int) int { return rng.IntN(n) }
	r := &Round{Number: n, VCPUs: 1 + pick(c.VCPUs), Pages: uint64(8 + pick(56)), Checks: map[View]uint64{}, Divergences: []Divergence{}}
	machine := vm.Config{
		RAM: r.Pages * addr.PageSize, VCPUs: r.VCPUs,
		Backing: mm.Backing(pick(4)), // of those that need no file
		Dirty:   vm.DirtySources()[pick(len(vm.DirtySources()))],
		Policy:  shadow.Policy(pick(2)),
		Log:     trace.NewLog(events),
	}
	if pick(4) == 0 {
		machine.MaxSlots = 6 + pick(8) // numbers run out
	}
	if machine.Dirty != vm.WriteProtect {
		machine.Watch = []vm.Watch{0, vm.WatchEvents, vm.WatchTrace, vm.WatchEvents | vm.WatchTrace}[pick(4)]
	}
	config := epoch.Config{
		Args:   guests.Args{},
		Epochs: epochs, Interval: time.Duration(1+pick(200)) * time.Millisecond, Rest: r.Pages * uint64(pick(2)), Random: true, Pages: r.Pages, Seed: rng.Uint64(), Verify: true,
		Alias: pick(2) == 0, Defect: c.Defect,
	}
	switch {
	case machine.Watch&vm.WatchEvents != 0:
		r.Others = 1 + pick(2)
	case machine.Watch != 0:
		// What comes in the middle of an operation, and near it, would be taken for a part
		// of that: there are no others.
		r.Others, config.Random = 1, false
	}
	config.Pages -= uint64(r.Others) * ownPages
	r.Backing, r.Source, r.Policy, r.Slots = machine.Backing.String(), machine.Dirty.String(), machine.Policy.String(), machine.MaxSlots
	r.Watch, r.Alias = machine.Watch.String(), config.Alias
	switch pick(4) {
	case 0:
		r.Guest, config.Args["pages"], config.Args["seed"] = "stamp", r.Pages, rng.Uint64()>>1|1
	case 1:
		r.Guest, config.Args["pages"], config.Args["rounds"] = "counter", r.Pages, 1<<62
	default:
		r.Guest = "probe"
	}
	var err error
	config.Machine = machine
	config.Guest, err = guests.Lookup(r.Guest)
	return r, config, err
}

// ownPages is how many pages at the end of RAM are those of one of the others, from which
// he takes memory away.
const ownPages = 3

// round carries round n out.
func (r *Result) round(ctx context.Context, c *Config, n int) error {
	round, config, err := c.plan(n)
	if err != nil {
		return err
	}
	a := newAuditor(round, &config, c.Pressure)
	defer a.close()
	got, err := epoch.Run(ctx, config)
	if got != nil {
		round.Epochs, round.Seconds = got.Epochs, got.Seconds
		if got.HostOps != nil {
			round.Ops = got.HostOps.Ops
			for kind, n := range got.HostOps.Kinds {
				sum := r.Kinds[kind]
				sum.Done, sum.Skipped, sum.Failed = sum.Done+n.Done, sum.Skipped+n.Skipped, sum.Failed+n.Failed
				r.Kinds[kind] = sum
			}
		}
	}
	if errors.Is(err, hostops.ErrNotFollowed) {
		a.diverge(Strays, "%v", err)
		err = nil
	}
	for kind, n := range a.strayKinds {
		round.Strays += n
		r.Strays[kind] += n
	}
	switch {
	case got == nil && (errors.Is(err, errors.ErrUnsupported) || lacks(err)):
		round.NotRun, err = err.Error(), nil
		r.NotRun++
	case err != nil:
		err = fmt.Errorf("%s: %w", round, err)
	}
	r.Rounds++
	r.Epochs += round.Epochs
	r.Ops += round.Ops
	r.Divergences += uint64(len(round.Divergences))
	for view, n := range round.Checks {
		r.Checks[view] += n
	}
	if c.OnRound != nil {
		c.OnRound(round)
	}
	return err
}
