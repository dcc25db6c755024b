package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/audit"
	"github.com/secondmmu/gvm/vm"
)

func auditCommand() *cli.Command {
	cfg := &audit.Config{}
	return command(&cli.Command{
		Name:  "audit",
		Usage: "run guests under random operations of the host, and compare every view of their memory",
		Description: `Each round is a machine of its own: its guest, vCPUs, memory, dirty source, slot
policy, watches and operations follow from the seed; and in rounds with a watch code
that does not know the machine changes its memory, too. What diverges is printed as it
is found, with the trace of the page, and the exit status is 1. "gvm audit --seed N
--round N" runs one round again. Rounds whose watch the machine does not have are
counted as not run.

With --json each round is a line, and then the result; "kind" says which.`,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "duration", Value: 10 * time.Second, Destination: &cfg.Duration, Usage: "end with the first round that is over after `DURATION`; 0: with --ops alone"},
			&cli.Uint64Flag{Name: "ops", Destination: &cfg.Ops, DefaultText: "no limit", Usage: "end with the first round after which there were `N` changes of mappings"},
			&cli.Uint64Flag{Name: "seed", Destination: &cfg.Seed, DefaultText: "random, and printed", Usage: "choose everything by `N`, not 0"},
			&cli.IntFlag{Name: "round", Destination: &cfg.Round, DefaultText: "all", Usage: "run round `N` alone"},
			&cli.IntFlag{Name: "vcpus", Value: 2, Destination: &cfg.VCPUs, Usage: "give guests up to `N` vCPUs; it changes what rounds are"},
			&cli.BoolFlag{Name: "pressure", Destination: &cfg.Pressure, DisableDefaultText: true, Usage: "have the kernel compact all memory of this machine now and then, which takes root"},
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			if cfg.Duration == 0 && cfg.Ops == 0 && cfg.Round == 0 {
				return misuse(c, errors.New("it would never end: say how long, or how many operations"))
			}
			if cfg.Seed == 0 {
				cfg.Seed = rand.Uint64() | 1
			}
			err := runAudit(c.Context, cfg, c.Bool("json"), c.App.Writer)
			if errors.Is(err, vm.ErrConfig) {
				return misuse(c, err)
			}
			return err
		},
	})
}

// The lines of "gvm audit --json", by their kinds.
type (
	auditRound struct {
		Kind string `json:"kind"` // "round"
		*audit.Round
	}
	auditResult struct {
		Kind string `json:"kind"` // "result"
		*audit.Result
		Error string `json:"error"` // what ended the audit, or empty
	}
)

// runAudit carries an audit out. Divergences are exit status 1, after all has been printed.
func runAudit(ctx context.Context, cfg *audit.Config, asJSON bool, stdout io.Writer) error {
	var failed error
	lines := json.NewEncoder(stdout)
	cfg.OnRound = func(r *audit.Round) {
		switch {
		case asJSON:
			failed = errors.Join(failed, lines.Encode(auditRound{"round", r}))
		case len(r.Divergences) > 0 || cfg.Round != 0:
			failed = errors.Join(failed, r.WriteText(stdout))
		}
	}
	r, err := audit.Run(ctx, *cfg)
	if r == nil || r.Epochs == 0 && err != nil && ctx.Err() == nil {
		return lack(err)
	}
	if asJSON {
		line := auditResult{Kind: "result", Result: r}
		if err != nil {
			line.Error = err.Error()
		}
		failed = errors.Join(failed, lines.Encode(line))
	} else {
		failed = errors.Join(failed, r.WriteText(stdout))
	}
	if err := errors.Join(err, failed); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	if r.Divergences > 0 {
		return exitStatus(statusFailed) // they have been printed
	}
	return nil
}
