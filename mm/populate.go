package mm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// populate maps all pages of r, as loads or stores to them would. It is tried again
// where a signal came in between.
func populate(r addr.HVARange, write bool) error {
	advice, name := unix.MADV_POPULATE_READ, "MADV_POPULATE_READ"
	if write {
		advice, name = unix.MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE"
	}
	for {
		err := madvise(r, advice)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		}
		return fmt.Errorf("%s of %v: %w", name, r, err)
	}
}
