package dirty

import (
	"flag"
	"math/rand/v2"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

var seedFlag = flag.Uint64("seed", 0, "seed of the random tests; 0: a new one each time")

// seeded returns a source of random numbers, and the seed, which it logs.
func seeded(t testing.TB) (*rand.Rand, uint64) {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0)), seed
}

// gfns returns the frames [start, end).
func gfns(start, end addr.GFN) addr.GFNRange { return addr.GFNRange{Start: start, End: end} }

// setOf returns a set of ranges.
func setOf(ranges ...addr.GFNRange) *Set {
	s := new(Set)
	for _, r := range ranges {
		s.AddRange(r)
	}
	return s
}

// panics returns what f panics with, or nil.
func panics(f func()) (value any) {
	defer func() { value = recover() }()
	f()
	return nil
}
