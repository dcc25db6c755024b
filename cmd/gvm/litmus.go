package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/secondmmu/gvm/litmus"
)

func litmusCommand() *cli.Command {
	return command(&cli.Command{
		Name:  "litmus",
		Usage: "run litmus tests: what a guest may observe while its memory changes",
		Description: `A test has threads of the guest, which use pages, threads of the host, which change
the mappings of these pages, and says which outcomes are forbidden. It is run very
often, and every outcome is counted.

TEST is the name of a built-in test, or that with a slash and the name of a sensitive
form, or a file: any other name with a slash, or one that ends in .litmus. "gvm help
litmus-tests" tells how to write one.`,
		Subcommands: []*cli.Command{litmusListCommand(), litmusRunCommand(), litmusShowCommand()},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return misuse(c, fmt.Errorf("there is no command \"litmus %s\"; there are list, run, show", c.Args().First()))
			}
			return misuse(c, errors.New("litmus what? There are list, run, show"))
		},
	})
}

// litmusTest is a test as "list" and "show" have it in JSON.
type litmusTest struct {
	Name      string        `json:"name"`
	About     string        `json:"about"`
	Guests    int           `json:"guests"` // threads
	Hosts     int           `json:"hosts"`
	Instances int           `json:"instances"` // of a round
	Needs     []litmus.Need `json:"needs"`
	Lacks     string        `json:"lacks"` // why it does not run on this machine; empty: it does
	Sensitive []string      `json:"sensitive"`
	Text      string        `json:"text,omitempty"`
	Code      string        `json:"code,omitempty"` // of the guest, disassembled
}

func describeLitmus(t *litmus.Test) litmusTest {
	d := litmusTest{Name: t.FullName(), About: t.About, Guests: len(t.Guests), Hosts: len(t.Hosts), Instances: t.Instances,
		Needs: append([]litmus.Need{}, t.Needs...), Sensitive: []string{}}
	if err := litmus.ThisHost().Lacks(t); err != nil {
		d.Lacks = err.Error()
	}
	for _, f := range t.Sensitive {
		d.Sensitive = append(d.Sensitive, f.Form)
	}
	return d
}

func litmusListCommand() *cli.Command {
	return command(&cli.Command{
		Name:  "list",
		Usage: "list the built-in tests",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			tests := []litmusTest{}
			for _, t := range litmus.All() {
				tests = append(tests, describeLitmus(t))
			}
			if c.Bool("json") {
				return writeJSON(c.App.Writer, tests)
			}
			tw := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "TEST\tVCPUS\tHOST\tFORMS\tASKS")
			for _, t := range tests {
				asks := firstSentence(t.About)
				if t.Lacks != "" {
					asks += " (does not run here: " + t.Lacks + ")"
				}
				fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%s\n", t.Name, t.Guests, t.Hosts, len(t.Sensitive), asks)
			}
			return tw.Flush()
		},
	})
}

// firstSentence returns what stands before the first colon or full stop of a paragraph.
func firstSentence(s string) string {
	for i := range len(s) - 1 {
		if (s[i] == '.' || s[i] == ':') && s[i+1] == ' ' {
			return s[:i]
		}
	}
	return strings.TrimSuffix(s, ".")
}

func litmusShowCommand() *cli.Command {
	return command(&cli.Command{
		Name:      "show",
		Usage:     "show a test: its text, what it needs, and the machine code of its guest",
		ArgsUsage: "TEST",
		Flags:     []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			if c.Args().Len() != 1 {
				return misuse(c, errors.New("which test? \"gvm litmus list\" lists them"))
			}
			tests, err := findLitmus(c.Args().Slice())
			if err != nil {
				return misuse(c, err)
			}
			code, err := litmus.Generate(tests[0], tests[0].Instances)
			if err != nil {
				return err
			}
			d := describeLitmus(tests[0])
			if c.Bool("json") {
				d.Text, d.Code = tests[0].Text, code.String()
				return writeJSON(c.App.Writer, d)
			}
			needs := "nothing but KVM"
			if len(d.Needs) > 0 {
				needs = fmt.Sprint(d.Needs)
			}
			if d.Lacks != "" {
				needs += "; it does not run here: " + d.Lacks
			}
			_, err = fmt.Fprintf(c.App.Writer, "%s\n# It needs %s.\n# The guest, of %d bytes:\n\n%v", tests[0].Text, needs, len(code.Bytes), code)
			return err
		},
	})
}

// findLitmus returns the tests of the names, all built-in ones if there is none.
func findLitmus(names []string) ([]*litmus.Test, error) {
	if len(names) == 0 {
		return litmus.All(), nil
	}
	var tests []*litmus.Test
	for _, name := range names {
		if strings.HasPrefix(name, "-") {
			return nil, fmt.Errorf("flags go before the tests: put %s before %s", name, names[0])
		}
		if t, ok := litmusForm(name); ok {
			tests = append(tests, t)
			continue
		}
		if !strings.HasSuffix(name, ".litmus") && !strings.ContainsRune(name, filepath.Separator) {
			t, err := litmus.Lookup(name)
			if err != nil {
				return nil, err
			}
			tests = append(tests, t)
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		t, err := litmus.Parse(name, string(text))
		if err != nil {
			return nil, err
		}
		tests = append(tests, t)
	}
	return tests, nil
}

// litmusForm returns the sensitive form of a built-in test that a name such as mp/backwards
// means.
func litmusForm(name string) (*litmus.Test, bool) {
	for _, t := range litmus.All() {
		for _, f := range t.Sensitive {
			if f.FullName() == name {
				return f, true
			}
		}
	}
	return nil, false
}

// litmusConfig is what a command line of "gvm litmus run" asks for.
type litmusConfig struct {
	run       litmus.Config
	tests     []*litmus.Test
	pin       string // CPUs, or ""
	sensitive bool
	keep      string // a directory, or ""
	json      bool
	progress  bool // there is a terminal to show it on
}

func litmusRunCommand() *cli.Command {
	cfg := &litmusConfig{}
	return command(&cli.Command{
		Name:      "run",
		Usage:     "run tests, or all that are built in",
		ArgsUsage: "[TEST ...]",
		Description: `For each test there is a histogram of its outcomes: how often each was seen, "!" if it
is forbidden, "*" if it is interesting; and a verdict. Last comes a table of all.

Tests with threads of the host run until so many iterations were effective: the guest
really ran against the change. A forbidden outcome, or the lack of a required one, is
exit status 1. If no test could run for what the machine lacks, it is 3.

With --sensitive, each test also runs in its sensitive forms: a rule is broken, and a
forbidden outcome must be seen, with which the run ends. If it is not, the exit status
is 1.`,
		Flags: []cli.Flag{
			&cli.Uint64Flag{Name: "iterations", Destination: &cfg.run.Iterations, DefaultText: "100000, or 10000 effective ones", Usage: "run each test for `N` iterations, effective ones if the host takes part"},
			&cli.DurationFlag{Name: "duration", Value: 10 * time.Second, Destination: &cfg.run.Duration, Usage: "run each test for no longer than `DURATION`; 0: no limit"},
			&cli.Uint64Flag{Name: "seed", Destination: &cfg.run.Seed, DefaultText: "random, and printed", Usage: "choose delays by `N`, not 0"},
			&cli.IntFlag{Name: "instances", Destination: &cfg.run.Instances, DefaultText: "what the test says", Usage: "have `N` instances in a round"},
			&cli.StringFlag{Name: "pin", Destination: &cfg.pin, DefaultText: "by the scheduler", Usage: "run threads on `CPU,...`: the guest's first, then the host's, and around again"},
			&cli.BoolFlag{Name: "sensitive", Destination: &cfg.sensitive, DisableDefaultText: true, Usage: "run the sensitive forms, too"},
			&cli.StringFlag{Name: "keep", Destination: &cfg.keep, DefaultText: "nothing is kept", Usage: "write what is needed to see a forbidden outcome again to files in `DIRECTORY`"},
			&cli.BoolFlag{Name: "json", Destination: &cfg.json, DisableDefaultText: true, Usage: "print the result as JSON"},
		},
		Action: func(c *cli.Context) (err error) {
			if cfg.tests, err = findLitmus(c.Args().Slice()); err != nil {
				return misuse(c, err)
			}
			if err := cfg.parse(); err != nil {
				return misuse(c, err)
			}
			if f, ok := c.App.ErrWriter.(*os.File); ok {
				cfg.progress = term.IsTerminal(int(f.Fd()))
			}
			err = runLitmus(c.Context, cfg, c.App.Writer, c.App.ErrWriter)
			if errors.Is(err, litmus.ErrConfig) {
				return misuse(c, err)
			}
			return err
		},
	})
}

// parse checks what the flags have left unchecked.
func (cfg *litmusConfig) parse() error {
	if cfg.run.Duration < 0 {
		return fmt.Errorf("a duration of %v is negative", cfg.run.Duration)
	}
	if cfg.run.Instances < 0 || cfg.run.Instances > litmus.MaxGuestInstances {
		return fmt.Errorf("%d instances are not in 1 to %d", cfg.run.Instances, litmus.MaxGuestInstances)
	}
	if cfg.pin != "" {
		for text := range strings.SplitSeq(cfg.pin, ",") {
			cpu, err := strconv.ParseUint(text, 10, 10)
			if err != nil {
				return fmt.Errorf("%q is not the number of a CPU", text)
			}
			cfg.run.CPUs = append(cfg.run.CPUs, int(cpu))
		}
	}
	if cfg.run.Seed == 0 {
		cfg.run.Seed = rand.Uint64() | 1
	}
	return nil
}

// litmusResult is what "gvm litmus run --json" prints.
type litmusResult struct {
	Seed     uint64                 `json:"seed"`
	Results  []*litmus.Result       `json:"results"`
	Verdicts map[litmus.Verdict]int `json:"verdicts"` // how many there are of each
	Error    string                 `json:"error"`    // what ended the run early, or empty
}

// runLitmus runs the tests. What is at fault is exit status 1, after all has been printed.
func runLitmus(ctx context.Context, cfg *litmusConfig, stdout, stderr io.Writer) error {
	if err := litmus.CheckKVM(); err != nil {
		return lack(err)
	}
	var runs []*litmus.Test
	for _, t := range cfg.tests {
		runs = append(runs, t)
		if cfg.sensitive {
			runs = append(runs, t.Sensitive...)
		}
	}
	all := litmusResult{Seed: cfg.run.Seed, Results: []*litmus.Result{}, Verdicts: map[litmus.Verdict]int{}}
	var failed error
	for i, t := range runs {
		r, err := runOneLitmus(ctx, cfg, t, fmt.Sprintf("%d of %d: %s", i+1, len(runs), t.FullName()), stderr)
		if r != nil && (err == nil || r.Rounds > 0) {
			all.Results = append(all.Results, r)
			all.Verdicts[r.Verdict]++
			if !cfg.json {
				failed = errors.Join(failed, r.WriteText(stdout))
			}
			failed = errors.Join(failed, cfg.keepResult(r))
		}
		failed = errors.Join(failed, err)
		if ctx.Err() != nil || errors.Is(err, litmus.ErrConfig) {
			break
		}
	}
	if cfg.json {
		if failed != nil {
			all.Error = failed.Error()
		}
		failed = errors.Join(failed, writeJSON(stdout, all))
	} else if len(all.Results) > 0 {
		fmt.Fprintln(stdout)
		failed = errors.Join(failed, litmus.WriteSummary(stdout, all.Results))
		fmt.Fprintf(stdout, "seed %d\n", all.Seed)
	}
	switch {
	case failed != nil:
		return failed
	case slices.ContainsFunc(all.Results, func(r *litmus.Result) bool { return r.Verdict.Bad() }):
		return exitStatus(statusFailed) // it has been printed
	case all.Verdicts[litmus.NotRun] == len(all.Results):
		return exitStatus(statusLack) // so has the reason
	}
	return nil
}

// runOneLitmus runs one test, with a progress bar if there is a terminal.
func runOneLitmus(ctx context.Context, cfg *litmusConfig, t *litmus.Test, title string, stderr io.Writer) (*litmus.Result, error) {
	c := cfg.run
	if t.Form != "" && c.Iterations != 0 { // it ends when it has seen what it must
		c.Iterations = max(c.Iterations, litmus.DefaultIterations(t))
	}
	if cfg.progress {
		var bar *progressbar.ProgressBar
		defer func() {
			if bar != nil {
				_ = bar.Finish()
			}
		}()
		c.Progress = func(done, wanted uint64) {
			if bar == nil {
				bar = progressbar.NewOptions64(int64(wanted), progressbar.OptionSetWriter(stderr), progressbar.OptionClearOnFinish(),
					progressbar.OptionSetDescription(title), progressbar.OptionThrottle(100*time.Millisecond))
			}
			_ = bar.Set64(int64(done))
		}
	}
	return litmus.Run(ctx, t, c)
}

// keepResult writes a result with a forbidden outcome to a file.
func (cfg *litmusConfig) keepResult(r *litmus.Result) error {
	if cfg.keep == "" || r.Verdict != litmus.Violated {
		return nil
	}
	if err := os.MkdirAll(cfg.keep, 0o777); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(cfg.keep, r.Test+".litmus"), []byte(r.Text), 0o666); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(cfg.keep, r.Test+".json"))
	if err != nil {
		return err
	}
	return errors.Join(writeJSON(f, r), f.Close())
}
