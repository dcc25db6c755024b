// Command gvm boots tiny guests under /dev/kvm and shows how what they see of
// their memory follows the host's mappings.
//
// Results go to standard output, diagnostics to standard error. The exit status
// is 0 for success, 1 if what was examined is at fault, 2 if the command line
// is, and 3 if the machine lacks something that gvm needs; "gvm run" exits with
// the status of a guest that exits by itself.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/litmus"
	"github.com/secondmmu/gvm/vm"
)

// Exit statuses.
const (
	statusFailed = 1 // what was examined is at fault
	statusUsage  = 2 // the command line is
	statusLack   = 3 // the machine is
)

func main() {
	// A reader of standard output that goes away is an error of the next write,
	// not the end of the process.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal does what it does to every process
	os.Exit(execute(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// execute is the whole program, given what a process has. It returns the exit
// status.
func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	out := &output{w: stdout}
	err := newApp(stdin, out, stderr).RunContext(ctx, args)
	if err == nil {
		err = out.err
	}
	if err == nil {
		return 0
	}
	if status, ok := errors.AsType[exitStatus](err); ok {
		return int(status)
	}
	if wrong, ok := errors.AsType[*usageError](err); ok {
		fmt.Fprintf(stderr, "gvm: %v (see \"%s --help\")\n", err, wrong.command)
		return statusUsage
	}
	if lack, ok := errors.AsType[*lackError](err); ok {
		fmt.Fprintf(stderr, "gvm: %v\ngvm: %s\n", err, lack.remedy)
		return statusLack
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = fmt.Errorf("interrupted: %w", err)
	}
	fmt.Fprintf(stderr, "gvm: %v\n", err)
	return statusFailed
}

// newApp returns the command line. Nothing in it is shared with another one.
func newApp(stdin io.Reader, stdout, stderr io.Writer) *cli.App {
	return &cli.App{
		Name:  "gvm",
		Usage: "guest memory that follows the host's mappings",
		Description: `Results go to standard output, diagnostics to standard error.

The exit status is 0 for success, 1 if what was examined is at fault, 2 if the
command line is, and 3 if the machine lacks something that gvm needs. "gvm run"
exits with the status of a guest that exits by itself.

"gvm help host-ops" tells how the scripts are written that --host-ops takes,
and "gvm help litmus-tests" how litmus tests are.`,
		Commands: []*cli.Command{
			auditCommand(),
			demoCommand(),
			dirtyCommand(),
			doctorCommand(),
			guestsCommand(),
			helpCommand(),
			litmusCommand(),
			runCommand(),
			traceCommand(),
		},
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "version", Usage: "print the version", DisableDefaultText: true},
			helpFlag(),
		},
		Before: func(c *cli.Context) error {
			if !c.Bool("version") {
				return nil
			}
			if _, err := fmt.Fprintln(c.App.Writer, version()); err != nil {
				return err
			}
			return exitStatus(0) // whatever else there is on the command line
		},
		Action: func(c *cli.Context) error { // there is no such command, or none at all
			if c.Args().Present() {
				return misuse(c, fmt.Errorf("there is no command %q", c.Args().First()))
			}
			return misuse(c, errors.New("which command?"))
		},
		// This is reached by --help alone, with an argument that is no command.
		CommandNotFound: func(c *cli.Context, _ string) {
			if len(c.Command.Subcommands) > 0 {
				_ = cli.ShowAppHelp(c) // output keeps the error
			} else {
				cli.HelpPrinter(c.App.Writer, cli.CommandHelpTemplate, c.Command)
			}
		},
		OnUsageError:    onUsageError,
		HideHelp:        true,
		HideHelpCommand: true,
		ExitErrHandler:  func(*cli.Context, error) {}, // execute does that
		Reader:          stdin,
		Writer:          stdout,
		ErrWriter:       stderr,
	}
}

// command completes cmd with what all commands have. The help flag and the help
// command of urfave/cli are left out, because all apps share them and write to
// them.
func command(cmd *cli.Command) *cli.Command {
	cmd.Flags = append(cmd.Flags, helpFlag())
	cmd.HideHelp = true
	cmd.HideHelpCommand = true
	cmd.OnUsageError = onUsageError
	return cmd
}

// topics are what help tells of apart from commands.
var topics = map[string]func() string{
	"host-ops":     hostops.Help,
	"litmus-tests": litmus.Help,
}

func helpCommand() *cli.Command {
	return command(&cli.Command{
		Name:      "help",
		Usage:     "show this help, that of a command, or the language of --host-ops or of litmus tests",
		ArgsUsage: "[COMMAND | host-ops | litmus-tests]",
		Action:    help,
	})
}

func help(c *cli.Context) error {
	args := c.Args().Slice()
	if len(args) == 0 {
		return cli.ShowAppHelp(c)
	}
	if text, ok := topics[args[0]]; ok && len(args) == 1 {
		_, err := io.WriteString(c.App.Writer, text())
		return err
	}
	cmd := c.App.Command(args[0])
	for _, name := range args[1:] {
		if cmd != nil {
			cmd = cmd.Command(name)
		}
	}
	if cmd == nil {
		return misuse(c, fmt.Errorf("there is no command or topic %q", strings.Join(args, " ")))
	}
	return newApp(c.App.Reader, c.App.Writer, c.App.ErrWriter).RunContext(c.Context, slices.Concat([]string{c.App.Name}, args, []string{"--help"}))
}

func helpFlag() cli.Flag {
	return &cli.BoolFlag{Name: "help", Aliases: []string{"h"}, Usage: "show help", DisableDefaultText: true}
}

func jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print the result as JSON", DisableDefaultText: true}
}

// version returns the line that --version prints.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "gvm, built without build information"
	}
	return fmt.Sprintf("gvm %s, built with %s", info.Main.Version, info.GoVersion)
}

// writeJSON writes v as a document for people and programs.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "\t")
	return e.Encode(v)
}

// output is standard output. It keeps the first error of a write: urfave/cli
// does not look at those of its help.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

// exitStatus is the end of a command that has said all it has to say.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// usageError is a command line that makes no sense.
type usageError struct {
	command string // the command that it was for: "gvm run"
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func misuse(c *cli.Context, err error) error { return &usageError{c.Command.HelpName, err} }

func onUsageError(c *cli.Context, err error, _ bool) error { return misuse(c, err) }

// noArguments is for commands that take flags alone.
func noArguments(c *cli.Context) error {
	if c.Args().Present() {
		return misuse(c, fmt.Errorf("%s takes no argument %q", c.Command.Name, c.Args().First()))
	}
	return nil
}

// lackError is a machine without something that gvm needs.
type lackError struct {
	err    error
	remedy string // what to do about it, in one line
}

func (e *lackError) Error() string { return e.err.Error() }
func (e *lackError) Unwrap() error { return e.err }

// lack returns the error for a machine that could not be made, because of err.
func lack(err error) error {
	const tell = `; "gvm doctor" tells more`
	e := &lackError{err, `"gvm doctor" tells what this machine can do`}
	watch, isWatch := errors.AsType[*vm.WatchError](err)
	switch {
	case isWatch:
		e.remedy = lackWatch(watch)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		e.remedy = "enable virtualisation in the firmware and load KVM (modprobe kvm_intel, or kvm_amd);" +
			" in a container or a virtual machine, have /dev/kvm passed on to it" + tell
	case errors.Is(err, fs.ErrPermission):
		e.remedy = "add the user to the group of /dev/kvm (usermod -aG kvm USER, then log in again), or run as root" + tell
	case errors.Is(err, unix.ENOMEM):
		e.remedy = "ask for less memory, or free some"
	case errors.Is(err, unix.EBUSY):
		e.remedy = "stop the other hypervisor that has the processor's virtualisation in use"
	case errors.Is(err, errors.ErrUnsupported):
		e.remedy = "use a newer kernel" + tell
	}
	return e
}
