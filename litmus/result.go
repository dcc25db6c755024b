package litmus

import (
	"cmp"
	"slices"
	"time"
)

// Verdict is what a run says of its test.
type Verdict string

// The verdicts.
const (
	OK       Verdict = "ok"        // nothing forbidden was seen, and all that is required
	Violated Verdict = "forbidden" // a forbidden outcome was seen
	Expected Verdict = "expected"  // a forbidden outcome was seen that is known of such hosts
	Missing  Verdict = "missing"   // nothing was seen that satisfies a required clause
	Seen     Verdict = "seen"      // of a sensitive form: a forbidden outcome was seen, as it must be
	Unseen   Verdict = "not seen"  // of a sensitive form: none was
	NotRun   Verdict = "not run"   // the machine lacks something
)

// Bad reports whether the verdict is a fault, of the machine or of the test.
func (v Verdict) Bad() bool { return v == Violated || v == Missing || v == Unseen }

// Outcome is one of a run's, and how often it was seen.
type Outcome struct {
	Text        string `json:"outcome"`
	Count       uint64 `json:"count"`
	Effective   uint64 `json:"effective"`
	Class       Class  `json:"class"`
	Interesting bool   `json:"interesting"`
}

// Sighting is one iteration in which a forbidden outcome was seen.
type Sighting struct {
	Outcome  string `json:"outcome"`
	Round    uint64 `json:"round"`    // from 1
	Instance int    `json:"instance"` // from 0
	Start    []int  `json:"start"`    // turns of each guest thread's delay before the round
	Gap      []int  `json:"gap"`      // and between two instances, or inside of each
	Split    []int  `json:"split"`    // the statement before which it was, from 1; 0: between two instances
	HostWait []int  `json:"hostWait"` // turns of each host thread's
}

// Result is what came of a run.
type Result struct {
	Test       string        `json:"test"`
	Form       string        `json:"form"` // of a sensitive form; empty: the test itself
	About      string        `json:"about"`
	Verdict    Verdict       `json:"verdict"`
	Reason     string        `json:"reason"` // of NotRun and Expected, what is missing and so on
	Rounds     uint64        `json:"rounds"`
	Iterations uint64        `json:"iterations"`
	Effective  uint64        `json:"effective"`
	Wanted     uint64        `json:"wanted"` // of the effective ones
	Instances  int           `json:"instances"`
	HostOps    bool          `json:"hostOps"` // there are threads of the host
	Elapsed    time.Duration `json:"ns"`
	Seed       uint64        `json:"seed"`
	CPUs       []int         `json:"cpus"` // placement; empty: by the scheduler
	Outcomes   []Outcome     `json:"outcomes"`
	Sightings  []Sighting    `json:"sightings"` // the first of forbidden outcomes
	Text       string        `json:"text"`      // of the test, if a forbidden outcome was seen
}

// maxSightings is how many are kept.
const maxSightings = 4

// tally counts outcomes.
type tally struct {
	t        *Test
	counts   map[string]*count
	required uint // clauses that were satisfied
	key      []byte
}

type count struct {
	outcome     []uint64
	n           uint64
	effective   uint64
	class       Class
	interesting bool
}

func newTally(t *Test) *tally { return &tally{t: t, counts: map[string]*count{}} }

// maxOutcomes bounds the memory that a histogram takes. Others are counted together.
const maxOutcomes = 4096

// add counts an outcome, and reports whether it is forbidden.
func (y *tally) add(outcome []uint64, effective bool) bool {
	y.key = y.key[:0]
	for _, v := range outcome {
		for range 8 {
			y.key = append(y.key, byte(v))
			v >>= 8
		}
	}
	c := y.counts[string(y.key)]
	if c == nil {
		class, interesting, required := y.t.judge(outcome)
		y.required |= required
		c = &count{outcome: slices.Clone(outcome), class: class, interesting: interesting}
		if len(y.counts) < maxOutcomes || class == Forbidden {
			y.counts[string(y.key)] = c
		}
	}
	c.n++
	if effective {
		c.effective++
	}
	return c.class == Forbidden
}

// outcomes returns what was counted: forbidden ones first, then by how often they were seen.
func (y *tally) outcomes() []Outcome {
	list := []Outcome{}
	for _, c := range y.counts {
		list = append(list, Outcome{y.t.outcomeText(c.outcome), c.n, c.effective, c.class, c.interesting})
	}
	slices.SortFunc(list, func(a, b Outcome) int {
		if f, g := a.Class == Forbidden, b.Class == Forbidden; f != g {
			if f {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Text, b.Text))
	})
	return list
}

// missing returns the first required clause that no outcome has satisfied, or nil.
func (y *tally) missing() *Clause {
	for i := range y.t.Clauses {
		if c := &y.t.Clauses[i]; c.Class == Required && y.required>>i&1 == 0 {
			return c
		}
	}
	return nil
}
