// Package trace is the record of what happened to which page when: the host
// operations on guest memory, the notifications they raised, the changes of the
// memory slots that followed, and what the guest ran into.
package trace

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// Kind says what an event is.
type Kind string

// The kinds of events. Their spelling is stable.
const (
	HostOp          Kind = "host-op"          // a mapping operation began; Name is the operation
	HostOpEnd       Kind = "host-op-end"      // it is done; Err is set if it failed
	InvalidateStart Kind = "invalidate-start" // the notifier chain ran; Name is the notifier event
	InvalidateEnd   Kind = "invalidate-end"
	SlotDelete      Kind = "slot-delete"
	SlotCreate      Kind = "slot-create"
	SlotPolicy      Kind = "slot-policy" // from now on slots are what Name says; Err is set if that failed
	Touch           Kind = "guest-touch" // the guest used an address that its slots do not allow; Name says how
)

// Event is one thing that happened. Fields that do not apply are zero.
type Event struct {
	Seq  uint64        `json:"seq"`  // position in the log, from 1, without gaps
	Time time.Duration `json:"time"` // since the log was made, monotonic
	Kind Kind          `json:"kind"`
	Op   uint64        `json:"op,omitempty"` // the host operation that this belongs to, from 1
	Name string        `json:"name,omitempty"`
	HVA  addr.HVARange `json:"hva"`
	GFN  addr.GFNRange `json:"gfn"`
	Slot uint32        `json:"slot"`
	VCPU int           `json:"vcpu"`
	Acc  addr.Access   `json:"access"`
	Err  string        `json:"error,omitempty"`
}

func (e Event) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-16s", e.Kind)
	if e.Name != "" {
		fmt.Fprintf(&b, " %s", e.Name)
	}
	switch e.Kind {
	case SlotDelete, SlotCreate:
		fmt.Fprintf(&b, " slot %d %v %v", e.Slot, e.GFN, e.Acc)
	case SlotPolicy: // it is of no place
	case Touch:
		fmt.Fprintf(&b, " vcpu %d %v", e.VCPU, e.GFN)
	default:
		fmt.Fprintf(&b, " %v", e.HVA)
	}
	if e.Err != "" {
		fmt.Fprintf(&b, ": %s", e.Err)
	}
	return b.String()
}

// Log keeps the newest events. Its methods may be called from any goroutine;
// they take one short lock and call nothing inside it. A nil *Log keeps none.
type Log struct {
	start time.Time // immutable

	mu   sync.Mutex // protects what follows; a leaf of the lock order
	ring []Event    // event seq is at (seq-1) % len
	next uint64     // events recorded so far
	ops  uint64     // operations begun so far
}

// NewLog returns a log that keeps the newest n events; n is at least 1.
func NewLog(n int) *Log {
	return &Log{start: time.Now(), ring: make([]Event, max(n, 1))}
}

// NewOp returns a number that ties the events of one host operation together.
func (l *Log) NewOp() uint64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ops++
	return l.ops
}

// Record adds e with the next sequence number and the time of now.
func (l *Log) Record(e Event) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next++
	e.Seq, e.Time = l.next, time.Since(l.start) // under the lock: times grow as the numbers do
	l.ring[(l.next-1)%uint64(len(l.ring))] = e
}

// Len returns the number of events recorded so far, kept or not: the sequence
// number of the newest.
func (l *Log) Len() uint64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next
}

// Since returns the events after sequence number seq, oldest first, and how many
// of them are missing because newer ones took their place.
func (l *Log) Since(seq uint64) (events []Event, lost uint64) {
	if l == nil {
		return nil, 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	first := seq + 1
	if n := uint64(len(l.ring)); l.next >= n && first < l.next-n+1 {
		lost = l.next - n + 1 - first
		first += lost
	}
	for s := first; s <= l.next; s++ {
		events = append(events, l.ring[(s-1)%uint64(len(l.ring))])
	}
	return events, lost
}
