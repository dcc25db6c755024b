package mm

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/hostmem"
)

// AccessError is a use of guest memory by the host that its mappings do not
// allow.
type AccessError struct {
	Access addr.Access   // what was wanted
	Range  addr.HVARange // of which bytes
	Why    string        // the first place that does not allow it
	Err    error         // unix.EFAULT, or os.ErrClosed
}

func (e *AccessError) Error() string {
	return fmt.Sprintf("%v access to %v: %s: %v", e.Access, e.Range, e.Why, e.Err)
}

func (e *AccessError) Unwrap() error { return e.Err }

// ReadAt copies len(p) bytes of guest memory from hva to p. It holds the mapping
// lock for reading. Memory that is not mapped, or was unmapped behind our back,
// gives an *AccessError; p may have been written in part.
func (m *Memory) ReadAt(p []byte, hva addr.HVA) error {
	return m.access(addr.Read, addr.HVAs(hva, uint64(len(p))), func() error { return hostmem.ReadAt(p, hva) })
}

// WriteAt copies p to guest memory at hva, as ReadAt does the other way round.
func (m *Memory) WriteAt(p []byte, hva addr.HVA) error {
	return m.access(addr.ReadWrite, addr.HVAs(hva, uint64(len(p))), func() error { return hostmem.WriteAt(p, hva) })
}

// Load64 reads the 8 bytes at hva, which is a multiple of 8, as one atomic
// access, sequentially consistent with the guest's.
func (m *Memory) Load64(hva addr.HVA) (v uint64, err error) {
	err = m.access(addr.Read, addr.HVAs(hva, 8), func() (err error) { v, err = hostmem.Load64(hva); return err })
	return v, err
}

// Store64 writes the 8 bytes at hva, which is a multiple of 8, as one atomic
// access, sequentially consistent with the guest's.
func (m *Memory) Store64(hva addr.HVA, v uint64) error {
	return m.access(addr.ReadWrite, addr.HVAs(hva, 8), func() error { return hostmem.Store64(hva, v) })
}

// access calls use, which touches exactly the bytes of r, with the mapping lock
// held. That it faults all the same is possible: a mapping can be changed by code
// that knows nothing of this package.
func (m *Memory) access(want addr.Access, r addr.HVARange, use func() error) error {
	if r.Empty() {
		return nil
	}
	m.as.RLock()
	defer m.as.RUnlock()
	if m.closed {
		return &AccessError{Access: want, Range: r, Why: "guest memory", Err: os.ErrClosed}
	}
	if err := m.extents.allow(want, r); err != nil {
		return err
	}
	if err := use(); err != nil {
		return &AccessError{Access: want, Range: r, Why: "it faulted although it was mapped here", Err: err}
	}
	return nil
}

// allow returns an *AccessError if the extents do not allow an access to all of r.
func (s extents) allow(want addr.Access, r addr.HVARange) error {
	at := r.Start
	for x := range s.in(r) {
		if x.Range.Start > at {
			break
		}
		if x.Access&want != want {
			return &AccessError{Access: want, Range: r, Why: x.String(), Err: unix.EFAULT}
		}
		at = x.Range.End
	}
	if at < r.End {
		return &AccessError{Access: want, Range: r, Why: fmt.Sprintf("%v is not guest memory", at), Err: unix.EFAULT}
	}
	return nil
}
