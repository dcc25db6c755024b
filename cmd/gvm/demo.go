package main

import (
	"context"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/demo"
)

func demoCommand() *cli.Command {
	return command(&cli.Command{
		Name:        "demo",
		Usage:       "change the mapping of a page in every way, under a guest that uses it",
		Description: "The exit status is 1 if the guest found something else than it should.",
		Flags:       []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			r, err := demo.Run(c.Context)
			if err != nil {
				return lack(err)
			}
			write := r.WriteText
			if c.Bool("json") {
				write = func(w io.Writer) error { return writeJSON(w, r) }
			}
			if err := write(c.App.Writer); err != nil {
				return err
			}
			if r.OK() {
				return nil
			}
			if err := context.Cause(c.Context); err != nil {
				return err
			}
			return exitStatus(statusFailed) // the report says why
		},
	})
}
