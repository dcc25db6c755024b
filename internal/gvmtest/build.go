package gvmtest

import (
	"flag"
	"testing"
	"time"
)

// OtherBuild skips a test that is not for the race detector or for a debug build, and
// says why. In any other build it fails the test: there it is for.
func OtherBuild(t testing.TB, why string) {
	t.Helper()
	if !Race && !Debug {
		t.Fatalf("not for this build, it is said, and this is the plain one: %s", why)
	}
	t.Skipf("not for this build: %s", why)
}

var storm = flag.Duration("storm", 0, "how long each storm lasts; 0: not long")

// StormLasts returns how long a storm lasts, a test that does much at random at once: as
// long as -storm says, or else d, and less with -short and in a debug build.
func StormLasts(d time.Duration) time.Duration {
	switch {
	case *storm > 0:
		return *storm
	case testing.Short() || Debug:
		return d / 4
	}
	return d
}
