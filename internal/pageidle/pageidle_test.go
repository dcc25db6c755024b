package pageidle

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

// standIn is a Map over files that the test makes.
func standIn(t *testing.T, entries ...uint64) *Map {
	t.Helper()
	dir := t.TempDir()
	file := func(name string, words []uint64) string {
		b := make([]byte, 0, len(words)*8)
		for _, w := range words {
			b = binary.NativeEndian.AppendUint64(b, w)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, name)
	}
	m, err := open(file("bitmap", make([]uint64, 8)), file("pagemap", entries))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestMarkAndUsed(t *testing.T) {
	m := standIn(t)
	frames := []addr.PFN{3, 64, 65, 0, 200, 5}
	if err := m.Mark(frames); err != nil {
		t.Fatal(err)
	}
	var words [8]uint64
	for i := range words {
		var b [8]byte
		if _, err := m.bitmap.ReadAt(b[:], int64(i)*8); err != nil {
			t.Fatal(err)
		}
		words[i] = binary.NativeEndian.Uint64(b[:])
	}
	// A file keeps what is written last to a word, where the kernel adds.
	if want := [8]uint64{1 << 5, 1<<0 | 1<<1, 0, 1 << 8}; words != want {
		t.Errorf("marked are %x, want %x", words, want)
	}
	used, err := m.Used([]addr.PFN{3, 5, 64, 0, 65, 66, 200})
	if want := []bool{true, false, false, false, false, true, false}; err != nil || !slices.Equal(used, want) {
		t.Errorf("used are %v, %v, want %v", used, err, want)
	}
	if used, err = m.Used([]addr.PFN{1 << 20}); err != nil || !used[0] {
		t.Errorf("a frame that the bitmap does not have: %v, %v", used, err)
	}
}

func TestFrames(t *testing.T) {
	m := standIn(t, 0, present|7, 1<<62|9, present|1<<55|8)
	frames, err := m.Frames(addr.HVAs(addr.PageSize, 3*addr.PageSize))
	if want := []addr.PFN{7, 0, 8}; err != nil || !slices.Equal(frames, want) {
		t.Errorf("the frames are %v, %v, want %v", frames, err, want)
	}
	if _, err := m.Frames(addr.HVAs(3*addr.PageSize, 2*addr.PageSize)); err == nil {
		t.Error("of pages that there are not, there are frames")
	}
	if _, err := standIn(t, present).Frames(addr.HVAs(0, addr.PageSize)); !errors.Is(err, os.ErrPermission) {
		t.Errorf("frames are withheld: %v", err)
	}
}

func TestOpen(t *testing.T) {
	m, err := Open()
	switch {
	case err == nil:
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	case !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, os.ErrPermission):
		t.Error(err)
	}
}
