package boot

import (
	"encoding/binary"
	"errors"

	"github.com/secondmmu/gvm/addr"
)

// The note that names the entry, by Xen's name and a number.
const (
	noteName  = "Xen\x00"
	noteEntry = 18

	startMagic = 0x336ec578 // begins the start information
	startLen   = 56
)

// pvhEntry returns the entry that a note names.
func (b *builder) pvhEntry(e elfFile) (entry uint64, err error) {
	found := false
	err = b.segments(e, segmentNote, func(s elfSegment) error {
		f, end := b.file, s.offset+s.filesz
		for at := s.offset; at+12 <= end && !found; {
			namesz, descsz, kind := uint64(f.u32(at)), uint64(f.u32(at+4)), f.u32(at+8)
			name := at + 12
			desc := name + (namesz+3)&^3
			next := desc + (descsz+3)&^3
			if name+namesz > end || desc+descsz > end {
				return b.bad("n_descsz", int64(at), "a note of 0x%x and 0x%x bytes does not end in its segment", namesz, descsz)
			}
			if kind == noteEntry && string(f[name:name+namesz]) == noteName {
				return b.noteValue(desc, descsz, &entry, &found)
			}
			at = next
		}
		return nil
	})
	if err == nil && !found {
		err = b.bad("notes", -1, "%w", errNoNote)
	}
	return entry, err
}

// noteValue reads the number that a note is about.
func (b *builder) noteValue(at, size uint64, value *uint64, found *bool) error {
	switch size {
	case 4:
		*value = uint64(b.file.u32(at))
	case 8:
		*value = b.file.u64(at)
	default:
		return b.bad("entry note", int64(at), "an entry of %d bytes is neither of 4 nor of 8", size)
	}
	if *found = true; *value >= 1<<32 {
		return b.bad("entry note", int64(at), "the entry 0x%x is not in the first 4 GiB", *value)
	}
	return nil
}

// errNoNote is what is wrong with an ELF file that is to be started by PVH and cannot be.
var errNoNote = errors.New("there is no note of Xen's that names a 32-bit entry")

// hasPVHNote reports whether an ELF file is to be started by PVH.
func hasPVHNote(b *builder) bool {
	e, err := b.elf()
	if err != nil {
		return false
	}
	_, err = b.pvhEntry(e)
	return err == nil
}

// loadPVH runs an ELF file from the 32-bit entry that its note names.
func loadPVH(b *builder) error {
	e, err := b.elf()
	if err != nil {
		return err
	}
	entry, err := b.pvhEntry(e)
	if err != nil {
		return err
	}
	if b.o.Mode != Default {
		return b.refuse("it begins in mode %v, not %v", Protected, b.o.Mode)
	}
	if entry, err = b.loadSegments(e, entry); err != nil {
		return err
	}
	start, err := b.startInfo()
	if err != nil {
		return err
	}
	b.plan.CPU = CPU{Mode: Protected, Entry: entry, BX: uint64(start), SP: uint64(StackTop)}
	return b.begin()
}

// startInfo places what PVH tells an image: struct hvm_start_info of version 1, with the
// list of modules, the memory map and the command line.
func (b *builder) startInfo() (at addr.GPA, err error) {
	data := make([]byte, startLen)
	if at, err = b.structure("start information", data); err != nil {
		return 0, err
	}
	cmdline, err := b.text("the command line", b.o.CmdLine)
	if err != nil {
		return 0, err
	}
	var memory []byte
	for _, m := range b.o.Layout.Map() {
		memory = quads(memory, uint64(m.Start), uint64(m.End-m.Start), uint64(m.Kind))
	}
	memoryAt, err := b.structure("memory map", memory)
	if err != nil {
		return 0, err
	}
	list, err := b.modules(PCIHole)
	if err != nil {
		return 0, err
	}
	var modules []byte
	for i, gpa := range list {
		name, err := b.text("a module's name", b.o.Modules[i].Name)
		if err != nil {
			return 0, err
		}
		modules = quads(modules, uint64(gpa), uint64(len(b.o.Modules[i].Data)), uint64(name), 0)
	}
	var modulesAt addr.GPA
	if len(list) > 0 {
		if modulesAt, err = b.structure("list of modules", modules); err != nil {
			return 0, err
		}
	}
	le := binary.LittleEndian
	le.PutUint32(data[0:], startMagic)
	le.PutUint32(data[4:], 1) // the version that has a memory map
	le.PutUint32(data[12:], uint32(len(list)))
	le.PutUint64(data[16:], uint64(modulesAt))
	le.PutUint64(data[24:], uint64(cmdline))
	le.PutUint64(data[32:], uint64(rsdpAt))
	le.PutUint64(data[40:], uint64(memoryAt))
	le.PutUint32(data[48:], uint32(len(memory)/24))
	return at, nil
}
