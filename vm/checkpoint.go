package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/secondmmu/gvm/dirty"
)

// Checkpoint is how a checkpoint went.
type Checkpoint struct {
	Rounds int           `json:"rounds"` // harvests while the guest went on
	Pages  uint64        `json:"pages"`  // dirty in all of them, the last included
	Last   uint64        `json:"last"`   // dirty in the last, with the guest paused
	Cost   time.Duration `json:"cost"`   // of the harvests, without what Save took
	Pause  time.Duration `json:"pause"`  // of the guest, with what Save took
}

// maxRounds is how often a checkpoint looks whether there is less to save than before.
const maxRounds = 16

// CheckpointConfig is how a checkpoint is taken.
type CheckpointConfig struct {
	// Rest is how many dirty pages may be left for when the guest is paused.
	Rest uint64

	// Save brings the copy up to date. It reads dirty pages through the machine, and
	// takes discarded ones for zeros; it keeps neither the harvest nor its sets.
	Save func(h *dirty.Harvest, paused bool) error

	// Quiesce stops what else stores to the guest's memory or changes its mappings, before
	// the guest is paused, and Resume lets it go on. nil: there is nothing, or it does not
	// matter.
	Quiesce, Resume func()
}

// Checkpoint has a copy of the guest's memory brought up to date: the pre-copy of live
// migration. It calls Save with what has changed since the last harvest, first while
// vCPUs go on, again with what they have changed meanwhile, and so on as long as each
// harvest has fewer pages than the one before and more than Rest. Then it pauses the
// guest and calls Save once more: memory is after that what the copy has. So a large
// memory costs the guest no longer a pause than a small one.
//
// While the guest runs a page may be read in the middle of a store to it; it is then in
// the next harvest. When Save fails, or ctx is done, nothing is lost: what it was called
// with comes again with the next harvest.
//
// The caller must be able to Pause, and no harvest is open.
func (m *Machine) Checkpoint(ctx context.Context, config CheckpointConfig) (c Checkpoint, err error) {
	fail := func(err error) (Checkpoint, error) { return c, fmt.Errorf("checkpoint: %w", err) }
	for before := ^uint64(0); c.Rounds < maxRounds; {
		n, err := m.harvestTo(ctx, &c, func(h *dirty.Harvest) error { return config.Save(h, false) })
		if err != nil {
			return fail(err)
		}
		c.Rounds++
		if n <= config.Rest || n >= before {
			break
		}
		before = n
	}
	if config.Quiesce != nil {
		config.Quiesce()
		defer config.Resume()
	}
	begin := time.Now()
	m.Pause()
	defer m.Resume()
	c.Last, err = m.harvestTo(ctx, &c, func(h *dirty.Harvest) error { return config.Save(h, true) })
	c.Pause = time.Since(begin)
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// harvestTo commits a harvest if save returns no error, and returns how many pages it
// had.
func (m *Machine) harvestTo(ctx context.Context, c *Checkpoint, save func(h *dirty.Harvest) error) (pages uint64, err error) {
	begin := time.Now()
	h, err := m.Harvest(ctx)
	c.Cost += time.Since(begin)
	if err != nil {
		return 0, err
	}
	pages = h.Dirty().Len()
	if err := save(h); err != nil {
		return pages, errors.Join(err, h.Abort())
	}
	c.Pages += pages
	return pages, h.Commit()
}
