package hostops

import (
	"fmt"
	"strings"

	"github.com/secondmmu/gvm/addr"
)

// Kind is an operation by its stable name, which is also how a script calls it.
type Kind string

// The kinds.
const (
	Unmap       Kind = "unmap"
	Map         Kind = "map"
	Protect     Kind = "protect"
	Discard     Kind = "discard"
	Punch       Kind = "punch"
	Remap       Kind = "remap"
	RemapKeep   Kind = "remap-keep"
	Free        Kind = "free"
	Remove      Kind = "remove"
	Populate    Kind = "populate"
	PageOut     Kind = "pageout"
	Collapse    Kind = "collapse"
	Mergeable   Kind = "mergeable"
	Unmergeable Kind = "unmergeable"
	Guard       Kind = "guard"
	Unguard     Kind = "unguard"
	Truncate    Kind = "truncate"
	Store       Kind = "store"
	Fill        Kind = "fill"
)

var kinds = []Kind{
	Unmap, Map, Protect, Discard, Punch, Remap, RemapKeep, Free, Remove, Populate,
	PageOut, Collapse, Mergeable, Unmergeable, Guard, Unguard, Truncate, Store, Fill,
}

// Range is the pages [Start, End) of RAM, counted from 0. It is empty if End is not above
// Start.
type Range struct {
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
}

// Len returns the number of pages in r.
func (r Range) Len() uint64 {
	if r.End <= r.Start {
		return 0
	}
	return r.End - r.Start
}

// Contains reports whether page is in r.
func (r Range) Contains(page uint64) bool { return r.Start <= page && page < r.End }

// Overlaps reports whether r and s have a page in common.
func (r Range) Overlaps(s Range) bool { return max(r.Start, s.Start) < min(r.End, s.End) }

func (r Range) String() string {
	if r.Len() == 1 {
		return fmt.Sprint(r.Start)
	}
	return fmt.Sprintf("%d..%d", r.Start, r.End)
}

// Which says how an operation names its pages.
type Which uint8

const (
	GivenPages  Which = iota // by their numbers
	AllPages                 // all of RAM
	RandomPages              // a run of some length, somewhere
	ItPages                  // those of what has happened just before
)

// Pages is which pages an operation is about.
type Pages struct {
	Which Which
	Range Range  // if GivenPages
	N     uint64 // if RandomPages: how many; at least 1
}

func (p Pages) String() string {
	switch {
	case p.Which == AllPages:
		return "all"
	case p.Which == ItPages:
		return "it"
	case p.Which == RandomPages && p.N == 1:
		return "random"
	case p.Which == RandomPages:
		return fmt.Sprintf("random %d", p.N)
	}
	return p.Range.String()
}

// Op is one operation.
type Op struct {
	Kind Kind

	// Pages is what it is about. For a Truncate it is what is left: AllPages, or a range
	// that starts at 0 and may be empty. For a Store it is one page.
	Pages Pages

	Access addr.Access // Protect: what is left, NoAccess, Read or ReadWrite. Populate: Read or ReadWrite
	Back   bool        // Remap: home, instead of to the spare region
	Offset uint64      // Store: in bytes from the start of the page; a multiple of 8
	Value  uint64      // Store: the word. Fill: the byte
}

// String returns the operation as a script has it.
func (o Op) String() string {
	pages := o.Pages.String()
	if o.Kind == Fill && pages == "random" {
		pages = "random 1" // or the byte would be taken for how many
	}
	return text(o.Kind, pages, o.arg())
}

// arg returns what a script has behind the pages.
func (o Op) arg() string {
	switch o.Kind {
	case Truncate:
		if o.Pages.Which == AllPages {
			return "all"
		}
		return fmt.Sprint(o.Pages.Range.End)
	case Store:
		if o.Offset != 0 {
			return fmt.Sprintf("+%d %d", o.Offset, o.Value)
		}
		return fmt.Sprint(o.Value)
	case Fill:
		return fmt.Sprint(o.Value)
	case Protect, Populate:
		return accessWords[o.Access]
	case Remap:
		if o.Back {
			return "back"
		}
		return "to spare"
	}
	return ""
}

// left returns how many pages a Truncate leaves, if RAM has that many.
func (o Op) left(pages uint64) uint64 {
	if o.Pages.Which == AllPages {
		return pages
	}
	return o.Pages.Range.End
}

// text puts the parts of an operation together as a script has them.
func text(k Kind, pages, arg string) string {
	switch {
	case k == Truncate:
		return fmt.Sprintf("%s %s", k, arg)
	case arg == "":
		return fmt.Sprintf("%s %s", k, pages)
	case strings.HasPrefix(arg, "+"):
		return fmt.Sprintf("%s %s%s", k, pages, arg)
	}
	return fmt.Sprintf("%s %s %s", k, pages, arg)
}

// accessWords is how a script says what access is left, or wanted.
var accessWords = map[addr.Access]string{addr.NoAccess: "none", addr.Read: "read", addr.ReadWrite: "write"}
