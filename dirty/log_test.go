package dirty

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/srcu"
)

// begin returns a harvest of a log that has none.
func begin(t testing.TB, l *Log) *Harvest {
	t.Helper()
	h, err := l.Begin()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// inSection calls f inside a read section of the log's domain.
func (l *Log) inSection(f func()) {
	idx := l.domain.ReadLock()
	defer l.domain.ReadUnlock(idx)
	f()
}

func TestHarvest(t *testing.T) {
	type ranges = []addr.GFNRange
	for name, tt := range map[string]struct {
		before, during     func(l *Log) // Begin
		abort              bool
		dirty, discarded   ranges // of the first harvest
		dirty2, discarded2 ranges // of the second
	}{
		"nothing": {},
		"marks are taken": {
			before: func(l *Log) { l.Mark(4); l.Mark(chunk); l.Mark(Limit - 1); l.Mark(4) },
			dirty:  ranges{gfns(4, 5), gfns(chunk, chunk+1), gfns(Limit-1, Limit)},
		},
		"ranges are taken": {
			before: func(l *Log) {
				l.MarkRange(gfns(9, 9))
				l.MarkRange(gfns(60, 70))
				l.MarkRange(gfns(chunk-1, 3*chunk+1))
			},
			dirty: ranges{gfns(60, 70), gfns(chunk-1, 3*chunk+1)},
		},
		"marks make a whole chunk": {
			before: func(l *Log) { l.MarkRange(gfns(0, chunk-1)); l.Mark(chunk - 1); l.MarkRange(gfns(chunk, 2*chunk)) },
			dirty:  ranges{gfns(0, 2*chunk)},
		},
		"what is merged is taken": {
			before: func(l *Log) { l.Mark(4); l.Merge(setOf(gfns(5, 6), gfns(chunk, 3*chunk))) },
			dirty:  ranges{gfns(4, 6), gfns(chunk, 3*chunk)},
		},
		"discards are taken": {
			before:    func(l *Log) { l.Discard(gfns(0, 0)); l.Discard(gfns(7, 9)); l.Discard(gfns(chunk, 9*chunk)) },
			discarded: ranges{gfns(7, 9), gfns(chunk, 9*chunk)},
		},
		"a discard after a mark": {
			before:    func(l *Log) { l.Mark(7); l.Discard(gfns(6, 9)) },
			dirty:     ranges{gfns(7, 8)},
			discarded: ranges{gfns(6, 9)},
		},
		"a discard before a mark": {
			before:    func(l *Log) { l.Discard(gfns(6, 9)); l.Mark(7) },
			dirty:     ranges{gfns(7, 8)},
			discarded: ranges{gfns(6, 9)},
		},
		"later ones stay": {
			before:     func(l *Log) { l.Mark(4); l.Discard(gfns(8, 9)) },
			during:     func(l *Log) { l.Mark(4); l.Mark(5); l.Discard(gfns(9, 10)) },
			dirty:      ranges{gfns(4, 5)},
			discarded:  ranges{gfns(8, 9)},
			dirty2:     ranges{gfns(4, 6)},
			discarded2: ranges{gfns(9, 10)},
		},
		"an abort puts all back": {
			before:     func(l *Log) { l.Mark(4); l.Discard(gfns(8, 9)); l.MarkRange(gfns(chunk, 2*chunk)) },
			during:     func(l *Log) { l.Mark(5); l.Discard(gfns(9, 10)); l.Merge(setOf(gfns(2*chunk, 3*chunk))) },
			abort:      true,
			dirty:      ranges{gfns(4, 5), gfns(chunk, 2*chunk)},
			discarded:  ranges{gfns(8, 9)},
			dirty2:     ranges{gfns(4, 6), gfns(chunk, 3*chunk)},
			discarded2: ranges{gfns(8, 10)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := NewLog(srcu.New())
			run := func(f func(*Log)) {
				if f != nil {
					l.inSection(func() { f(l) })
				}
			}
			check := func(h *Harvest, dirty, discarded ranges) {
				t.Helper()
				if want := setOf(dirty...); !h.Dirty().Equal(want) {
					t.Errorf("Dirty is %v, want %v", h.Dirty(), want)
				}
				if want := setOf(discarded...); !h.Discarded().Equal(want) {
					t.Errorf("Discarded is %v, want %v", h.Discarded(), want)
				}
				if err := l.Check(); err != nil {
					t.Error(err)
				}
			}
			run(tt.before)
			peeked, _ := l.Peek()
			h := begin(t, l)
			check(h, tt.dirty, tt.discarded)
			if !peeked.Equal(h.Dirty()) {
				t.Errorf("Peek said %v before Begin, which took %v", peeked, h.Dirty())
			}
			run(tt.during)
			end := h.Commit
			if tt.abort {
				end = h.Abort
			}
			if err := end(); err != nil {
				t.Error(err)
			}
			check(h, tt.dirty, tt.discarded) // it is still what it was
			for _, r := range tt.dirty2 {
				if !l.Contains(r.Start) {
					t.Errorf("Contains(%v) = false", r.Start)
				}
			}
			check(begin(t, l), tt.dirty2, tt.discarded2)
		})
	}
}

// TestOneHarvest: one at a time, and each ends once.
func TestOneHarvest(t *testing.T) {
	l := NewLog(srcu.New())
	for _, end := range []struct {
		name       string
		end, again func(*Harvest) error
	}{
		{"Commit, Commit", (*Harvest).Commit, (*Harvest).Commit},
		{"Commit, Abort", (*Harvest).Commit, (*Harvest).Abort},
		{"Abort, Abort", (*Harvest).Abort, (*Harvest).Abort},
		{"Abort, Commit", (*Harvest).Abort, (*Harvest).Commit},
	} {
		l.inSection(func() { l.Mark(4) })
		h := begin(t, l)
		if _, err := l.Begin(); !errors.Is(err, ErrOpen) || !errors.Is(err, syscall.EBUSY) {
			t.Errorf("%s: Begin with a harvest open says %v, want ErrOpen, which is EBUSY", end.name, err)
		}
		if !l.Stats().Open {
			t.Errorf("%s: %+v with a harvest open", end.name, l.Stats())
		}
		if err := end.end(h); err != nil {
			t.Errorf("%s: %v", end.name, err)
		}
		l.inSection(func() { l.Mark(5) })
		if err := end.again(h); !errors.Is(err, ErrEnded) {
			t.Errorf("%s: the second says %v, want ErrEnded", end.name, err)
		}
		next := begin(t, l)
		if err := end.again(h); !errors.Is(err, ErrEnded) {
			t.Errorf("%s: with the next one open it says %v, want ErrEnded", end.name, err)
		}
		if !next.Dirty().Contains(5) {
			t.Errorf("%s: the next harvest has %v, want gfn 5 in it", end.name, next.Dirty())
		}
		if err := next.Commit(); err != nil {
			t.Error(err)
		}
		if err := l.Check(); err != nil {
			t.Error(err)
		}
	}
}

// TestLogMemory: a log grows with its marks, and not with the guest.
func TestLogMemory(t *testing.T) {
	l := NewLog(srcu.New())
	l.inSection(func() {
		l.MarkRange(gfns(0, Limit))
		l.Discard(gfns(0, Limit))
	})
	if s := l.Stats(); s.Chunks != 0 || s.Bytes > 16*spanBytes {
		t.Errorf("all of the guest: %+v", s)
	}
	l = NewLog(srcu.New())
	l.inSection(func() {
		for gfn := addr.GFN(0); gfn < 1<<28; gfn += 1 << 24 { // 16 of 1 TiB, each in a directory
			l.Mark(gfn)
		}
	})
	want := Stats{Directories: 16, Chunks: 16, Bytes: 16 * (bitmapBytes + dirChunks*8 + 8)}
	if s := l.Stats(); s != want {
		t.Errorf("16 frames of 1 TiB: %+v, want %+v", s, want)
	}
}

func TestLogAllocations(t *testing.T) {
	l := NewLog(srcu.New())
	r := gfns(5, 90)
	whole := gfns(chunk, 9*chunk)
	l.inSection(func() {
		l.MarkRange(r)
		l.MarkRange(whole)
		for name, f := range map[string]func(){
			"Mark":                     func() { l.Mark(7) },
			"MarkRange":                func() { l.MarkRange(r) },
			"MarkRange, of whole ones": func() { l.MarkRange(whole) },
		} {
			if n := testing.AllocsPerRun(100, f); n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
		}
	})
}

// TestLogCheck breaks each invariant that a set has not.
func TestLogCheck(t *testing.T) {
	for want, damage := range map[string]func(l *Log){
		"in phase 0, an open harvest is there: true":  func(l *Log) { l.open = new(Harvest) },
		"in phase 3, an open harvest is there: false": func(l *Log) { l.phase = harvesting },
		"directory 0[3] has the bitmap of directory":  func(l *Log) { top := *l.top.Load(); top[0][3].Store(l.find(0)) },
		"other frames, chunks [0x5, 0x6), has the bitmap of directory 0[0]": func(l *Log) {
			l.others.spans = []span{{5, 6, part{l.find(0), 1}}}
		},
		"of the harvest's dirty set, chunks [0x9, 0x9), is empty": func(l *Log) {
			l.phase, l.open = harvesting, &Harvest{dirty: Set{spans: []span{{9, 9, whole}}}}
		},
		"the log has 65537 directories": func(l *Log) {
			top := make([]*directory, directories+1)
			l.top.Store(&top)
		},
	} {
		l := NewLog(srcu.New())
		l.inSection(func() { l.Mark(4) })
		if err := l.Check(); err != nil {
			t.Fatal(err)
		}
		damage(l)
		if err := l.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Check says %v, want %q in it", err, want)
		}
	}
}

// runLogProgram runs a program of four bytes an instruction on a log and on two
// models of what is in it. An open harvest has models of its own.
func runLogProgram(t testing.TB, prog []byte) {
	l := NewLog(srcu.New())
	marked, discarded := model{}, model{}
	var h *Harvest
	var hMarked, hDiscarded model
	end := func(f func(*Harvest) error, want error) {
		t.Helper()
		if err := f(h); !errors.Is(err, want) {
			t.Fatalf("the end of a harvest says %v, want %v", err, want)
		}
	}
	open := false
	for prog = prog[:min(len(prog), 4*64)]; len(prog) >= 4; prog = prog[4:] {
		op, r := prog[0], between(prog[1], prog[2])
		switch op {
		case 'm':
			l.inSection(func() { l.MarkRange(r) })
			marked.set(r, true)
		case '+':
			for i, gfn := range corners[:len(corners)-1] {
				if r.Contains(gfn) && corners[i+1] == gfn+1 {
					l.inSection(func() { l.Mark(gfn) })
					marked[gfn] = true
				}
			}
		case 'g':
			l.Merge(setOf(r))
			marked.set(r, true)
		case 'd':
			l.inSection(func() { l.Discard(r) })
			discarded.set(r, true)
		case 'b':
			next, err := l.Begin()
			if open {
				if !errors.Is(err, ErrOpen) {
					t.Fatalf("Begin with a harvest open says %v", err)
				}
				break
			}
			h, open = next, true
			hMarked, hDiscarded = marked, discarded
			marked, discarded = model{}, model{}
		case 'c', 'a':
			f, want := (*Harvest).Commit, ErrEnded
			if op == 'a' {
				f = (*Harvest).Abort
			}
			switch {
			case h == nil:
				continue
			case open:
				want = nil
				if open = false; op == 'a' {
					marked.union(hMarked)
					discarded.union(hDiscarded)
				}
			}
			end(f, want)
		}
		if h != nil {
			hMarked.compare(t, "dirty of the harvest", h.Dirty())
			hDiscarded.compare(t, "discarded of the harvest", h.Discarded())
		}
		gotMarked, gotDiscarded := l.Peek()
		marked.compare(t, "marked", gotMarked)
		discarded.compare(t, "discarded", gotDiscarded)
		for _, gfn := range corners[:len(corners)-1] {
			if l.Contains(gfn) != marked[gfn] {
				t.Fatalf("Contains(%v) = %v, want %v", gfn, l.Contains(gfn), marked[gfn])
			}
		}
		if err := l.Check(); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzLog runs programs on logs and models.
func FuzzLog(f *testing.F) {
	f.Add([]byte("m\x02\x08\x00" + "b\x00\x00\x00" + "+\x00\x10\x00" + "a\x00\x00\x00" + "b\x00\x00\x00" + "c\x00\x00\x00"))
	f.Add([]byte("g\x02\x1e\x00" + "d\x00\x20\x00" + "b\x00\x00\x00" + "m\x0f\x18\x00" + "a\x00\x00\x00" + "a\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, prog []byte) { runLogProgram(t, prog) })
}

// TestLogPrograms runs random programs.
func TestLogPrograms(t *testing.T) {
	r := gvmtest.Rand(t)
	programs := 80
	if gvmtest.Race {
		programs = 20
	}
	for range programs {
		runLogProgram(t, randomProgram(r, "mm++gddbca"))
	}
}

// TestGrowth has many goroutines mark frames that nobody has marked before, each
// in other directories or in the same, and looks for all of them.
func TestGrowth(t *testing.T) {
	const workers, each = 4, 64
	l := NewLog(srcu.New())
	var wg sync.WaitGroup
	var next atomic.Uint64
	for range workers {
		wg.Go(func() {
			for range each {
				n := next.Add(1) - 1
				l.inSection(func() { l.Mark(addr.GFN(n/2*dirChunks*chunk + n%2*7)) })
			}
		})
	}
	wg.Wait()
	if got := begin(t, l).Dirty().Len(); got != workers*each {
		t.Errorf("%d frames were marked, and the harvest has %d", workers*each, got)
	}
	if err := l.Check(); err != nil {
		t.Error(err)
	}
}
