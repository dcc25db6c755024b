package mm

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/secondmmu/gvm/addr"
)

// TestIdleLog uses one page of three.
func TestIdleLog(t *testing.T) {
	l, err := NewIdleLog()
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrPermission) {
		t.Logf("not here: %v", err) // which is all there is to see
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	m, r := newMemory(t, RegionConfig{})
	if err := m.Populate(r.Range, true); err != nil {
		t.Fatal(err)
	}
	used := func() (n uint64, at addr.HVARange) {
		t.Helper()
		if err := l.Take(r.Range, func(run addr.HVARange) { n, at = n+run.NPages(), run }); err != nil {
			t.Fatal(err)
		}
		return n, at
	}
	if n, _ := used(); n != pages {
		t.Errorf("at first %d pages are used, want %d", n, pages)
	}
	mustStore(t, m, part(r, 3, 1).Start, 1)
	if n, at := used(); n != 1 || at != part(r, 3, 1) {
		t.Errorf("page 3 was used, and told of are %d pages, with %v", n, at)
	}
}
