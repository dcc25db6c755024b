//go:build !gvm_debug

package lockorder

// Enabled says that the order is checked.
const Enabled = false

// Acquire is called before a lock of class c is taken. It panics if the
// goroutine holds one of c or of a later class; of c itself it may hold some if
// c nests.
func Acquire(c Class) {}

// Release is called after a lock of class c was given back, by the goroutine
// that took it.
func Release(c Class) {}

// Wait is called before the goroutine waits for whoever holds locks of class c.
// It panics if the goroutine itself holds one of c or of a later class.
func Wait(c Class) {}

// Covered is called where a lock must be held under which an invalidation may
// run. It panics if the goroutine holds neither a mapping lock nor that of a
// reverse map.
func Covered() {}
