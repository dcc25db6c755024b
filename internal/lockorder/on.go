//go:build gvm_debug

package lockorder

import (
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/secondmmu/gvm/internal/goid"
)

// Enabled says that the order is checked.
const Enabled = true

// held is a lock that a goroutine holds, and where it took it.
type held struct {
	class Class
	where string
}

var (
	mu         sync.Mutex
	goroutines = map[uint64][]held{}
)

// Acquire is called before a lock of class c is taken. It panics if the
// goroutine holds one of c or of a later class; of c itself it may hold some if
// c nests.
func Acquire(c Class) {
	self := goid.Get()
	mu.Lock()
	defer mu.Unlock()
	h := held{c, caller()}
	for _, o := range goroutines[self] {
		if o.class > c || o.class == c && !nests(c, self) {
			panic(fmt.Sprintf("lockorder: %v is taken at %s inside %v, which was taken at %s", c, h.where, o.class, o.where))
		}
	}
	goroutines[self] = append(goroutines[self], h)
}

func nests(c Class, self uint64) bool {
	switch c {
	case Section:
		return true
	case HugeMap, FileMap, AnonMap:
		return slices.ContainsFunc(goroutines[self], func(o held) bool { return o.class == AllLocks })
	}
	return false
}

// Release is called after a lock of class c was given back, by the goroutine
// that took it.
func Release(c Class) {
	self := goid.Get()
	mu.Lock()
	defer mu.Unlock()
	locks := goroutines[self]
	for i := len(locks) - 1; i >= 0; i-- {
		if locks[i].class == c {
			if locks = slices.Delete(locks, i, i+1); len(locks) == 0 {
				delete(goroutines, self)
			} else {
				goroutines[self] = locks
			}
			return
		}
	}
	panic(fmt.Sprintf("lockorder: %v is given back at %s by a goroutine that does not hold it", c, caller()))
}

// Wait is called before the goroutine waits for whoever holds locks of class c.
// It panics if the goroutine itself holds one of c or of a later class.
func Wait(c Class) {
	self := goid.Get()
	mu.Lock()
	defer mu.Unlock()
	for _, o := range goroutines[self] {
		if o.class >= c {
			panic(fmt.Sprintf("lockorder: at %s the goroutine waits for whoever holds %v, inside %v, which it took at %s", caller(), c, o.class, o.where))
		}
	}
}

// Covered is called where a lock must be held under which an invalidation may
// run. It panics if the goroutine holds neither a mapping lock nor that of a
// reverse map.
func Covered() {
	self := goid.Get()
	mu.Lock()
	defer mu.Unlock()
	if !slices.ContainsFunc(goroutines[self], func(o held) bool { return o.class != AllLocks && o.class <= AnonMap }) {
		panic("lockorder: an invalidation begins at " + caller() + " without the mapping lock and without a reverse map's")
	}
}

// caller returns where the function of this package was called that calls it,
// and from where that was called in turn: locks are taken in helpers.
func caller() string {
	var pcs [5]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs[:])])
	var b strings.Builder
	for more := true; more; {
		var f runtime.Frame
		f, more = frames.Next()
		if b.Len() > 0 {
			b.WriteString(" from ")
		}
		dir, file := filepath.Split(f.File)
		fmt.Fprintf(&b, "%s/%s:%d", filepath.Base(dir), file, f.Line)
	}
	return b.String()
}
