package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/epoch"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
	"github.com/secondmmu/gvm/vm"
)

func traceCommand() *cli.Command {
	return command(&cli.Command{
		Name:  "trace",
		Usage: "record what happened to which page of a guest, or show a recording",
		Description: `"gvm trace run" boots a guest and records what happens to its memory: operations of
the host, the notifications that they raise, translations zapped, memory slots
deleted and created, exits, and what the guest meets because of them. "gvm trace
show" shows a recording that was made with --format jsonl.`,
		Subcommands: []*cli.Command{traceRunCommand(), traceShowCommand()},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return misuse(c, fmt.Errorf("there is no command \"trace %s\"; there are run, show", c.Args().First()))
			}
			return misuse(c, errors.New("trace what? There are run, show"))
		},
	})
}

// formatFlags are those that say how a recording is written, and where to.
func formatFlags(format *trace.Format, file *string) []cli.Flag {
	return []cli.Flag{
		&cli.GenericFlag{Name: "format", Value: &choice[trace.Format]{format, trace.Formats()},
			Usage: "write `FORMAT`: text, jsonl (which \"gvm trace show\" reads), chrome (for ui.perfetto.dev) or html (a timeline)"},
		&cli.StringFlag{Name: "o", Destination: file, DefaultText: "standard output", Usage: "write to `FILE`"},
	}
}

// traceRunConfig is what a command line of "gvm trace run" asks for.
type traceRunConfig struct {
	guest   guests.Guest
	args    guests.Args
	machine vm.Config
	header  trace.Header
	script  *hostops.Script // nil: none
	random  bool            // operations at random
	pace    time.Duration   // of those
	timeout time.Duration   // 0: none
	events  int             // that wait to be written at most, of each vCPU
	format  trace.Format
	file    string // or "", for standard output
}

func traceRunCommand() *cli.Command {
	cfg := &traceRunConfig{machine: vm.Config{RAM: 1 << 20, Touch: vm.Wait}}
	return command(&cli.Command{
		Name:      "run",
		Usage:     "boot a guest and record what happens to its memory",
		ArgsUsage: "GUEST [NAME=VALUE ...]",
		Description: `The recording is written to standard output while the guest runs, the guest's
console to standard error. It ends with the guest, or with --timeout, and is whole if
the guest fails or is interrupted, too; then the exit status is 1, as it is if the
guest exits with another status than 0.

--host-ops has the host change the mappings of guest memory meanwhile: at random, or by a
script, one operation a line, such as "every 1ms discard random 2".

An event of a guest's access belongs to the operation that last had to do with the
page. Events that come faster than they can be written are lost; where, and how
many, is in the recording.`,
		Flags: append(formatFlags(&cfg.format, &cfg.file),
			&cli.StringFlag{Name: "host-ops", Destination: &cfg.header.HostOps, DefaultText: "none", Usage: "carry out the operations of the script `FILE`, or random ones with \"random\""},
			&cli.Uint64Flag{Name: "seed", Destination: &cfg.header.Seed, DefaultText: "random, and recorded", Usage: "choose operations by `N`, not 0"},
			&cli.DurationFlag{Name: "pace", Destination: &cfg.pace, Value: time.Millisecond, Usage: "wait for `DURATION` between random operations"},
			&cli.DurationFlag{Name: "timeout", Destination: &cfg.timeout, DefaultText: "none", Usage: "end the run after `DURATION`, such as 1.5s"},
			&cli.IntFlag{Name: "events", Destination: &cfg.events, Value: 1 << 15, Usage: "let `N` events wait to be written, for each vCPU and for the host"},
			&cli.GenericFlag{Name: "mem", Value: (*size)(&cfg.machine.RAM), Usage: "give the guest `SIZE` of RAM: in MiB, or with a suffix K, M or G"},
			&cli.IntFlag{Name: "vcpus", Value: 1, Destination: &cfg.machine.VCPUs, Usage: "give the guest `N` vCPUs"},
			&cli.GenericFlag{Name: "backing", Value: &choice[mm.Backing]{&cfg.machine.Backing, []mm.Backing{mm.Anonymous, mm.Memfd, mm.SharedAnonymous, mm.MemfdPrivate}},
				Usage: "map RAM from `KIND` of memory: anonymous, memfd, shared-anonymous or memfd-private"},
			&cli.GenericFlag{Name: "touch", Value: &choice[vm.Touch]{&cfg.machine.Touch, []vm.Touch{vm.Stop, vm.Float, vm.Wait}},
				Usage: "`WHAT` happens when the guest uses RAM that is not there: stop, float (an empty bus) or wait"},
			&cli.GenericFlag{Name: "policy", Value: &choice[shadow.Policy]{&cfg.machine.Policy, []shadow.Policy{shadow.Precise, shadow.Lazy}},
				Usage: "have slots follow mappings by `POLICY`: precise, or lazy (they stay, and --touch is not float)"},
		),
		Action: func(c *cli.Context) error {
			if err := cfg.parse(c.Args().Slice()); err != nil {
				return misuse(c, err)
			}
			status, err := cfg.run(c.Context, c.App.Writer, c.App.ErrWriter)
			switch {
			case errors.Is(err, vm.ErrConfig):
				return misuse(c, err)
			case err != nil:
				return err
			case status != 0:
				return fmt.Errorf("the guest exited with status %d", status)
			}
			return nil
		},
	})
}

// parse reads the guest, its parameters and the script, and checks what the flags have
// left unchecked.
func (cfg *traceRunConfig) parse(args []string) (err error) {
	switch {
	case len(args) == 0:
		return errors.New(`which guest? "gvm guests" lists them`)
	case cfg.timeout < 0:
		return fmt.Errorf("a timeout of %v is negative", cfg.timeout)
	case cfg.pace <= 0:
		return fmt.Errorf("a pace of %v is not positive", cfg.pace)
	case cfg.events < 1 || cfg.events > 1<<24:
		return fmt.Errorf("%d events are not in 1 to %d", cfg.events, 1<<24)
	}
	if cfg.guest, cfg.args, err = parseGuest(args, &cfg.machine); err != nil {
		return err
	}
	h := &cfg.header
	if cfg.script, cfg.random, err = readHostOps(h.HostOps); err != nil {
		return err
	}
	switch {
	case h.HostOps == "":
		h.Seed = 0
	case h.Seed == 0:
		h.Seed = rand.Uint64N(1<<53-1) + 1 // JavaScript's numbers have no more bits
	}
	first := guests.RAMBase.GFN()
	h.RAM = addr.GFNRange{Start: first, End: first + addr.GFN(cfg.machine.RAM>>addr.PageShift)}
	h.Guest, h.VCPUs = strings.Join(args, " "), cfg.machine.VCPUs
	return nil
}

var errTimeout = errors.New("timed out")

// run boots the guest and records until it ends. It returns the status that the guest
// exits with; that a timeout ends it is no error.
func (cfg *traceRunConfig) run(ctx context.Context, stdout, stderr io.Writer) (status int, err error) {
	log := trace.NewLog(cfg.events)
	c := cfg.machine
	c.Log, c.Console = log, stderr
	var runner *hostops.Runner
	if cfg.script != nil || cfg.random {
		c.Spare = epoch.Spare
		// The runner is there before the guest runs.
		c.OnMark = func(_ int, mark uint32) error { runner.Mark(mark); return nil }
		c.OnTouch = func(_ int, gpa addr.GPA) { runner.Fault(uint64(gpa-guests.RAMBase) >> addr.PageShift) }
	}
	m, err := vm.New(c)
	if err != nil {
		return 0, lack(err)
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := m.Boot(cfg.guest, cfg.args); err != nil {
		return 0, lack(err)
	}
	if c.Spare != 0 {
		if runner, err = epoch.NewRunner(m, cfg.script, cfg.header.Seed, cfg.pace); err != nil {
			return 0, err
		}
	}
	cfg.header.Start = log.Start()
	var ended error // how the run failed, of which there is a recording all the same
	err = writeTo(cfg.file, stdout, func(w io.Writer) (failed error) {
		out := trace.NewWriter(w, cfg.format, cfg.header)
		status, ended, failed = cfg.record(ctx, m, runner, log, out)
		if failed == nil {
			failed = out.Close()
		}
		return failed
	})
	return status, errors.Join(ended, err)
}

// record runs the machine, under the operations of a runner unless that is nil, and writes
// what is recorded, until the guest ends: with a status, or as ended says. If out
// failed, it ends for that.
func (cfg *traceRunConfig) record(ctx context.Context, m *vm.Machine, runner *hostops.Runner, log *trace.Log, out trace.Writer) (status int, ended, failed error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if cfg.timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, cfg.timeout, errTimeout)
		defer stop()
	}
	if err := m.Start(ctx); err != nil {
		return 0, err, nil
	}
	opsCtx, stopOps := context.WithCancel(ctx)
	defer stopOps()
	var ops sync.WaitGroup
	if runner != nil {
		ops.Go(func() {
			if err := runner.Run(opsCtx); err != nil && opsCtx.Err() == nil {
				cancel(err)
			}
		})
	}
	const interval = 10 * time.Millisecond // a guest that exits once a microsecond fills a third of a ring
	tick := time.NewTicker(interval)
	defer tick.Stop()
	seq := uint64(0)
	for running := true; running; {
		select {
		case <-m.Done():
			running = false
			stopOps()
			ops.Wait()
		case <-tick.C:
		}
		if failed == nil {
			if seq, failed = log.WriteSince(seq, out); failed != nil {
				cancel(failed)
			}
		}
	}
	status, ended = m.Wait()
	if failed != nil || errors.Is(ended, errTimeout) {
		ended = nil
	}
	return status, ended, failed
}

// writeTo calls write with the file of some name, or with stdout if that is empty. A regular file
// that could not be written whole is removed.
func writeTo(name string, stdout io.Writer, write func(io.Writer) error) (err error) {
	if name == "" {
		return write(stdout)
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() {
		info, _ := f.Stat()
		if err = errors.Join(err, f.Close()); err != nil && info != nil && info.Mode().IsRegular() {
			_ = os.Remove(name)
		}
	}()
	return write(f)
}

func traceShowCommand() *cli.Command {
	var format trace.Format
	var file, page string
	return command(&cli.Command{
		Name:      "show",
		Usage:     "show a recording, or write it in another format",
		ArgsUsage: "FILE",
		Description: `FILE is a recording made with "gvm trace run --format jsonl". With --page it is cut down
to what has to do with one page: its own events, and all of the operations that
they belong to.

The page of --format html needs no network. Behind its address, #page=0x205 filters by
a page, #t=1.5-2.25 zooms to a time in milliseconds, and #op=12 to an operation.`,
		Flags: append(formatFlags(&format, &file),
			&cli.StringFlag{Name: "page", Destination: &page, DefaultText: "all", Usage: "show the page with guest frame number `GFN`, such as 0x205"},
		),
		Action: func(c *cli.Context) error {
			switch c.NArg() {
			case 0:
				return misuse(c, errors.New("which recording?"))
			case 1:
			default:
				return misuse(c, fmt.Errorf("one recording at a time, and flags go before it: there is %q, too", c.Args().Get(1)))
			}
			gfn := uint64(0)
			if page != "" {
				var err error
				if gfn, err = strconv.ParseUint(page, 0, 52); err != nil {
					return misuse(c, fmt.Errorf("page %q is not a guest frame number, such as 0x205", page))
				}
			}
			f, err := os.Open(c.Args().First())
			if err != nil {
				return misuse(c, err)
			}
			defer f.Close()
			rec, err := trace.Read(f.Name(), f)
			if err != nil {
				return err
			}
			if page != "" {
				rec.Events = trace.Page(rec.Events, addr.GFN(gfn))
			}
			return writeTo(file, c.App.Writer, func(w io.Writer) error {
				out := trace.NewWriter(w, format, rec.Header)
				if err := out.Write(rec.Events); err != nil {
					return err
				}
				return out.Close()
			})
		},
	})
}
