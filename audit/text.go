package audit

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// String says what the round is.
func (r *Round) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "round %d: %s, %d vCPUs, %d pages of %s", r.Number, r.Guest, r.VCPUs, r.Pages, r.Backing)
	if r.Alias {
		b.WriteString(" twice")
	}
	fmt.Fprintf(&b, ", source %s, %s slots", r.Source, r.Policy)
	if r.Slots != 0 {
		fmt.Fprintf(&b, ", %d at most", r.Slots)
	}
	if r.Others != 0 {
		fmt.Fprintf(&b, ", %d others, watched by %s", r.Others, r.Watch)
	}
	return b.String()
}

// WriteText writes what a round was, and what has diverged in it.
func (r *Round) WriteText(w io.Writer) error {
	var b strings.Builder
	b.WriteString(r.String())
	if r.NotRun != "" {
		fmt.Fprintf(&b, ": not run: %s\n", r.NotRun)
	} else {
		fmt.Fprintf(&b, ": %d epochs, %d operations, %d changes by others, %d divergences\n", r.Epochs, r.Ops, r.Strays, len(r.Divergences))
	}
	for _, d := range r.Divergences {
		fmt.Fprintf(&b, "\t%v\n", d)
		for _, line := range d.Trace {
			fmt.Fprintf(&b, "\t\t%s\n", line)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteText writes what was compared, how often, and in which operations.
func (r *Result) WriteText(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "VIEW\tCOMPARED")
	for _, v := range Views() {
		fmt.Fprintf(tw, "%s\t%d\n", v, r.Checks[v])
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "seed %d: %d rounds (%d not run), %d epochs, %d operations, %d changes by others, %d divergences in %.1f s\n",
		r.Seed, r.Rounds, r.NotRun, r.Epochs, r.Ops, r.Changes()-r.Ops, r.Divergences, r.Seconds)
	return err
}
