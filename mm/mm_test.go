package mm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/hostmem"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/trace"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

const pages = 16

func newMemory(t testing.TB, c RegionConfig) (*Memory, *Region) {
	t.Helper()
	m := New(trace.NewLog(1000))
	c.Name = "ram"
	if c.Size == 0 {
		c.Size = pages * addr.PageSize
	}
	r, err := m.NewRegion(withFile(t, c))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, r
}

// part returns n pages of the region, from page i.
func part(r *Region, i, n uint64) addr.HVARange {
	return addr.HVAs(r.Range.Start+addr.HVA(i*addr.PageSize), n*addr.PageSize)
}

func mustStore(t *testing.T, m *Memory, hva addr.HVA, v uint64) {
	t.Helper()
	if err := m.Store64(hva, v); err != nil {
		t.Fatal(err)
	}
}

// content describes the first word of every page of the region: its value, "ro
// " and the value, "-" where there is a mapping without access, "." where there
// is none.
func content(t *testing.T, m *Memory, r *Region) string {
	t.Helper()
	var words []string
	for i := range r.Range.NPages() {
		page := part(r, i, 1)
		x := m.Extents(page)[0]
		v, err := m.Load64(page.Start)
		switch {
		case !x.Mapped:
			words = append(words, ".")
		case x.Access == addr.NoAccess:
			words = append(words, "-")
		case err != nil:
			t.Fatal(err)
		case x.Access == addr.Read:
			words = append(words, fmt.Sprintf("ro%d", v))
		default:
			words = append(words, fmt.Sprint(v))
		}
	}
	return strings.Join(words, " ")
}

// TestOperations carries operations out on a region of six pages whose first
// words are 1 to 6, and compares what is there afterwards.
func TestOperations(t *testing.T) {
	type step func(m *Memory, r *Region) error
	unmap := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Unmap(part(r, i, n)) } }
	remap := func(i, n, to uint64) step {
		return func(m *Memory, r *Region) error { return m.Remap(part(r, i, n), part(r, to, 1).Start) }
	}
	mapBack := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Map(part(r, i, n)) } }
	protect := func(i, n uint64, a addr.Access) step {
		return func(m *Memory, r *Region) error { return m.Protect(part(r, i, n), a) }
	}
	discard := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Discard(part(r, i, n)) } }
	punch := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Punch(part(r, i, n)) } }
	remove := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Remove(part(r, i, n)) } }
	free := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Free(part(r, i, n)) } }
	guard := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Guard(part(r, i, n)) } }
	unguard := func(i, n uint64) step { return func(m *Memory, r *Region) error { return m.Unguard(part(r, i, n)) } }
	truncate := func(n uint64) step { return func(m *Memory, r *Region) error { return m.Truncate(r, n*addr.PageSize) } }
	remapKeep := func(i, n, to uint64) step {
		return func(m *Memory, r *Region) error { return m.RemapKeep(part(r, i, n), part(r, to, 1).Start) }
	}
	quiet := func(m *Memory, r *Region) error {
		return errors.Join(m.Populate(r.Range, false), m.Populate(part(r, 1, 2), true), m.Mergeable(r.Range))
	}
	same := func(all string) [4]string { return [4]string{all, all, all, all} }
	for name, tt := range map[string]struct {
		steps   []step
		content [4]string // afterwards, by Backing.column; "": refused
		events  string
		extents int
	}{
		"unmap":                  {[]step{unmap(1, 2)}, same("1 . . 4 5 6"), "unmap", 3},
		"unmap all":              {[]step{unmap(0, 6)}, same(". . . . . ."), "unmap", 1},
		"map back":               {[]step{unmap(1, 2), mapBack(1, 2)}, [4]string{"1 0 0 4 5 6", "1 2 3 4 5 6", "1 0 0 4 5 6", "1 12 13 4 5 6"}, "unmap map", 1},
		"map back in parts":      {[]step{unmap(1, 3), mapBack(3, 1), mapBack(1, 2)}, [4]string{"1 0 0 0 5 6", "1 2 3 4 5 6", "1 0 0 0 5 6", "1 12 13 14 5 6"}, "unmap map map", 1},
		"map over":               {[]step{mapBack(2, 2)}, [4]string{"1 2 0 0 5 6", "1 2 3 4 5 6", "1 2 0 0 5 6", "1 2 13 14 5 6"}, "unmap", 1},
		"protect read-only":      {[]step{protect(0, 2, addr.Read)}, same("ro1 ro2 3 4 5 6"), "protect", 2},
		"protect and back":       {[]step{protect(0, 2, addr.Read), protect(0, 2, addr.ReadWrite)}, same("1 2 3 4 5 6"), "protect protect", 1},
		"protect none":           {[]step{protect(5, 1, addr.NoAccess)}, same("1 2 3 4 5 -"), "protect", 2},
		"discard":                {[]step{discard(2, 3)}, [4]string{"1 2 0 0 0 6", "1 2 3 4 5 6", "1 2 3 4 5 6", "1 2 13 14 15 6"}, "clear", 1},
		"remap onto memory":      {[]step{remap(0, 2, 4)}, same(". . 3 4 1 2"), "remap unmap", 0},
		"remap into a hole":      {[]step{unmap(4, 2), remap(1, 1, 5)}, same("1 . 3 4 . 2"), "unmap remap map", 5},
		"remap keeps read-only":  {[]step{protect(0, 1, addr.Read), remap(0, 1, 5)}, same(". 2 3 4 5 ro1"), "protect remap unmap", 3},
		"punch":                  {[]step{punch(1, 2)}, [4]string{"", "1 0 0 4 5 6", "", "1 2 3 4 5 6"}, "clear", 1},
		"punch what was moved":   {[]step{remap(0, 1, 5), punch(4, 2)}, [4]string{"", ". 2 3 4 0 0", "", ". 2 3 4 5 1"}, "remap unmap clear", 0},
		"punch, then discard":    {[]step{punch(1, 2), discard(1, 3)}, [4]string{"", "1 0 0 4 5 6", "", "1 0 0 14 5 6"}, "clear clear", 1},
		"remove":                 {[]step{remove(1, 2)}, [4]string{"", "1 0 0 4 5 6", "1 0 0 4 5 6", ""}, "clear", 1},
		"remove read-only":       {[]step{protect(1, 1, addr.Read), remove(1, 1)}, [4]string{"", "1 ro0 3 4 5 6", "1 ro0 3 4 5 6", ""}, "protect clear", 3},
		"remove what was moved":  {[]step{remapKeep(0, 1, 5), remove(5, 1)}, [4]string{"", "0 2 3 4 5 0", "0 2 3 4 5 0", ""}, "unmap clear clear clear", 0},
		"free, then discard":     {[]step{free(1, 2), discard(1, 2)}, [4]string{"1 0 0 4 5 6", "", "", ""}, "clear clear", 1},
		"what is not announced":  {[]step{quiet}, same("1 2 3 4 5 6"), "", 1},
		"remap keep":             {[]step{remapKeep(0, 2, 4)}, [4]string{"0 0 3 4 1 2", "1 2 3 4 1 2", "1 2 3 4 1 2", "11 12 3 4 1 2"}, "unmap clear", 0},
		"guard":                  {[]step{guard(1, 2)}, same("1 - - 4 5 6"), "protect", 3},
		"guard and back":         {[]step{guard(1, 2), unguard(0, 6)}, [4]string{"1 0 0 4 5 6", "1 2 3 4 5 6", "1 2 3 4 5 6", "1 12 13 4 5 6"}, "protect map", 1},
		"guard what is guarded":  {[]step{guard(1, 2), guard(2, 2), unguard(1, 2)}, [4]string{"1 0 0 - 5 6", "1 2 3 - 5 6", "1 2 3 - 5 6", "1 12 13 - 5 6"}, "protect protect map map", 3},
		"unguard no guard":       {[]step{unguard(1, 2)}, same("1 2 3 4 5 6"), "", 1},
		"guard read-only":        {[]step{protect(1, 1, addr.Read), guard(1, 1), unguard(1, 1)}, [4]string{"1 ro0 3 4 5 6", "1 ro2 3 4 5 6", "1 ro2 3 4 5 6", "1 ro12 3 4 5 6"}, "protect protect map", 3},
		"protect a guard":        {[]step{guard(1, 2), protect(1, 1, addr.Read)}, same("1 - - 4 5 6"), "protect protect", 4},
		"and unguard it":         {[]step{guard(1, 2), protect(1, 1, addr.Read), unguard(1, 2)}, [4]string{"1 ro0 0 4 5 6", "1 ro2 3 4 5 6", "1 ro2 3 4 5 6", "1 ro12 13 4 5 6"}, "protect protect map map", 3},
		"discard a guard":        {[]step{guard(1, 1), discard(0, 3)}, [4]string{"0 - 0 4 5 6", "1 - 3 4 5 6", "1 - 3 4 5 6", "11 - 13 4 5 6"}, "protect clear", 3},
		"map over a guard":       {[]step{guard(1, 1), mapBack(1, 1)}, [4]string{"1 0 3 4 5 6", "1 2 3 4 5 6", "1 0 3 4 5 6", "1 12 3 4 5 6"}, "protect unmap", 1},
		"remap a guard":          {[]step{guard(1, 1), remap(0, 2, 4)}, same(". . 3 4 1 -"), "protect remap unmap", 0},
		"remap keep a guard":     {[]step{guard(1, 1), remapKeep(0, 2, 4)}, same(""), "", 0},
		"punch a guard":          {[]step{guard(1, 1), punch(1, 2), unguard(1, 1)}, [4]string{"", "1 0 0 4 5 6", "", "1 0 3 4 5 6"}, "protect clear map", 1},
		"shrink":                 {[]step{truncate(2)}, [4]string{"", "1 2 - - - -", "", "1 2 - - - -"}, "unmap", 2},
		"shrink to nothing":      {[]step{truncate(0)}, [4]string{"", "- - - - - -", "", "- - - - - -"}, "unmap", 1},
		"shrink and grow":        {[]step{truncate(2), truncate(4), truncate(4)}, [4]string{"", "1 2 0 0 - -", "", "1 2 0 0 - -"}, "unmap map", 2},
		"shrink twice":           {[]step{truncate(4), truncate(2), truncate(6)}, [4]string{"", "1 2 0 0 0 0", "", "1 2 0 0 0 0"}, "unmap unmap map map", 1},
		"map past the end":       {[]step{truncate(2), mapBack(1, 2)}, [4]string{"", "1 2 - - - -", "", "1 12 - - - -"}, "unmap unmap unmap", 2},
		"protect past the end":   {[]step{truncate(2), protect(1, 2, addr.Read), truncate(3)}, [4]string{"", "1 ro2 ro0 - - -", "", "1 ro2 ro0 - - -"}, "unmap protect map", 3},
		"shrink what was moved":  {[]step{remap(4, 1, 0), mapBack(4, 1), truncate(4)}, [4]string{"", "- 2 3 4 - -", "", "- 2 3 4 - -"}, "remap unmap map unmap unmap", 0},
		"remap what has ended":   {[]step{truncate(4), remap(3, 2, 0), truncate(6)}, [4]string{"", "4 0 3 . . 0", "", "4 0 3 . . 0"}, "unmap remap unmap map map", 0},
		"a guard past the end":   {[]step{guard(4, 1), truncate(4), truncate(6)}, [4]string{"", "1 2 3 4 - 0", "", "1 2 3 4 - 0"}, "protect unmap unmap map map", 3},
		"unguard across the end": {[]step{guard(3, 2), truncate(4), unguard(3, 2)}, [4]string{"", "1 2 3 4 - -", "", "1 2 3 14 - -"}, "protect unmap unmap map map", 2},
		"guard two kinds":        {[]step{protect(1, 1, addr.Read), guard(1, 2), unguard(1, 2)}, [4]string{"1 ro0 0 4 5 6", "1 ro2 3 4 5 6", "1 ro2 3 4 5 6", "1 ro12 13 4 5 6"}, "protect protect map map", 3},
		"unguard past the end":   {[]step{truncate(4), guard(4, 1), unguard(4, 1)}, [4]string{"", "1 2 3 4 - -", "", "1 2 3 4 - -"}, "unmap protect map", 2},
	} {
		for _, backing := range allBackings {
			t.Run(name+"/"+backing.String(), func(t *testing.T) {
				want := tt.content[backing.column()]
				if strings.Contains(name, "guard") {
					needAdvice(t, unix.MADV_GUARD_INSTALL)
				}
				m, r := newMemory(t, RegionConfig{Size: 6 * addr.PageSize, Backing: backing})
				for i := range uint64(6) {
					if backing.private() {
						if _, err := r.File().WriteAt([]byte{byte(11 + i)}, int64(i*addr.PageSize)); err != nil {
							t.Fatal(err)
						}
					}
					mustStore(t, m, part(r, i, 1).Start, i+1)
				}
				register(t, m, &funcSubscriber{end: func(inv *notifier.Invalidation) {
					m.Walk(inv.Range, func(r addr.HVARange, access addr.Access) {
						if access&^inv.After != 0 && !inv.Failed {
							t.Errorf("after a %v that was to leave no more than %v, %v is %v", inv.Event, inv.After, r, access)
						}
					})
				}})
				for _, step := range tt.steps {
					err := step(m, r)
					if want == "" && errors.Is(err, unix.EINVAL) {
						return
					}
					if backing.named() && errors.Is(err, unix.EOPNOTSUPP) {
						return // a file system without holes
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if got := content(t, m, r); got != want {
					t.Errorf("memory is %q, want %q", got, want)
				}
				var events []string
				log, _ := m.log.Since(0)
				for _, e := range log {
					if e.Kind == trace.InvalidateStart {
						events = append(events, e.Name)
					}
				}
				if got := strings.Join(events, " "); got != tt.events {
					t.Errorf("notified of %q, want %q", got, tt.events)
				}
				// Shared anonymous memory that is mapped again is another object.
				if n := len(m.Extents(r.Range)); tt.extents != 0 && n != tt.extents && backing != SharedAnonymous {
					t.Errorf("%d extents, want %d: %v", n, tt.extents, m.Extents(r.Range))
				}
				checkReserved(t, r)
				checkExtents(t, m, r)
			})
		}
	}
}

// checkReserved fails the test unless every byte of the region's addresses is
// mapped, as memory or as a reservation.
func checkReserved(t *testing.T, r *Region) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	at := r.reserved.Start
	for line := range strings.Lines(string(maps)) {
		var v addr.HVARange
		if _, err := fmt.Sscanf(line, "%x-%x", &v.Start, &v.End); err != nil {
			t.Fatal(err)
		}
		if v.Start <= at && at < v.End {
			at = min(v.End, r.reserved.End)
		}
	}
	if at != r.reserved.End {
		t.Errorf("%v of %v is neither mapped nor reserved", at, r.reserved)
	}
}

func TestRefusedOperations(t *testing.T) {
	for name, tt := range map[string]struct {
		config RegionConfig
		do     func(m *Memory, r *Region) error
		want   error
		says   string
	}{
		"pinned":        {config: RegionConfig{Pinned: true}, do: func(m *Memory, r *Region) error { return m.Discard(part(r, 0, 1)) }, want: ErrPinned, says: `"ram"`},
		"empty":         {do: func(m *Memory, r *Region) error { return m.Unmap(part(r, 0, 0)) }, want: unix.EINVAL, says: "empty"},
		"misaligned":    {do: func(m *Memory, r *Region) error { return m.Unmap(addr.HVAs(r.Range.Start+1, addr.PageSize)) }, want: unix.EINVAL, says: "aligned"},
		"past the end":  {do: func(m *Memory, r *Region) error { return m.Unmap(part(r, pages-1, 2)) }, want: unix.EINVAL, says: "region"},
		"address wraps": {do: func(m *Memory, r *Region) error { return m.Unmap(addr.HVARange{Start: r.Range.Start, End: 0}) }, want: unix.EINVAL, says: "empty"},
		"discard a hole": {do: func(m *Memory, r *Region) error {
			return errors.Join(m.Unmap(part(r, 3, 1)), m.Discard(part(r, 2, 3)))
		}, want: unix.ENOMEM, says: "change 1, unmap"},
		"protect a hole":          {config: RegionConfig{Reserved: true}, do: func(m *Memory, r *Region) error { return m.Protect(part(r, 0, 1), addr.Read) }, want: unix.ENOMEM, says: "not mapped"},
		"punch anonymous memory":  {do: func(m *Memory, r *Region) error { return m.Punch(part(r, 0, 1)) }, want: unix.EINVAL, says: "discard it instead"},
		"remap onto itself":       {do: func(m *Memory, r *Region) error { return m.Remap(part(r, 0, 2), part(r, 1, 1).Start) }, want: unix.EINVAL, says: "overlaps"},
		"remap out of the region": {do: func(m *Memory, r *Region) error { return m.Remap(part(r, 0, 1), 0) }, want: unix.EINVAL, says: "target"},
		"closed": {do: func(m *Memory, r *Region) error {
			other, otherRegion := New(nil), addr.HVARange{Start: addr.PageSize, End: 2 * addr.PageSize}
			if err := other.Close(); err != nil {
				return err
			}
			return other.Unmap(otherRegion)
		}, want: fs.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			m, r := newMemory(t, tt.config)
			if !tt.config.Reserved {
				mustStore(t, m, r.Range.Start, 42)
			}
			err := tt.do(m, r)
			if !errors.Is(err, tt.want) || !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Errorf("error is %q, want %q in it and errors.Is %q", err, tt.says, tt.want)
			}
			var e *Error
			if !errors.As(err, &e) {
				t.Errorf("error is a %T, want an *Error", err)
			}
			if !tt.config.Reserved {
				if v, err := m.Load64(r.Range.Start); v != 42 || err != nil {
					t.Errorf("memory is %d (%v) after the refusal, want 42", v, err)
				}
			}
		})
	}
}

func TestNewRegionErrors(t *testing.T) {
	m := New(nil)
	for name, tt := range map[string]struct {
		size uint64
		want error
	}{
		"zero":             {0, unix.EINVAL},
		"not whole pages":  {addr.PageSize + 1, unix.EINVAL},
		"wraps":            {1<<64 - addr.PageSize, unix.ENOMEM},
		"above the kernel": {1 << 60, unix.ENOMEM},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := m.NewRegion(RegionConfig{Name: "x", Size: tt.size}); !errors.Is(err, tt.want) {
				t.Errorf("NewRegion of %d bytes returned %v, want %v", tt.size, err, tt.want)
			}
		})
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("the second Close returned %v, want fs.ErrClosed", err)
	}
	if _, err := m.NewRegion(RegionConfig{Size: addr.PageSize}); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("NewRegion after Close returned %v, want fs.ErrClosed", err)
	}
}

type funcSubscriber struct {
	notifier.Notifier
	start func(*notifier.Invalidation) error
	end   func(*notifier.Invalidation)
}

func (s *funcSubscriber) InvalidateRangeStart(inv *notifier.Invalidation) error {
	if s.start == nil {
		return nil
	}
	return s.start(inv)
}
func (s *funcSubscriber) InvalidateRangeEnd(inv *notifier.Invalidation) {
	if s.end != nil {
		s.end(inv)
	}
}
func (s *funcSubscriber) Release() {}

func register(t *testing.T, m *Memory, s notifier.Subscriber) {
	t.Helper()
	if err := m.as.Register(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

// TestReportsReachTheCaller has a subscriber fail at the start and panic at the
// end. The change is made, and the operation tells of both.
func TestReportsReachTheCaller(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	mustStore(t, m, r.Range.Start, 42)
	failed, panicked := errors.New("failed"), errors.New("panicked")
	s := &funcSubscriber{
		start: func(*notifier.Invalidation) error { return failed },
		end:   func(*notifier.Invalidation) { panic(panicked) },
	}
	register(t, m, s)
	err := m.Discard(part(r, 0, 1))
	var e *Error
	if !errors.As(err, &e) || !e.Made || !errors.Is(err, failed) || !errors.Is(err, panicked) || !strings.Contains(err.Error(), "the change was made, but: ") {
		t.Errorf("error is %v, want an *Error that says that the change was made, and both failures", err)
	}
	if v, err := m.Load64(r.Range.Start); v != 0 || err != nil {
		t.Errorf("the page is %d (%v), want 0", v, err)
	}
	s.start, s.end = nil, nil
	if err := m.Discard(part(r, 0, 1)); err != nil {
		t.Errorf("the next operation: %v", err)
	}
}

// TestPunchTellsOfAliases moves a page of a file away and maps it again: a hole
// in the file changes both.
func TestPunchTellsOfAliases(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Size: 6 * addr.PageSize, Backing: Memfd})
	if err := errors.Join(m.Remap(part(r, 1, 2), part(r, 4, 2).Start), m.Map(part(r, 1, 2))); err != nil {
		t.Fatal(err)
	}
	var told []string
	note := func(what string, inv *notifier.Invalidation) {
		told = append(told, fmt.Sprintf("%s %d+%d", what, (inv.Range.Start-r.Range.Start)/addr.PageSize, inv.Range.NPages()))
	}
	register(t, m, &funcSubscriber{
		start: func(inv *notifier.Invalidation) error { note("start", inv); return nil },
		end:   func(inv *notifier.Invalidation) { note("end", inv) },
	})
	if err := m.Punch(part(r, 2, 2)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"start 2+2", "start 5+1", "end 5+1", "end 2+2"}, told); diff != "" {
		t.Errorf("told of a punch of pages 2 and 3, of which 2 is at 5 too (-want +got):\n%s", diff)
	}
}

// TestAccessAfter: what comes back is announced with the access that it has then.
func TestAccessAfter(t *testing.T) {
	needAdvice(t, unix.MADV_GUARD_INSTALL)
	m, r := newMemory(t, RegionConfig{Size: 6 * addr.PageSize, Backing: Memfd})
	if err := errors.Join(m.Protect(part(r, 1, 1), addr.Read), m.Guard(part(r, 0, 6)), m.Truncate(r, 4*addr.PageSize)); err != nil {
		t.Fatal(err)
	}
	var told []string
	register(t, m, &funcSubscriber{start: func(inv *notifier.Invalidation) error {
		told = append(told, fmt.Sprintf("%v %d+%d %v", inv.Event, (inv.Range.Start-r.Range.Start)/addr.PageSize, inv.Range.NPages(), inv.After))
		return nil
	}})
	if err := errors.Join(m.Unguard(part(r, 1, 4)), m.Map(part(r, 3, 3)), m.Truncate(r, 5*addr.PageSize)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{
		"map 1+1 read-only", "map 2+2 read-write", "map 4+1 none", // Unguard
		"unmap 3+1 read-write", "unmap 4+2 none", // Map
		"map 4+1 read-write", // Truncate
	}, told); diff != "" {
		t.Errorf("announced (-want +got):\n%s", diff)
	}
}

// TestExtentsOfTwoKinds: extents side by side that differ in one thing stay two.
func TestExtentsOfTwoKinds(t *testing.T) {
	o, c := new(object), new(Change)
	kind := func(first uint64) Extent {
		return Extent{Range: addr.HVAs(addr.HVA(first*addr.PageSize), addr.PageSize), Mapped: true, object: o, offset: int64(first * addr.PageSize), access: addr.ReadWrite}.settled()
	}
	for name, other := range map[string]func(x *Extent){
		"as it is":              func(*Extent) {},
		"unmapped":              func(x *Extent) { x.Mapped = false },
		"another object":        func(x *Extent) { x.object = new(object) },
		"no object":             func(x *Extent) { x.object = nil },
		"another offset":        func(x *Extent) { x.offset += addr.PageSize },
		"private":               func(x *Extent) { x.private = true },
		"other permissions":     func(x *Extent) { x.access = addr.Read },
		"guarded":               func(x *Extent) { x.guard = c },
		"ended":                 func(x *Extent) { x.ended = c },
		"taken by another":      func(x *Extent) { x.since = c },
		"ended, below a guard":  func(x *Extent) { x.ended = c },
		"access, below a guard": func(x *Extent) { x.access = addr.NoAccess },
		"since, below a guard":  func(x *Extent) { x.since = c },
	} {
		x, y := kind(0), kind(1)
		if strings.HasSuffix(name, "guard") {
			x.guard = new(Change)
			y.guard = x.guard
		}
		other(&y)
		for _, order := range [][2]Extent{{x, y}, {y, x}} {
			var s extents
			if order[0].Range.Start != 0 { // the other way round
				order[0].Range, order[1].Range = order[1].Range, order[0].Range
				order[0].offset, order[1].offset = order[0].offset-addr.PageSize, order[1].offset+addr.PageSize
			}
			s.set(order[0].settled())
			s.set(order[1].settled())
			if one := len(s) == 1; one != (name == "as it is") {
				t.Errorf("%s: they are %v", name, s)
			}
		}
	}
}

// TestTruncateTellsOfAliases cuts a file of which a page is mapped twice, and lets it
// grow.
func TestTruncateTellsOfAliases(t *testing.T) {
	for _, backing := range []Backing{Memfd, MemfdPrivate} {
		m, r := newMemory(t, RegionConfig{Size: 6 * addr.PageSize, Backing: backing})
		if err := errors.Join(m.Remap(part(r, 1, 2), part(r, 4, 2).Start), m.Map(part(r, 1, 2)), m.Protect(part(r, 5, 1), addr.Read)); err != nil {
			t.Fatal(err)
		}
		var told []string
		register(t, m, &funcSubscriber{start: func(inv *notifier.Invalidation) error {
			told = append(told, fmt.Sprintf("%v %d+%d %v %v", inv.Event, (inv.Range.Start-r.Range.Start)/addr.PageSize, inv.Range.NPages(), inv.After, inv.Content))
			return nil
		}})
		if err := errors.Join(m.Truncate(r, 2*addr.PageSize), m.Truncate(r, 3*addr.PageSize)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{
			"unmap 2+2 none gone", "unmap 5+1 none gone",
			"map 2+1 read-write zeroed", "map 5+1 read-only zeroed",
		}, told); diff != "" {
			t.Errorf("%v: told of a cut of pages 2 to 5, of which 2 is at 5 too, and of 2 coming back (-want +got):\n%s", backing, diff)
		}
		if x := m.Extents(part(r, 3, 1))[0]; !x.Mapped || !strings.HasSuffix(x.String(), fmt.Sprintf("none since change 4, truncate of %v", part(r, 2, 4))) {
			t.Errorf("page 3, which has no memory, is %v", x)
		}
	}
}

func TestBackingNames(t *testing.T) {
	var names []string
	for _, b := range append(slices.Clone(allBackings), 6) {
		names = append(names, b.String())
	}
	if got, want := strings.Join(names, " "), "anonymous memfd shared-anonymous memfd-private file file-private backing(6)"; got != want {
		t.Errorf("backings are %q, want %q", got, want)
	}
	m := New(nil)
	if _, err := m.NewRegion(RegionConfig{Size: addr.PageSize, Backing: 6}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("NewRegion with a backing that there is not: %v, want EINVAL", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestUserOutlivesClose holds a user through Close: the mappings go when it does.
func TestUserOutlivesClose(t *testing.T) {
	m := New(nil)
	r, err := m.NewRegion(RegionConfig{Name: "ram", Size: addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	if !m.as.TryGetUser() {
		t.Fatal("a memory that is not closed has no users")
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := hostmem.Store64(r.Range.Start, 42); err != nil {
		t.Errorf("the mapping has gone with a user left: %v", err)
	}
	if err := m.as.PutUser(); err != nil {
		t.Fatal(err)
	}
	if m.as.TryGetUser() {
		t.Error("a user was given out after the last one had gone")
	}
}

// TestBracketOrder has a subscriber look at the memory itself: at the start it
// is as it was, at the end it is changed.
func TestBracketOrder(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	mustStore(t, m, r.Range.Start, 42)
	var seen []uint64
	look := func() {
		v, err := hostmem.Load64(r.Range.Start)
		if err != nil {
			t.Error(err)
		}
		seen = append(seen, v)
	}
	register(t, m, &funcSubscriber{
		start: func(*notifier.Invalidation) error { look(); return nil },
		end:   func(*notifier.Invalidation) { look() },
	})
	if err := m.Discard(part(r, 0, 1)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint64{42, 0}, seen); diff != "" {
		t.Errorf("the page at start and end of the bracket (-want +got):\n%s", diff)
	}
}

func TestWalkTellsWhatWillStand(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Size: 4 * addr.PageSize})
	if err := errors.Join(m.Unmap(part(r, 1, 1)), m.Protect(part(r, 3, 1), addr.Read)); err != nil {
		t.Fatal(err)
	}
	var got []string
	around := addr.HVARange{Start: r.Range.Start - addr.PageSize, End: r.Range.End + addr.PageSize}
	m.as.RLock()
	m.Walk(around, func(part addr.HVARange, access addr.Access) {
		got = append(got, fmt.Sprintf("%d+%d %v", int64(part.Start-r.Range.Start)/addr.PageSize, part.NPages(), access))
	})
	m.as.RUnlock()
	want := []string{"-1+1 none", "0+1 read-write", "1+1 none", "2+1 read-write", "3+1 read-only", "4+1 none"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Walk (-want +got):\n%s", diff)
	}
}

func TestAccessErrors(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	buf := make([]byte, 2*addr.PageSize)
	if err := errors.Join(m.Unmap(part(r, 2, 1)), m.Protect(part(r, 4, 1), addr.Read)); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		do   func() error
		says string
	}{
		"into a hole":           {func() error { return m.ReadAt(buf, part(r, 1, 1).Start) }, "not mapped since change 1, unmap"},
		"store to read-only":    {func() error { return m.Store64(part(r, 4, 1).Start, 1) }, "read-only since change 2, protect"},
		"past the end":          {func() error { return m.WriteAt(buf, part(r, pages-1, 1).Start) }, "is not guest memory"},
		"nowhere near":          {func() error { return m.ReadAt(buf, 0) }, "is not guest memory"},
		"to the end of numbers": {func() error { return m.ReadAt(buf, ^addr.HVA(0)-8) }, "is not guest memory"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tt.do()
			var e *AccessError
			if !errors.As(err, &e) || !errors.Is(err, unix.EFAULT) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error is %v, want an *AccessError with EFAULT that says %q", err, tt.says)
			}
		})
	}
	if err := m.ReadAt(nil, 0); err != nil {
		t.Errorf("reading nothing: %v", err)
	}
}

// TestStrayChangeIsAnError takes a page away behind the package's back.
func TestStrayChangeIsAnError(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	mustStore(t, m, r.Range.Start, 42)
	if err := mprotect(part(r, 0, 1), addr.NoAccess); err != nil {
		t.Fatal(err)
	}
	if v, err := m.Load64(r.Range.Start); !errors.Is(err, unix.EFAULT) {
		t.Errorf("load from a page that was protected behind our back gave %d, %v; want EFAULT", v, err)
	}
	if err := mprotect(part(r, 0, 1), addr.ReadWrite); err != nil {
		t.Fatal(err)
	}
	if v, err := m.Load64(r.Range.Start); v != 42 || err != nil {
		t.Errorf("load after it was put back gave %d, %v; want 42", v, err)
	}
}

func TestLastChange(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	if c, ok := m.LastChange(r.Range.Start); ok {
		t.Errorf("a fresh page was last changed by %v", c)
	}
	if err := m.Unmap(part(r, 0, 1)); err != nil {
		t.Fatal(err)
	}
	for range historyLen {
		if err := m.Discard(part(r, 1, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Remap(part(r, 4, 1), part(r, 6, 1).Start); err != nil {
		t.Fatal(err)
	}
	for page, want := range map[uint64]Op{0: OpUnmap, 1: OpDiscard, 4: OpRemap, 6: OpRemap} {
		if c, ok := m.LastChange(part(r, page, 1).Start + 123); !ok || c.Op != want {
			t.Errorf("page %d was last changed by %v (%v), want %s", page, c, ok, want)
		}
	}
}

// TestNoHoleForOthers moves and unmaps pages while other threads map memory
// wherever the kernel likes. None of it may land in the region.
func TestNoHoleForOthers(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for !stop.Load() {
				p, err := mmap(addr.HVAs(0, addr.PageSize), unix.PROT_READ, reservation, -1, 0)
				if err != nil {
					t.Error(err)
					return
				}
				got := addr.HVAs(p, addr.PageSize)
				if got.Overlaps(r.reserved) {
					t.Errorf("another thread's mmap was given %v, inside %v", got, r.reserved)
					stop.Store(true)
				}
				if err := munmap(got); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := 0; i < 2000 && !stop.Load(); i++ {
		if err := errors.Join(
			m.Remap(part(r, 1, 2), part(r, 8, 1).Start), m.Map(part(r, 1, 2)),
			m.Unmap(part(r, 4, 1)), m.Map(part(r, 4, 1)),
		); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	wg.Wait()
}

// FuzzExtents runs (page, length, kind) triples on a set of extents and on an
// array with an element for each page, and compares them.
func FuzzExtents(f *testing.F) {
	f.Add([]byte{0, 16, 1, 3, 4, 0, 5, 1, 2, 0, 16, 1})
	f.Fuzz(func(t *testing.T, prog []byte) {
		type kind struct {
			mapped bool
			access addr.Access
			offset int64
		}
		const n = 32
		mapped := new(object)
		var s extents
		s.set(Extent{Range: addr.HVAs(0, n*addr.PageSize)})
		var model [n]kind
		for ; len(prog) >= 3; prog = prog[3:] {
			first, count := int64(prog[0]%n), int64(prog[1]%n)+1
			count = min(count, n-first)
			k := kind{mapped: prog[2]&1 != 0, access: addr.Access(prog[2] >> 1 & 3), offset: int64(prog[2]>>3) * addr.PageSize}
			x := Extent{Range: addr.HVAs(addr.HVA(first*addr.PageSize), uint64(count*addr.PageSize)), Mapped: k.mapped, Access: k.access, object: mapped, offset: k.offset}
			s.set(x)
			for i := range count {
				model[first+i] = k
				model[first+i].offset += i * addr.PageSize
			}
			at := addr.HVA(0)
			for i, x := range s {
				if x.Range.Start != at || x.Range.Empty() || i > 0 && s[i-1].continues(x) {
					t.Fatalf("extent %d of %v leaves a gap, is empty, or could be one with the one before it", i, s)
				}
				at = x.Range.End
			}
			for i := range int64(n) {
				page := addr.HVAs(addr.HVA(i*addr.PageSize), addr.PageSize)
				got := slices.Collect(s.in(page))
				if len(got) != 1 {
					t.Fatalf("page %d has %d extents", i, len(got))
				}
				g := kind{got[0].Mapped, got[0].Access, got[0].offset}
				if model[i].mapped && g != model[i] || g.mapped != model[i].mapped || got[0].Range != page {
					t.Fatalf("page %d is %+v in %v, want %+v", i, g, got[0].Range, model[i])
				}
			}
		}
	})
}

// BenchmarkDiscard times the discard of one page that no guest has mapped, next
// to the bare system call. The page is touched in between, outside the timing
// of neither: both pay for the fault.
func BenchmarkDiscard(b *testing.B) {
	m, r := newMemory(b, RegionConfig{})
	page := part(r, 3, 1)
	for name, discard := range map[string]func() error{
		"impl=mm":  func() error { return m.Discard(page) },
		"impl=raw": func() error { return madvise(page, unix.MADV_DONTNEED) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := hostmem.Store64(page.Start, 1); err != nil {
					b.Fatal(err)
				}
				if err := discard(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestLookup compares the access around an address with what Walk says.
func TestLookup(t *testing.T) {
	m, r := newMemory(t, RegionConfig{})
	for i, access := range []addr.Access{addr.Read, addr.NoAccess, addr.Read, addr.Read} {
		if err := m.Protect(part(r, uint64(1+2*i), 2), access); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Unmap(part(r, 4, 1)); err != nil {
		t.Fatal(err)
	}
	outside := addr.HVARange{Start: r.Range.Start - 4*addr.PageSize, End: r.Range.End + 4*addr.PageSize}
	for _, within := range []addr.HVARange{r.Range, part(r, 1, 5), outside} {
		var runs []addr.HVARange // as of Walk, those of the same access as one
		var accesses []addr.Access
		m.as.RLock()
		m.Walk(within, func(r addr.HVARange, access addr.Access) {
			if n := len(runs); n > 0 && accesses[n-1] == access && runs[n-1].End == r.Start {
				runs[n-1].End = r.End
				return
			}
			runs, accesses = append(runs, r), append(accesses, access)
		})
		m.as.RUnlock()
		for hva := within.Start; hva < within.End; hva += addr.PageSize / 2 {
			run, access, err := m.Lookup(context.Background(), hva, within)
			i := slices.IndexFunc(runs, func(r addr.HVARange) bool { return r.Start <= hva && hva < r.End })
			// Unmapped memory and memory nobody knows of are not one run.
			if err != nil || access != accesses[i] || !runs[i].Contains(run) || !run.Contains(addr.HVAs(hva, 1)) || access != addr.NoAccess && run != runs[i] {
				t.Errorf("Lookup of %v in %v gives %v %v, %v; want %v %v", hva, within, run, access, err, runs[i], accesses[i])
			}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m.as.Lock()
	defer m.as.Unlock()
	canceled := make(chan error)
	go func() {
		_, _, err := m.Lookup(ctx, r.Range.Start, r.Range)
		canceled <- err
	}()
	if err := <-canceled; !errors.Is(err, unix.EINTR) || !errors.Is(err, context.Canceled) {
		t.Errorf("Lookup while the mapping changes and with a context that is done: %v, want EINTR", err)
	}
}
