package boot

import (
	"cmp"

	"github.com/secondmmu/gvm/addr"
)

// loadFlat puts all of the file to one place and runs it from its first byte.
func loadFlat(b *builder) error {
	mode := cmp.Or(b.o.Mode, Real)
	at := b.o.At
	if at == 0 {
		at = HighBase
		if mode == Real {
			at = 0x1000
		}
	}
	switch {
	case len(b.file) == 0:
		return b.bad("the file", -1, "it is empty")
	case len(b.o.Modules) != 0:
		return b.refuse("a flat image is given no modules")
	case mode == Real && at > 0xffff:
		return b.refuse("real mode does not begin at %v: it is above 0xffff", at)
	case mode == Protected && uint64(at) >= 1<<32:
		return b.refuse("32-bit code does not begin at %v", at)
	}
	if err := b.placeRAM(Segment{Name: "the image", GPA: at, Size: uint64(len(b.file)), Data: b.file}); err != nil {
		return b.refuse("%w", err)
	}
	b.plan.CPU = CPU{Mode: mode, Entry: uint64(at), SP: uint64(StackTop)}
	if mode == Real {
		b.plan.CPU.SP = uint64(at) &^ 1 // below the image
		if at < 0x400 {
			b.plan.CPU.SP = 0xfffe
		}
	}
	return b.begin()
}

// begin adds the tables that the processor's mode rests on.
func (b *builder) begin() error {
	if mode := b.plan.CPU.Mode; mode == Long || mode == User {
		if err := b.place(Segment{Name: "page tables", GPA: PageTables, Size: 6 * addr.PageSize, Data: pageTables()}); err != nil {
			return b.bad("page tables", -1, "%w", err)
		}
		if err := b.place(Segment{Name: "task state", GPA: TaskState, Size: addr.PageSize}); err != nil {
			return b.bad("task state", -1, "%w", err)
		}
	}
	if b.plan.CPU.Mode == Real {
		return nil
	}
	gdt := descriptors(b.plan.CPU.Mode)
	if err := b.place(Segment{Name: "descriptors", GPA: Descriptors, Size: uint64(len(gdt)), Data: gdt}); err != nil {
		return b.bad("descriptors", -1, "%w", err)
	}
	return nil
}

// pageTables maps the first 4 GiB at their own addresses by pages of 2 MiB that CPL 3
// may use too.
func pageTables() []byte {
	const (
		present = 1 << 0
		write   = 1 << 1
		user    = 1 << 2
		large   = 1 << 7
		all     = present | write | user
	)
	p := make([]byte, 0, 6*addr.PageSize)
	page := func(entries ...uint64) {
		p = append(quads(p, entries...), make([]byte, addr.PageSize-8*len(entries))...)
	}
	page(uint64(PageTables) + addr.PageSize | all)
	var directories, entries []uint64
	for i := range uint64(4) {
		directories = append(directories, uint64(PageTables)+(2+i)*addr.PageSize|all)
	}
	page(directories...)
	for i := range uint64(4 * 512) {
		entries = append(entries, i*addr.HugeSize|all|large)
	}
	return quads(p, entries...)
}

// GDTSize is the number of bytes at Descriptors, and CodeSelector and DataSelector are of
// segments in it.
const (
	GDTSize      = 4 * 8
	CodeSelector = 0x10
	DataSelector = 0x18
)

// descriptors returns the global descriptor table.
func descriptors(m Mode) []byte {
	const data = 0x00cf93000000ffff // 4 GiB, writable
	code := uint64(0x00cf9b000000ffff)
	if m == Long || m == User {
		code = 0x00af9b000000ffff
	}
	return quads(nil, 0, 0, code, data)
}
