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
	"github.com/secondmmu/gvm/epoch"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/internal/pagemap"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
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
	Pagemap View = "pagemap"
	Content View = "content"
	Fork    View = "fork"
	KVM     View = "kvm"
	Strays  View = "strays"
	Kernel  View = "kernel"
	Guest   View = "guest"
)

// Views returns all of them.
func Views() []View {
	return []View{Dirty, Tracker, Slots, Maps, Pagemap, Content, Fork, KVM, Strays, Kernel, Guest}
}

// auditor compares the views of one machine.
type auditor struct {
	round    *Round
	log      *trace.Log
	rng      *rand.Rand
	seed     uint64
	pressure bool
	watch    vm.Watch
	epoch    int
	value    uint64 // the last that a guest was asked to store

	ops  map[uint64]*operation // by number, since they were last compared
	seen uint64                // number of the last event of the log that was looked at
	gap  bool                  // the log has lost some since

	strayKinds map[hostops.Kind]uint64
	others     others
	zaps       zaps
}

// newAuditor returns the auditor of a round, and has it called.
func newAuditor(round *Round, config *epoch.Config, pressure bool) *auditor {
	a := &auditor{
		round: round, log: config.Machine.Log, rng: rand.New(rand.NewPCG(config.Seed, 7)), seed: config.Seed,
		pressure: pressure, watch: config.Machine.Watch, ops: map[uint64]*operation{}, strayKinds: map[hostops.Kind]uint64{},
	}
	config.Paused, config.Quiet, config.Others = a.paused, a.quiet, a.begin
	config.Machine.OnStray = a.others.followed
	config.OnEpoch = func(e *epoch.Epoch) {
		a.round.Checks[Dirty] += e.Dirty.Len()
		for _, m := range e.Missing {
			a.divergeAt(Dirty, m.GFN, "%v was not reported", m)
		}
		a.epoch++
		a.operations()
	}
	return a
}

func (a *auditor) close() { a.zaps.close() }

// begin is called when the guest is in its machine: what others do begins.
func (a *auditor) begin(m *vm.Machine) (all []epoch.Other, err error) {
	if a.watch&vm.WatchTrace != 0 {
		if err := a.zaps.open(m, a.log); err != nil {
			return nil, err
		}
	}
	n := m.RAM().Range.NPages()
	frames := n
	if a.round.Alias {
		frames *= 2
	}
	all = append(all, &writer{m, frames, rand.New(rand.NewPCG(a.seed, 8))})
	for i := range uint64(a.round.Others) {
		s, err := hostops.NewStrays(hostops.StrayConfig{
			Target: epoch.Target(m), Seed: a.seed + i,
			Own: hostops.Range{Start: n - (i+1)*ownPages, End: n - i*ownPages}, Any: hostops.Range{End: n - uint64(a.round.Others)*ownPages},
			Events: a.watch&vm.WatchEvents != 0, Trace: a.watch&vm.WatchTrace != 0,
			Compact: a.pressure, Made: a.others.made,
		})
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	a.others.own = addr.HVARange{Start: m.RAM().Range.End - addr.HVA(a.round.Others*ownPages*addr.PageSize), End: m.RAM().Range.End}
	return all, nil
}

// most is how many divergences of a round are told of: one is often many. Of the first few
// the trace is kept, as much of it as is told.
const (
	most       = 20
	mostTraced = 4
	mostLines  = 60
)

func (a *auditor) diverge(view View, format string, args ...any) {
	if len(a.round.Divergences) < most {
		a.round.Divergences = append(a.round.Divergences, Divergence{View: view, Epoch: a.epoch + 1, What: fmt.Sprintf(format, args...)})
	}
}

// divergeAt is diverge for what is about one page.
func (a *auditor) divergeAt(view View, gfn addr.GFN, format string, args ...any) {
	a.diverge(view, format, args...)
	if n := len(a.round.Divergences); n <= mostTraced {
		a.round.Divergences[n-1].Trace = a.traceOf(gfn)
	}
}

// traceOf returns the newest lines of the trace that have to do with a page.
func (a *auditor) traceOf(gfn addr.GFN) []string {
	all, _ := a.log.Since(0)
	var b strings.Builder
	w := trace.NewWriter(&b, trace.Text, trace.Header{})
	if w.Write(trace.Page(all, gfn)) != nil || w.Close() != nil {
		return nil
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	return lines[max(0, len(lines)-mostLines):]
}

// page is one frame of RAM, as package mm has it.
type page struct {
	gfn addr.GFN
	hva addr.HVA
	mm.Extent
}

// pages returns all frames of RAM.
func (a *auditor) pages(m *vm.Machine) (all []page) {
	first, n := guests.RAMBase.GFN(), m.RAM().Range.NPages()
	if a.round.Alias {
		n *= 2
	}
	for gfn := first; gfn < first+addr.GFN(n); gfn++ {
		p := page{gfn: gfn}
		if hva, ok := m.Slots().HVA(gfn.GPA()); ok {
			p.hva, p.Extent = hva, m.Memory().Extents(addr.HVAs(hva, addr.PageSize))[0]
		}
		all = append(all, p)
	}
	return all
}

// paused compares what can be compared while the guest stands still.
func (a *auditor) paused(m *vm.Machine) error {
	if err := a.zaps.read(); err != nil {
		return err
	}
	m.Memory().Follow()
	a.operations()
	all := a.pages(m)
	a.round.Checks[Tracker]++
	if err := m.Check(); err != nil {
		a.diverge(Tracker, "%v", err)
	}
	a.slots(m, all)
	err := errors.Join(a.maps(m), a.pagemap(m, all), a.content(m, all), a.fork(m, all), a.kvm(m))
	a.strays(m)
	a.kernel(m)
	clear(a.ops)
	a.gap = false
	return err
}

// slots compares slots with mappings. Precise ones show what is mapped, and as it is;
// others show all. Slots that are behind may show less, and never more.
func (a *auditor) slots(m *vm.Machine, all []page) {
	coarse := m.Coarse() || a.round.Policy == shadow.Lazy.String()
	for _, p := range all {
		a.round.Checks[Slots]++
		want := p.Access
		if coarse {
			want = addr.ReadWrite
		}
		if want&addr.Read == 0 {
			want = addr.NoAccess
		}
		s, ok := m.Slots().Lookup(p.gfn)
		switch {
		case m.Behind() && s.Access&^want == 0:
		case ok && s.Access != want, !ok && want != addr.NoAccess:
			a.divergeAt(Slots, p.gfn, "%v is %v in slots (%v), and %v on the host", p.gfn, s.Access, s, want)
		case ok && s.HVAs().Start+addr.HVA((p.gfn-s.GFN).GPA()) != p.hva:
			a.divergeAt(Slots, p.gfn, "%v shows another address than %v in %v", p.gfn, p.hva, s)
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
				case !x.Mapped && !x.Foreign() && got != addr.NoAccess:
					a.diverge(Maps, "%v is %v, and should be a reservation: %v", hva, got, x)
				case x.Mapped && x.Access != addr.NoAccess && got != x.Access: // guards, and the end of a file, are not in maps
					a.diverge(Maps, "%v is %v, and should be %v", hva, got, x)
				}
			}
		}
	}
	return nil
}

// pagemap compares what the kernel's page tables have with what package mm says: nothing is
// where only a reservation is, private anonymous memory is not a file's, and what is shared
// is. Memory of which there is nothing reads as zero.
func (a *auditor) pagemap(m *vm.Machine, all []page) error {
	pm, err := pagemap.Open()
	if err != nil {
		return err
	}
	defer pm.Close()
	const there = pagemap.Present | pagemap.Swapped
	var content [addr.PageSize]byte
	for _, p := range all {
		if p.hva == 0 || p.Foreign() {
			continue
		}
		var found [1]pagemap.Region
		n, _, err := pm.Scan(pagemap.Request{Range: addr.HVAs(p.hva, addr.PageSize), Any: there, Report: there | pagemap.File}, found[:])
		if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.ENOTTY) {
			return nil
		} else if err != nil {
			return err
		}
		a.round.Checks[Pagemap]++
		has := found[0].Categories // none if there is nothing
		switch {
		case !p.Mapped && has&pagemap.Present != 0: // a mark of write protection counts as swapped
			a.divergeAt(Pagemap, p.gfn, "%v at %v is not mapped, and the kernel has %v", p.gfn, p.hva, has)
		case has&pagemap.Present != 0 && p.Anonymous() && has&pagemap.File != 0:
			a.divergeAt(Pagemap, p.gfn, "%v at %v is anonymous, and the kernel has a page of a file", p.gfn, p.hva)
		case has&pagemap.Present != 0 && p.Shared() && has&pagemap.File == 0:
			a.divergeAt(Pagemap, p.gfn, "%v at %v is shared, and the kernel has an anonymous page", p.gfn, p.hva)
		case n == 0 && p.Anonymous() && p.Access&addr.Read != 0:
			if err := m.ReadGuest(p.gfn.GPA(), content[:]); err == nil && content != [addr.PageSize]byte{} {
				a.divergeAt(Pagemap, p.gfn, "%v at %v has something, and the kernel no page", p.gfn, p.hva)
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
		if p.Access&addr.Read == 0 {
			continue
		}
		a.round.Checks[view]++
		if _, ok := m.Slots().Lookup(p.gfn); !ok && m.Behind() {
			continue
		}
		if err := m.ReadGuest(p.gfn.GPA(), table[:]); err != nil {
			a.divergeAt(view, p.gfn, "%v is mapped, and the table says: %v", p.gfn, err)
			continue
		}
		if err := other(p, theirs[:]); err != nil {
			return fmt.Errorf("read %v at %v another way: %w", p.gfn, p.hva, err)
		}
		if !bytes.Equal(table[:], theirs[:]) {
			a.divergeAt(view, p.gfn, "%v at %v is not the same: from byte %d on", p.gfn, p.hva, firstDifference(table[:], theirs[:]))
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
	all := a.pages(m)
	for vcpu := range a.round.VCPUs {
		probe := m.Probe(vcpu)
		for range 8 {
			p := all[a.rng.IntN(len(all))]
			gpa := p.gfn.GPA() + addr.GPA(a.rng.IntN(addr.PageSize/8)*8)
			s, _ := m.Slots().Lookup(p.gfn)
			access := p.Access & s.Access
			if access&addr.Read == 0 {
				continue // the guest would wait
			}
			if access&addr.Write != 0 && a.rng.IntN(2) == 0 {
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
		a.divergeAt(Guest, gpa.GFN(), "at %v %#x %s, and the table has %#x, %v", gpa, v, how, got, err)
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
