package shadow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

func (b *bedBackend) DirtyLog([]Slot, *dirty.Set) error   { return errors.New("nothing is logged") }
func (b *backendModel) DirtyLog([]Slot, *dirty.Set) error { return errors.New("nothing is logged") }
func (nullBackend) DirtyLog([]Slot, *dirty.Set) error     { return errors.New("nothing is logged") }

// logBackend logs what the guest writes as KVM does: by the slot, whose log goes with
// it.
type logBackend struct {
	*bedBackend
	written map[uint32]map[uint64]bool // of logged slots, by number and page; nil for others
	broken  error
}

func (b *logBackend) CreateSlot(s Slot) error { return b.reset(s, b.bedBackend.CreateSlot(s)) }
func (b *logBackend) DeleteSlot(s Slot) error {
	s.LogDirty = false
	return b.reset(s, b.bedBackend.DeleteSlot(b.slots[s.ID]))
}

func (b *logBackend) ChangeSlot(from, to Slot) error {
	if err := b.bedBackend.ChangeSlot(from, to); err != nil || from.LogDirty == to.LogDirty {
		return err
	}
	return b.reset(to, nil)
}

func (b *logBackend) reset(s Slot, err error) error {
	if err == nil {
		delete(b.written, s.ID)
		if s.LogDirty {
			b.written[s.ID] = map[uint64]bool{}
		}
	}
	return err
}

func (b *logBackend) DirtyLog(slots []Slot, written *dirty.Set) error {
	if b.broken != nil {
		return b.broken
	}
	for _, s := range slots {
		log, ok := b.written[s.ID]
		if !ok { // it goes by the number: another slot that has it now has a log, too
			return unix.ENOENT
		}
		for page := range log {
			written.Add(s.GFN + addr.GFN(page))
		}
		clear(log)
	}
	return nil
}

// logBed is a bed whose guest is logged.
type logBed struct {
	*bed
	log  *logBackend
	copy []byte // what a snapshot would have
}

func newLogBed(m mutant) *logBed {
	b := &logBed{bed: newBed(m, bedPages)}
	b.log = &logBackend{bedBackend: b.backend, written: map[uint32]map[uint64]bool{}}
	b.slots.backend = b.log
	if err := b.LogDirty(true); err != nil {
		b.errorf("%w", err)
	}
	b.copy = slices.Clone(b.memory)
	return b
}

// guestStores has the guest write v to its page i.
func (b *logBed) guestStores(i int, v byte) {
	for id, s := range b.backend.slots {
		if gfn := ramGFN + addr.GFN(i); s.GFNs().Contains(gfn) && s.Access == addr.ReadWrite {
			b.memory[int(s.hva(gfn)-b.base)] = v
			if log := b.log.written[id]; log != nil {
				log[uint64(gfn-s.GFN)] = true
			}
			return
		}
	}
	b.errorf("the guest stores to page %d, which it has not", i)
}

// change changes what ram shows at page i.
func (b *logBed) change(i int, event notifier.Event, content notifier.Content, access addr.Access, v byte) {
	inv := notifier.Invalidation{Range: b.hvas(i, 1), Event: event, Content: content, After: access}
	if err := b.bracket(inv, func() {
		b.host.set(inv.Range, access)
		if content != notifier.Kept {
			for k := range page {
				b.memory[i*page+k] = v
			}
		}
	}); err != nil {
		b.errorf("%w", err)
	}
}

// harvest brings the copy up to date with what is reported, and compares it.
func (b *logBed) harvest(what string) {
	h, err := b.Harvest(context.Background())
	if err != nil {
		b.errorf("%w", err)
		return
	}
	for r := range h.Discarded().RunsIn(frames(ramGFN, bedPages)) {
		at := int(r.Start-ramGFN) * page
		clear(b.copy[at : at+int(r.NPages())*page])
	}
	for gfn := range ofSet(h.Dirty()) {
		at := int(gfn-ramGFN) * page
		if gfn < ramGFN || gfn >= ramGFN+bedPages {
			continue // an alias
		}
		switch _, err := b.table.ReadAt(b.copy[at:at+page], int64(gfn.GPA())); {
		case errors.Is(err, syscall.EFAULT):
			clear(b.copy[at : at+page]) // it is reported again when it comes back
		case err != nil:
			b.errorf("%w", err)
		}
	}
	for i := range bedPages {
		if b.host.model[b.hva(i)]&addr.Read == 0 {
			continue // nobody can tell what it has
		}
		if !bytes.Equal(b.copy[i*page:(i+1)*page], b.memory[i*page:(i+1)*page]) {
			b.errorf("%s: page %d of the copy is not what the memory has", what, i)
		}
	}
	if err := h.Commit(); err != nil {
		b.errorf("%w", err)
	}
}

func ofSet(s *dirty.Set) func(func(addr.GFN) bool) {
	return func(yield func(addr.GFN) bool) {
		for r := range s.Runs() {
			for gfn := range each(r) {
				if !yield(gfn) {
					return
				}
			}
		}
	}
}

// TestV13NothingIsLostWithASlot: what the guest has written is reported, though its slot
// has been deleted, cut, made read-only or moved meanwhile.
func TestV13NothingIsLostWithASlot(t *testing.T) { runs(t, checkSlotLogs) }

func checkSlotLogs(m mutant) error {
	b := newLogBed(m)
	b.guestStores(5, 1)
	b.harvest("a store")
	b.guestStores(5, 2)
	b.change(9, notifier.Unmap, notifier.Gone, addr.NoAccess, 0) // cuts the slot
	b.harvest("cut elsewhere")
	b.guestStores(5, 3)
	b.change(5, notifier.Protect, notifier.Kept, addr.Read, 0)
	b.harvest("made read-only")
	b.change(5, notifier.Protect, notifier.Kept, addr.ReadWrite, 0)
	b.guestStores(6, 4)
	b.change(9, notifier.Map, notifier.Zeroed, addr.ReadWrite, 0) // one slot again
	b.harvest("merged")
	b.guestStores(7, 5)
	if err := b.LogDirty(false); err != nil {
		b.errorf("%w", err)
	}
	b.harvest("no longer logged")
	return b.finish()
}

// TestGuestWritesAliases: a page that the guest has written at one frame is reported at all
// that show it, also when the slots go before the harvest.
func TestGuestWritesAliases(t *testing.T) { runs(t, checkGuestAliases) }

func checkGuestAliases(m mutant) error {
	b := newLogBed(m)
	dirties := func(what string, want ...addr.GFN) {
		h, err := b.Harvest(context.Background())
		if err != nil {
			b.errorf("%w", err)
			return
		}
		if got := slices.Collect(ofSet(h.Dirty())); !slices.Equal(got, want) {
			b.errorf("%s: dirty are %v, want %v", what, got, want)
		}
		if err := h.Commit(); err != nil {
			b.errorf("%w", err)
		}
	}
	b.guestStores(2, 1)
	b.guestStores(9, 1)
	dirties("a store to a page with an alias, and one to another", ramGFN+2, ramGFN+9, aliasGFN+2)
	b.guestStores(2, 2)
	b.change(2, notifier.Protect, notifier.Kept, addr.Read, 0)
	dirties("the slots are cut", ramGFN+2, aliasGFN+2)
	return b.finish()
}

// TestNoSlotShowsAHole: what is unmapped is in no slot.
func TestNoSlotShowsAHole(t *testing.T) { runs(t, checkHole) }

func checkHole(m mutant) error {
	b := newLogBed(m)
	b.change(9, notifier.Unmap, notifier.Gone, addr.NoAccess, 0)
	if s, ok := b.Slots().Lookup(ramGFN + 9); ok {
		b.errorf("page 9 is unmapped, and in %v", s)
	}
	return b.finish()
}

// TestContentIsRecorded: what a change of the mapping does to content is reported,
// whether somebody writes or not.
func TestContentIsRecorded(t *testing.T) { runs(t, checkContent) }

func checkContent(m mutant) error {
	b := newLogBed(m)
	for i := range bedPages {
		b.guestStores(i, byte(1+i))
	}
	b.harvest("stores")
	b.change(4, notifier.Clear, notifier.Zeroed, addr.ReadWrite, 0)
	b.change(5, notifier.Clear, notifier.Kept, addr.ReadWrite, 0)
	b.change(6, notifier.Unmap, notifier.Changed, addr.ReadWrite, 77)
	b.harvest("discarded, kept and replaced")
	b.guestStores(4, 8)
	b.change(4, notifier.Clear, notifier.Zeroed, addr.ReadWrite, 0)
	b.guestStores(4, 9)
	b.harvest("a store after a discard")
	b.change(7, notifier.Unmap, notifier.Gone, addr.NoAccess, 0)
	b.harvest("gone")
	b.change(7, notifier.Map, notifier.Zeroed, addr.ReadWrite, 0)
	b.harvest("mapped again")
	b.guestStores(3, 10)
	b.change(3, notifier.Protect, notifier.Kept, addr.NoAccess, 0)
	b.harvest("dirty and out of reach")
	b.change(3, notifier.Protect, notifier.Kept, addr.ReadWrite, 0)
	b.harvest("within reach again")
	inv := notifier.Invalidation{Range: b.hvas(8, 1), Event: notifier.Clear, Content: notifier.Zeroed, After: addr.ReadWrite}
	if err := b.InvalidateRangeStart(&inv); err != nil {
		b.errorf("%w", err)
	}
	b.memory[8*page] = 99 // it fails, having done something
	inv.Failed = true
	b.InvalidateRangeEnd(&inv)
	b.harvest("failed half way")
	return b.finish()
}

// TestHarvestRecordsWhatItIsTold has every content, and one that nobody knows.
func TestHarvestRecordsWhatItIsTold(t *testing.T) {
	for content, want := range map[notifier.Content]string{
		notifier.Changed: "dirty", notifier.Kept: "", notifier.Zeroed: "discarded", notifier.Gone: "discarded", 200: "dirty",
	} {
		t.Run(content.String(), func(t *testing.T) {
			b := newLogBed(sound)
			b.change(8, notifier.Clear, content, addr.ReadWrite, 0)
			h, err := b.Harvest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for name, set := range map[string]*dirty.Set{"dirty": h.Dirty(), "discarded": h.Discarded()} {
				if !set.Empty() {
					got[name] = fmt.Sprint(set)
				}
			}
			if names := slices.Collect(maps.Keys(got)); want == "" && len(got) != 0 || want != "" && (!slices.Equal(names, []string{want}) || got[want] != "gfn [0x1008, 0x1009)") {
				t.Errorf("a change of page 8 is recorded as %v, want %q", got, want)
			}
			if _, err := b.Harvest(t.Context()); !errors.Is(err, dirty.ErrOpen) {
				t.Errorf("a second harvest gives %v, want ErrOpen", err)
			}
			if err := h.Abort(); err != nil {
				t.Error(err)
			}
			if err := b.finish(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBackendLosesALog: where the backend does not tell what the guest has written, all
// is taken to be.
func TestBackendLosesALog(t *testing.T) {
	b := newLogBed(sound)
	b.log.broken = unix.EIO
	b.guestStores(5, 1)
	b.harvest("a log that cannot be read")
	b.log.broken = nil
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}

// TestHarvestAwaitsBrackets: a harvest does not come between a change and the record
// of it.
func TestHarvestAwaitsBrackets(t *testing.T) { runs(t, checkHarvestInBracket) }

func checkHarvestInBracket(m mutant) error {
	b := newLogBed(m)
	as := notifier.New(notifier.Options{})
	if err := as.Register(context.Background(), b.Tracker); err != nil {
		return err
	}
	b.guestStores(8, 1)
	b.harvest("a store")
	b.guestStores(3, 10)
	b.change(3, notifier.Protect, notifier.Kept, addr.NoAccess, 0)
	b.harvest("dirty and out of reach")
	b.change(3, notifier.Protect, notifier.Kept, addr.ReadWrite, 0)
	b.harvest("within reach again")
	inv := notifier.Invalidation{Range: b.hvas(8, 1), Event: notifier.Clear, Content: notifier.Zeroed, After: addr.ReadWrite}
	as.Lock()
	if err := as.InvalidateRangeStart(&inv); err != nil {
		return err
	}
	b.memory[8*page] = 0
	ctx, cancel := context.WithTimeout(context.Background(), gvmtest.GraceFor(m))
	defer cancel()
	<-gvmtest.Background(func() {
		if h, err := b.Harvest(ctx); !errors.Is(err, syscall.EINTR) {
			b.errorf("a harvest in a bracket gives %v, want EINTR", err)
			if err == nil {
				_ = h.Commit()
			}
		}
	})
	as.InvalidateRangeEnd(&inv)
	as.Unlock()
	b.harvest("after the bracket")
	b.check()
	if err := as.PutUser(); err != nil {
		b.errorf("%w", err)
	}
	b.Unregister()
	return b.finish()
}
