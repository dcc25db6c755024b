package hostops

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
)

// perform carries operations out, in their order, up to the first error. They are
// separated by semicolons.
func perform(t *testing.T, g *guest, ops string) (*Runner, error) {
	t.Helper()
	r := mustRunner(t, Config{Target: g.Target, Script: mustParse(t, "at 0s "+strings.ReplaceAll(ops, "; ", "\nat 0s "))})
	return r, r.Run(context.Background())
}

// mustRestore has the runner give back what is missing, and checks that it has.
func mustRestore(t testing.TB, r *Runner, g *guest) {
	t.Helper()
	if err := r.Restore(context.Background()); err != nil {
		t.Error(err)
	}
	g.verify(t)
}

// TestOperations carries operations out on six pages whose first words are 1 to 6, compares
// what is there afterwards, and gives everything back.
func TestOperations(t *testing.T) {
	same := func(all string) [4]string { return [4]string{all, all, all, all} }
	for name, tt := range map[string]struct {
		ops   string
		state [4]string // afterwards, in the order of backings; "": the last one is refused
	}{
		"unmap":              {"unmap 1..3", same("1 . . 4 5 6")},
		"map":                {"map 1..3", [4]string{"1 0 0 4 5 6", "1 2 3 4 5 6", "1 0 0 4 5 6", "1 0 0 4 5 6"}},
		"protect":            {"protect 1 none; protect 2..4 read; protect 3 write", same("1 - ro3 4 5 6")},
		"discard":            {"discard 1..3", [4]string{"1 0 0 4 5 6", "1 2 3 4 5 6", "1 2 3 4 5 6", "1 0 0 4 5 6"}},
		"punch":              {"punch 1..3", [4]string{"", "1 0 0 4 5 6", "", "1 2 3 4 5 6"}},
		"remove":             {"remove 1..3", [4]string{"", "1 0 0 4 5 6", "1 0 0 4 5 6", ""}},
		"free":               {"free 1..3; fill 1..3 0", [4]string{"1 0 0 4 5 6", "", "", ""}},
		"quiet":              {"populate 0..2 read; populate all write; pageout all; mergeable 1..3; unmergeable all", same("1 2 3 4 5 6")},
		"truncate":           {"truncate 4", [4]string{"", "1 2 3 4 - -", "", "1 2 3 4 - -"}},
		"truncate and grow":  {"truncate 4; truncate 5; truncate all", [4]string{"", "1 2 3 4 0 0", "", "1 2 3 4 0 0"}},
		"store":              {"store 1 0x10; store 2+8 1", same("1 16 3 4 5 6")},
		"fill":               {"fill 1..3 1", same("1 72340172838076673 72340172838076673 4 5 6")},
		"move away":          {"remap 1..3 to spare", same("1 2' 3' 4 5 6")},
		"move away twice":    {"remap 1..3 to spare; remap 0..4 to spare", same("1' 2' 3' 4' 5 6")},
		"move home":          {"remap 1..3 to spare; remap all back", same("1 2 3 4 5 6")},
		"move parts home":    {"remap 1..4 to spare; remap 2 back; remap 4 to spare", same("1 2' 3 4' 5' 6")},
		"move several":       {"mergeable 1..3; remap 0..4 to spare", same("1' 2' 3' 4' 5 6")},
		"move several home":  {"remap 1 to spare; remap 3 to spare; remap 0..4 back", same("1 2 3 4 5 6")},
		"use what is away":   {"remap 1..3 to spare; store 1 9; protect 2 read; fill 0 0", same("0 9' ro3' 4 5 6")},
		"unmap what is away": {"remap 1..3 to spare; unmap 2", same("1 2' .' 4 5 6")},
		"map what is away":   {"remap 1..3 to spare; unmap 2; map 0..4", [4]string{"0 0 0 0 5 6", "1 2 3 4 5 6", "0 0 0 0 5 6", "0 0 0 0 5 6"}},
		"leave":              {"remap-keep 1..3", [4]string{"1 0 0 4 5 6", "1 2 3 4 5 6", "1 2 3 4 5 6", "1 0 0 4 5 6"}},
		"leave over":         {"remap-keep 1..3; remap 3..5 to spare", [4]string{"1 0 0 4' 5' 6", "1 2 3 4' 5' 6", "1 2 3 4' 5' 6", "1 0 0 4' 5' 6"}},
	} {
		for i, backing := range backings[:4] { // a file of the caller's is as a memory file
			t.Run(fmt.Sprintf("%s/backing=%v", name, backing), func(t *testing.T) {
				g := newGuest(t, guestConfig{backing: backing, pages: 6, spare: 4})
				g.number(t)
				r, err := perform(t, g, tt.ops)
				if tt.state[i] == "" {
					if !errors.Is(err, unix.EINVAL) {
						t.Errorf("got %v, want EINVAL", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if got := strings.Join(g.state(t), " "); got != tt.state[i] {
					t.Errorf("%s left %s, want %s", tt.ops, got, tt.state[i])
				}
				mustRestore(t, r, g)
			})
		}
	}
}

// TestGuards is apart: not every kernel has guards.
func TestGuards(t *testing.T) {
	g := newGuest(t, guestConfig{pages: 4, spare: 2})
	g.number(t)
	r, err := perform(t, g, "guard 1..3; protect 2..4 read; unguard 1")
	if errors.Is(err, unix.EINVAL) {
		gvmtest.Lack(t, gvmtest.Advice, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(g.state(t), " "), "1 0 - ro4"; got != want {
		t.Errorf("guards left %s, want %s", got, want)
	}
	mustRestore(t, r, g)
}

func TestCollapse(t *testing.T) {
	g := newGuest(t, guestConfig{pages: hugePages})
	g.number(t)
	switch _, err := perform(t, g, "collapse all"); {
	case impossible(Collapse, err):
		gvmtest.Lack(t, gvmtest.HugePages, err)
	case err != nil:
		t.Fatal(err)
	}
	if v, err := g.read(17); v != 18 || err != nil {
		t.Errorf("page 17 reads %d (%v) after a collapse, want 18", v, err)
	}
	g.verify(t)
}

// TestOperationFails: what cannot be carried out is an error that says which operation
// that was, and what is there is what the pieces before it left.
func TestOperationFails(t *testing.T) {
	g := newGuest(t, guestConfig{pages: 6, spare: 2})
	g.number(t)
	for ops, want := range map[string]struct {
		err  error
		says string
	}{
		"unmap 2; discard 1..4":                 {unix.ENOMEM, "ops.txt:2: discard 1..4 (op 2): "},
		"unmap 2; store 2+8 1":                  {unix.EFAULT, "ops.txt:2: store 2+8 1 (op 2): "},
		"protect 1 read; fill 0..3 7":           {unix.EFAULT, "ops.txt:2: fill 0..3 7 (op 2): "},
		"remap 0..3 to spare":                   {unix.ENOSPC, "ops.txt:1: remap 0..3 to spare (op 1): the spare region has no 3 pages in a row"},
		"remap 0 to spare; remap 2..4 to spare": {unix.ENOSPC, "ops.txt:2: remap 2..4 to spare (op 2): the spare region has no 2 pages in a row"},
		"remap 0..2 to spare; remap-keep 5":     {unix.ENOSPC, "ops.txt:2: remap-keep 5 (op 2): "},
		"truncate 4":                            {unix.EINVAL, "ops.txt:1: truncate 4 (op 1): "},
		"collapse 0..4":                         {unix.EINVAL, "ops.txt:1: collapse 0..4 (op 1): "},
	} {
		r, err := perform(t, g, ops)
		var failed *OpError
		if !errors.As(err, &failed) || !errors.Is(err, want.err) || !strings.HasPrefix(err.Error(), want.says) {
			t.Errorf("%s:\n got %v\nwant %q with %v", ops, err, want.says, want.err)
		}
		mustRestore(t, r, g)
		g.number(t)
	}
}

// TestRestoreStops: once its context is done, a restore says what it has left out.
func TestRestoreStops(t *testing.T) {
	g := newGuest(t, guestConfig{backing: mm.Memfd})
	r, err := perform(t, g, "unmap 3..5")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.Restore(ctx); !errors.Is(err, context.Canceled) || !strings.HasPrefix(err.Error(), "give back guest memory: ") {
		t.Errorf("got %v, want that it was cancelled", err)
	}
	mustRestore(t, r, g)
}

// TestMoveInParts moves eight pages on kernels that move only what is one mapping.
func TestMoveInParts(t *testing.T) {
	at := func(page uint64) addr.HVA { return addr.HVA(page << addr.PageShift) }
	for name, tt := range map[string]struct {
		borders []uint64 // between mappings
		fails   uint64   // the page that does not move
		want    string   // what is moved, in order
		err     error
	}{
		"one mapping":   {want: "0..8"},
		"two":           {borders: []uint64{4}, want: "0..4 4..8"},
		"three":         {borders: []uint64{3, 4}, want: "0..2 2 3 4..8"},
		"another error": {borders: []uint64{4}, fails: 6, want: "0..4", err: unix.ENOMEM},
		"a bad page":    {borders: []uint64{1, 2}, fails: 1, want: "0", err: unix.EFAULT},
	} {
		t.Run(name, func(t *testing.T) {
			var moved []string
			err := inParts(addr.HVARange{Start: at(0), End: at(8)}, at(100), func(from addr.HVARange, to addr.HVA) error {
				r := Range{uint64(from.Start) >> addr.PageShift, uint64(from.End) >> addr.PageShift}
				if to != at(100+r.Start) {
					t.Errorf("%v goes to %v", r, to)
				}
				for _, b := range tt.borders {
					if r.Start < b && b < r.End {
						return unix.EFAULT
					}
				}
				if tt.fails != 0 && r.Contains(tt.fails) {
					return tt.err
				}
				moved = append(moved, r.String())
				return nil
			})
			if got := strings.Join(moved, " "); got != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("it moves %s (%v), want %s (%v)", got, err, tt.want, tt.err)
			}
		})
	}
}
