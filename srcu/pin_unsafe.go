package srcu

import _ "unsafe" // for go:linkname

// procPin keeps the goroutine on its P, and that P's number to itself, until
// procUnpin: it can neither be preempted nor moved. The runtime keeps both for
// packages like this one.
//
//go:linkname procPin runtime.procPin
func procPin() int

//go:linkname procUnpin runtime.procUnpin
func procUnpin()
