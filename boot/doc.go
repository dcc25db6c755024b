// Package boot reads images that other people have made, and says how a PC has to be set
// up to run them: which bytes go where in guest memory, and with which registers the
// processor begins.
//
// A [Plan] is made by [Load] from the bytes of an image and from [Options]: how much
// memory the machine has, a command line, further files. It is a pure function. All of the
// file that matters is checked before there is a plan, so that nothing has been changed
// when an image turns out to be bad; the error is an [*Error] that names the field and
// where in the file it is.
//
//	format      found by                               begins in
//	Flat        nothing else fits                      what Options.Mode says; if nothing, real mode
//	ELF         ELF header                             64-bit mode, ELF32 in 32-bit mode
//	Multiboot   magic in the first 8 KiB               32-bit mode, eax the magic, ebx the information
//	PVH         ELF with a note of Xen's               32-bit mode, ebx the start information
//	BzImage     boot sector magic and "HdrS"           64-bit mode, rsi the zero page
//
// # Memory
//
// A PC's RAM begins at address 0 and has holes: see [Layout]. What an image is told about
// itself, and the tables of the machine, are in [Firmware, HighBase), which no image takes for
// free memory:
//
//	PageTables    maps the first 4 GiB at their own addresses, for 64-bit mode
//	Descriptors   a GDT: code is selector 0x10, data is 0x18
//	TaskState     zeros, which permit all ports below 0x8000
//	info          multiboot information, start information or zero page, and strings
//	StackTop      above two pages of stack, for images that are given one
//	tables        MP tables and ACPI tables
package boot
