package vm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/cpu"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
)

// slotRequests returns how many requests for slots are in the log since seq.
func slotRequests(t *testing.T, log *trace.Log, seq uint64) (n int) {
	t.Helper()
	events, lost := log.Since(seq)
	if lost > 0 {
		t.Fatalf("%d events are lost", lost)
	}
	for _, e := range events {
		if e.Kind == trace.SlotCreate || e.Kind == trace.SlotDelete {
			n++
		}
	}
	return n
}

// TestEveryTaking has a guest use a page from which each operation has taken memory or
// permissions: with slots that are precise, lazy, and coarse for the lack of numbers,
// what it sees is the same.
func TestEveryTaking(t *testing.T) {
	const page = 15
	views := map[string]Config{
		"precise": {},
		"lazy":    {Policy: shadow.Lazy},
		"coarse":  {MaxSlots: minSlots},
	}
	type accesses struct{ load, store, add bool } // that the guest is still allowed
	for name, tt := range map[string]struct {
		backing    mm.Backing
		before     func(m *Machine) error // on the way to take; or nil
		take, back func(m *Machine) error
		op         mm.Op    // that errors name
		can        accesses // without waiting
		kept       bool     // the content, which was 42
	}{
		"unmap": {
			take: func(m *Machine) error { return m.Memory().Unmap(m.hvas(page, 1)) },
			back: func(m *Machine) error { return m.Memory().Map(m.hvas(page, 1)) },
			op:   mm.OpUnmap,
		},
		"protect none": {
			take: func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.NoAccess) },
			back: func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.ReadWrite) },
			op:   mm.OpProtect, kept: true,
		},
		"protect read": {
			take: func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.Read) },
			back: func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.ReadWrite) },
			op:   mm.OpProtect, kept: true, can: accesses{load: true},
		},
		"guard": {
			take: func(m *Machine) error { return m.Memory().Guard(m.hvas(page, 1)) },
			back: func(m *Machine) error { return m.Memory().Unguard(m.hvas(page, 1)) },
			op:   mm.OpGuard,
		},
		"truncate": {
			backing: mm.Memfd,
			take:    func(m *Machine) error { return m.Memory().Truncate(m.ram, page*addr.PageSize) },
			back:    func(m *Machine) error { return m.Memory().Truncate(m.ram, m.ram.Range.Bytes()) },
			op:      mm.OpTruncate,
		},
		"remap": { // which takes it from its address, and not from the guest
			take: func(m *Machine) error { return m.Memory().Remap(m.hvas(page, 1), m.spare.Range.Start) },
			can:  accesses{true, true, true}, kept: true,
		},
		"remap and protect": {
			before: func(m *Machine) error { return m.Memory().Remap(m.hvas(page, 1), m.spare.Range.Start) },
			take:   func(m *Machine) error { return m.Memory().Protect(m.spare.Range, addr.NoAccess) },
			back:   func(m *Machine) error { return m.Memory().Protect(m.spare.Range, addr.ReadWrite) },
			op:     mm.OpProtect, kept: true,
		},
	} {
		content := uint64(0)
		if tt.kept {
			content = 42
		}
		if tt.op == mm.OpGuard && !guards(t) {
			continue
		}
		for use, ut := range map[string]struct {
			do           func(ctx context.Context, p *Probe) (uint64, error)
			can          bool
			access       addr.Access // that is refused
			result, left uint64      // what it returns, and leaves in the page
		}{
			"load":  {func(ctx context.Context, p *Probe) (uint64, error) { return p.Load(ctx, gpaOf(page)) }, tt.can.load, addr.Read, content, content},
			"store": {func(ctx context.Context, p *Probe) (uint64, error) { return 0, p.Store(ctx, gpaOf(page), 7) }, tt.can.store, addr.ReadWrite, 0, 7},
			"add":   {func(ctx context.Context, p *Probe) (uint64, error) { return 0, p.Add(ctx, gpaOf(page), 7) }, tt.can.add, addr.Read, 0, content + 7},
		} {
			if use == "add" && tt.can.load {
				ut.access = addr.ReadWrite // it has been read
			}
			for view, c := range views {
				begin := func(t *testing.T, touch Touch) (*Machine, *Probe, context.Context) {
					c.Backing, c.Touch, c.Spare, c.Log = tt.backing, touch, addr.PageSize, trace.NewLog(1000)
					m := newMachine(t, c, "probe", nil)
					for i := uint64(0); i < page && c.MaxSlots != 0; i += 2 {
						if err := m.Memory().Unmap(m.hvas(i, 1)); err != nil {
							t.Fatal(err)
						}
					}
					ctx := testContext(t)
					if err := errors.Join(m.Store64(gpaOf(page), 42), m.Start(ctx)); err != nil {
						t.Fatal(err)
					}
					if tt.before != nil {
						if err := tt.before(m); err != nil {
							t.Fatal(err)
						}
					}
					seq := c.Log.Len()
					if err := tt.take(m); err != nil {
						t.Fatal(err)
					}
					if got, precise := slotRequests(t, c.Log, seq), view == "precise" || tt.op == ""; (got > 0) != precise || m.tracker.Coarse() != (view != "precise") {
						t.Errorf("slots that are %s (coarse: %v) took %d requests", view, m.tracker.Coarse(), got)
					}
					return m, m.Probe(0), ctx
				}
				left := func(t *testing.T, m *Machine) {
					t.Helper()
					if got := m.mustLoad(t, gpaOf(page)); got != ut.left {
						t.Errorf("the page has %d, want %d", got, ut.left)
					}
				}
				run := func(touch Touch, f func(t *testing.T)) {
					t.Run(fmt.Sprintf("op=%s/use=%s/slots=%s/touch=%v", strings.ReplaceAll(name, " ", "-"), use, view, touch), f)
				}
				run(Stop, func(t *testing.T) {
					m, p, ctx := begin(t, Stop)
					got, err := ut.do(ctx, p)
					if ut.can {
						if got != ut.result || err != nil {
							t.Errorf("the access gives %d, %v, want %d", got, err, ut.result)
						}
						left(t, m)
						return
					}
					if err == nil {
						t.Fatal("the guest got its access")
					}
					_, err = m.Wait()
					var e *ExitError
					if !errors.As(err, &e) {
						t.Fatalf("the run ended with %v, want an *ExitError", err)
					}
					if e.GPA != gpaOf(page) || e.Access != ut.access || e.Change == nil || e.Change.Op != tt.op || e.Extent == nil || e.Reason != takenAway {
						t.Errorf("the error does not tell of %v access to %v, and of %s: %v", ut.access, gpaOf(page), tt.op, err)
					}
					if e.RIP < uint64(guests.Image) || e.RIP > uint64(guests.Image)+100 {
						t.Errorf("rip 0x%x is not in the guest's image", e.RIP)
					}
					if m.exited() {
						t.Error("the guest has exited")
					}
				})
				run(Wait, func(t *testing.T) {
					m, p, ctx := begin(t, Wait)
					var got uint64
					used := make(chan error, 1)
					go func() {
						var err error
						got, err = ut.do(ctx, p)
						used <- err
					}()
					if !ut.can {
						for touches(m) == 0 {
							time.Sleep(100 * time.Microsecond)
						}
						select {
						case err := <-used:
							t.Fatalf("the access was completed (%v) while the page was away", err)
						case <-time.After(2 * time.Millisecond):
						}
						if err := tt.back(m); err != nil {
							t.Fatal(err)
						}
					}
					if err := <-used; err != nil || got != ut.result {
						t.Errorf("the access gives %d, %v, want %d", got, err, ut.result)
					}
					left(t, m)
				})
				if view != "precise" || ut.can {
					continue
				}
				run(Float, func(t *testing.T) {
					m, p, ctx := begin(t, Float)
					got, err := ut.do(ctx, p)
					if want := ^uint64(0); err != nil || use == "load" && got != want {
						t.Errorf("the access gives %#x, %v, want %#x", got, err, want)
					}
					if err := tt.back(m); err != nil {
						t.Fatal(err)
					}
					if got := m.mustLoad(t, gpaOf(page)); got != content {
						t.Errorf("the page has %d, want %d", got, content)
					}
				})
			}
		}
	}
}

// guards reports whether the kernel has guards, as it has since Linux 6.13.
func guards(t *testing.T) bool {
	t.Helper()
	memory := mm.New(nil)
	defer memory.Close()
	r, err := memory.NewRegion(mm.RegionConfig{Name: "guards", Size: addr.PageSize})
	if err == nil {
		err = memory.Guard(addr.HVAs(r.Range.Start, addr.PageSize))
	}
	return t.Run("op=guard/offered", func(t *testing.T) {
		if err != nil {
			gvmtest.Lack(t, gvmtest.Advice, err)
		}
	}) && err == nil
}

// TestFragmentation cuts RAM into many more pieces than there may be slots, under a guest
// that uses what is left, and puts it together again. What the guest sees, and what is
// reported of its stores, is what it is with as many slots as KVM has.
func TestFragmentation(t *testing.T) {
	const holes, limit = 100, 8
	for _, max := range []int{0, limit} {
		t.Run(fmt.Sprintf("slots=%d", max), func(t *testing.T) {
			c := Config{RAM: (2*holes + 8) * addr.PageSize, MaxSlots: max, Touch: Wait, Log: trace.NewLog(10000)}
			m := newMachine(t, c, "probe", nil)
			if err := m.LogDirty(true); err != nil {
				t.Fatal(err)
			}
			s := newSnapshot(t, m)
			ctx := testContext(t)
			if err := m.Start(ctx); err != nil {
				t.Fatal(err)
			}
			p := m.Probe(0)
			store := func(page, v uint64) {
				t.Helper()
				if err := p.Store(ctx, gpaOf(page), v); err != nil {
					t.Fatal(err)
				}
			}
			harvest := func() {
				t.Helper()
				h, err := m.Harvest(ctx)
				if err != nil {
					t.Fatal(err)
				}
				s.apply(t, h)
				if err := h.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			for i := range uint64(holes) {
				store(2*i, i+1)
				if err := m.Memory().Unmap(m.hvas(2*i+1, 1)); err != nil {
					t.Fatal(err)
				}
			}
			if max != 0 && (!m.tracker.Coarse() || m.Slots().Len() > limit) {
				t.Errorf("with %d holes there are %d slots, coarse: %v", holes, m.Slots().Len(), m.tracker.Coarse())
			}
			for i := range uint64(holes) {
				if got, err := p.Load(ctx, gpaOf(2*i)); got != i+1 || err != nil {
					t.Fatalf("between holes the guest reads %d from page %d (%v), want %d", got, 2*i, err, i+1)
				}
			}
			harvest()
			for i := range uint64(holes) {
				var filled chan error
				if i%10 == 0 { // the guest comes first, and waits
					before := touches(m)
					filled = make(chan error, 1)
					go func() {
						for touches(m) == before {
							time.Sleep(100 * time.Microsecond)
						}
						filled <- m.Memory().Map(m.hvas(2*i+1, 1))
					}()
					store(2*i+1, i+1)
				} else {
					filled = make(chan error, 1)
					filled <- m.Memory().Map(m.hvas(2*i+1, 1))
				}
				if err := <-filled; err != nil {
					t.Fatal(err)
				}
				store(2*i+1, 2*i+1)
			}
			if n := m.Slots().Len(); n != 2 || m.tracker.Coarse() {
				t.Errorf("with all mapped there are %d slots, want 2; coarse: %v", n, m.tracker.Coarse())
			}
			m.Pause()
			harvest()
			s.compare(t, "at the end")
			m.Resume()
			for i := range uint64(holes) {
				if got := m.mustLoad(t, gpaOf(2*i+1)); got != 2*i+1 {
					t.Errorf("page %d has %d, want %d", 2*i+1, got, 2*i+1)
				}
			}
		})
	}
}

// TestCoarseDoesNotFloat: an empty bus cannot be had in a slot. The run ends, and says of
// what.
func TestCoarseDoesNotFloat(t *testing.T) {
	m := newMachine(t, Config{Touch: Float, MaxSlots: minSlots}, "probe", nil)
	for i := uint64(1); i < 21; i += 2 {
		if err := m.Memory().Unmap(m.hvas(i, 1)); err != nil {
			t.Fatal(err)
		}
	}
	ctx := testContext(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	p := m.Probe(0)
	if v, err := p.Load(ctx, gpaOf(4)); v != 0 || err != nil {
		t.Errorf("the guest reads %#x from a page that is there, %v", v, err)
	}
	if _, err := p.Load(ctx, gpaOf(5)); err == nil {
		t.Fatal("the guest got its access")
	}
	_, err := m.Wait()
	if e := (*ExitError)(nil); !errors.As(err, &e) || e.GPA != gpaOf(5) {
		t.Errorf("the run ended with %v, want an *ExitError of %v", err, gpaOf(5))
	}
}

// TestLazyPause gives a page back that a guest waits for, under a Pause: the instruction
// must not be run before Resume.
func TestLazyPause(t *testing.T) {
	m := newMachine(t, Config{Policy: shadow.Lazy, Touch: Wait, Log: trace.NewLog(100)}, "probe", nil)
	ctx := testContext(t)
	if err := errors.Join(m.Start(ctx), m.Memory().Unmap(m.hvas(5, 1))); err != nil {
		t.Fatal(err)
	}
	stored := make(chan error, 1)
	go func() { stored <- m.Probe(0).Store(ctx, gpaOf(5), 7) }()
	for touches(m) == 0 {
		time.Sleep(100 * time.Microsecond)
	}
	m.Pause()
	if err := m.Memory().Map(m.hvas(5, 1)); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if got := m.mustLoad(t, gpaOf(5)); got != 0 {
			t.Fatalf("the guest stored %d while it was paused", got)
		}
	}
	m.Resume()
	if err := <-stored; err != nil {
		t.Fatal(err)
	}
	if got := m.mustLoad(t, gpaOf(5)); got != 7 {
		t.Errorf("the guest stored %d, want 7", got)
	}
}

// TestLazyReadsDoNotWaitForWrites takes a page away from a guest that loads from it, and
// gives it back read-only: that is enough, however soon it comes.
func TestLazyReadsDoNotWaitForWrites(t *testing.T) {
	m := newMachine(t, Config{Policy: shadow.Lazy, Touch: Wait}, "probe", nil)
	ctx := testContext(t)
	if err := errors.Join(m.Store64(gpaOf(5), 42), m.Start(ctx)); err != nil {
		t.Fatal(err)
	}
	p := m.Probe(0)
	for i := range 50 {
		if err := m.Memory().Protect(m.hvas(5, 1), addr.NoAccess); err != nil {
			t.Fatal(err)
		}
		back := make(chan error, 1)
		go func() {
			time.Sleep(time.Duration(i) * 20 * time.Microsecond)
			back <- m.Memory().Protect(m.hvas(5, 1), addr.Read)
		}()
		v, err := p.Load(ctx, gpaOf(5))
		if err := errors.Join(err, <-back); err != nil || v != 42 {
			t.Fatalf("the guest reads %d (%v), want 42", v, err)
		}
	}
}

// TestLazyUndecodable has a guest use what is not there by an instruction that the decoder
// does not know: it can be run again all the same.
func TestLazyUndecodable(t *testing.T) {
	code := []byte{
		0xb8, 0x00, 0x50, 0x20, 0x00, // mov $0x205000, %eax
		0x66, 0x0f, 0x38, 0xf6, 0x08, // adcx (%rax), %ecx
		0x31, 0xc0, 0x66, 0xba, 0x00, 0x05, 0xef, // xor %eax, %eax; mov $0x500, %dx; out %eax, %dx
	}
	if !cpu.X86.HasADX {
		gvmtest.Lack(t, gvmtest.KVMCaps, errors.New("the processor has no adcx"))
	}
	t.Run("stop", func(t *testing.T) {
		m := bootCode(t, Config{Policy: shadow.Lazy}, code...)
		if err := m.Memory().Unmap(m.hvas(5, 1)); err != nil {
			t.Fatal(err)
		}
		_, err := m.Run(testContext(t))
		if e := (*ExitError)(nil); !errors.As(err, &e) || e.RIP != uint64(guests.Image)+5 || !strings.Contains(err.Error(), "cannot be decoded") {
			t.Errorf("the run ended with %v, want an *ExitError of the instruction", err)
		}
	})
	t.Run("wait", func(t *testing.T) {
		m := bootCode(t, Config{Policy: shadow.Lazy, Touch: Wait}, code...)
		if err := errors.Join(m.Memory().Unmap(m.hvas(5, 1)), m.Start(testContext(t))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
		if ended(m) {
			t.Fatal("the run ended while the page was away")
		}
		if err := m.Memory().Map(m.hvas(5, 1)); err != nil {
			t.Fatal(err)
		}
		if status, err := m.Wait(); status != 0 || err != nil {
			t.Errorf("the run ended with status %d, %v", status, err)
		}
	})
}

func TestPolicyConfigErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		c    Config
		says string
	}{
		"unknown policy":     {Config{Policy: 9}, "policy(9)"},
		"lazy that floats":   {Config{Policy: shadow.Lazy, Touch: Float}, "cannot float"},
		"too few slots":      {Config{MaxSlots: 3}, "it takes 4"},
		"less than no slots": {Config{MaxSlots: -1}, "it takes 4"},
	} {
		tt.c.RAM = addr.PageSize
		if _, err := New(tt.c); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: New returned %v, want ErrConfig with %q", name, err, tt.says)
		}
	}
}

// TestTouchIsToldAgain gives a page back and takes it away again before the vCPU that waits
// for it can look: it tells of its touch once more, or nobody would give the page back.
func TestTouchIsToldAgain(t *testing.T) {
	told := make(chan addr.GPA, 1000)
	m := newMachine(t, Config{Touch: Wait, OnTouch: func(_ int, gpa addr.GPA) { told <- gpa }}, "probe", nil)
	ctx := testContext(t)
	if err := m.Memory().Unmap(m.hvas(3, 1)); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var loadErr error
	loaded := gvmtest.Background(func() { _, loadErr = m.Probe(0).Load(ctx, gpaOf(3)) })
	await := func() {
		t.Helper()
		select {
		case gpa := <-told:
			if gpa != gpaOf(3) {
				t.Errorf("told is %v", gpa)
			}
		case <-time.After(gvmtest.Limit):
			t.Fatal("no touch is told of")
		}
	}
	await()
	m.Pause() // and so keeps the vCPU's thread from completing the access
	for len(told) > 0 {
		<-told
	}
	if err := errors.Join(m.Memory().Map(m.hvas(3, 1)), m.Memory().Unmap(m.hvas(3, 1))); err != nil {
		t.Error(err)
	}
	m.Resume()
	await()
	if err := m.Memory().Map(m.hvas(3, 1)); err != nil {
		t.Error(err)
	}
	if !gvmtest.ClosedWithin(loaded, gvmtest.Limit) || loadErr != nil {
		t.Errorf("the guest's load: %v", loadErr)
	}
}
