package gvmtest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

// A Mutant is a defect and the check that has to notice it. The values of M are the
// defects that a package can be given; the zero value is the package without any.
type Mutant[M comparable] struct {
	ID     string        // as in the table of defects, "NM8"
	Defect M             // zero if the defect is one of whoever uses the package, or if it does not apply
	What   string        // the defect
	By     string        // the test that notices it; without a Check, who notices it instead
	Check  func(M) error // an error if it was noticed; with zero it returns nil. A defect of a user it injects itself
	Chance string        // if Check needs luck: what the table says, and the test does not fail for, when it has had none
	NA     string        // why there is no Check
}

// RunMutants has each check find the defect that it is there for, and find nothing
// without it. What was found by whom, and how soon, it logs as a table.
func RunMutants[M comparable](t testing.TB, list []Mutant[M]) {
	t.Helper()
	var sound M
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "mutant\tdefect\tcaught by\tafter\n")
	for _, m := range list {
		row := func(by string, after any) { fmt.Fprintf(w, "%s\t%s\t%s\t%v\n", m.ID, m.What, by, after) }
		if m.Check == nil {
			row(cmp.Or(m.By, "not applicable"), m.NA)
			continue
		}
		if m.Defect != sound {
			if err := m.Check(sound); err != nil {
				t.Errorf("%s: without the defect: %v", m.ID, err)
			}
		}
		begin := time.Now()
		err := m.Check(m.Defect)
		after := time.Since(begin).Round(time.Microsecond)
		switch {
		case err != nil:
			row(m.By, after)
			first, _, _ := strings.Cut(err.Error(), "\n")
			t.Logf("%s, %s: %s", m.ID, m.What, first)
		case m.Chance != "":
			row(m.Chance, after)
		default:
			row("nobody", after)
			t.Errorf("%s survives: %s", m.ID, m.What)
		}
	}
	w.Flush()
	t.Logf("\n%s", &out)
}

// EveryMutant fails the test for each defect, from 1 to last, that is not in the list,
// and so is without a check.
func EveryMutant[M ~uint8](t testing.TB, last M, list []Mutant[M]) {
	t.Helper()
	for d := M(1); d <= last; d++ {
		if !slices.ContainsFunc(list, func(m Mutant[M]) bool { return m.Defect == d }) {
			t.Errorf("no check looks for defect %d", d)
		}
	}
}
