package doctor

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/pagemap"
	"github.com/secondmmu/gvm/internal/perf"
	"github.com/secondmmu/gvm/internal/tracefs"
	"github.com/secondmmu/gvm/internal/uffd"
	"github.com/secondmmu/gvm/mm"
)

func thisMachine() *machine {
	return &machine{
		root:           os.DirFS("/"),
		tryUserfaultfd: tryUserfaultfd,
		tryScan:        tryScan,
		tryTracepoint:  tryTracepoint,
		watchEvents:    watchEvents,
		watchTrace:     watchTrace,
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

// furtherTracepoints tell of KVM's other work: that it ages pages, and that a guest faults.
// Of some, one is enough.
var furtherTracepoints = []string{"kvm:kvm_age_hva", "kvm:kvm_test_age_hva", "kvm:kvm_page_fault|kvmmmu:kvm_mmu_spte_requested"}

func tryTracepoint() (tp tracepoint) {
	tr, err := tracefs.Open()
	if err != nil {
		return tracepoint{errTracefs: err}
	}
	defer tr.Close()
	if tp.id, err = tr.TracepointID(tracepointSystem, tracepointEvent); err != nil {
		return tracepoint{errLookup: err}
	}
	for _, name := range furtherTracepoints {
		if !slices.ContainsFunc(strings.Split(name, "|"), func(name string) bool {
			system, event, _ := strings.Cut(name, ":")
			_, err := tr.TracepointID(system, event)
			return err == nil
		}) {
			tp.lacking = append(tp.lacking, name)
		}
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

// watchEvents discards a page behind the back of memory that is watched, and returns why
// that cannot be done, or is not seen.
func watchEvents() (err error) {
	m, ram, err := newMemory()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	seen := make(chan mm.Stray, 1)
	w, err := m.WatchEvents(mm.EventConfig{Report: func(s mm.Stray) {
		select {
		case seen <- s:
		default:
		}
	}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := m.Store64(ram.Range.Start, 1); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(ram.Range.Start), addr.PageSize, unix.MADV_DONTNEED); errno != 0 {
		return fmt.Errorf("MADV_DONTNEED: %w", errno)
	}
	select {
	case s := <-seen:
		if s.Op != mm.OpStrayRemove || s.Range.Start != ram.Range.Start {
			return fmt.Errorf("the discard of %v was seen as %v", ram.Range, s)
		}
		return s.Err
	case <-time.After(time.Second):
		return errors.New("a discard was not seen")
	}
}

// watchTrace watches memory that no guest has, of which there is nothing to be seen.
func watchTrace() (err error) {
	m, _, err := newMemory()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	w, err := m.WatchTrace(mm.TraceConfig{Report: func(mm.Stray) {}})
	if err != nil {
		return err
	}
	return w.Close()
}

// newMemory returns memory of one page.
func newMemory() (*mm.Memory, *mm.Region, error) {
	m := mm.New(nil)
	ram, err := m.NewRegion(mm.RegionConfig{Name: "ram", Size: addr.PageSize})
	if err != nil {
		return nil, nil, errors.Join(err, m.Close())
	}
	return m, ram, nil
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
