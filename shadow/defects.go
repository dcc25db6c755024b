//go:build gvm_defects

package shadow

// SetDefect switches one of the defects on that lose dirty pages, to show that who looks
// for lost pages finds some. It reports whether there is one of that name.
func (t *Tracker) SetDefect(name string) bool {
	defect, ok := map[string]mutant{
		"harvest-after-deletion": collectAfterwards,
		"no-mark-on-discard":     contentUnrecorded,
		"no-mark-on-vmm-writes":  storesUnlogged,
	}[name]
	if ok {
		t.slots.mutant = defect
	}
	return ok
}
