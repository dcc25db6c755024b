//go:build !linux || !amd64 || race || srcu_fenced

package srcu

import "sync/atomic"

const asymmetric = false

func membarrier() {}

// inc adds 1 to a counter. The addition is sequentially consistent: it is
// ordered before the loads of the section that it opens, and after those of the
// section that it closes.
func inc(counter *uint64) { atomic.AddUint64(counter, 1) }
