package goid

import "testing"

func TestGet(t *testing.T) {
	self := Get()
	if again := Get(); again != self {
		t.Errorf("one goroutine has the numbers %d and %d", self, again)
	}
	other := make(chan uint64)
	go func() { other <- Get() }()
	if n := <-other; n == self {
		t.Errorf("two goroutines have the number %d", n)
	}
}
