package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/secondmmu/gvm/guests"
)

func guestsCommand() *cli.Command {
	return command(&cli.Command{
		Name:  "guests",
		Usage: "list the built-in guests and their parameters",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			all := guests.All()
			if !c.Bool("json") {
				return writeGuests(c.App.Writer, all)
			}
			return writeJSON(c.App.Writer, all)
		},
	})
}

// writeGuests writes a table of the guests, each parameter below its guest.
func writeGuests(w io.Writer, all []guests.Guest) error {
	var buf bytes.Buffer
	tab := tabwriter.NewWriter(&buf, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "GUEST\tPARAMETER\tDEFAULT\tVALUES\tDESCRIPTION")
	for _, g := range all {
		summary := g.Summary
		if g.Endless {
			summary += " (endless)"
		}
		fmt.Fprintf(tab, "%s\t\t\t\t%s\n", g.Name, summary)
		for _, p := range g.Params {
			preset := fmt.Sprint(p.Default)
			if p.Names != nil {
				preset = p.Names[p.Default]
			}
			fmt.Fprintf(tab, "\t%s\t%s\t%s\t%s\n", p.Name, preset, values(p), p.Usage)
		}
	}
	tab.Flush()
	_, err := w.Write(buf.Bytes())
	return err
}

// values says which values a parameter may have.
func values(p guests.Param) string {
	switch {
	case p.Names != nil:
		return strings.Join(p.Names, ", ")
	case p.Pages:
		return fmt.Sprintf("%d to all of RAM", p.Min)
	case p.Max != 0:
		return fmt.Sprintf("%d to %d", p.Min, p.Max)
	}
	return fmt.Sprintf("%d or more", p.Min)
}
