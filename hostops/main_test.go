package hostops

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

var backings = []mm.Backing{mm.Anonymous, mm.Memfd, mm.SharedAnonymous, mm.MemfdPrivate, mm.File, mm.FilePrivate}

// guest is memory as a machine has it, without vCPUs.
type guest struct {
	Target
	tracker *shadow.Tracker
}

// guestConfig describes a guest.
type guestConfig struct {
	backing      mm.Backing
	pages, spare uint64 // 0 pages: 16
}

// noBackend is a hypervisor that takes any slot.
type noBackend struct{}

func (noBackend) Hold()                                    {}
func (noBackend) Release()                                 {}
func (noBackend) CreateSlot(shadow.Slot) error             { return nil }
func (noBackend) DeleteSlot(shadow.Slot) error             { return nil }
func (noBackend) ChangeSlot(_, _ shadow.Slot) error        { return nil }
func (noBackend) DirtyLog([]shadow.Slot, *dirty.Set) error { return nil }

// firstGFN is the frame of page 0.
const firstGFN = addr.GFN(0x200)

func gpaOf(page, offset uint64) addr.GPA {
	return (firstGFN + addr.GFN(page)).GPA() + addr.GPA(offset)
}

func newGuest(t testing.TB, c guestConfig) *guest {
	t.Helper()
	if c.pages == 0 {
		c.pages = 16
	}
	g := &guest{Target: Target{Memory: mm.New(nil)}}
	t.Cleanup(func() {
		if err := g.Memory.Close(); err != nil {
			t.Error(err)
		}
	})
	region := func(r mm.RegionConfig) *mm.Region {
		if c.backing == mm.File || c.backing == mm.FilePrivate {
			f, err := os.Create(filepath.Join(t.TempDir(), r.Name))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(int64(r.Size)); err != nil {
				t.Fatal(err)
			}
			r.File = f
		}
		region, err := g.Memory.NewRegion(r)
		if err != nil {
			t.Fatal(err)
		}
		return region
	}
	g.RAM = region(mm.RegionConfig{Name: "ram", Size: c.pages * addr.PageSize, Backing: c.backing})
	if c.spare > 0 {
		g.Spare = region(mm.RegionConfig{Name: "spare", Size: c.spare * addr.PageSize, Backing: c.backing, Reserved: true})
	}
	g.tracker = shadow.NewTracker(g.Memory, noBackend{}, 1<<15, nil)
	as := g.Memory.AddressSpace()
	if err := as.Register(context.Background(), g.tracker); err != nil {
		t.Fatal(err)
	}
	as.RLock()
	defer as.RUnlock()
	if err := g.tracker.AddWindow(shadow.Window{Name: "ram", GFN: firstGFN, NPages: c.pages, HVA: g.RAM.Range.Start}); err != nil {
		t.Fatal(err)
	}
	g.HVA = func(page uint64) (addr.HVA, bool) { return g.tracker.Slots().HVA(gpaOf(page, 0)) }
	g.Store64 = func(page, offset, value uint64) error {
		return g.tracker.Table().Store64(gpaOf(page, offset), value)
	}
	g.Write = func(page, offset uint64, p []byte) error {
		_, err := g.tracker.Table().WriteAt(p, int64(gpaOf(page, offset)))
		return err
	}
	return g
}

// read returns the first word of a page.
func (g *guest) read(page uint64) (uint64, error) { return g.tracker.Table().Load64(gpaOf(page, 0)) }

// number stores its number plus 1 in each page.
func (g *guest) number(t testing.TB) {
	t.Helper()
	for page := range g.pages() {
		if err := g.Store64(page, 0, page+1); err != nil {
			t.Fatal(err)
		}
	}
}

// state describes each page: the first word, "ro" and the word, "-" if it may not be used,
// "." if nothing is mapped, with "'" behind it if the page is in the spare region.
func (g *guest) state(t testing.TB) (s []string) {
	t.Helper()
	for page := range g.pages() {
		hva, ok := g.HVA(page)
		if !ok {
			t.Fatalf("there is no page %d", page)
		}
		this := addr.HVAs(hva, addr.PageSize)
		x := g.Memory.Extents(this)[0]
		v, err := g.read(page)
		var text string
		switch {
		case !x.Mapped:
			text = "."
		case x.Access == addr.NoAccess:
			text = "-"
		case err != nil:
			t.Fatal(err)
		case x.Access == addr.Read:
			text = fmt.Sprintf("ro%d", v)
		default:
			text = fmt.Sprint(v)
		}
		if g.inSpare(this) {
			text += "'"
		}
		s = append(s, text)
	}
	return s
}

// verify reports what Restore has to have brought about and has not.
func (g *guest) verify(t testing.TB) {
	t.Helper()
	for page := range g.pages() {
		hva, _ := g.HVA(page)
		if want := g.home(Range{page, page + 1}).Start; hva != want {
			t.Errorf("page %d is at %v, not at home, %v", page, hva, want)
		}
		value := 1_000_000 + page
		if err := g.Store64(page, 0, value); err != nil {
			t.Errorf("page %d: %v", page, err)
		}
	}
	for page := range g.pages() { // after all stores, so that no two pages are one
		if v, err := g.read(page); v != 1_000_000+page || err != nil {
			t.Errorf("page %d reads %d (%v), want what was stored to it, %d", page, v, err, 1_000_000+page)
		}
	}
	for _, x := range g.Memory.Extents(g.RAM.Range) {
		if x.Access != addr.ReadWrite {
			t.Errorf("left: %v", x)
		}
	}
	if g.Spare != nil {
		for _, x := range g.Memory.Extents(g.Spare.Range) {
			if x.Mapped {
				t.Errorf("left in the spare region: %v", x)
			}
		}
	}
	if f := g.RAM.File(); f != nil {
		if info, err := f.Stat(); err != nil || uint64(info.Size()) != g.RAM.Size {
			t.Errorf("the file has %d bytes (%v), want %d", info.Size(), err, g.RAM.Size)
		}
	}
	if err := g.tracker.Slots().Check(); err != nil {
		t.Error(err)
	}
	if n := g.tracker.Slots().Len(); n != 1 {
		t.Errorf("RAM is in %d slots, want 1", n)
	}
}

// mustRunner returns a runner.
func mustRunner(t testing.TB, c Config) *Runner {
	t.Helper()
	r, err := NewRunner(c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// mustParse returns the script with that text.
func mustParse(t testing.TB, text string) *Script {
	t.Helper()
	s, err := Parse("ops.txt", text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
