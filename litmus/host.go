package litmus

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/hostmem"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/notifier"
)

// notThere is what the host loads from memory that is not there.
const notThere = 0xdead

// hostThread is a thread of the host. The first one of a test is run by who runs its
// rounds, the others each by a goroutine of their own.
type hostThread struct {
	b       *bed
	th      *Thread
	index   int
	changes int // statements that iterations have to overlap
	regs    [][Registers]uint64
	stages  map[*Statement]*mm.Region // of Replace: where the page comes from
	stopped chan struct{}             // closed when the goroutine has ended; nil: there is none

	done   atomic.Uint64 // the number of the last round that it has ended
	err    error         // written before done, and read after it
	paused int
	left   int // changes of the round that are not done

	harvested map[string][2]bool // by name: dirty, discarded
	used      map[string]bool

	child *mm.Child
	mem   *os.File // the child's memory
	where []addr.HVA
}

func (b *bed) newHost(th *Thread, i int) (*hostThread, error) {
	h := &hostThread{b: b, th: th, index: i, regs: make([][Registers]uint64, b.c.Instances),
		harvested: map[string][2]bool{}, used: map[string]bool{}}
	any := false
	for _, th := range b.t.Hosts {
		any = any || slices.ContainsFunc(th.Statements, func(s Statement) bool { return s.change() })
	}
	for n := range h.th.Statements {
		if s := &h.th.Statements[n]; !any || s.change() {
			h.changes++
		}
	}
	var err error
	h.stages, err = b.stagesOf(h.th.Statements)
	return h, err
}

// stagesOf makes a region for each replacement, in which the new page is prepared.
func (b *bed) stagesOf(statements []Statement) (map[*Statement]*mm.Region, error) {
	stages := map[*Statement]*mm.Region{}
	for n := range statements {
		s := &statements[n]
		if s.Op != Replace {
			continue
		}
		p := b.page(s.Loc.Name)
		config := mm.RegionConfig{Name: fmt.Sprintf("%s-%d", p.Name, s.Pos.Line), Size: p.size, Backing: p.Backing}
		if p.Backing == mm.File || p.Backing == mm.FilePrivate {
			f, err := b.tempFile(p.size)
			if err != nil {
				return nil, err
			}
			config.File = f
		}
		r, err := b.m.Memory().NewRegion(config)
		if err != nil {
			return nil, err
		}
		stages[s] = r
	}
	return stages, nil
}

// reset prepares the thread for a round.
func (h *hostThread) reset() error {
	clear(h.regs)
	clear(h.harvested)
	clear(h.used)
	if err := h.reap(); err != nil {
		return err
	}
	return h.b.prepare(h.stages)
}

// prepare fills the pages that are about to take the place of others.
func (b *bed) prepare(stages map[*Statement]*mm.Region) error {
	for s, r := range stages {
		if err := b.m.Memory().Map(r.Range); err != nil {
			return err
		}
		words := make([]byte, b.c.Instances*lineBytes)
		for i := 0; i < len(words); i += 8 {
			for j := range 8 {
				words[i+j] = byte(s.Value >> (8 * j))
			}
		}
		if err := b.m.Memory().WriteAt(words, r.Range.Start); err != nil {
			return err
		}
	}
	return nil
}

// setup carries out the statements of the test's setup.
func (b *bed) setup() error {
	if err := b.prepare(b.before.stages); err != nil {
		return err
	}
	for n := range b.before.th.Statements {
		s := &b.before.th.Statements[n]
		if err := b.before.do(s); err != nil {
			return fmt.Errorf("%s:%d: %v: %w", b.t.File, s.Pos.Line, s, err)
		}
	}
	if slices.ContainsFunc(b.before.th.Statements, func(s Statement) bool { return s.Op == Mergeable }) {
		return b.awaitMerge()
	}
	return nil
}

// awaitMerge returns when pages of the process have been merged. What ksmd has not merged in
// patience, in the first round, it does not merge; later, it is quicker.
func (b *bed) awaitMerge() error {
	patience := 50 * time.Millisecond
	if b.round == 1 {
		patience = 5 * time.Second
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		text, err := os.ReadFile("/proc/self/ksm_merging_pages")
		switch n := strings.TrimSpace(string(text)); {
		case errors.Is(err, os.ErrNotExist):
			return &NotRunError{Need: NeedKSM, Why: "the kernel does not tell what it has merged (Linux 5.19)", Err: err}
		case err != nil:
			return err
		case n != "0":
			return nil
		case time.Now().Before(end):
		case b.round == 1:
			return &NotRunError{Need: NeedKSM, Why: fmt.Sprintf("ksmd has merged nothing in %v", patience)}
		default:
			return nil
		}
	}
}

// loop runs the thread's part of each round, until the run ends.
func (h *hostThread) loop() {
	defer close(h.stopped)
	b := h.b
	if cpus := b.c.CPUs; len(cpus) > 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		h.err = b.pins.set(cpus[(len(b.t.Guests)+h.index)%len(cpus)])
	}
	for n := uint64(1); ; n++ {
		if err := b.wait("the next round", false, func() bool { return b.begun.Load() >= n }); err != nil {
			return // the run has ended, or is about to
		}
		if h.err == nil {
			h.round()
		}
		h.done.Store(n)
	}
}

// round runs the thread's statements.
func (h *hostThread) round() {
	if h.b.crowded {
		// All vCPUs have to run for instances to begin. A turn is about a nanosecond.
		time.Sleep(time.Duration(h.b.hostWait[h.index]))
	} else {
		spin(h.b.hostWait[h.index])
	}
	h.left = h.changes
	all := h.changes == len(h.th.Statements)
	for n := range h.th.Statements {
		s := &h.th.Statements[n]
		change := all || s.change() && h.changes > 0
		if change && h.b.started.CompareAndSwap(false, true) {
			h.fail(s, h.b.m.Store64(phaseWord, 3*h.b.round+1))
		}
		h.fail(s, h.do(s))
		if change {
			h.changed()
		}
		if h.err != nil {
			break
		}
	}
	for h.left > 0 {
		h.changed()
	}
	for ; h.paused > 0; h.paused-- {
		h.b.m.Resume()
	}
}

// changed says that one of the thread's changes has been made.
func (h *hostThread) changed() {
	if h.left--; h.left == 0 && h.b.open.Add(-1) == 0 {
		h.err = errors.Join(h.err, h.b.m.Store64(phaseWord, 3*h.b.round+2))
	}
}

func (h *hostThread) fail(s *Statement, err error) {
	if err != nil && h.err == nil {
		h.err = fmt.Errorf("%s:%d: %v: %w", h.b.t.File, s.Pos.Line, s, err)
	}
}

// end ends the thread.
func (h *hostThread) end() error {
	if h.stopped != nil {
		<-h.stopped
	}
	return h.reap()
}

func (h *hostThread) reap() error {
	if h.child == nil {
		return nil
	}
	child, mem := h.child, h.mem
	h.child, h.mem = nil, nil
	var err error
	if mem != nil {
		err = mem.Close()
	}
	return errors.Join(child.Close(), err)
}

// do carries out one statement.
func (h *hostThread) do(s *Statement) error {
	b := h.b
	memory := b.m.Memory()
	switch s.Op {
	case Load:
		for k := range h.regs {
			h.regs[k][s.Reg] = h.load(s, k)
		}
	case Store:
		for k := range b.c.Instances {
			h.store(s, k)
		}
	case Dirty:
		h.setAll(s.Reg, h.harvested[s.Loc.Name][0])
	case Discarded:
		h.setAll(s.Reg, h.harvested[s.Loc.Name][1])
	case Used:
		h.setAll(s.Reg, h.used[s.Loc.Name])
	case Point:
		return b.point(s.Loc.Name, s.Other)
	case Wait:
		for i := range b.t.Guests {
			var err error
			switch s.Other {
			case "":
				err = b.wait("all guest threads", true, func() bool { return b.done(i) })
			case b.t.Guests[i].Name:
				err = b.wait("the mark of "+s.Other, true, func() bool { return b.marked(i) })
			}
			if err != nil {
				return err
			}
		}
	case Delay:
		spin(int(s.Value))
	case LogDirty:
		return b.m.LogDirty(s.Value == 1)
	case Harvest, Abort:
		return h.harvest(s.Op == Harvest)
	case WorkingSet:
		return h.workingSet()
	case Pause:
		b.m.Pause()
		h.paused++
	case Resume:
		b.m.Resume()
		h.paused--
	case Fork:
		return h.fork()
	case Reap:
		return h.reap()
	case Compact:
		return os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0)
	default:
		return h.change(memory, s)
	}
	return nil
}

func (h *hostThread) setAll(reg int, v bool) {
	for k := range h.regs {
		h.regs[k][reg] = 0
		if v {
			h.regs[k][reg] = 1
		}
	}
}

// offset is where the word of an instance is on its page.
func offset(l Loc, k int) uint64 { return uint64(k*lineBytes + 8*l.Word) }

func (h *hostThread) load(s *Statement, k int) uint64 {
	var v uint64
	var err error
	p, off := h.b.page(s.Loc.Name), offset(s.Loc, k)
	switch s.Via {
	case ByTable:
		v, err = h.b.m.Load64(h.b.t.address(s.Loc.Name) + addr.GPA(off))
	case ByHVA:
		v, err = hostmem.Load64(p.hva() + addr.HVA(off))
	case ByHeld:
		v, err = hostmem.Load64(p.held + addr.HVA(off))
	case ByChild:
		if h.child == nil {
			return notThere
		}
		var word [8]byte
		err = h.child.ReadAt(word[:], h.where[slices.Index(h.b.pages, p)]+addr.HVA(off))
		for i, c := range word {
			v |= uint64(c) << (8 * i)
		}
	}
	if err != nil {
		return notThere
	}
	return v
}

// store stores, unless the memory is not there.
func (h *hostThread) store(s *Statement, k int) {
	p, off := h.b.page(s.Loc.Name), offset(s.Loc, k)
	switch s.Via {
	case ByTable:
		_ = h.b.m.Store64(h.b.t.address(s.Loc.Name)+addr.GPA(off), s.Value)
	case ByHVA:
		_ = hostmem.Store64(p.hva()+addr.HVA(off), s.Value)
	case ByHeld:
		_ = hostmem.Store64(p.held+addr.HVA(off), s.Value)
	case ByChild:
		if h.child == nil {
			return
		}
		if h.mem == nil {
			h.mem, _ = os.OpenFile("/proc/"+strconv.Itoa(h.child.PID())+"/mem", os.O_RDWR, 0)
		}
		if h.mem != nil {
			var word [8]byte
			for i := range word {
				word[i] = byte(s.Value >> (8 * i))
			}
			_, _ = h.mem.WriteAt(word[:], int64(h.where[slices.Index(h.b.pages, p)])+int64(off))
		}
	}
}

// harvest takes what is dirty.
func (h *hostThread) harvest(commit bool) error {
	h.b.held.Lock()
	defer h.b.held.Unlock()
	v, err := h.b.m.Harvest(h.b.ctx)
	if err != nil {
		return err
	}
	if !commit {
		return v.Abort()
	}
	for _, name := range h.b.t.names() {
		gfn := h.b.t.address(name).GFN()
		h.harvested[name] = [2]bool{v.Dirty().Contains(gfn), v.Discarded().Contains(gfn)}
	}
	return v.Commit()
}

func (h *hostThread) workingSet() error {
	w, err := h.b.m.TakeWorkingSet(h.b.ctx)
	if err != nil {
		return err
	}
	if w.All == nil {
		return &NotRunError{Need: NeedIdle, Why: w.NotTracked.Error(), Err: w.NotTracked}
	}
	for _, name := range h.b.t.names() {
		h.used[name] = w.All.Contains(h.b.t.address(name).GFN())
	}
	return nil
}

func (h *hostThread) fork() (err error) {
	if err := h.reap(); err != nil {
		return err
	}
	h.where = h.where[:0]
	for _, p := range h.b.pages {
		h.where = append(h.where, p.hva())
	}
	h.child, err = h.b.m.Memory().Fork()
	return err
}

// change carries out a change of mappings.
func (h *hostThread) change(memory *mm.Memory, s *Statement) error {
	p := h.b.page(s.Loc.Name)
	r := p.now()
	if s.How != Told {
		if err := h.raw(s, p); err != nil || s.How == Raw {
			return err
		}
		time.Sleep(lateness)
		return announce(memory, r)
	}
	switch s.Op {
	case Unmap:
		return memory.Unmap(r)
	case Map:
		return memory.Map(r)
	case Discard:
		return memory.Discard(r)
	case Punch:
		return memory.Punch(r)
	case Remove:
		return memory.Remove(r)
	case Free:
		return memory.Free(r)
	case PageOut:
		return memory.PageOut(r)
	case Collapse:
		err := memory.Collapse(r)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOMEM):
			return nil // there was no huge page for it, this time
		case errors.Is(err, unix.EINVAL):
			return &NotRunError{Need: NeedHugePages, Why: fmt.Sprintf("%v memory is not collapsed to huge pages here: %v", p.Backing, err), Err: err}
		}
		return err
	case Guard:
		err := memory.Guard(r)
		if errors.Is(err, unix.EINVAL) {
			return &NotRunError{Why: fmt.Sprintf("the kernel cannot guard %v memory (MADV_GUARD_INSTALL is of Linux 6.13, and 6.15 for files): %v", p.Backing, err), Err: err}
		}
		return err
	case Unguard:
		return memory.Unguard(r)
	case Mergeable:
		return memory.Mergeable(r)
	case Unmergeable:
		return memory.Unmergeable(r)
	case Protect:
		return memory.Protect(r, s.Access)
	case Populate:
		return memory.Populate(r, s.Access&addr.Write != 0)
	case Replace:
		return memory.Remap(h.stages[s].Range, r.Start)
	case RemapKeep:
		return memory.RemapKeep(r, p.other())
	case Move:
		to := p.other()
		if err := memory.Remap(r, to); err != nil {
			return err
		}
		p.at.Store(uint64(to))
		return nil
	case Migrate:
		return migrate(p.hva())
	}
	return fmt.Errorf("%s is no change: %w", s.Op, errors.ErrUnsupported)
}

// other returns where the page moves to: away, or home.
func (p *page) other() addr.HVA {
	if p.hva() == p.home.Range.Start {
		return p.away.Range.Start
	}
	return p.home.Range.Start
}

// lateness is how late a late announcement is: enough for guests to see the change, and for
// another thread of the host to act on that.
const lateness = 5 * time.Millisecond

// announce tells subscribers of a change to r that has been made.
func announce(memory *mm.Memory, r addr.HVARange) error {
	as := memory.AddressSpace()
	as.Lock()
	defer as.Unlock()
	inv := &notifier.Invalidation{Range: r, Event: notifier.Clear, After: addr.ReadWrite, Content: notifier.Changed}
	if err := as.InvalidateRangeStart(inv); err != nil {
		return err
	}
	as.InvalidateRangeEnd(inv)
	return nil
}

// raw makes the system call of a change alone.
func (h *hostThread) raw(s *Statement, p *page) error {
	r := p.now()
	switch s.Op {
	case Discard:
		return rawAdvise(r, unix.MADV_DONTNEED)
	case Remove:
		return rawAdvise(r, unix.MADV_REMOVE)
	case Punch:
		f := p.home.File()
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, p.home.Offset, int64(r.Bytes()))
	case Map:
		return rawMap(r)
	case Replace:
		return rawMove(h.stages[s].Range, r.Start)
	case RemapKeep, Move:
		return rawMove(r, p.away.Range.Start)
	}
	return fmt.Errorf("%s cannot be raw: %w", s.Op, errors.ErrUnsupported)
}

// rawMove moves pages, and leaves an empty mapping where they were.
func rawMove(from addr.HVARange, to addr.HVA) error {
	const flags = unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED | unix.MREMAP_DONTUNMAP
	_, _, errno := unix.Syscall6(unix.SYS_MREMAP, uintptr(from.Start), uintptr(from.Bytes()), uintptr(from.Bytes()), flags, uintptr(to), 0)
	return errnoOf("mremap", errno)
}

func rawAdvise(r addr.HVARange, advice int) error {
	_, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), uintptr(advice))
	return errnoOf("madvise", errno)
}

func rawMap(r addr.HVARange) error {
	return rawMmap(r, unix.PROT_READ|unix.PROT_WRITE)
}

// rawReserve puts a reservation where memory may be that nobody knows of.
func rawReserve(r addr.HVARange) error { return rawMmap(r, unix.PROT_NONE) }

func rawMmap(r addr.HVARange, prot uintptr) error {
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE | unix.MAP_FIXED
	_, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(r.Start), uintptr(r.Bytes()), prot, flags, ^uintptr(0), 0)
	return errnoOf("mmap", errno)
}

func errnoOf(call string, errno unix.Errno) error {
	if errno != 0 {
		return fmt.Errorf("%s: %w", call, errno)
	}
	return nil
}
