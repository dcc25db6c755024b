//go:build !gvm_debug

package gvmtest

// Debug says that the tests run in a debug build.
const Debug = false
