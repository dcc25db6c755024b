package boot

import (
	"encoding/binary"

	"github.com/secondmmu/gvm/addr"
)

// The multiboot header, which is in the first bytes of a file, at a multiple of 4.
const (
	multibootMagic  = 0x1badb002
	multibootLoaded = 0x2badb002 // what eax says to the image
	multibootReach  = 8192
	multibootLen    = 12 // bytes of magic, flags and checksum

	needPageAlign = 1 << 0 // modules at pages: they are anyway
	needMemory    = 1 << 1
	needVideo     = 1 << 2 // a wish
	needUnknown   = 0xffff &^ (needPageAlign | needMemory | needVideo)
	hasAddresses  = 1 << 16 // fields say what to load; otherwise it is an ELF file

	// The information structure: what is in it, and how long it is.
	infoMemory  = 1 << 0
	infoCmdLine = 1 << 2
	infoModules = 1 << 3
	infoMap     = 1 << 6
	infoLoader  = 1 << 9
	infoLen     = 88
)

// multibootHeader returns the offset of the header, or -1.
func multibootHeader(f file) int64 {
	for at := uint64(0); at+multibootLen <= min(multibootReach, uint64(len(f))); at += 4 {
		if f.u32(at) == multibootMagic && multibootMagic+f.u32(at+4)+f.u32(at+8) == 0 {
			return int64(at)
		}
	}
	return -1
}

// loadMultiboot runs an image that has a multiboot header.
func loadMultiboot(b *builder) error {
	at := multibootHeader(b.file)
	if at < 0 {
		return b.bad("header", -1, "the first %d bytes have none: 0x%x, flags, and a checksum that makes the sum 0", multibootReach, multibootMagic)
	}
	flags := b.file.u32(uint64(at) + 4)
	switch {
	case flags&needUnknown != 0:
		return b.bad("flags", at+4, "0x%x needs what is not known: 0x%x", flags, flags&needUnknown)
	case b.o.Mode != Default:
		return b.refuse("it begins in mode %v, not %v", Protected, b.o.Mode)
	}
	var entry uint64
	var err error
	if flags&hasAddresses != 0 {
		entry, err = b.loadByAddresses(uint64(at))
	} else {
		var e elfFile
		if e, err = b.elf(); err != nil {
			return err
		}
		entry, err = b.loadSegments(e, e.entry)
	}
	if err != nil {
		return err
	}
	if entry >= 1<<32 {
		return b.bad("e_entry", elfEntry, "32-bit code does not begin at 0x%x", entry)
	}
	mbi, err := b.multibootInfo()
	if err != nil {
		return err
	}
	b.plan.CPU = CPU{Mode: Protected, Entry: entry, AX: multibootLoaded, BX: uint64(mbi), SP: uint64(StackTop)}
	return b.begin()
}

// loadByAddresses places the file as the header says. It returns the entry.
func (b *builder) loadByAddresses(at uint64) (entry uint64, err error) {
	if !b.file.has(at, 32) {
		return 0, b.bad("header", int64(at), "the file ends in it")
	}
	field := func(n uint64) uint64 { return uint64(b.file.u32(at + n)) }
	header, load, loadEnd, bssEnd := field(12), field(16), field(20), field(24)
	entry = field(28)
	if load > header || header-load > at {
		return 0, b.bad("load_addr", int64(at+16), "0x%x does not go with header_addr, 0x%x: the header is at offset 0x%x of the file", load, header, at)
	}
	offset := at - (header - load)
	size := uint64(len(b.file)) - offset
	if loadEnd != 0 {
		if loadEnd < load || loadEnd-load > size {
			return 0, b.bad("load_end_addr", int64(at+20), "0x%x: from load_addr, 0x%x, the file has 0x%x bytes", loadEnd, load, size)
		}
		size = loadEnd - load
	}
	memory := size
	if bssEnd != 0 {
		if bssEnd < load+size {
			return 0, b.bad("bss_end_addr", int64(at+24), "0x%x is below the end of what is loaded, 0x%x", bssEnd, load+size)
		}
		memory = bssEnd - load
	}
	if entry < load || entry >= load+size {
		return 0, b.bad("entry_addr", int64(at+28), "0x%x is not in what is loaded, [0x%x, 0x%x)", entry, load, load+size)
	}
	if err := b.placeRAM(Segment{Name: "the image", GPA: addr.GPA(load), Size: memory, Data: b.file[offset : offset+size]}); err != nil {
		return 0, b.bad("load_addr", int64(at+16), "%w", err)
	}
	return entry, nil
}

// multibootInfo places the information structure and what it points to.
func (b *builder) multibootInfo() (at addr.GPA, err error) {
	data := make([]byte, infoLen)
	if at, err = b.structure("multiboot information", data); err != nil {
		return 0, err
	}
	line := b.o.Name
	if b.o.CmdLine != "" || line == "" {
		line += " " + b.o.CmdLine
	}
	cmdline, err := b.text("the command line", line)
	if err != nil {
		return 0, err
	}
	loader, err := b.text("the loader's name", "gvm")
	if err != nil {
		return 0, err
	}
	var memory []byte
	for _, m := range b.o.Layout.Map() {
		memory = append(memory, words(20)...) // bytes that follow
		memory = quads(memory, uint64(m.Start), uint64(m.End-m.Start))
		memory = append(memory, words(uint32(m.Kind))...)
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
		modules = append(modules, words(uint32(gpa), uint32(gpa)+uint32(len(b.o.Modules[i].Data)), uint32(name), 0)...)
	}
	var modulesAt addr.GPA
	if len(list) > 0 {
		if modulesAt, err = b.structure("list of modules", modules); err != nil {
			return 0, err
		}
	}
	put := func(offset int, v uint32) { binary.LittleEndian.PutUint32(data[offset:], v) }
	put(0, infoMemory|infoCmdLine|infoModules|infoMap|infoLoader)
	put(4, uint32(ebda)>>10)
	put(8, uint32(b.o.Layout.lowEnd()-HighBase)>>10)
	put(16, uint32(cmdline))
	put(20, uint32(len(list)))
	put(24, uint32(modulesAt))
	put(44, uint32(len(memory)))
	put(48, uint32(memoryAt))
	put(64, uint32(loader))
	return at, nil
}
