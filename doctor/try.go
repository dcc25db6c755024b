package doctor

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/pagemap"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/internal/tracefs"
	"github.com/secondmmu/gvm/internal/uffd"
)

func thisMachine() *machine {
	return &machine{
		root:           os.DirFS("/"),
		tryUserfaultfd: tryUserfaultfd,
		tryScan:        tryScan,
		tryTracepoint:  tryTracepoint,
		timeDiscard:    timeDiscard,
		tryKVM:         tryKVM,
		timeGuest:      timeGuest,
	}
}

// tryUserfaultfd opens a userfaultfd, and one more for each feature in use.
func tryUserfaultfd() (userfaultfd, error) {
	fd, err := uffd.Open(0)
	if err != nil {
		return userfaultfd{}, err
	}
	u := userfaultfd{origin: fd.Origin(), kernelFaults: fd.KernelFaults(), offered: fd.Offered()}
	fd.Close()
	for rest := u.offered & usedFeatures; rest != 0; rest &= rest - 1 {
		feature := rest & -rest
		fd, err := uffd.Open(feature)
		if err != nil {
			u.denied |= feature
			continue
		}
		fd.Close()
	}
	return u, nil
}

// tryScan tells pages by their states, and then the one page that is written to
// after all have been protected. errScan is set if the first fails, errTrack if
// only the second does.
func tryScan() (errScan, errTrack error) {
	p, err := pagemap.Open()
	if err != nil {
		return err, nil
	}
	defer p.Close()
	const npages = 4
	mem, r, err := mapPages(npages)
	if err != nil {
		return err, nil
	}
	defer unix.Munmap(mem)

	mem[0] = 1
	if err := expect(p, r, pagemap.Present, 0); err != nil {
		return err, nil
	}

	fd, err := uffd.Open(uffd.WPAsync)
	if err != nil {
		return nil, err
	}
	defer fd.Close()
	if err := fd.Register(r, uffd.ModeWP); err != nil {
		return nil, err
	}
	protect := pagemap.Request{Range: r, Flags: pagemap.WPMatching | pagemap.CheckWPAsync}
	if _, _, err := p.Scan(protect, nil); err != nil {
		return nil, err
	}
	mem[2*addr.PageSize] = 1
	return nil, expect(p, r, pagemap.Written, 2)
}

// expect scans r for a category that its page i alone should have.
func expect(p *pagemap.PageMap, r addr.HVARange, category pagemap.Categories, i int) error {
	regions := make([]pagemap.Region, r.NPages())
	n, _, err := p.Scan(pagemap.Request{Range: r, All: category, Report: category}, regions)
	if err != nil {
		return err
	}
	page := addr.HVAs(r.Start+addr.HVA(i*addr.PageSize), addr.PageSize)
	if want := (pagemap.Region{Range: page, Categories: category}); n != 1 || regions[0] != want {
		return fmt.Errorf("PAGEMAP_SCAN found %v, want %v", regions[:n], want)
	}
	return nil
}

// mapPages maps anonymous memory that is backed by base pages only.
func mapPages(npages int) ([]byte, addr.HVARange, error) {
	mem, err := unix.Mmap(-1, 0, npages*addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, addr.HVARange{}, fmt.Errorf("mmap of %d pages: %w", npages, err)
	}
	err = unix.Madvise(mem, unix.MADV_NOHUGEPAGE)
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: the kernel has no huge pages
		unix.Munmap(mem)
		return nil, addr.HVARange{}, fmt.Errorf("MADV_NOHUGEPAGE: %w", err)
	}
	return mem, rangeOf(mem), nil
}

// The tracepoint by which KVM tells that host memory has been invalidated.
const (
	tracepointSystem = "kvm"
	tracepointEvent  = "kvm_unmap_hva_range"
	tracepointName   = tracepointSystem + ":" + tracepointEvent
)

func tryTracepoint() (tp tracepoint) {
	tr, err := tracefs.Open()
	if err != nil {
		return tracepoint{errTracefs: err}
	}
	defer tr.Close()
	if tp.id, err = tr.TracepointID(tracepointSystem, tracepointEvent); err != nil {
		return tracepoint{errLookup: err}
	}
	if tp.errAllCPUs = count(tp.id, perf.AllCPUs); tp.errAllCPUs != nil {
		tp.errThread = count(tp.id, perf.ThisThread)
	}
	return tp
}

// count opens a counter of the tracepoint and reads it.
func count(id uint64, scope perf.Scope) error {
	c, err := perf.Open(id, scope)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Count()
	return err
}

// timeDiscard returns the median time that the discard of one resident page takes.
func timeDiscard() (time.Duration, error) {
	mem, _, err := mapPages(1)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(mem)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	times := make([]time.Duration, 255)
	for i := range times {
		mem[0] = 1
		start := time.Now()
		err := unix.Madvise(mem, unix.MADV_DONTNEED)
		times[i] = time.Since(start)
		if err != nil {
			return 0, fmt.Errorf("MADV_DONTNEED: %w", err)
		}
	}
	return median(times), nil
}
