package hostops

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
)

// StrayConfig describes changes that code makes which does not know the guest.
type StrayConfig struct {
	Target Target
	Seed   uint64

	// Own is pages of RAM whose mappings nobody else changes: those that are taken away,
	// and given back by operations, are of these. Those of Any only lose their content.
	Own, Any Range

	// Events and Trace say how the changes are followed, and so which can be made: see
	// mm.EventWatch and mm.TraceWatch.
	Events, Trace bool

	// Compact has the kernel compact all of the machine's memory now and then, which moves
	// pages of everybody. It takes root.
	Compact bool

	// Made is told of each change, after it. nil: it is not.
	Made func(StrayRecord)
}

// StrayRecord is a change that was made.
type StrayRecord struct {
	Kind  Kind // of the operation that would have been the same
	Range addr.HVARange
	To    addr.HVA // of a Remap
}

func (r StrayRecord) String() string {
	if r.Kind == Remap {
		return fmt.Sprintf("%s %v to %v", r.Kind, r.Range, r.To)
	}
	return fmt.Sprintf("%s %v", r.Kind, r.Range)
}

// Told reports whether an mm.EventWatch tells of the change.
func (r StrayRecord) Told() bool {
	return slices.Contains([]Kind{Discard, Free, Remove, Unmap, Map, Remap}, r.Kind)
}

// Strays makes changes at random, with system calls of its own, as a library or a
// debugger might. They are of all kinds that a watch of the memory can follow, and pages
// come back by operations, as the report of a watch would have it done. One goroutine uses
// it at a time; there may be several of them for a memory, each with its Own pages.
type Strays struct {
	config StrayConfig
	rng    *rand.Rand
	calls  []strayCall
	refuge *mm.Region // where pages of Own are moved to
	step   int
	absent map[uint64]absence // by page of Own
	child  *mm.Child          // of a fork, or nil
}

// absence is a page that was taken away.
type absence struct {
	at    addr.HVA // where it was moved to; 0: it was not
	until int      // the step in which it comes back
}

// strayCall is a change of one page, that is at hva.
type strayCall struct {
	kind Kind
	own  bool // of pages of Own
	call func(s *Strays, page uint64, hva addr.HVA) (to addr.HVA, err error)
	when func(c *StrayConfig) bool // whether there is such a thing, and it is followed; nil: always
}

func strayAdvice(advice int) func(*Strays, uint64, addr.HVA) (addr.HVA, error) {
	return func(_ *Strays, _ uint64, hva addr.HVA) (addr.HVA, error) {
		return 0, rawAdvise(addr.HVAs(hva, addr.PageSize), advice)
	}
}

var strayCalls = []strayCall{
	{kind: Discard, call: strayAdvice(unix.MADV_DONTNEED)},
	{kind: Discard, own: true, call: strayAdvice(unix.MADV_DONTNEED)},
	{kind: PageOut, call: strayAdvice(unix.MADV_PAGEOUT)},
	{kind: Remove, call: strayAdvice(unix.MADV_REMOVE), when: strayBacking(mm.Memfd, mm.SharedAnonymous, mm.File)},
	{kind: Free, own: true, call: (*Strays).free, when: strayBacking(mm.Anonymous)},
	{kind: Punch, call: (*Strays).punch, when: func(c *StrayConfig) bool { return c.Trace && c.Target.RAM.Backing == mm.Memfd }},
	{kind: Unmap, own: true, call: (*Strays).unmap},
	{kind: Map, own: true, call: (*Strays).mapOver, when: func(c *StrayConfig) bool {
		return c.Events || c.Target.RAM.Backing == mm.Anonymous // or nobody sees that it is other memory
	}},
	{kind: Remap, own: true, call: (*Strays).move, when: func(c *StrayConfig) bool { return c.Events }},
	{kind: strayFork, call: (*Strays).fork},
	{kind: strayCompact, call: (*Strays).compact, when: func(c *StrayConfig) bool { return c.Compact }},
}

// Kinds of changes that are no operations.
const (
	strayFork    Kind = "fork"
	strayCompact Kind = "compact"
)

func strayBacking(backings ...mm.Backing) func(*StrayConfig) bool {
	return func(c *StrayConfig) bool { return slices.Contains(backings, c.Target.RAM.Backing) }
}

// ErrNotFollowed is what errors.Is finds in the error of a Step or Restore that did not find
// memory as it should be once a change has been followed.
var ErrNotFollowed = errors.New("what others have changed was not followed")

// NewStrays returns changes of a memory that is watched, none of which has been made.
func NewStrays(c StrayConfig) (*Strays, error) {
	if !c.Events && !c.Trace {
		return nil, fmt.Errorf("change memory behind its back: it is not watched: %w", unix.EINVAL)
	}
	for _, r := range []Range{c.Own, c.Any} {
		if r.End > c.Target.pages() || r.Start >= r.End {
			return nil, fmt.Errorf("change memory behind its back: pages %v of %d: %w", r, c.Target.pages(), unix.EINVAL)
		}
	}
	s := &Strays{config: c, rng: rand.New(rand.NewPCG(c.Seed, 3)), absent: map[uint64]absence{}}
	for _, call := range strayCalls {
		if call.when == nil || call.when(&s.config) {
			s.calls = append(s.calls, call)
		}
	}
	var err error
	s.refuge, err = c.Target.Memory.NewRegion(mm.RegionConfig{
		Name: "refuge", Size: c.Own.Len() << addr.PageShift, Backing: mm.Anonymous, Reserved: true,
	})
	return s, err
}

// Step makes a change, and gives back pages whose time has come. What the kernel refuses,
// because of what else is done to the page at the moment, is not made.
func (s *Strays) Step(ctx context.Context) error {
	s.step++
	if err := s.giveBack(ctx, func(a absence) bool { return a.until <= s.step }); err != nil {
		return err
	}
	call := s.calls[s.rng.IntN(len(s.calls))]
	of := s.config.Any
	if call.own {
		of = s.config.Own
	}
	page := of.Start + s.rng.Uint64N(of.Len())
	if _, gone := s.absent[page]; gone {
		return nil
	}
	hva, ok := s.config.Target.HVA(page)
	if !ok {
		return nil
	}
	to, err := call.call(s, page, hva)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s of page %d at %v behind the back of its memory: %w", call.kind, page, hva, err)
	}
	if call.kind == Unmap || call.kind == Map || call.kind == Remap {
		s.absent[page] = absence{to, s.step + 1 + s.rng.IntN(4)}
	}
	if s.config.Made != nil {
		s.config.Made(StrayRecord{call.kind, addr.HVAs(hva, addr.PageSize), to})
	}
	return nil
}

// Restore gives back all that is missing.
func (s *Strays) Restore(ctx context.Context) error {
	err := s.giveBack(ctx, func(absence) bool { return true })
	if s.child != nil {
		err = errors.Join(err, s.child.Close())
		s.child = nil
	}
	return err
}

// giveBack gives back the pages for which due is true, by operations. What took them has
// been followed before: of a page that is there again, a watch would not tell.
func (s *Strays) giveBack(ctx context.Context, due func(absence) bool) error {
	m := s.config.Target.Memory
	followed := false
	for page := s.config.Own.Start; page < s.config.Own.End; page++ {
		a, gone := s.absent[page]
		if !gone || !due(a) {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !followed {
			m.Follow()
			followed = true
		}
		home := s.config.Target.home(Range{page, page + 1})
		var err error
		if a.at != 0 {
			err = m.Remap(addr.HVAs(a.at, addr.PageSize), home.Start)
		} else {
			err = m.Map(home)
		}
		if err != nil {
			return fmt.Errorf("%w: page %d cannot be given back: %w", ErrNotFollowed, page, err)
		}
		delete(s.absent, page)
	}
	return nil
}

// free is MADV_FREE, and then a store by the machine, without which nobody knows what
// the page has.
func (s *Strays) free(page uint64, hva addr.HVA) (addr.HVA, error) {
	if err := rawAdvise(addr.HVAs(hva, addr.PageSize), unix.MADV_FREE); err != nil {
		return 0, err
	}
	p := make([]byte, addr.PageSize)
	for i := range p {
		p[i] = byte(s.step)
	}
	return 0, s.config.Target.Write(page, 0, p)
}

func (s *Strays) punch(page uint64, _ addr.HVA) (addr.HVA, error) {
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	ram := s.config.Target.RAM
	return 0, unix.Fallocate(int(ram.File().Fd()), mode, ram.Offset+int64(page<<addr.PageShift), addr.PageSize)
}

func (s *Strays) unmap(_ uint64, hva addr.HVA) (addr.HVA, error) {
	return 0, errnoOf(unix.Syscall(unix.SYS_MUNMAP, uintptr(hva), addr.PageSize, 0))
}

// mapOver maps other memory in the place of the page.
func (s *Strays) mapOver(_ uint64, hva addr.HVA) (addr.HVA, error) {
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED
	return 0, errnoOf(unix.Syscall6(unix.SYS_MMAP, uintptr(hva), addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, flags, ^uintptr(0), 0))
}

func (s *Strays) move(page uint64, hva addr.HVA) (addr.HVA, error) {
	const flags = unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED
	to := s.refuge.Range.Start + addr.HVA((page-s.config.Own.Start)<<addr.PageShift)
	return to, errnoOf(unix.Syscall6(unix.SYS_MREMAP, uintptr(hva), addr.PageSize, addr.PageSize, flags, uintptr(to), 0))
}

// fork makes a child, or ends the one that there is: while it is there, pages of private
// memory are copied when they are written.
func (s *Strays) fork(uint64, addr.HVA) (addr.HVA, error) {
	if s.child != nil {
		err := s.child.Close()
		s.child = nil
		return 0, err
	}
	var err error
	s.child, err = s.config.Target.Memory.Fork()
	return 0, err
}

func (s *Strays) compact(uint64, addr.HVA) (addr.HVA, error) {
	err := os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) { // the kernel cannot
		return 0, unix.ENOTSUP
	}
	return 0, err
}

func rawAdvise(r addr.HVARange, advice int) error {
	return errnoOf(unix.Syscall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), uintptr(advice)))
}

func errnoOf(_, _ uintptr, errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
