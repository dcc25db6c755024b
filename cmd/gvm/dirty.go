package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/epoch"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/vm"
)

// dirtyConfig is what a command line of "gvm dirty" asks for.
type dirtyConfig struct {
	run      epoch.Config
	tracker  string           // names of sources, or ""
	sources  []vm.DirtySource // nil: all that the machine has
	ring     uint             // entries; 0: the default
	hostOps  string
	heatmap  string // a file's name, or ""
	json     bool
	progress bool // there is a terminal to show it on
}

// dirtyGuest is what runs without a guest on the command line.
var dirtyGuest = []string{"stamp", "pages=64"}

func dirtyCommand() *cli.Command {
	cfg := &dirtyConfig{run: epoch.Config{Machine: vm.Config{RAM: 1 << 20}}}
	m := &cfg.run.Machine
	return command(&cli.Command{
		Name:      "dirty",
		Usage:     "have a guest write, and say which pages were dirty, at which cost, and whether any was missed",
		ArgsUsage: "[GUEST [NAME=VALUE ...]]",
		Description: fmt.Sprintf(`In each epoch the guest runs for a while, and then a checkpoint is taken, as a
snapshot would take it: harvests of the dirty pages while the guest goes on, and a
last one while it is paused. This is done with one source after the other that
tells what the guest writes: %s. Without GUEST it is
"%s".

--verify keeps a copy of memory that learns of changes by harvests alone, and
compares it with memory in each epoch. A page that differs is missing: it is named,
with the host's operation that lost it, and the exit status is 1. In some epochs
the snapshot is made to fail, and what it had must come again.

--host-ops has the host change the mappings of guest memory meanwhile: at random,
or by a script, one operation a line, such as "every 1ms discard random 2".

--watch has changes that others make followed, and the pages that they are of be dirty.
It does not go with wp, which is left out then.

A heat map has guest memory from left to right and epochs from top to bottom, and
is the brighter, the more of the pages were dirty.

With --json each epoch is a line, and then each source's result; "kind" says which.
Times are in nanoseconds.`, strings.Join(sourceNames(), ", "), strings.Join(dirtyGuest, " ")),
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "epochs", Value: 10, Destination: &cfg.run.Epochs, Usage: "run for `N` epochs with each source"},
			&cli.DurationFlag{Name: "interval", Value: 5 * time.Millisecond, Destination: &cfg.run.Interval, Usage: "let the guest run for `DURATION` in each epoch"},
			&cli.StringFlag{Name: "tracker", Destination: &cfg.tracker, DefaultText: "all that the machine has", Usage: "use `SOURCE,...`: " + strings.Join(sourceNames(), ", ")},
			&cli.UintFlag{Name: "ring-entries", Destination: &cfg.ring, DefaultText: "4096", Usage: "give each dirty ring `N` entries, a power of two"},
			&cli.Uint64Flag{Name: "rest", Value: 16, Destination: &cfg.run.Rest, Usage: "pause the guest when `N` pages or fewer are dirty, or no fewer become so"},
			&cli.BoolFlag{Name: "verify", Destination: &cfg.run.Verify, DisableDefaultText: true, Usage: "compare a copy that learns of changes by harvests alone with memory"},
			&cli.BoolFlag{Name: "working-set", Destination: &cfg.run.WorkingSet, DisableDefaultText: true,
				Usage: "count the pages that were used, too: by the machine itself and, where the host has idle page tracking, by anybody"},
			hostOpsFlag(&cfg.hostOps),
			&cli.Uint64Flag{Name: "seed", Destination: &cfg.run.Seed, DefaultText: "random, and printed", Usage: "choose operations, and snapshots that fail, by `N`, not 0"},
			watchFlag(&m.Watch),
			&cli.StringFlag{Name: "heatmap", Destination: &cfg.heatmap, DefaultText: "none", Usage: "write a heat map to `FILE`, as a PNG"},
			&cli.GenericFlag{Name: "mem", Value: (*size)(&m.RAM), Usage: "give the guest `SIZE` of RAM: in MiB, or with a suffix K, M or G"},
			&cli.IntFlag{Name: "vcpus", Value: 1, Destination: &m.VCPUs, Usage: "give the guest `N` vCPUs"},
			&cli.GenericFlag{Name: "backing", Value: &choice[mm.Backing]{&m.Backing, slices.DeleteFunc(mm.Backings(), func(b mm.Backing) bool { return b == mm.File || b == mm.FilePrivate })},
				Usage: "map RAM from `KIND` of memory: anonymous, memfd, shared-anonymous or memfd-private"},
			&cli.GenericFlag{Name: "policy", Value: &choice[shadow.Policy]{&m.Policy, []shadow.Policy{shadow.Precise, shadow.Lazy}},
				Usage: "have slots follow mappings by `POLICY`: precise, or lazy (they stay)"},
			&cli.BoolFlag{Name: "json", Destination: &cfg.json, DisableDefaultText: true, Usage: "print lines of JSON"},
		},
		Action: func(c *cli.Context) error {
			if err := cfg.parse(c.Args().Slice()); err != nil {
				return misuse(c, err)
			}
			if f, ok := c.App.ErrWriter.(*os.File); ok {
				cfg.progress = term.IsTerminal(int(f.Fd()))
			}
			err := measureDirty(c.Context, cfg, c.App.Writer, c.App.ErrWriter)
			if errors.Is(err, vm.ErrConfig) {
				return misuse(c, err)
			}
			return err
		},
	})
}

func sourceNames() (names []string) {
	for _, s := range vm.DirtySources() {
		names = append(names, s.String())
	}
	return names
}

func (cfg *dirtyConfig) parseSources() error {
	if cfg.tracker == "" {
		return nil
	}
	for name := range strings.SplitSeq(cfg.tracker, ",") {
		i := slices.Index(sourceNames(), name)
		if i < 0 {
			return fmt.Errorf("there is no tracker %q; there are %s", name, strings.Join(sourceNames(), ", "))
		}
		cfg.sources = append(cfg.sources, vm.DirtySources()[i])
	}
	return nil
}

// parse reads the guest, its parameters and the script, and checks what the flags have
// left unchecked.
func (cfg *dirtyConfig) parse(args []string) (err error) {
	c := &cfg.run
	switch {
	case c.Epochs < 1:
		return fmt.Errorf("%d epochs are not 1 or more", c.Epochs)
	case c.Interval < 0:
		return fmt.Errorf("an interval of %v is negative", c.Interval)
	case cfg.ring > 1<<31:
		return fmt.Errorf("%d entries of a ring are too many", cfg.ring)
	}
	if err := cfg.parseSources(); err != nil {
		return err
	}
	if len(args) == 0 {
		args = dirtyGuest
	}
	if c.Guest, c.Args, err = parseGuest(args, &c.Machine); err != nil {
		return err
	}
	if c.Seed == 0 {
		c.Seed = chooseSeed()
	}
	c.Script, c.Random, err = readHostOps(cfg.hostOps)
	return err
}

// The lines of "gvm dirty --json", by their kinds. An epoch and a result have names in
// common, so there is no type that has both.
type (
	epochLine struct {
		Kind string `json:"kind"` // "epoch"
		*epoch.Epoch
	}
	resultLine struct {
		Kind string `json:"kind"` // "result"
		*epoch.Result
		Seed  uint64 `json:"seed"`
		Error string `json:"error"` // what ended the run, or empty
	}
	notRunLine struct {
		Kind   string `json:"kind"` // "not-run"
		Source string `json:"source"`
		Error  string `json:"error"`
	}
)

// measureDirty runs the guest with each source. Missing pages are exit status 1, after
// all has been printed.
func measureDirty(ctx context.Context, cfg *dirtyConfig, stdout, stderr io.Writer) error {
	first := guests.RAMBase.GFN()
	stderr = &lockedWriter{w: stderr}
	frames := addr.GFNRange{Start: first, End: first + addr.GFN(cfg.run.Machine.RAM>>addr.PageShift)}
	var (
		results []*epoch.Result
		maps    []*epoch.Heat
		missing uint64
	)
	sources := cfg.sources
	if sources == nil {
		sources = vm.DirtySources()
	}
	strays := &strayWarnings{w: stderr}
	defer strays.end()
	for _, source := range sources {
		heat := epoch.NewHeat(frames)
		r, err := measureSource(ctx, cfg, source, heat, strays, stdout)
		if r == nil && cfg.sources == nil && cfg.lacks(source, err) {
			if err := notRun(cfg, source, err, stdout); err != nil {
				return err
			}
			continue
		}
		if r == nil && errors.Is(err, vm.ErrConfig) {
			return err
		}
		if r == nil {
			return lack(err)
		}
		results, maps, missing = append(results, r), append(maps, heat), missing+r.Missing
		if err := errors.Join(err, showSource(cfg, r, heat, stdout, err)); err != nil {
			return err
		}
	}
	if !cfg.json {
		if err := epoch.WriteResults(stdout, results); err != nil {
			return err
		}
	}
	if cfg.heatmap != "" {
		if err := writeHeatmap(cfg.heatmap, maps); err != nil {
			return err
		}
	}
	if missing > 0 {
		return exitStatus(statusFailed) // they have been named
	}
	return nil
}

// lacks reports whether err says that there is no such source on this machine, or that it
// does not go with the watch.
func (cfg *dirtyConfig) lacks(source vm.DirtySource, err error) bool {
	if _, ok := errors.AsType[*vm.WatchError](err); ok {
		return false // it is the watch that there is not
	}
	return errors.Is(err, errors.ErrUnsupported) ||
		source == vm.WriteProtect && cfg.run.Machine.Watch != 0 && errors.Is(err, vm.ErrConfig)
}

// measureSource runs the guest with one source and prints its epochs.
func measureSource(ctx context.Context, cfg *dirtyConfig, source vm.DirtySource, heat *epoch.Heat, strays *strayWarnings, stdout io.Writer) (*epoch.Result, error) {
	c := cfg.run
	c.Machine.Dirty = source
	c.Machine.Console, c.Machine.OnStray = strays.w, strays.add
	if source == vm.Ring {
		c.Machine.RingEntries = uint32(cfg.ring)
	}
	const many = 40 // epochs, of which not every one is printed
	bar := progressbar.NewOptions(c.Epochs, progressbar.OptionSetWriter(io.Discard))
	if cfg.progress && c.Epochs > many {
		bar = progressbar.NewOptions(c.Epochs, progressbar.OptionSetWriter(strays.w), progressbar.OptionClearOnFinish(),
			progressbar.OptionSetDescription(source.String()), progressbar.OptionThrottle(100*time.Millisecond))
	}
	defer func() { _ = bar.Finish() }()
	var table *epoch.Table
	var failed error
	c.OnEpoch = func(e *epoch.Epoch) {
		heat.Add(e.Dirty)
		_ = bar.Add(1)
		switch {
		case cfg.json:
			failed = errors.Join(failed, json.NewEncoder(stdout).Encode(epochLine{"epoch", e}))
		case c.Epochs <= many || len(e.Missing) > 0 || (e.Number-1)%((c.Epochs+many-1)/many) == 0:
			if table == nil {
				var err error
				table, err = epoch.NewTable(stdout, source, c.WorkingSet)
				failed = errors.Join(failed, err)
			}
			failed = errors.Join(failed, table.Add(e))
		}
	}
	r, err := epoch.Run(ctx, c)
	return r, errors.Join(err, failed)
}

// showSource prints what became of a run, which err ended.
func showSource(cfg *dirtyConfig, r *epoch.Result, heat *epoch.Heat, stdout io.Writer, err error) error {
	if cfg.json {
		line := resultLine{Kind: "result", Result: r, Seed: cfg.run.Seed}
		if err != nil {
			line.Error = err.Error()
		}
		return json.NewEncoder(stdout).Encode(line)
	}
	const columns, rows = 64, 8
	if err := heat.WriteText(stdout, columns, rows); err != nil {
		return err
	}
	if r.HostOps != nil {
		if _, err := fmt.Fprintf(stdout, "%d operations of the host, seed %d\n", r.HostOps.Ops, cfg.run.Seed); err != nil {
			return err
		}
	}
	_, failed := fmt.Fprintln(stdout)
	return failed
}

// notRun says that the machine does not have a source.
func notRun(cfg *dirtyConfig, source vm.DirtySource, why error, stdout io.Writer) error {
	if cfg.json {
		return json.NewEncoder(stdout).Encode(notRunLine{"not-run", source.String(), why.Error()})
	}
	_, err := fmt.Fprintf(stdout, "%v: not run: %v\n\n", source, why)
	return err
}

// writeHeatmap writes a picture.
func writeHeatmap(name string, maps []*epoch.Heat) error {
	var picture bytes.Buffer
	if err := epoch.WritePNG(&picture, maps...); err != nil {
		return err
	}
	return os.WriteFile(name, picture.Bytes(), 0o666)
}
