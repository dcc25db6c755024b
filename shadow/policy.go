package shadow

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/notifier"
)

// Policy is how the slots of a [Tracker] follow the host's mappings.
type Policy uint8

const (
	// Precise has slots show what is mapped, as it is mapped. A guest that uses
	// what is not there leaves with an exit that names the address. A change of the
	// mappings is a change of the slots, for which all vCPUs leave the guest.
	Precise Policy = iota

	// Lazy has slots show all of each window, readable and writable. They change
	// only when windows are added, or move. A guest that uses what is not there
	// leaves with EFAULT, which names no address.
	Lazy
)

func (p Policy) String() string {
	switch p {
	case Precise:
		return "precise"
	case Lazy:
		return "lazy"
	}
	return fmt.Sprintf("policy(%d)", uint8(p))
}

// reactions are one for each event.
type reactions [notifier.Map + 1]reaction

// reaction is what the tracker does about the slots in a bracket.
type reaction struct {
	// narrow takes from the slots, before the change, the access that the range
	// will not allow after it. So a guest that uses what is going away leaves
	// with an exit that names the address, not with a bare EFAULT. Slots that are
	// coarse stay.
	narrow bool

	// hold keeps all vCPUs out of the guest until the bracket closes. It is for
	// changes through which the guest is to see its memory unchanged: a vCPU
	// that ran in the middle would see neither the old nor the new place.
	hold bool

	// follow makes the windows that show the range show its new address, once
	// the change is made.
	follow bool

	// settle makes the slots, when the bracket closes, what they are to be then.
	settle bool
}

// policies is the reaction to each event, and the only place that decides it.
//
//	event    the mappings           slots that are precise
//	Unmap    go away                are cut, unless others take their place at once
//	Clear    stay                   stay
//	Protect  get other permissions  lose what is taken; get back what is given
//	Remap    move                   are made anew for the new address, out of the guest's sight
//	Map      come                   are put in
//
// Lazy ones change with Remap alone.
var policies = [...]reactions{
	Precise: {
		notifier.Unmap:   {narrow: true, settle: true},
		notifier.Clear:   {},
		notifier.Protect: {narrow: true, settle: true},
		notifier.Remap:   {hold: true, follow: true, settle: true},
		notifier.Map:     {settle: true},
	},
	Lazy: {
		notifier.Remap: {hold: true, follow: true, settle: true},
	},
}

// content is what the tracker records of a change, by what it does to the content of
// the pages, and the only place that decides it. KVM's log does not know of changes
// of the mapping, and the table's only of stores.
//
//	content  the frames that show the pages are
//	Changed  dirty
//	Kept     what they were, or dirty if they could not be read before and can be now
//	Zeroed   discarded
//	Gone     discarded: what is mapped there later is zero, or is announced by itself
var content = [...]func(log *dirty.Log, r addr.GFNRange){
	notifier.Changed: (*dirty.Log).MarkRange,
	notifier.Kept:    func(*dirty.Log, addr.GFNRange) {},
	notifier.Zeroed:  (*dirty.Log).Discard,
	notifier.Gone:    (*dirty.Log).Discard,
}

// recorder returns what records a change that has been made, or has failed half way.
func recorder(inv *notifier.Invalidation) func(log *dirty.Log, r addr.GFNRange) {
	if int(inv.Content) >= len(content) || inv.Failed && inv.Content != notifier.Kept {
		return (*dirty.Log).MarkRange
	}
	return content[inv.Content]
}

// narrowed returns the access that is left of access in r, while inv is open.
func narrowed(inv *notifier.Invalidation, access addr.Access) addr.Access {
	access &= inv.After
	if access&addr.Read == 0 {
		return addr.NoAccess // KVM has no slots that can be written but not read
	}
	return access
}
