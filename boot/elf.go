package boot

import "github.com/secondmmu/gvm/addr"

// The parts of an ELF file that are looked at, as offsets.
const (
	elfClass   = 4
	elfData    = 5
	elfType    = 0x10
	elfMachine = 0x12
	elfEntry   = 0x18

	class32    = 1
	class64    = 2
	dataLittle = 1
	typeExec   = 2
	typeDyn    = 3
	machine386 = 3
	machineX64 = 62

	segmentLoad = 1
	segmentNote = 4

	// maxSegments bounds the program headers of a file; real ones have less than 20.
	maxSegments = 1024
)

func isELF(f file) bool { return f.has(0, 4) && string(f[:4]) == "\x7fELF" }

// elfFile is the header of an ELF file.
type elfFile struct {
	wide  bool
	entry uint64
	phoff uint64
	phlen uint64 // of one program header
	phnum uint64
}

// elfSegment is a program header.
type elfSegment struct {
	at                                        uint64 // of the header in the file
	kind                                      uint32
	offset, vaddr, paddr, filesz, memsz       uint64
	offsetAt, vaddrAt, paddrAt, fileAt, memAt uint64 // where the header has them
}

// elf reads the header.
func (b *builder) elf() (e elfFile, err error) {
	f := b.file
	if !isELF(f) {
		return e, b.bad("e_ident", 0, "it is not that of an ELF file")
	}
	size, phoffAt, phlenAt := uint64(0x34), uint64(0x1c), uint64(0x2a)
	switch f.u8(elfClass) {
	case class32:
	case class64:
		e.wide, size, phoffAt, phlenAt = true, 0x40, 0x20, 0x36
	default:
		return e, b.bad("EI_CLASS", elfClass, "%d is neither 32 nor 64 bits", f.u8(elfClass))
	}
	if !f.has(0, size) {
		return e, b.bad("e_ident", 0, "the file ends in the header: it has %d bytes", len(f))
	}
	machine := f.u16(elfMachine)
	switch {
	case f.u8(elfData) != dataLittle:
		return e, b.bad("EI_DATA", elfData, "%d is not little-endian", f.u8(elfData))
	case f.u16(elfType) != typeExec && f.u16(elfType) != typeDyn:
		return e, b.bad("e_type", elfType, "%d is not an executable", f.u16(elfType))
	case machine != machineX64 && (machine != machine386 || e.wide):
		return e, b.bad("e_machine", elfMachine, "%d is not x86", machine)
	}
	if e.wide {
		e.entry, e.phoff = f.u64(elfEntry), f.u64(phoffAt)
	} else {
		e.entry, e.phoff = uint64(f.u32(elfEntry)), uint64(f.u32(phoffAt))
	}
	e.phlen, e.phnum = uint64(f.u16(phlenAt)), uint64(f.u16(phlenAt+2))
	least := uint64(0x20)
	if e.wide {
		least = 0x38
	}
	switch {
	case e.phnum == 0:
		return e, b.bad("e_phnum", int64(phlenAt+2), "there is nothing to load")
	case e.phnum > maxSegments:
		return e, b.bad("e_phnum", int64(phlenAt+2), "%d program headers are more than %d", e.phnum, maxSegments)
	case e.phlen < least:
		return e, b.bad("e_phentsize", int64(phlenAt), "program headers of %d bytes are shorter than %d", e.phlen, least)
	case !f.has(e.phoff, e.phnum*e.phlen):
		return e, b.bad("e_phoff", int64(phoffAt), "%d program headers of %d bytes at 0x%x are not in the file", e.phnum, e.phlen, e.phoff)
	}
	return e, nil
}

// segments calls use with each program header of a kind, whose bytes are in the file.
func (b *builder) segments(e elfFile, kind uint32, use func(elfSegment) error) error {
	for i := range e.phnum {
		s := b.programHeader(e, i)
		if s.kind != kind {
			continue
		}
		if !b.file.has(s.offset, s.filesz) {
			return b.bad("p_filesz", int64(s.fileAt), "0x%x bytes at offset 0x%x are not in the file, which has 0x%x", s.filesz, s.offset, len(b.file))
		}
		if err := use(s); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) programHeader(e elfFile, i uint64) elfSegment {
	f, at := b.file, e.phoff+i*e.phlen
	s := elfSegment{at: at, kind: f.u32(at)}
	if e.wide {
		s.offsetAt, s.vaddrAt, s.paddrAt, s.fileAt, s.memAt = at+0x08, at+0x10, at+0x18, at+0x20, at+0x28
		s.offset, s.vaddr, s.paddr, s.filesz, s.memsz = f.u64(s.offsetAt), f.u64(s.vaddrAt), f.u64(s.paddrAt), f.u64(s.fileAt), f.u64(s.memAt)
		return s
	}
	u32 := func(offset uint64) uint64 { return uint64(f.u32(offset)) }
	s.offsetAt, s.vaddrAt, s.paddrAt, s.fileAt, s.memAt = at+0x04, at+0x08, at+0x0c, at+0x10, at+0x14
	s.offset, s.vaddr, s.paddr, s.filesz, s.memsz = u32(s.offsetAt), u32(s.vaddrAt), u32(s.paddrAt), u32(s.fileAt), u32(s.memAt)
	return s
}

// loadSegments places what an ELF file has at the physical addresses that it names, and
// returns the physical address of an entry that may be given by its virtual one.
func (b *builder) loadSegments(e elfFile, entry uint64) (physical uint64, err error) {
	loaded, byAddress, byVirtual := false, false, false
	err = b.segments(e, segmentLoad, func(s elfSegment) error {
		if s.memsz == 0 {
			return nil
		}
		if s.memsz < s.filesz {
			return b.bad("p_memsz", int64(s.memAt), "0x%x bytes of memory are less than the 0x%x of the file", s.memsz, s.filesz)
		}
		loaded = true
		seg := Segment{Name: "a segment", GPA: addr.GPA(s.paddr), Size: s.memsz, Data: b.file[s.offset : s.offset+s.filesz]}
		if err := b.placeRAM(seg); err != nil {
			return b.bad("p_paddr", int64(s.paddrAt), "%w", err)
		}
		if entry-s.paddr < s.filesz {
			byAddress = true
		}
		if n := entry - s.vaddr; n < s.filesz && !byVirtual {
			byVirtual, physical = true, s.paddr+n
		}
		return nil
	})
	switch {
	case err != nil:
		return 0, err
	case !loaded:
		return 0, b.bad("program headers", int64(e.phoff), "none says what to load")
	case byAddress:
		return entry, nil
	case byVirtual:
		return physical, nil
	}
	return 0, b.bad("e_entry", elfEntry, "0x%x is in no segment of the file", entry)
}

// loadELF runs an ELF file from its entry.
func loadELF(b *builder) error {
	e, err := b.elf()
	if err != nil {
		return err
	}
	entry, err := b.loadSegments(e, e.entry)
	if err != nil {
		return err
	}
	mode := Protected
	if e.wide {
		if mode = Long; b.o.Mode == User {
			mode = User
		}
	}
	switch {
	case b.o.Mode != Default && b.o.Mode != mode:
		return b.refuse("it begins in mode %v, not %v", mode, b.o.Mode)
	case entry >= 1<<32:
		return b.bad("e_entry", elfEntry, "0x%x is above the 4 GiB that are mapped in the beginning", entry)
	}
	start, err := b.startInfo()
	if err != nil {
		return err
	}
	b.plan.CPU = CPU{Mode: mode, Entry: entry, DI: uint64(start), BX: uint64(start), SP: uint64(StackTop)}
	return b.begin()
}
