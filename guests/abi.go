package guests

import "github.com/secondmmu/gvm/addr"

// The memory of a machine that runs a built-in guest:
//
//	[0, BootSize)          the boot window, pinned: parameters, results, page
//	                       tables, the image and the stacks
//	[RAMBase, RAMBase+n)   RAM, whose host mappings may change under the guest
//
// The image and the page tables are pinned because a guest cannot go on without
// them, and because hosts with shadow paging do not follow changes to pages that
// hold guest page tables.
const (
	BootSize = addr.HugeSize
	RAMBase  = addr.GPA(BootSize)
	MaxRAM   = maxPDs<<30 - BootSize // bytes that the page tables of a guest can map
	MaxVCPUs = 32
	MaxImage = stackTop - MaxVCPUs*addr.PageSize - Image
	maxPDs   = 256
	stackTop = 0x100000
	TSS      = addr.GPA(0)      // a task state segment of zeros: it permits the ports below 0x8000
	Params   = addr.GPA(0x1000) // the parameter page
	Results  = addr.GPA(0x2000) // the result words of all vCPUs
	PML4     = addr.GPA(0x3000) // root of the page tables
	PDPT     = addr.GPA(0x4000)
	Image    = addr.GPA(0x10000) // first byte of the image, and where vCPUs start
	PageDirs = addr.GPA(stackTop)
)

// Offsets in the parameter page, in bytes. All words are 8 bytes.
const (
	ParamVCPUs   = 0x00
	ParamRAM     = 0x08
	ParamRAMSize = 0x10
	ParamArgs    = 0x40
	MaxArgs      = (addr.PageSize - ParamArgs) / 8
)

// MaxPrint is the most bytes that one write to PortPrint prints.
const MaxPrint = addr.PageSize

// ResultWords is the number of result words of a vCPU. Word 0 is its progress.
const ResultWords = 16

// Ports.
const (
	PortConsole = 0xe9  // out, 1 byte: a character for the console
	PortNop     = 0x80  // out: nothing
	PortUART    = 0x3f8 // a 16550, 8 ports
	PortExit    = 0x500 // out, 4 bytes: this vCPU is done, with this status
	PortMark    = 0x504 // out, 4 bytes: tell the host that this point was reached
	PortPrint   = 0x508 // out, 4 bytes: address of a string for the console, up to a zero, at most MaxPrint bytes
)

// The result words of the guest probe, and its operations.
const (
	ProbePosted = 1 // host: number of the newest request, from 1
	ProbeOp     = 2 // host
	ProbeAddr   = 3 // host
	ProbeValue  = 4 // host: to store, to add, or to exit with
	ProbeResult = 5 // guest: the value loaded

	ProbeLoad  = 0
	ProbeStore = 1
	ProbeAdd   = 2
	ProbeExit  = 3
)

// TouchSum is the result word in which the guest touch adds up what it reads.
const TouchSum = 1

// ResultGPA returns the address of a result word of a vCPU.
func ResultGPA(vcpu, word int) addr.GPA {
	return Results + addr.GPA(8*(vcpu*ResultWords+word))
}

// StackTop returns the address above the stack of a vCPU, which is one page.
func StackTop(vcpu int) addr.GPA { return addr.GPA(stackTop - vcpu*addr.PageSize) }

// Random advances the generator that guests use. A state of 0 stays 0.
func Random(x uint64) uint64 {
	x ^= x << 13
	x ^= x >> 7
	x ^= x << 17
	return x
}
