package trace

import (
	"math/rand/v2"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// played returns a recording of at least n events of a run that has not taken place: random
// operations on a few pages, what follows from each, and two vCPUs that touch the pages.
func played(n int) *Recording {
	const first, pages, hva = addr.GFN(0x200), 64, addr.HVA(0x7f0000200000)
	rec := &Recording{Header: Header{
		Version: Version, Start: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Guest: "stamp pages=64", VCPUs: 2,
		HostOps: "random", Seed: 7, RAM: addr.GFNRange{Start: first, End: first + pages},
	}}
	rng := rand.New(rand.NewPCG(1, 2))
	var now time.Duration
	var p places
	add := func(e Event, later int) {
		now += time.Duration(100 + rng.IntN(later))
		e.Seq, e.Time = uint64(len(rec.Events)+1), now
		p.tie(&e, nil)
		rec.Events = append(rec.Events, e)
	}
	waits := [2]addr.GFN{}
	for op := uint64(1); len(rec.Events) < n; op++ {
		kind := []struct{ op, event string }{
			{"unmap", "unmap"}, {"map", "map"}, {"protect", "protect"}, {"discard", "clear"}, {"remap", "remap"}, {"pageout", "clear"},
		}[rng.IntN(6)]
		gfn := addr.GFNRange{Start: first + addr.GFN(rng.IntN(pages-4))}
		gfn.End = gfn.Start + addr.GFN(1+rng.IntN(4))
		hvas := addr.HVAs(hva+addr.HVA(gfn.Start-first)<<addr.PageShift, gfn.NPages()<<addr.PageShift)
		add(Event{Kind: HostOp, Op: op, Name: kind.op, HVA: hvas}, 40_000)
		add(Event{Kind: InvalidateStart, Op: op, Name: kind.event, HVA: hvas}, 500)
		add(Event{Kind: Zap, Op: op, HVA: hvas, GFN: gfn, Pages: uint64(rng.IntN(3))}, 1000)
		if kind.op != "discard" && kind.op != "pageout" {
			add(Event{Kind: Hold, Op: op, Name: "slots"}, 3000)
			add(Event{Kind: SlotDelete, Op: op, Slot: uint32(rng.IntN(8)), GFN: rec.Header.RAM, HVA: addr.HVAs(hva, pages<<addr.PageShift), Acc: addr.ReadWrite}, 4000)
			add(Event{Kind: SlotCreate, Op: op, Slot: uint32(rng.IntN(8)), GFN: gfn, HVA: hvas, Acc: addr.Read}, 4000)
			add(Event{Kind: Release, Op: op, Name: "slots"}, 300)
		}
		zapped := now + 1
		add(Event{Kind: InvalidateEnd, Op: op, Name: kind.event, HVA: hvas}, 3000)
		end := Event{Kind: HostOpEnd, Op: op, Name: kind.op, HVA: hvas}
		if rng.IntN(50) == 0 {
			end.Err = "invalid argument"
		}
		add(end, 500)
		add(Event{Kind: Kernel, Op: op, Name: "kvm_unmap_hva_range", HVA: hvas, At: zapped}, 2000)
		for vcpu := range waits {
			page := addr.GFNRange{Start: gfn.Start, End: gfn.Start + 1}
			switch {
			case waits[vcpu] != 0 && rng.IntN(3) == 0:
				add(Event{Kind: Touch, Name: Resumed, VCPU: vcpu, GFN: addr.GFNRange{Start: waits[vcpu], End: waits[vcpu] + 1}, Acc: addr.ReadWrite}, 3000)
				waits[vcpu] = 0
			case waits[vcpu] != 0:
			case kind.op == "unmap":
				add(Event{Kind: Exit, Name: "KVM_EXIT_MMIO", VCPU: vcpu, GFN: page, Acc: addr.Read}, 3000)
				add(Event{Kind: Touch, Name: Waits, VCPU: vcpu, GFN: page, Acc: addr.ReadWrite}, 500)
				waits[vcpu] = gfn.Start
			case rng.IntN(4) == 0:
				add(Event{Kind: Kernel, Name: "kvm_mmu_spte_requested", GFN: page, At: now + 50}, 5000)
			case rng.IntN(3) == 0:
				add(Event{Kind: Complete, VCPU: vcpu, GFN: page, Acc: addr.Read}, 3000)
			default:
				add(Event{Kind: Exit, Name: "kick", VCPU: vcpu}, 3000)
			}
		}
		if op%20 == 0 {
			add(Event{Kind: Harvest, Pages: uint64(rng.IntN(64))}, 3000)
		}
	}
	return rec
}
