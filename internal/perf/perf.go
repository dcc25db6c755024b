// Package perf counts how often tracepoints of the kernel are passed, and records it.
package perf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Scope says whose passes count.
type Scope int

const (
	// ThisThread is the thread that calls [Open], and to which a goroutine that
	// wants its own passes counted is locked.
	ThisThread Scope = iota

	// AllCPUs is every thread of the machine. The permission to count these
	// (CAP_PERFMON, or kernel.perf_event_paranoid at -1) is also that to record
	// a tracepoint's fields.
	AllCPUs
)

func (s Scope) String() string {
	switch s {
	case ThisThread:
		return "this thread"
	case AllCPUs:
		return "all CPUs"
	}
	return "scope " + strconv.Itoa(int(s))
}

// Counter counts the passes of one tracepoint. It is safe for concurrent use.
type Counter struct {
	files []*os.File // one; with AllCPUs, one for each CPU
}

// Open begins to count the tracepoint id, which tracefs knows by name.
//
// Open wraps perf_event_open(2).
func Open(id uint64, scope Scope) (*Counter, error) {
	attr := unix.PerfEventAttr{
		Type:   unix.PERF_TYPE_TRACEPOINT,
		Size:   attrSize,
		Config: id,
	}
	pid, cpus := 0, []int{-1}
	if scope == AllCPUs {
		var err error
		if cpus, err = onlineCPUs(); err != nil {
			return nil, err
		}
		pid = -1
		// Asked for only to be permitted: with no period and no ring there are
		// no records.
		attr.Sample_type = unix.PERF_SAMPLE_RAW
	}
	c := &Counter{}
	for _, cpu := range cpus {
		if err := c.add(&attr, pid, cpu); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

func (c *Counter) add(attr *unix.PerfEventAttr, pid, cpu int) error {
	raw, err := unix.PerfEventOpen(attr, pid, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("perf_event_open of tracepoint %d for pid %d on cpu %d: %w", attr.Config, pid, cpu, err)
	}
	c.files = append(c.files, os.NewFile(uintptr(raw), "perf_event"))
	return nil
}

// Count returns the number of passes since Open.
func (c *Counter) Count() (uint64, error) {
	var sum uint64
	for _, f := range c.files {
		var value [8]byte
		if _, err := f.Read(value[:]); err != nil {
			return 0, fmt.Errorf("read perf event: %w", err)
		}
		sum += binary.NativeEndian.Uint64(value[:])
	}
	return sum, nil
}

// Close ends the counting.
func (c *Counter) Close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

func onlineCPUs() ([]int, error) {
	const path = "/sys/devices/system/cpu/online"
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	cpus, err := parseCPUs(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cpus, nil
}

// parseCPUs expands a list such as "0-3,8".
func parseCPUs(list string) ([]int, error) {
	var cpus []int
	for part := range strings.SplitSeq(list, ",") {
		low, high, isRange := strings.Cut(part, "-")
		if !isRange {
			high = low
		}
		first, err := strconv.ParseUint(low, 10, 16)
		if err != nil {
			return nil, err
		}
		last, err := strconv.ParseUint(high, 10, 16)
		if err != nil {
			return nil, err
		}
		for cpu := first; cpu <= last; cpu++ {
			cpus = append(cpus, int(cpu))
		}
	}
	return cpus, nil
}
