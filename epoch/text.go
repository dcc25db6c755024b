package epoch

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/secondmmu/gvm/vm"
)

// Table writes epochs of one run as lines of a table, of columns that have their widths
// from the start: a line can be written before the next epoch is known.
type Table struct {
	w          io.Writer
	workingSet bool
}

// NewTable writes the head of a table for runs with a source. With workingSet it has
// columns for that.
func NewTable(w io.Writer, source vm.DirtySource, workingSet bool) (*Table, error) {
	head := fmt.Sprintf("%6s %6s %8s %8s %9s %9s %9s %8s %8s %6s",
		"epoch", "rounds", "pages", "last", "discarded", "cost", "pause", "spurious", "missing", "ops")
	if workingSet {
		head += fmt.Sprintf(" %8s %8s", "used", "by all")
	}
	_, err := fmt.Fprintf(w, "%v, which sees %v\n%s\n", source, source.Sees(), head)
	return &Table{w, workingSet}, err
}

// Add writes an epoch, and the pages that are missing in it.
func (t *Table) Add(e *Epoch) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%6d %6d %8d %8d %9d %9s %9s %8d %8d %6d", e.Number, e.Rounds, e.Pages, e.Last, e.Discarded,
		short(e.Cost), short(e.Pause), e.Spurious, len(e.Missing), e.Ops)
	if t.workingSet {
		fmt.Fprintf(&b, " %8s %8s", known(e.Used), known(e.UsedByAll))
	}
	if e.Failed {
		b.WriteString("  the snapshot failed, and its harvest was aborted")
	}
	b.WriteByte('\n')
	for _, m := range e.Missing {
		fmt.Fprintf(&b, "       missing: %v\n", m)
	}
	_, err := io.WriteString(t.w, b.String())
	return err
}

func known(n *uint64) string {
	if n == nil {
		return "?"
	}
	return strconv.FormatUint(*n, 10)
}

// WriteResults writes what became of runs, side by side.
func WriteResults(w io.Writer, results []*Result) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "source\tepochs\tverified\tpages\tspurious\tmissing\tcost/epoch\tpauses\tmedian\tp99\tlongest\t")
	for _, r := range results {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\t%d\t%s\t%d\t%s\t%s\t%s\t\n", r.Source, r.Epochs, r.Verified, r.Pages, r.Spurious, r.Missing,
			short(r.Cost/time.Duration(max(r.Epochs, 1))), r.Pauses.Count, short(r.Pauses.Median), short(r.Pauses.P99), short(r.Pauses.Max))
	}
	return tw.Flush()
}

// short returns d with three digits or so.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Microsecond:
		return d.Round(10 * time.Nanosecond).String()
	case d < 10*time.Millisecond:
		return d.Round(time.Microsecond).String()
	}
	return d.Round(time.Millisecond).String()
}
