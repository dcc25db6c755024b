package srcu

import (
	"fmt"
	"sync"
	"testing"

	"github.com/puzpuzpuz/xsync/v4"
)

// BenchmarkReadSection times one empty read section, entered and left on every
// P at once: the time is per section and P if -cpu is 1, and shared by the Ps
// otherwise.
func BenchmarkReadSection(b *testing.B) {
	b.Run("impl=srcu", func(b *testing.B) {
		d := New()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				d.ReadUnlock(d.ReadLock())
			}
		})
	})
	b.Run("impl=srcu.Reader", func(b *testing.B) {
		d := New()
		b.RunParallel(func(pb *testing.PB) {
			r := d.NewReader()
			defer r.Close()
			for pb.Next() {
				r.ReadUnlock(r.ReadLock())
			}
		})
	})
	b.Run("impl=pins", func(b *testing.B) { // what the runtime takes of impl=srcu to pin a goroutine twice
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				procPin()
				procUnpin()
				procPin()
				procUnpin()
			}
		})
	})
	b.Run("impl=srcu.zero", func(b *testing.B) {
		var d Domain
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				d.ReadUnlock(d.ReadLock())
			}
		})
	})
	b.Run("impl=rwmutex", func(b *testing.B) {
		var mu sync.RWMutex
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				mu.RLock()
				mu.RUnlock() //lint:ignore SA2001 the empty section is what is measured
			}
		})
	})
	b.Run("impl=xsync.RBMutex", func(b *testing.B) {
		mu := xsync.NewRBMutex()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				mu.RUnlock(mu.RLock())
			}
		})
	})
}

// BenchmarkSynchronize times a grace period with nobody inside, by the number
// of readers that are registered, and with short sections going on all the time.
func BenchmarkSynchronize(b *testing.B) {
	for _, expedited := range []bool{false, true} {
		wait, name := (*Domain).Synchronize, "normal"
		if expedited {
			wait, name = (*Domain).SynchronizeExpedited, "expedited"
		}
		for _, readers := range []int{0, 1000} {
			b.Run(fmt.Sprintf("wait=%s/readers=%d", name, readers), func(b *testing.B) {
				d := New()
				for range readers {
					r := d.NewReader()
					defer r.Close()
				}
				for b.Loop() {
					wait(d)
				}
			})
		}
		b.Run(fmt.Sprintf("wait=%s/inside=1000", name), func(b *testing.B) {
			// A thousand goroutines are inside when it begins, and leave.
			d := New()
			for b.Loop() {
				b.StopTimer()
				var in, out sync.WaitGroup
				leave := make(chan struct{})
				for range 1000 {
					in.Add(1)
					out.Go(func() {
						idx := d.ReadLock()
						in.Done()
						<-leave
						d.ReadUnlock(idx)
					})
				}
				in.Wait()
				close(leave)
				b.StartTimer()
				wait(d)
				b.StopTimer()
				out.Wait()
				b.StartTimer()
			}
		})
	}
	b.Run("wait=rwmutex/readers=0", func(b *testing.B) {
		var mu sync.RWMutex
		for b.Loop() {
			mu.Lock()
			mu.Unlock() //lint:ignore SA2001 to have waited for readers is what is measured
		}
	})
}

// BenchmarkCall times a callback from its queueing to its run, next to handing
// the same object to a goroutine over a channel.
func BenchmarkCall(b *testing.B) {
	type object struct {
		Head
		_ [64]byte
	}
	b.Run("impl=srcu", func(b *testing.B) {
		d := New()
		objects := make([]object, 1<<16)
		b.ReportAllocs()
		n := 0
		for b.Loop() {
			if n%len(objects) == 0 {
				d.Barrier()
			}
			d.Call(&objects[n%len(objects)].Head, func(*Head) {})
			n++
		}
		d.Barrier()
	})
	b.Run("impl=channel", func(b *testing.B) {
		queue := make(chan *object, 1<<16)
		var done sync.WaitGroup
		done.Go(func() {
			for range queue {
			}
		})
		objects := make([]object, 1<<16)
		n := 0
		for b.Loop() {
			queue <- &objects[n%len(objects)]
			n++
		}
		close(queue)
		done.Wait()
	})
}

// BenchmarkPoll times the question whether a grace period has ended.
func BenchmarkPoll(b *testing.B) {
	d := New()
	c := d.StartPoll()
	for b.Loop() {
		d.Poll(c)
	}
	d.Barrier()
}
