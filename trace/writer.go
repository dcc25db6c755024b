package trace

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Format is a way to write a recording.
type Format uint8

// The formats.
const (
	Text      Format = iota // a line for each event, in columns, for people
	JSONLines               // a line of JSON for each event, for programs; Read reads it
	Chrome                  // Chrome's trace-event format, for chrome://tracing and ui.perfetto.dev
	HTML                    // a page with a timeline and a map of pages, for a browser; it needs nothing else
)

// Formats returns all formats.
func Formats() []Format { return []Format{Text, JSONLines, Chrome, HTML} }

var formats = [...]string{"text", "jsonl", "chrome", "html"}

func (f Format) String() string {
	if int(f) < len(formats) {
		return formats[f]
	}
	return fmt.Sprintf("format(%d)", uint8(f))
}

// Writer writes a recording.
type Writer interface {
	// Write adds events, which come after those that were added before. Text and
	// JSONLines write them at once, the others keep them until Close.
	Write(events []Event) error

	// Close completes what is written. It does not close what that is written to.
	Close() error
}

// NewWriter returns a writer of a recording in format f to w. The first Write, or Close,
// writes what begins it.
func NewWriter(w io.Writer, f Format, h Header) Writer {
	h.Version = Version
	switch f {
	case JSONLines:
		return &jsonWriter{w: bufio.NewWriter(w), header: &h}
	case Chrome:
		return &whole{w: w, header: h, write: writeChrome}
	case HTML:
		return &whole{w: w, header: h, write: writeHTML}
	}
	return &textWriter{w: w, header: &h}
}

// WriteSince has w write the events of l after number seq, with a Lost event wherever
// some are missing, and returns the number of the last: the next call goes on from
// there.
func (l *Log) WriteSince(seq uint64, w Writer) (last uint64, err error) {
	events, _ := l.Since(seq)
	var all []Event
	for _, e := range events {
		if missing := e.Seq - seq - 1; missing > 0 {
			all = append(all, Event{Kind: Lost, Seq: e.Seq - 1, Time: e.Time, Pages: missing})
		}
		all = append(all, e)
		seq = e.Seq
	}
	return seq, w.Write(all)
}

// jsonWriter writes lines of JSON.
type jsonWriter struct {
	w      *bufio.Writer
	header *Header // nil: it is written
}

func (j *jsonWriter) Write(events []Event) error {
	enc := json.NewEncoder(j.w)
	if j.header != nil {
		if err := enc.Encode(j.header); err != nil {
			return err
		}
		j.header = nil
	}
	for i := range events {
		if err := enc.Encode(newLine(&events[i])); err != nil {
			return err
		}
	}
	return j.w.Flush()
}

func (j *jsonWriter) Close() error { return j.Write(nil) }

// whole writes a recording when it has all of it.
type whole struct {
	w      io.Writer
	header Header
	events []Event
	write  func(io.Writer, *Recording) error
}

func (c *whole) Write(events []Event) error {
	c.events = append(c.events, events...)
	return nil
}

func (c *whole) Close() error { return c.write(c.w, &Recording{c.header, c.events}) }

// spans returns how long each event lasted: an operation to its end, a notification from
// the start to the end of its bracket, a hold to the release, and a wait until the
// guest went on. Others, and ends, have 0. What did not end lasts until the last event. The
// events are in the order in which they happened.
func spans(events []Event) []time.Duration {
	type key struct {
		kind Kind
		op   uint64
		name string
		hva  uint64
		vcpu int
	}
	lasts := make([]time.Duration, len(events))
	open := map[key]int{} // index of what has begun
	var holds []int
	end := func(i, of int) { lasts[of] = max(events[i].When()-events[of].When(), 1) }
	for i, e := range events {
		bracket := key{InvalidateStart, e.Op, e.Name, uint64(e.HVA.Start), 0}
		wait := key{kind: Touch, vcpu: e.VCPU}
		finish := func(k key) {
			if of, ok := open[k]; ok {
				end(i, of)
				delete(open, k)
			}
		}
		switch e.Kind {
		case HostOp:
			open[key{kind: HostOp, op: e.Op}] = i
		case HostOpEnd:
			finish(key{kind: HostOp, op: e.Op})
		case InvalidateStart:
			open[bracket] = i
		case InvalidateEnd:
			finish(bracket)
		case Hold:
			holds = append(holds, i)
		case Release:
			// Holds are released in any order, but for the name and the operation.
			for h := len(holds) - 1; h >= 0; h-- {
				if o := &events[holds[h]]; o.Name == e.Name && o.Op == e.Op {
					end(i, holds[h])
					holds = append(holds[:h], holds[h+1:]...)
					break
				}
			}
		case Touch:
			if e.Name == Waits {
				open[wait] = i
			} else {
				finish(wait)
			}
		}
	}
	for _, of := range open {
		end(len(events)-1, of)
	}
	for _, of := range holds {
		end(len(events)-1, of)
	}
	return lasts
}
