package hostops

import "sync"

// maxEvents is how many events wait for the runner at most.
const maxEvents = 1024

// event is something that a vCPU has told of.
type event struct {
	trigger Trigger // OnMark or OnFault
	mark    uint32
	page    uint64
}

// events is those that the runner has not seen yet, in their order. Whoever adds one does
// not wait.
type events struct {
	mu      sync.Mutex // protects what follows; a leaf
	waiting []event
	faults  map[event]bool // those among waiting that are faults
	dropped uint64         // for lack of room

	// arrived has a token if something may have been added since it was taken.
	arrived chan struct{}
}

func (q *events) init() {
	q.faults = map[event]bool{}
	q.arrived = make(chan struct{}, 1)
}

// add puts e behind the others. A fault that is among them already is the same: the vCPU
// tries again until the page is there.
func (q *events) add(e event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case e.trigger == OnFault && q.faults[e]:
		return
	case len(q.waiting) == maxEvents:
		q.dropped++
		return
	case e.trigger == OnFault:
		q.faults[e] = true
	}
	q.waiting = append(q.waiting, e)
	select {
	case q.arrived <- struct{}{}:
	default: // there is one
	}
}

// take returns all events that wait.
func (q *events) take() []event {
	q.mu.Lock()
	defer q.mu.Unlock()
	es := q.waiting
	q.waiting = nil
	clear(q.faults)
	return es
}

func (q *events) lost() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dropped
}
