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

	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/vm"
)

// runConfig is what a command line of "gvm run" asks for.
type runConfig struct {
	guest   guests.Guest
	args    guests.Args
	machine vm.Config
	ops     hostOps
	ramFile string        // "": none
	timeout time.Duration // 0: none
	stdin   bool
	json    bool
}

func runCommand() *cli.Command {
	cfg := &runConfig{machine: vm.Config{RAM: 16 << 20}}
	return command(&cli.Command{
		Name:      "run",
		Usage:     "boot a guest, with its console on standard output",
		ArgsUsage: "GUEST [NAME=VALUE ...]",
		Description: `GUEST is one of those that "gvm guests" lists, and NAME=VALUE one of its
parameters. An endless guest runs until it is interrupted, or --timeout ends it.

--host-ops has the host change the mappings of RAM meanwhile: at random, or by a script,
one operation a line, such as "every 1ms discard random 2"; "gvm help host-ops" has the
language. The guest then waits for what is not there, unless --touch says otherwise. An
operation that fails ends the run. A file that RAM is mapped from is changed as the
operations say; one that they truncate is as long as RAM again in the end.

--watch has changes followed that other code makes to RAM, as another process does that
punches a hole into its file. Each is a warning on standard error.

The exit status is the guest's own, 0 to 255, if it exits by itself: the first
that is not 0 among those of its vCPUs. Otherwise it is 1 if the guest or an operation
failed, it was interrupted or timed out, or its console could not be written, 2 if the
command line makes no sense, and 3 if the machine lacks something. Then there is
a message on standard error.

The report of --json has guest, status (null if the guest did not exit by
itself), error (empty if there was none), for each of the vcpus its progress,
and seconds; with --host-ops also host_ops and seed, and with --watch the number of
strays.`,
		Flags: append([]cli.Flag{
			&cli.GenericFlag{Name: "mem", Value: (*size)(&cfg.machine.RAM), Usage: "give the guest `SIZE` of RAM: in MiB, or with a suffix K, M or G"},
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
			watchFlag(&cfg.machine.Watch),
		}, cfg.ops.flags("random")...),
		Action: func(c *cli.Context) error {
			if cfg.ops.name != "" && !c.IsSet("touch") {
				cfg.machine.Touch = vm.Wait
			}
			if err := cfg.parse(c.Args().Slice()); err != nil {
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

// parse reads the guest and its parameters, and checks what the flags have left
// unchecked.
func (cfg *runConfig) parse(args []string) (err error) {
	if len(args) == 0 {
		return errors.New(`which guest? "gvm guests" lists them`)
	}
	if cfg.guest, cfg.args, err = parseGuest(args, &cfg.machine); err != nil {
		return err
	}
	if cfg.timeout < 0 {
		return fmt.Errorf("a timeout of %v is negative", cfg.timeout)
	}
	return cfg.ops.parse()
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
	Status  *int         `json:"status"` // nil: the guest did not exit by itself
	Error   string       `json:"error"`  // why not
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
	m, err := cfg.ops.boot(cfg.machine, cfg.guest, cfg.args)
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
		// A read of standard input cannot be called off: this may outlive the
		// run, by no more than what is left of the process.
		go func() {
			if err := feed(m.SerialInput(), stdin); err != nil {
				cancel(err)
			}
		}()
	}

	begin := time.Now()
	status, err = cfg.ops.run(ctx, m, cancel, nil)
	seconds := time.Since(begin).Seconds()
	if !cfg.json {
		if (err != nil || status != 0) && cfg.ops.chance() {
			fmt.Fprintf(strays.w, "gvm: the operations of the host were those of --seed %d\n", cfg.ops.seed)
		}
		return status, err
	}
	r := runReport{Guest: cfg.guest.Name, Seconds: seconds, Seed: cfg.ops.seed}
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
	for i := range cfg.machine.VCPUs {
		progress, failed := m.Result(i, 0)
		err = errors.Join(err, failed)
		r.VCPUs = append(r.VCPUs, vcpuReport{progress})
	}
	return status, errors.Join(err, writeJSON(stdout, r))
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
