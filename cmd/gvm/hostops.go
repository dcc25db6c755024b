package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/epoch"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/vm"
)

// hostOps is the operations of the host that a command line asks for, and what carries them
// out while a machine runs.
type hostOps struct {
	name string        // what --host-ops says: a script, "random", or "" for none
	seed uint64        // 0: chosen by parse
	pace time.Duration // of those at random

	script *hostops.Script
	random bool
	runner *hostops.Runner // of the machine; nil: there is nothing to carry out
}

// hostOpsFlag is --host-ops.
func hostOpsFlag(name *string) cli.Flag {
	return &cli.StringFlag{Name: "host-ops", Destination: name, DefaultText: "none",
		Usage: "carry out the operations of the script `FILE`, which \"gvm help host-ops\" describes, or random ones with \"random\""}
}

// flags are those of a command that runs one machine.
func (o *hostOps) flags(seed string) []cli.Flag {
	return []cli.Flag{
		hostOpsFlag(&o.name),
		&cli.Uint64Flag{Name: "seed", Destination: &o.seed, DefaultText: seed, Usage: "choose operations by `N`, not 0"},
		&cli.DurationFlag{Name: "pace", Destination: &o.pace, Value: time.Millisecond, Usage: "wait for `DURATION` between random operations"},
	}
}

// parse reads the script, and chooses a seed if there is none.
func (o *hostOps) parse() (err error) {
	if o.pace <= 0 {
		return fmt.Errorf("a pace of %v is not positive", o.pace)
	}
	if o.script, o.random, err = readHostOps(o.name); err != nil {
		return err
	}
	switch {
	case o.name == "":
		o.seed = 0
	case o.seed == 0:
		o.seed = chooseSeed()
	}
	return nil
}

// chooseSeed returns a seed that is not 0, and that JavaScript's numbers have the bits for.
func chooseSeed() uint64 { return rand.Uint64N(1<<53-1) + 1 }

// readHostOps reads what --host-ops names: a script, operations at random, or nothing if it
// is empty.
func readHostOps(name string) (script *hostops.Script, random bool, err error) {
	switch name {
	case "":
		return nil, false, nil
	case "random":
		return nil, true, nil
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, false, err
	}
	script, err = hostops.Parse(name, string(text))
	return script, false, err
}

// boot makes a machine that the operations can be carried out on, and has load put the guest
// in it.
func (o *hostOps) boot(c vm.Config, load func(*vm.Machine) error) (_ *vm.Machine, err error) {
	var m *vm.Machine // none of its vCPUs runs before it is there
	if o.name != "" {
		c.Spare = epoch.Spare
		// The runner is there before the guest runs.
		c.OnMark = func(_ int, mark uint32) error { o.runner.Mark(mark); return nil }
		c.OnTouch = func(_ int, gpa addr.GPA) {
			if offset, ok := m.RAMOffset(gpa); ok {
				o.runner.Fault(offset >> addr.PageShift)
			}
		}
	}
	if m, err = vm.New(c); err != nil {
		return nil, lack(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if o.name != "" {
		if o.runner, err = epoch.NewRunner(m, o.script, o.seed, o.pace); err != nil {
			return nil, err
		}
	}
	if err := load(m); err != nil {
		return nil, lack(err)
	}
	return m, nil
}

// run runs the machine until the guest ends, ctx is done, or an operation fails, which is
// the cause that fail is then called with: it cancels ctx. Meanwhile often is called again and
// again, and once more when nothing happens any more; nil: it is not.
func (o *hostOps) run(ctx context.Context, m *vm.Machine, fail context.CancelCauseFunc, often func()) (status int, err error) {
	if err := m.Start(ctx); err != nil {
		return 0, err
	}
	opsCtx, stop := context.WithCancel(ctx)
	defer stop()
	var ops sync.WaitGroup
	if o.runner != nil {
		ops.Go(func() {
			if err := o.runner.Run(opsCtx); err != nil && opsCtx.Err() == nil {
				fail(err)
			}
		})
	}
	if often == nil {
		often = func() {}
	}
	const interval = 10 * time.Millisecond // a guest that exits once a microsecond fills a third of a ring
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for running := true; running; {
		select {
		case <-m.Done():
			running = false
			stop()
			ops.Wait()
			m.Memory().Follow() // what others have done belongs to the run
		case <-tick.C:
		}
		often()
	}
	return m.Wait()
}

// close closes the machine, whose run has ended. Before that all RAM is brought back, so that a
// file that was truncated is as long as RAM.
func (o *hostOps) close(m *vm.Machine) (err error) {
	if o.runner != nil {
		err = o.runner.Restore(context.Background())
	}
	return errors.Join(err, m.Close())
}

// chance reports whether the seed decides on operations.
func (o *hostOps) chance() bool {
	return o.random || o.script != nil && slices.ContainsFunc(o.script.Lines, func(l hostops.Line) bool { return l.Op.Pages.Which == hostops.RandomPages })
}
