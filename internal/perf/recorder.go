package perf

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Tracepoint is one that is recorded.
type Tracepoint struct {
	ID     uint64 // tracefs knows it by name
	Filter string // an expression over its fields, which the kernel evaluates: only passes that match are recorded; "": all
}

// Recorder records the passes of tracepoints by all threads of the machine, in a ring
// of each CPU.
//
// Read is called by one goroutine at a time. Others may be in Wait, or call Close.
type Recorder struct {
	rings []*ring
	wake  int // an eventfd that ends Wait

	closed atomic.Bool
	mu     sync.RWMutex // read-held by Wait and Read: Close waits for their end
}

// ring is that of one CPU.
type ring struct {
	fds    []int  // of each tracepoint; all write to the ring of the first
	memory []byte // a control page, and the records
	data   []byte // the records: a power of two
	wrap   []byte // of a record that the end of data cuts
	lost   uint64 // how many were told of
	inLost uint64 // how many the records of the ring itself tell of
}

// sampleType is what a record has; Decode goes by it.
const sampleType = unix.PERF_SAMPLE_TID | unix.PERF_SAMPLE_TIME | unix.PERF_SAMPLE_RAW

// formatLost has the kernel count losses where they can be read, since Linux 6.0.
// The ring tells of them only with the next record.
const formatLost = 1 << 4

// RecorderConfig says what a [Recorder] records.
type RecorderConfig struct {
	Tracepoints []Tracepoint

	// Pages is the size of the ring of a CPU, a power of two. Records that find no room
	// are lost, and counted.
	Pages int

	// Wakeup is how many records of one CPU end a Wait; 0: each one does.
	Wakeup int
}

// NewRecorder begins to record.
//
// The error is EINVAL for a filter that the kernel does not understand, and a permission is
// needed as for AllCPUs. CPUs that are brought online later are not recorded.
func NewRecorder(c RecorderConfig) (_ *Recorder, err error) {
	cpus, err := onlineCPUs()
	if err != nil {
		return nil, err
	}
	r := &Recorder{wake: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	for _, cpu := range cpus {
		g := &ring{}
		r.rings = append(r.rings, g)
		for _, tp := range c.Tracepoints {
			if err := g.add(tp, cpu, c); err != nil {
				return nil, fmt.Errorf("record tracepoint %d on cpu %d: %w", tp.ID, cpu, err)
			}
		}
	}
	for _, g := range r.rings {
		for _, fd := range g.fds {
			if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_ENABLE, 0); err != nil {
				return nil, fmt.Errorf("PERF_EVENT_IOC_ENABLE: %w", err)
			}
		}
	}
	return r, nil
}

// add has a tracepoint recorded in the ring, which is made for the first.
func (g *ring) add(tp Tracepoint, cpu int, c RecorderConfig) error {
	attr := unix.PerfEventAttr{
		Type: unix.PERF_TYPE_TRACEPOINT, Size: attrSize, Config: tp.ID,
		Sample: 1, Sample_type: sampleType, Wakeup: uint32(max(c.Wakeup, 1)), // each pass is recorded
		Bits: unix.PerfBitDisabled | unix.PerfBitUseClockID, Clockid: unix.CLOCK_MONOTONIC,
		Read_format: formatLost,
	}
	fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if errors.Is(err, unix.EINVAL) {
		attr.Read_format = 0
		fd, err = unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	}
	if err != nil {
		return fmt.Errorf("perf_event_open: %w", err)
	}
	g.fds = append(g.fds, fd)
	if tp.Filter != "" {
		if err := setFilter(fd, tp.Filter); err != nil {
			return fmt.Errorf("PERF_EVENT_IOC_SET_FILTER %q: %w", tp.Filter, err)
		}
	}
	if len(g.fds) > 1 {
		if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_SET_OUTPUT, g.fds[0]); err != nil {
			return fmt.Errorf("PERF_EVENT_IOC_SET_OUTPUT: %w", err)
		}
		return nil
	}
	g.memory, err = unix.Mmap(fd, 0, (1+c.Pages)*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap of %d pages: %w", 1+c.Pages, err)
	}
	g.data = g.memory[os.Getpagesize():]
	return nil
}

// Wait blocks until there is a record that may be new, or r was interrupted, or limit has
// gone by, unless that is negative. The error is os.ErrClosed once r is closed.
func (r *Recorder) Wait(limit time.Duration) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	fds := []unix.PollFd{{Fd: int32(r.wake), Events: unix.POLLIN}}
	for _, g := range r.rings {
		fds = append(fds, unix.PollFd{Fd: int32(g.fds[0]), Events: unix.POLLIN})
	}
	timeout := -1
	if limit >= 0 {
		timeout = int(min((limit+time.Millisecond-1)/time.Millisecond, 1<<30))
	}
	for !r.closed.Load() {
		switch _, err := unix.Poll(fds, timeout); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("poll perf events: %w", err)
		case !r.closed.Load():
			return nil
		}
	}
	return os.ErrClosed
}

// Interrupt has Wait return, now and from now on. It may be called by any goroutine, before
// Close.
func (r *Recorder) Interrupt() error {
	if _, err := unix.Write(r.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		return fmt.Errorf("write an eventfd: %w", err)
	}
	return nil
}

// Read calls fn for each record, those of one CPU after those of another, and gives the
// room back. It does not block. The error is os.ErrClosed, or that of Decode, after which
// the rest of that ring was dropped.
func (r *Recorder) Read(fn func(Record)) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.closed.Load() {
		return os.ErrClosed
	}
	var errs []error
	for _, g := range r.rings {
		errs = append(errs, g.read(fn))
	}
	return errors.Join(errs...)
}

// read calls fn for the records of the ring.
//
//	kernel                              read
//	writes a record
//	data_head += its size (release)
//	                                    head := data_head (acquire)
//	                                    reads what is before head
//	                                    data_tail = head (release)
//	data_tail (acquire)
//	writes over what was before it
func (g *ring) read(fn func(Record)) error {
	tail, head := g.position()
	if tail == head {
		return nil // nor is any lost: the ring has not been full
	}
	err := g.records(tail, head, fn)
	g.release(head)
	if lost, ok := g.countLost(); ok {
		g.tellLost(lost, fn)
	}
	return err
}

// records calls fn for the records between two positions.
func (g *ring) records(tail, head uint64, fn func(Record)) error {
	size := uint64(len(g.data))
	if head-tail > size {
		return fmt.Errorf("perf ring: %d bytes in %d", head-tail, size)
	}
	// Headers do not wrap: records are multiples of 8 bytes.
	for tail != head {
		at := tail % size
		b := g.data[at:min(at+head-tail, size)]
		if n := recordLen(b); uint64(n) > uint64(len(b)) && uint64(n) <= head-tail {
			g.wrap = append(append(g.wrap[:0], b...), g.data[:n-len(b)]...)
			b = g.wrap
		}
		rec, n, err := Decode(b)
		if err != nil {
			return err
		}
		tail += uint64(n)
		switch {
		case rec.Lost > 0:
			g.inLost += rec.Lost
			g.tellLost(g.inLost, fn)
		case rec.Raw != nil:
			fn(rec)
		}
	}
	return nil
}

// tellLost calls fn for what is not told of yet of a number that are lost altogether.
func (g *ring) tellLost(lost uint64, fn func(Record)) {
	if lost > g.lost {
		fn(Record{Lost: lost - g.lost})
		g.lost = lost
	}
}

// Close ends the recording. A Wait returns.
func (r *Recorder) Close() error {
	if r.closed.Swap(true) {
		return os.ErrClosed
	}
	var errs []error
	if r.wake >= 0 {
		errs = append(errs, r.Interrupt())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.rings {
		if g.memory != nil {
			errs = append(errs, unix.Munmap(g.memory))
		}
		for _, fd := range g.fds {
			errs = append(errs, unix.Close(fd))
		}
	}
	if r.wake >= 0 {
		errs = append(errs, unix.Close(r.wake))
	}
	r.rings = nil
	return errors.Join(errs...)
}
