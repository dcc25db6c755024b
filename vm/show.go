package vm

import (
	"errors"
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
)

// RAMBase returns the guest address where RAM begins.
func (m *Machine) RAMBase() addr.GPA {
	if m.config.Board != Bare {
		return 0
	}
	return guests.RAMBase
}

// RAMEnd returns the guest address behind RAM: what Show shows lies there or higher.
func (m *Machine) RAMEnd() addr.GPA {
	if m.config.Board != Bare {
		windows := m.config.layout().Windows()
		return windows[len(windows)-1].End
	}
	return guests.RAMBase + addr.GPA(m.config.RAM)
}

// Show shows the guest a region of the machine's Memory at an address behind RAM, and
// maps it there in the guest's page tables, at its own address. A region may be shown
// more than once: the frames are aliases of each other. It is called before Boot, and for
// built-in guests only: other images have page tables of their own.
//
// Where the dirty source is WriteProtect, the region is of the same backing as RAM.
func (m *Machine) Show(r *mm.Region, at addr.GPA) error {
	fail := func(err error) error { return fmt.Errorf("show region %v at %v: %w", r, at, err) }
	m.mu.Lock()
	defer m.mu.Unlock()
	end := at + addr.GPA(r.Range.Bytes())
	switch {
	case m.booted || m.closed:
		return fail(errors.New("the machine has been booted or closed"))
	case m.config.Board != Bare:
		return fail(fmt.Errorf("the board is %v", m.config.Board))
	case at.Offset() != 0 || at < m.RAMEnd():
		return fail(errors.New("it is not page aligned, or not behind RAM"))
	case end < at || end > guests.RAMBase+guests.MaxRAM:
		return fail(errors.New("a guest's page tables cannot map it"))
	case m.config.Dirty == WriteProtect && r.Backing != m.config.Backing:
		return fail(fmt.Errorf("%v logs memory of backing %v only", m.config.Dirty, m.config.Backing))
	}
	as := m.memory.AddressSpace()
	as.RLock()
	defer as.RUnlock()
	if err := m.tracker.AddWindow(shadow.Window{Name: r.Name, GFN: at.GFN(), NPages: r.Range.NPages(), HVA: r.Range.Start}); err != nil {
		return fail(err)
	}
	m.shownEnd = max(m.shownEnd, end)
	return nil
}
