package trace

import (
	"fmt"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// Kind says what an event is.
type Kind uint8

// The kinds of events. Their names, which String returns, are stable.
const (
	HostOp          Kind = iota + 1 // a mapping operation began; Name is the operation
	HostOpEnd                       // it is done; Err is set if it failed
	InvalidateStart                 // the notifier chain runs; Name is the notifier event
	InvalidateEnd                   // the change is made, and the chain runs again
	Zap                             // the translations of GFN, which shows HVA, are gone; Pages is how many pages they translated
	SlotDelete                      // KVM has deleted a slot; Err is set if it refused
	SlotCreate                      // KVM has created a slot, or changed it to this; Err is set if it refused
	SlotPolicy                      // from now on slots are what Name says; Err is set if that failed
	Hold                            // no vCPU is in the guest, nor enters it until Release; Name says for what. Holds nest
	Release                         // the end of one Hold
	Harvest                         // the dirty log was harvested; Pages is how many pages were dirty
	Exit                            // a vCPU has left the guest; Name is the reason
	Complete                        // the guest used an address that its slots did not allow at first, and the access was completed
	Touch                           // the guest used an address that its slots do not allow; Name says what becomes of it
	Kernel                          // the kernel told of an event of its own; Name is which. Of KernelLost, Pages is how many are missing
	Lost                            // Pages events before this one were recorded and are lost; only in recordings

	numKinds
)

// The names of Touch events.
const (
	Waits   = "waits"   // the vCPU stays out of the guest until the access is possible
	Resumed = "resumed" // it was, and is done: the end of Waits
	Floated = "floated" // the access met an empty bus
	Stopped = "stopped" // the access ends the run
)

// KernelLost is the name of a Kernel event of which the kernel could tell only that there
// were Pages of them, and not what.
const KernelLost = "lost"

// Lane is who an event is about.
type Lane uint8

// The lanes. There is one of LaneVCPU for each vCPU.
const (
	LaneHost Lane = iota // operations of the host
	LaneNotifier
	LaneShadow // translations and dirty log
	LaneSlots  // KVM's memory slots
	LaneGate   // what keeps vCPUs out of the guest
	LaneKernel
	LaneVCPU
)

var laneNames = [...]string{"host", "notifier", "shadow", "slots", "gate", "kernel", "vcpu"}

func (l Lane) String() string {
	if int(l) < len(laneNames) {
		return laneNames[l]
	}
	return fmt.Sprintf("lane(%d)", uint8(l))
}

// field is a set of those fields of an event that only some kinds have. Others leave
// them zero.
type field uint16

const (
	hasName field = 1 << iota
	hasHVA
	hasGFN
	hasSlot
	hasVCPU
	hasAccess
	hasPages
	hasErr
	hasAt
)

// kinds says of each kind what it is called, in which lane it is, how deep inside of
// its operation, and which fields it has.
var kinds = [numKinds]struct {
	name   string
	lane   Lane
	depth  int
	fields field
}{
	HostOp:          {"host-op", LaneHost, 0, hasName | hasHVA},
	HostOpEnd:       {"host-op-end", LaneHost, 0, hasName | hasHVA | hasErr},
	InvalidateStart: {"invalidate-start", LaneNotifier, 1, hasName | hasHVA},
	InvalidateEnd:   {"invalidate-end", LaneNotifier, 1, hasName | hasHVA},
	Zap:             {"zap", LaneShadow, 2, hasHVA | hasGFN | hasPages},
	SlotDelete:      {"slot-delete", LaneSlots, 2, hasHVA | hasGFN | hasSlot | hasAccess | hasErr},
	SlotCreate:      {"slot-create", LaneSlots, 2, hasHVA | hasGFN | hasSlot | hasAccess | hasErr},
	SlotPolicy:      {"slot-policy", LaneSlots, 2, hasName | hasErr},
	Hold:            {"hold", LaneGate, 2, hasName},
	Release:         {"release", LaneGate, 2, hasName},
	Harvest:         {"harvest", LaneShadow, 0, hasPages},
	Exit:            {"guest-exit", LaneVCPU, 1, hasName | hasGFN | hasVCPU | hasAccess},
	Complete:        {"guest-complete", LaneVCPU, 1, hasGFN | hasVCPU | hasAccess},
	Touch:           {"guest-touch", LaneVCPU, 1, hasName | hasGFN | hasVCPU | hasAccess},
	Kernel:          {"kernel", LaneKernel, 2, hasName | hasHVA | hasGFN | hasPages | hasAt},
	Lost:            {"lost", LaneHost, 0, hasPages},
}

// valid reports whether there is such a kind.
func (k Kind) valid() bool { return k > 0 && k < numKinds }

func (k Kind) String() string {
	if k.valid() {
		return kinds[k].name
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Lane returns who events of the kind are about.
func (k Kind) Lane() Lane {
	if k.valid() {
		return kinds[k].lane
	}
	return LaneHost
}

// has reports whether events of the kind have a field.
func (k Kind) has(f field) bool { return k.valid() && kinds[k].fields&f != 0 }

// Event is one thing that happened. Fields that do not apply are zero.
type Event struct {
	Seq   uint64        // position in the record, from 1; events that were lost had the numbers that are missing
	Time  time.Duration // when it was recorded, since the log was made, monotonic
	At    time.Duration // when it happened, if that was before it was recorded; else 0
	Op    uint64        // the host operation that this belongs to, from 1
	HVA   addr.HVARange
	GFN   addr.GFNRange
	Pages uint64 // a number of pages, or of events that are lost
	Name  string
	Err   string
	VCPU  int
	Slot  uint32
	Kind  Kind
	Acc   addr.Access
}

// When returns when e happened.
func (e *Event) When() time.Duration {
	if e.At != 0 {
		return e.At
	}
	return e.Time
}

// met reports whether e is what a guest met at its frames: an exit, or a fault that the
// kernel saw to.
func (e *Event) met() bool {
	return e.Kind.Lane() == LaneVCPU || e.Kind == Kernel && !e.GFN.Empty()
}

// depth returns how far inside of its operation e is shown.
func (e *Event) depth() int {
	if e.Op == 0 {
		return 0
	}
	return kinds[e.Kind].depth
}
