package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

const ramPages = 64

// newMachine returns a machine with a guest in it that is closed with the test.
func newMachine(t testing.TB, c Config, guest string, args guests.Args) *Machine {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	if c.RAM == 0 {
		c.RAM = ramPages * addr.PageSize
	}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	g, err := guests.Lookup(guest)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Boot(g, args); err != nil {
		t.Fatal(err)
	}
	return m
}

// hvas returns the host addresses of n pages of RAM, from page i.
func (m *Machine) hvas(i, n uint64) addr.HVARange {
	return addr.HVAs(m.ram.Range.Start+addr.HVA(i*addr.PageSize), n*addr.PageSize)
}

func gpaOf(page uint64) addr.GPA { return guests.RAMBase + addr.GPA(page*addr.PageSize) }

// ended reports whether the run is over.
func ended(m *Machine) bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	t.Cleanup(cancel)
	return ctx
}

// hangs is when something that takes milliseconds will never come to its end,
// even on a host that is emulated.
const hangs = 2 * time.Minute

// mustRun runs the machine to its end and wants status 0.
func mustRun(t *testing.T, m *Machine) {
	t.Helper()
	if status, err := m.Run(testContext(t)); status != 0 || err != nil {
		t.Fatalf("the run ended with status %d, %v", status, err)
	}
}

func (m *Machine) mustLoad(t testing.TB, gpa addr.GPA) uint64 {
	t.Helper()
	v, err := m.Load64(gpa)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestHello(t *testing.T) {
	for _, status := range []uint64{0, 7, 255} {
		var out bytes.Buffer
		m := newMachine(t, Config{Console: &out}, "hello", guests.Args{"status": status})
		got, err := m.Run(testContext(t))
		if err != nil || uint64(got) != status {
			t.Errorf("hello status=%d exited with %d, %v", status, got, err)
		}
		if want := "Hello from a guest in long mode at CPL 3.\n"; out.String() != want {
			t.Errorf("hello printed %q, want %q", out.String(), want)
		}
	}
}

func TestRing0(t *testing.T) {
	var out bytes.Buffer
	m := newMachine(t, Config{Console: &out, Ring0: true}, "hello", nil)
	mustRun(t, m)
	if !strings.HasPrefix(out.String(), "Hello") {
		t.Errorf("hello at CPL 0 printed %q", out.String())
	}
}

func TestTouchGuest(t *testing.T) {
	// Every page holds its number plus one before the guest reads it.
	want := map[string]func(access int, seed *uint64) uint64{
		"sequential": func(i int, _ *uint64) uint64 { return uint64(i) % 16 },
		"strided":    func(i int, _ *uint64) uint64 { return uint64(i) * 7 % 16 },
		"random":     func(_ int, seed *uint64) uint64 { *seed = guests.Random(*seed); return *seed % 16 },
	}
	g, err := guests.Lookup("touch")
	if err != nil {
		t.Fatal(err)
	}
	for order, page := range want {
		for _, write := range []uint64{0, 1} {
			t.Run(fmt.Sprintf("%s/write=%d", order, write), func(t *testing.T) {
				args := guests.Args{"accesses": 100, "seed": 42, "write": write}
				if err := g.Parse(args, "order="+order); err != nil {
					t.Fatal(err)
				}
				m := newMachine(t, Config{}, "touch", args)
				model := map[uint64]uint64{}
				for i := range uint64(16) {
					model[i] = i + 1
					if err := m.Store64(gpaOf(i), i+1); err != nil {
						t.Fatal(err)
					}
				}
				mustRun(t, m)
				var sum uint64
				seed := uint64(42)
				for i := range 100 {
					p := page(i, &seed)
					sum += model[p]
					if write == 1 {
						model[p] = uint64(i) + 1
					}
				}
				if got, err := m.Result(0, guests.TouchSum); write == 0 && (got != sum || err != nil) {
					t.Errorf("the guest read a sum of %d (%v), want %d", got, err, sum)
				}
				for i, v := range model {
					if got := m.mustLoad(t, gpaOf(i)); got != v {
						t.Errorf("page %d holds %d, want %d", i, got, v)
					}
				}
			})
		}
	}
}

func TestStampGuest(t *testing.T) {
	m := newMachine(t, Config{VCPUs: 2}, "stamp", guests.Args{"limit": 1000, "pages": 8, "seed": 5})
	mustRun(t, m)
	for vcpu := range uint64(2) {
		model := map[uint64]uint64{}
		x := 5 + vcpu
		for stamp := uint64(1); stamp <= 1000; stamp++ {
			x = guests.Random(x)
			model[x%8] = stamp
		}
		for page, want := range model {
			if got := m.mustLoad(t, gpaOf(page)+addr.GPA(8*vcpu)); got != want {
				t.Errorf("page %d of vCPU %d holds stamp %d, want %d", page, vcpu, got, want)
			}
		}
	}
}

func TestEcho(t *testing.T) {
	var out bytes.Buffer
	m := newMachine(t, Config{Console: &out}, "echo", nil)
	if _, err := io.WriteString(m.SerialInput(), "polled\x04never read"); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m)
	if out.String() != "polled" {
		t.Errorf("the guest echoed %q, want %q", out.String(), "polled")
	}
}

// TestCounterThroughChanges changes the guest's RAM at marks, so that it is known
// which round the guest is in, and compares what its pages count at the end.
func TestCounterThroughChanges(t *testing.T) {
	for _, backing := range []mm.Backing{mm.Anonymous, mm.Memfd} {
		t.Run(backing.String(), func(t *testing.T) {
			var m *Machine
			changes := map[uint32]func(mem *mm.Memory) error{
				100: func(mem *mm.Memory) error { return errors.Join(mem.Unmap(m.hvas(1, 2)), mem.Map(m.hvas(1, 2))) },
				200: func(mem *mm.Memory) error { return mem.Discard(m.hvas(3, 1)) },
				300: func(mem *mm.Memory) error {
					return errors.Join(mem.Protect(m.hvas(4, 1), addr.Read), mem.Protect(m.hvas(4, 1), addr.ReadWrite))
				},
				400: func(mem *mm.Memory) error { return mem.Remap(m.hvas(5, 1), m.spare.Range.Start) },
				500: func(mem *mm.Memory) error { return mem.Map(m.hvas(6, 1)) },
				600: func(mem *mm.Memory) error {
					if backing == mm.Anonymous {
						return nil
					}
					return mem.Punch(m.hvas(7, 1))
				},
				700: func(mem *mm.Memory) error {
					return mem.Remap(addr.HVAs(m.spare.Range.Start, addr.PageSize), m.hvas(5, 1).Start)
				},
			}
			m = newMachine(t, Config{
				Backing: backing, Spare: addr.PageSize,
				OnMark: func(_ int, mark uint32) error {
					if change, ok := changes[mark]; ok {
						return change(m.Memory())
					}
					return nil
				},
			}, "counter", guests.Args{"pages": 8, "rounds": 1000, "mark": 100})
			mustRun(t, m)
			want := []uint64{1000, 900, 900, 800, 1000, 1000, 500, 1000}
			if backing == mm.Memfd {
				want = []uint64{1000, 1000, 1000, 1000, 1000, 1000, 1000, 400}
			}
			for page, want := range want {
				if got := m.mustLoad(t, gpaOf(uint64(page))); got != want {
					t.Errorf("page %d counts %d, want %d", page, got, want)
				}
			}
			if n := m.Slots().Len(); n != 2 {
				t.Errorf("%d slots at the end, want 2: all is mapped as at first", n)
			}
		})
	}
}

// TestCounterConserved takes pages away from a guest that is counting in them,
// at any moment, and gives them back later. What was lost with the pages and
// what is there at the end add up to the rounds.
func TestCounterConserved(t *testing.T) {
	const pages = 4
	rounds := uint64(30_000_000)
	if testing.Short() {
		rounds /= 4
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	m := newMachine(t, Config{Touch: Wait, VCPUs: 2}, "counter", guests.Args{"pages": pages, "rounds": rounds})
	if err := m.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	var lost [pages][2]uint64
	mem := m.Memory()
	changes := 0
	for ; changes < 300 && !ended(m); changes++ {
		page := rng.Uint64N(pages)
		m.Pause()
		for vcpu := range lost[page] {
			lost[page][vcpu] += m.mustLoad(t, gpaOf(page)+addr.GPA(8*vcpu))
		}
		var err error
		if rng.IntN(2) == 0 {
			err = mem.Discard(m.hvas(page, 1))
			m.Resume()
		} else {
			err = mem.Unmap(m.hvas(page, 1))
			m.Resume()
			time.Sleep(time.Duration(rng.IntN(200)) * time.Microsecond)
			err = errors.Join(err, mem.Map(m.hvas(page, 1)))
		}
		time.Sleep(time.Duration(rng.IntN(300)) * time.Microsecond) // let the guest get on
		if err != nil {
			t.Fatal(err)
		}
	}
	if status, err := m.Wait(); status != 0 || err != nil {
		t.Fatalf("the run ended with status %d, %v", status, err)
	}
	if changes < 10 {
		t.Errorf("only %d changes were made while the guest ran", changes)
	}
	for page := range lost {
		for vcpu := range lost[page] {
			got := lost[page][vcpu] + m.mustLoad(t, gpaOf(uint64(page))+addr.GPA(8*vcpu))
			if got != rounds {
				t.Errorf("page %d of vCPU %d counts %d, want %d", page, vcpu, got, rounds)
			}
		}
	}
}

// mmioExits opens the counts of MMIO exits of a machine's vCPUs, before its run:
// a vCPU in KVM_RUN answers no request. The function returns their sum.
func mmioExits(t *testing.T, m *Machine) (sum func() uint64) {
	t.Helper()
	var all []*kvm.Stats
	for _, v := range m.vcpus {
		stats, err := v.cpu.Stats()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stats.Close() })
		all = append(all, stats)
	}
	return func() (sum uint64) {
		for _, stats := range all {
			n, err := stats.Read("mmio_exits")
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
		return sum
	}
}

// TestChangesNextDoor cuts and restores pages that the guest does not use. A
// vCPU must not see a slot absent that is only being replaced: not one access
// to the pages that it does use may leave the guest.
func TestChangesNextDoor(t *testing.T) {
	m := newMachine(t, Config{VCPUs: 2}, "stamp", guests.Args{"pages": 8})
	exits := mmioExits(t, m)
	if err := m.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	mem := m.Memory()
	// A second is plenty for all on a processor; where that is emulated, as many
	// are made as there is time for.
	const all, enough = 500, 20
	begin := time.Now()
	for i := range all {
		if i >= enough && time.Since(begin) > 5*time.Second {
			t.Logf("%d changes next door in %v", 4*i, time.Since(begin))
			break
		}
		if err := errors.Join(
			mem.Unmap(m.hvas(8, 1)), mem.Protect(m.hvas(10, 1), addr.Read),
			mem.Map(m.hvas(8, 1)), mem.Protect(m.hvas(10, 1), addr.ReadWrite),
		); err != nil {
			t.Fatal(err)
		}
		if ended(m) {
			_, err := m.Wait()
			t.Fatalf("after %d changes next door the run ended: %v", 4*i, err)
		}
	}
	if n := exits(); n != 0 {
		t.Errorf("%d accesses to pages next door left the guest, want none", n)
	}
}

// TestOpenGateIsCaught changes a slot with no gate that holds the guest back: it
// must run into the slot while that is absent. If it does not, the test above
// proves nothing.
func TestOpenGateIsCaught(t *testing.T) {
	m := newMachine(t, Config{}, "stamp", guests.Args{"pages": 8})
	exits := mmioExits(t, m)
	if err := m.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	slot, ok := m.Slots().Lookup(guests.RAMBase.GFN())
	if !ok {
		t.Fatal("RAM has no slot")
	}
	b := (*backend)(m)
	for range 1000 {
		before, err := m.Result(0, 0)
		if err != nil {
			t.Fatal(err)
		}
		for now := before; now < before+100 && !ended(m); {
			if now, err = m.Result(0, 0); err != nil {
				t.Fatal(err)
			}
		}
		// What the tracker does, without Hold and Release, and a little slower.
		err = b.DeleteSlot(slot)
		time.Sleep(20 * time.Microsecond)
		if err := errors.Join(err, b.CreateSlot(slot)); err != nil {
			t.Fatal(err)
		}
		if exits() > 0 {
			return // the exit finds the memory mapped and is completed, but the guest has left it
		}
	}
	t.Errorf("1000 slot changes without a gate went unnoticed by a guest that uses the slot all the time")
}

func TestTouchPolicies(t *testing.T) {
	const page = 5
	gone := func(m *Machine) error { return m.Memory().Unmap(m.hvas(page, 1)) }
	readOnly := func(m *Machine) error { return m.Memory().Protect(m.hvas(page, 1), addr.Read) }
	for name, tt := range map[string]struct {
		take func(m *Machine) error
		use  func(ctx context.Context, p *Probe) (uint64, error)
		// What Float gives, and what Wait gives once the page is back, empty, or
		// writable again.
		float, wait uint64
	}{
		"load from a hole": {gone, func(ctx context.Context, p *Probe) (uint64, error) { return p.Load(ctx, gpaOf(page)) }, ^uint64(0), 0},
		"store to a hole": {gone, func(ctx context.Context, p *Probe) (uint64, error) {
			return 0, p.Store(ctx, gpaOf(page), 7)
		}, 0, 7},
		"add to a hole": {gone, func(ctx context.Context, p *Probe) (uint64, error) {
			return 0, p.Add(ctx, gpaOf(page), 7)
		}, 0, 7},
		"store to read-only": {readOnly, func(ctx context.Context, p *Probe) (uint64, error) {
			return 0, p.Store(ctx, gpaOf(page), 7)
		}, 42, 7},
		"add to read-only": {readOnly, func(ctx context.Context, p *Probe) (uint64, error) {
			return 0, p.Add(ctx, gpaOf(page), 7)
		}, 42, 49},
	} {
		back := func(m *Machine) error {
			if m.mustExtent(t, page).Mapped {
				return m.Memory().Protect(m.hvas(page, 1), addr.ReadWrite)
			}
			return m.Memory().Map(m.hvas(page, 1))
		}
		begin := func(t *testing.T, touch Touch) (*Machine, *Probe, context.Context) {
			m := newMachine(t, Config{Touch: touch, Log: trace.NewLog(100)}, "probe", nil)
			ctx := testContext(t)
			if err := errors.Join(m.Store64(gpaOf(page), 42), m.Start(ctx), tt.take(m)); err != nil {
				t.Fatal(err)
			}
			return m, m.Probe(0), ctx
		}
		t.Run(name+"/stop", func(t *testing.T) {
			m, p, ctx := begin(t, Stop)
			if _, err := tt.use(ctx, p); err == nil {
				t.Fatal("the guest got its access")
			}
			_, err := m.Wait()
			var e *ExitError
			if !errors.As(err, &e) {
				t.Fatalf("the run ended with %v, want an *ExitError", err)
			}
			if e.GPA != gpaOf(page) || e.Extent == nil || e.Extent.Why == nil || e.Change == nil {
				t.Errorf("the error does not tell of %v, its mapping and the last change: %+v", gpaOf(page), e)
			}
			if e.RIP < uint64(guests.Image) || e.RIP > uint64(guests.Image)+100 {
				t.Errorf("rip 0x%x is not in the guest's image", e.RIP)
			}
			for _, part := range []string{"rip 0x", "gpa 0x205000", "since change 1"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q is not in the error: %v", part, err)
				}
			}
		})
		t.Run(name+"/float", func(t *testing.T) {
			m, p, ctx := begin(t, Float)
			v, err := tt.use(ctx, p)
			if err != nil {
				t.Fatal(err)
			}
			if v == 0 {
				if err := back(m); err != nil {
					t.Fatal(err)
				}
				v = m.mustLoad(t, gpaOf(page))
			}
			if v != tt.float {
				t.Errorf("got %#x, want %#x", v, tt.float)
			}
			if touches(m) == 0 {
				t.Error("no touch is in the log")
			}
		})
		t.Run(name+"/wait", func(t *testing.T) {
			m, p, ctx := begin(t, Wait)
			used := make(chan error)
			var v uint64
			go func() {
				var err error
				v, err = tt.use(ctx, p)
				used <- err
			}()
			for touches(m) == 0 {
				time.Sleep(100 * time.Microsecond)
			}
			select {
			case err := <-used:
				t.Fatalf("the access was completed (%v) while the page was away", err)
			case <-time.After(5 * time.Millisecond):
			}
			if err := errors.Join(back(m), <-used); err != nil {
				t.Fatal(err)
			}
			if v == 0 {
				v = m.mustLoad(t, gpaOf(page))
			}
			if v != tt.wait {
				t.Errorf("got %#x, want %#x", v, tt.wait)
			}
		})
	}
}

func (m *Machine) mustExtent(t *testing.T, page uint64) mm.Extent {
	t.Helper()
	xs := m.Memory().Extents(m.hvas(page, 1))
	if len(xs) != 1 {
		t.Fatalf("page %d has extents %v", page, xs)
	}
	return xs[0]
}

func touches(m *Machine) (n int) {
	events, _ := m.config.Log.Since(0)
	for _, e := range events {
		if e.Kind == trace.Touch {
			n++
		}
	}
	return n
}

// TestStoppedWhileWaiting stops the run while the guest waits for a page, and
// starts it again: the access is not lost, nor made twice.
func TestStoppedWhileWaiting(t *testing.T) {
	for _, policy := range []shadow.Policy{shadow.Precise, shadow.Lazy} {
		t.Run(policy.String(), func(t *testing.T) { testStoppedWhileWaiting(t, policy) })
	}
}

func testStoppedWhileWaiting(t *testing.T, policy shadow.Policy) {
	m := newMachine(t, Config{Policy: policy, Touch: Wait, Log: trace.NewLog(1000)}, "counter", guests.Args{"pages": 2, "rounds": 100})
	if err := m.Memory().Unmap(m.hvas(1, 1)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		ctx, cancel := context.WithCancel(context.Background())
		before := touches(m)
		if err := m.Start(ctx); err != nil {
			t.Fatal(err)
		}
		for touches(m) == before {
			time.Sleep(100 * time.Microsecond)
		}
		cancel()
		if _, err := m.Wait(); !errors.Is(err, context.Canceled) {
			t.Fatalf("the stopped run returned %v", err)
		}
	}
	if err := m.Memory().Map(m.hvas(1, 1)); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m)
	for page := range uint64(2) {
		if got := m.mustLoad(t, gpaOf(page)); got != 100 {
			t.Errorf("page %d counts %d, want 100", page, got)
		}
	}
}

// TestStrayChange takes the host mapping of a page away without telling
// anybody. KVM_RUN gives a bare EFAULT, from which the page has to be found.
func TestStrayChange(t *testing.T) {
	for name, tt := range map[string]struct {
		use  func(ctx context.Context, p *Probe) error
		says string
	}{
		"load":  {func(ctx context.Context, p *Probe) error { _, err := p.Load(ctx, gpaOf(5)); return err }, "gpa 0x205000"},
		"store": {func(ctx context.Context, p *Probe) error { return p.Store(ctx, gpaOf(5)+8, 1) }, "gpa 0x205008"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, Config{}, "probe", nil)
			ctx := testContext(t)
			if err := m.Start(ctx); err != nil {
				t.Fatal(err)
			}
			strayProtect(t, m.hvas(5, 1), unix.PROT_NONE)
			if err := tt.use(ctx, m.Probe(0)); err == nil {
				t.Fatal("the guest got its access")
			}
			_, err := m.Wait()
			if !errors.Is(err, unix.EFAULT) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "something else in this process changed it") {
				t.Errorf("the run ended with %v, want %q in it", err, tt.says)
			}
		})
	}
	t.Run("for a moment", func(t *testing.T) {
		m := newMachine(t, Config{}, "stamp", guests.Args{"pages": 8})
		if err := m.Start(testContext(t)); err != nil {
			t.Fatal(err)
		}
		for range 100 {
			strayProtect(t, m.hvas(5, 1), unix.PROT_NONE)
			strayProtect(t, m.hvas(5, 1), unix.PROT_READ|unix.PROT_WRITE)
		}
		if ended(m) {
			_, err := m.Wait()
			t.Errorf("a mapping that was missing for a moment ended the run: %v", err)
		}
	})
}

func strayProtect(t *testing.T, r addr.HVARange, prot uintptr) {
	t.Helper()
	if _, _, errno := unix.Syscall(unix.SYS_MPROTECT, uintptr(r.Start), uintptr(r.Bytes()), prot); errno != 0 {
		t.Fatal(errno)
	}
}

// bootCode puts code in the place of the guest's image.
func bootCode(t *testing.T, c Config, code ...byte) *Machine {
	t.Helper()
	m := newMachine(t, c, "spin", nil)
	if err := m.WriteGuest(guests.Image, code); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestExitsThatEndTheRun(t *testing.T) {
	jumpToRAM := []byte{0x49, 0xc7, 0xc0, 0, 0x50, 0x20, 0, 0x41, 0xff, 0xe0} // mov $0x205000, %r8; jmp *%r8
	for name, tt := range map[string]struct {
		config Config
		code   []byte
		before func(m *Machine) error
		says   []string
	}{
		"invalid instruction":    {code: []byte{0x0f, 0x0b}, says: []string{"KVM_EXIT_SHUTDOWN", "rip 0x10000:", "no handler"}},
		"privileged instruction": {code: []byte{0x90, 0xf4}, says: []string{"KVM_EXIT_SHUTDOWN", "rip 0x10001:"}},
		"no RAM there": {
			code: []byte{0x48, 0xa1, 0, 0, 0x3f, 0, 0, 0, 0, 0}, // movabs 0x3f0000, %rax: mapped by the page tables, behind the RAM
			says: []string{"no RAM", "gpa 0x3f0000", "KVM_EXIT_MMIO"},
		},
		"code in a hole": {
			code:   jumpToRAM,
			before: func(m *Machine) error { return m.Memory().Unmap(m.hvas(5, 1)) },
			says:   []string{"rip 0x205000", "gpa 0x205000", "no slot", "since change 1, unmap"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := bootCode(t, tt.config, tt.code...)
			if tt.before != nil {
				if err := tt.before(m); err != nil {
					t.Fatal(err)
				}
			}
			_, err := m.Run(testContext(t))
			var e *ExitError
			if !errors.As(err, &e) {
				t.Fatalf("the run ended with %v, want an *ExitError", err)
			}
			says := slices.Clone(tt.says)
			lost := slices.Contains(says, "KVM_EXIT_SHUTDOWN") && resetsAtShutdown()
			if lost {
				for i, part := range says {
					if strings.HasPrefix(part, "rip 0x") {
						says[i] = "unknown rip: the guest met a fault that it has no handler for, and this host does not keep the registers"
					}
				}
			}
			for _, part := range says {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q is not in the error: %v", part, err)
				}
			}
			if e.NoRIP != lost || (e.RIP == 0) != lost {
				t.Errorf("rip 0x%x, unknown %t; want it unknown, and 0: %t", e.RIP, e.NoRIP, lost)
			}
		})
	}
	t.Run("halt at CPL 0", func(t *testing.T) {
		mustRun(t, bootCode(t, Config{Ring0: true}, 0xf4))
	})
}

// resetsAtShutdown reports whether this host's KVM loses the registers of a
// guest that shuts down. It is kvm_amd that does.
func resetsAtShutdown() bool {
	_, err := os.Stat("/sys/module/kvm_amd")
	return err == nil
}

func TestIsReset(t *testing.T) {
	reset := kvm.Sregs{CS: kvm.Segment{Base: 0xffff0000, Selector: 0xf000}, CR0: 0x60000010}
	ring0 := reset
	ring0.CR0 |= 1
	flat := reset
	flat.CS.Base = 0
	for name, tt := range map[string]struct {
		rip   uint64
		sregs kvm.Sregs
		want  bool
	}{
		"after INIT":            {0xfff0, reset, true},
		"one instruction later": {0xfff1, reset, false},
		"in protected mode":     {0xfff0, ring0, false},
		"in another segment":    {0xfff0, flat, false},
	} {
		if got := isReset(&kvm.Regs{Rip: tt.rip}, &tt.sregs); got != tt.want {
			t.Errorf("%s: isReset = %t, want %t", name, got, tt.want)
		}
	}
}

// midway is a subscriber that keeps an invalidation, until it may go on, where
// the tracker has changed the slots at its start and has not been told of its
// end, wherever on the chain it is.
type midway struct {
	notifier.Notifier
	m      *Machine
	before uint64 // generation of the slots
	may    chan struct{}
}

func (s *midway) InvalidateRangeStart(*notifier.Invalidation) error {
	if s.m.Slots().Generation() != s.before {
		<-s.may
	}
	return nil
}
func (s *midway) InvalidateRangeEnd(*notifier.Invalidation) { <-s.may }
func (s *midway) Release()                                  {}

// TestPauseWaitsForAccess pauses the machine while a vCPU's thread is at work on
// an access for its guest. It has been woken by a change of the slots, and waits
// for the operation that made the change, on its page and the next, to end.
func TestPauseWaitsForAccess(t *testing.T) {
	m := newMachine(t, Config{Touch: Wait, Log: trace.NewLog(100)}, "probe", nil)
	ctx := testContext(t)
	if err := errors.Join(m.Start(ctx), m.Memory().Unmap(m.hvas(5, 1))); err != nil {
		t.Fatal(err)
	}
	stored := make(chan error, 1)
	go func() { stored <- m.Probe(0).Store(ctx, gpaOf(5), 7) }()
	for touches(m) == 0 {
		time.Sleep(100 * time.Microsecond)
	}
	s := &midway{m: m, before: m.Slots().Generation(), may: make(chan struct{})}
	if err := m.Memory().AddressSpace().Register(ctx, s); err != nil {
		t.Fatal(err)
	}
	unmapped := make(chan error, 1)
	go func() { unmapped <- m.Memory().Unmap(m.hvas(5, 2)) }()
	accesses := func() int {
		m.gate.mu.Lock()
		defer m.gate.mu.Unlock()
		return m.gate.accesses
	}
	for accesses() == 0 {
		time.Sleep(100 * time.Microsecond)
	}
	if held := async(m.gate.Hold); !returns(held, true) {
		t.Error("Hold waits for an access that waits for the operation")
	}
	m.gate.Release()
	paused := pausing(&m.gate)
	if returns(paused, false) {
		t.Error("Pause returned in the middle of an access")
	}
	close(s.may)
	if err := <-unmapped; err != nil {
		t.Error(err)
	}
	if !returns(paused, true) {
		t.Fatal("Pause waits for an access that has been tried, and waits for its page")
	}
	m.Resume()
	s.Unregister()
	if err := errors.Join(m.Memory().Map(m.hvas(5, 1)), <-stored); err != nil {
		t.Error(err)
	}
	if got := m.mustLoad(t, gpaOf(5)); got != 7 {
		t.Errorf("the guest stored %d, want 7", got)
	}
}

// TestPauseKeepsAccessesOut gives a page back that a guest waits for, under a
// Pause: the access must not be completed before Resume.
func TestPauseKeepsAccessesOut(t *testing.T) {
	m := newMachine(t, Config{Touch: Wait, Log: trace.NewLog(100)}, "probe", nil)
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
			t.Errorf("the guest stored %d while it was paused", got)
			break
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

// TestStoppedWhilePaused stops a run, under a Pause, whose guest waits to have an
// access completed. The run ends before Resume, and the next completes the access.
func TestStoppedWhilePaused(t *testing.T) {
	m := newMachine(t, Config{Touch: Wait, Log: trace.NewLog(100)}, "counter", guests.Args{"pages": 2, "rounds": 100})
	if err := m.Memory().Unmap(m.hvas(1, 1)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for touches(m) == 0 {
		time.Sleep(100 * time.Microsecond)
	}
	m.Pause()
	if err := m.Memory().Map(m.hvas(1, 1)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := m.Wait(); !errors.Is(err, context.Canceled) {
		t.Fatalf("the stopped run returned %v", err)
	}
	if got := m.mustLoad(t, gpaOf(1)); got != 0 {
		t.Errorf("the page counts %d while the guest is paused, want 0", got)
	}
	m.Resume()
	mustRun(t, m)
	if got := m.mustLoad(t, gpaOf(1)); got != 100 {
		t.Errorf("the page counts %d, want 100", got)
	}
}

func TestPause(t *testing.T) {
	m := newMachine(t, Config{VCPUs: 2}, "spin", nil)
	if err := m.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	progress := func() (n [2]uint64) {
		for i := range n {
			var err error
			if n[i], err = m.Result(i, 0); err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	for range 20 {
		m.Pause()
		m.Pause()
		before := progress()
		m.Resume()
		time.Sleep(2 * time.Millisecond)
		if after := progress(); after != before {
			t.Fatalf("paused vCPUs went on from %v to %v", before, after)
		}
		m.Resume()
		for deadline := time.Now().Add(hangs); ; {
			if now := progress(); now[0] > before[0] && now[1] > before[1] {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("resumed vCPUs stay at %v", before)
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
}

func TestCancel(t *testing.T) {
	for _, paused := range []bool{false, true} {
		m := newMachine(t, Config{VCPUs: 2}, "spin", nil)
		ctx, cancel := context.WithCancelCause(context.Background())
		if err := m.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if paused {
			m.Pause()
			defer m.Resume()
		}
		why := errors.New("enough")
		cancel(why)
		select {
		case <-m.Done():
		case <-time.After(hangs):
			t.Fatal("the run goes on after its context was cancelled")
		}
		if _, err := m.Wait(); !errors.Is(err, why) {
			t.Errorf("the run ended with %v, want the cause of the context", err)
		}
	}
}

func TestClose(t *testing.T) {
	m := newMachine(t, Config{}, "spin", nil)
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, err := m.Load64(guests.Params); err == nil {
		t.Error("guest memory can be read after Close")
	}
	if err := m.Start(context.Background()); err == nil {
		t.Error("a closed machine starts")
	}
	m.Pause()
	m.Resume()
}

func TestMisuse(t *testing.T) {
	m := newMachine(t, Config{}, "spin", nil)
	g, err := guests.Lookup("hello")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Boot(g, nil); err == nil {
		t.Error("a machine boots twice")
	}
	ctx, cancel := context.WithCancel(context.Background())
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(ctx); err == nil {
		t.Error("a running machine starts")
	}
	cancel()
	<-m.Done()
	if err := m.Memory().Discard(m.boot.Range); !errors.Is(err, mm.ErrPinned) {
		t.Errorf("discarding the boot window returned %v, want ErrPinned", err)
	}
	if err := m.ReadGuest(guests.RAMBase-8, make([]byte, 16+ramPages*addr.PageSize)); err == nil {
		t.Error("reading past the end of RAM succeeds")
	}
}

func TestConfigErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		c    Config
		want error
		says string
	}{
		"no RAM":                 {Config{}, ErrConfig, "no RAM"},
		"unaligned RAM":          {Config{RAM: 4097}, ErrConfig, "multiple"},
		"too much to map":        {Config{RAM: 1 << 50}, ErrConfig, "page tables"},
		"negative vCPUs":         {Config{RAM: 4096, VCPUs: -1}, ErrConfig, "not in 1 to"},
		"too many vCPUs":         {Config{RAM: 4096, VCPUs: 1000}, ErrConfig, "not in 1 to"},
		"unaligned spare":        {Config{RAM: 4096, Spare: 1}, ErrConfig, "spare"},
		"unknown backing":        {Config{RAM: 4096, Backing: 9}, ErrConfig, "backing(9)"},
		"unknown watch":          {Config{RAM: 4096, Watch: 9}, ErrConfig, "watch(0x8)"},
		"watch and wp":           {Config{RAM: 4096, Watch: WatchTrace, Dirty: WriteProtect}, ErrConfig, "write-protected"},
		"unknown touch":          {Config{RAM: 4096, Touch: 9}, ErrConfig, "touch(9)"},
		"more than the host has": {Config{RAM: hostMemory(t) + addr.PageSize}, unix.ENOMEM, "memory and swap of this host"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(tt.c); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("New returned %v, want %v with %q", err, tt.want, tt.says)
			}
		})
	}
}

func hostMemory(t *testing.T) uint64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	return (info.Totalram + info.Totalswap) * uint64(info.Unit) &^ addr.PageMask
}

func TestOvercommit(t *testing.T) {
	m := newMachine(t, Config{RAM: guests.MaxRAM &^ addr.PageMask, Overcommit: true}, "touch", nil)
	mustRun(t, m)
}

func TestConsoleError(t *testing.T) {
	full := errors.New("the console is full")
	m := newMachine(t, Config{Console: writerFunc(func([]byte) (int, error) { return 0, full })}, "hello", nil)
	if _, err := m.Run(testContext(t)); !errors.Is(err, full) {
		t.Errorf("the run ended with %v, want the console's error", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestPrint(t *testing.T) {
	const long = 2 * addr.PageSize
	// mov $0x205ff0, %eax; mov $0x508, %dx; out %eax, %dx; mov $0x500, %dx; xor %eax, %eax; out %eax, %dx
	code := []byte{0xb8, 0xf0, 0x5f, 0x20, 0, 0x66, 0xba, 0x08, 0x05, 0xef, 0x66, 0xba, 0, 5, 0x31, 0xc0, 0xef}
	for name, tt := range map[string]struct {
		text []byte // at gpa 0x205ff0
		hole bool   // the page after it is not there
		want string
		says string
	}{
		"short, before a hole": {text: []byte("short\x00"), hole: true, want: "short"},
		"into the next page":   {text: append(bytes.Repeat([]byte("x"), 100), 0), want: strings.Repeat("x", 100)},
		"without an end":       {text: bytes.Repeat([]byte("x"), long), want: strings.Repeat("x", guests.MaxPrint)},
		"into a hole":          {text: bytes.Repeat([]byte("x"), 16), hole: true, says: "not in its memory"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			m := bootCode(t, Config{Console: &out}, code...)
			if err := m.WriteGuest(gpaOf(5)+0xff0, tt.text); err != nil {
				t.Fatal(err)
			}
			if tt.hole {
				if err := m.Memory().Unmap(m.hvas(6, 1)); err != nil {
					t.Fatal(err)
				}
			}
			_, err := m.Run(testContext(t))
			if (err != nil) != (tt.says != "") || !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Errorf("the run ended with %v, want %q in it", err, tt.says)
			}
			if out.String() != tt.want {
				t.Errorf("printed %q, want %q", out.String(), tt.want)
			}
		})
	}
}

func TestMarkError(t *testing.T) {
	stop := errors.New("far enough")
	var marks []uint32
	m := newMachine(t, Config{OnMark: func(_ int, mark uint32) error {
		if marks = append(marks, mark); len(marks) == 3 {
			return stop
		}
		return nil
	}}, "counter", guests.Args{"mark": 10})
	if _, err := m.Run(testContext(t)); !errors.Is(err, stop) {
		t.Errorf("the run ended with %v, want the mark's error", err)
	}
	if fmt.Sprint(marks) != "[10 20 30]" {
		t.Errorf("marks %v, want 10, 20, 30", marks)
	}
}

// TestManyMachines runs machines at the same time, each with its own changes.
func TestManyMachines(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		m := newMachine(t, Config{}, "counter", guests.Args{"pages": 4, "rounds": 20000})
		wg.Go(func() {
			if err := m.Start(testContext(t)); err != nil {
				t.Error(err)
				return
			}
			for range 20 {
				if err := errors.Join(m.Memory().Unmap(m.hvas(20, 1)), m.Memory().Map(m.hvas(20, 1))); err != nil {
					t.Error(err)
				}
			}
			if status, err := m.Wait(); status != 0 || err != nil {
				t.Errorf("the run ended with status %d, %v", status, err)
			}
			if got := m.mustLoad(t, gpaOf(3)); got != 20000 {
				t.Errorf("page 3 counts %d, want 20000", got)
			}
		})
	}
	wg.Wait()
}

// BenchmarkHello times a machine from nothing to its guest's exit and away.
func BenchmarkHello(b *testing.B) {
	gvmtest.Need(b, gvmtest.KVM)
	g, err := guests.Lookup("hello")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		m, err := New(Config{RAM: 16 << 20})
		if err != nil {
			b.Fatal(err)
		}
		if err := m.Boot(g, nil); err != nil {
			b.Fatal(err)
		}
		if _, err := m.Run(context.Background()); err != nil {
			b.Fatal(err)
		}
		if err := m.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkUnderGuest times changes of one page that the running guest has
// mapped, next to the bare system call. Between two changes the guest maps the
// page again.
func BenchmarkUnderGuest(b *testing.B) {
	const page = 5
	raw := func(m *Machine) error {
		r := m.hvas(page, 1)
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), unix.MADV_DONTNEED)
		if errno != 0 {
			return errno
		}
		return nil
	}
	for _, bb := range []struct {
		name string
		do   func(m *Machine) error
	}{
		{"op=discard/impl=raw", raw},
		{"op=discard/impl=mm", func(m *Machine) error { return m.Memory().Discard(m.hvas(page, 1)) }},
		{"op=unmap+map/impl=mm", func(m *Machine) error {
			return errors.Join(m.Memory().Unmap(m.hvas(page, 1)), m.Memory().Map(m.hvas(page, 1)))
		}},
		{"op=pause+resume/impl=gate", func(m *Machine) error { m.Pause(); m.Resume(); return nil }},
	} {
		b.Run(bb.name, func(b *testing.B) {
			m := newMachine(b, Config{Touch: Wait}, "counter", guests.Args{"pages": 8, "rounds": 1 << 62})
			if err := m.Start(context.Background()); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				b.StopTimer()
				before, err := m.Result(0, 0)
				if err != nil {
					b.Fatal(err)
				}
				for {
					if now, _ := m.Result(0, 0); now > before+1 {
						break
					}
				}
				b.StartTimer()
				if err := bb.do(m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCancel times the end of a run whose vCPU is in the guest: from the
// cancellation to the return of Wait. The longest is reported too.
func BenchmarkCancel(b *testing.B) {
	m := newMachine(b, Config{}, "spin", nil)
	var longest time.Duration
	for b.Loop() {
		b.StopTimer()
		ctx, cancel := context.WithCancel(context.Background())
		before := m.mustLoad(b, guests.ResultGPA(0, 0))
		if err := m.Start(ctx); err != nil {
			b.Fatal(err)
		}
		for m.mustLoad(b, guests.ResultGPA(0, 0)) == before {
		}
		b.StartTimer()
		begin := time.Now()
		cancel()
		_, _ = m.Wait()
		longest = max(longest, time.Since(begin))
	}
	b.ReportMetric(float64(longest.Microseconds()), "longest-us")
}

// TestSlotsAgreeWithStats checks, while a guest runs and pages come and go, that
// the published slots are disjoint and numbered once.
func TestSlotsAreConsistentForReaders(t *testing.T) {
	m := newMachine(t, Config{Touch: Wait}, "stamp", guests.Args{"pages": 8})
	if err := m.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		last := uint64(0)
		for !stop.Load() {
			set := m.Slots()
			if set.Generation() < last {
				t.Errorf("generation went from %d to %d", last, set.Generation())
			}
			last = set.Generation()
			ids := map[uint32]bool{}
			end := addr.GFN(0)
			for s := range set.All() {
				if ids[s.ID] || s.GFN < end {
					t.Errorf("%v overlaps or has another's number", s)
				}
				ids[s.ID], end = true, s.GFNs().End
			}
		}
	})
	for i := range uint64(200) {
		if err := errors.Join(m.Memory().Unmap(m.hvas(i%8, 1)), m.Memory().Map(m.hvas(i%8, 1))); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	wg.Wait()
	var s shadow.Slot
	for s = range m.Slots().All() {
	}
	if s.NPages != ramPages {
		t.Errorf("the last slot is %v, want all of RAM", s)
	}
}
