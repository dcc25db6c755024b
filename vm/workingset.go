package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/mm"
)

// WorkingSet is which frames of guest memory were used since the last one was taken.
type WorkingSet struct {
	// Machine is those that the machine itself used, through its table.
	Machine *dirty.Set

	// All is those that anybody used, the guest included, as the host's idle page tracking
	// estimates: the first time, all that are in memory. It is nil where the host has no
	// such tracking, or does not let this process use it, which NotTracked then says.
	All        *dirty.Set
	NotTracked error
}

// idle is the host's idle page tracking, from the first use on.
type idle struct {
	mu  sync.Mutex  // protects what follows; inside the mapping lock
	log *mm.IdleLog // nil: it is not open
	err error       // why it cannot be opened
}

// openLocked opens the log, once.
func (i *idle) openLocked() error {
	if i.log == nil && i.err == nil {
		i.log, i.err = mm.NewIdleLog()
	}
	return i.err
}

func (i *idle) close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.log == nil {
		return nil
	}
	return i.log.Close()
}

// TakeWorkingSet returns the working set since the last one was taken. It waits until no
// bracket is open, and vCPUs go on. If ctx is done first the error is EINTR.
func (m *Machine) TakeWorkingSet(ctx context.Context) (WorkingSet, error) {
	fail := func(err error) (WorkingSet, error) {
		return WorkingSet{}, fmt.Errorf("take the working set: %w", err)
	}
	as := m.memory.AddressSpace()
	if err := as.RLockContext(ctx); err != nil {
		return fail(err)
	}
	defer as.RUnlock()
	w := WorkingSet{Machine: m.tracker.Table().TakeYoung()}
	m.idle.mu.Lock()
	defer m.idle.mu.Unlock()
	err := m.idle.openLocked()
	switch {
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, fs.ErrPermission):
		w.NotTracked = err
		return w, nil
	case err != nil:
		return fail(err)
	}
	w.All = new(dirty.Set)
	for s := range m.tracker.Slots().All() {
		err := m.idle.log.Take(s.HVAs(), func(r addr.HVARange) {
			gfn := s.GFN + addr.GFN((r.Start-s.HVA)>>addr.PageShift)
			w.All.AddRange(addr.GFNRange{Start: gfn, End: gfn + addr.GFN(r.NPages())})
		})
		if err != nil {
			return fail(err)
		}
	}
	return w, nil
}
