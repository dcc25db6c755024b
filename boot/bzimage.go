package boot

import (
	"encoding/binary"

	"github.com/secondmmu/gvm/addr"
)

// Linux's boot protocol for x86: fields of the setup header, by their offset in the file and
// in the zero page alike.
const (
	hdrStart       = 0x1f1
	hdrSetupSects  = 0x1f1
	hdrBootFlag    = 0x1fe
	hdrJumpLen     = 0x201 // from 0x202, the header has so many bytes
	hdrMagic       = 0x202
	hdrVersion     = 0x206
	hdrLoader      = 0x210
	hdrLoadFlags   = 0x211
	hdrCode32      = 0x214
	hdrRamdisk     = 0x218
	hdrRamdiskSize = 0x21c
	hdrCmdLine     = 0x228
	hdrInitrdMax   = 0x22c
	hdrAlignment   = 0x230
	hdrRelocatable = 0x234
	hdrXLoadFlags  = 0x236
	hdrCmdLineSize = 0x238
	hdrPrefAddress = 0x258
	hdrInitSize    = 0x260
	hdrEnd         = 0x264 // of what is looked at

	zeroRSDP       = 0x070
	zeroMapEntries = 0x1e8
	zeroMap        = 0x2d0
	zeroHeaderEnd  = 0x290 // what is behind it in the zero page is no header

	hdrVersion64 = 0x20c // the first that has a 64-bit entry
	loadedHigh   = 1 << 0
	entry64      = 1 << 0 // of XLoadFlags
	entry64At    = 0x200  // from the start of the kernel
	loaderOther  = 0xff
	sector       = 512
)

func isBzImage(f file) bool {
	return f.u16(hdrBootFlag) == 0xaa55 && f.has(hdrMagic, 4) && string(f[hdrMagic:hdrMagic+4]) == "HdrS"
}

// loadBzImage runs a Linux kernel from its 64-bit entry.
func loadBzImage(b *builder) error {
	f := b.file
	if !isBzImage(f) {
		return b.bad("header", hdrMagic, `it is not "HdrS", or there is no boot flag before it`)
	}
	headerEnd := hdrMagic + uint64(f.u8(hdrJumpLen))
	setup := uint64(f.u8(hdrSetupSects))
	if setup == 0 {
		setup = 4
	}
	kernelAt := (setup + 1) * sector
	version := f.u16(hdrVersion)
	switch {
	case version < hdrVersion64 || headerEnd < hdrEnd:
		return b.bad("version", hdrVersion, "version %d.%d of the boot protocol, with a header that ends at 0x%x, has no 64-bit entry: it takes 2.12", version>>8, version&0xff, headerEnd)
	case f.u16(hdrXLoadFlags)&entry64 == 0:
		return b.bad("xloadflags", hdrXLoadFlags, "0x%x: the kernel has no 64-bit entry", f.u16(hdrXLoadFlags))
	case f.u8(hdrLoadFlags)&loadedHigh == 0:
		return b.bad("loadflags", hdrLoadFlags, "0x%x: the kernel is to be loaded low, which no 64-bit kernel is", f.u8(hdrLoadFlags))
	case headerEnd > zeroHeaderEnd || !f.has(0, headerEnd):
		return b.bad("jump", hdrJumpLen, "a header that ends at 0x%x does not fit", headerEnd)
	case uint64(len(f)) <= kernelAt+entry64At:
		return b.bad("setup_sects", hdrSetupSects, "the kernel begins at 0x%x and the file has 0x%x bytes", kernelAt, len(f))
	case b.o.Mode != Default:
		return b.refuse("it begins in mode %v, not %v", Long, b.o.Mode)
	case len(b.o.Modules) > 1:
		return b.refuse("there are %d modules, and a kernel takes one initrd", len(b.o.Modules))
	}
	kernel := f[kernelAt:]
	load, size, err := b.kernelPlace(uint64(len(kernel)))
	if err != nil {
		return err
	}
	if err := b.placeRAM(Segment{Name: "the kernel", GPA: load, Size: size, Data: kernel}); err != nil {
		return b.bad("init_size", hdrInitSize, "%w", err)
	}
	if most := f.u32(hdrCmdLineSize); uint64(len(b.o.CmdLine)) > uint64(most) {
		return b.refuse("a command line of %d bytes is longer than the kernel takes: %d, by cmdline_size at offset 0x%x", len(b.o.CmdLine), most, hdrCmdLineSize)
	}
	zero := make([]byte, addr.PageSize)
	copy(zero[hdrStart:], f[hdrStart:headerEnd])
	zeroAt, err := b.structure("zero page", zero)
	if err != nil {
		return err
	}
	cmdline, err := b.text("the command line", b.o.CmdLine)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	zero[hdrLoader] = loaderOther
	le.PutUint32(zero[hdrCode32:], uint32(load))
	le.PutUint32(zero[hdrCmdLine:], uint32(cmdline))
	le.PutUint64(zero[zeroRSDP:], uint64(rsdpAt))
	le.PutUint32(zero[hdrRamdisk:], 0)
	le.PutUint32(zero[hdrRamdiskSize:], 0)
	list, err := b.modules(addr.GPA(f.u32(hdrInitrdMax)) + 1)
	if err != nil {
		return err
	}
	if len(list) > 0 && len(b.o.Modules[0].Data) > 0 {
		le.PutUint32(zero[hdrRamdisk:], uint32(list[0]))
		le.PutUint32(zero[hdrRamdiskSize:], uint32(len(b.o.Modules[0].Data)))
	}
	entries := b.o.Layout.Map()
	zero[zeroMapEntries] = byte(len(entries))
	for i, m := range entries {
		at := zero[zeroMap+20*i:]
		le.PutUint64(at, uint64(m.Start))
		le.PutUint64(at[8:], uint64(m.End-m.Start))
		le.PutUint32(at[16:], uint32(m.Kind))
	}
	b.plan.CPU = CPU{Mode: Long, Entry: uint64(load) + entry64At, SI: uint64(zeroAt), SP: uint64(StackTop)}
	return b.begin()
}

// kernelPlace chooses where a kernel of so many bytes goes: where it wants to be, if that is
// RAM or it cannot be moved, and otherwise as low as it may. The size is what it uses while it
// unpacks itself.
func (b *builder) kernelPlace(bytes uint64) (load addr.GPA, size uint64, err error) {
	f := b.file
	load, size = addr.GPA(f.u64(hdrPrefAddress)), max(uint64(f.u32(hdrInitSize)), bytes)
	if f.u8(hdrRelocatable) == 0 {
		return load, size, nil
	}
	alignment := addr.GPA(f.u32(hdrAlignment))
	if alignment == 0 || alignment&(alignment-1) != 0 {
		return 0, 0, b.bad("kernel_alignment", hdrAlignment, "0x%x is not a power of two", uint32(alignment))
	}
	if end := load + addr.GPA(size); load < HighBase || end < load || end > b.o.Layout.lowEnd() {
		load = align(HighBase, alignment)
	}
	return load, size, nil
}
