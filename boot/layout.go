package boot

import (
	"fmt"

	"github.com/secondmmu/gvm/addr"
)

// Where memory begins and ends in a PC.
const (
	ebda     = addr.GPA(0x9fc00)  // from here to LowEnd, memory that belongs to the firmware
	LowEnd   = addr.GPA(0xa0000)  // behind the RAM that is below video memory
	Firmware = addr.GPA(0xe0000)  // tables for the image, up to HighBase
	HighBase = addr.GPA(0x100000) // where RAM goes on
	PCIHole  = addr.GPA(3 << 30)  // what RAM there would be from here is above the hole
	PCIEnd   = addr.GPA(1 << 32)  // behind the hole

	// FirmwareSize is the memory that the tables are in. It is not part of RAM.
	FirmwareSize = uint64(HighBase - Firmware)

	// MinRAM is the least RAM that there is a layout for, and MaxRAM the most.
	MinRAM = 2 << 20
	MaxRAM = 1 << 40
)

// Parts of the firmware's memory.
const (
	PageTables  = Firmware
	Descriptors = Firmware + 0x6000
	TaskState   = Firmware + 0x7000
	info        = Firmware + 0x8000
	infoEnd     = Firmware + 0xe000
	StackTop    = Firmware + 0x10000
	tables      = Firmware + 0x10000
)

// Layout is the memory of a PC that has so many bytes of RAM.
type Layout struct {
	RAM uint64
}

// Window is memory at [Start, End): the bytes of RAM from Offset on.
type Window struct {
	Start, End addr.GPA
	Offset     uint64
}

// Check reports what is wrong with l.
func (l Layout) Check() error {
	if l.RAM < MinRAM || l.RAM > MaxRAM || l.RAM%addr.PageSize != 0 {
		return fmt.Errorf("%d bytes of RAM are not what a PC can have: a multiple of %d, at least %d", l.RAM, addr.PageSize, MinRAM)
	}
	return nil
}

// Windows returns where RAM is, in order of address. Byte n of RAM is at address n, as long as
// that is below PCIHole; the bytes that would be in [LowEnd, HighBase) are not to be seen.
func (l Layout) Windows() []Window {
	windows := []Window{{0, LowEnd, 0}, {HighBase, l.lowEnd(), uint64(HighBase)}}
	if l.RAM > uint64(PCIHole) {
		windows = append(windows, Window{PCIEnd, PCIEnd + addr.GPA(l.RAM) - PCIHole, uint64(PCIHole)})
	}
	return windows
}

// lowEnd returns the address behind the RAM that is below the PCI hole.
func (l Layout) lowEnd() addr.GPA { return addr.GPA(min(l.RAM, uint64(PCIHole))) }

// GPA returns the address of a byte of RAM, and whether it is to be seen.
func (l Layout) GPA(offset uint64) (gpa addr.GPA, ok bool) {
	for _, w := range l.Windows() {
		if n := offset - w.Offset; offset >= w.Offset && n < uint64(w.End-w.Start) {
			return w.Start + addr.GPA(n), true
		}
	}
	return 0, false
}

// Kind is what memory is used for, as the firmware's memory map has it.
type Kind uint32

// The kinds of memory, with the numbers of the memory map.
const (
	Usable   Kind = 1
	Reserved Kind = 2
)

// MapEntry is a line of the memory map.
type MapEntry struct {
	Start, End addr.GPA
	Kind       Kind
}

// Map returns the memory map that the image is given, in order of address.
func (l Layout) Map() []MapEntry {
	entries := []MapEntry{
		{0, ebda, Usable},
		{ebda, LowEnd, Reserved},
		{Firmware, HighBase, Reserved},
		{HighBase, l.lowEnd(), Usable},
	}
	if w := l.Windows(); len(w) > 2 {
		entries = append(entries, MapEntry{w[2].Start, w[2].End, Usable})
	}
	return entries
}
