package mm

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/shadow"
)

// countingBackend installs nothing, and counts what it is asked to.
type countingBackend struct{ requests int }

func (b *countingBackend) Hold()                                    {}
func (b *countingBackend) Release()                                 {}
func (b *countingBackend) CreateSlot(shadow.Slot) error             { b.requests++; return nil }
func (b *countingBackend) DeleteSlot(shadow.Slot) error             { b.requests++; return nil }
func (b *countingBackend) ChangeSlot(_, _ shadow.Slot) error        { b.requests++; return nil }
func (b *countingBackend) DirtyLog([]shadow.Slot, *dirty.Set) error { b.requests++; return nil }

// tracked is memory of one kind that a tracker follows: all of it is a guest's.
type tracked struct {
	*Memory
	r, spare *Region
	page     addr.HVARange
	backend  countingBackend
	tracker  *shadow.Tracker
}

func newTracked(tb testing.TB, backing Backing) *tracked {
	tb.Helper()
	x := &tracked{Memory: New(nil)}
	tb.Cleanup(func() {
		if err := x.Close(); err != nil {
			tb.Error(err)
		}
	})
	var err error
	if x.r, err = x.NewRegion(withFile(tb, RegionConfig{Name: "ram", Size: 2 * addr.HugeSize, Backing: backing})); err != nil {
		tb.Fatal(err)
	}
	if x.spare, err = x.NewRegion(RegionConfig{Name: "spare", Size: addr.PageSize, Reserved: true}); err != nil {
		tb.Fatal(err)
	}
	x.page = part(x.r, 3, 1)
	x.tracker = shadow.NewTracker(x.Memory, &x.backend, 64, nil)
	if err := x.as.Register(tb.Context(), x.tracker); err != nil {
		tb.Fatal(err)
	}
	x.as.RLock()
	defer x.as.RUnlock()
	if err := x.tracker.AddWindow(shadow.Window{Name: "ram", NPages: x.r.Range.NPages(), HVA: x.r.Range.Start}); err != nil {
		tb.Fatal(err)
	}
	x.backend.requests = 0
	return x
}

// costs is every operation on one page, or what it takes, next to the same system calls
// made directly. Each leaves the mappings as they were, so that it can be made again; the
// page is not present, so that the calls themselves are short.
var costs = []struct {
	op           Op // for two operations: what undoes the first is timed as well
	backing      Backing
	raw, tracked func(x *tracked) error
	slots        bool // the slots change, and the backend is asked to change them
	needs        int
}{
	{op: OpDiscard,
		raw:     func(x *tracked) error { return madvise(x.page, unix.MADV_DONTNEED) },
		tracked: func(x *tracked) error { return x.Discard(x.page) }},
	{op: OpFree,
		raw:     func(x *tracked) error { return madvise(x.page, unix.MADV_FREE) },
		tracked: func(x *tracked) error { return x.Free(x.page) }},
	{op: OpPageOut,
		raw:     func(x *tracked) error { return madvise(x.page, unix.MADV_PAGEOUT) },
		tracked: func(x *tracked) error { return x.PageOut(x.page) }},
	{op: OpMergeable,
		raw:     func(x *tracked) error { return madvise(x.page, unix.MADV_MERGEABLE) },
		tracked: func(x *tracked) error { return x.Mergeable(x.page) }, needs: unix.MADV_MERGEABLE},
	{op: OpUnmergeable,
		raw:     func(x *tracked) error { return madvise(x.page, unix.MADV_UNMERGEABLE) },
		tracked: func(x *tracked) error { return x.Unmergeable(x.page) }, needs: unix.MADV_MERGEABLE},
	{op: OpPopulate,
		raw:     func(x *tracked) error { return populate(x.page, true) },
		tracked: func(x *tracked) error { return x.Populate(x.page, true) }},
	{op: OpPunch, backing: Memfd,
		raw:     func(x *tracked) error { return x.extents[x.extents.find(x.page.Start)].cut(x.page).deallocate() },
		tracked: func(x *tracked) error { return x.Punch(x.page) }},
	{op: OpRemove, backing: Memfd,
		raw:     func(x *tracked) error { return madvise(x.page, unix.MADV_REMOVE) },
		tracked: func(x *tracked) error { return x.Remove(x.page) }},
	{op: OpMap,
		raw:     func(x *tracked) error { return mapFixed(x.r.mapping(x.page), nil) },
		tracked: func(x *tracked) error { return x.Map(x.page) }},
	{op: "unmap+map", slots: true,
		raw:     func(x *tracked) error { return both(reserveFixed(x.page), mapFixed(x.r.mapping(x.page), nil)) },
		tracked: func(x *tracked) error { return both(x.Unmap(x.page), x.Map(x.page)) }},
	{op: "protect+protect", slots: true,
		raw:     func(x *tracked) error { return both(mprotect(x.page, addr.Read), mprotect(x.page, addr.ReadWrite)) },
		tracked: func(x *tracked) error { return both(x.Protect(x.page, addr.Read), x.Protect(x.page, addr.ReadWrite)) }},
	{op: "guard+unguard", slots: true, needs: unix.MADV_GUARD_INSTALL,
		raw: func(x *tracked) error {
			return both(madvise(x.page, unix.MADV_GUARD_INSTALL), madvise(x.page, unix.MADV_GUARD_REMOVE))
		},
		tracked: func(x *tracked) error { return both(x.Guard(x.page), x.Unguard(x.page)) }},
	{op: "truncate+truncate", backing: Memfd, slots: true,
		raw: func(x *tracked) error {
			return both(x.r.file.Truncate(int64(x.r.Size-addr.PageSize)), x.r.file.Truncate(int64(x.r.Size)))
		},
		tracked: func(x *tracked) error {
			return both(x.Truncate(x.r, x.r.Size-addr.PageSize), x.Truncate(x.r, x.r.Size))
		}},
	{op: OpRemapKeep,
		raw:     func(x *tracked) error { return mremapKeep(x.page, x.spare.Range.Start) },
		tracked: func(x *tracked) error { return x.RemapKeep(x.page, x.spare.Range.Start) }},
	{op: "remap+remap", slots: true,
		raw: func(x *tracked) error {
			return both(both(mremapKeep(x.page, x.spare.Range.Start), reserveFixed(x.page)), both(mremapKeep(x.spare.Range, x.page.Start), reserveFixed(x.spare.Range)))
		},
		tracked: func(x *tracked) error {
			return both(x.Remap(x.page, x.spare.Range.Start), x.Remap(x.spare.Range, x.page.Start))
		}},
}

// both is errors.Join for a benchmark: it does not allocate.
func both(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// TestChangesOfContentDoNotAllocate makes each operation after which the extents are the
// same, with a tracker that follows them.
func TestChangesOfContentDoNotAllocate(t *testing.T) {
	if gvmtest.Race || gvmtest.Debug {
		gvmtest.OtherBuild(t, "checks allocate")
	}
	for _, c := range costs {
		switch c.op {
		case OpDiscard, OpFree, OpPageOut, OpUnmergeable, OpMergeable, OpPopulate, OpPunch, OpRemove:
		default:
			continue
		}
		t.Run(string(c.op), func(t *testing.T) {
			if c.needs != 0 {
				needAdvice(t, c.needs)
			}
			x := newTracked(t, c.backing)
			for range 2 * historyLen { // what is remembered grows at first
				if err := c.tracked(x); err != nil {
					t.Fatal(err)
				}
			}
			if n := testing.AllocsPerRun(100, func() { _ = c.tracked(x) }); n != 0 {
				t.Errorf("it allocates %v times, want 0", n)
			}
			if x.backend.requests != 0 {
				t.Errorf("the backend was asked %d times to change slots, want never", x.backend.requests)
			}
		})
	}
}

// BenchmarkCost times each operation next to its system calls, with a tracker that follows
// the memory and no guest: the difference is what coherence costs.
func BenchmarkCost(b *testing.B) {
	for _, c := range costs {
		for impl, do := range map[string]func(*tracked) error{"raw": c.raw, "tracked": c.tracked} {
			b.Run(fmt.Sprintf("op=%s/impl=%s", c.op, impl), func(b *testing.B) {
				if c.needs != 0 {
					needAdvice(b, c.needs)
				}
				x := newTracked(b, c.backing)
				b.ReportAllocs()
				for b.Loop() {
					if err := do(x); err != nil {
						b.Fatal(err)
					}
				}
				if asked := x.backend.requests > 0; asked != (c.slots && impl == "tracked") {
					b.Errorf("the backend was asked %d times to change slots", x.backend.requests)
				}
			})
		}
	}
}
