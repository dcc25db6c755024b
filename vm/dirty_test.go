package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
)

// snapshot is a copy of RAM that is brought up to date by harvests alone.
type snapshot struct {
	m    *Machine
	copy []byte
	ram  addr.GFNRange
}

func newSnapshot(t *testing.T, m *Machine) *snapshot {
	t.Helper()
	first := guests.RAMBase.GFN()
	s := &snapshot{m: m, ram: addr.GFNRange{Start: first, End: first + addr.GFN(m.ram.Range.NPages())}}
	s.copy = make([]byte, m.ram.Range.Bytes())
	if err := m.ReadGuest(guests.RAMBase, s.copy); err != nil {
		t.Fatal(err)
	}
	return s
}

// page returns the copy of the page of gfn.
func (s *snapshot) page(gfn addr.GFN) []byte {
	at := int(gfn-s.ram.Start) * addr.PageSize
	return s.copy[at : at+addr.PageSize]
}

// apply brings the copy up to date with what a harvest has, as its users are told to.
func (s *snapshot) apply(t *testing.T, h *dirty.Harvest) {
	t.Helper()
	for r := range h.Discarded().RunsIn(s.ram) {
		for gfn := r.Start; gfn < r.End; gfn++ {
			clear(s.page(gfn))
		}
	}
	for r := range h.Dirty().RunsIn(s.ram) {
		for gfn := r.Start; gfn < r.End; gfn++ {
			if err := s.m.ReadGuest(gfn.GPA(), s.page(gfn)); err != nil && !errors.Is(err, unix.EFAULT) {
				t.Error(err)
			}
		}
	}
}

// compare reports the pages of which the copy is not what RAM has. The guest stands
// still, and all is mapped.
func (s *snapshot) compare(t *testing.T, what string) {
	t.Helper()
	page := make([]byte, addr.PageSize)
	for gfn := s.ram.Start; gfn < s.ram.End; gfn++ {
		if err := s.m.ReadGuest(gfn.GPA(), page); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(page, s.page(gfn)) {
			t.Errorf("%s: %v differs from the copy: a change was not reported", what, gfn)
		}
	}
}

// TestDirtyIsComplete harvests while guests write, the host writes, and mappings change,
// and in the end compares a copy that knows only what was reported with memory. Every
// source is tried with every backing, and with one vCPU and with two.
func TestDirtyIsComplete(t *testing.T) {
	const pages = 12
	for _, source := range DirtySources() {
		for backing := mm.Anonymous; backing <= mm.MemfdPrivate; backing++ {
			vcpus := 1 + (int(source)+int(backing))%2
			t.Run(fmt.Sprintf("source=%v/backing=%v/vcpus=%d", source, backing, vcpus), func(t *testing.T) {
				rng := gvmtest.Rand(t)
				c := Config{VCPUs: vcpus, Backing: backing, Touch: Wait, Spare: addr.PageSize, Dirty: source}
				m := newMachine(t, c, "stamp", guests.Args{"pages": pages, "seed": 1 + rng.Uint64N(1<<62)})
				if err := m.LogDirty(true); err != nil {
					t.Fatal(err)
				}
				s := newSnapshot(t, m)
				ctx, cancel := context.WithCancel(testContext(t))
				defer cancel()
				if err := m.Start(ctx); err != nil {
					t.Fatal(err)
				}
				epochs, reported := 0, uint64(0)
				for begin := time.Now(); epochs < 200 && (epochs < 20 || time.Since(begin) < gvmtest.StormLasts(2*time.Second)); epochs++ {
					if err := dirtyStep(m, rng, pages); err != nil {
						t.Fatal(err)
					}
					h, err := m.Harvest(ctx)
					if err != nil {
						t.Fatal(err)
					}
					if rng.IntN(4) == 0 {
						if err := h.Abort(); err != nil {
							t.Error(err)
						}
						continue
					}
					reported += h.Dirty().Len()
					s.apply(t, h)
					if err := h.Commit(); err != nil {
						t.Error(err)
					}
					if rng.IntN(8) == 0 {
						// With the guest standing still the copy is the memory.
						m.Pause()
						if h, err = m.Harvest(ctx); err != nil {
							t.Fatal(err)
						}
						s.apply(t, h)
						s.compare(t, fmt.Sprintf("epoch %d", epochs))
						m.Resume()
						if err := h.Commit(); err != nil {
							t.Error(err)
						}
					}
					if t.Failed() {
						t.FailNow()
					}
				}
				cancel()
				if _, err := m.Wait(); !errors.Is(err, context.Canceled) {
					t.Errorf("the run ended with %v", err)
				}
				h, err := m.Harvest(testContext(t))
				if err != nil {
					t.Fatal(err)
				}
				s.apply(t, h)
				s.compare(t, "at the end")
				progress, err := m.Result(0, 0)
				if err != nil || progress == 0 || reported == 0 {
					t.Errorf("the guest has written %d stamps (%v), and %d pages were reported", progress, err, reported)
				}
				t.Logf("%d epochs, %d pages reported, %d stamps of vCPU 0", epochs, reported, progress)
			})
		}
	}
}

// TestDirtySources has a guest write, and then the host by host address, and looks what
// each source says that it sees.
func TestDirtySources(t *testing.T) {
	mem, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for _, source := range DirtySources() {
		t.Run(source.String(), func(t *testing.T) {
			m := newMachine(t, Config{Dirty: source}, "touch", guests.Args{"pages": 4, "accesses": 4, "write": 1})
			if err := m.LogDirty(true); err != nil {
				t.Fatal(err)
			}
			harvestRAM(t, m) // what a source reports in the beginning
			mustRun(t, m)
			if got, want := harvestRAM(t, m), []addr.GFNRange{framesOf(0, 4)}; !slices.Equal(got, want) {
				t.Errorf("the guest wrote %v, and reported are %v", want, got)
			}
			if got := harvestRAM(t, m); got != nil {
				t.Errorf("nothing was written, and reported are %v", got)
			}
			if _, err := mem.WriteAt([]byte("host"), int64(m.hvas(2, 1).Start)); err != nil {
				t.Fatal(err)
			}
			var want []addr.GFNRange
			if source.Sees().Host {
				want = append(want, framesOf(2, 1))
			}
			if got := harvestRAM(t, m); !slices.Equal(got, want) {
				t.Errorf("the host wrote page 2 by its address, and reported are %v, want %v", got, want)
			}
		})
	}
}

// TestRingFull has two guests write more pages than their rings have room for.
func TestRingFull(t *testing.T) {
	const pages = 600
	m := newMachine(t, Config{VCPUs: 2, RAM: pages * addr.PageSize, Dirty: Ring, RingEntries: 256},
		"touch", guests.Args{"pages": pages, "accesses": pages, "write": 1})
	if err := m.LogDirty(true); err != nil {
		t.Fatal(err)
	}
	harvestRAM(t, m)
	mustRun(t, m)
	if got, want := harvestRAM(t, m), []addr.GFNRange{framesOf(0, pages)}; !slices.Equal(got, want) {
		t.Errorf("the guests wrote %v, and reported are %v", want, got)
	}
	if m.rings.full == 0 {
		t.Error("no ring was full")
	}
}

// TestWorkingSet uses pages by the machine itself, and by a guest where the host can tell.
func TestWorkingSet(t *testing.T) {
	m := newMachine(t, Config{}, "touch", guests.Args{"pages": 8, "accesses": 4})
	take := func() WorkingSet {
		t.Helper()
		w, err := m.TakeWorkingSet(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	if err := m.Memory().Populate(m.RAM().Range, true); err != nil {
		t.Fatal(err)
	}
	take()
	m.mustLoad(t, gpaOf(5))
	if err := m.Store64(gpaOf(7), 1); err != nil {
		t.Fatal(err)
	}
	w := take()
	if got, want := slices.Collect(w.Machine.RunsIn(framesOf(0, 8))), []addr.GFNRange{framesOf(5, 1), framesOf(7, 1)}; !slices.Equal(got, want) {
		t.Errorf("used are %v, want %v", got, want)
	}
	if w = take(); w.Machine.Len() != 0 {
		t.Errorf("nothing was used, and %d pages are young", w.Machine.Len())
	}
	mustRun(t, m)
	w = take()
	if w.All == nil {
		t.Logf("the guest's share is not known: %v", w.NotTracked)
		return
	}
	for i := range uint64(4) {
		if !w.All.Contains(gpaOf(i).GFN()) {
			t.Errorf("the guest has read page %d, which is not in the working set", i)
		}
	}
}

// framesOf returns the frames of n pages of RAM from page i.
func framesOf(i, n uint64) addr.GFNRange {
	first := gpaOf(i).GFN()
	return addr.GFNRange{Start: first, End: first + addr.GFN(n)}
}

// harvestRAM returns the dirty frames of RAM, and commits.
func harvestRAM(t *testing.T, m *Machine) []addr.GFNRange {
	t.Helper()
	h, err := m.Harvest(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Commit(); err != nil {
			t.Error(err)
		}
	}()
	return slices.Collect(h.Dirty().RunsIn(framesOf(0, m.ram.Range.NPages())))
}

// TestConfigDirty wants sources that cannot be refused as such.
func TestConfigDirty(t *testing.T) {
	for _, c := range []Config{
		{Dirty: DirtySource(len(sources))},
		{Dirty: Bitmap, RingEntries: 256},
		{Dirty: Ring, RingEntries: 300},
	} {
		c.RAM = addr.PageSize
		if _, err := New(c); !errors.Is(err, ErrConfig) {
			t.Errorf("a machine of %+v: %v", c, err)
		}
	}
}

// dirtyStep does something to memory under a running guest, and gives back what it
// takes away. What the backing cannot do is left out.
func dirtyStep(m *Machine, rng *rand.Rand, pages uint64) error {
	mem, page := m.Memory(), rng.Uint64N(pages)
	n := 1 + rng.Uint64N(min(3, pages-page))
	r := m.hvas(page, n)
	possible := func(err error) error {
		if errors.Is(err, unix.EINVAL) {
			return nil
		}
		return err
	}
	switch rng.IntN(13) {
	case 0:
		return mem.Discard(r)
	case 1:
		return errors.Join(mem.Unmap(r), mem.Map(r))
	case 2:
		return errors.Join(mem.Protect(r, addr.Read), mem.Protect(r, addr.ReadWrite))
	case 3:
		return mem.Map(r)
	case 4:
		return possible(mem.Punch(r))
	case 5:
		return possible(mem.Remove(r))
	case 6:
		return mem.PageOut(r)
	case 7: // since Linux 6.13
		if err := mem.Guard(r); err != nil {
			return possible(err)
		}
		return mem.Unguard(r)
	case 8: // what is behind the new end of the file goes and comes back as zeros
		size := m.ram.Range.Bytes()
		if err := mem.Truncate(m.ram, page*addr.PageSize); err != nil {
			return possible(err)
		}
		return mem.Truncate(m.ram, size)
	case 9: // by the host, where the guest does not write
		return m.Store64(gpaOf(page)+512, rng.Uint64())
	case 10:
		return m.WriteGuest(gpaOf(page)+1024, bytes.Repeat([]byte{byte(rng.Uint32())}, int(n)*addr.PageSize-2048))
	case 11: // while it is off, guests write unseen
		m.Pause()
		defer m.Resume()
		return errors.Join(m.LogDirty(false), m.LogDirty(true))
	}
	r = m.hvas(page, 1)
	return errors.Join(mem.Remap(r, m.spare.Range.Start), mem.Remap(m.spare.Range, r.Start))
}
