package vm

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/secondmmu/gvm/mm"
)

// Watch is a set of means to learn of changes of the mappings that others make.
type Watch uint8

const (
	WatchEvents Watch = 1 << iota // an mm.EventWatch
	WatchTrace                    // an mm.TraceWatch
)

func (w Watch) String() string {
	var names []string
	if w&WatchEvents != 0 {
		names = append(names, "events")
	}
	if w&WatchTrace != 0 {
		names = append(names, "trace")
	}
	if rest := w &^ (WatchEvents | WatchTrace); rest != 0 {
		names = append(names, fmt.Sprintf("watch(%#x)", uint8(rest)))
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, "+")
}

// WatchError is what errors.As finds in the error of New for a watch that this machine, or
// this process, may not have.
type WatchError struct {
	Watch Watch // one of them
	Err   error // as mm.Memory.WatchEvents or WatchTrace returned it
}

func (e *WatchError) Error() string { return e.Err.Error() }
func (e *WatchError) Unwrap() error { return e.Err }

// watch begins to watch the machine's memory.
func (m *Machine) watch() error {
	if m.config.Watch&WatchEvents != 0 {
		w, err := m.memory.WatchEvents(mm.EventConfig{Report: m.config.OnStray})
		if err != nil {
			return &WatchError{WatchEvents, err}
		}
		m.watches = append(m.watches, w)
	}
	if m.config.Watch&WatchTrace != 0 {
		w, err := m.memory.WatchTrace(mm.TraceConfig{Report: m.config.OnStray})
		if err != nil {
			return &WatchError{WatchTrace, err}
		}
		// It is closed first: what the end of the other one does, KVM is told of.
		m.watches = slices.Insert(m.watches, 0, io.Closer(w))
	}
	return nil
}
