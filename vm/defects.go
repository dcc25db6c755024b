//go:build gvm_defects

package vm

// SetDefect switches on a defect of the machine's tracker: see shadow.Tracker.SetDefect.
func (m *Machine) SetDefect(name string) bool { return m.tracker.SetDefect(name) }
