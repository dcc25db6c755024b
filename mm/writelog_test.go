package mm

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/hostmem"
)

// newWriteLog returns a log that is closed with the test.
func newWriteLog(t testing.TB, backing Backing) *WriteLog {
	t.Helper()
	gvmtest.Need(t, gvmtest.UFFD)
	l, err := NewWriteLog(backing)
	if err != nil {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// take returns the numbers of the pages of r that a Take tells of.
func take(t testing.TB, l *WriteLog, r *Region) (told []int) {
	t.Helper()
	err := l.Take(r.Range, func(run addr.HVARange) {
		for hva := run.Start; hva < run.End; hva += addr.PageSize {
			told = append(told, int(hva-r.Range.Start)>>addr.PageShift)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return told
}

func TestWriteLog(t *testing.T) {
	for backing := Anonymous; backing <= MemfdPrivate; backing++ {
		t.Run(backing.String(), func(t *testing.T) {
			m, r := newMemory(t, RegionConfig{Backing: backing})
			l := newWriteLog(t, backing)
			mustStore(t, m, part(r, 1, 1).Start, 1)
			if err := l.Begin(r.Range); err != nil {
				t.Fatal(err)
			}
			want := func(what string, pages ...int) {
				t.Helper()
				if told := take(t, l, r); !slices.Equal(told, pages) {
					t.Errorf("%s: told of %v, want %v", what, told, pages)
				}
			}
			want("nothing was stored since")
			mustStore(t, m, part(r, 1, 1).Start, 2) // a page that was there
			mustStore(t, m, part(r, 4, 1).Start, 2) // and one that was not
			want("two pages were stored to", 1, 4)
			want("they have been told of")
			mem, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			if _, err := mem.WriteAt([]byte{3}, int64(part(r, 4, 1).Start)); err != nil {
				t.Fatal(err)
			}
			want("the kernel stored to a page", 4)
			if err := m.Map(part(r, 8, 2)); err != nil {
				t.Fatal(err)
			}
			mustStore(t, m, part(r, 9, 1).Start, 4)
			if told := take(t, l, r); !slices.Contains(told, 9) || slices.Min(told) < 8 || slices.Max(told) > 9 {
				t.Errorf("two pages were mapped anew and one of them, 9, stored to: told of %v", told)
			}
			mustStore(t, m, part(r, 9, 1).Start, 5)
			want("and again, now that it is", 9)
			if err := m.Protect(part(r, 9, 1), addr.Read); err != nil {
				t.Fatal(err)
			}
			want("a page is read-only")
		})
	}
}

// TestWriteLogIsComplete stores to pages and changes their mappings at random, and wants
// every page told of whose content has changed by a store.
func TestWriteLogIsComplete(t *testing.T) {
	for backing := Anonymous; backing <= MemfdPrivate; backing++ {
		t.Run(backing.String(), func(t *testing.T) {
			rng := gvmtest.Rand(t)
			m, r := newMemory(t, RegionConfig{Backing: backing})
			l := newWriteLog(t, backing)
			if err := l.Begin(r.Range); err != nil {
				t.Fatal(err)
			}
			var stored [pages]bool
			told, stores := 0, 0
			for step := range 2000 {
				page := rng.Uint64N(pages - 1)
				one, two := part(r, page, 1), part(r, page, 2)
				var err error
				switch rng.IntN(9) {
				case 0:
					err = m.Discard(two)
					if backing == Anonymous || backing.private() { // what was stored is lost, as is announced
						stored[page], stored[page+1] = false, false
					}
				case 1:
					err = m.Map(two)
					if backing != Memfd {
						stored[page], stored[page+1] = false, false
					}
				case 2:
					err = m.PageOut(two)
				case 3:
					_, err = hostmem.Load64(one.Start)
				case 4:
					// The page moves away and comes back, as written as it was.
					other := part(r, pages-1, 1)
					err = m.Remap(one, other.Start)
					if err == nil {
						err = m.Remap(other, one.Start)
					}
					stored[pages-1] = false
					if err == nil {
						err = m.Map(other)
					}
				case 5:
					var missed []int
					got := take(t, l, r)
					told += len(got)
					for i, was := range stored {
						if was && !slices.Contains(got, i) {
							missed = append(missed, i)
						}
					}
					if missed != nil {
						t.Fatalf("step %d: told of %v; stored to were %v as well", step, got, missed)
					}
					stored = [pages]bool{}
				default:
					err = m.Store64(one.Start, rng.Uint64())
					stored[page] = true
					stores++
				}
				if err != nil {
					t.Fatal(fmt.Errorf("step %d: %w", step, err))
				}
			}
			t.Logf("%d stores, told of %d pages", stores, told)
		})
	}
}

// TestWriteLogBesideRemap moves a page next to others, which become one mapping with it.
// Linux has that unregistered as a whole, since 6.17, and goes on to mark what is stored to
// there as not written.
func TestWriteLogBesideRemap(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	l := newWriteLog(t, Anonymous)
	if err := l.Begin(r.Range); err != nil {
		t.Fatal(err)
	}
	const last, beside = pages - 1, pages - 2
	there := func(page uint64) { // and back
		t.Helper()
		here, end := part(r, page, 1), part(r, last, 1)
		if err := errors.Join(m.Remap(here, end.Start), m.Remap(end, here.Start), m.Map(end)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Store64(part(r, 4, 1).Start, 1); err != nil {
		t.Fatal(err)
	}
	there(beside)
	if err := m.Map(part(r, 0, 2)); err != nil {
		t.Fatal(err)
	}
	there(0)
	take(t, l, r)
	if _, err := hostmem.Load64(part(r, beside, 1).Start); err != nil {
		t.Fatal(err)
	}
	there(0)
	if err := m.Store64(part(r, beside, 1).Start, 7); err != nil {
		t.Fatal(err)
	}
	if got := take(t, l, r); !slices.Contains(got, beside) {
		t.Errorf("told of %v, without page %d", got, beside)
	}
}

func TestWriteLogErrors(t *testing.T) {
	l := newWriteLog(t, Anonymous)
	hole := addr.HVAs(16*addr.PageSize, addr.PageSize) // below what a process may map
	if err := l.Begin(hole); err == nil {
		t.Error("a log begins where nothing is mapped")
	}
	_, r := newMemory(t, RegionConfig{})
	other, err := NewWriteLog(Anonymous)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Begin(r.Range); err != nil {
		t.Fatal(err)
	}
	second := newWriteLog(t, Anonymous)
	if err := second.Begin(r.Range); !errors.Is(err, unix.EBUSY) {
		t.Errorf("two logs of one memory: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := other.Begin(r.Range); err == nil {
		t.Error("a closed log begins")
	}
	if err := second.Begin(r.Range); err != nil {
		t.Errorf("after the other one was closed: %v", err)
	}
}
