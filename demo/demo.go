// Package demo tells the story of gvm on one page of a running guest: the host
// changes the page's mapping in every way there is, and the guest says what it
// finds there.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/trace"
	"github.com/secondmmu/gvm/vm"
)

// Report is what every party saw.
type Report struct {
	RAM     uint64   `json:"ram"`  // bytes of RAM
	Page    addr.GPA `json:"page"` // the page that the story is about
	Steps   []Step   `json:"steps"`
	Seconds float64  `json:"seconds"` // from the first vCPU's start to the last answer
}

// Step is one host operation and what came of it.
type Step struct {
	Operation string       `json:"operation"`       // what the host did
	Syscall   string       `json:"syscall"`         // with which system call; a hole is a reservation, so munmap is an mmap
	Notified  []string     `json:"notified"`        // events of the notifier, in order
	Slots     []SlotChange `json:"slots"`           // changes of KVM's memory slots, in order
	Guest     []Answer     `json:"guest"`           // what the guest did then, and what it found
	Error     string       `json:"error,omitempty"` // why the step could not be finished
}

// SlotChange is the deletion or creation of a memory slot.
type SlotChange struct {
	Created  bool          `json:"created"`
	Slot     uint32        `json:"slot"`
	GFNs     addr.GFNRange `json:"gfns"`
	ReadOnly bool          `json:"read_only"`
	Backing  string        `json:"backing"` // where its host memory is: region and offset
}

func (c SlotChange) String() string {
	sign, suffix := "-", ""
	if c.Created {
		sign = "+"
	}
	if c.ReadOnly {
		suffix = " ro"
	}
	return fmt.Sprintf("%s[%#x,%#x)%s", sign, uint64(c.GFNs.Start), uint64(c.GFNs.End), suffix)
}

// Answer is one access of the guest to the page.
type Answer struct {
	Store   bool   `json:"store"`
	Value   uint64 `json:"value"`   // stored, or found by a load
	Want    uint64 `json:"want"`    // what the load should find
	Exited  bool   `json:"exited"`  // the access left the guest, because no slot allows it
	Exits   bool   `json:"exits"`   // it should
	Comment string `json:"comment"` // why
}

// OK reports whether the guest found what it should.
func (a Answer) OK() bool { return a.Exited == a.Exits && (a.Store || a.Value == a.Want) }

func (a Answer) String() string {
	verb := "loads"
	if a.Store {
		verb = "stores"
	}
	s := fmt.Sprintf("%s %#x", verb, a.Value)
	switch {
	case a.Exited && a.Store:
		s += " (exit: dropped)"
	case a.Exited:
		s += " (exit: empty bus)"
	}
	if !a.OK() {
		s += fmt.Sprintf(" WRONG, want %#x", a.Want)
		if a.Exits {
			s += " after an exit"
		}
	}
	return s
}

// OK reports whether every step was finished with the right answers, and the
// notifier spoke at every operation.
func (r *Report) OK() bool {
	for _, s := range r.Steps {
		if !s.ok() {
			return false
		}
	}
	return len(r.Steps) == len(story)
}

func (s Step) ok() bool {
	for _, a := range s.Guest {
		if !a.OK() {
			return false
		}
	}
	return s.Error == "" && (len(s.Notified) > 0) == (s.Syscall != "")
}

const (
	ramSize = addr.HugeSize
	page    = guests.RAMBase + 5*addr.PageSize // not the first, so that a cut leaves two pieces
	empty   = ^uint64(0)                       // what an empty bus reads
)

// scene is what a step has at hand.
type scene struct {
	m     *vm.Machine
	hvas  addr.HVARange // where the page is at first
	moved addr.HVARange // where it is moved to
}

// access is a step's access of the guest, and what should come of it.
type access struct {
	store   bool
	value   uint64 // to store, or to find
	exits   bool
	comment string
}

func stores(v uint64, comment string) access { return access{store: true, value: v, comment: comment} }
func loads(v uint64, comment string) access  { return access{value: v, comment: comment} }

// behindExit is a, which no slot allows.
func behindExit(a access) access { a.exits = true; return a }

// story is the steps. Do is nil for one at which the host does nothing.
var story = []struct {
	operation, syscall string
	do                 func(*scene) error
	guest              []access
}{
	{"boot", "", nil, []access{
		stores(0x1111, "the guest has memory"),
		loads(0x1111, "and finds there what it stored"),
	}},
	{"munmap", "mmap NONE, FIXED", func(s *scene) error { return s.m.Memory().Unmap(s.hvas) }, []access{
		behindExit(loads(empty, "there is no memory, and no slot")),
		behindExit(stores(0x2222, "so nothing keeps what is stored")),
	}},
	{"map back", "mmap FIXED", func(s *scene) error { return s.m.Memory().Map(s.hvas) }, []access{
		loads(0, "a new page is empty"),
		stores(0x3333, "and keeps what is stored"),
		loads(0x3333, ""),
	}},
	{"discard", "madvise DONTNEED", func(s *scene) error { return s.m.Memory().Discard(s.hvas) }, []access{
		loads(0, "the content is gone, the mapping is not"),
		stores(0x4444, ""),
	}},
	{"protect read-only", "mprotect READ", func(s *scene) error { return s.m.Memory().Protect(s.hvas, addr.Read) }, []access{
		loads(0x4444, "reading goes on without an exit"),
		behindExit(stores(0x5555, "writing does not")),
		loads(0x4444, "and has changed nothing"),
	}},
	{"protect read-write", "mprotect READ|WRITE", func(s *scene) error { return s.m.Memory().Protect(s.hvas, addr.ReadWrite) }, []access{
		stores(0x6666, "writing goes on"),
		loads(0x6666, ""),
	}},
	{"map over", "mmap FIXED", func(s *scene) error { return s.m.Memory().Map(s.hvas) }, []access{
		loads(0, "another page has taken the place of the first, at once"),
		stores(0x7777, ""),
	}},
	{"mremap", "mremap FIXED", func(s *scene) error { return s.m.Memory().Remap(s.hvas, s.moved.Start) }, []access{
		loads(0x7777, "the page has moved in the host, and the guest has not noticed"),
		stores(0x8888, ""),
	}},
	{"store at the new address", "", func(s *scene) error {
		if v, err := s.m.Memory().Load64(s.moved.Start); err != nil || v != 0x8888 {
			return fmt.Errorf("the host finds %#x at the new address, want what the guest stored: %w", v, err)
		}
		return s.m.Memory().Store64(s.moved.Start, 0x9999)
	}, []access{
		loads(0x9999, "host and guest share the page at its new address"),
	}},
}

// Run boots a guest and tells the story. An error says that there could be no
// guest, or that it could not be ended; what goes wrong in between is in the
// report.
func Run(ctx context.Context) (*Report, error) {
	return run(ctx, vm.Config{}, func(*vm.Machine) {})
}

// run is Run with a machine of another configuration, and a function that is
// called after each access of the guest.
func run(ctx context.Context, c vm.Config, after func(*vm.Machine)) (_ *Report, err error) {
	c.RAM, c.Spare, c.Touch, c.Log = ramSize, addr.PageSize, vm.Float, trace.NewLog(4096)
	m, err := vm.New(c)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	guest, err := guests.Lookup("probe")
	if err != nil {
		return nil, err
	}
	if err := m.Boot(guest, nil); err != nil {
		return nil, err
	}
	s := &scene{m: m, moved: m.Spare().Range}
	s.hvas = addr.HVAs(m.RAM().Range.Start+addr.HVA(page-guests.RAMBase), addr.PageSize)

	begin := time.Now()
	if err := m.Start(ctx); err != nil {
		return nil, err
	}
	probe := m.Probe(0)
	r := &Report{RAM: ramSize, Page: page}
	logged := c.Log.Len()
	for i, part := range story {
		step := Step{Operation: part.operation, Syscall: part.syscall}
		err := func() error {
			if part.do != nil {
				if err := part.do(s); err != nil {
					return err
				}
			}
			for _, a := range part.guest {
				answer, err := ask(ctx, c.Log, probe, a)
				if err != nil {
					return err
				}
				step.Guest = append(step.Guest, answer)
				after(m)
			}
			return nil
		}()
		if i == 0 {
			logged = 0 // the slots that were made before the first step are part of it
		}
		events, _ := c.Log.Since(logged)
		logged = c.Log.Len()
		step.tell(events, m)
		if err != nil {
			step.Error = err.Error()
		}
		r.Steps = append(r.Steps, step)
		if err != nil {
			break
		}
	}
	r.Seconds = time.Since(begin).Seconds()

	if err := probe.Exit(0); err != nil {
		return nil, err
	}
	if _, err := m.Wait(); err != nil && r.OK() {
		return nil, err
	} else if err != nil {
		r.Steps[len(r.Steps)-1].Error = err.Error() // the reason behind the probe's
	}
	return r, nil
}

// ask has the guest make an access.
func ask(ctx context.Context, log *trace.Log, probe *vm.Probe, a access) (Answer, error) {
	answer := Answer{Store: a.store, Value: a.value, Want: a.value, Exits: a.exits, Comment: a.comment}
	before := log.Len()
	var err error
	if a.store {
		err = probe.Store(ctx, page, a.value)
	} else {
		answer.Value, err = probe.Load(ctx, page)
	}
	events, _ := log.Since(before)
	for _, e := range events {
		answer.Exited = answer.Exited || e.Kind == trace.Touch
	}
	return answer, err
}

// tell adds to the step what the log has of it.
func (s *Step) tell(events []trace.Event, m *vm.Machine) {
	s.Notified, s.Slots = []string{}, []SlotChange{}
	for _, e := range events {
		switch e.Kind {
		case trace.InvalidateStart:
			s.Notified = append(s.Notified, e.Name)
		case trace.SlotCreate, trace.SlotDelete:
			s.Slots = append(s.Slots, SlotChange{
				Created: e.Kind == trace.SlotCreate, Slot: e.Slot, GFNs: e.GFN,
				ReadOnly: e.Acc == addr.Read, Backing: place(m, e.HVA.Start),
			})
		}
	}
}

// place names a host address by the region that it is in: absolute addresses
// differ from run to run.
func place(m *vm.Machine, hva addr.HVA) string {
	for _, r := range []*mm.Region{m.RAM(), m.Spare()} {
		if r.Range.Start <= hva && hva < r.Range.End {
			return fmt.Sprintf("%s+%#x", r.Name, uint64(hva-r.Range.Start))
		}
	}
	return "boot"
}

// WriteText writes the report as a table, with a verdict as its last line.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "A guest with %d MiB of RAM loads from and stores to the page at %v, while the host changes its mapping.\n\n", r.RAM>>20, r.Page)
	tab := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "HOST DOES\tNOTIFIER SAYS\tMEMORY SLOTS (gfn)\tGUEST\t")
	finished := 0
	for _, s := range r.Steps {
		if s.ok() {
			finished++
		}
		var rows [4][]string
		rows[0] = []string{s.Operation}
		if s.Syscall != "" {
			rows[0] = append(rows[0], "  "+s.Syscall)
		}
		rows[1] = s.Notified
		for _, c := range s.Slots {
			rows[2] = append(rows[2], fmt.Sprintf("%v %s", c, c.Backing))
		}
		if len(s.Slots) == 0 {
			rows[2] = []string{"kept"}
		}
		for _, a := range s.Guest {
			rows[3] = append(rows[3], a.String())
		}
		for i := 0; ; i++ {
			var cells [4]string
			more := false
			for c := range rows {
				if i < len(rows[c]) {
					cells[c], more = rows[c][i], true
				}
			}
			if !more {
				break
			}
			fmt.Fprintln(tab, strings.Join(cells[:], "\t")+"\t")
		}
	}
	tab.Flush()
	text := trimLines(b.String())
	for _, s := range r.Steps {
		if s.Error != "" {
			text += fmt.Sprintf("\n%s: %s\n", s.Operation, s.Error)
		}
	}
	verdict := "the guest saw exactly what the host's mappings said"
	if !r.OK() {
		verdict = "FAILED: the guest did not see what the host's mappings said"
	}
	text += fmt.Sprintf("\n%s: %d of %d steps in %.1f ms\n", verdict, finished, len(story), r.Seconds*1e3)
	_, err := io.WriteString(w, text)
	return err
}

// trimLines returns s without white space at the ends of its lines.
func trimLines(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		b.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	return b.String()
}
