package hostops

import (
	"context"
	"errors"
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
)

// restore gives back what is missing: the end of the file, pages that are not mapped, that
// are guarded or protected, or that are elsewhere. What is left over in the spare region
// goes. It goes on after an error, and returns all.
func (h *host) restore(ctx context.Context) error {
	var errs []error
	if h.end < h.pages() {
		errs = append(errs, h.truncate(h.pages()))
	}
	ps, err := h.pieces(Range{0, h.pages()})
	errs = append(errs, err)
	for _, p := range ps {
		for _, x := range h.Memory.Extents(p.hvas) {
			if err := ctx.Err(); err != nil {
				return errors.Join(append(errs, fmt.Errorf("give back %v: %w", x.Range, err))...)
			}
			part := p.cut(x.Range)
			if !x.Mapped {
				errs = append(errs, h.mapHome(part))
				continue
			}
			errs = append(errs, h.allow(x.Range), h.moveHome(part))
		}
	}
	if h.Spare != nil {
		for _, x := range h.Memory.Extents(h.Spare.Range) {
			if x.Mapped {
				errs = append(errs, h.Memory.Unmap(x.Range))
			}
		}
	}
	return errors.Join(errs...)
}

// allow makes r, which is mapped, readable and writable.
func (h *host) allow(r addr.HVARange) error {
	var errs []error
	for _, x := range h.Memory.Extents(r) {
		if x.Why != nil && x.Why.Op == mm.OpGuard {
			errs = append(errs, h.Memory.Unguard(x.Range))
		}
	}
	for _, x := range h.Memory.Extents(r) {
		if x.Access != addr.ReadWrite {
			errs = append(errs, h.Memory.Protect(x.Range, addr.ReadWrite))
		}
	}
	return errors.Join(errs...)
}
