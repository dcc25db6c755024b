package hostops

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
)

// host carries operations out. One goroutine at a time uses it.
type host struct {
	Target
	spare spare
	end   uint64 // pages of RAM that its file, if it has one, is long enough for
}

func newHost(t Target) *host { return &host{Target: t, spare: newSpare(&t), end: t.pages()} }

// do carries o out on the pages of r, which are what o.Pages means now. It blocks as the
// operations of mm.Memory do.
func (h *host) do(o Op, r Range) error {
	m := h.Memory
	switch o.Kind {
	case Map:
		return h.each(r, h.mapHome)
	case Remap:
		if o.Back {
			return h.each(r, h.moveHome)
		}
		return h.each(r, h.moveAway)
	case Truncate:
		return h.truncate(o.left(h.pages()))
	case Store:
		return h.store(r, o.Offset, o.Value)
	case Fill:
		return h.fill(r, byte(o.Value))
	}
	op, ok := map[Kind]func(addr.HVARange) error{
		Unmap:       m.Unmap,
		Protect:     func(s addr.HVARange) error { return m.Protect(s, o.Access) },
		Discard:     m.Discard,
		Punch:       m.Punch,
		RemapKeep:   h.leave,
		Free:        m.Free,
		Remove:      m.Remove,
		Populate:    func(s addr.HVARange) error { return m.Populate(s, o.Access == addr.ReadWrite) },
		PageOut:     m.PageOut,
		Collapse:    m.Collapse,
		Mergeable:   m.Mergeable,
		Unmergeable: m.Unmergeable,
		Guard:       m.Guard,
		Unguard:     m.Unguard,
	}[o.Kind]
	if !ok {
		return fmt.Errorf("there is no operation %q: %w", o.Kind, unix.EINVAL)
	}
	return h.each(r, func(p piece) error { return op(p.hvas) })
}

// each calls do for each piece of r, up to the first error.
func (h *host) each(r Range, do func(piece) error) error {
	ps, err := h.pieces(r)
	if err != nil {
		return err
	}
	for _, p := range ps {
		if err := do(p); err != nil {
			return err
		}
	}
	return nil
}

// concerns returns the pages that o is about if its Pages mean r: for a truncate, those
// that it makes go or come.
func (h *host) concerns(o Op, r Range) Range {
	switch o.Kind {
	case Truncate:
		left := o.left(h.pages())
		return Range{min(left, h.end), max(left, h.end)}
	case Store:
		return Range{r.Start, min(r.End, r.Start+1)}
	}
	return r
}

// truncate ends the file of RAM where its page n would begin.
func (h *host) truncate(n uint64) error {
	err := h.Memory.Truncate(h.RAM, uint64(h.RAM.Offset)+n<<addr.PageShift)
	if made(err) {
		h.end = n
	}
	return err
}

func (h *host) store(r Range, offset, value uint64) error {
	if r.Len() == 0 {
		return nil
	}
	return h.Store64(r.Start, offset, value)
}

func (h *host) fill(r Range, b byte) error {
	p := bytes.Repeat([]byte{b}, addr.PageSize)
	for page := r.Start; page < r.End; page++ {
		if err := h.Write(page, 0, p); err != nil {
			return err
		}
	}
	return nil
}

// mapHome maps the pages of p as at first, where they were at first. Memory that is mapped
// in the spare region would be of another file, and might come to be shown twice.
func (h *host) mapHome(p piece) error {
	if h.inSpare(p.hvas) {
		// Only pages that are mapped can be moved.
		if err := h.Memory.Map(p.hvas); err != nil {
			return err
		}
		if err := h.moveHome(p); err != nil {
			return err
		}
	}
	return h.Memory.Map(h.home(p.pages))
}

// moveHome moves the pages of p from the spare region to where they were at first.
func (h *host) moveHome(p piece) error {
	if !h.inSpare(p.hvas) {
		return nil
	}
	return inParts(p.hvas, h.home(p.pages).Start, h.remap)
}

// moveAway moves the pages of p to the spare region, unless they are there.
func (h *host) moveAway(p piece) error {
	if h.inSpare(p.hvas) {
		return nil
	}
	to, err := h.spare.find(p.hvas.Bytes())
	if err != nil {
		return err
	}
	return inParts(p.hvas, to.Start, h.remap)
}

func (h *host) remap(from addr.HVARange, to addr.HVA) error {
	err := h.Memory.Remap(from, to)
	if made(err) {
		h.spare.set(from, false)
		h.spare.set(addr.HVAs(to, from.Bytes()), true)
	}
	return err
}

// leave moves what r has to the spare region, where it is nobody's.
func (h *host) leave(r addr.HVARange) error {
	to, err := h.spare.find(r.Bytes())
	if err != nil {
		return err
	}
	return inParts(r, to.Start, h.Memory.RemapKeep)
}

// inParts moves pages to the address to, in as few steps as the kernel takes. EFAULT says
// that it has several mappings there, as when some of the pages are mergeable or have been
// elsewhere, and moves only one at a time.
func inParts(from addr.HVARange, to addr.HVA, move func(addr.HVARange, addr.HVA) error) error {
	err := move(from, to)
	if made(err) || !errors.Is(err, unix.EFAULT) || from.NPages() == 1 {
		return err
	}
	half := addr.HVA(from.NPages() / 2 << addr.PageShift)
	if err := inParts(addr.HVARange{Start: from.Start, End: from.Start + half}, to, move); err != nil {
		return err
	}
	return inParts(addr.HVARange{Start: from.Start + half, End: from.End}, to+half, move)
}

// made reports whether the operation that returned err has changed the mappings.
func made(err error) bool {
	var failed *mm.Error
	return err == nil || errors.As(err, &failed) && failed.Made
}
