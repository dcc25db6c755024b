package hostops

import (
	"fmt"
	"strings"
	"time"
)

// Trigger says what sets a line of a script off.
type Trigger uint8

const (
	At      Trigger = iota // a time
	Every                  // a period
	OnMark                 // the guest has reached a mark
	OnFault                // a vCPU has touched a page that is not there
	Then                   // the line before has been carried out
)

// When says when a line of a script is carried out.
type When struct {
	Trigger Trigger
	D       time.Duration // At: since the start, not negative. Every: the period, positive
	Any     bool          // OnMark: any
	Mark    uint32        // OnMark: which, unless Any
}

func (w When) String() string {
	switch {
	case w.Trigger == At:
		return "at " + w.D.String()
	case w.Trigger == Every:
		return "every " + w.D.String()
	case w.Trigger == OnMark && w.Any:
		return "on mark"
	case w.Trigger == OnMark:
		return fmt.Sprintf("on mark %d", w.Mark)
	case w.Trigger == OnFault:
		return "on fault"
	}
	return "then"
}

// Line is a line of a script that has an operation.
type Line struct {
	N    int // its place in the text, from 1
	When When
	Op   Op
}

func (l Line) String() string { return l.When.String() + " " + l.Op.String() }

// Script is operations and when to carry them out. Parse makes one; it does not change
// then, and any number of runners may have it.
type Script struct {
	Name  string // of the file, for messages
	Lines []Line // in the order of their places
}

// String returns a text that Parse makes the same script of. Each operation is in the
// line in which it was, and comments are left out.
func (s *Script) String() string {
	var b strings.Builder
	at := 1
	for _, l := range s.Lines {
		b.WriteString(strings.Repeat("\n", max(0, l.N-at)))
		b.WriteString(l.String() + "\n")
		at = max(at, l.N) + 1
	}
	return b.String()
}

// check reports the first line that is about pages, or a region, that there are not.
func (s *Script) check(pages uint64, spare bool) error {
	for _, l := range s.Lines {
		fail := func(format string, args ...any) error {
			return &SyntaxError{File: s.Name, Line: l.N, Msg: fmt.Sprintf(format, args...)}
		}
		switch p := l.Op.Pages; {
		case p.Which == GivenPages && p.Range.End > pages:
			return fail("%v is about pages that RAM does not have: it has %d", l.Op, pages)
		case p.Which == RandomPages && p.N > pages:
			return fail("%v is about more pages than the %d of RAM", l.Op, pages)
		case !spare && (l.Op.Kind == RemapKeep || l.Op.Kind == Remap && !l.Op.Back):
			return fail("%v needs a spare region, and the machine has none", l.Op)
		}
	}
	return nil
}
