package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/doctor"
)

func doctorCommand() *cli.Command {
	return command(&cli.Command{
		Name:  "doctor",
		Usage: "examine what this machine can do, with a remedy for each gap",
		Description: `The exit status is 3 if something is missing without which no guest runs, and 0
in spite of other gaps.`,
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			r, err := doctor.Examine(c.Context)
			if err != nil {
				return err
			}
			return diagnose(c.App.Writer, r, c.Bool("json"))
		},
	})
}

// diagnose writes the report. Its error is also what is missing.
func diagnose(w io.Writer, r *doctor.Report, asJSON bool) error {
	write := r.WriteText
	if asJSON {
		write = func(w io.Writer) error { return writeJSON(w, r) }
	}
	if err := write(w); err != nil {
		return err
	}
	for _, check := range r.Checks {
		if check.Required && check.Status == doctor.Missing {
			return &lackError{fmt.Errorf("no guest runs on this machine: %s: %s", check.Name, check.Detail), check.Remedy}
		}
	}
	return nil
}
