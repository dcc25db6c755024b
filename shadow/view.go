package shadow

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/hostmem"
	"github.com/secondmmu/gvm/internal/lockorder"
	"github.com/secondmmu/gvm/srcu"
)

// AccessError is a use of guest memory that its slots or the host's mappings do
// not allow.
type AccessError struct {
	GPA    addr.GPA    // the first byte that could not be used
	N      int         // how many were wanted, from there
	Access addr.Access // what for
	Err    error       // EFAULT for memory that is not there, EINVAL for a word that is not aligned, EINTR, notifier.ErrExited
}

func (e *AccessError) Error() string {
	return fmt.Sprintf("%v access to %d bytes at %v: %v", e.Access, e.N, e.GPA, e.Err)
}

func (e *AccessError) Unwrap() error { return e.Err }

// View is the guest's memory for a goroutine that uses it a lot, such as that of a
// vCPU or of a device: its read sections cost less than those of the [Table]. It
// belongs to one goroutine at a time.
//
// Accesses block while the mapping of the page changes, and until the context of
// the View is done at the longest. Their errors are of type *AccessError.
type View struct{ user }

// NewView returns a view whose accesses end with EINTR when ctx is done. The caller
// closes it.
func (t *Table) NewView(ctx context.Context) *View {
	return &View{user{t: t, ctx: ctx, reader: t.domain.NewReader()}}
}

// Close ends the use of the view.
func (v *View) Close() { v.reader.Close() }

// user has the methods of View and Table.
type user struct {
	t      *Table
	ctx    context.Context
	reader *srcu.Reader // nil: sections are the domain's
	last   translation  // of a View: the one that it found last
}

// translation is what a walk has found: an entry, and the frames that it translates. It
// stands as long as nothing has been zapped since; so says a number that is loaded in
// the section in which it is used. Whoever zaps changes the number before he waits for
// sections: one that has found the old number is waited for.
type translation struct {
	zaps  uint64
	first addr.GFN
	pages uint64 // 0: there is none
	e     entry
}

func (u *user) enter() int {
	if u.reader != nil {
		return u.reader.ReadLock()
	}
	return u.t.domain.ReadLock()
}

func (u *user) leave(idx int) {
	if u.reader != nil {
		u.reader.ReadUnlock(idx)
		return
	}
	u.t.domain.ReadUnlock(idx)
}

// hold returns the host address of the byte at gpa, how many bytes from there on are
// translated with it, and the token of a read section, which is open unless there
// is an error: until it is closed with leave the memory is there for want. For
// writing, the page is marked as dirty; of a large block it is up to the caller to
// mark the others that it writes.
func (u *user) hold(gpa addr.GPA, want addr.Access) (hva addr.HVA, n uint64, idx int, err error) {
	gfn := gpa.GFN()
	for {
		idx = u.enter()
		e, first, pages := u.last.e, u.last.first, u.last.pages
		if u.last.zaps != u.t.zaps.Load() || uint64(gfn-first) >= pages || !e.allows(want) {
			e, first, pages = u.walk(gfn, want)
		}
		if pages > 0 {
			if want&addr.Write != 0 {
				u.t.mark(gfn, e)
			}
			offset := uint64(gpa - first.GPA())
			return e.hva() + addr.HVA(offset), pages<<addr.PageShift - offset, idx, nil
		}
		u.leave(idx)
		if err := u.t.fault(u.ctx, gfn, want); err != nil {
			return 0, 0, 0, err
		}
	}
}

// walk looks for a translation of gfn in the tables, and makes it young. It returns the
// entry and the frames that it translates, of which there are none if it does not allow
// want.
func (u *user) walk(gfn addr.GFN, want addr.Access) (e entry, first addr.GFN, pages uint64) {
	zaps := u.t.zaps.Load()
	e, c, level := u.t.find(gfn)
	if !e.allows(want) {
		return 0, 0, 0
	}
	if e&young == 0 {
		c.age(e)
	}
	pages = levelPages(level)
	first = gfn &^ addr.GFN(pages-1)
	if u.reader != nil { // the Table's user is everybody's
		u.last = translation{zaps, first, pages, e}
	}
	return e, first, pages
}

var errMisaligned error = &errnoError{"the address is not a multiple of the word's size", syscall.EINVAL}

// word is hold for a word of n bytes.
func (u *user) word(gpa addr.GPA, n uint64, want addr.Access) (hva addr.HVA, idx int, err error) {
	if uint64(gpa)&(n-1) != 0 {
		return 0, 0, &AccessError{gpa, int(n), want, errMisaligned}
	}
	hva, _, idx, err = u.hold(gpa, want)
	if err != nil {
		return 0, 0, &AccessError{gpa, int(n), want, err}
	}
	return hva, idx, nil
}

// used closes the section of a word, and makes an error of the fault that its use
// may have been: the host's mapping was changed by code that tells nobody.
func (u *user) used(gpa addr.GPA, n int, want addr.Access, idx int, err error) error {
	u.leave(idx)
	if err != nil {
		return &AccessError{gpa, n, want, errFaulted(err)}
	}
	return nil
}

func errFaulted(err error) error { return fmt.Errorf("it faulted although it was mapped: %w", err) }

// Load64 reads the 8 bytes at gpa, a multiple of 8, as one atomic access,
// sequentially consistent with the guest's.
func (u *user) Load64(gpa addr.GPA) (v uint64, err error) {
	hva, idx, err := u.word(gpa, 8, addr.Read)
	if err != nil {
		return 0, err
	}
	v, err = hostmem.Load64(hva)
	return v, u.used(gpa, 8, addr.Read, idx, err)
}

// Store64 writes the 8 bytes at gpa, a multiple of 8, as one atomic access.
func (u *user) Store64(gpa addr.GPA, v uint64) error {
	hva, idx, err := u.word(gpa, 8, addr.ReadWrite)
	if err != nil {
		return err
	}
	err = hostmem.Store64(hva, v)
	return u.used(gpa, 8, addr.ReadWrite, idx, err)
}

// Load32 reads the 4 bytes at gpa, a multiple of 4, as one atomic access.
func (u *user) Load32(gpa addr.GPA) (v uint32, err error) {
	hva, idx, err := u.word(gpa, 4, addr.Read)
	if err != nil {
		return 0, err
	}
	v, err = hostmem.Load32(hva)
	return v, u.used(gpa, 4, addr.Read, idx, err)
}

// Store32 writes the 4 bytes at gpa, a multiple of 4, as one atomic access.
func (u *user) Store32(gpa addr.GPA, v uint32) error {
	hva, idx, err := u.word(gpa, 4, addr.ReadWrite)
	if err != nil {
		return err
	}
	err = hostmem.Store32(hva, v)
	return u.used(gpa, 4, addr.ReadWrite, idx, err)
}

// CompareAndSwap64 writes v to the 8 bytes at gpa, a multiple of 8, if they are
// old, and reports whether they were. The page counts as written either way.
func (u *user) CompareAndSwap64(gpa addr.GPA, old, v uint64) (swapped bool, err error) {
	hva, idx, err := u.word(gpa, 8, addr.ReadWrite)
	if err != nil {
		return false, err
	}
	swapped, err = hostmem.CompareAndSwap64(hva, old, v)
	return swapped, u.used(gpa, 8, addr.ReadWrite, idx, err)
}

// ReadAt copies len(p) bytes of guest memory at the guest physical address off to
// p: io.ReaderAt. It goes page by page, or block by block: what other goroutines or
// the guest write meanwhile may be read in part. Where RAM ends there is an
// error, not an io.EOF.
func (u *user) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		gpa := addr.GPA(off) + addr.GPA(n)
		hva, span, idx, err := u.hold(gpa, addr.Read)
		if err != nil {
			return n, &AccessError{gpa, len(p) - n, addr.Read, err}
		}
		part := p[n:][:min(uint64(len(p)-n), span, maxPiece)]
		err = hostmem.ReadAt(part, hva)
		if err := u.used(gpa, len(part), addr.Read, idx, err); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// WriteAt copies p to guest memory at the guest physical address off: io.WriterAt.
func (u *user) WriteAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		gpa := addr.GPA(off) + addr.GPA(n)
		hva, span, idx, err := u.hold(gpa, addr.ReadWrite)
		if err != nil {
			return n, &AccessError{gpa, len(p) - n, addr.ReadWrite, err}
		}
		part := p[n:][:min(uint64(len(p)-n), span, maxPiece)]
		u.markRest(gpa, uint64(len(part)))
		err = hostmem.WriteAt(part, hva)
		if err := u.used(gpa, len(part), addr.ReadWrite, idx, err); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// markRest marks the pages of the n bytes at gpa, which are about to be written, but
// for the first, which hold has marked.
func (u *user) markRest(gpa addr.GPA, n uint64) {
	if pages := (gpa.Offset() + n - 1) >> addr.PageShift; pages > 0 {
		u.t.log.MarkRange(frames(gpa.GFN()+1, pages))
	}
}

// maxPiece bounds the bytes that are copied in one section: who changes a mapping
// waits for its end.
const maxPiece = 1 << 20

// Use calls fn with the n bytes of guest memory at gpa, piece by piece: those that
// are next to each other in the host's memory come in one. While fn runs the
// piece is there for the access that was asked for; to write to it is a mistake
// if that was Read. fn may take its time and sleep, but whoever changes the
// mapping of the piece waits for it, and so does a harvest of dirty pages. It uses
// no other guest memory and takes no lock of the order.
//
// An error of fn ends the use and is returned as it is. If the memory faults all the
// same, because its mapping was changed by code that tells nobody, fn does not
// return, and the error says so.
func (u *user) Use(gpa addr.GPA, n uint64, want addr.Access, fn func(piece []byte) error) error {
	for n > 0 {
		used, err := u.usePiece(gpa, n, want, fn)
		if err != nil {
			return err
		}
		gpa, n = gpa+addr.GPA(used), n-used
	}
	return nil
}

func (u *user) usePiece(gpa addr.GPA, n uint64, want addr.Access, fn func(piece []byte) error) (used uint64, err error) {
	hva, span, idx, err := u.hold(gpa, want)
	if err != nil {
		return 0, &AccessError{gpa, int(n), want, err}
	}
	defer u.leave(idx)
	lockorder.Acquire(lockorder.Page)
	defer lockorder.Release(lockorder.Page)
	n = min(n, span)
	if want&addr.Write != 0 {
		u.markRest(gpa, n)
	}
	var fault *hostmem.Fault
	if err := hostmem.Use(hva, int(n), fn); errors.As(err, &fault) {
		return 0, &AccessError{gpa, int(n), want, errFaulted(fault)}
	} else {
		return n, err
	}
}
