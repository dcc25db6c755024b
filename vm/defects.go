//go:build gvm_defects

package vm

// SetDefect switches on a defect of the machine's tracker or memory: see
// shadow.Tracker.SetDefect and mm.Memory.SetDefect.
func (m *Machine) SetDefect(name string) bool {
	return m.tracker.SetDefect(name) || m.memory.SetDefect(name)
}
