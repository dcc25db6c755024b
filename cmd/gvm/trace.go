package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
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
	ops     hostOps
	timeout time.Duration // 0: none
	events  int           // that wait to be written at most, of each vCPU
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
script, one operation a line, such as "every 1ms discard random 2". With --watch, changes
that others make are followed and recorded, too; their names begin with "stray".

An event of a guest's access belongs to the operation that last had to do with the
page. Events that come faster than they can be written are lost; where, and how
many, is in the recording.`,
		Flags: append(append(formatFlags(&cfg.format, &cfg.file), cfg.ops.flags("random, and recorded")...),
			watchFlag(&cfg.machine.Watch),
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
	case cfg.events < 1 || cfg.events > 1<<24:
		return fmt.Errorf("%d events are not in 1 to %d", cfg.events, 1<<24)
	}
	if cfg.guest, cfg.args, err = parseGuest(args, &cfg.machine); err != nil {
		return err
	}
	if err := cfg.ops.parse(); err != nil {
		return err
	}
	h := &cfg.header
	h.HostOps, h.Seed = cfg.ops.name, cfg.ops.seed
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
	strays := &strayWarnings{w: &lockedWriter{w: stderr}, quiet: true} // they are in the recording
	defer strays.end()
	c := cfg.machine
	c.Log, c.Console, c.OnStray = log, strays.w, strays.add
	m, err := cfg.ops.boot(c, func(m *vm.Machine) error { return m.Boot(cfg.guest, cfg.args) })
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, cfg.ops.close(m)) }()
	strays.name(m.RAM().Range)
	cfg.header.Start = log.Start()
	var ended error // how the run failed, of which there is a recording all the same
	err = writeTo(cfg.file, stdout, func(w io.Writer) (failed error) {
		out := trace.NewWriter(w, cfg.format, cfg.header)
		status, ended, failed = cfg.record(ctx, m, log, out)
		if failed == nil {
			failed = out.Close()
		}
		return failed
	})
	return status, errors.Join(ended, err)
}

// record runs the machine, and writes what is recorded, until the guest ends: with a status,
// or as ended says. If out failed, it ends for that.
func (cfg *traceRunConfig) record(ctx context.Context, m *vm.Machine, log *trace.Log, out trace.Writer) (status int, ended, failed error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if cfg.timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, cfg.timeout, errTimeout)
		defer stop()
	}
	seq := uint64(0)
	status, ended = cfg.ops.run(ctx, m, cancel, func() {
		if failed == nil {
			if seq, failed = log.WriteSince(seq, out); failed != nil {
				cancel(failed)
			}
		}
	})
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
