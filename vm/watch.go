package vm

import (
	"fmt"
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

// watch begins to watch the machine's memory.
func (m *Machine) watch() error {
	if m.config.Watch&WatchEvents != 0 {
		w, err := m.memory.WatchEvents(mm.EventConfig{Report: m.config.OnStray})
		if err != nil {
			return err
		}
		m.watches = append(m.watches, w)
	}
	if m.config.Watch&WatchTrace != 0 {
		w, err := m.memory.WatchTrace(mm.TraceConfig{Report: m.config.OnStray})
		if err != nil {
			return err
		}
		m.watches = append(m.watches, w)
	}
	return nil
}
