package mm

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// operations is every operation, on the range r of the region, or all of it if that is
// what the operation needs.
func operations(m *Memory, region *Region, r addr.HVARange, spare *Region) map[Op]func() error {
	return map[Op]func() error{
		OpUnmap:       func() error { return m.Unmap(r) },
		OpMap:         func() error { return m.Map(r) },
		OpProtect:     func() error { return m.Protect(r, addr.Read) },
		OpDiscard:     func() error { return m.Discard(r) },
		OpPunch:       func() error { return m.Punch(r) },
		OpRemap:       func() error { return m.Remap(r, spare.Range.Start) },
		OpRemapKeep:   func() error { return m.RemapKeep(r, spare.Range.Start) },
		OpFree:        func() error { return m.Free(r) },
		OpRemove:      func() error { return m.Remove(r) },
		OpPopulate:    func() error { return m.Populate(r, true) },
		OpPageOut:     func() error { return m.PageOut(r) },
		OpCollapse:    func() error { return m.Collapse(region.Range) },
		OpMergeable:   func() error { return m.Mergeable(r) },
		OpUnmergeable: func() error { return m.Unmergeable(r) },
		OpGuard:       func() error { return m.Guard(r) },
		OpUnguard:     func() error { return m.Unguard(r) },
		OpTruncate:    func() error { return m.Truncate(region, 2*addr.PageSize) },
	}
}

// TestFailedSystemCalls has the system call of each operation fail after the brackets
// were opened, because a page of the range, or the file, is not what the package knows. The
// brackets are closed, as failed; the error has the errno; and what the package knows is
// as before.
func TestFailedSystemCalls(t *testing.T) {
	for op, c := range map[Op]struct {
		backing  Backing
		file     bool // it is the file that is wrong
		guarded  bool
		brackets int
	}{
		OpMap:         {backing: Memfd, file: true, brackets: 1},
		OpProtect:     {brackets: 1},
		OpDiscard:     {brackets: 1},
		OpPunch:       {backing: Memfd, file: true, brackets: 1},
		OpRemap:       {brackets: 2},
		OpRemapKeep:   {brackets: 2},
		OpFree:        {brackets: 1},
		OpRemove:      {backing: SharedAnonymous, brackets: 1},
		OpPopulate:    {},
		OpPageOut:     {brackets: 1},
		OpCollapse:    {brackets: 1},
		OpMergeable:   {},
		OpUnmergeable: {brackets: 1},
		OpGuard:       {brackets: 1},
		OpUnguard:     {guarded: true, brackets: 1},
		OpTruncate:    {backing: MemfdPrivate, file: true, brackets: 1},
	} {
		t.Run(string(op), func(t *testing.T) {
			m, r := newMemory(t, RegionConfig{Size: addr.HugeSize, Backing: c.backing})
			spare, err := m.NewRegion(RegionConfig{Name: "spare", Size: 4 * addr.PageSize, Reserved: true})
			if err != nil {
				t.Fatal(err)
			}
			page := part(r, 3, 1)
			mustStore(t, m, page.Start, stored)
			if c.guarded || op == OpGuard {
				needAdvice(t, unix.MADV_GUARD_INSTALL)
			}
			if c.guarded {
				if err := m.Guard(part(r, 2, 3)); err != nil {
					t.Fatal(err)
				}
			}
			extents, changes := fmt.Sprint(m.Extents(r.Range), m.Extents(spare.Range)), m.Changes()
			told := &contentTold{page: page}
			register(t, m, told)
			defer told.Unregister()

			around := part(r, 2, 3)
			if op == OpRemap || op == OpRemapKeep {
				around = page // since Linux 6.17 a hole in the middle is moved along
			}
			do := operations(m, r, around, spare)[op]
			if c.file {
				err = withWrongFile(t, r, do)
			} else {
				err = withHole(t, m, page, do)
			}
			var failed *Error
			var errno syscall.Errno
			if !errors.As(err, &failed) || failed.Op != op || failed.Made || !errors.As(err, &errno) {
				t.Errorf("error is %v, want an *Error of a %s that was not made, with an errno", err, op)
			}
			if told.open != 0 || told.failed != c.brackets {
				t.Errorf("%d brackets are open, and %d have failed; want 0 and %d", told.open, told.failed, c.brackets)
			}
			if now := fmt.Sprint(m.Extents(r.Range), m.Extents(spare.Range)); now != extents || m.Changes() != changes {
				t.Errorf("extents are %s after %d changes, were %s after %d", now, m.Changes(), extents, changes)
			}
			if err := do(); err != nil && op != OpCollapse { // what fills the hole is a mapping of its own
				t.Errorf("the next one: %v", err)
			}
		})
	}
}

// withHole calls do while nothing is mapped at page, which shows anonymous memory.
func withHole(t *testing.T, m *Memory, page addr.HVARange, do func() error) error {
	t.Helper()
	x := m.Extents(page)[0]
	if err := munmap(page); err != nil {
		t.Fatal(err)
	}
	err := do()
	flags := unix.MAP_ANONYMOUS | unix.MAP_PRIVATE
	if x.object != nil {
		flags = unix.MAP_ANONYMOUS | unix.MAP_SHARED
	}
	if _, err := mmap(page, protOf(x.access), flags|unix.MAP_FIXED_NOREPLACE, -1, 0); err != nil {
		t.Fatal(err)
	}
	return err
}

// withWrongFile calls do while the region's file is one that can be neither mapped nor
// cut.
func withWrongFile(t *testing.T, region *Region, do func() error) error {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	file := region.file
	region.file, region.object.file = r, r
	err = do()
	region.file, region.object.file = file, file
	if err := errors.Join(r.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	return err
}

// TestPinned has every operation refused on a pinned region, without a word to
// subscribers, but for the one that changes nothing.
func TestPinned(t *testing.T) {
	for _, backing := range allBackings {
		m, r := newMemory(t, RegionConfig{Size: addr.HugeSize, Backing: backing, Pinned: true})
		spare, err := m.NewRegion(RegionConfig{Name: "spare", Size: addr.PageSize, Reserved: true})
		if err != nil {
			t.Fatal(err)
		}
		mustStore(t, m, part(r, 3, 1).Start, stored)
		told := &contentTold{page: r.Range}
		register(t, m, told)
		for op, do := range operations(m, r, part(r, 3, 1), spare) {
			if op == OpTruncate && !backing.hasFile() {
				continue
			}
			err := do()
			if want := error(ErrPinned); op == OpPopulate && err != nil || op != OpPopulate && !errors.Is(err, want) {
				t.Errorf("%s of pinned %v memory: %v", op, backing, err)
			}
		}
		if v, err := m.Load64(part(r, 3, 1).Start); v != stored || err != nil || len(told.content) != 0 {
			t.Errorf("%v memory is %#x (%v), and %v was announced", backing, v, err, told.content)
		}
		told.Unregister()
	}
}

// TestClosedMemory has every operation refused after Close, while a user is left.
func TestClosedMemory(t *testing.T) {
	m := New(nil)
	r, err := m.NewRegion(RegionConfig{Name: "closed", Size: addr.HugeSize, Backing: Memfd})
	if err != nil || !m.as.TryGetUser() {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for op, do := range operations(m, r, part(r, 3, 1), r) {
		if err := do(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s of closed memory: %v", op, err)
		}
	}
	if err := m.Truncate(r, r.Size); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a truncate that does nothing: %v", err)
	}
	if err := m.as.PutUser(); err != nil {
		t.Fatal(err)
	}
}

// TestTruncateErrors: sizes that are none, and regions that cannot be truncated.
func TestTruncateErrors(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Backing: Memfd})
	_, other := newMemory(t, RegionConfig{Backing: Memfd})
	shared, err := m.NewRegion(RegionConfig{Name: "shared", Size: addr.PageSize, Backing: SharedAnonymous})
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		r    *Region
		size uint64
	}{
		"half a page":            {r, addr.PageSize / 2},
		"more than the region":   {r, r.Size + addr.PageSize},
		"more than there is":     {r, 1 << 63},
		"of another memory":      {other, addr.PageSize},
		"of one without a file":  {shared, 0},
		"as it is, but not ours": {other, other.Size},
	} {
		if err := m.Truncate(tt.r, tt.size); !errors.Is(err, unix.EINVAL) {
			t.Errorf("truncate to %s: %v, want EINVAL", name, err)
		}
	}
	if err := m.Truncate(r, r.Size); err != nil || m.Changes() != 0 {
		t.Errorf("truncate to the same size: %v, %d changes", err, m.Changes())
	}
}

// TestFailedMoveLeavesNoHole moves pages that are several mappings, which Linux does since
// 6.17, and where it does not, has the target unmapped.
func TestFailedMoveLeavesNoHole(t *testing.T) {
	for name, move := range map[string]func(*Memory, addr.HVARange, addr.HVA) error{"remap": (*Memory).Remap, "remap-keep": (*Memory).RemapKeep} {
		t.Run(name, func(t *testing.T) {
			m, r := newMemory(t, RegionConfig{})
			target := part(r, 8, 2)
			mustStore(t, m, target.Start, 7)
			if err := m.Protect(part(r, 1, 1), addr.Read); err != nil {
				t.Fatal(err)
			}
			err := move(m, part(r, 0, 2), target.Start)
			t.Logf("the move of two mappings: %v", err)
			if hole, err := reserveHole(target); hole || err != nil {
				t.Errorf("there is a hole at the target: %v, %v", hole, err)
			}
			mapped := true
			for _, x := range m.Extents(target) {
				mapped = mapped && x.Mapped
			}
			v, loadErr := m.Load64(target.Start)
			switch {
			case err == nil && (loadErr != nil || v != 0):
				t.Errorf("after the move the target has %#x, %v", v, loadErr)
			case err != nil && mapped != (loadErr == nil):
				t.Errorf("the target is said to be mapped: %v, and a load of it gives %#x, %v", mapped, v, loadErr)
			case err != nil && mapped && v != 7:
				t.Errorf("the target is said to be as it was, and has %#x", v)
			}
			if err := m.Map(target); err != nil {
				t.Error(err)
			}
			mustStore(t, m, target.Start, 8)
		})
	}
}
