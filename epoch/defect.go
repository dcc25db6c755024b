package epoch

// Defects of a run, by name: the rules that a dirty tracker lives by, each left out. The
// build without the tag gvm_defects has none of them.
const (
	// HarvestAfterDeletion reads the log of a slot when the slot has been deleted.
	HarvestAfterDeletion = "harvest-after-deletion"

	// NoMarkOnDiscard records nothing of what changes of mappings do to content.
	NoMarkOnDiscard = "no-mark-on-discard"

	// NoMarkOnVMMWrites records nothing of stores by the machine itself.
	NoMarkOnVMMWrites = "no-mark-on-vmm-writes"

	// CopyBeforeClear copies the pages of a harvest from memory as it was before it.
	CopyBeforeClear = "copy-before-clear"

	// NotTransactional takes a harvest for saved when the snapshot has failed.
	NotTransactional = "not-transactional"
)

// Defects returns all of them.
func Defects() []string {
	return []string{HarvestAfterDeletion, NoMarkOnDiscard, NoMarkOnVMMWrites, CopyBeforeClear, NotTransactional}
}
