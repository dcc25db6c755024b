package hmm_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/hmm"
	"github.com/secondmmu/gvm/notifier"
)

// buffer is four pages of memory that the CPU and a device share.
var buffer = addr.HVAs(0x7f0000000000, 4*addr.PageSize)

// host is the page tables of a host that has one region: the buffer. A page that is
// touched is mapped writable, to the next frame.
type host struct {
	frames map[addr.HVA]addr.PFN
	next   addr.PFN
}

func (h *host) Region(hva addr.HVA) (addr.HVARange, addr.Access, uint32) {
	if hva < buffer.Start {
		return addr.HVARange{Start: 0, End: buffer.Start}, addr.NoAccess, 0
	}
	if hva >= buffer.End {
		return addr.HVARange{Start: buffer.End, End: ^addr.HVA(0) &^ addr.PageMask}, addr.NoAccess, 0
	}
	return buffer, addr.ReadWrite, hmm.RegionMapped
}

func (h *host) Walk(r addr.HVARange, _ any, fn func(addr.HVARange, addr.PFN, uint32) bool) error {
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		pte := uint32(0)
		if h.frames[hva] != 0 {
			pte = hmm.PTEPresent | hmm.PTEWritable
		}
		if !fn(addr.HVAs(hva, addr.PageSize), h.frames[hva], pte) {
			break
		}
	}
	return nil
}

func (h *host) Fault(r addr.HVARange, write, nonblocking bool) error {
	for hva := r.Start; hva < r.End; hva += addr.PageSize {
		if h.frames[hva] == 0 {
			h.next++
			h.frames[hva] = h.next
		}
	}
	return nil
}

// discard drops the first page, in a bracket.
func (h *host) discard(as *notifier.AddressSpace) {
	as.Lock()
	defer as.Unlock()
	inv := &notifier.Invalidation{Range: addr.HVAs(buffer.Start, addr.PageSize), Event: notifier.Clear, After: addr.ReadWrite}
	if err := as.InvalidateRangeStart(inv); err != nil {
		fmt.Println(err)
		return
	}
	delete(h.frames, buffer.Start)
	as.InvalidateRangeEnd(inv)
}

// gpu is a device with page tables of its own.
type gpu struct {
	sync.Mutex
	tables map[addr.HVA]hmm.Entry
}

func (g *gpu) Sync(inv *notifier.Invalidation) error {
	g.Lock()
	defer g.Unlock()
	for hva := range g.tables {
		if hva >= inv.Range.Start && hva < inv.Range.End {
			fmt.Println("the device drops", hva)
			delete(g.tables, hva)
		}
	}
	return nil
}

// A driver mirrors a range of memory: it makes the pages present, installs them in the
// device's page tables, and drops them when the host changes them.
func Example() {
	as, tables, ctx := notifier.New(notifier.Options{}), &host{frames: map[addr.HVA]addr.PFN{}}, context.Background()
	g := &gpu{tables: map[addr.HVA]hmm.Entry{}}
	var mirror hmm.Mirror
	if err := mirror.Register(ctx, as, g); err != nil {
		fmt.Println(err)
		return
	}
	defer mirror.Unregister()

	r := &hmm.Range{Range: addr.HVAs(buffer.Start, 2*addr.PageSize), Tables: tables, Entries: make([]hmm.Entry, 2), Default: hmm.ReqFault}
	err := r.Populate(ctx, as, g, func(entries []hmm.Entry) error {
		for i, e := range entries {
			g.tables[r.Range.Start+addr.HVA(i*addr.PageSize)] = e
			fmt.Println("the device maps", e)
		}
		return nil
	})
	if err != nil {
		fmt.Println(err)
	}
	tables.discard(as)
	// Output:
	// the device maps valid write pfn 0x1
	// the device maps valid write pfn 0x2
	// the device drops hva 0x7f0000000000
}

// What a look finds is good as long as the range is valid.
func ExampleRange() {
	as, tables, ctx := notifier.New(notifier.Options{}), &host{frames: map[addr.HVA]addr.PFN{}}, context.Background()
	var mirror hmm.Mirror
	if err := mirror.Register(ctx, as, &gpu{}); err != nil {
		fmt.Println(err)
		return
	}
	defer mirror.Unregister()

	r := &hmm.Range{Range: buffer, Tables: tables, Entries: []hmm.Entry{0, hmm.ReqFault, 0, 0}, Mask: hmm.ReqFault}
	if err := r.Begin(as); err != nil {
		fmt.Println(err)
		return
	}
	as.RLock()
	n, err := r.Fault(false)
	as.RUnlock()
	fmt.Println(n, err, r.Entries)
	fmt.Println("valid:", r.Valid())
	tables.discard(as)
	fmt.Println("valid:", r.Done())
	// Output:
	// 4 <nil> [0 valid write pfn 0x1 0 0]
	// valid: true
	// valid: false
}

// watched is a driver of an interval.
type watched struct {
	notifier.Interval
	sync.Mutex
	installed int
}

func (w *watched) Invalidate(_ *notifier.Invalidation, seq uint64) bool {
	w.Lock()
	defer w.Unlock()
	w.SetSeq(seq)
	w.installed = 0
	return true
}

// A driver that mirrors one range has an interval of its own.
func ExampleRequest() {
	as, tables, ctx := notifier.New(notifier.Options{}), &host{frames: map[addr.HVA]addr.PFN{}}, context.Background()
	w := new(watched)
	if err := as.Insert(ctx, w, buffer.Start, buffer.Bytes()); err != nil {
		fmt.Println(err)
		return
	}
	defer w.Remove()
	q := &hmm.Request{
		Range: buffer, Tables: tables, AddressSpace: as, Interval: w,
		Entries: make([]hmm.Entry, buffer.NPages()), Default: hmm.ReqFault | hmm.ReqWrite,
	}
	install := func(entries []hmm.Entry) error {
		w.installed = len(entries)
		return nil
	}
	fmt.Println(q.Populate(ctx, w, install), w.installed)
	tables.discard(as)
	fmt.Println("installed after a change:", w.installed)

	q.Range = addr.HVAs(buffer.End, addr.PageSize)
	q.Entries = make([]hmm.Entry, 1)
	err := q.Populate(ctx, w, install)
	fmt.Println(err)
	fmt.Println(errors.Is(err, syscall.EFAULT))
	// Output:
	// <nil> 4
	// installed after a change: 0
	// fault hva [0x7f0000004000, 0x7f0000005000): at hva 0x7f0000004000: there is no region: bad address
	// true
}
