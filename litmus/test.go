package litmus

import (
	"fmt"
	"slices"
	"strings"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/vm"
)

// Limits of a test. They bound what a file can ask of the machine.
const (
	MaxText           = 64 << 10 // bytes of a file
	MaxNames          = 12       // pages, aliases and mapped addresses
	MaxHuge           = 4        // pages that are huge
	MaxPages          = addr.HugeSize / addr.PageSize
	MaxGuests         = 4
	MaxHosts          = 4
	MaxStatements     = 64   // of a thread
	MaxInstances      = 64   // of a test with threads of the host: words of all are on one page, which they change
	MaxGuestInstances = 1024 // of a test without
	MaxReplaces       = 32   // statements that put a page in the place of another
	MaxValue          = 1<<31 - 1
	MaxDelay          = 1 << 20
	MaxClauses        = 16
	Registers         = 8
	Words             = 8 // of a page, for each instance
	maxName           = 40
	maxDepth          = 32 // of parentheses
)

// lineBytes is the distance of one instance's words from the next one's.
const lineBytes = 64

// Instances if a test does not say: without host threads, and with.
const (
	guestInstances = 512
	hostInstances  = 16
)

// Pos is a place in a test's text, from 1.
type Pos struct{ Line, Col int }

// Test is a litmus test.
type Test struct {
	File  string // as Parse was told
	Text  string
	Name  string
	About string
	Form  string // of a sensitive form: its name

	Machine   Machine
	Pages     []Page
	Aliases   []Alias
	Tables    []Table
	Instances int
	Guests    []Thread
	Hosts     []Thread
	Setup     []Statement
	Clauses   []Clause
	Observed  []Ref  // what an outcome consists of, in the order in which it is mentioned
	Needs     []Need // all, those that follow from statements included

	// ExpectShadow says that a forbidden outcome is known of hosts that shadow guest page
	// tables, and expected there.
	ExpectShadow bool

	Sensitive []*Test // the forms in which a forbidden outcome must be seen
}

// Machine is what a test says of the machine that it runs on.
type Machine struct {
	Lazy         bool
	Ring0        bool
	Disconnected bool
	Logged       bool // with Dirty as the source
	Dirty        vm.DirtySource
}

// Page is a named page.
type Page struct {
	Name    string
	Backing mm.Backing
	Huge    bool
	NPages  uint64
	Init    [Words]uint64
}

// Alias is another name, and guest address, of a page.
type Alias struct{ Name, Of string }

// Table is a page that is a guest page table.
type Table struct {
	Name string // of the page
	Maps string // the name of the address that it maps
	To   string // which page, at first
}

// Thread is a sequence of statements, of the guest or of the host.
type Thread struct {
	Name       string
	Statements []Statement
}

// Op is what a statement does, as it is written.
type Op string

// The operations of guest threads, of host threads, or both.
const (
	Load       Op = "load"
	Store      Op = "store"
	Add        Op = "add"
	Swap       Op = "swap"
	Await      Op = "await"
	Fence      Op = "fence"
	Mark       Op = "mark"
	Delay      Op = "delay"
	Flush      Op = "flush"
	Dirty      Op = "dirty"
	Discarded  Op = "discarded"
	Used       Op = "used"
	Point      Op = "point"
	Wait       Op = "wait"
	LogDirty   Op = "log"
	Harvest    Op = "harvest"
	Abort      Op = "abort"
	WorkingSet Op = "working-set"
	Pause      Op = "pause"
	Resume     Op = "resume"
	Fork       Op = "fork"
	Reap       Op = "reap"

	Unmap       Op = "unmap"
	Map         Op = "map"
	Discard     Op = "discard"
	Punch       Op = "punch"
	Remove      Op = "remove"
	Free        Op = "free"
	PageOut     Op = "pageout"
	Collapse    Op = "collapse"
	Guard       Op = "guard"
	Unguard     Op = "unguard"
	Mergeable   Op = "mergeable"
	Unmergeable Op = "unmergeable"
	RemapKeep   Op = "remap-keep"
	Migrate     Op = "migrate"
	Compact     Op = "compact"
	Replace     Op = "replace"
	Move        Op = "move"
	Protect     Op = "protect"
	Populate    Op = "populate"
)

// changes are the operations that change mappings, or have the kernel do so.
var changes = []Op{Unmap, Map, Discard, Punch, Remove, Free, PageOut, Collapse, Guard, Unguard, Mergeable, Unmergeable,
	RemapKeep, Migrate, Compact, Replace, Move, Protect, Populate}

// rawOps and lateOps are those that can be carried out without anybody being told, or told
// too late.
var (
	rawOps  = []Op{Map, Discard, Punch, Remove, RemapKeep, Replace, Move}
	lateOps = []Op{Map, Discard, Punch, Remove, RemapKeep, Replace}
)

// Via says how the host accesses a word.
type Via string

// The ways: by the table of translations, by the host address that the page has now, by
// the one that it had when the round began, and in the child.
const (
	ByTable Via = ""
	ByHVA   Via = "hva"
	ByHeld  Via = "held"
	ByChild Via = "child"
)

// How says what a change leaves out.
type How string

// The ways: nothing, all notice, or the notice at the right time.
const (
	Told How = ""
	Raw  How = "raw"
	Late How = "late"
)

// Loc is a word of a page, by the name of the page, an alias or a mapped address.
type Loc struct {
	Name string
	Word int
}

func (l Loc) String() string {
	if l.Word == 0 {
		return l.Name
	}
	return fmt.Sprintf("%s[%d]", l.Name, l.Word)
}

// Statement is one of a thread's.
type Statement struct {
	Pos    Pos
	Op     Op
	How    How
	Via    Via
	Reg    int // the result's register, or -1
	Loc    Loc
	Value  uint64
	From   int         // the register that is stored, or -1: Value is
	Access addr.Access // of Protect and Populate
	Other  string      // of Point: the page; of Wait: the thread, or "" for all
}

// change reports whether the statement is one that iterations have to overlap.
func (s *Statement) change() bool {
	return slices.Contains(changes, s.Op) || s.Op == Point || s.Op == Fork
}

func (s *Statement) String() string {
	var b strings.Builder
	if s.Reg >= 0 {
		fmt.Fprintf(&b, "r%d = ", s.Reg)
	}
	if s.How != Told {
		fmt.Fprintf(&b, "%s ", s.How)
	}
	b.WriteString(string(s.Op))
	if s.Loc.Name != "" {
		fmt.Fprintf(&b, " %v", s.Loc)
	}
	switch s.Op {
	case Store:
		if s.From >= 0 {
			fmt.Fprintf(&b, " r%d", s.From)
			break
		}
		fmt.Fprintf(&b, " %d", s.Value)
	case Add, Swap, Await, Delay, Replace:
		fmt.Fprintf(&b, " %d", s.Value)
	case Protect, Populate:
		fmt.Fprintf(&b, " %s", accessWords[s.Access])
	case Point:
		fmt.Fprintf(&b, " %s", s.Other)
	case Wait:
		if s.Other == "" {
			b.WriteString(" guests")
		} else {
			fmt.Fprintf(&b, " %s", s.Other)
		}
	case LogDirty:
		b.WriteString([]string{" off", " on"}[s.Value])
	}
	if s.Via != ByTable {
		fmt.Fprintf(&b, " %s", s.Via)
	}
	return b.String()
}

var accessWords = map[addr.Access]string{addr.NoAccess: "none", addr.Read: "read", addr.ReadWrite: "write"}

// Need is something that a test needs of a machine, beyond KVM.
type Need string

// The needs that a file can state.
const (
	NeedSwap      Need = "swap"
	NeedKSM       Need = "ksm"
	NeedNUMA      Need = "numa"
	NeedIdle      Need = "idle"
	NeedRoot      Need = "root"
	NeedHugePages Need = "hugepages"
)

var needs = []Need{NeedSwap, NeedKSM, NeedNUMA, NeedIdle, NeedRoot, NeedHugePages}

// Class says what a clause makes of the outcomes that satisfy it.
type Class string

// The classes.
const (
	Forbidden Class = "forbidden"
	Allowed   Class = "allowed"
	Required  Class = "required"
)

// Clause is a condition and what it means.
type Clause struct {
	Pos   Pos
	Class Class
	Cond  *Cond
}

func (t *Test) page(name string) (*Page, bool) {
	for i := range t.Pages {
		if t.Pages[i].Name == name {
			return &t.Pages[i], true
		}
	}
	return nil, false
}

// memory returns the page whose memory a name stands for at first: its own, or that of
// the page that it is an alias of. A mapped address has none of its own.
func (t *Test) memory(name string) (*Page, bool) {
	for _, a := range t.Aliases {
		if a.Name == name {
			return t.page(a.Of)
		}
	}
	return t.page(name)
}

func (t *Test) table(maps string) (*Table, bool) {
	for i := range t.Tables {
		if t.Tables[i].Maps == maps {
			return &t.Tables[i], true
		}
	}
	return nil, false
}

func (t *Test) isTable(page string) bool {
	return slices.ContainsFunc(t.Tables, func(x Table) bool { return x.Name == page })
}

// hasHosts reports whether there are threads of the host.
func (t *Test) hasHosts() bool { return len(t.Hosts) > 0 }

// maxInstances is how many instances of the test a round can have.
func (t *Test) maxInstances() int {
	if t.hasHosts() {
		return MaxInstances
	}
	return MaxGuestInstances
}

// FullName returns the test's name, with that of the form after a slash.
func (t *Test) FullName() string {
	if t.Form == "" {
		return t.Name
	}
	return t.Name + "/" + t.Form
}

// Layout of the guest's addresses: every name has a block of 2 MiB to itself.
func (t *Test) names() []string {
	var names []string
	for _, p := range t.Pages {
		names = append(names, p.Name)
	}
	for _, a := range t.Aliases {
		names = append(names, a.Name)
	}
	for _, x := range t.Tables {
		names = append(names, x.Maps)
	}
	return names
}

const firstBlock = 2 // behind the boot window and RAM

// address returns the guest address of what a name stands for: a physical one, at which it
// is mapped as well, or for a mapped address a virtual one alone.
func (t *Test) address(name string) addr.GPA {
	return addr.GPA(firstBlock+slices.Index(t.names(), name)) * addr.HugeSize
}
