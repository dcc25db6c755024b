package mm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/pagemap"
	"github.com/secondmmu/gvm/internal/uffd"
)

// WriteLog tells which pages of host memory were stored to, whoever stored through the
// mapping that it is asked about: a guest, this process, or the kernel for one of them.
// Stores through other mappings of the same memory, and writes to the file under it, it
// does not see; nor what an operation on mappings does to content.
//
// The kernel write-protects the pages in the host's page tables, undoes that by itself
// at the first store to each (a userfaultfd of the asynchronous kind), and tells by
// PAGEMAP_SCAN which ones are not protected any more. What is protected is known for
// each page, and what is not counts as written: so what replaces a mapping, or its pages,
// is reported, and nothing has to be followed.
//
// Memory that has been logged stays registered until the log is closed. It can then not
// be collapsed to huge pages. Shared memory gets page tables for all of it, 8
// bytes a page. Memory of another log, or with an EventWatch, cannot be logged: the error
// is ErrWatched then.
type WriteLog struct {
	fd *uffd.FD
	pm *pagemap.PageMap

	// shared says that a page that is not there may have been stored to, and have its
	// content still. Private memory loses it then, which an operation tells of, or it is
	// in swap, of which the kernel keeps what it keeps of a page.
	shared bool
}

// NewWriteLog returns a log of nothing, for memory of that backing, to be closed. The kernel offers it since Linux
// 6.7; before, errors.Is finds errors.ErrUnsupported. Where a process may not have a
// userfaultfd it is EPERM.
func NewWriteLog(backing Backing) (_ *WriteLog, err error) {
	fail := func(err error) (*WriteLog, error) { return nil, fmt.Errorf("log writes to memory: %w", err) }
	l := &WriteLog{shared: backing != Anonymous && !backing.private()}
	if l.fd, err = uffd.Open(uffd.PagefaultFlagWP | uffd.WPAsync | uffd.WPHugetlbfsShmem | uffd.WPUnpopulated); err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w; %w, but by Linux 6.7 and later", err, errors.ErrUnsupported)
		}
		return fail(err)
	}
	if l.pm, err = pagemap.Open(); err != nil {
		return fail(errors.Join(err, l.fd.Close()))
	}
	if _, _, err := l.pm.Scan(pagemap.Request{}, nil); err != nil {
		return fail(errors.Join(err, l.Close()))
	}
	return l, nil
}

// Begin has the pages of r logged from now on. All of r is mapped, and could be mapped
// as writable. Stores while it runs may be in the log or not.
func (l *WriteLog) Begin(r addr.HVARange) error {
	return l.Take(r, func(addr.HVARange) {})
}

// Take calls fn for runs of pages of r that were stored to since the last Take or Begin
// of them, and some that were not: those that have been mapped or remapped since. A
// store is in this log or in the next one, and a page that is read after Take has what
// this log tells of. A page may be told of twice. Parts of r that Begin was never called for are logged from now on,
// all that is present in them being reported. All of r is mapped.
//
// Guests go on while it runs, and fault at the next store to each page. What it has
// called fn for when it fails will not be told again.
func (l *WriteLog) Take(r addr.HVARange, fn func(addr.HVARange)) error {
	// A mapping that has replaced another one is not registered any more, nor, since Linux
	// 6.17, is one that a remapped page has become a part of. Its pages may be marked as not
	// written, and were not kept so. To look for those, and to register what is, costs
	// little.
	const present = pagemap.Present | pagemap.Swapped
	if err := l.scan(pagemap.Request{Range: r, All: pagemap.WPAllowed, Inverted: pagemap.WPAllowed, Any: present, Report: present}, fn); err != nil {
		return err
	}
	if err := l.fd.Register(r, uffd.ModeWP); err != nil {
		return watched(err)
	}
	// With Written as the only category to report, Linux takes a short cut on which pages
	// that are not there, or in swap, count as written each time.
	written := pagemap.Request{Range: r, Flags: pagemap.WPMatching | pagemap.CheckWPAsync, All: pagemap.Written, Report: pagemap.Written | pagemap.Present}
	if err := l.scan(written, fn); err != nil || !l.shared {
		return err
	}
	// Of a page of shared memory that is not there, because it was reclaimed or discarded,
	// the kernel knows by a marker in its place that it was protected. Where there is none,
	// it does not count as written before Linux 6.18, nor would a scan leave one. A store
	// that comes before the marker is part of what is told of here.
	const absent = pagemap.Present | pagemap.Swapped
	var failed error
	err := l.scan(pagemap.Request{Range: r, Flags: pagemap.CheckWPAsync, All: absent, Inverted: absent, Report: absent}, func(run addr.HVARange) {
		fn(run)
		failed = errors.Join(failed, l.fd.WriteProtect(run))
	})
	return errors.Join(err, failed)
}

// scan calls fn for the pages that req selects.
func (l *WriteLog) scan(req pagemap.Request, fn func(addr.HVARange)) error {
	var found [64]pagemap.Region
	for end := req.Range.End; req.Range.Start < end; {
		n, at, err := l.pm.Scan(req, found[:])
		if err != nil {
			return err
		}
		for _, f := range found[:n] {
			fn(f.Range)
		}
		req.Range.Start = at
	}
	return nil
}

// Close gives the descriptors back. The memory is stored to as before then.
func (l *WriteLog) Close() error { return errors.Join(l.fd.Close(), l.pm.Close()) }
