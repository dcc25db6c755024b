package dirty

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/srcu"
)

// guestFrames is a guest of 64 GiB, and dirtyFrames 1 % of it.
const (
	guestFrames = 64 << 30 / addr.PageSize
	dirtyFrames = guestFrames / 100
)

// someFrames returns random frames of the guest, in no order. None is there twice.
func someFrames(n int) []addr.GFN {
	r := rand.New(rand.NewPCG(1, 1))
	var seen Set
	frames := make([]addr.GFN, 0, n)
	for len(frames) < n {
		if gfn := addr.GFN(r.Uint64N(guestFrames)); !seen.Contains(gfn) {
			seen.Add(gfn)
			frames = append(frames, gfn)
		}
	}
	return frames
}

// lockedMap is the log that one writes first.
type lockedMap struct {
	mu     sync.RWMutex
	frames map[addr.GFN]bool
}

func (m *lockedMap) mark(gfn addr.GFN) {
	m.mu.RLock()
	marked := m.frames[gfn]
	m.mu.RUnlock()
	if !marked {
		m.mu.Lock()
		m.frames[gfn] = true
		m.mu.Unlock()
	}
}

// BenchmarkMark times a mark of a frame that is marked already, on every P at
// once, without the read section around it.
func BenchmarkMark(b *testing.B) {
	frames := someFrames(1 << 12)
	log := NewLog(srcu.New())
	peer := lockedMap{frames: map[addr.GFN]bool{}}
	for _, impl := range []struct {
		name string
		mark func(addr.GFN)
	}{{"log", log.Mark}, {"rwmutex-map", peer.mark}} {
		for _, gfn := range frames {
			impl.mark(gfn)
		}
		b.Run("impl="+impl.name, func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				for i := 0; pb.Next(); i++ {
					impl.mark(frames[i%len(frames)])
				}
			})
		})
	}
}

// flat is the other log that one writes first: a bitmap of the guest.
type flat []uint64

func (f flat) mark(gfn addr.GFN) { atomic.OrUint64(&f[gfn/64], 1<<(gfn%64)) }

// harvest takes all marks, and yields the runs of them.
func (f flat) harvest(yield func(addr.GFNRange) bool) {
	var run addr.GFNRange
	for i := range f {
		if atomic.LoadUint64(&f[i]) == 0 {
			continue
		}
		at := addr.GFN(i) * 64
		for x := atomic.SwapUint64(&f[i], 0); x != 0; {
			carried := x + x&-x
			start, end := at+addr.GFN(bits.TrailingZeros64(x)), at+addr.GFN(bits.TrailingZeros64(carried))
			x &= carried
			if start != run.End {
				if !run.Empty() && !yield(run) {
					return
				}
				run.Start = start
			}
			run.End = end
		}
	}
	if !run.Empty() {
		yield(run)
	}
}

// BenchmarkHarvest times a harvest of a guest of 64 GiB: Begin, a loop over all
// runs of dirty frames, and Commit. The marking is not timed. The flat bitmap, of
// 2 MiB, may be harvested without a grace period, and so loses stores.
func BenchmarkHarvest(b *testing.B) {
	for _, shape := range []struct {
		name   string
		frames []addr.GFN
	}{{"1%", someFrames(dirtyFrames)}, {"none", nil}} {
		run := func(impl string, mark func(addr.GFN), harvest func(yield func(addr.GFNRange) bool)) {
			b.Run(fmt.Sprintf("dirty=%s/impl=%s", shape.name, impl), func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					for _, gfn := range shape.frames {
						mark(gfn)
					}
					b.StartTimer()
					n := uint64(0)
					for r := range harvest {
						n += r.NPages()
					}
					if n != uint64(len(shape.frames)) {
						b.Fatalf("%d frames were marked, and the harvest has %d", len(shape.frames), n)
					}
				}
			})
		}
		log := NewLog(srcu.New())
		run("log", log.Mark, func(yield func(addr.GFNRange) bool) {
			h, err := log.Begin()
			if err != nil {
				b.Fatal(err)
			}
			h.Dirty().Runs()(yield)
			if err := h.Commit(); err != nil {
				b.Fatal(err)
			}
		})
		f := make(flat, guestFrames/64)
		run("flat", f.mark, f.harvest)
	}
}

// BenchmarkMarkAll times the first marks after a harvest, which allocate bitmaps,
// and reports what a log takes for a dirty frame.
func BenchmarkMarkAll(b *testing.B) {
	for _, percent := range []int{1, 10} {
		b.Run(fmt.Sprintf("dirty=%d%%", percent), func(b *testing.B) {
			frames := someFrames(percent * dirtyFrames)
			var log *Log
			for b.Loop() {
				log = NewLog(srcu.Default())
				for _, gfn := range frames {
					log.Mark(gfn)
				}
			}
			n := float64(len(frames))
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/frame")
			b.ReportMetric(float64(log.Stats().Bytes)/n, "B/frame")
		})
	}
}

// BenchmarkAddBitmap times the addition of a dirty bitmap of 64 GiB, of 2 MiB
// itself, in which 1 % of the bits are set, to a set that has nothing or all of
// them. The peer adds frame by frame.
func BenchmarkAddBitmap(b *testing.B) {
	words := make([]uint64, guestFrames/64)
	for _, gfn := range someFrames(dirtyFrames) {
		words[gfn/64] |= 1 << (gfn % 64)
	}
	for _, start := range []addr.GFN{1 << 20, 1<<20 + 1} {
		for _, impl := range []struct {
			name string
			add  func(s *Set, start addr.GFN, words []uint64)
		}{
			{"words", (*Set).AddBitmap},
			{"frames", func(s *Set, start addr.GFN, words []uint64) {
				for i, w := range words {
					for ; w != 0; w &= w - 1 {
						s.Add(start + addr.GFN(64*i+bits.TrailingZeros64(w)))
					}
				}
			}},
		} {
			b.Run(fmt.Sprintf("aligned=%v/impl=%s", start%64 == 0, impl.name), func(b *testing.B) {
				var s Set
				impl.add(&s, start, words)
				b.SetBytes(int64(8 * len(words)))
				for b.Loop() {
					impl.add(&s, start, words)
				}
			})
		}
	}
}

// BenchmarkCombine times operations on two sets of 1 % of the frames of 64 GiB. The
// peer does the same to flat bitmaps, and does not count.
func BenchmarkCombine(b *testing.B) {
	frames := someFrames(2 * dirtyFrames)
	var s, o Set
	for i, gfn := range frames {
		if i%2 == 0 {
			s.Add(gfn)
		} else {
			o.Add(gfn)
		}
	}
	x, y := make(flat, guestFrames/64), make(flat, guestFrames/64)
	for r := range s.Runs() {
		x.mark(r.Start)
	}
	for r := range o.Runs() {
		y.mark(r.Start)
	}
	for _, op := range []struct {
		name      string
		set, flat func()
	}{
		{"subtract", func() { s.Subtract(&o) }, func() {
			for i, w := range y {
				x[i] &^= w
			}
		}},
		{"union", func() { s.Union(&o) }, func() {
			for i, w := range y {
				x[i] |= w
			}
		}},
	} {
		b.Run("op="+op.name+"/impl=set", func(b *testing.B) {
			for b.Loop() {
				op.set()
			}
		})
		b.Run("op="+op.name+"/impl=flat", func(b *testing.B) {
			for b.Loop() {
				op.flat()
			}
		})
	}
}

// BenchmarkAddRange times the addition of a TiB and its removal: both together.
func BenchmarkAddRange(b *testing.B) {
	var s Set
	b.ReportAllocs()
	for b.Loop() {
		s.AddRange(gfns(1<<20, 1<<20+1<<28))
		s.RemoveRange(gfns(1<<20, 1<<20+1<<28))
	}
}
