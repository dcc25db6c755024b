package hmm

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/notifier"
)

// TestRegisterErrors: what Register refuses leaves the mirror as it was.
func TestRegisterErrors(t *testing.T) {
	w := newWorld(sound, plain(0, 8))
	ctx := context.Background()
	d := w.newMirror()
	for name, tt := range map[string]struct {
		m    *Mirror
		as   *notifier.AddressSpace
		d    Driver
		want syscall.Errno
	}{
		"no mirror":          {nil, w.AddressSpace, d, syscall.EINVAL},
		"no address space":   {new(Mirror), nil, d, syscall.EINVAL},
		"no driver":          {new(Mirror), w.AddressSpace, nil, syscall.EINVAL},
		"registered already": {&d.Mirror, w.AddressSpace, d, syscall.EBUSY},
	} {
		if err := w.reg.register(ctx, tt.m, tt.as, tt.d); !errors.Is(err, tt.want) || !strings.HasPrefix(err.Error(), "register a mirror for ") {
			t.Errorf("%s: Register returns %v, want %v", name, err, tt.want)
		}
	}
	w.refs("after errors", d.hmm.Load(), 1)
	d.Unregister()
	w.register(d)
	d.Unregister()
	new(Mirror).Unregister() // never registered
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

// TestRangeErrors: a range that is not right, or not begun.
func TestRangeErrors(t *testing.T) {
	w := newWorld(sound, plain(0, 8))
	want := func(what string, err error, errno syscall.Errno, text string) {
		t.Helper()
		if !errors.Is(err, errno) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: the error is %v, want %v and %q", what, err, errno, text)
		}
	}
	r := w.newRange(at(0, 4), asked)
	want("no mirror", w.reg.begin(r, w.AddressSpace), syscall.EFAULT, "no mirror")
	d := w.newMirror()
	_, err := r.Snapshot()
	want("not begun", err, syscall.EINVAL, "has not begun")
	if r.Valid() || r.WaitValid(context.Background()) || r.Done() {
		t.Error("a range is valid that has not begun")
	}
	r.Entries = r.Entries[:3]
	want("entries missing", w.reg.begin(r, w.AddressSpace), syscall.EINVAL, "one entry for each page")
	r.Entries = make([]Entry, 2)
	r.Order, r.Range = 1, at(1, 4)
	want("not aligned to its order", w.reg.begin(r, w.AddressSpace), syscall.EINVAL, "not aligned")
	r.Range = at(2, 4)
	w.must(w.reg.begin(r, w.AddressSpace))
	want("begun already", w.reg.begin(r, w.AddressSpace), syscall.EINVAL, "begun already")
	if r.Valid() {
		t.Error("a range is valid that nothing was looked up for")
	}
	r.Done()
	d.Unregister()
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

// TestMisusePanics: what only a mistake does to references is seen at once.
func TestMisusePanics(t *testing.T) {
	w := newWorld(sound, plain(0, 8))
	d := w.newMirror()
	h := w.reg.lookup(w.AddressSpace, byHolder)
	h.Put()
	if got := gvmtest.Panics(h.Put); !strings.Contains(got, "no reference of Lookup or Get") {
		t.Errorf("a Put too many: %s", got)
	}
	d.Unregister()
	for name, use := range map[string]func(){"Get": h.Get, "Put": h.Put, "Stats": func() { h.Stats() }, "Check": func() { _ = h.Check() }} {
		if got := gvmtest.Panics(use); !strings.Contains(got, name+" of an HMM") {
			t.Errorf("%s after the last Put: %s", name, got)
		}
	}
	notifier.Synchronize()
	if got := gvmtest.Panics(h.Get); got != "hmm: Get of an HMM that has been freed" {
		t.Errorf("Get of what is freed: %s", got)
	}
	if got := gvmtest.Panics(h.release); got != "hmm: an HMM is freed twice" {
		t.Errorf("a second release: %s", got)
	}
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

// TestCheckSeesDefects: Check finds each thing that it looks for.
func TestCheckSeesDefects(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func(h *HMM, r *Range)
		want string
	}{
		"a reference too many":  {func(h *HMM, _ *Range) { h.refs.Add(1) }, "there are 4 references, and owners have 3"},
		"an owner too few":      {func(h *HMM, _ *Range) { h.owners[byHolder].Add(-2) }, "have -1 references"},
		"a method that kept it": {func(h *HMM, _ *Range) { h.tryGet(byCallback) }, "1 methods that have returned"},
		"a mirror too few":      {func(h *HMM, _ *Range) { h.mirrors = nil }, "0 mirrors are told"},
		"a mirror of another":   {func(h *HMM, _ *Range) { h.mirrors[0] = new(Mirror) }, "not registered here"},
		"a range too few":       {func(h *HMM, r *Range) { delete(h.ranges, r) }, "there are 0 ranges"},
		"a range of another":    {func(h *HMM, r *Range) { r.h = nil }, "not begun here"},
		"a range that hangs":    {func(h *HMM, r *Range) { r.changing = true }, "no bracket is open"},
		"a bracket that hangs":  {func(h *HMM, _ *Range) { h.active++ }, "1 brackets are taken to be open"},
		"another HMM":           {func(h *HMM, _ *Range) { h.reg.hmms[h.as] = new(HMM) }, "another one is found"},
		"a mirror after exit":   {func(h *HMM, _ *Range) { h.dead = true }, "1 mirrors are still told"},
	} {
		w := newWorld(sound, plain(0, 8))
		w.newMirror()
		r := w.begun(at(0, 1), 0)
		h := w.reg.lookup(w.AddressSpace, byHolder)
		if err := h.Check(); err != nil {
			t.Errorf("%s: before: %v", name, err)
		}
		tt.do(h, r)
		if err := h.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Check returns %v, want %q", name, err, tt.want)
		}
	}
}

// TestDriversThatFail: a driver that fails where it must not, or panics, is reported, and
// the others are told all the same. In a bracket that must not block a panic refuses it.
func TestDriversThatFail(t *testing.T) {
	for name, tt := range map[string]struct {
		fail        func(*notifier.Invalidation) error
		nonBlocking bool
		want        string // is reported; "" is a refusal
		told        int    // how often the other driver is
	}{
		"an error":           {func(*notifier.Invalidation) error { return syscall.EIO }, false, "*hmm.device: input/output error", 1},
		"a panic":            {func(*notifier.Invalidation) error { panic("broken") }, false, "Sync of *hmm.device: panic: broken", 1},
		"a panic in a hurry": {func(*notifier.Invalidation) error { panic("broken") }, true, "", 0},
	} {
		w := newWorld(sound, plain(0, 8))
		d, other := w.newMirror(), w.newMirror()
		told := 0
		d.onSync = tt.fail
		other.onSync = func(*notifier.Invalidation) error { told++; return nil }
		err := w.invalidate(&notifier.Invalidation{Range: at(0, 1), Event: notifier.Clear, NonBlockable: tt.nonBlocking}, nil)
		reports := w.takeReports()
		switch {
		case tt.want == "" && (!errors.Is(err, notifier.ErrWouldBlock) || len(reports) != 0):
			t.Errorf("%s: the bracket is opened, or something is reported: %v, %v", name, err, reports)
		case tt.want != "" && (err != nil || len(reports) != 1 || !strings.Contains(reports[0].Error(), tt.want)):
			t.Errorf("%s: the error is %v, and %v is reported; want %q", name, err, reports, tt.want)
		}
		if told != tt.told {
			t.Errorf("%s: the other driver is told %d times, want %d", name, told, tt.told)
		}
		d.Unregister()
		other.Unregister()
		if err := w.finish(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// brokenTables is page tables that break the rules of the interface.
type brokenTables struct {
	*model
	region func(addr.HVA) addr.HVARange
	walk   func(r addr.HVARange, fn func(addr.HVARange, addr.PFN, uint32) bool) error
	fault  func() error
}

func (b *brokenTables) Region(hva addr.HVA) (addr.HVARange, addr.Access, uint32) {
	if b.region != nil {
		return b.region(hva), addr.ReadWrite, RegionMapped
	}
	return b.model.Region(hva)
}

func (b *brokenTables) Walk(r addr.HVARange, owner any, fn func(addr.HVARange, addr.PFN, uint32) bool) error {
	if b.walk != nil {
		return b.walk(r, fn)
	}
	return b.model.Walk(r, owner, fn)
}

func (b *brokenTables) Fault(r addr.HVARange, write, nonblocking bool) error { return b.fault() }

// TestPageTablesAreHeldToTheirRules: page tables that do not do what they promise do not
// have a walk run wild.
func TestPageTablesAreHeldToTheirRules(t *testing.T) {
	errOdd := errors.New("odd")
	for name, tt := range map[string]struct {
		tables brokenTables
		panics string
		errno  syscall.Errno
	}{
		"a region elsewhere": {tables: brokenTables{region: func(addr.HVA) addr.HVARange { return at(20, 4) }}, panics: "says that the region of"},
		"an empty region":    {tables: brokenTables{region: func(hva addr.HVA) addr.HVARange { return addr.HVAs(hva, 0) }}, panics: "says that the region of"},
		"a gap in a walk": {tables: brokenTables{walk: func(_ addr.HVARange, fn func(addr.HVARange, addr.PFN, uint32) bool) error {
			fn(at(1, 1), 0, 0)
			return nil
		}}, panics: "yields hva [0x40001000, 0x40002000) at hva 0x40000000"},
		"a run that is too long": {tables: brokenTables{walk: func(_ addr.HVARange, fn func(addr.HVARange, addr.PFN, uint32) bool) error {
			fn(at(0, 9), 0, 0)
			return nil
		}}, panics: "yields"},
		"a walk that ends early": {tables: brokenTables{walk: func(addr.HVARange, func(addr.HVARange, addr.PFN, uint32) bool) error { return nil }}, panics: "and ends at"},
		"a walk that fails":      {tables: brokenTables{walk: func(addr.HVARange, func(addr.HVARange, addr.PFN, uint32) bool) error { return syscall.ENOTTY }}, errno: syscall.ENOTTY},
		"a walk that fails oddly": {tables: brokenTables{walk: func(addr.HVARange, func(addr.HVARange, addr.PFN, uint32) bool) error {
			return errOdd
		}}, errno: syscall.EFAULT},
		"no memory":                 {tables: brokenTables{fault: func() error { return syscall.ENOMEM }}, errno: syscall.ENOMEM},
		"a fault that fails oddly":  {tables: brokenTables{fault: func() error { return errOdd }}, errno: syscall.EFAULT},
		"a fault that blocks oddly": {tables: brokenTables{fault: func() error { return syscall.EAGAIN }}, errno: syscall.EFAULT},
		"a fault without effect":    {tables: brokenTables{fault: func() error { return nil }}, errno: syscall.EBUSY},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(sound, plain(0, 8))
			d := w.newInterval(at(0, 8))
			q := w.newRequest(d, at(0, 4), asked)
			tables := tt.tables
			tables.model = w.tables
			q.Tables, q.Seq = &tables, d.ReadBegin()
			var err error
			got := gvmtest.Panics(func() { w.reading(func() { err = RangeFault(q) }) })
			if tt.panics != "" && !strings.Contains(got, tt.panics) {
				t.Errorf("the panic is %q, want %q", got, tt.panics)
			}
			if tt.errno != 0 && !errors.Is(err, tt.errno) {
				t.Errorf("the error is %v, want %v; the panic %q", err, tt.errno, got)
			}
			d.Remove()
			if err := w.finish(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestErrors: an error says what was tried on what, where it failed and why, and wraps
// what was behind it.
func TestErrors(t *testing.T) {
	err := error(&Error{Op: "fault", Range: at(0, 4), At: at(2, 1).Start, Why: "it cannot be faulted in", Errno: syscall.EFAULT, Err: errModel})
	if want := "fault hva [0x40000000, 0x40004000): at hva 0x40002000: it cannot be faulted in: bad address (the model says no)"; err.Error() != want {
		t.Errorf("the error is %q, want %q", err, want)
	}
	if !errors.Is(err, syscall.EFAULT) || !errors.Is(err, errModel) {
		t.Error("the error does not wrap its errno, or what was behind it")
	}
}
