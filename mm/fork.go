package mm

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// Child is a process that has the memory as it was when Fork made it. Its methods may be
// called from any goroutine.
type Child struct {
	pid     int
	extents extents  // as they were; immutable
	mem     *os.File // /proc/PID/mem
	pidfd   int
	alive   int // a socket: the child ends when it is closed
	closed  atomic.Bool
}

// Fork makes a process that does nothing but hold a copy of the memory, as fork(2) does:
// of private memory the image of this moment, which stays what it is while the guest goes
// on. A page is copied when it is next stored to on this side, so an image costs as much
// memory as changes while it is held; of shared memory, the child shows what is there. The
// image has all regions, pinned ones too.
//
// What a vCPU or a thread stores while Fork runs is in the image or not, store by store.
// For an image of one instant they stand still until Fork returns.
//
// The child has the regions of the memory and nothing else of the process: it holds no
// descriptor and no other mapping, takes no signal, and runs none of the program's code. It
// ends with Close, or when this process does, however that ends.
//
// Fork takes time by the number of pages that are present, during which the garbage
// collector cannot begin a cycle. If a userfaultfd that reports forks is registered with
// the memory, Fork waits until another process has read that: none of this process's
// goroutines may be the one, and with an EventWatch that has forks reported the error is
// EBUSY. It needs /proc and the right to trace the child, without which
// the error is EACCES or EPERM, and three descriptors while there is a child. On other
// architectures than amd64 the error is ENOTSUP.
//
// With an error that has Made set, subscribers have failed, and there is a child all the
// same, to be closed. The operation is one on all regions: Range is the span of them.
func (m *Memory) Fork() (*Child, error) {
	own, err := ownMappings()
	if err != nil {
		return nil, &Error{Op: OpFork, Err: err}
	}
	m.as.Lock()
	defer m.as.Unlock()
	var all addr.HVARange
	for i, r := range m.regions {
		if i == 0 {
			all = r.Range
		}
		all = addr.HVARange{Start: min(all.Start, r.Range.Start), End: max(all.End, r.Range.End)}
		own.keep = append(own.keep, r.Range)
	}
	switch {
	case m.closed:
		return nil, &Error{Op: OpFork, Err: os.ErrClosed}
	case all.Empty():
		return nil, &Error{Op: OpFork, Err: fmt.Errorf("there is no region to copy: %w", unix.EINVAL)}
	case m.events != nil && m.events.config.Forks:
		return nil, &Error{Op: OpFork, Range: all, Err: fmt.Errorf("a watch has forks reported: %w", unix.EBUSY)}
	}

	var c *Child
	m.brackets = m.copied(m.brackets[:0])
	req := request{op: OpFork, r: all}
	err = m.carryOut(req, func() (err error) {
		if c, err = fork(own); err != nil {
			return err
		}
		c.extents = slices.Clone(m.extents)
		m.changed(req)
		return nil
	})
	return c, err
}

// copied appends to invs the brackets in which the private memory of all regions becomes
// copy-on-write.
func (m *Memory) copied(invs []notifier.Invalidation) []notifier.Invalidation {
	for _, x := range m.extents {
		switch n := len(invs); {
		case !x.Mapped || x.object != nil && !x.private:
		case n > 0 && invs[n-1].Range.End == x.Range.Start && invs[n-1].After == x.Access:
			invs[n-1].Range.End = x.Range.End
		default:
			invs = append(invs, notifier.Invalidation{Range: x.Range, Event: notifier.ProtectPage, After: x.Access, Content: notifier.Kept})
		}
	}
	return invs
}

// mappings is what a process has mapped, as far as a child has to know.
type mappings struct {
	keep []addr.HVARange // what it leaves mapped
	end  addr.HVA        // of all of it
}

// ownMappings returns the mappings of this process: the end of them, and those that the
// kernel made, which may be sealed.
func ownMappings() (own mappings, err error) {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return own, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		var r addr.HVARange
		if _, err := fmt.Sscanf(s.Text(), "%x-%x", &r.Start, &r.End); err != nil {
			return own, fmt.Errorf("%s: %q: %w", f.Name(), s.Text(), err)
		}
		_, name, _ := strings.Cut(s.Text(), "[")
		switch {
		case name == "vsyscall]": // not in the part of the address space that is the process's
			continue
		case strings.HasPrefix(name, "v"), name == "uprobes]":
			own.keep = append(own.keep, r)
		}
		own.end = max(own.end, r.End)
	}
	return own, s.Err()
}

// gaps returns what of the address space is not to be kept.
func (m mappings) gaps() (gaps []addr.HVARange) {
	slices.SortFunc(m.keep, func(a, b addr.HVARange) int { return cmp.Compare(a.Start, b.Start) })
	at := addr.HVA(0)
	for _, r := range m.keep {
		if at < r.Start {
			gaps = append(gaps, addr.HVARange{Start: at, End: r.Start})
		}
		at = max(at, r.End)
	}
	if at < m.end {
		gaps = append(gaps, addr.HVARange{Start: at, End: m.end})
	}
	return gaps
}

// fork makes the child, and returns when it has nothing but what it is to keep.
func fork(own mappings) (*Child, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	c := &Child{pidfd: -1, alive: pair[0]}
	c.pid, c.pidfd, err = forkAlone(own, pair[1])
	unix.Close(pair[1]) // the child's: if it ends, ours says so
	if err == nil {
		err = c.isAlone()
	}
	if err == nil {
		c.mem, err = os.Open(fmt.Sprintf("/proc/%d/mem", c.pid))
	}
	if err != nil {
		return nil, errors.Join(err, c.end())
	}
	return c, nil
}

// isAlone waits until the child has said that it is as it has to be, or why it is not.
func (c *Child) isAlone() error {
	fds := []unix.PollFd{{Fd: int32(c.alive), Events: unix.POLLIN}, {Fd: int32(c.pidfd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err == nil {
			break
		} else if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll: %w", err)
		}
	}
	var report [forkReportLen]byte
	n, _, err := unix.Recvfrom(c.alive, report[:], unix.MSG_DONTWAIT)
	if err != nil || n != len(report) {
		return fmt.Errorf("the child %d ended at once: %w", c.pid, unix.ECHILD)
	}
	return forkReported(report)
}

// end ends the child, if there is one, and waits for its end.
func (c *Child) end() error {
	errs := []error{unix.Close(c.alive)}
	if c.pidfd >= 0 {
		errs = append(errs, unix.PidfdSendSignal(c.pidfd, unix.SIGKILL, nil, 0), reap(unix.P_PIDFD, c.pidfd), unix.Close(c.pidfd))
	}
	return errors.Join(errs...)
}

// reap waits for the end of a process, which nothing tells of by itself.
func reap(kind, id int) error {
	for {
		switch err := unix.Waitid(kind, id, nil, unix.WEXITED|unix.WALL, nil); {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EINTR):
			return fmt.Errorf("waitid: %w", err)
		}
	}
}

// PID returns the number of the process, which is the child's until Close.
func (c *Child) PID() int { return c.pid }

// ReadAt copies len(p) bytes of the child's memory from hva to p, as Memory.ReadAt does of
// this process's: what could not be read at the fork cannot be, and is an *AccessError. So
// is what has been taken from the file of a shared region since. p may have been written
// in part. It takes no lock.
func (c *Child) ReadAt(p []byte, hva addr.HVA) error {
	r := addr.HVAs(hva, uint64(len(p)))
	if r.Empty() {
		return nil
	}
	if err := c.extents.allow(addr.Read, r); err != nil {
		return err
	}
	switch n, err := c.mem.ReadAt(p, int64(hva)); {
	case n == len(p):
		return nil
	case errors.Is(err, os.ErrClosed):
		return &AccessError{Access: addr.Read, Range: r, Why: fmt.Sprintf("the child %d", c.pid), Err: os.ErrClosed}
	case n == 0 && errors.Is(err, io.EOF):
		return &AccessError{Access: addr.Read, Range: r, Why: fmt.Sprintf("somebody has ended the child %d", c.pid), Err: unix.ESRCH}
	default:
		return &AccessError{Access: addr.Read, Range: r, Why: fmt.Sprintf("%v, which was mapped: %v", hva+addr.HVA(n), err), Err: unix.EFAULT}
	}
}

// Close ends the process and returns when it has gone, with its memory and its number. It
// is called once; a second Close returns os.ErrClosed.
func (c *Child) Close() error {
	if c.closed.Swap(true) {
		return fmt.Errorf("close the child %d: %w", c.pid, os.ErrClosed)
	}
	if err := errors.Join(c.mem.Close(), c.end()); err != nil {
		return fmt.Errorf("close the child %d: %w", c.pid, err)
	}
	return nil
}
