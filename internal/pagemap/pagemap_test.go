package pagemap

import (
	"errors"
	"io/fs"
	"reflect"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/uffd"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

// open opens the page map, and skips the test where the kernel cannot scan it.
func open(t *testing.T) *PageMap {
	t.Helper()
	p, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if _, _, err := p.Scan(Request{}, nil); errors.Is(err, unix.ENOTTY) {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	return p
}

// page is the range of page i of r.
func page(r addr.HVARange, i int) addr.HVARange {
	return addr.HVAs(r.Start+addr.HVA(i*addr.PageSize), addr.PageSize)
}

func scan(t *testing.T, p *PageMap, req Request) []Region {
	t.Helper()
	regions := make([]Region, 8)
	n, end, err := p.Scan(req, regions)
	if err != nil {
		t.Fatal(err)
	}
	if end != req.Range.End {
		t.Fatalf("Scan(%+v) ended at %v", req, end)
	}
	return regions[:n]
}

func TestLayout(t *testing.T) {
	if reqScan != 0xc0606610 {
		t.Errorf("request is %#x, want %#x", reqScan, 0xc0606610)
	}
	for typ, want := range map[reflect.Type][]uintptr{
		reflect.TypeFor[scanArg](): {0, 8, 16, 32, 40, 48, 56, 64, 72, 80, 88}, // 16 is start and end
		reflect.TypeFor[Region]():  {0, 16},
	} {
		var offsets []uintptr
		for f := range typ.Fields() {
			offsets = append(offsets, f.Offset)
		}
		if !slices.Equal(offsets, want) || typ.Size() != want[len(want)-1]+8 {
			t.Errorf("%v has offsets %v and size %d, want %v", typ, offsets, typ.Size(), want)
		}
	}
}

func TestCategoriesString(t *testing.T) {
	for c, want := range map[Categories]string{
		0:                   "none",
		WPAllowed | Swapped: "wpallowed|swapped",
		SoftDirty | 1<<8:    "soft-dirty|0x100",
	} {
		if got := c.String(); got != want {
			t.Errorf("Categories(%#x).String() = %q, want %q", uint64(c), got, want)
		}
	}
}

// memfd returns a file in memory of npages, closed with the test.
func memfd(t *testing.T, npages int) (fd int) {
	t.Helper()
	fd, err := unix.MemfdCreate("pagemap-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(npages*addr.PageSize)); err != nil {
		t.Fatal(err)
	}
	return fd
}

// loadMaps returns what a load maps where nothing was stored in anonymous memory:
// the zero page, except on kernels that keep it from user space.
func loadMaps(t *testing.T, p *PageMap) Categories {
	t.Helper()
	b, m := mapPages(t, 2, -1, unix.MAP_PRIVATE)
	b[addr.PageSize] = b[0]
	regions := scan(t, p, Request{Range: page(m, 0), All: Present, Report: Present | PFNZero})
	if len(regions) != 1 {
		t.Fatalf("after a load: %v, want one region", regions)
	}
	return regions[0].Categories
}

func TestScanCategories(t *testing.T) {
	p := open(t)
	fd := memfd(t, 4)
	for name, tt := range map[string]struct {
		fd, sharing    int
		loaded, stored Categories
	}{
		"anonymous":     {-1, unix.MAP_PRIVATE, loadMaps(t, p), Present},
		"memfd shared":  {fd, unix.MAP_SHARED, Present | File, Present | File},
		"memfd private": {fd, unix.MAP_PRIVATE, Present | File, Present},
	} {
		t.Run(name, func(t *testing.T) {
			b, m := mapPages(t, 4, tt.fd, tt.sharing)
			b[3*addr.PageSize] = b[addr.PageSize] + 1
			want := []Region{
				{page(m, 0), 0}, {page(m, 1), tt.loaded}, {page(m, 2), 0}, {page(m, 3), tt.stored},
			}
			got := scan(t, p, Request{Range: m, Report: Present | Swapped | File | PFNZero | Huge})
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func TestScanSelects(t *testing.T) {
	p := open(t)
	b, m := mapPages(t, 3, memfd(t, 3), unix.MAP_PRIVATE)
	b[2*addr.PageSize] = b[addr.PageSize] + 1 // the load maps the file's page, the store copies it

	for name, tt := range map[string]struct {
		req  Request
		want []Region
	}{
		"all":      {Request{All: Present | File, Report: Present}, []Region{{page(m, 1), Present}}},
		"any":      {Request{Any: File | Huge, Report: File}, []Region{{page(m, 1), File}}},
		"inverted": {Request{All: Present | File, Inverted: File, Report: Present}, []Region{{page(m, 2), Present}}},
		"merged": {Request{All: Present, Report: Present},
			[]Region{{addr.HVARange{Start: page(m, 1).Start, End: m.End}, Present}}},
		"none": {Request{All: Swapped}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			tt.req.Range = m
			if got := scan(t, p, tt.req); !slices.Equal(got, tt.want) {
				t.Errorf("Scan(%+v) = %v, want %v", tt.req, got, tt.want)
			}
		})
	}
}

func TestScanResumes(t *testing.T) {
	p := open(t)
	b, m := mapPages(t, 8, -1, unix.MAP_PRIVATE)
	var got, want []addr.HVARange
	for i := 0; i < 8; i += 2 {
		b[i*addr.PageSize] = 1
		want = append(want, page(m, i))
	}
	for r, region := m, make([]Region, 1); !r.Empty(); {
		n, end, err := p.Scan(Request{Range: r, All: Present}, region)
		if err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			got = append(got, region[0].Range)
		}
		r.Start = end
	}
	if !slices.Equal(got, want) {
		t.Errorf("one region at a time: %v, want %v", got, want)
	}
}

// openUFFD returns a userfaultfd that tracks writes, closed with the test.
func openUFFD(t *testing.T) *uffd.FD {
	t.Helper()
	gvmtest.Need(t, gvmtest.UFFD)
	u, err := uffd.Open(uffd.WPAsync)
	if errors.Is(err, unix.EINVAL) {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	return u
}

// TestScanWritten follows one page through protection and a store.
func TestScanWritten(t *testing.T) {
	p, u := open(t), openUFFD(t)
	b, m := mapPages(t, 4, -1, unix.MAP_PRIVATE)
	for i := 0; i < len(b); i += addr.PageSize {
		b[i] = 1
	}
	written := Request{Range: m, All: Written, Report: Written}
	protect := Request{Range: m, All: Written, Flags: WPMatching | CheckWPAsync}
	all := []Region{{m, Written}}

	if _, _, err := p.Scan(protect, nil); !errors.Is(err, unix.EPERM) {
		t.Errorf("CheckWPAsync before registration: %v, want EPERM", err)
	}
	if got := scan(t, p, written); !slices.Equal(got, all) {
		t.Errorf("before registration: %v, want %v", got, all)
	}
	if err := u.Register(m, uffd.ModeWP); err != nil {
		t.Fatal(err)
	}
	if got := scan(t, p, written); !slices.Equal(got, all) {
		t.Errorf("before protection: %v, want %v", got, all)
	}
	scan(t, p, protect)
	if got := scan(t, p, written); len(got) != 0 {
		t.Errorf("protected: %v, want none", got)
	}
	b[2*addr.PageSize] = 2
	if got, want := scan(t, p, written), []Region{{page(m, 2), Written}}; !slices.Equal(got, want) {
		t.Errorf("after a store: %v, want %v", got, want)
	}
}

// TestScanPassesOver protects a range of which one half is not registered.
func TestScanPassesOver(t *testing.T) {
	p, u := open(t), openUFFD(t)
	b, m := mapPages(t, 2, -1, unix.MAP_PRIVATE)
	b[0], b[addr.PageSize] = 1, 1
	if err := u.Register(page(m, 0), uffd.ModeWP); err != nil {
		t.Fatal(err)
	}
	scan(t, p, Request{Range: m, All: Written, Flags: WPMatching})
	got := scan(t, p, Request{Range: m, All: Present, Report: WPAllowed | Written})
	if want := []Region{{page(m, 0), WPAllowed}, {page(m, 1), Written}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestScanErrors(t *testing.T) {
	p := open(t)
	_, m := mapPages(t, 1, -1, unix.MAP_PRIVATE)
	odd := addr.HVARange{Start: m.Start + 1, End: m.End}
	if _, _, err := p.Scan(Request{Range: odd}, nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Scan of %v: %v, want EINVAL", odd, err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := p.Scan(Request{Range: m}, nil); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Scan after Close: %v, want %v", err, fs.ErrClosed)
	}
}
