package trace

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
)

// Chrome's trace-event format: one process, with a thread for each lane.

type chromeEvent struct {
	Name  string         `json:"name"`
	Cat   string         `json:"cat,omitempty"`
	Phase string         `json:"ph"`
	Time  *float64       `json:"ts,omitempty"`  // microseconds
	Lasts float64        `json:"dur,omitempty"` // microseconds, of phase X
	PID   int            `json:"pid"`
	TID   int            `json:"tid"`
	Scope string         `json:"s,omitempty"` // of phase i: t, the thread
	ID    uint64         `json:"id,omitempty"`
	Bind  string         `json:"bp,omitempty"` // of phase f: e, the enclosing slice
	Args  map[string]any `json:"args,omitempty"`
}

// Phases.
const (
	phaseComplete  = "X"
	phaseInstant   = "i"
	phaseMetadata  = "M"
	phaseFlowBegin = "s"
	phaseFlowEnd   = "f"
)

const chromePID = 1

// tracks returns the names of the lanes of a recording, those of all vCPUs included.
func (rec *Recording) tracks() []string {
	names := []string{"host operations", "notifier", "shadow", "KVM slots", "gate", "kernel"}
	for i := range rec.Header.VCPUs {
		names = append(names, fmt.Sprintf("vCPU %d", i))
	}
	return names
}

// track returns the index of the name of the lane of e.
func (e *Event) track() int {
	if e.Kind.Lane() == LaneVCPU {
		return int(LaneVCPU) + e.VCPU
	}
	return int(e.Kind.Lane())
}

func writeChrome(out io.Writer, rec *Recording) error {
	w := bufio.NewWriter(out)
	first := true
	var failed error
	emit := func(e chromeEvent) {
		separator := ",\n"
		if first {
			separator, first = "", false
		}
		e.PID = chromePID
		text, err := json.Marshal(e)
		if err != nil && failed == nil {
			failed = err
		}
		fmt.Fprintf(w, "%s%s", separator, text)
	}
	header, err := json.Marshal(rec.Header)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "{\"displayTimeUnit\":\"ns\",\"otherData\":%s,\"traceEvents\":[\n", header)
	emit(chromeEvent{Name: "process_name", Phase: phaseMetadata, Args: map[string]any{"name": "gvm " + rec.Header.Guest}})
	for i, name := range rec.tracks() {
		emit(chromeEvent{Name: "thread_name", Phase: phaseMetadata, TID: i + 1, Args: map[string]any{"name": name}})
		emit(chromeEvent{Name: "thread_sort_index", Phase: phaseMetadata, TID: i + 1, Args: map[string]any{"sort_index": i}})
	}
	rec = rec.byWhen()
	lasts := spans(rec.Events)
	ops := map[uint64]int{} // index of their begins
	arrows := uint64(0)
	for i := range rec.Events {
		e := &rec.Events[i]
		c := e.chrome()
		switch {
		case e.Kind == HostOpEnd || e.Kind == InvalidateEnd || e.Kind == Release || e.Kind == Touch && e.Name == Resumed:
			if e.Err == "" && e.Kind != Touch {
				continue // it is the end of another event
			}
		case lasts[i] > 0:
			c.Phase, c.Scope, c.Lasts = phaseComplete, "", float64(lasts[i])/1e3
		}
		emit(c)
		if e.Kind == HostOp {
			ops[e.Op] = i
		}
		if begin, ok := ops[e.Op]; ok && e.met() {
			// An arrow from the operation to what the guest met afterwards.
			arrows++
			from := rec.Events[begin].chrome()
			emit(chromeEvent{Name: "meets", Cat: "op", Phase: phaseFlowBegin, ID: arrows, TID: from.TID, Time: from.Time})
			emit(chromeEvent{Name: "meets", Cat: "op", Phase: phaseFlowEnd, Bind: "e", ID: arrows, TID: c.TID, Time: c.Time})
		}
	}
	fmt.Fprint(w, "\n]}\n")
	if failed != nil {
		return failed
	}
	return w.Flush()
}

// chrome returns e as an instant.
func (e *Event) chrome() chromeEvent {
	ts := float64(e.When()) / 1e3
	name := e.What()
	if e.Kind == InvalidateStart {
		name = e.Name
	}
	args := map[string]any{"seq": e.Seq, "kind": e.Kind.String()}
	for key, v := range map[string]any{"op": e.Op, "pages": e.Pages, "where": e.Where(), "error": e.Err} {
		if v != "" && v != uint64(0) {
			args[key] = v
		}
	}
	if e.At != 0 {
		args["recorded"] = float64(e.Time) / 1e3 // microseconds, as ts
	}
	return chromeEvent{Name: name, Cat: e.Kind.Lane().String(), Phase: phaseInstant, Scope: "t", Time: &ts, TID: e.track() + 1, Args: args}
}
