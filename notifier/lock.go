package notifier

import (
	"context"
	"math"

	"golang.org/x/sync/semaphore"

	"github.com/secondmmu/gvm/internal/lockorder"
)

// rwLock is a readers-writer lock that can be waited for with a context, which
// sync.RWMutex cannot. It is fair: a writer that waits holds up readers that
// come later. So no goroutine may take it for reading twice.
type rwLock struct {
	sem   *semaphore.Weighted
	class lockorder.Class
}

// everybody is the weight of a writer: that of more readers than there can be.
const everybody = math.MaxInt64

func newRWLock(class lockorder.Class) rwLock {
	return rwLock{semaphore.NewWeighted(everybody), class}
}

func (l rwLock) acquire(ctx context.Context, weight int64) error {
	lockorder.Acquire(l.class)
	err := l.sem.Acquire(ctx, weight)
	if err != nil {
		lockorder.Release(l.class)
	}
	return err
}

func (l rwLock) release(weight int64) {
	l.sem.Release(weight)
	lockorder.Release(l.class)
}

func (l rwLock) lock(ctx context.Context) error  { return l.acquire(ctx, everybody) }
func (l rwLock) rlock(ctx context.Context) error { return l.acquire(ctx, 1) }
func (l rwLock) unlock()                         { l.release(everybody) }
func (l rwLock) runlock()                        { l.release(1) }
