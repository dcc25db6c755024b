package srcu

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestSynchronizeWaitsForOpenSections(t *testing.T) {
	var d Domain
	// Two generations of sections, so that both ranks hold a reader.
	first := d.ReadLock()
	d.idx.Add(1)
	second := d.ReadLock()
	if first == second {
		t.Fatalf("both sections are in rank %d", first)
	}

	done := make(chan struct{})
	go func() { d.Synchronize(); close(done) }()
	for _, idx := range []int{first, second} {
		select {
		case <-done:
			t.Fatalf("Synchronize returned with the section of rank %d open", idx)
		case <-time.After(20 * time.Millisecond):
		}
		d.ReadUnlock(idx)
	}
	<-done
}

func TestSynchronizeDoesNotWaitForLaterSections(t *testing.T) {
	var d Domain
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			// Sections that overlap for ever: at no instant is the domain idle.
			idx := d.ReadLock()
			for {
				select {
				case <-stop:
					d.ReadUnlock(idx)
					return
				default:
					next := d.ReadLock()
					d.ReadUnlock(idx)
					idx = next
					runtime.Gosched()
				}
			}
		})
	}
	for range 100 {
		d.Synchronize()
	}
	close(stop)
	readers.Wait()
}

// TestReclamation has readers follow a pointer that an updater replaces. What
// the updater poisons after a grace period must not be in any reader's hands.
func TestReclamation(t *testing.T) {
	var d Domain
	type object struct{ poisoned atomic.Bool }
	var current atomic.Pointer[object]
	current.Store(new(object))

	var stop atomic.Bool
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for !stop.Load() {
				idx := d.ReadLock()
				o := current.Load()
				for range 4 {
					runtime.Gosched() // a reader may lose its processor inside a section
					if o.poisoned.Load() {
						t.Error("a reader holds an object that was reclaimed")
						stop.Store(true)
					}
				}
				d.ReadUnlock(idx)
			}
		})
	}
	for range 1000 {
		old := current.Swap(new(object))
		d.Synchronize()
		old.poisoned.Store(true)
	}
	stop.Store(true)
	readers.Wait()
}

func TestReadSectionDoesNotAllocate(t *testing.T) {
	if debug {
		return // a debug build records every section
	}
	d := New()
	r := d.NewReader()
	defer r.Close()
	var zero Domain
	for name, section := range map[string]func(){
		"domain":      func() { d.ReadUnlock(d.ReadLock()) },
		"zero domain": func() { zero.ReadUnlock(zero.ReadLock()) },
		"handed over": func() { d.UpRead(d.DownRead()) },
		"reader":      func() { r.ReadUnlock(r.ReadLock()) },
	} {
		if n := testing.AllocsPerRun(1000, section); n != 0 {
			t.Errorf("a section of a %s allocates %v times, want 0", name, n)
		}
	}
}
