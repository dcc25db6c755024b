package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/vm"
)

// View is a view of guest memory that others are compared with, by its stable name.
type View string

// The views: see the package comment.
const (
	Dirty   View = "dirty"
	Tracker View = "tracker"
	Slots   View = "slots"
	Maps    View = "maps"
	Content View = "content"
	Fork    View = "fork"
	KVM     View = "kvm"
	Guest   View = "guest"
)

// Views returns all of them.
func Views() []View { return []View{Dirty, Tracker, Slots, Maps, Content, Fork, KVM, Guest} }

// auditor compares the views of one machine.
type auditor struct {
	round *Round
	rng   *rand.Rand
	epoch int
	value uint64 // the last that a guest was asked to store
}

// most is how many divergences of a round are told of: one is often many.
const most = 20

func (a *auditor) diverge(view View, format string, args ...any) {
	if len(a.round.Divergences) < most {
		a.round.Divergences = append(a.round.Divergences, Divergence{view, a.epoch + 1, fmt.Sprintf(format, args...)})
	}
}

// page is one of RAM, as package mm has it.
type page struct {
	gfn    addr.GFN
	hva    addr.HVA
	access addr.Access
	mapped bool // it has a mapping, which may allow nothing
}

// pages returns all of RAM.
func pages(m *vm.Machine) (all []page) {
	first := guests.RAMBase.GFN()
	for gfn := first; gfn < first+addr.GFN(m.RAM().Range.NPages()); gfn++ {
		hva, ok := m.Slots().HVA(gfn.GPA())
		if !ok {
			all = append(all, page{gfn: gfn})
			continue
		}
		x := m.Memory().Extents(addr.HVAs(hva, addr.PageSize))[0]
		all = append(all, page{gfn, hva, x.Access, x.Mapped})
	}
	return all
}

// paused compares what can be compared while the guest stands still.
func (a *auditor) paused(m *vm.Machine) error {
	all := pages(m)
	a.round.Checks[Tracker]++
	if err := m.Check(); err != nil {
		a.diverge(Tracker, "%v", err)
	}
	a.slots(m, all)
	return errors.Join(a.maps(m), a.content(m, all), a.fork(m, all), a.kvm(m))
}

// slots compares slots with mappings. Precise ones show what is mapped, and as it is;
// others show all.
func (a *auditor) slots(m *vm.Machine, all []page) {
	coarse := m.Coarse() || a.round.Policy == shadow.Lazy.String()
	for _, p := range all {
		a.round.Checks[Slots]++
		want := p.access
		if coarse {
			want = addr.ReadWrite
		}
		if want&addr.Read == 0 {
			want = addr.NoAccess
		}
		s, ok := m.Slots().Lookup(p.gfn)
		switch {
		case ok && s.Access != want, !ok && want != addr.NoAccess:
			a.diverge(Slots, "%v is %v in slots (%v), and %v on the host", p.gfn, s.Access, s, want)
		case ok && s.HVAs().Start+addr.HVA((p.gfn-s.GFN).GPA()) != p.hva:
			a.diverge(Slots, "%v shows another address than %v in %v", p.gfn, p.hva, s)
		}
	}
}

// maps compares what package mm says of its regions with what the kernel says.
func (a *auditor) maps(m *vm.Machine) error {
	kernel, err := ownMaps()
	if err != nil {
		return err
	}
	for _, region := range []*mm.Region{m.RAM(), m.Spare()} {
		if region == nil {
			continue
		}
		for _, x := range m.Memory().Extents(region.Range) {
			for hva := x.Range.Start; hva < x.Range.End; hva += addr.PageSize {
				a.round.Checks[Maps]++
				got, mapped := kernel.at(hva)
				switch {
				case !mapped:
					a.diverge(Maps, "%v of %v is a hole", hva, region)
				case !x.Mapped && got != addr.NoAccess:
					a.diverge(Maps, "%v is %v, and should be a reservation: %v", hva, got, x)
				case x.Mapped && x.Access != addr.NoAccess && got != x.Access: // guards, and the end of a file, are not in maps
					a.diverge(Maps, "%v is %v, and should be %v", hva, got, x)
				}
			}
		}
	}
	return nil
}

// content compares each page, as the table reads it, with the process's memory file, which
// goes by no table of ours.
func (a *auditor) content(m *vm.Machine, all []page) error {
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return err
	}
	defer mem.Close()
	return a.compare(m, all, Content, func(p page, to []byte) error {
		_, err := mem.ReadAt(to, int64(p.hva))
		return err
	})
}

// fork compares each page with that of a child of this moment.
func (a *auditor) fork(m *vm.Machine, all []page) error {
	if a.rng.IntN(4) != 0 {
		return nil
	}
	child, err := m.Memory().Fork()
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	} else if err != nil {
		return err
	}
	err = a.compare(m, all, Fork, func(p page, to []byte) error { return child.ReadAt(to, p.hva) })
	return errors.Join(err, child.Close())
}

// compare compares each page that can be read with what other reads of it.
func (a *auditor) compare(m *vm.Machine, all []page, view View, other func(p page, to []byte) error) error {
	var table, theirs [addr.PageSize]byte
	for _, p := range all {
		if p.access&addr.Read == 0 {
			continue
		}
		a.round.Checks[view]++
		if err := m.ReadGuest(p.gfn.GPA(), table[:]); err != nil {
			a.diverge(view, "%v is mapped, and the table says: %v", p.gfn, err)
			continue
		}
		if err := other(p, theirs[:]); err != nil {
			return fmt.Errorf("read %v at %v another way: %w", p.gfn, p.hva, err)
		}
		if !bytes.Equal(table[:], theirs[:]) {
			a.diverge(view, "%v at %v is not the same: from byte %d on", p.gfn, p.hva, firstDifference(table[:], theirs[:]))
		}
	}
	return nil
}

func firstDifference(x, y []byte) int {
	for i := range x {
		if x[i] != y[i] {
			return i
		}
	}
	return len(x)
}

// kvm compares how many pages KVM has mapped for the guest with how many there are in
// slots. Several roots may map a page: one for each vCPU at most, as the guests here have
// one address space.
func (a *auditor) kvm(m *vm.Machine) error {
	stats, err := m.Stats()
	if err != nil {
		return nil // this KVM keeps none
	}
	defer stats.Close()
	var mapped, shown uint64
	for name, each := range map[string]uint64{"pages_4k": 1, "pages_2m": 1 << 9, "pages_1g": 1 << 18} {
		n, err := stats.Read(name)
		if errors.Is(err, kvm.ErrNoStat) {
			return nil
		} else if err != nil {
			return err
		}
		mapped += n * each
	}
	for s := range m.Slots().All() {
		shown += s.NPages
	}
	a.round.Checks[KVM]++
	if mapped > shown*uint64(a.round.VCPUs) {
		a.diverge(KVM, "%d pages are mapped for the guest, and slots have %d", mapped, shown)
	}
	return nil
}

// quiet asks the guest what it sees, and has it store.
func (a *auditor) quiet(ctx context.Context, m *vm.Machine) error {
	if a.round.Guest != "probe" {
		return nil
	}
	all := pages(m)
	for vcpu := range a.round.VCPUs {
		probe := m.Probe(vcpu)
		for range 8 {
			p := all[a.rng.IntN(len(all))]
			gpa := p.gfn.GPA() + addr.GPA(a.rng.IntN(addr.PageSize/8)*8)
			if p.access&addr.Read == 0 {
				continue // the guest would wait
			}
			if p.access&addr.Write != 0 && a.rng.IntN(2) == 0 {
				a.value++
				if err := probe.Store(ctx, gpa, a.value); err != nil {
					return err
				}
				a.same(m, gpa, a.value, "was stored by the guest")
				continue
			}
			v, err := probe.Load(ctx, gpa)
			if err != nil {
				return err
			}
			a.same(m, gpa, v, "was loaded by the guest")
		}
	}
	return nil
}

// same compares a word of the guest's with the table's.
func (a *auditor) same(m *vm.Machine, gpa addr.GPA, v uint64, how string) {
	a.round.Checks[Guest]++
	if got, err := m.Load64(gpa); err != nil || got != v {
		a.diverge(Guest, "at %v %#x %s, and the table has %#x, %v", gpa, v, how, got, err)
	}
}

// ownMappings is /proc/self/maps.
type ownMappings []struct {
	r      addr.HVARange
	access addr.Access
}

func ownMaps() (maps ownMappings, err error) {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		var r addr.HVARange
		var perms string
		if _, err := fmt.Sscanf(s.Text(), "%x-%x %s", &r.Start, &r.End, &perms); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", f.Name(), s.Text(), err)
		}
		access := addr.NoAccess
		if strings.HasPrefix(perms, "r") {
			access |= addr.Read
		}
		if strings.HasPrefix(perms[1:], "w") {
			access |= addr.Write
		}
		maps = append(maps, struct {
			r      addr.HVARange
			access addr.Access
		}{r, access})
	}
	return maps, s.Err()
}

// at returns the access to hva, and whether there is a mapping.
func (m ownMappings) at(hva addr.HVA) (addr.Access, bool) {
	for _, x := range m {
		if x.r.Start <= hva && hva < x.r.End {
			return x.access, true
		}
	}
	return addr.NoAccess, false
}
