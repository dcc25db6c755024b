package mm

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

// newPageTables opens the page tables of a memory, and skips the test where the kernel
// does not show them.
func newPageTables(t testing.TB, m *Memory) *PageTables {
	t.Helper()
	p, err := m.PageTables()
	if errors.Is(err, unix.ENOTTY) {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// ptes describes what Walk yields for the pages of r: "-" absent, "r" and "w" present,
// "s" swapped, in capitals if huge; and "." where there is no region.
func (p *PageTables) ptes(t testing.TB, r addr.HVARange) string {
	t.Helper()
	p.m.as.RLock()
	defer p.m.as.RUnlock()
	var s []byte
	for at := r.Start; at < r.End; {
		region, _, attrs := p.Region(at)
		part := region.Intersect(addr.HVARange{Start: at, End: r.End})
		if attrs == 0 {
			s = append(s, strings.Repeat(".", int(part.NPages()))...)
			at = part.End
			continue
		}
		err := p.Walk(part, nil, func(run addr.HVARange, pfn addr.PFN, pte uint32) bool {
			if run.Start != at || run.Empty() || run.End > part.End || pfn != 0 {
				t.Errorf("Walk of %v yields %v, %v after %v", part, run, pfn, at)
			}
			at = run.End
			c := "-"
			switch {
			case pte&PTESwapped != 0:
				c = "s"
			case pte&PTEWritable != 0:
				c = "w"
			case pte&PTEPresent != 0:
				c = "r"
			}
			if pte&PTEHuge != 0 {
				c = strings.ToUpper(c)
			}
			s = append(s, strings.Repeat(c, int(run.NPages()))...)
			return true
		})
		if err != nil || at != part.End {
			t.Fatalf("Walk of %v ends at %v: %v", part, at, err)
		}
	}
	return string(s)
}

// smallPages has the kernel use none but base pages for r.
func smallPages(t *testing.T, r addr.HVARange) {
	t.Helper()
	if err := madvise(r, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: there are no huge pages
		t.Fatal(err)
	}
}

// TestPageTables has pages come and go, and compares what is shown of them. Around a fault
// in a file of its own a file system maps as much as it likes.
func TestPageTables(t *testing.T) {
	for _, backing := range []Backing{Anonymous, Memfd, SharedAnonymous, MemfdPrivate} {
		t.Run(backing.String(), func(t *testing.T) {
			m, r := newMemory(t, RegionConfig{Backing: backing, Size: 6 * addr.PageSize})
			smallPages(t, r.Range)
			p := newPageTables(t, m)
			for _, step := range []struct {
				name string
				do   func() error
				want string
			}{
				{"at first", nil, "------"},
				{"written to", func() error { return m.Store64(part(r, 1, 1).Start, 1) }, "-w----"},
				{"faulted in to write", func() error { return p.Fault(part(r, 3, 2), true, false) }, "-w-ww-"},
				{"and again", func() error { return p.Fault(part(r, 3, 2), true, true) }, "-w-ww-"},
				{"protected", func() error { return m.Protect(part(r, 4, 2), addr.Read) }, "-w-wr-"},
				{"unmapped", func() error { return m.Unmap(part(r, 1, 2)) }, "-..wr-"},
			} {
				if step.do != nil {
					if err := step.do(); err != nil {
						t.Fatalf("%s: %v", step.name, err)
					}
				}
				got := p.ptes(t, r.Range)
				if got != step.want {
					t.Errorf("%s: pages are %q, want %q", step.name, got, step.want)
				}
			}
		})
	}
}

// TestPageTablesFaultToRead loads, which on some kernels maps the zero page. A store to
// that would reach another one, so it is not writable.
func TestPageTablesFaultToRead(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	smallPages(t, r.Range)
	p := newPageTables(t, m)
	if err := p.Fault(part(r, 0, 2), false, false); err != nil {
		t.Fatal(err)
	}
	if got := p.ptes(t, part(r, 0, 3)); got != "rr-" && got != "ww-" {
		t.Errorf("after loads pages are %q", got)
	}
	if err := p.Fault(part(r, 0, 1), true, false); err != nil {
		t.Fatal(err)
	}
	if got := p.ptes(t, part(r, 0, 1)); got != "w" {
		t.Errorf("after a store a page is %q", got)
	}
	if v, err := m.Load64(r.Range.Start); v != 0 || err != nil {
		t.Errorf("a page that was faulted in has %d, %v", v, err)
	}
}

// TestPageTablesOfPrivateFiles: a store to a page of the file would reach a copy, so it is
// not writable; the copy is, until it is dropped. A guard is no page at all.
func TestPageTablesOfPrivateFiles(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Backing: MemfdPrivate, Size: 4 * addr.PageSize})
	p := newPageTables(t, m)
	if _, err := r.File().WriteAt(make([]byte, r.Size), 0); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return m.Populate(r.Range, false) }, "rrrr"},
		{func() error { return m.Populate(part(r, 1, 2), true) }, "rwwr"},
		{func() error { return errors.Join(m.Discard(part(r, 0, 2)), m.Populate(part(r, 1, 1), false)) }, "?rwr"},
		{func() error { return m.Truncate(r, addr.PageSize) }, "?---"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		got := p.ptes(t, r.Range)
		if step.want[0] == '?' { // a fault maps neighbours that are in the page cache
			got = "?" + got[1:]
		}
		if got != step.want {
			t.Errorf("pages are %q, want %q", got, step.want)
		}
	}
	needAdvice(t, unix.MADV_GUARD_INSTALL)
	if err := m.Guard(part(r, 0, 1)); err != nil {
		t.Fatal(err)
	}
	if got := p.ptes(t, r.Range); got != "s---" {
		t.Errorf("pages are %q, the first of which is guarded", got)
	}
}

// TestPageTablesRuns walks more runs than one scan reports, and ends a walk early.
func TestPageTablesRuns(t *testing.T) {
	const n = 150
	m, r := newMemory(t, RegionConfig{Size: n * addr.PageSize})
	smallPages(t, r.Range)
	p := newPageTables(t, m)
	want := ""
	for i := range uint64(n) {
		if i%2 == 1 {
			mustStore(t, m, part(r, i, 1).Start, i)
		}
		want += string("-w"[i%2])
	}
	if got := p.ptes(t, r.Range); got != want {
		t.Errorf("pages are %q", got)
	}
	for _, stop := range []int{1, 2, n - 1} {
		calls := 0
		m.as.RLock()
		err := p.Walk(r.Range, nil, func(addr.HVARange, addr.PFN, uint32) bool { calls++; return calls < stop })
		m.as.RUnlock()
		if calls != stop || err != nil {
			t.Errorf("Walk calls %d times, want %d: %v", calls, stop, err)
		}
	}
}

// TestPageTablesRegions: regions are the extents that are mapped, and the gaps between
// them.
func TestPageTablesRegions(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Size: 6 * addr.PageSize})
	p := newPageTables(t, m)
	if err := errors.Join(m.Unmap(part(r, 2, 1)), m.Protect(part(r, 3, 1), addr.Read), m.Protect(part(r, 4, 1), addr.NoAccess)); err != nil {
		t.Fatal(err)
	}
	const end = ^addr.HVA(0) &^ addr.PageMask
	for _, tt := range []struct {
		hva    addr.HVA
		r      addr.HVARange
		access addr.Access
		attrs  uint32
	}{
		{r.Range.Start - 1, addr.HVARange{Start: r.Range.Start - addr.PageSize, End: r.Range.Start}, addr.NoAccess, 0},
		{r.Range.Start, part(r, 0, 2), addr.ReadWrite, RegionMapped},
		{part(r, 1, 1).Start + 5, part(r, 0, 2), addr.ReadWrite, RegionMapped},
		{part(r, 2, 1).Start, part(r, 2, 1), addr.NoAccess, 0},
		{part(r, 3, 1).Start, part(r, 3, 1), addr.Read, RegionMapped},
		{part(r, 4, 1).Start, part(r, 4, 1), addr.NoAccess, RegionMapped},
		{part(r, 5, 1).Start, part(r, 5, 1), addr.ReadWrite, RegionMapped},
		{r.Range.End, addr.HVARange{Start: r.Range.End, End: end}, addr.NoAccess, 0},
	} {
		m.as.RLock()
		got, access, attrs := p.Region(tt.hva)
		m.as.RUnlock()
		if got != tt.r || access != tt.access || attrs != tt.attrs {
			t.Errorf("the region of %v is %v, %v, %d; want %v, %v, %d", tt.hva, got, access, attrs, tt.r, tt.access, tt.attrs)
		}
	}
}

// TestPageTablesFaultErrors has faults fail that an access would fail with.
func TestPageTablesFaultErrors(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Size: 4 * addr.PageSize})
	p := newPageTables(t, m)
	if err := errors.Join(m.Protect(part(r, 1, 1), addr.Read), m.Unmap(part(r, 2, 1))); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		r     addr.HVARange
		write bool
		want  error
	}{
		"a store to what is read-only":  {part(r, 1, 1), true, unix.EINVAL},
		"a load from a reservation":     {part(r, 2, 1), false, unix.EINVAL},
		"where the kernel has nothing":  {addr.HVAs(1<<46, addr.PageSize), false, unix.ENOMEM},
		"what is not aligned":           {addr.HVAs(r.Range.Start+1, addr.PageSize), false, unix.EINVAL},
		"a load from what is read-only": {part(r, 1, 1), false, nil},
	} {
		for _, nonblocking := range []bool{false, true} {
			if err := p.Fault(tt.r, tt.write, nonblocking); !errors.Is(err, tt.want) {
				t.Errorf("%s, nonblocking %v: the error is %v, want %v", name, nonblocking, err, tt.want)
			}
		}
	}
}

// TestPageTablesSwapped writes a page out, where there is swap, and has a fault that must
// not block say that it would.
func TestPageTablesSwapped(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	smallPages(t, r.Range)
	p := newPageTables(t, m)
	mustStore(t, m, r.Range.Start, 7)
	if err := madvise(part(r, 0, 1), unix.MADV_PAGEOUT); err != nil {
		gvmtest.Lack(t, gvmtest.Advice, err)
	}
	if got := p.ptes(t, part(r, 0, 1)); got != "s" {
		gvmtest.Lack(t, gvmtest.Swap, fmt.Errorf("after MADV_PAGEOUT the page is %q", got))
	}
	if err := p.Fault(part(r, 0, 2), false, true); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a fault that would have to wait returns %v", err)
	}
	if err := p.Fault(part(r, 0, 2), false, false); err != nil {
		t.Error(err)
	}
	if v, err := m.Load64(r.Range.Start); v != 7 || err != nil {
		t.Errorf("what comes from swap is %d, %v", v, err)
	}
}

// TestPageTablesAfterClose: a memory that has been closed has no regions.
func TestPageTablesAfterClose(t *testing.T) {
	m := New(nil)
	r, err := m.NewRegion(RegionConfig{Name: "closed", Size: addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	p := newPageTables(t, m)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, access, attrs := p.Region(r.Range.Start); access != addr.NoAccess || attrs != 0 {
		t.Errorf("a page of a closed memory is in a region: %v, %d", access, attrs)
	}
}

// TestHugePages: a huge page is shown as one, where the kernel has one to give.
func TestHugePages(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Size: addr.HugeSize})
	p := newPageTables(t, m)
	if err := madvise(r.Range, unix.MADV_HUGEPAGE); err != nil {
		gvmtest.Lack(t, gvmtest.HugePages, err)
	}
	if err := p.Fault(part(r, 3, 1), true, false); err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, c := range p.ptes(t, r.Range) {
		got[string(c)]++
	}
	if diff := cmp.Diff(map[string]int{"W": addr.HugeSize / addr.PageSize}, got); diff != "" {
		gvmtest.Lack(t, gvmtest.HugePages, fmt.Errorf("after one fault there are %v", got))
	}
	if got := p.ptes(t, part(r, 5, 2)); got != "WW" {
		t.Errorf("a part of a huge page is %q", got)
	}
}

// BenchmarkPageTables times a walk of pages that are all present, and a fault that brings
// in as many, which are dropped in between, next to loads that do the same.
func BenchmarkPageTables(b *testing.B) {
	const n = 512
	m, r := newMemory(b, RegionConfig{Size: n * addr.PageSize})
	p := newPageTables(b, m)
	if err := madvise(r.Range, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		b.Fatal(err)
	}
	touch := func() error {
		for i := range uint64(n) {
			if err := m.Store64(part(r, i, 1).Start, 1); err != nil {
				return err
			}
		}
		return nil
	}
	drop := func() error { return madvise(r.Range, unix.MADV_DONTNEED) }
	if err := touch(); err != nil {
		b.Fatal(err)
	}
	for _, bb := range []struct {
		name string
		do   func() error
	}{
		{"op=walk", func() error {
			return p.Walk(r.Range, nil, func(addr.HVARange, addr.PFN, uint32) bool { return true })
		}},
		{"op=fault/impl=populate", func() error { return errors.Join(p.Fault(r.Range, true, false), drop()) }},
		{"op=fault/impl=stores", func() error { return errors.Join(touch(), drop()) }},
	} {
		b.Run(fmt.Sprintf("%s/pages=%d", bb.name, n), func(b *testing.B) {
			for b.Loop() {
				if err := bb.do(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/page")
		})
	}
}
