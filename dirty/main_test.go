package dirty

import (
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

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
