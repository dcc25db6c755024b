package vm

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/guests"
)

// stamping returns a machine whose guest writes to a few of many pages, started.
func stamping(t *testing.T, ramPages uint64) *Machine {
	t.Helper()
	m := newMachine(t, Config{RAM: ramPages * addr.PageSize}, "stamp", guests.Args{"pages": 8})
	if err := m.LogDirty(true); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(testContext(t))
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if _, err := m.Wait(); !errors.Is(err, context.Canceled) {
			t.Errorf("the run ended with %v", err)
		}
	})
	return m
}

// awaitProgress returns when the guest has got on.
func awaitProgress(t *testing.T, m *Machine) {
	t.Helper()
	before, err := m.Result(0, 0)
	for now := before; err == nil && now == before; now, err = m.Result(0, 0) {
		time.Sleep(100 * time.Microsecond)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestCheckpoint: of a large memory that is all dirty little is left for the pause.
func TestCheckpoint(t *testing.T) {
	const pages, rest = 16384, 64
	m := stamping(t, pages)
	awaitProgress(t, m)
	for page := range uint64(pages) {
		if err := m.Store64(gpaOf(page)+8, 1); err != nil {
			t.Fatal(err)
		}
	}
	var running, paused []uint64
	quiet := false
	c, err := m.Checkpoint(testContext(t), CheckpointConfig{
		Rest: rest,
		Save: func(h *dirty.Harvest, isPaused bool) error {
			if n := h.Dirty().Len(); isPaused {
				paused = append(paused, n)
				before, _ := m.Result(0, 0)
				time.Sleep(2 * time.Millisecond)
				if after, err := m.Result(0, 0); err != nil || after != before {
					t.Errorf("the guest got on from %d to %d in the pause, %v", before, after, err)
				}
			} else {
				running = append(running, n)
			}
			if quiet != isPaused {
				t.Errorf("with the guest paused: %v, all else is quiet: %v", isPaused, quiet)
			}
			return nil
		},
		Quiesce: func() { quiet = true },
		Resume:  func() { quiet = false },
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(running) != c.Rounds || running[0] < pages || len(paused) != 1 || paused[0] != c.Last || c.Last > rest || quiet {
		t.Errorf("of %d dirty pages harvests had %v while the guest ran and %v in the pause; %+v", pages, running, paused, c)
	}
	if c.Cost <= 0 || c.Pause < 2*time.Millisecond {
		t.Errorf("the checkpoint took no time: %+v", c)
	}
	awaitProgress(t, m)
}

// TestCheckpointFails: what was in a harvest that could not be saved is in the next one,
// and the guest goes on.
func TestCheckpointFails(t *testing.T) {
	m := stamping(t, 16)
	broken := errors.New("the disk is full")
	for _, inPause := range []bool{false, true} {
		if err := m.Store64(gpaOf(12), 1); err != nil { // the guest does not write there
			t.Fatal(err)
		}
		_, err := m.Checkpoint(testContext(t), CheckpointConfig{Save: func(h *dirty.Harvest, paused bool) error {
			if paused == inPause {
				return broken
			}
			return nil
		}})
		if !errors.Is(err, broken) {
			t.Errorf("a save that fails: %v", err)
		}
		awaitProgress(t, m)
		had := false
		if _, err := m.Checkpoint(testContext(t), CheckpointConfig{Save: func(h *dirty.Harvest, _ bool) error {
			had = had || h.Dirty().Contains(gpaOf(12).GFN())
			return nil
		}}); err != nil {
			t.Fatal(err)
		}
		if had == inPause { // it was saved while the guest ran
			t.Errorf("a save failed in the pause: %v; and page 12 is in the next checkpoint: %v", inPause, had)
		}
	}
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	if _, err := m.Checkpoint(ctx, CheckpointConfig{Save: func(*dirty.Harvest, bool) error { return nil }}); !errors.Is(err, unix.EINTR) && err != nil {
		t.Errorf("with a context that is done: %v", err)
	}
	awaitProgress(t, m)
}
