package srcu

import (
	"fmt"
	"log/slog"
	"time"
)

// stallAfter is when a stall is reported unless OnStall has said otherwise: the
// kernel's default for the stalls of RCU.
const stallAfter = 21 * time.Second

// Stall is a grace period that has been going on for long.
type Stall struct {
	Domain   *Domain
	Waited   time.Duration // since it began
	Rank     int           // that it waits for
	Sections uint64        // that are open in the rank
	Readers  int           // registered readers that are inside one of them

	// Shards has the sections of the rank that were opened on a shard less those
	// that were closed there, where that is not 0; -1 stands for no shard. What was
	// closed on another shard than it was opened on is off by one on both, ever
	// after: what counts is the sum.
	Shards map[int]int64

	// Opened has the places at which the sections were opened. Only a debug build
	// knows them.
	Opened []string
}

// OnStall has report called once for each grace period that has not ended after
// that time. An after of 0 or less turns this off, and a nil report stands for a
// warning with package slog. A domain that was not told otherwise warns after 21
// seconds.
//
// It is the goroutine that runs the grace period which calls report, and goes on
// to wait when it has returned: report does not wait for the domain. It may close
// the section in question, if that is one of DownRead.
func (d *Domain) OnStall(after time.Duration, report func(Stall)) {
	d.alive("OnStall")
	if report == nil {
		report = logStall
	}
	d.stall.Store(&stallRule{after: after, report: report})
}

// stallRule is what a domain does about stalls.
type stallRule struct {
	after  time.Duration
	report func(Stall)
}

var defaultStallRule = stallRule{after: stallAfter, report: logStall}

func logStall(s Stall) {
	domain := "default"
	if s.Domain != defaultDomain {
		domain = fmt.Sprintf("%p", s.Domain) // which tells it from others
	}
	slog.Warn("srcu: a grace period is stalled by read sections", "domain", domain,
		"waited", s.Waited, "rank", s.Rank, "sections", s.Sections, "readers", s.Readers, "shards", s.Shards, "opened", s.Opened)
}

// watchdog is what one grace period knows of its own length.
type watchdog struct {
	start    time.Duration // since epoch
	reported bool
}

// look reports a stall, if it is one and has not been reported. The grace period
// waits for rank i.
func (w *watchdog) look(d *Domain, i uint64) {
	if w.reported {
		return
	}
	rule := d.stall.Load()
	if rule == nil {
		rule = &defaultStallRule
	}
	waited := time.Since(epoch) - w.start
	if rule.after <= 0 || waited < rule.after {
		return
	}
	w.reported = true
	rule.report(d.describe(i, waited))
}

// describe returns what a grace period waits for that waits for rank i.
func (d *Domain) describe(i uint64, waited time.Duration) Stall {
	readers := d.readers()
	s := Stall{
		Domain: d, Waited: waited, Rank: int(i),
		Sections: d.insideRank(readers, i), Shards: make(map[int]int64), Opened: d.openedAt(i),
	}
	balance := func(c *cell) int64 {
		closed := c.closedIn(i)
		return int64(c.openedIn(i) - closed)
	}
	for n := range d.shards {
		if b := balance(&d.shards[n].cell); b != 0 {
			s.Shards[n] = b
		}
	}
	if b := balance(&d.rest); b != 0 {
		s.Shards[-1] = b
	}
	for _, r := range readers {
		if balance(&r.cell) != 0 {
			s.Readers++
		}
	}
	return s
}
