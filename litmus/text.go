package litmus

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// FullName returns the name of the test, with that of the form after a slash.
func (r *Result) FullName() string {
	if r.Form == "" {
		return r.Test
	}
	return r.Test + "/" + r.Form
}

// maxLines is how many outcomes of one run are listed.
const maxLines = 12

// WriteText writes the histogram of a run, and its verdict as the last line:
//
//	corr-replace
//	      4011 *>P0:r0=1 P0:r1=2
//	...
//
// Behind a count, ! is a forbidden outcome, * an interesting one.
func (r *Result) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", r.FullName())
	for i, o := range r.Outcomes {
		if i == maxLines {
			var n uint64
			for _, rest := range r.Outcomes[i:] {
				n += rest.Count
			}
			fmt.Fprintf(&b, "%10d   in %d other outcomes\n", n, len(r.Outcomes)-i)
			break
		}
		mark := " "
		switch {
		case o.Class == Forbidden:
			mark = "!"
		case o.Interesting:
			mark = "*"
		}
		fmt.Fprintf(&b, "%10d %s %s", o.Count, mark, o.Text)
		if o.Class != Allowed {
			fmt.Fprintf(&b, "  %s", o.Class)
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "%s: %s\n", r.FullName(), r.summary())
	for _, s := range r.Sightings {
		if r.Verdict != Violated {
			break
		}
		fmt.Fprintf(&b, "  seen: %s in round %d, instance %d, seed %d, delays %v, gaps %v at %v, the host's %v\n", s.Outcome, s.Round, s.Instance, r.Seed, s.Start, s.Gap, s.Split, s.HostWait)
	}
	if r.Verdict == Violated {
		fmt.Fprintf(&b, "  again: gvm litmus run --seed %d --instances %d --iterations %d %s\n", r.Seed, r.Instances, r.Wanted, r.Test)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// summary is the verdict and what it rests on.
func (r *Result) summary() string {
	s := string(r.Verdict)
	if r.Reason != "" {
		s += ": " + r.Reason
	}
	if r.Verdict == NotRun {
		return s
	}
	s += fmt.Sprintf("; %d iterations", r.Iterations)
	if r.HostOps {
		s += fmt.Sprintf(", %d effective, %d rounds", r.Effective, r.Rounds)
		if r.Effective < r.Wanted && r.Form == "" {
			s += fmt.Sprintf(" (%d effective ones were wanted)", r.Wanted)
		}
	}
	return s + fmt.Sprintf(" in %v", r.Elapsed.Round(time.Millisecond))
}

// WriteSummary writes a table of runs, and how many there are of each verdict.
func WriteSummary(w io.Writer, results []*Result) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "TEST\tITERATIONS\tEFFECTIVE\tOUTCOMES\tFORBIDDEN\tTIME\tVERDICT")
	verdicts := map[Verdict]int{}
	for _, r := range results {
		verdicts[r.Verdict]++
		if r.Verdict == NotRun {
			fmt.Fprintf(tw, "%s\t-\t-\t-\t-\t-\t%s: %s\n", r.FullName(), r.Verdict, r.Reason)
			continue
		}
		var forbidden uint64
		for _, o := range r.Outcomes {
			if o.Class == Forbidden {
				forbidden += o.Count
			}
		}
		effective := "-"
		if r.HostOps {
			effective = strconv.FormatUint(r.Effective, 10)
		}
		fmt.Fprintf(tw, "%s\t%d\t%s\t%d\t%d\t%v\t%s\n", r.FullName(), r.Iterations, effective, len(r.Outcomes), forbidden, r.Elapsed.Round(time.Millisecond), r.Verdict)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	var parts []string
	for _, v := range []Verdict{OK, Violated, Expected, Missing, Seen, Unseen, NotRun} {
		if n := verdicts[v]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, v))
		}
	}
	_, err := fmt.Fprintf(w, "%d runs: %s\n", len(results), strings.Join(parts, ", "))
	return err
}
