// Package doctor examines what a machine offers to gvm: which kernel interfaces
// are there and permitted, and what the operations that gvm is about cost. Each
// gap comes with its remedy.
//
// An examination changes nothing that outlives it or that others can see.
package doctor

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"text/tabwriter"
)

// Status is how much of something the machine has.
type Status string

const (
	OK      Status = "ok"      // all that gvm can use
	Limited Status = "limited" // there, but not all of it
	Missing Status = "missing" // not there, not permitted, or switched off
)

// Check is one thing that gvm can use if the machine has it.
type Check struct {
	Name     string `json:"name"` // the key of the check, which stays the same
	Status   Status `json:"status"`
	Required bool   `json:"required"`         // gvm runs no guest without it
	Detail   string `json:"detail"`           // what was found, in one line
	Remedy   string `json:"remedy,omitempty"` // what to do about a gap, in one line

	// Values has the facts of Detail for programs. The keys of a check stay
	// the same; one is left out where its fact could not be found.
	Values map[string]any `json:"values,omitempty"`
}

// Measure is what an operation costs on this machine.
type Measure struct {
	Name   string  `json:"name"` // the key of the measure, which stays the same
	Value  float64 `json:"value"`
	Unit   string  `json:"unit"`   // "ns" or "us"
	Detail string  `json:"detail"` // what was measured, and how
}

// Report is what an examination found. What is not known is left zero.
type Report struct {
	Kernel      string    `json:"kernel"`       // release, as uname -r has it
	CPU         string    `json:"cpu"`          // model name
	CPUs        int       `json:"cpus"`         // that are online
	MemoryBytes uint64    `json:"memory_bytes"` // in total
	Checks      []Check   `json:"checks"`
	Measures    []Measure `json:"measures"`
}

// sections are the parts of an examination. Each adds to the report what it
// found, and may stop early when its context is done.
var sections = []func(context.Context, *machine, *Report){
	examineKVM,
	examineHost,
}

// Examine examines this machine. What it cannot find out is a finding too; its
// only error is that of ctx.
func Examine(ctx context.Context) (*Report, error) {
	return thisMachine().examine(ctx)
}

func (m *machine) examine(ctx context.Context) (*Report, error) {
	r := &Report{Checks: []Check{}, Measures: []Measure{}}
	for _, section := range sections {
		section(ctx, m, r)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// WriteText writes r as tables, each remedy below its check.
func (r *Report) WriteText(w io.Writer) error {
	var buf bytes.Buffer
	fmt.Fprintf(&buf, "Linux %s\n%s, %d online, %s of memory\n\n", r.Kernel, r.CPU, r.CPUs, sizeString(r.MemoryBytes))

	tab := tabwriter.NewWriter(&buf, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "CHECK\tSTATUS\tFOUND")
	for _, c := range r.Checks {
		status := string(c.Status)
		if c.Required {
			status += " (required)"
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\n", c.Name, status, c.Detail)
		if c.Remedy != "" {
			fmt.Fprintf(tab, "\t\t-> %s\n", c.Remedy)
		}
	}
	tab.Flush()

	if len(r.Measures) > 0 {
		fmt.Fprintln(tab, "\nMEASURE\tVALUE\tOF")
		for _, m := range r.Measures {
			fmt.Fprintf(tab, "%s\t%.2f %s\t%s\n", m.Name, m.Value, m.Unit, m.Detail)
		}
		tab.Flush()
	}
	_, err := w.Write(buf.Bytes())
	return err
}

// sizeString returns n bytes in the largest unit of which there is one.
func sizeString(n uint64) string {
	const units = "KMGT"
	if n < 1<<10 {
		return fmt.Sprintf("%d bytes", n)
	}
	size, unit := float64(n)/(1<<10), 0
	for size >= 1<<10 && unit < len(units)-1 {
		size /= 1 << 10
		unit++
	}
	return fmt.Sprintf("%.4g %ciB", size, units[unit])
}
