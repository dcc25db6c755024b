package mm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/hostmem"
	"github.com/secondmmu/gvm/notifier"
)

// contentTold notes what is announced of one page.
type contentTold struct {
	notifier.Notifier
	page    addr.HVARange
	content []notifier.Content
	open    int // brackets
	failed  int
}

func (c *contentTold) Release() {}

func (c *contentTold) InvalidateRangeStart(inv *notifier.Invalidation) error {
	c.open++
	if inv.Range.Overlaps(c.page) {
		c.content = append(c.content, inv.Content)
	}
	return nil
}

func (c *contentTold) InvalidateRangeEnd(inv *notifier.Invalidation) {
	c.open--
	if inv.Failed {
		c.failed++
	}
}

// attempt is a page and a place for another, in memory of one kind.
type attempt struct {
	*Memory
	r           *Region
	page, spare addr.HVARange
}

func (a attempt) target() addr.HVARange { return a.spare }

const (
	stored = 0x5a5a_5a5a_5a5a_5a5a // in the page
	inFile = 0xf11e_f11e_f11e_f11e // in the page of its file
)

var words = map[string]uint64{"stored": stored, "file": inFile, "0": 0}

var allBackings = []Backing{Anonymous, Memfd, SharedAnonymous, MemfdPrivate, File, FilePrivate}

// column is where a table that has what happens by backing has it for this one, in the
// order of the package comment: a file of the caller's is as a memory file.
func (b Backing) column() int {
	switch b {
	case File:
		return int(Memfd)
	case FilePrivate:
		return int(MemfdPrivate)
	}
	return int(b)
}

// TestContentIsAsAnnounced makes each change of a page, and compares what has become of
// its content with what was announced of it.
func TestContentIsAsAnnounced(t *testing.T) {
	shrink := func(a attempt) error { return a.Truncate(a.r, 3*addr.PageSize) }
	grow := func(a attempt) error { return a.Truncate(a.r, a.r.Size) }
	unmap := func(a attempt) error { return a.Unmap(a.page) }
	mapIt := func(a attempt) error { return a.Map(a.page) }
	discard := func(a attempt) error { return a.Discard(a.page) }
	punch := func(a attempt) error { return a.Punch(a.page) }
	guard := func(a attempt) error { return a.Guard(a.page) }
	unguard := func(a attempt) error { return a.Unguard(a.page) }
	protect := func(access addr.Access) func(a attempt) error {
		return func(a attempt) error { return a.Protect(a.page, access) }
	}
	populate := func(write bool) func(a attempt) error {
		return func(a attempt) error { return a.Populate(a.page, write) }
	}
	remap := func(a attempt) error { return a.Remap(a.page, a.spare.Start) }
	remapKeep := func(a attempt) error { return a.RemapKeep(a.page, a.spare.Start) }
	for name, tt := range map[string]struct {
		untouched bool                // nothing is stored in the page
		first, do func(attempt) error // only do is watched
		then      func(attempt) error // makes what is kept accessible

		// By backing, in the order of their columns: what is announced of the page, and
		// which word is there afterwards ("?": whichever). "refused" is EINVAL, and
		// nothing announced; "fails" is EINVAL from the kernel.
		want [4]string

		watch func(attempt) addr.HVARange // which page the announcement is of; nil: the page
		at    func(attempt) addr.HVARange // which page to look at afterwards; nil: the page
		needs int                         // advice that the machine may not have
	}{
		"unmap":                 {do: unmap, want: [4]string{"gone", "gone", "gone", "gone"}},
		"map over":              {do: mapIt, want: [4]string{"zeroed 0", "changed stored", "zeroed 0", "changed file"}},
		"map back":              {first: unmap, do: mapIt, want: [4]string{"zeroed 0", "changed stored", "zeroed 0", "changed file"}},
		"map past the end":      {first: shrink, do: mapIt, want: [4]string{"refused", "gone", "refused", "gone"}},
		"map over guards":       {first: guard, do: mapIt, want: [4]string{"zeroed 0", "changed stored", "zeroed 0", "changed file"}, needs: unix.MADV_GUARD_INSTALL},
		"protect":               {do: protect(addr.Read), want: [4]string{"kept stored", "kept stored", "kept stored", "kept stored"}},
		"protect none":          {do: protect(addr.NoAccess), then: protect(addr.Read), want: [4]string{"kept stored", "kept stored", "kept stored", "kept stored"}},
		"discard":               {do: discard, want: [4]string{"zeroed 0", "kept stored", "kept stored", "changed file"}},
		"discard an untouched":  {untouched: true, do: discard, want: [4]string{"zeroed 0", "kept file", "kept 0", "changed file"}},
		"free":                  {do: func(a attempt) error { return a.Free(a.page) }, want: [4]string{"changed ?", "refused", "refused", "refused"}},
		"discard what is free":  {first: func(a attempt) error { return a.Free(a.page) }, do: discard, want: [4]string{"zeroed 0", "refused", "refused", "refused"}},
		"punch":                 {do: punch, want: [4]string{"refused", "zeroed 0", "refused", "changed stored"}},
		"punch an untouched":    {untouched: true, do: punch, want: [4]string{"refused", "zeroed 0", "refused", "changed 0"}},
		"remove":                {do: func(a attempt) error { return a.Remove(a.page) }, want: [4]string{"refused", "zeroed 0", "zeroed 0", "refused"}},
		"page out":              {do: func(a attempt) error { return a.PageOut(a.page) }, want: [4]string{"kept stored", "kept stored", "kept stored", "kept stored"}},
		"collapse":              {do: func(a attempt) error { return a.Collapse(a.r.Range) }, want: [4]string{"kept stored", "kept stored", "kept stored", "fails kept stored"}, needs: unix.MADV_COLLAPSE},
		"collapse an untouched": {untouched: true, do: func(a attempt) error { return a.Collapse(a.r.Range) }, want: [4]string{"?", "kept file", "?", "kept file"}, needs: unix.MADV_COLLAPSE},
		"collapse a guard":      {first: guard, do: func(a attempt) error { return a.Collapse(a.r.Range) }, then: unguard, want: [4]string{"fails kept 0", "fails kept stored", "fails kept stored", "fails kept file"}, needs: unix.MADV_GUARD_INSTALL},
		"collapse a page":       {do: func(a attempt) error { return a.Collapse(a.page) }, want: [4]string{"refused", "refused", "refused", "refused"}},
		"mergeable":             {do: func(a attempt) error { return a.Mergeable(a.page) }, want: [4]string{"nothing stored", "nothing stored", "nothing stored", "nothing stored"}, needs: unix.MADV_MERGEABLE},
		"unmergeable":           {do: func(a attempt) error { return a.Unmergeable(a.page) }, want: [4]string{"kept stored", "kept stored", "kept stored", "kept stored"}, needs: unix.MADV_MERGEABLE},
		"populate to read":      {untouched: true, do: populate(false), want: [4]string{"nothing 0", "nothing file", "nothing 0", "nothing file"}},
		"populate to write":     {untouched: true, do: populate(true), want: [4]string{"nothing 0", "nothing file", "nothing 0", "nothing file"}},
		"populate what is":      {do: populate(true), want: [4]string{"nothing stored", "nothing stored", "nothing stored", "nothing stored"}},
		"guard":                 {do: guard, then: unguard, want: [4]string{"gone 0", "kept stored", "kept stored", "gone file"}, needs: unix.MADV_GUARD_INSTALL},
		"guard an untouched":    {untouched: true, do: guard, then: unguard, want: [4]string{"gone 0", "kept file", "kept 0", "gone file"}, needs: unix.MADV_GUARD_INSTALL},
		"unguard":               {first: guard, do: unguard, want: [4]string{"zeroed 0", "kept stored", "kept stored", "changed file"}, needs: unix.MADV_GUARD_INSTALL},
		"unguard no guard":      {do: unguard, want: [4]string{"nothing stored", "nothing stored", "nothing stored", "nothing stored"}, needs: unix.MADV_GUARD_INSTALL},
		"shrink":                {do: shrink, want: [4]string{"refused", "gone", "refused", "gone"}},
		"shrink and grow":       {first: shrink, do: grow, want: [4]string{"refused", "zeroed 0", "refused", "zeroed 0"}},
		"remap":                 {do: remap, at: attempt.target, want: [4]string{"kept stored", "kept stored", "kept stored", "kept stored"}},
		"remap keep":            {do: remapKeep, want: [4]string{"zeroed 0", "kept stored", "kept stored", "changed file"}},
		"target of remap keep":  {do: remapKeep, watch: attempt.target, at: attempt.target, want: [4]string{"changed stored", "changed stored", "changed stored", "changed stored"}},
		"remap over":            {do: func(a attempt) error { return errors.Join(a.Map(a.spare), a.Remap(a.spare, a.page.Start)) }, want: [4]string{"changed 0", "changed 0", "changed 0", "changed 0"}},
	} {
		for _, backing := range allBackings {
			t.Run(fmt.Sprintf("%s/%v", name, backing), func(t *testing.T) {
				a := newAttempt(t, backing)
				if !tt.untouched {
					mustStore(t, a.Memory, a.page.Start, stored)
				}
				want := strings.Fields(tt.want[backing.column()])
				refused, fails := want[0] == "refused", want[0] == "fails"
				if fails {
					want = want[1:]
				}
				if tt.needs != 0 {
					needAdvice(t, tt.needs)
				}
				told := &contentTold{page: a.page}
				if tt.watch != nil {
					told.page = tt.watch(a)
				}
				var err error
				if tt.first != nil {
					err = tt.first(a)
				}
				if err == nil {
					register(t, a.Memory, told)
					defer told.Unregister()
					err = tt.do(a)
				}
				if told.open != 0 {
					t.Errorf("%d brackets are open", told.open)
				}
				checkExtents(t, a.Memory, a.r)
				switch {
				case want[0] == "?":
					return // the kernel collapses what is not there, or does not
				case backing.named() && errors.Is(err, unix.EOPNOTSUPP) && (name == "punch" || name == "punch an untouched" || name == "remove"):
					lacksHoles(t, a, err, told)
					return
				case backing.named() && strings.HasPrefix(name, "collapse") && errors.Is(err, unix.EINVAL) && told.failed == 1:
					// The file system has no huge pages. What is announced holds.
				case refused:
					if !errors.Is(err, unix.EINVAL) || len(told.content) != 0 {
						t.Errorf("error is %v, and %v is announced; want EINVAL, and nothing", err, told.content)
					}
					return
				case fails && (!errors.Is(err, unix.EINVAL) || told.failed != 1):
					t.Fatalf("error is %v, and %d brackets have failed; want EINVAL, and one", err, told.failed)
				case !fails && (err != nil || told.failed != 0):
					t.Fatalf("error is %v, and %d brackets have failed", err, told.failed)
				}
				if got := strings.Trim(fmt.Sprint(told.content), "[]"); got != want[0] && !(got == "" && want[0] == "nothing") {
					t.Fatalf("announced is %q, want %q", got, want[0])
				}
				at := a.page
				if tt.at != nil {
					at = tt.at(a)
				}
				if want[0] == "gone" {
					if got, err := hostmem.Load64(at.Start); !errors.Is(err, unix.EFAULT) {
						t.Errorf("it was announced as gone, and is %#x, %v", got, err)
					}
				}
				if tt.then != nil {
					if err := tt.then(a); err != nil {
						t.Fatal(err)
					}
				}
				if len(want) < 2 {
					return
				}
				got, err := a.Load64(at.Start)
				if err != nil || want[1] != "?" && got != words[want[1]] {
					t.Errorf("it was announced as %s, and is %#x, %v; want %s", want[0], got, err, want[1])
				}
			})
		}
	}
}

func newAttempt(t *testing.T, backing Backing) attempt {
	t.Helper()
	m, r := newMemory(t, RegionConfig{Backing: backing, Size: addr.HugeSize})
	spare, err := m.NewRegion(withFile(t, RegionConfig{Name: "spare", Size: addr.PageSize, Backing: backing, Reserved: true}))
	if err != nil {
		t.Fatal(err)
	}
	a := attempt{m, r, part(r, 3, 1), spare.Range}
	if f := r.File(); f != nil {
		if _, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, inFile), 3*addr.PageSize); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// needAdvice skips the test if the kernel does not take the advice for memory that
// suits it, and mergeable memory is also memory that suits the others.
func needAdvice(t testing.TB, advice int) {
	t.Helper()
	all, err := reserve(addr.HugeSize)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := munmap(all); err != nil {
			t.Error(err)
		}
	}()
	if err := errors.Join(mprotect(all, addr.ReadWrite), hostmem.Store64(all.Start, 1)); err != nil {
		t.Fatal(err)
	}
	if err := madvise(all, advice); err != nil {
		gvmtest.Lack(t, gvmtest.Advice, fmt.Errorf("advice %d: %w", advice, err))
	}
}

// checkExtents fails the test unless just those pages can be loaded from of which the
// extents say so.
func checkExtents(t *testing.T, m *Memory, r *Region) {
	t.Helper()
	for i := range min(r.Range.NPages(), pages) {
		page := part(r, i, 1)
		x := m.Extents(page)[0]
		if _, err := hostmem.Load64(page.Start); (err == nil) != (x.Access&addr.Read != 0) {
			t.Errorf("a load from page %d gives %v; it is %v", i, err, x)
		}
	}
}

// TestDiscardOfMixedMemory: of a range that has anonymous pages and some of a file,
// nothing is promised.
func TestDiscardOfMixedMemory(t *testing.T) {
	m, r := newMemory(t, RegionConfig{Backing: Memfd})
	other, err := m.NewRegion(RegionConfig{Name: "other", Size: addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Remap(other.Range, part(r, 3, 1).Start); err != nil {
		t.Fatal(err)
	}
	told := &contentTold{page: part(r, 3, 1)}
	if err := m.as.Register(context.Background(), told); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(told.Unregister)
	for _, r := range []addr.HVARange{part(r, 2, 2), part(r, 3, 1), part(r, 2, 1)} {
		if err := m.Discard(r); err != nil {
			t.Fatal(err)
		}
	}
	if want := []notifier.Content{notifier.Changed, notifier.Zeroed}; fmt.Sprint(told.content) != fmt.Sprint(want) {
		t.Errorf("announced is %v, want %v", told.content, want)
	}
}
