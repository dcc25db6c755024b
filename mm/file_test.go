package mm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// withFile is c with a new file of its size, if its backing needs one. The descriptor is
// closed when the region has its own.
func withFile(t testing.TB, c RegionConfig) RegionConfig {
	t.Helper()
	if !c.Backing.named() || c.File != nil {
		return c
	}
	c.File = newFile(t, c.Size)
	return c
}

// newFile returns a new file of n zeros, which is closed with the test.
func newFile(t testing.TB, n uint64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "ram"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(int64(n)); err != nil {
		t.Fatal(err)
	}
	return f
}

// reopened returns a descriptor of the same file that is open as flag says.
func reopened(t *testing.T, f *os.File, flag int) *os.File {
	t.Helper()
	again, err := os.OpenFile(f.Name(), flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { again.Close() })
	return again
}

// lacksHoles checks what a file system without holes makes of an operation that needs them.
func lacksHoles(t *testing.T, a attempt, err error, told *contentTold) {
	t.Helper()
	if told.failed != 1 || !strings.Contains(err.Error(), "cannot punch holes") || !strings.Contains(err.Error(), a.r.File().Name()) {
		t.Errorf("error is %v, and %d brackets have failed; want the name of the file, and one", err, told.failed)
	}
}

// TestFileErrors: files that cannot be a region, and regions that take none. Nothing is
// left of them.
func TestFileErrors(t *testing.T) {
	const size = 4 * addr.PageSize
	file := newFile(t, size+100)
	closed := reopened(t, file, os.O_RDWR)
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	m := New(nil)
	for name, tt := range map[string]struct {
		c    RegionConfig
		want error
		says string
	}{
		"no file":               {RegionConfig{Backing: File}, unix.EINVAL, "no file is given"},
		"a file for none":       {RegionConfig{Backing: Memfd, File: file}, unix.EINVAL, "would not show the file"},
		"an offset into none":   {RegionConfig{Offset: addr.PageSize}, unix.EINVAL, "would not show the file"},
		"too short":             {RegionConfig{Backing: File, File: file, Offset: addr.PageSize}, unix.EINVAL, "make the file longer first, or the region smaller"},
		"half a page":           {RegionConfig{Backing: File, File: file, Offset: 100}, unix.EINVAL, "no multiple"},
		"before the start":      {RegionConfig{Backing: File, File: file, Offset: -addr.PageSize}, unix.EINVAL, "negative"},
		"past any end":          {RegionConfig{Backing: File, File: file, Offset: 1<<63 - addr.PageSize}, unix.EINVAL, "too large"},
		"a pipe":                {RegionConfig{Backing: FilePrivate, File: r}, unix.EINVAL, "not a regular file"},
		"closed":                {RegionConfig{Backing: File, File: closed}, fs.ErrClosed, ""},
		"shared, read-only":     {RegionConfig{Backing: File, File: reopened(t, file, os.O_RDONLY)}, unix.EACCES, "open it for writing too, or map it with backing file-private"},
		"private, write-only":   {RegionConfig{Backing: FilePrivate, File: reopened(t, file, os.O_WRONLY)}, unix.EACCES, "open it for reading too"},
		"as many bytes as room": {RegionConfig{Backing: File, File: file}, nil, ""},
	} {
		tt.c.Name, tt.c.Size = "x", size
		if _, err := m.NewRegion(tt.c); !errors.Is(err, tt.want) || tt.want != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: error is %v, want %v with %q", name, err, tt.want, tt.says)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFileIsTheCallers: stores reach the file through a shared mapping and not through a
// private one, at the right offset; the caller's descriptor is neither needed nor closed.
func TestFileIsTheCallers(t *testing.T) {
	for _, backing := range []Backing{File, FilePrivate} {
		f := newFile(t, 6*addr.PageSize)
		if _, err := f.WriteAt([]byte{7}, 3*addr.PageSize); err != nil {
			t.Fatal(err)
		}
		m, r := newMemory(t, RegionConfig{Backing: backing, Size: 4 * addr.PageSize, File: f, Offset: 2 * addr.PageSize})
		if v, err := m.Load64(part(r, 1, 1).Start); v != 7 || err != nil {
			t.Errorf("%v: page 1 is %d, %v; want what page 3 of the file has", backing, v, err)
		}
		if _, err := f.WriteAt([]byte{8}, 3*addr.PageSize); err != nil {
			t.Fatal(err)
		}
		if v, err := m.Load64(part(r, 1, 1).Start); v != 8 || err != nil {
			t.Errorf("%v: page 1 is %d, %v; want what was written to the file since", backing, v, err)
		}
		mustStore(t, m, part(r, 1, 1).Start, 9)
		b := make([]byte, 1)
		want := byte(9)
		if backing.private() {
			want = 8
		}
		if _, err := f.ReadAt(b, 3*addr.PageSize); err != nil || b[0] != want {
			t.Errorf("%v: the file has %d, %v after a store of 9; want %d", backing, b[0], err, want)
		}
		if err := f.Close(); err != nil {
			t.Errorf("the caller's descriptor: %v", err)
		}
		if err := m.Map(part(r, 1, 1)); err != nil {
			t.Errorf("%v: map again: %v", backing, err)
		}
		if v, err := m.Load64(part(r, 1, 1).Start); v != uint64(want) || err != nil {
			t.Errorf("%v: mapped again, page 1 is %d, %v; want %d", backing, v, err, want)
		}
	}
}

// TestReadOnlyFile is restored from privately: all is as with a file that can be written,
// but what changes the file.
func TestReadOnlyFile(t *testing.T) {
	f := reopened(t, newFile(t, 4*addr.PageSize), os.O_RDONLY)
	m, r := newMemory(t, RegionConfig{Backing: FilePrivate, Size: 4 * addr.PageSize, File: f})
	mustStore(t, m, r.Range.Start, 1)
	if err := errors.Join(m.Discard(part(r, 0, 1)), m.Map(part(r, 1, 1)), m.Unmap(part(r, 2, 1))); err != nil {
		t.Error(err)
	}
	told := &contentTold{page: r.Range}
	register(t, m, told)
	defer told.Unregister()
	for what, err := range map[string]error{"punch": m.Punch(part(r, 0, 1)), "truncate": m.Truncate(r, 0)} {
		if !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "open it for writing too") || told.content != nil {
			t.Errorf("%s: error is %v, and %v was announced; want EBADF, and nothing", what, err, told.content)
		}
	}
}

// TestRegionsOfOneFile: two regions show parts of a file, with two pages in common. What
// one does to the file is announced of both, and refused if the other one is pinned.
func TestRegionsOfOneFile(t *testing.T) {
	f := newFile(t, 8*addr.PageSize)
	m, low := newMemory(t, RegionConfig{Backing: FilePrivate, Size: 5 * addr.PageSize, File: reopened(t, f, os.O_RDONLY)})
	high, err := m.NewRegion(RegionConfig{Name: "high", Backing: File, Size: 5 * addr.PageSize, File: f, Offset: 3 * addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	register(t, m, &funcSubscriber{start: func(inv *notifier.Invalidation) error {
		name, r := "low", low
		if high.Range.Contains(inv.Range) {
			name, r = "high", high
		}
		told = append(told, fmt.Sprintf("%v %s %d+%d %v", inv.Event, name, (inv.Range.Start-r.Range.Start)/addr.PageSize, inv.Range.NPages(), inv.Content))
		return nil
	}})
	for _, step := range []struct {
		do   func() error
		want []string
	}{
		{func() error { return m.Punch(part(high, 1, 2)) }, []string{"clear high 1+2 zeroed", "clear low 4+1 changed"}},
		{func() error { return m.Punch(part(low, 3, 1)) }, []string{"clear high 0+1 zeroed", "clear low 3+1 changed"}},
		{func() error { return m.Truncate(high, 4*addr.PageSize) }, []string{"unmap high 1+4 gone", "unmap low 4+1 gone"}},
		{func() error { return m.Truncate(low, 2*addr.PageSize) }, []string{"unmap high 0+1 gone", "unmap low 2+2 gone"}},
		{func() error { return m.Truncate(high, 8*addr.PageSize) }, []string{"map high 0+1 zeroed", "map high 1+4 zeroed", "map low 2+2 zeroed", "map low 4+1 zeroed"}},
		{func() error { return m.Truncate(high, 7*addr.PageSize) }, []string{"unmap high 4+1 gone"}},
		{func() error { return m.Truncate(low, 5*addr.PageSize) }, []string{"unmap high 2+2 gone"}},
	} {
		told = nil
		if err := step.do(); errors.Is(err, unix.EOPNOTSUPP) {
			continue // a file system without holes
		} else if err != nil {
			t.Fatal(err)
		}
		slices.Sort(told)
		if diff := cmp.Diff(step.want, told); diff != "" {
			t.Errorf("announced (-want +got):\n%s", diff)
		}
		checkExtents(t, m, low)
		checkExtents(t, m, high)
	}
	if _, err := m.NewRegion(RegionConfig{Name: "fixed", Backing: FilePrivate, Size: addr.PageSize, File: f, Pinned: true}); err != nil {
		t.Fatal(err)
	}
	told = nil
	for what, err := range map[string]error{"punch": m.Punch(part(low, 0, 2)), "truncate": m.Truncate(high, 0)} {
		if !errors.Is(err, ErrPinned) || !strings.Contains(err.Error(), `"fixed"`) || told != nil {
			t.Errorf("%s of what a pinned region shows: %v, and %v was announced; want ErrPinned", what, err, told)
		}
	}
	if err := m.Punch(part(low, 1, 1)); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("punch of what it does not show: %v", err)
	}
}

// TestFileBehindOurBack: a file that somebody else has cut is an error to use, and maps
// again.
func TestFileBehindOurBack(t *testing.T) {
	f := newFile(t, 4*addr.PageSize)
	m, r := newMemory(t, RegionConfig{Backing: File, Size: 4 * addr.PageSize, File: f})
	mustStore(t, m, part(r, 3, 1).Start, 1)
	if err := f.Truncate(2 * addr.PageSize); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Load64(part(r, 3, 1).Start); !errors.Is(err, unix.EFAULT) {
		t.Errorf("a load past the new end: %v, want EFAULT", err)
	}
	if err := m.Map(part(r, 2, 2)); err != nil {
		t.Errorf("map past the new end: %v", err)
	}
	if err := f.Truncate(4 * addr.PageSize); err != nil {
		t.Fatal(err)
	}
	if v, err := m.Load64(part(r, 3, 1).Start); v != 0 || err != nil {
		t.Errorf("a load when the file is as long as before: %d, %v; want 0", v, err)
	}
}
