//go:build !race

package gvmtest

// Race says that the tests run under the race detector.
const Race = false
