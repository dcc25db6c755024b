package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
	"github.com/secondmmu/gvm/vm"
)

// runConfig is what a command line of "gvm run" asks for.
type runConfig struct {
	name    string // of the guest, or of the image
	guest   guests.Guest
	args    guests.Args
	image   imageConfig
	machine vm.Config
	ops     hostOps
	ramFile string        // "": none
	serial  string        // file for what the serial port sends; "": it goes to the console
	trace   string        // file for a recording; "": none
	timeout time.Duration // 0: none
	stdin   bool
	json    bool
}

func runCommand() *cli.Command {
	cfg := &runConfig{machine: vm.Config{RAM: 16 << 20}}
	return command(&cli.Command{
		Name:      "run",
		Usage:     "boot a guest or an image, with its console on standard output",
		ArgsUsage: "GUEST [NAME=VALUE ...] | FILE",
		Description: `GUEST is one of those that "gvm guests" lists, and NAME=VALUE one of its
parameters. An endless guest runs until it is interrupted, or --timeout ends it.

FILE is an image of somebody else's: a Linux kernel (bzImage), a multiboot or PVH
image, ELF, or flat binary code, whichever it is. It runs on a PC that has a serial
port at 0x3f8, debug consoles at 0xe9 and 0xf1, an interrupt controller, a timer, and
isa-debug-exit at 0xf4. With --stdin it is typed to; on a terminal, Ctrl-A x leaves.
A flat image on one vCPU has no interrupt controller, and ends when it halts.

--host-ops has the host change the mappings of RAM meanwhile: at random, or by a script,
one operation a line, such as "every 1ms discard random 2"; "gvm help host-ops" has the
language. The guest then waits for what is not there, unless --touch says otherwise. An
operation that fails ends the run. A file that RAM is mapped from is changed as the
operations say; one that they truncate is as long as RAM again in the end.

--watch has changes followed that other code makes to RAM, as another process does that
punches a hole into its file. Each is a warning on standard error.

The exit status is the guest's own, 0 to 255, if it exits by itself: the first
that is not 0 among those of its vCPUs; of an image, what it asks isa-debug-exit
for, (value << 1) | 1, or 0 when it turns the machine off or resets it. Otherwise it is 1 if the guest or an operation
failed, it was interrupted or timed out, or its console could not be written, 2 if the
command line makes no sense, and 3 if the machine lacks something. Then there is
a message on standard error.

The report of --json has guest (or the image's file, and its format), status (null if the guest did not exit by
itself), error (empty if there was none), for each of the vcpus its progress
(none for images), and seconds; with --host-ops also host_ops and seed, and with --watch the number of
strays.`,
		Flags: append([]cli.Flag{
			&cli.GenericFlag{Name: "mem", Value: (*size)(&cfg.machine.RAM), DefaultText: "16M; for an image, 128M", Usage: "give the guest `SIZE` of RAM: in MiB, or with a suffix K, M or G"},
			&cli.IntFlag{Name: "vcpus", Value: 1, Destination: &cfg.machine.VCPUs, Usage: "give the guest `N` vCPUs"},
			&cli.GenericFlag{Name: "backing", Value: &choice[mm.Backing]{&cfg.machine.Backing, mm.Backings()},
				Usage: "map RAM from `KIND` of memory: anonymous, memfd, shared-anonymous, memfd-private, file or file-private"},
			&cli.StringFlag{Name: "ram-file", Destination: &cfg.ramFile, DefaultText: "none", Usage: "the `FILE` that RAM is mapped from, with --backing file or file-private; it is as long as RAM, or longer"},
			&cli.GenericFlag{Name: "touch", Value: &choice[vm.Touch]{&cfg.machine.Touch, []vm.Touch{vm.Stop, vm.Float, vm.Wait}}, DefaultText: "stop; with --host-ops, wait",
				Usage: "`WHAT` happens when the guest uses RAM that is not there: stop, float (an empty bus) or wait"},
			&cli.GenericFlag{Name: "policy", Value: &choice[shadow.Policy]{&cfg.machine.Policy, []shadow.Policy{shadow.Precise, shadow.Lazy}},
				Usage: "have slots follow mappings by `POLICY`: precise, or lazy (they stay, and --touch is not float)"},
			&cli.DurationFlag{Name: "timeout", Destination: &cfg.timeout, DefaultText: "none", Usage: "end the run after `DURATION`, such as 1.5s"},
			&cli.BoolFlag{Name: "stdin", Destination: &cfg.stdin, DisableDefaultText: true,
				Usage: "give standard input to the guest's serial port, and an end of transmission (Ctrl-D) after it"},
			&cli.BoolFlag{Name: "json", Destination: &cfg.json, DisableDefaultText: true,
				Usage: "print a report as JSON when the run has ended; the console goes to standard error"},
			&cli.StringFlag{Name: "serial", Destination: &cfg.serial, DefaultText: "standard output", Usage: "write what the serial port sends to `FILE`"},
			&cli.StringFlag{Name: "trace", Destination: &cfg.trace, DefaultText: "none", Usage: "write a recording to `FILE`, for \"gvm trace show\""},
			watchFlag(&cfg.machine.Watch),
		}, append(cfg.image.flags(), cfg.ops.flags("random")...)...),
		Action: func(c *cli.Context) error {
			if cfg.ops.name != "" && !c.IsSet("touch") {
				cfg.machine.Touch = vm.Wait
			}
			args := c.Args().Slice()
			image := len(args) > 0 && isImage(args[0])
			if flag := cfg.image.set(c); flag != "" && !image {
				return misuse(c, fmt.Errorf("--%s is for images, and there is no file of an image: see \"gvm guests\" for what built-in guests take", flag))
			}
			if image && !c.IsSet("mem") {
				cfg.machine.RAM = imageRAM
			}
			if err := cfg.parse(args, image); err != nil {
				if _, bad := errors.AsType[*boot.Error](err); bad && !errors.Is(err, boot.ErrOptions) {
					return err // the image is at fault
				}
				return misuse(c, err)
			}
			status, err := run(c.Context, cfg, c.App.Reader, c.App.Writer, c.App.ErrWriter)
			switch {
			case errors.Is(err, vm.ErrConfig):
				return misuse(c, err)
			case err != nil:
				return err
			}
			return exitStatus(status)
		},
	})
}

// parse reads the guest and its parameters, or the image, and checks what the flags have
// left unchecked.
func (cfg *runConfig) parse(args []string, image bool) (err error) {
	if len(args) == 0 {
		return errors.New(`which guest? "gvm guests" lists them, and the file of an image will do`)
	}
	cfg.name = args[0]
	switch {
	case !image:
		if _, err := guests.Lookup(args[0]); err != nil {
			return fmt.Errorf("%w; and there is no file %s", err, args[0])
		}
		if cfg.guest, cfg.args, err = parseGuest(args, &cfg.machine); err != nil {
			return err
		}
	case len(args) > 1:
		return fmt.Errorf("%q behind the image: its command line is --append, and flags go before it", args[1])
	default:
		if err := cfg.image.load(args[0], &cfg.machine); err != nil {
			return err
		}
	}
	if cfg.timeout < 0 {
		return fmt.Errorf("a timeout of %v is negative", cfg.timeout)
	}
	return cfg.ops.parse()
}

// boot puts what is to be run into a machine.
func (cfg *runConfig) boot(m *vm.Machine) error {
	if cfg.image.plan != nil {
		return m.BootPlan(cfg.image.plan)
	}
	return m.Boot(cfg.guest, cfg.args)
}

// parseGuest reads a guest and its parameters, and checks them for a machine.
func parseGuest(args []string, m *vm.Config) (g guests.Guest, values guests.Args, err error) {
	if g, err = guests.Lookup(args[0]); err != nil {
		return g, nil, err
	}
	values = guests.Args{}
	for _, arg := range args[1:] {
		if strings.HasPrefix(arg, "-") {
			return g, nil, fmt.Errorf("flags go before the guest: put %s before %s", arg, args[0])
		}
		if err := g.Parse(values, arg); err != nil {
			return g, nil, err
		}
	}
	if n := m.VCPUs; n < 1 || n > guests.MaxVCPUs {
		return g, nil, fmt.Errorf("%d vCPUs are not in 1 to %d", n, guests.MaxVCPUs)
	}
	_, err = g.ParamPage(values, m.VCPUs, m.RAM) // what depends on the size of RAM
	return g, values, err
}

// runReport is the document of "gvm run --json".
type runReport struct {
	Guest   string       `json:"guest"`
	Format  string       `json:"format,omitempty"` // of an image
	Status  *int         `json:"status"`           // nil: the guest did not exit by itself
	Error   string       `json:"error"`            // why not
	VCPUs   []vcpuReport `json:"vcpus"`
	Seconds float64      `json:"seconds"` // that the vCPUs ran, by the clock on the wall

	HostOps *hostops.Stats `json:"host_ops,omitempty"` // with --host-ops, what has been carried out...
	Seed    uint64         `json:"seed,omitempty"`     // ...and what it was chosen by
	Strays  *uint64        `json:"strays,omitempty"`   // with --watch, how many changes of others were followed
}

type vcpuReport struct {
	Progress uint64 `json:"progress"` // the guest's count of what it does
}

// run boots the guest and returns the status that it exits with.
func run(ctx context.Context, cfg *runConfig, stdin io.Reader, stdout, stderr io.Writer) (status int, err error) {
	strays := &strayWarnings{w: &lockedWriter{w: stderr}}
	defer strays.end()
	cfg.machine.Console, cfg.machine.OnStray = stdout, strays.add
	if cfg.json {
		cfg.machine.Console = strays.w
	}
	if cfg.ramFile != "" {
		if cfg.machine.File, err = os.OpenFile(cfg.ramFile, ramFileFlag(cfg.machine.Backing), 0); err != nil {
			return 0, fmt.Errorf("%w: %w", vm.ErrConfig, err)
		}
		defer cfg.machine.File.Close() // the machine has a descriptor of its own
	}
	if cfg.serial != "" {
		f, failed := os.Create(cfg.serial)
		if failed != nil {
			return 0, failed
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		cfg.machine.Serial = f
	}
	if cfg.trace != "" {
		cfg.machine.Log = trace.NewLog(traceEvents)
	}
	m, err := cfg.ops.boot(cfg.machine, cfg.boot)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, cfg.ops.close(m)) }()
	strays.name(m.RAM().Range)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if cfg.timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, cfg.timeout, fmt.Errorf("timed out after %v", cfg.timeout))
		defer stop()
	}
	if cfg.stdin {
		input := stdin
		if cfg.image.plan != nil {
			var restore func()
			if input, restore, err = openTerminal(stdin); err != nil {
				return 0, err
			}
			defer restore()
		}
		// A read of standard input cannot be called off: this may outlive the
		// run, by no more than what is left of the process.
		go func() {
			if err := feed(m.SerialInput(), input); err != nil {
				cancel(err)
			}
		}()
	}

	begin := time.Now()
	status, err = cfg.record(ctx, m, cancel)
	seconds := time.Since(begin).Seconds()
	if !cfg.json {
		if (err != nil || status != 0) && cfg.ops.chance() {
			fmt.Fprintf(strays.w, "gvm: the operations of the host were those of --seed %d\n", cfg.ops.seed)
		}
		return status, err
	}
	r := runReport{Guest: cfg.name, VCPUs: []vcpuReport{}, Seconds: seconds, Seed: cfg.ops.seed}
	if cfg.ops.runner != nil {
		r.HostOps = new(cfg.ops.runner.Stats())
	}
	if cfg.machine.Watch != 0 {
		r.Strays = new(strays.count())
	}
	if err == nil {
		r.Status = &status
	} else {
		r.Error = err.Error()
	}
	if cfg.image.plan != nil {
		r.Format = cfg.image.plan.Format.String()
		return status, errors.Join(err, writeJSON(stdout, r))
	}
	for i := range cfg.machine.VCPUs {
		progress, failed := m.Result(i, 0)
		err = errors.Join(err, failed)
		r.VCPUs = append(r.VCPUs, vcpuReport{progress})
	}
	return status, errors.Join(err, writeJSON(stdout, r))
}

// traceEvents is how many events wait to be written, of each vCPU and of the host.
const traceEvents = 1 << 15

// record runs the machine, and writes the recording that is asked for, if one is.
func (cfg *runConfig) record(ctx context.Context, m *vm.Machine, fail context.CancelCauseFunc) (status int, err error) {
	if cfg.trace == "" {
		return cfg.ops.run(ctx, m, fail, nil)
	}
	log := cfg.machine.Log
	header := trace.Header{
		Start: log.Start(), Guest: cfg.name, VCPUs: cfg.machine.VCPUs, HostOps: cfg.ops.name, Seed: cfg.ops.seed,
		RAM: addr.GFNRange{Start: m.RAMBase().GFN(), End: m.RAMEnd().GFN()},
	}
	var ended error // how the run failed, of which there is a recording all the same
	err = writeTo(cfg.trace, nil, func(w io.Writer) (failed error) {
		out, seq := trace.NewWriter(w, trace.JSONLines, header), uint64(0)
		status, ended = cfg.ops.run(ctx, m, fail, func() {
			if failed == nil {
				if seq, failed = log.WriteSince(seq, out); failed != nil {
					fail(failed)
				}
			}
		})
		if failed == nil {
			failed = out.Close()
		}
		return failed
	})
	return status, errors.Join(ended, err)
}

// ramFileFlag returns how the file of RAM is opened: what the guest writes goes there unless
// its mapping is private.
func ramFileFlag(b mm.Backing) int {
	if b == mm.File {
		return os.O_RDWR
	}
	return os.O_RDONLY
}

// feed gives the guest what r has and then, as a terminal's Ctrl-D would, an end
// of transmission: a serial line has no other end.
func feed(serial io.Writer, r io.Reader) error {
	const endOfTransmission = 4
	if _, err := io.Copy(serial, r); err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	_, err := serial.Write([]byte{endOfTransmission})
	return err
}
