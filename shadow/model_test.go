package shadow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

// model is what a bed should do, obviously: memory is an array, what a guest frame
// shows is a map, and so is what was written and used.
type model struct {
	b         *bed
	memory    []byte              // by host page, as the bed's
	shows     map[addr.GFN]int    // host page
	access    map[int]addr.Access // of a host page
	dirty     map[addr.GFN]bool   // since the last commit
	discarded map[addr.GFN]bool   // the same
	young     map[addr.GFN]bool   // since it was cleared, or its page changed
	refuse    int                 // the step that the backend refuses, counted down
	exact     bool                // nothing was refused, so that nothing else was zapped
}

func newModel(b *bed) *model {
	m := &model{
		b: b, memory: slices.Clone(b.memory), shows: map[addr.GFN]int{}, access: map[int]addr.Access{},
		dirty: map[addr.GFN]bool{}, discarded: map[addr.GFN]bool{}, young: map[addr.GFN]bool{}, exact: true,
	}
	for i := range bedPages + highPages {
		m.access[i] = addr.ReadWrite
	}
	for w := range b.Slots().Windows() {
		for gfn := range each(w.GFNs()) {
			m.shows[gfn] = int((w.hva(gfn) - b.base) / page)
		}
	}
	b.backend.fail = func(op string, s Slot) error {
		if m.refuse--; m.refuse == 0 {
			return errors.New("refused")
		}
		return nil
	}
	return m
}

// frames returns the frames that show a host page.
func (m *model) frames(page int) (gfns []addr.GFN) {
	for gfn, i := range m.shows {
		if i == page {
			gfns = append(gfns, gfn)
		}
	}
	return gfns
}

// change makes a change of n host pages from page i, in a bracket.
func (m *model) change(i, n int, event notifier.Event, content notifier.Content, to int, after addr.Access, make func()) error {
	inv := notifier.Invalidation{Range: m.b.hvas(i, n), Event: event, Content: content, After: after}
	for k := i; k < i+n; k++ {
		for _, gfn := range m.frames(k) {
			switch content {
			case notifier.Changed:
				m.dirty[gfn] = true
			case notifier.Zeroed:
				m.discarded[gfn] = true
			case notifier.Kept:
				if event == notifier.Protect && m.access[k] == addr.NoAccess && after != addr.NoAccess {
					m.dirty[gfn] = true
				}
			}
		}
	}
	if event == notifier.Remap {
		inv.To = m.b.hva(to)
	}
	refuse := m.refuse
	err := m.b.bracket(inv, make)
	if refuse > 0 && m.refuse <= 0 {
		// It was refused, as asked. The next bracket makes up for it.
		m.exact = false
		err = m.b.bracket(notifier.Invalidation{Range: m.b.hvas(0, 1), Event: notifier.Clear, Content: notifier.Kept, After: addr.ReadWrite}, func() {})
	}
	for k := range n {
		for _, gfn := range m.frames(i + k) {
			delete(m.young, gfn)
		}
	}
	return err
}

// set changes the access to n host pages from page i, and their content if it is given.
func (m *model) set(i, n int, event notifier.Event, access addr.Access, content int) error {
	does := notifier.Changed
	switch {
	case content < 0:
		does = notifier.Kept
	case content == 0:
		does = notifier.Zeroed
	}
	return m.change(i, n, event, does, 0, access, func() {
		m.b.host.set(m.b.hvas(i, n), access)
		for k := i; k < i+n; k++ {
			m.access[k] = access
		}
		if content >= 0 {
			for _, mem := range [][]byte{m.memory, m.b.memory} {
				for k := i * page; k < (i+n)*page; k++ {
					mem[k] = byte(content)
				}
			}
		}
	})
}

// remap moves a host page, which is not shown any more where it was: the other one
// is, which was shown nowhere or is no more.
func (m *model) remap(from, to int) error {
	if from == to || m.access[from] == addr.NoAccess || len(m.frames(to)) > 0 {
		return nil
	}
	if err := m.set(to, 1, notifier.Map, addr.ReadWrite, 0); err != nil {
		return err
	}
	gfns := m.frames(from)
	return m.change(from, 1, notifier.Remap, notifier.Kept, to, addr.NoAccess, func() {
		for _, mem := range [][]byte{m.memory, m.b.memory} {
			copy(mem[to*page:(to+1)*page], mem[from*page:(from+1)*page])
		}
		m.b.host.set(m.b.hvas(to, 1), m.access[from])
		m.access[to] = m.access[from]
		m.b.host.set(m.b.hvas(from, 1), addr.NoAccess)
		m.access[from] = addr.NoAccess
		for _, gfn := range gfns {
			m.shows[gfn] = to
		}
	})
}

// use returns how many of the n bytes at gpa can be used, and notes that they are.
func (m *model) use(gpa addr.GPA, n int, want addr.Access, byPage func(mem []byte, done int)) (done int) {
	for done < n {
		gfn := (gpa + addr.GPA(done)).GFN()
		offset := int((gpa + addr.GPA(done)).Offset())
		i, ok := m.shows[gfn]
		if !ok || m.access[i]&want != want {
			return done
		}
		part := min(page-offset, n-done)
		byPage(m.memory[i*page+offset:][:part], done)
		m.young[gfn] = true
		if want == addr.ReadWrite {
			for _, gfn := range m.frames(i) {
				m.dirty[gfn] = true
			}
		}
		done += part
	}
	return done
}

// step carries an instruction out on both, and compares them.
func (m *model) step(op, x, y, z byte) error {
	b := m.b
	i := int(x) % (bedPages + highPages)
	n := min(1+int(y)%4, bedPages+highPages-i)
	var at addr.GPA
	switch x % 8 {
	case 0:
		at = aliasGPA(0)
	case 1:
		at = highGFN.GPA()
	default:
		at = gpa(0)
	}
	at += addr.GPA(y)*addr.GPA(bedPages*page/256) + addr.GPA(z)
	compare := func(what string, got int, err error, want, n int) error {
		if got != want || (err == nil) != (want == n) || err != nil && !errors.Is(err, syscall.EFAULT) {
			return fmt.Errorf("%s of %d bytes at %v gives %d, %w; want %d", what, n, at, got, err, want)
		}
		return nil
	}
	switch op % 16 {
	case 0:
		return m.set(i, n, notifier.Unmap, addr.NoAccess, int(z))
	case 1, 2:
		return m.set(i, n, notifier.Map, addr.ReadWrite, int(z))
	case 3:
		return m.set(i, n, notifier.Protect, addr.Read, -1)
	case 4:
		return m.set(i, n, notifier.Protect, addr.ReadWrite, -1)
	case 5:
		if m.access[i] == addr.ReadWrite {
			return m.set(i, 1, notifier.Clear, addr.ReadWrite, 0)
		}
	case 6:
		return m.remap(i, int(z)%(bedPages+highPages))
	case 7, 8:
		at &^= 7
		want := uint64(0)
		done := m.use(at, 8, addr.Read, func(mem []byte, _ int) { want = load(mem) })
		v, err := b.table.Load64(at)
		if err == nil && v != want {
			return fmt.Errorf("Load64(%v) gives %#x, want %#x", at, v, want)
		}
		return compare("load", 8-8*btoi(err != nil), err, done, 8)
	case 9, 10:
		at &^= 7
		done := m.use(at, 8, addr.ReadWrite, func(mem []byte, _ int) { store(mem, uint64(z)) })
		err := b.table.Store64(at, uint64(z))
		return compare("store", 8-8*btoi(err != nil), err, done, 8)
	case 11:
		p, want := make([]byte, int(y)*int(z)%(3*page)), make([]byte, 3*page)
		done := m.use(at, len(p), addr.Read, func(mem []byte, done int) { copy(want[done:], mem) })
		got, err := b.table.ReadAt(p, int64(at))
		if got == done && !bytes.Equal(p[:got], want[:got]) {
			return fmt.Errorf("ReadAt of %d bytes at %v is not what was written", len(p), at)
		}
		return compare("ReadAt", got, err, done, len(p))
	case 12:
		p := bytes.Repeat([]byte{z, y, x}, int(z)*int(x)%page)
		done := m.use(at, len(p), addr.ReadWrite, func(mem []byte, done int) { copy(mem, p[done:]) })
		got, err := b.table.WriteAt(p, int64(at))
		return compare("WriteAt", got, err, done, len(p))
	case 13:
		return m.age(i, n)
	case 14:
		return m.harvest(z%2 == 0)
	case 15:
		m.refuse = 1 + int(z)%4
	}
	return nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// age clears the young bits of host pages.
func (m *model) age(i, n int) error {
	want := false
	for k := i; k < i+n; k++ {
		page := false
		for _, gfn := range m.frames(k) {
			page = page || m.young[gfn]
		}
		if got := m.b.TestYoung(m.b.hva(k)); got && !page || m.exact && got != page {
			return fmt.Errorf("TestYoung of page %d is %v, want %v", k, got, page)
		}
		want = want || page
	}
	if got := m.b.ClearYoung(m.b.hvas(i, n)); got && !want || m.exact && got != want {
		return fmt.Errorf("ClearYoung of %d pages from %d is %v, want %v", n, i, got, want)
	}
	for k := i; k < i+n; k++ {
		for _, gfn := range m.frames(k) {
			delete(m.young, gfn)
		}
	}
	return nil
}

// harvest compares what was written since the last commit.
func (m *model) harvest(commit bool) error {
	h, err := m.b.Harvest(context.Background())
	if err != nil {
		return err
	}
	if got, want := gfnsOf(h.Dirty()), slices.Sorted(maps.Keys(m.dirty)); !slices.Equal(got, want) {
		return fmt.Errorf("dirty are %v, want %v", got, want)
	}
	if got, want := gfnsOf(h.Discarded()), slices.Sorted(maps.Keys(m.discarded)); !slices.Equal(got, want) {
		return fmt.Errorf("discarded are %v, want %v", got, want)
	}
	if !commit {
		return h.Abort()
	}
	clear(m.dirty)
	clear(m.discarded)
	return h.Commit()
}

func gfnsOf(s *dirty.Set) (gfns []addr.GFN) {
	for r := range s.Runs() {
		gfns = slices.AppendSeq(gfns, each(r))
	}
	return gfns
}

// run runs a program of four bytes an instruction.
func (m *model) run(prog []byte) error {
	for at := 0; at+4 <= len(prog); at += 4 {
		err := m.step(prog[at], prog[at+1], prog[at+2], prog[at+3])
		if err == nil {
			err = m.b.Check()
		}
		if err == nil && !bytes.Equal(m.memory, m.b.memory) {
			err = errors.New("memory is not what it should be")
		}
		if err != nil {
			return fmt.Errorf("instruction %d, %v: %w", at/4, prog[at:at+4], err)
		}
	}
	return nil
}

// TestModel runs random programs.
func TestModel(t *testing.T) {
	rng := gvmtest.Rand(t)
	for range 60 {
		b := newBed(sound, bedPages)
		prog := make([]byte, 4*200)
		for i := range prog {
			prog[i] = byte(rng.Uint32())
		}
		if err := newModel(b).run(prog); err != nil {
			t.Fatalf("%v\nthe program is %v", err, prog)
		}
		b.backend.fail = nil
		if err := b.finish(); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzTable runs programs on a table and on the model.
func FuzzTable(f *testing.F) {
	f.Add([]byte("\x09\x02\x04\x08" + "\x00\x04\x02\x07" + "\x07\x02\x40\x00" + "\x01\x04\x01\x03" + "\x07\x02\x40\x00" + "\x0e\x00\x00\x00"))
	f.Add([]byte("\x0f\x00\x00\x02" + "\x00\x05\x03\x00" + "\x0c\x02\x30\x77" + "\x06\x05\x00\x11" + "\x0d\x00\x03\x00" + "\x0b\x00\x20\x66"))
	f.Add([]byte("\x03\x01\x01\x00" + "\x0a\x00\x00\x08" + "\x04\x01\x01\x00" + "\x0a\x00\x00\x08" + "\x0e\x00\x00\x01" + "\x0e\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, prog []byte) {
		b := newBed(sound, bedPages)
		if err := newModel(b).run(prog[:min(len(prog), 4*256)]); err != nil {
			t.Error(err)
		}
		b.backend.fail = nil
		if err := b.finish(); err != nil {
			t.Error(err)
		}
	})
}

// TestStorm has several goroutines do everything at once, and judges what each of them
// sees by these rules:
//
//  1. An access to a page that was mapped all the time is carried out; one to a page
//     that was not mapped all the time is refused.
//  2. A word that one goroutine writes is what it has last written there, if the page
//     was mapped all the time since.
//  3. A store that begins after one harvest has begun, and ends before the next
//     does, is in that.
//  4. Nothing is wrong with the structure at any time.
func TestStorm(t *testing.T) {
	const (
		users    = 3
		mutators = 2
	)
	length := gvmtest.StormLasts(300 * time.Millisecond)
	rng := gvmtest.Rand(t)
	b := newBed(sound, bedPages)
	first, pages := aliasLen, bedPages-aliasLen // pages that are shown once

	// The version of a page's mapping: it is odd while that is away, and is
	// changed inside the bracket.
	var version [bedPages]atomic.Uint64
	var started, done [users][bedPages]atomic.Uint64
	var stop atomic.Bool
	var all sync.WaitGroup
	for n := range users {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
		view := b.table.NewView(t.Context())
		all.Go(func() {
			defer view.Close()
			var wrote [bedPages]struct{ version, v uint64 }
			for v := uint64(1); !stop.Load(); v++ {
				runtime.Gosched() // there are more goroutines than processors
				p := first + rng.IntN(pages)
				at := gpa(p) + addr.GPA(8*n)
				before := version[p].Load()
				var err error
				got := wrote[p].v
				switch rng.IntN(4) {
				case 0:
					started[n][p].Add(1)
					if err = view.Store64(at, v); err == nil {
						wrote[p].version, wrote[p].v = before, v
						done[n][p].Add(1)
					} else {
						started[n][p].Add(^uint64(0)) // it was none
					}
					got = wrote[p].v
				case 1:
					got, err = view.Load64(at)
				case 2:
					err = b.table.Use(at, 8, addr.Read, func(word []byte) error {
						runtime.Gosched()
						got = load(word)
						return nil
					})
				case 3:
					var word [8]byte
					_, err = view.ReadAt(word[:], int64(at))
					got = load(word[:])
				}
				if version[p].Load() != before {
					continue
				}
				switch away := before%2 == 1; {
				case away != errors.Is(err, syscall.EFAULT), !away && err != nil:
					b.errorf("page %d was away all the time: %v; the access gave %w", p, away, err)
				case !away && wrote[p].version == before && got != wrote[p].v:
					b.errorf("page %d has %d, and %d was the last to be written", p, got, wrote[p].v)
				}
			}
		})
	}
	for n := range mutators {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
		all.Go(func() {
			for !stop.Load() {
				for range rng.IntN(100) {
					runtime.Gosched() // changes that nobody notices are none
				}
				p := first + (rng.IntN(pages/mutators)*mutators+n)%pages
				away := version[p].Load()%2 == 1
				inv := notifier.Invalidation{Range: b.hvas(p, 1), Event: notifier.Unmap}
				access := addr.NoAccess
				switch {
				case away:
					inv.Event, inv.After, access = notifier.Map, addr.ReadWrite, addr.ReadWrite
				case rng.IntN(3) == 0: // the same page, or another in its place
					inv.Event, inv.After, access = notifier.Clear, addr.ReadWrite, addr.ReadWrite
				}
				if err := b.bracket(inv, func() {
					clear(b.memory[p*page : (p+1)*page])
					b.host.set(inv.Range, access)
					version[p].Add(1)
					if away == (access == addr.NoAccess) {
						version[p].Add(1)
					}
				}); err != nil {
					b.errorf("%w", err)
				}
			}
		})
	}
	all.Go(func() { // the harvester
		// Of stores, those that had begun when the last harvest that was
		// committed had.
		var bound [users][bedPages]uint64
		for i := 0; !stop.Load(); i++ {
			time.Sleep(time.Millisecond) // grace periods are for others, too
			var ended, next [users][bedPages]uint64
			for n := range users {
				for p := range bedPages {
					ended[n][p] = done[n][p].Load()
				}
			}
			h, err := b.table.Dirty().Begin()
			if err != nil {
				b.errorf("%w", err)
				return
			}
			for n := range users {
				for p := range bedPages {
					if ended[n][p] > bound[n][p] && !h.Dirty().Contains(ramGFN+addr.GFN(p)) {
						b.errorf("page %d is not in harvest %d, and was written since the last", p, i)
					}
					next[n][p] = started[n][p].Load()
				}
			}
			end := h.Abort
			if i%3 > 0 {
				bound, end = next, h.Commit
			}
			if err := end(); err != nil {
				b.errorf("%w", err)
			}
		}
	})
	all.Go(func() { // the rest
		for i := 0; !stop.Load(); i++ {
			runtime.Gosched()
			b.ClearYoung(b.hvas(i%bedPages, 1))
			b.TestYoung(b.hva(i % bedPages))
			if i%64 > 0 {
				continue // it is long, and nothing changes meanwhile
			}
			if err := b.table.Check(); err != nil {
				b.errorf("%w", err)
			}
		}
	})
	for begin := time.Now(); time.Since(begin) < length && b.err() == nil; {
		time.Sleep(time.Millisecond)
	}
	stop.Store(true)
	all.Wait()
	st := b.table.Stats()
	changes := uint64(0)
	for p := range version {
		changes += version[p].Load()
	}
	t.Logf("%d changes, %d sets of slots; %d faults, %d overtaken; %d pages zapped, %d grace periods waited for", changes, b.Slots().Generation(), st.Faults, st.Retries, st.Zapped, st.Flushes)
	if st.Faults == 0 || st.Flushes == 0 {
		t.Error("the storm was none")
	}
	if err := b.finish(); err != nil {
		t.Error(err)
	}
}
