package hostops

import (
	"fmt"
	"time"
)

// Record is one operation that was carried out, or was tried.
type Record struct {
	N       uint64        `json:"n"`                 // its number among all of a runner, from 1
	Line    int           `json:"line,omitempty"`    // of the script, from 1; 0: of a random stream
	Kind    Kind          `json:"op"`                // as a script calls it
	Range   Range         `json:"range"`             // the pages; for a truncate those that went or came
	Arg     string        `json:"arg,omitempty"`     // what a script has behind the pages, and for a truncate the number that is left
	Err     string        `json:"err,omitempty"`     // why it failed, or was skipped
	Skipped bool          `json:"skipped,omitempty"` // it was random, and is not for this backing or this kernel
	Took    time.Duration `json:"took"`              // in nanoseconds
}

// text returns the operation as a script would have it.
func (r Record) text() string { return text(r.Kind, r.Range.String(), r.Arg) }

// String returns the operation and where it comes from: "line 4: discard 16..20 (op 1234)".
func (r Record) String() string {
	if r.Line == 0 {
		return fmt.Sprintf("%s (op %d)", r.text(), r.N)
	}
	return fmt.Sprintf("line %d: %s (op %d)", r.Line, r.text(), r.N)
}

// Count is how often operations of one kind were carried out.
type Count struct {
	Done    uint64 `json:"done"`
	Skipped uint64 `json:"skipped"`
	Failed  uint64 `json:"failed"`
}

// Stats is what a runner has done so far.
type Stats struct {
	Ops     uint64         `json:"ops"`     // that were tried
	Kinds   map[Kind]Count `json:"kinds"`   // of them, those that there were any of
	Dropped uint64         `json:"dropped"` // marks and faults that came faster than they could be attended to
}
