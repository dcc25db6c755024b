package trace

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// Version is the version of recordings.
const Version = 1

// Header is what a recording says of its run.
type Header struct {
	Version int       `json:"gvm_trace"` // Version; written whatever it is
	Start   time.Time `json:"start"`     // that times count from
	Guest   string    `json:"guest"`     // the guest and its parameters
	VCPUs   int       `json:"vcpus"`
	HostOps string    `json:"host_ops,omitempty"` // which operations the host carried out: "random", or a file
	Seed    uint64    `json:"seed,omitempty"`     // of those

	// RAM is the frames whose mappings may change.
	RAM addr.GFNRange `json:"ram"`
}

// Recording is a recording that has been read.
type Recording struct {
	Header Header
	Events []Event
}

// FormatError is a recording that is not one.
type FormatError struct {
	File string // as Read was told
	Line int    // from 1
	Err  error  // what is wrong there
}

func (e *FormatError) Error() string { return fmt.Sprintf("%s:%d: %v", e.File, e.Line, e.Err) }
func (e *FormatError) Unwrap() error { return e.Err }

// maxLine is how long a line of a recording may be, in bytes.
const maxLine = 1 << 20

// maxVCPUs is how many vCPUs a recording may have: as many as KVM gives a machine.
const maxVCPUs = 4096

// line is an event as a line of JSON. Fields that the kind of the event does not have
// are left out, and so are others that are zero, but for the slot and the vCPU.
type line struct {
	Seq    uint64         `json:"seq"`
	Time   int64          `json:"t"` // nanoseconds
	At     int64          `json:"at,omitempty"`
	Kind   string         `json:"kind"`
	Op     uint64         `json:"op,omitempty"`
	Name   string         `json:"name,omitempty"`
	HVA    *addr.HVARange `json:"hva,omitempty"`
	GFN    *addr.GFNRange `json:"gfn,omitempty"`
	Pages  uint64         `json:"pages,omitempty"`
	Slot   *uint32        `json:"slot,omitempty"`
	VCPU   *int           `json:"vcpu,omitempty"`
	Access string         `json:"access,omitempty"` // "none", "read-only" or "read-write"
	Err    string         `json:"error,omitempty"`
}

// accesses is how access is spelled in recordings.
var accesses = []addr.Access{addr.NoAccess, addr.Read, addr.ReadWrite}

func newLine(e *Event) line {
	l := line{Seq: e.Seq, Time: int64(e.Time), Kind: e.Kind.String(), Op: e.Op}
	if e.Kind.has(hasName) {
		l.Name = e.Name
	}
	if e.Kind.has(hasErr) {
		l.Err = e.Err
	}
	if e.Kind.has(hasAt) {
		l.At = int64(e.At)
	}
	if e.Kind.has(hasPages) {
		l.Pages = e.Pages
	}
	if e.Kind.has(hasHVA) && e.HVA != (addr.HVARange{}) {
		l.HVA = &e.HVA
	}
	if e.Kind.has(hasGFN) && e.GFN != (addr.GFNRange{}) {
		l.GFN = &e.GFN
	}
	if e.Kind.has(hasSlot) {
		l.Slot = &e.Slot
	}
	if e.Kind.has(hasVCPU) {
		l.VCPU = &e.VCPU
	}
	if e.Kind.has(hasAccess) && e.Acc != addr.NoAccess {
		l.Access = e.Acc.String()
	}
	return l
}

// event checks l and returns what it says.
func (l *line) event() (e Event, err error) {
	e = Event{Seq: l.Seq, Time: time.Duration(l.Time), At: time.Duration(l.At), Op: l.Op, Name: l.Name, Pages: l.Pages, Err: l.Err}
	for k := Kind(1); k < numKinds; k++ {
		if k.String() == l.Kind {
			e.Kind = k
		}
	}
	if e.Kind == 0 {
		return e, fmt.Errorf("there is no kind of event %q", l.Kind)
	}
	for _, f := range []struct {
		name  string
		field field
		given bool
	}{
		{"name", hasName, l.Name != ""}, {"hva", hasHVA, l.HVA != nil}, {"gfn", hasGFN, l.GFN != nil},
		{"pages", hasPages, l.Pages != 0}, {"slot", hasSlot, l.Slot != nil}, {"vcpu", hasVCPU, l.VCPU != nil},
		{"access", hasAccess, l.Access != ""}, {"error", hasErr, l.Err != ""},
		{"at", hasAt, l.At != 0},
	} {
		if f.given && !e.Kind.has(f.field) {
			return e, fmt.Errorf("%v has no field %q", e.Kind, f.name)
		}
	}
	if l.HVA != nil {
		if e.HVA = *l.HVA; e.HVA.Empty() {
			return e, fmt.Errorf("%v is empty", e.HVA)
		}
	}
	if l.GFN != nil {
		if e.GFN = *l.GFN; e.GFN.Empty() {
			return e, fmt.Errorf("%v is empty", e.GFN)
		}
	}
	if l.Slot != nil {
		e.Slot = *l.Slot
	} else if e.Kind.has(hasSlot) {
		return e, fmt.Errorf("%v is of no slot", e.Kind)
	}
	if l.VCPU != nil {
		e.VCPU = *l.VCPU
	} else if e.Kind.has(hasVCPU) {
		return e, fmt.Errorf("%v is of no vCPU", e.Kind)
	}
	if l.Access != "" {
		i := 0
		for i < len(accesses) && accesses[i].String() != l.Access {
			i++
		}
		if i == len(accesses) {
			return e, fmt.Errorf("there is no access %q", l.Access)
		}
		e.Acc = accesses[i]
	}
	return e, nil
}

// Read reads a recording that was written as JSONLines. Its name is for messages. Every
// line is checked: that it is a header or an event, of a kind that there is and with the
// fields of that; that numbers and times grow; that nothing is recorded before it happens;
// that vCPUs are among those of the header. The error is a *FormatError about the first line that is wrong, or that of r.
func Read(name string, r io.Reader) (*Recording, error) {
	var rec Recording
	in := bufio.NewReader(r)
	fail := func(n int, err error) (*Recording, error) { return nil, &FormatError{name, n, err} }
	for n := 1; ; n++ {
		text, err := readLine(in)
		switch {
		case errors.Is(err, errLine):
			return fail(n, err)
		case errors.Is(err, io.EOF) && n == 1:
			return fail(n, errors.New("it is empty: a recording begins with a header"))
		case errors.Is(err, io.EOF):
			return &rec, nil
		case err != nil:
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if n == 1 {
			err = rec.Header.read(text)
		} else {
			err = rec.add(text)
		}
		if err != nil {
			return fail(n, err)
		}
	}
}

// errLine is a line that is not whole.
var errLine = errors.New("the line")

// readLine returns the next line, or io.EOF.
func readLine(in *bufio.Reader) (text []byte, err error) {
	for {
		part, err := in.ReadSlice('\n')
		text = append(text, part...)
		switch {
		case len(text) > maxLine:
			return nil, fmt.Errorf("%w is longer than %d bytes", errLine, maxLine)
		case err == nil:
			return text, nil
		case errors.Is(err, io.EOF) && len(text) > 0:
			return nil, fmt.Errorf("%w has no end: the recording was cut off", errLine)
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

func (h *Header) read(text []byte) error {
	if err := decode(text, h); err != nil {
		return fmt.Errorf("this is not the header of a recording: %w", err)
	}
	switch {
	case h.Version != Version:
		return fmt.Errorf("the recording is of version %d, and this reads version %d", h.Version, Version)
	case h.VCPUs < 0 || h.VCPUs > maxVCPUs:
		return fmt.Errorf("%d vCPUs are not in 0 to %d", h.VCPUs, maxVCPUs)
	case h.RAM.End < h.RAM.Start:
		return fmt.Errorf("RAM, %v, ends before it begins", h.RAM)
	}
	return nil
}

// add adds an event.
func (rec *Recording) add(text []byte) error {
	var l line
	if err := decode(text, &l); err != nil {
		return fmt.Errorf("this is not an event: %w", err)
	}
	e, err := l.event()
	if err != nil {
		return err
	}
	last := Event{}
	if n := len(rec.Events); n > 0 {
		last = rec.Events[n-1]
	}
	switch {
	case e.Seq <= last.Seq:
		return fmt.Errorf("event %d comes after event %d", e.Seq, last.Seq)
	case e.Time < last.Time:
		return fmt.Errorf("the event is at %v, and the one before at %v", e.Time, last.Time)
	case e.At < 0 || e.At > e.Time:
		return fmt.Errorf("it happened at %v, and was recorded at %v", e.At, e.Time)
	case e.VCPU < 0 || e.VCPU >= rec.Header.VCPUs && e.Kind.has(hasVCPU):
		return fmt.Errorf("it is of vCPU %d, and the header has %d", e.VCPU, rec.Header.VCPUs)
	}
	rec.Events = append(rec.Events, e)
	return nil
}

// decode decodes a line that is one JSON value, with no fields that v has not.
func decode(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	if d.More() || len(bytes.TrimSpace(text[d.InputOffset():])) > 0 {
		return errors.New("there is something behind it")
	}
	return nil
}

// byWhen returns the recording with its events in the order in which they happened, which
// differs from that of their numbers where the kernel told late.
func (rec *Recording) byWhen() *Recording {
	events := slices.Clone(rec.Events)
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.When(), b.When()) })
	return &Recording{rec.Header, events}
}

// Page returns those events that have to do with a frame: those of its own, and all of the
// operations that these belong to. That an operation on other frames made a slot anew
// which shows the frame, too, is left out; that events were lost is not.
func Page(events []Event, gfn addr.GFN) (of []Event) {
	ops := map[uint64]bool{}
	for _, e := range events {
		if e.Op != 0 && e.Kind.Lane() != LaneSlots && e.GFN.Contains(gfn) {
			ops[e.Op] = true
		}
	}
	for _, e := range events {
		own := e.GFN.Contains(gfn) && (e.Kind.Lane() != LaneSlots || e.Op == 0)
		// What a guest met at another page of the operation is that page's.
		if own || ops[e.Op] && !e.met() || e.Kind == Lost {
			of = append(of, e)
		}
	}
	return of
}
