//go:build gvm_debug

package srcu

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"

	"github.com/secondmmu/gvm/internal/goid"
)

const debug = true

// section is an open section. In a debug build tokens are unique: the number
// of a section above the bit that is its rank.
type section struct {
	d         *Domain
	goroutine uint64 // 0: it may be closed by any
	where     string // file and line of the call that opened it
}

var sections struct {
	mu   sync.Mutex
	open map[int]section
	last int
}

// opened records a section of rank idx and returns its token.
func (d *Domain) opened(idx int, owned bool) int {
	s := section{d: d, where: caller(3)}
	if owned {
		s.goroutine = goid.Get()
	}
	sections.mu.Lock()
	defer sections.mu.Unlock()
	if sections.open == nil {
		sections.open = make(map[int]section)
	}
	sections.last++
	token := sections.last<<1 | idx
	sections.open[token] = s
	return token
}

// closed forgets a section and returns its rank.
func (d *Domain) closed(token int) int {
	sections.mu.Lock()
	defer sections.mu.Unlock()
	s, ok := sections.open[token]
	if !ok || s.d != d {
		panic(fmt.Sprintf("srcu: ReadUnlock at %s with the token %d, whose section is closed already or of another domain", caller(3), token))
	}
	if s.goroutine != 0 && s.goroutine != goid.Get() {
		panic(fmt.Sprintf("srcu: ReadUnlock at %s of a section that another goroutine opened at %s; DownRead and UpRead are for that", caller(3), s.where))
	}
	delete(sections.open, token)
	return token & 1
}

// notInside panics if the goroutine is inside a section of d.
func (d *Domain) notInside(what string) {
	self := goid.Get()
	sections.mu.Lock()
	defer sections.mu.Unlock()
	for _, s := range sections.open {
		if s.d == d && s.goroutine == self {
			panic(fmt.Sprintf("srcu: %s waits for the section that its own goroutine opened at %s", what, s.where))
		}
	}
}

// openedAt returns where the open sections of rank i were opened, in order.
func (d *Domain) openedAt(i uint64) (places []string) {
	sections.mu.Lock()
	defer sections.mu.Unlock()
	for _, token := range slices.Sorted(maps.Keys(sections.open)) {
		if s := sections.open[token]; s.d == d && uint64(token&1) == i {
			places = append(places, s.where)
		}
	}
	return places
}

func caller(skip int) string {
	_, file, line, _ := runtime.Caller(skip)
	return fmt.Sprintf("%s:%d", file, line)
}
