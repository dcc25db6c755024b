package vm

import "github.com/secondmmu/gvm/kvm"

// Check returns an error for every invariant of the machine's slots and translations that
// does not hold: see [shadow.Tracker.Check].
func (m *Machine) Check() error { return m.tracker.Check() }

// Coarse reports whether slots show all of RAM, mapped or not: see [shadow.Tracker.Coarse].
func (m *Machine) Coarse() bool { return m.tracker.Coarse() }

// Behind reports whether slots show less of RAM than is mapped: see [shadow.Tracker.Behind].
func (m *Machine) Behind() bool { return m.tracker.Behind() }

// Stats opens KVM's statistics of the VM, which the caller closes.
func (m *Machine) Stats() (*kvm.Stats, error) { return m.vm.Stats() }
