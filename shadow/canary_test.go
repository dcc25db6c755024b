package shadow_test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/internal/hostmem"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
)

type noBackend struct{}

func (noBackend) Hold()                                    {}
func (noBackend) Release()                                 {}
func (noBackend) CreateSlot(shadow.Slot) error             { return nil }
func (noBackend) DeleteSlot(shadow.Slot) error             { return nil }
func (noBackend) ChangeSlot(_, _ shadow.Slot) error        { return nil }
func (noBackend) DirtyLog([]shadow.Slot, *dirty.Set) error { return errors.ErrUnsupported }

const (
	words  = addr.PageSize / 8
	canary = 0xca_ca_ca_ca_ca_ca_ca_ca
)

// canaryHits takes pages of real memory away under threads that read and write them,
// puts a page of canaries in the place of each, and returns how many accesses met
// one. It stops at the first few.
func canaryHits(t *testing.T, broken bool, length time.Duration) (hits, rounds int) {
	t.Helper()
	memory := mm.New(nil)
	region, err := memory.NewRegion(mm.RegionConfig{Name: "ram", Size: 8 * addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	tracker := shadow.NewTracker(memory, noBackend{}, 64, nil)
	if broken {
		shadow.WithoutGracePeriods(tracker)
	}
	as := memory.AddressSpace()
	if err := as.Register(context.Background(), tracker); err != nil {
		t.Fatal(err)
	}
	as.RLock()
	err = tracker.AddWindow(shadow.Window{Name: "ram", NPages: 8, HVA: region.Range.Start})
	as.RUnlock()
	if err != nil {
		t.Fatal(err)
	}

	var stop atomic.Bool
	var met atomic.Int64
	var users sync.WaitGroup
	for n := range 3 {
		view := tracker.Table().NewView(t.Context())
		users.Go(func() {
			defer view.Close()
			buf := make([]byte, addr.PageSize)
			for i := n; !stop.Load(); i++ {
				gpa := addr.GPA(i%8) << addr.PageShift
				var err error
				switch i % 4 {
				case 0:
					err = view.Use(gpa, 8, addr.ReadWrite, func(word []byte) error {
						for range i % 3 {
							runtime.Gosched()
						}
						if word[0] == canary&0xff {
							met.Add(1)
						}
						word[1] = byte(i)
						return nil
					})
				case 1:
					err = view.Store64(gpa+8, uint64(i))
				case 2:
					var v uint64
					if v, err = view.Load64(gpa + 16); v == canary {
						met.Add(1)
					}
				case 3:
					if _, err = view.ReadAt(buf, int64(gpa)); err == nil && buf[len(buf)-1] == canary&0xff {
						met.Add(1)
					}
				}
				if err != nil && !errors.Is(err, syscall.EFAULT) {
					t.Error(err)
				}
			}
		})
	}
	for begin := time.Now(); time.Since(begin) < length && hits == 0; rounds++ {
		page := addr.HVAs(region.Range.Start+addr.HVA(rounds%8)<<addr.PageShift, addr.PageSize)
		if err := memory.Unmap(page); err != nil {
			t.Error(err)
		}
		// The range is reserved, so this takes nothing else's place.
		if err := mapCanary(page); err != nil {
			t.Fatal(err)
		}
		for at := range words {
			if err := hostmem.Store64(page.Start+addr.HVA(8*at), canary); err != nil {
				t.Fatal(err)
			}
		}
		for range rounds % 16 {
			runtime.Gosched()
		}
		for at := range words {
			if v, err := hostmem.Load64(page.Start + addr.HVA(8*at)); err != nil || v != canary {
				met.Add(1) // somebody has written there
			}
		}
		if err := memory.Map(page); err != nil {
			t.Error(err)
		}
		hits = int(met.Load())
	}
	stop.Store(true)
	users.Wait()
	if err := tracker.Check(); err != nil {
		t.Error(err)
	}
	if err := memory.Close(); err != nil {
		t.Error(err)
	}
	tracker.Unregister()
	return hits, rounds
}

func mapCanary(page addr.HVARange) error {
	const flags = unix.MAP_ANON | unix.MAP_PRIVATE | unix.MAP_FIXED
	_, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(page.Start), addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, flags, ^uintptr(0), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// TestCanary: once the start of an invalidation has returned nobody uses the page. It
// sees it when somebody does: with brackets that do not wait for users some are
// met.
func TestCanary(t *testing.T) {
	hits, rounds := canaryHits(t, false, 300*time.Millisecond)
	if hits != 0 {
		t.Errorf("after %d pages were taken away %d accesses have met what is there now", rounds, hits)
	}
	t.Logf("%d pages were taken away, none was used afterwards", rounds)
	hits, rounds = canaryHits(t, true, 20*time.Second)
	if hits == 0 {
		t.Errorf("no access was met in %d rounds although nobody waited: this test sees nothing", rounds)
	}
	t.Logf("without grace periods %d accesses were met after %d pages", hits, rounds)
}
