package srcu

import (
	"sync"
	"sync/atomic"
)

// Head is what a callback hangs on: it is part of the object that the callback
// frees, so that Call does not allocate. The zero Head is ready for use.
type Head struct {
	next   *Head
	fn     func(*Head)
	queued atomic.Bool
}

// callbacks is the callbacks of a domain. They are run in the order in which
// they were queued, one at a time, by a goroutine that is there only as long as
// there is something to do.
type callbacks struct {
	mu      sync.Mutex // protects what follows; a leaf
	head    *Head
	tail    *Head
	queued  uint64    // so far
	needed  uint64    // grace periods that StartPoll has asked for
	working bool      // the goroutine is there
	ran     uint64    // callbacks that have returned, up to the last batch
	batch   sync.Cond // signalled at the end of each batch; its L is set when it is first waited for
}

// Call has fn called with h after a grace period that begins after the call. It
// does not block, and may be called in a read section and by a callback.
//
// Callbacks of a domain run one after the other, in the order of their calls:
// fn is short, does not block, and calls none of Synchronize, Barrier and Cleanup
// of the domain. New sections may be open while it runs. From when fn begins, h
// may be queued again; before that Call panics. If fn panics, that ends the
// process.
func (d *Domain) Call(h *Head, fn func(*Head)) {
	d.alive("Call")
	if !h.queued.CompareAndSwap(false, true) && d.mutant != requeue {
		panic("srcu: Call with a Head that is queued already")
	}
	c := &d.callbacks
	c.mu.Lock()
	defer c.mu.Unlock()
	c.appendLocked(d, h, fn)
}

func (c *callbacks) appendLocked(d *Domain, h *Head, fn func(*Head)) {
	h.fn, h.next = fn, nil
	if c.tail == nil {
		c.head = h
	} else {
		c.tail.next = h
	}
	c.tail = h
	c.queued++
	c.startLocked(d)
}

func (c *callbacks) startLocked(d *Domain) {
	if !c.working {
		c.working = true
		go c.work(d)
	}
}

// need asks for n grace periods to have ended.
func (c *callbacks) need(d *Domain, n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if int64((n-c.needed)<<seqShift) > 0 { // as in ended
		c.needed = n
	}
	c.startLocked(d)
}

// work runs grace periods and callbacks until there is nothing left to do. A panic
// in either ends the process: this goroutine has no caller that could recover.
func (c *callbacks) work(d *Domain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.head != nil || !d.ended(c.needed) {
		batch, needed := c.head, c.needed
		c.head, c.tail = nil, nil
		c.mu.Unlock()
		ran := d.runBatch(batch, needed)
		c.mu.Lock()
		c.ran += ran
		c.batch.Broadcast()
	}
	c.needed = d.seq.Load() >> seqShift // so that it never is half the range behind
	c.working = false
}

// runBatch calls the callbacks of a batch after a grace period, or, if there are
// none, only sees to the grace periods that are needed.
func (d *Domain) runBatch(batch *Head, needed uint64) (ran uint64) {
	if batch == nil {
		d.runUntil(needed)
		return 0
	}
	// All of the batch was queued before this snapshot is taken.
	n := d.snapshot()
	if d.mutant == callbacksEarly {
		n--
	}
	d.runUntil(n)
	for h := batch; h != nil; ran++ {
		next, fn := h.next, h.fn
		h.next, h.fn = nil, nil
		h.queued.Store(false)
		fn(h)
		h = next
	}
	return ran
}

// Barrier returns when every callback whose Call returned before has returned.
// It says nothing of readers: without callbacks it returns at once.
func (d *Domain) Barrier() {
	d.alive("Barrier")
	if debug {
		d.notInside("Barrier")
	}
	if d.mutant == barrierSynchronizes {
		d.Synchronize()
		return
	}
	c := &d.callbacks
	c.mu.Lock()
	defer c.mu.Unlock()
	if d.mutant == barrierSkipsRunning && c.head == nil {
		return
	}
	c.batch.L = &c.mu
	// Callbacks run in the order of their calls: when as many have returned as
	// were queued by now, they are those.
	for queued := c.queued; int64(c.ran-queued) < 0; {
		c.batch.Wait()
	}
}

// state returns the number of callbacks that were queued and of those that have
// returned, and whether nothing is asked for that has not been done.
func (c *callbacks) state(d *Domain) (queued, ran uint64, idle bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.queued, c.ran, c.queued == c.ran && d.ended(c.needed)
}
