package doctext

import "testing"

func TestAfter(t *testing.T) {
	const source = "// Package p has a language.\n//\n// # Not this\n//\n// No.\n//\n// # Words\n//\n// A word is of [mm.Memory]:\n//\n//\tword = letter .\n//\n// # More\npackage p\n"
	const want = "A word is of mm.Memory:\n\n    word = letter .\n\n# More\n"
	if got := After(source, "Words"); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := After(source, "None"); got != "" {
		t.Errorf("after a heading that there is not: %q", got)
	}
}
