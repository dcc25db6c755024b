// Package pageidle wraps the kernel's idle page tracking: pages that are marked idle, and
// are not any more once somebody has used them, be it through the page tables of a process
// or those of a guest.
package pageidle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/secondmmu/gvm/addr"
)

// path is the bitmap of all frames of the host.
const path = "/sys/kernel/mm/page_idle/bitmap"

// Map is the idle pages of the host, and where pages of this process are in it. It takes
// CAP_SYS_ADMIN. It is safe for concurrent use.
type Map struct {
	bitmap  *os.File
	pagemap *os.File // of the calling process
}

// Open opens the bitmap. A kernel without CONFIG_IDLE_PAGE_TRACKING has none:
// errors.Is finds errors.ErrUnsupported then.
func Open() (*Map, error) { return open(path, "/proc/self/pagemap") }

func open(bitmap, pagemap string) (*Map, error) {
	b, err := os.OpenFile(bitmap, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w: the kernel is built without CONFIG_IDLE_PAGE_TRACKING", err, errors.ErrUnsupported)
	} else if err != nil {
		return nil, err
	}
	p, err := os.Open(pagemap)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return &Map{b, p}, nil
}

// Close closes m. What is marked stays so.
func (m *Map) Close() error { return errors.Join(m.bitmap.Close(), m.pagemap.Close()) }

// Entries of a process's pagemap, see Documentation/admin-guide/mm/pagemap.rst.
const (
	entryBytes = 8
	frameMask  = 1<<55 - 1
	present    = 1 << 63
)

// Frames returns the frame of each page of r, in which both ends are page-aligned; 0 is a
// page that is not in memory. It fails with fs.ErrPermission if the process may not
// know them.
func (m *Map) Frames(r addr.HVARange) ([]addr.PFN, error) {
	entries := make([]byte, r.NPages()*entryBytes)
	if _, err := m.pagemap.ReadAt(entries, int64(r.Start>>addr.PageShift)*entryBytes); err != nil {
		return nil, fmt.Errorf("frames of %v: %w", r, err)
	}
	frames := make([]addr.PFN, r.NPages())
	for i := range frames {
		e := binary.NativeEndian.Uint64(entries[i*entryBytes:])
		if e&present == 0 {
			continue
		}
		if frames[i] = addr.PFN(e & frameMask); frames[i] == 0 {
			return nil, fmt.Errorf("frames of %v: %w: it takes CAP_SYS_ADMIN", r, fs.ErrPermission)
		}
	}
	return frames, nil
}

// Words of the bitmap stand for 64 frames each; the kernel reads and writes whole ones.
const (
	wordFrames = 64
	wordBytes  = 8
)

// Mark marks frames as idle, but for those that are 0. The kernel passes over pages that it
// could not reclaim: they are used, always.
func (m *Map) Mark(frames []addr.PFN) error {
	return m.words(frames, func(at int64, bits uint64) error {
		var word [wordBytes]byte
		binary.NativeEndian.PutUint64(word[:], bits) // bits of 0 are left alone
		_, err := m.bitmap.WriteAt(word[:], at)
		return err
	})
}

// Used reports of each frame whether it is not idle. Frames that are 0 are not used.
func (m *Map) Used(frames []addr.PFN) ([]bool, error) {
	idle := map[addr.PFN]bool{}
	err := m.words(frames, func(at int64, bits uint64) error {
		var word [wordBytes]byte
		if _, err := m.bitmap.ReadAt(word[:], at); err != nil {
			return err
		}
		bits &= binary.NativeEndian.Uint64(word[:])
		for i := range addr.PFN(wordFrames) {
			if bits>>i&1 != 0 {
				idle[addr.PFN(at)/wordBytes*wordFrames+i] = true
			}
		}
		return nil
	})
	used := make([]bool, len(frames))
	for i, f := range frames {
		used[i] = f != 0 && !idle[f]
	}
	return used, err
}

// words calls fn for runs of frames that are in one word of the bitmap, with its place and
// their bits. Where memory ends, so does the bitmap.
func (m *Map) words(frames []addr.PFN, fn func(at int64, bits uint64) error) error {
	for i := 0; i < len(frames); {
		word, bits := frames[i]/wordFrames, uint64(0)
		for ; i < len(frames) && frames[i]/wordFrames == word; i++ {
			if frames[i] != 0 {
				bits |= 1 << (frames[i] % wordFrames)
			}
		}
		if bits == 0 {
			continue
		}
		if err := fn(int64(word)*wordBytes, bits); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("frames %v to %v: %w", word*wordFrames, word*wordFrames+wordFrames-1, err)
		}
	}
	return nil
}
