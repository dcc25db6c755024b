//go:build gvm_defects

package mm

// SetDefect switches on a defect of how changes by others are followed, to show that who
// looks for what that breaks finds it. It reports whether there is one of that name; where
// there is no watch, it does nothing.
func (m *Memory) SetDefect(name string) bool {
	defect, ok := map[string]eventMutant{
		"event-dropped": eventDropped,
		"event-twice":   eventTwice,
	}[name]
	m.as.Lock()
	defer m.as.Unlock()
	if w := m.events; ok && w != nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.mutant = defect
	}
	return ok
}
