package shadow

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/hostmem"
	"github.com/secondmmu/gvm/notifier"
)

type nullBackend struct{}

func (nullBackend) Hold()                      {}
func (nullBackend) Release()                   {}
func (nullBackend) CreateSlot(Slot) error      { return nil }
func (nullBackend) DeleteSlot(Slot) error      { return nil }
func (nullBackend) ChangeSlot(_, _ Slot) error { return nil }

// wholeHost is a host that has everything mapped.
type wholeHost struct{}

func (wholeHost) Walk(r addr.HVARange, fn func(addr.HVARange, addr.Access)) { fn(r, addr.ReadWrite) }

func (wholeHost) Lookup(_ context.Context, _ addr.HVA, within addr.HVARange) (addr.HVARange, addr.Access, error) {
	return within, addr.ReadWrite, nil
}

// pagewiseHost is one that never has two pages mapped alike.
type pagewiseHost struct{ wholeHost }

func (pagewiseHost) Lookup(_ context.Context, hva addr.HVA, _ addr.HVARange) (addr.HVARange, addr.Access, error) {
	return addr.HVAs(hva&^addr.PageMask, addr.PageSize), addr.ReadWrite, nil
}

// newBenchTable returns a table for npages of memory that can be used if real is
// set, and is just addresses if not, and the memory.
func newBenchTable(b *testing.B, host Host, npages int, real bool) (*Table, []byte) {
	b.Helper()
	memory, hva := []byte(nil), addr.HVA(1<<40)
	if real {
		var err error
		memory, err = unix.Mmap(-1, 0, npages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { unix.Munmap(memory) })
		hva = addressOf(memory)
	}
	m := NewMemslots(nullBackend{}, 1<<20, nil)
	t := NewTable(m, host)
	if err := m.Set(Slot{NPages: uint64(npages), HVA: hva, Access: addr.ReadWrite}); err != nil {
		b.Fatal(err)
	}
	return t, memory
}

// touchAll makes the translations of all pages.
func touchAll(b *testing.B, t *Table, npages int) {
	b.Helper()
	for gfn := range addr.GFN(npages) {
		if err := t.fault(b.Context(), gfn, addr.ReadWrite); err != nil {
			b.Fatal(err)
		}
	}
}

// rwmap is what one would write without a table: a map under a lock.
type rwmap struct {
	mu    sync.RWMutex
	pages map[addr.GFN]addr.HVA
}

func (m *rwmap) load64(gpa addr.GPA) uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	v, _ := hostmem.Load64(m.pages[gpa.GFN()] + addr.HVA(gpa.Offset()))
	return v
}

// BenchmarkAccess times a load and a store of 8 bytes that are translated, one page
// after the other, beside a load from a slice, and from a map under a RWMutex.
func BenchmarkAccess(b *testing.B) {
	const npages = 256
	t, memory := newBenchTable(b, pagewiseHost{}, npages, true)
	touchAll(b, t, npages)
	view := t.NewView(b.Context())
	defer view.Close()
	at := func(i int) addr.GPA { return addr.GPA(i%npages*page + i%64*8) }
	run := func(name string, do func(i int) error) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if err := do(i); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	var sum uint64
	run("op=load/impl=view", func(i int) error { v, err := view.Load64(at(i)); sum += v; return err })
	run("op=load/impl=table", func(i int) error { v, err := t.Load64(at(i)); sum += v; return err })
	run("op=load/impl=slice", func(i int) error { sum += load(memory[at(i):]); return nil })
	m := &rwmap{pages: map[addr.GFN]addr.HVA{}}
	for i := range npages {
		m.pages[addr.GFN(i)] = addressOf(memory) + addr.HVA(i*page)
	}
	run("op=load/impl=rwmap", func(i int) error { sum += m.load64(at(i)); return nil })
	run("op=store/impl=view", func(i int) error { return view.Store64(at(i), 1) })
	run("op=store/impl=slice", func(i int) error { store(memory[at(i):], 1); return nil })
}

// BenchmarkCopy times a copy of 4 KiB out of memory, beside copy(): of one page,
// which then is in the cache, of one after the other of 64 MiB, and of these in no
// order.
func BenchmarkCopy(b *testing.B) {
	for name, step := range map[string]int{"one": 0, "sequential": 1, "scattered": 7919} {
		npages := 1
		if step > 0 {
			npages = 1 << 14
		}
		t, memory := newBenchTable(b, wholeHost{}, npages, true)
		view := t.NewView(b.Context())
		buf := make([]byte, page)
		for at := 0; at < len(memory); at += page { // memory that the machine really has
			copy(buf, memory[at:at+page])
		}
		at := func(i int) int { return i * step % npages * page }
		for impl, do := range map[string]func(at int) error{
			"view":    func(at int) error { _, err := view.ReadAt(buf, int64(at)); return err },
			"hostmem": func(at int) error { return hostmem.ReadAt(buf, addressOf(memory)+addr.HVA(at)) },
			"copy":    func(at int) error { copy(buf, memory[at:]); return nil },
		} {
			b.Run(fmt.Sprintf("pages=%s/impl=%s", name, impl), func(b *testing.B) {
				b.SetBytes(page)
				for i := 0; b.Loop(); i++ {
					if err := do(at(i)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		view.Close()
	}
}

// BenchmarkZap times taking translations out: of one page, without the grace period,
// which is timed beside it; and of a whole GiB, all at once and page by page, with it.
// What is timed is reported as zap-ns; each round also makes the translations.
func BenchmarkZap(b *testing.B) {
	const giant = 1 << (2 * levelShift)
	b.Run("grace", func(b *testing.B) {
		t, _ := newBenchTable(b, pagewiseHost{}, giant, false)
		for b.Loop() {
			t.domain.SynchronizeExpedited()
		}
	})
	for name, zap := range map[string]func(t *Table) (n int){
		"pages=1": func(t *Table) int {
			const n = giant / 4
			t.lock()
			defer t.mu.Unlock()
			for i := range addr.GFN(n) {
				t.zap(frames(i*4, 1))
			}
			return n
		},
		"pages=1/order=random": func(t *Table) int {
			const n = giant / 4
			t.lock()
			defer t.mu.Unlock()
			for i := range addr.GFN(n) {
				t.zap(frames(i*104729%giant, 1))
			}
			return n
		},
		"pages=1GiB": func(t *Table) int {
			t.zapFrames([]addr.GFNRange{frames(0, giant)})
			return 1
		},
		"pages=1GiB-1": func(t *Table) int {
			t.zapFrames([]addr.GFNRange{frames(0, giant-1)})
			return 1
		},
	} {
		b.Run(name, func(b *testing.B) {
			t, _ := newBenchTable(b, pagewiseHost{}, giant, false)
			var took time.Duration
			n := 0
			for b.Loop() {
				touchAll(b, t, giant)
				begin := time.Now()
				n += zap(t)
				took += time.Since(begin)
			}
			b.ReportMetric(float64(took)/float64(n), "zap-ns")
		})
	}
}

// BenchmarkOverhead reports how many bytes of tables a page takes whose translation
// is of it alone, and of a large block.
func BenchmarkOverhead(b *testing.B) {
	const giant = 1 << (2 * levelShift)
	for name, host := range map[string]Host{"pagewise": pagewiseHost{}, "whole": wholeHost{}} {
		b.Run("host="+name, func(b *testing.B) {
			for b.Loop() {
				t, _ := newBenchTable(b, host, giant, false)
				touchAll(b, t, giant)
				st := t.Stats()
				b.ReportMetric(float64(st.Bytes)/float64(st.Pages), "bytes/page")
			}
		})
	}
}

// BenchmarkLookup times finding the slot of a frame among many, beside a map of
// every frame.
func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{32, 32_000} {
		m := NewMemslots(nullBackend{}, uint32(n), nil)
		frame := map[addr.GFN]Slot{}
		for i := range n {
			s := Slot{ID: uint32(i), GFN: addr.GFN(16 * i), NPages: 8, HVA: addr.HVA(16 * i * page), Access: addr.ReadWrite}
			if err := m.Set(s); err != nil {
				b.Fatal(err)
			}
			for gfn := range each(s.GFNs()) {
				frame[gfn] = s
			}
		}
		at := func(i int) addr.GFN { return addr.GFN(i * 7919 % n * 16) }
		b.Run(fmt.Sprintf("slots=%d/impl=set", n), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				if _, ok := m.Slots().Lookup(at(i)); !ok {
					b.Fatal("not found")
				}
			}
		})
		b.Run(fmt.Sprintf("slots=%d/impl=map", n), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				if _, ok := frame[at(i)]; !ok {
					b.Fatal("not found")
				}
			}
		})
		b.Run(fmt.Sprintf("slots=%d/op=delete+create", n), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				s, _ := m.Slots().Lookup(at(i))
				none := s
				none.NPages = 0
				if m.Set(none) != nil || m.Set(s) != nil {
					b.Fatal("refused")
				}
			}
		})
	}
}

// BenchmarkBracket times the tracker's part of a change that leaves the slots
// alone, of one that cuts a page out of a window, and of the latter among many
// holes.
func BenchmarkBracket(b *testing.B) {
	for _, holes := range []int{0, 10_000} {
		host := &bedHost{model: hostModel{}}
		t := NewTracker(host, nullBackend{}, 1<<20, nil)
		w := Window{Name: "ram", NPages: uint64(4*holes + 64), HVA: 1 << 30}
		host.set(w.HVAs(), addr.ReadWrite)
		for i := range holes {
			host.set(addr.HVAs(w.HVA+addr.HVA((64+4*i)*page), page), addr.NoAccess)
		}
		if err := t.AddWindow(w); err != nil {
			b.Fatal(err)
		}
		if n := t.Slots().Len(); n < holes {
			b.Fatalf("there are %d slots, with %d holes", n, holes)
		}
		for _, event := range []notifier.Event{notifier.Clear, notifier.Unmap} {
			b.Run(fmt.Sprintf("event=%v/holes=%d", event, holes), func(b *testing.B) {
				for b.Loop() {
					inv := notifier.Invalidation{Range: addr.HVAs(w.HVA+8*page, page), Event: event}
					if err := t.InvalidateRangeStart(&inv); err != nil {
						b.Fatal(err)
					}
					t.InvalidateRangeEnd(&inv)
				}
			})
		}
	}
}
