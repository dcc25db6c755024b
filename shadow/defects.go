//go:build gvm_defects

package shadow

// SetDefect switches on a defect that loses dirty pages, or coherence, to show that who
// looks for that finds it. It reports whether there is one of that name.
func (t *Tracker) SetDefect(name string) bool {
	defect, ok := map[string]mutant{
		"harvest-after-deletion": collectAfterwards,
		"no-mark-on-discard":     contentUnrecorded,
		"no-mark-on-vmm-writes":  storesUnlogged,
		"no-zap-of-alias":        firstSlotOnly,
		"stale-slot":             slotStays,
	}[name]
	if ok {
		t.slots.mutant = defect
	}
	return ok
}
