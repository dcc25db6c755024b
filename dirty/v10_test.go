package dirty

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/srcu"
)

// bed is a guest whose memory is a number for each of a few frames, its log, and
// a copy of the memory that is kept up to date by harvests alone.
type bed struct {
	*Log
	frames []addr.GFN // in ascending order; each array below has an element for each
	mem    []atomic.Uint64
	copy   []uint64 // the harvester's
}

func newBed(m mutant, frames ...addr.GFN) *bed {
	b := &bed{Log: NewLog(srcu.New()), frames: frames, mem: make([]atomic.Uint64, len(frames)), copy: make([]uint64, len(frames))}
	b.mutant = m
	return b
}

// store is what a writer does: it marks frame i, and then stores v.
func (b *bed) store(i int, v uint64) {
	b.inSection(func() {
		b.Mark(b.frames[i])
		b.mem[i].Store(v)
	})
}

// discard discards the frames from i to j, both of them included.
func (b *bed) discard(i, j int) {
	b.inSection(func() {
		b.Discard(gfns(b.frames[i], b.frames[j]+1))
		for ; i <= j; i++ {
			b.mem[i].Store(0)
		}
	})
}

// apply brings the copy up to date as far as a harvest says that it is not. It
// may be called again, with what the same harvest has and later ones.
func (b *bed) apply(h *Harvest) {
	for i, gfn := range b.frames {
		switch {
		case h.Dirty().Contains(gfn):
			b.copy[i] = b.mem[i].Load()
		case h.Discarded().Contains(gfn):
			b.copy[i] = 0
		}
	}
}

// harvest begins a harvest, applies it, and ends it.
func (b *bed) harvest(end func(*Harvest) error) error {
	h, err := b.Begin()
	if err != nil {
		return err
	}
	b.apply(h)
	return end(h)
}

// settle makes the last harvest, when nobody writes any more, and returns an error
// if the copy is not the memory.
func (b *bed) settle() error {
	b.hook = nil
	if err := b.harvest((*Harvest).Commit); err != nil {
		return err
	}
	for i, gfn := range b.frames {
		if got, want := b.copy[i], b.mem[i].Load(); got != want {
			return fmt.Errorf("%v holds %d and its copy %d, and nothing says that it is dirty", gfn, want, got)
		}
	}
	return b.Check()
}

// TestV10Stamps has writers stamp ever greater numbers into memory, in all the ways
// that there are, while a harvester commits and aborts at random.
//
//   - When a harvest is committed, the copy of a frame is as new as what the frame
//     held before Begin was called. That is the meaning of a store that is in each
//     log collected after it.
//   - When all are held up, and after one more harvest, the copy is the memory. They
//     are held up again and again, because what was lost is soon written again.
//
// The first is for memory without discards, in which numbers do not go down.
func TestV10Stamps(t *testing.T) {
	for _, discards := range []bool{false, true} {
		t.Run(fmt.Sprintf("discards=%v", discards), func(t *testing.T) {
			seed := gvmtest.Seed(t)
			testStamps(t, seed, discards)
		})
	}
}

func testStamps(t *testing.T, seed uint64, discards bool) {
	const (
		writers = 3
		length  = 150 * time.Millisecond
	)
	var frames []addr.GFN
	for _, start := range []addr.GFN{0, chunk - 60, 7*chunk + 30, dirChunks*chunk - 60, 5 * dirChunks * chunk} {
		for i := range addr.GFN(120) {
			frames = append(frames, start+i)
		}
	}
	b := newBed(sound, frames...)

	// guest is a writer whose log is the hypervisor's, which is got and merged.
	var guest struct {
		sync.Mutex
		dirty Set
	}
	random := func(n uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, n)) }
	var wg sync.WaitGroup
	var stop atomic.Bool
	var world sync.RWMutex // held to stop it
	defer func() {
		stop.Store(true)
		wg.Wait()
	}()
	work := func(n uint64, f func(r *rand.Rand, stamp uint64)) {
		wg.Go(func() {
			r := random(n)
			for stamp := uint64(1); !stop.Load(); stamp++ {
				world.RLock()
				f(r, stamp)
				world.RUnlock()
				runtime.Gosched() // the harvester's turn
			}
		})
	}
	for n := range writers { // each has frames of its own, so that numbers grow
		work(uint64(n), func(r *rand.Rand, stamp uint64) {
			i := r.IntN(len(frames)/writers)*writers + n
			switch r.IntN(8) {
			case 0: // many frames by one mark, of which there may be whole chunks
				j := min(i+writers*r.IntN(4), len(frames)-1)
				b.inSection(func() {
					b.MarkRange(gfns(frames[i], frames[j]+1))
					for ; i <= j; i += writers {
						b.mem[i].Store(stamp)
					}
				})
			case 1:
				if n > 0 {
					b.store(i, stamp)
					break
				}
				guest.Lock()
				guest.dirty.Add(frames[i])
				b.mem[i].Store(stamp)
				guest.Unlock()
			default:
				b.store(i, stamp)
			}
		})
	}
	getAndMerge := func() {
		guest.Lock()
		got := guest.dirty.Clone()
		guest.dirty.Clear()
		guest.Unlock()
		b.Merge(got)
	}
	if discards {
		work(10, func(r *rand.Rand, _ uint64) {
			i := r.IntN(len(frames))
			b.discard(i, min(i+r.IntN(6), len(frames)-1))
		})
	}
	work(11, func(*rand.Rand, uint64) {
		b.Peek()
		if err := b.Check(); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Millisecond)
	})

	compare := func() error {
		world.Lock()
		defer world.Unlock()
		getAndMerge()
		return b.settle()
	}

	r := random(12)
	before := make([]uint64, len(frames))
	commits, stops := 0, 0
	for start := time.Now(); time.Since(start) < length; {
		if r.IntN(8) == 0 {
			stops++
			if err := compare(); err != nil {
				t.Fatal(err)
			}
		}
		for i := range b.mem {
			before[i] = b.mem[i].Load()
		}
		getAndMerge()
		saved := slices.Clone(b.copy)
		h := begin(t, b.Log)
		b.apply(h)
		if r.IntN(3) == 0 {
			if r.IntN(2) == 0 {
				b.copy = saved // it failed before a page was copied
			}
			if err := h.Abort(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := h.Commit(); err != nil {
			t.Fatal(err)
		}
		commits++
		for i, gfn := range frames {
			if !discards && b.copy[i] < before[i] {
				t.Fatalf("%v held %d before Begin, and its copy is %d after Commit", gfn, before[i], b.copy[i])
			}
		}
	}
	t.Logf("%d commits, stopped %d times", commits, stops)
}
