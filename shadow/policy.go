package shadow

import (
	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// reaction is what the tracker does about the slots in a bracket.
type reaction struct {
	// narrow takes from the slots, before the change, the access that the range
	// will not allow after it. So a guest that uses what is going away leaves
	// with an exit that names the address, not with a bare EFAULT.
	narrow bool

	// hold keeps all vCPUs out of the guest until the bracket closes. It is for
	// changes through which the guest is to see its memory unchanged: a vCPU
	// that ran in the middle would see neither the old nor the new place.
	hold bool

	// follow makes the windows that show the range show its new address, once
	// the change is made.
	follow bool

	// settle makes the slots, when the bracket closes, what the mappings allow
	// then.
	settle bool
}

// policy is the reaction to each event, and the only place that decides it.
//
//	event    the mappings           the slots
//	Unmap    go away                are cut, unless others take their place at once
//	Clear    stay                   stay
//	Protect  get other permissions  lose what is taken; get back what is given
//	Remap    move                   are made anew for the new address, out of the guest's sight
//	Map      come                   are put in
var policy = map[notifier.Event]reaction{
	notifier.Unmap:   {narrow: true, settle: true},
	notifier.Clear:   {},
	notifier.Protect: {narrow: true, settle: true},
	notifier.Remap:   {hold: true, follow: true, settle: true},
	notifier.Map:     {settle: true},
}

// narrowed returns the access that is left of access in r, while inv is open.
func narrowed(inv *notifier.Invalidation, access addr.Access) addr.Access {
	access &= inv.After
	if access&addr.Read == 0 {
		return addr.NoAccess // KVM has no slots that can be written but not read
	}
	return access
}
