package mm

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/notifier"
)

// contentTold notes what is announced of one page.
type contentTold struct {
	notifier.Notifier
	page    addr.HVARange
	content []notifier.Content
}

func (c *contentTold) Release() {}

func (c *contentTold) InvalidateRangeStart(inv *notifier.Invalidation) error {
	if inv.Range.Overlaps(c.page) {
		c.content = append(c.content, inv.Content)
	}
	return nil
}

// TestContentIsAsAnnounced makes each change of a page, and compares what has become of
// its content with what was announced of it.
func TestContentIsAsAnnounced(t *testing.T) {
	const before = 0x5a5a_5a5a_5a5a_5a5a
	type attempt struct {
		*Memory
		page, spare addr.HVARange
	}
	for name, tt := range map[string]struct {
		do   func(a attempt) error
		want map[Backing]notifier.Content // missing: the change is refused
		at   func(a attempt) addr.HVA     // where the content is to be looked at; nil: at the page
	}{
		"unmap": {do: func(a attempt) error { return a.Unmap(a.page) },
			want: map[Backing]notifier.Content{Anonymous: notifier.Gone, Memfd: notifier.Gone}},
		"map over": {do: func(a attempt) error { return a.Map(a.page) },
			want: map[Backing]notifier.Content{Anonymous: notifier.Zeroed, Memfd: notifier.Changed}},
		"protect": {do: func(a attempt) error { return a.Protect(a.page, addr.Read) },
			want: map[Backing]notifier.Content{Anonymous: notifier.Kept, Memfd: notifier.Kept}},
		"discard": {do: func(a attempt) error { return a.Discard(a.page) },
			want: map[Backing]notifier.Content{Anonymous: notifier.Zeroed, Memfd: notifier.Kept}},
		"punch": {do: func(a attempt) error { return a.Punch(a.page) },
			want: map[Backing]notifier.Content{Memfd: notifier.Zeroed}},
		"remap": {do: func(a attempt) error { return a.Remap(a.page, a.spare.Start) },
			want: map[Backing]notifier.Content{Anonymous: notifier.Kept, Memfd: notifier.Kept},
			at:   func(a attempt) addr.HVA { return a.spare.Start }},
		"remap over": {do: func(a attempt) error { return errors.Join(a.Map(a.spare), a.Remap(a.spare, a.page.Start)) },
			want: map[Backing]notifier.Content{Anonymous: notifier.Changed, Memfd: notifier.Changed}},
	} {
		for _, backing := range []Backing{Anonymous, Memfd} {
			t.Run(fmt.Sprintf("%s/%v", name, backing), func(t *testing.T) {
				m, r := newMemory(t, RegionConfig{Backing: backing})
				spare, err := m.NewRegion(RegionConfig{Name: "spare", Size: addr.PageSize, Backing: backing, Reserved: true})
				if err != nil {
					t.Fatal(err)
				}
				a := attempt{m, part(r, 3, 1), spare.Range}
				mustStore(t, m, a.page.Start, before)
				told := &contentTold{page: a.page}
				if err := m.as.Register(context.Background(), told); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(told.Unregister)
				err = tt.do(a)
				want, possible := tt.want[backing]
				if !possible {
					if !errors.Is(err, unix.EINVAL) || len(told.content) != 0 {
						t.Errorf("error is %v, and %v is announced; want EINVAL, and nothing", err, told.content)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if len(told.content) != 1 || told.content[0] != want {
					t.Fatalf("announced is %v, want %v", told.content, want)
				}
				at := a.page.Start
				if tt.at != nil {
					at = tt.at(a)
				}
				got, err := m.Load64(at)
				switch want {
				case notifier.Kept:
					if got != before || err != nil {
						t.Errorf("it was announced as kept, and is %#x, %v", got, err)
					}
				case notifier.Zeroed:
					if got != 0 || err != nil {
						t.Errorf("it was announced as zeroed, and is %#x, %v", got, err)
					}
				case notifier.Gone:
					if !errors.Is(err, unix.EFAULT) {
						t.Errorf("it was announced as gone, and is %#x, %v", got, err)
					}
				}
			})
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
