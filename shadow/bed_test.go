package shadow

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/trace"
)

// The invariants V* of the consumer are tested here and in the files beside, each by
// a test that is named for it. Where one is about what a single schedule does, it is a
// check: a function that makes the schedule step by step, and returns an error if
// the package breaks the invariant. The checks run on the package as it is, and in
// TestMutants on one with a defect.

// bedHost is mappings that change while they are looked up. That it lets nobody wait
// for a change is the worst that a host can do: it is for the table to notice.
type bedHost struct {
	mu     sync.Mutex // protects the model; a leaf
	model  hostModel
	lookUp func(hva addr.HVA) // called after each look, before its result is used
}

func (h *bedHost) Walk(r addr.HVARange, fn func(addr.HVARange, addr.Access)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.model.Walk(r, fn)
}

func (h *bedHost) Lookup(ctx context.Context, hva addr.HVA, within addr.HVARange) (addr.HVARange, addr.Access, error) {
	h.mu.Lock()
	run, access, err := h.model.Lookup(ctx, hva, within)
	h.mu.Unlock()
	if h.lookUp != nil {
		h.lookUp(hva)
	}
	return run, access, err
}

func (h *bedHost) set(r addr.HVARange, access addr.Access) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.model.set(r, access)
}

// bed is a tracker over memory that can really be used, whose mappings are modelled.
// There are three windows: ram, gfn 0x1000 on; high, at an address of its own; and
// alias, which shows the first pages of ram once more.
type bed struct {
	*Tracker
	host    *bedHost
	backend *bedBackend
	memory  []byte
	base    addr.HVA

	mu    sync.Mutex // protects what follows
	wrong []error
}

const (
	ramGFN     = addr.GFN(0x1000)
	aliasGFN   = addr.GFN(0x9000)
	highGFN    = addr.GFN(1) << 30
	aliasLen   = 4
	bedPages   = 16
	highPages  = 4
	sparePages = 4 // that no window shows, behind those of high
)

// bedBackend is a backend that counts, and in which things can be made to happen.
type bedBackend struct {
	mu     sync.Mutex // protects what follows
	slots  map[uint32]Slot
	held   int
	fail   func(op string, s Slot) error // may be nil; called before a step
	report func(format string, args ...any)
}

func (b *bedBackend) Hold() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held++
}

func (b *bedBackend) Release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held--
}

func (b *bedBackend) step(op string, s Slot, do func() error) error {
	if b.fail != nil {
		if err := b.fail(op, s); err != nil {
			return err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.held == 0 {
		b.report("%s %v while vCPUs may run", op, s)
	}
	return do()
}

// overlaps reports a slot that has frames or the number of s, apart from itself.
func (b *bedBackend) overlaps(s Slot, number bool) error {
	for _, o := range b.slots {
		if number && o.ID == s.ID || o.ID != s.ID && o.GFNs().Overlaps(s.GFNs()) {
			b.report("%v is made over %v", s, o)
			return unix.EEXIST
		}
	}
	return nil
}

func (b *bedBackend) CreateSlot(s Slot) error {
	return b.step("create", s, func() error {
		if err := b.overlaps(s, true); err != nil {
			return err
		}
		b.slots[s.ID] = s
		return nil
	})
}

func (b *bedBackend) DeleteSlot(s Slot) error {
	return b.step("delete", s, func() error {
		if b.slots[s.ID] != s {
			b.report("%v is deleted, and there is %v", s, b.slots[s.ID])
		}
		delete(b.slots, s.ID)
		return nil
	})
}

func (b *bedBackend) ChangeSlot(from, to Slot) error {
	return b.step("change", to, func() error {
		if b.slots[from.ID] != from {
			b.report("%v is changed, and there is %v", from, b.slots[from.ID])
		}
		if err := b.overlaps(to, false); err != nil {
			return err
		}
		b.slots[to.ID] = to
		return nil
	})
}

// newBed returns a bed with npages of RAM.
func newBed(m mutant, npages int) *bed {
	memory, err := unix.Mmap(-1, 0, (npages+highPages+sparePages)*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	if err != nil {
		panic(err)
	}
	b := &bed{memory: memory, base: addressOf(memory), host: &bedHost{model: hostModel{}}}
	b.backend = &bedBackend{slots: map[uint32]Slot{}, report: b.errorf}
	b.Tracker = NewTracker(b.host, b.backend, 64, trace.NewLog(16))
	b.slots.mutant = m
	b.host.set(addr.HVAs(b.base, uint64(len(memory))), addr.ReadWrite)
	for _, w := range []Window{
		{Name: "ram", GFN: ramGFN, NPages: uint64(npages), HVA: b.base},
		{Name: "high", GFN: highGFN, NPages: highPages, HVA: b.hva(npages)},
		{Name: "alias", GFN: aliasGFN, NPages: aliasLen, HVA: b.base},
	} {
		if err := b.AddWindow(w); err != nil {
			panic(err)
		}
	}
	return b
}

// close checks the bed once more, and gives its memory back.
func (b *bed) close() {
	b.check()
	b.Release()
	b.check()
	if st := b.table.Stats(); st.Pages != 0 || b.table.tables[1] != 0 || b.table.tables[2] != 0 {
		b.errorf("after the release there are %d pages in tables %v", st.Pages, b.table.tables)
	}
	if b.backend.held != 0 || len(b.backend.slots) != 0 {
		b.errorf("after the release the backend is held %d times and has %d slots", b.backend.held, len(b.backend.slots))
	}
	if err := unix.Munmap(b.memory); err != nil {
		b.errorf("%w", err)
	}
}

// finish is close at the end of a check, and returns what was wrong.
func (b *bed) finish() error {
	b.close()
	return b.err()
}

func (b *bed) errorf(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.wrong) < 8 {
		b.wrong = append(b.wrong, fmt.Errorf(format, args...))
	}
}

func (b *bed) err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return errors.Join(b.wrong...)
}

// check adds every invariant that does not hold to what is wrong.
func (b *bed) check() {
	if err := b.Check(); err != nil {
		b.errorf("%w", err)
	}
}

// hva returns the address of page i.
func (b *bed) hva(i int) addr.HVA { return b.base + addr.HVA(i*page) }

func (b *bed) hvas(i, n int) addr.HVARange { return addr.HVAs(b.hva(i), uint64(n*page)) }

// gpa returns where the guest has page i of ram.
func gpa(i int) addr.GPA { return (ramGFN + addr.GFN(i)).GPA() }

func aliasGPA(i int) addr.GPA { return (aliasGFN + addr.GFN(i)).GPA() }

// translated returns the frames that have a translation, in order.
func (b *bed) translated() (gfns []addr.GFN) {
	b.table.visit(allGFNs, func(_ *cell, gfn addr.GFN, level int) {
		gfns = slices.AppendSeq(gfns, each(levelBlock(gfn, level)))
	})
	return gfns
}

func each(r addr.GFNRange) iter.Seq[addr.GFN] {
	return func(yield func(addr.GFN) bool) {
		for gfn := r.Start; gfn < r.End && yield(gfn); gfn++ {
		}
	}
}

// touch uses pages of ram, so that they are translated.
func (b *bed) touch(pages ...int) {
	for _, i := range pages {
		if _, err := b.table.Load64(gpa(i)); err != nil {
			b.errorf("%w", err)
		}
	}
}

// runs fails the test if a check returns an error.
func runs(t *testing.T, checks ...func(mutant) error) {
	t.Helper()
	for _, check := range checks {
		if err := check(sound); err != nil {
			t.Error(err)
		}
	}
}
