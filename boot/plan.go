package boot

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/secondmmu/gvm/addr"
)

// Format is how an image says where its parts belong.
type Format uint8

const (
	Detect    Format = iota // find out
	Flat                    // bytes that are run from the first
	ELF                     // ELF, run from its entry
	Multiboot               // multiboot 1: ELF or not
	PVH                     // ELF with the 32-bit entry of Xen's PVH
	BzImage                 // Linux
)

var formatNames = [...]string{"detect", "flat", "elf", "multiboot", "pvh", "bzimage"}

func (f Format) String() string {
	if int(f) < len(formatNames) {
		return formatNames[f]
	}
	return fmt.Sprintf("format(%d)", uint8(f))
}

// Mode is what the processor is like when the image begins.
type Mode uint8

const (
	Default   Mode = iota // what the format says
	Real                  // 16-bit code, segments 0
	Protected             // 32-bit code, segments of 4 GiB, no paging
	Long                  // 64-bit code, the first 4 GiB mapped at their own addresses
	User                  // Long at CPL 3, with all ports below 0x8000 permitted
)

var modeNames = [...]string{"default", "real", "protected", "long", "user"}

func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// Options say what an image is loaded into, and what it is given.
type Options struct {
	Layout  Layout
	Format  Format
	VCPUs   int    // 0: one
	Name    string // of the image, which multiboot has in its command line
	CmdLine string
	Modules []Module // the initrd is the first

	// Mode is for flat images, which have no say in it, and for ELF64: Long or User.
	Mode Mode

	// At is where a flat image goes and is run from. 0: 0x1000 in real mode, else 0x100000.
	At addr.GPA
}

// Module is a further file for the image.
type Module struct {
	Name string // what multiboot says of it
	Data []byte
}

// Plan is a PC about to run an image.
type Plan struct {
	Format   Format
	Segments []Segment // in order of address; no two overlap, and all are in memory
	CPU      CPU       // the processor that boots; the others wait to be started
}

// Segment is what goes to a part of guest memory.
type Segment struct {
	Name string
	GPA  addr.GPA
	Size uint64 // bytes; those behind Data are zero
	Data []byte // may be a part of the image or of a module
}

// End returns the address behind the segment.
func (s Segment) End() addr.GPA { return s.GPA + addr.GPA(s.Size) }

// CPU is how the processor that boots begins. Registers that are not here are zero,
// interrupts are off.
type CPU struct {
	Mode           Mode // not Default
	Entry          uint64
	AX, BX, SI, DI uint64
	SP             uint64
}

// Error is an image that cannot be loaded.
type Error struct {
	Format Format
	Field  string // of the file, or what it is about: "e_phoff"
	Offset int64  // where in the file the field is; -1: it is in no one place
	Err    error
}

func (e *Error) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("%v image: %s: %v", e.Format, e.Field, e.Err)
	}
	return fmt.Sprintf("%v image: %s, at offset 0x%x: %v", e.Format, e.Field, e.Offset, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// ErrOptions is what errors.Is finds in the error of Load if the options are at fault, not
// the image.
var ErrOptions = errors.New("the image cannot be loaded like this")

// Load plans how to run an image. The plan refers to its bytes and to the modules'.
func Load(image []byte, o Options) (*Plan, error) {
	if o.VCPUs == 0 {
		o.VCPUs = 1
	}
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOptions, err)
	}
	if o.Format == Detect {
		o.Format = Identify(image)
	}
	b := &builder{file: image, o: &o, plan: &Plan{Format: o.Format}}
	load := map[Format]func(*builder) error{Flat: loadFlat, ELF: loadELF, Multiboot: loadMultiboot, PVH: loadPVH, BzImage: loadBzImage}[o.Format]
	if load == nil {
		return nil, fmt.Errorf("%w: there is no %v", ErrOptions, o.Format)
	}
	if err := load(b); err != nil {
		return nil, err
	}
	for _, s := range machineTables(o.VCPUs) {
		if err := b.place(s); err != nil {
			return nil, b.bad("tables", -1, "%w", err)
		}
	}
	return b.plan, nil
}

// MaxVCPUs is the most processors that the tables have room for.
const MaxVCPUs = 64

func (o *Options) check() error {
	if err := o.Layout.Check(); err != nil {
		return err
	}
	switch {
	case o.VCPUs < 1 || o.VCPUs > MaxVCPUs:
		return fmt.Errorf("%d vCPUs are not in 1 to %d", o.VCPUs, MaxVCPUs)
	case bytes.IndexByte([]byte(o.CmdLine+o.Name), 0) >= 0:
		return errors.New("the command line has a zero byte in it")
	case o.Mode > User:
		return fmt.Errorf("there is no %v", o.Mode)
	}
	return nil
}

// Identify returns the format that an image has by what is in it.
func Identify(image []byte) Format {
	f := file(image)
	switch {
	case isBzImage(f):
		return BzImage
	case multibootHeader(f) >= 0:
		return Multiboot
	case !isELF(f):
		return Flat
	}
	// Whatever is wrong with the notes is for the loader to say.
	if b := (&builder{file: f, plan: &Plan{Format: PVH}}); hasPVHNote(b) {
		return PVH
	}
	return ELF
}

// builder makes a plan.
type builder struct {
	file file
	o    *Options
	plan *Plan
	next addr.GPA // free memory for structures begins here; 0: at info
}

// bad makes the error for a field of the file.
func (b *builder) bad(field string, offset int64, format string, args ...any) error {
	return &Error{Format: b.plan.Format, Field: field, Offset: offset, Err: fmt.Errorf(format, args...)}
}

// refuse makes the error for something that the image was to be given.
func (b *builder) refuse(format string, args ...any) error {
	return &Error{Format: b.plan.Format, Field: "options", Offset: -1, Err: fmt.Errorf("%w: %w", ErrOptions, fmt.Errorf(format, args...))}
}

// place adds a segment, which has to be in memory that is still free. A segment of no bytes
// is left out.
func (b *builder) place(s Segment) error {
	if s.Size == 0 {
		return nil
	}
	end := s.End()
	if end < s.GPA {
		return fmt.Errorf("%s, 0x%x bytes at %v, does not end", s.Name, s.Size, s.GPA)
	}
	if !b.inMemory(s.GPA, end) {
		return fmt.Errorf("%s, [0x%x, 0x%x), is not in the machine's memory: %s", s.Name, uint64(s.GPA), uint64(end), b.memory())
	}
	i, found := slices.BinarySearchFunc(b.plan.Segments, s.GPA, func(o Segment, gpa addr.GPA) int { return cmp.Compare(o.GPA, gpa) })
	for _, n := range []int{i - 1, i} {
		if n < 0 || n >= len(b.plan.Segments) {
			continue
		}
		if o := b.plan.Segments[n]; found && n == i || o.GPA < end && s.GPA < o.End() {
			return fmt.Errorf("%s, [0x%x, 0x%x), overlaps %s, [0x%x, 0x%x)", s.Name, uint64(s.GPA), uint64(end), o.Name, uint64(o.GPA), uint64(o.End()))
		}
	}
	b.plan.Segments = slices.Insert(b.plan.Segments, i, s)
	return nil
}

func (b *builder) inMemory(start, end addr.GPA) bool {
	if Firmware <= start && end <= HighBase {
		return true
	}
	return slices.ContainsFunc(b.o.Layout.Windows(), func(w Window) bool { return w.Start <= start && end <= w.End })
}

// memory describes the machine's memory for messages.
func (b *builder) memory() string {
	text := ""
	for _, w := range b.o.Layout.Windows() {
		text += fmt.Sprintf(" [0x%x, 0x%x)", uint64(w.Start), uint64(w.End))
	}
	return text[1:]
}

// placeRAM is place for what the image brings: the firmware's memory is not for that.
func (b *builder) placeRAM(s Segment) error {
	if s.Size != 0 && s.GPA < HighBase && s.End() > Firmware {
		return fmt.Errorf("%s, [0x%x, 0x%x), is where the machine's tables are: [0x%x, 0x%x)", s.Name, uint64(s.GPA), uint64(s.End()), uint64(Firmware), uint64(HighBase))
	}
	return b.place(s)
}

// structure places bytes where the firmware keeps what the image is told, and returns the
// address, which is a multiple of 16.
func (b *builder) structure(name string, data []byte) (addr.GPA, error) {
	if b.next == 0 {
		b.next = info
	}
	at := b.next
	if uint64(infoEnd-at) < uint64(len(data)) {
		return 0, b.refuse("%s of %d bytes is more than there is room for: %d bytes", name, len(data), uint64(infoEnd-at))
	}
	b.next = align(at+addr.GPA(len(data)), 16)
	if err := b.place(Segment{Name: name, GPA: at, Size: uint64(len(data)), Data: data}); err != nil {
		return 0, b.refuse("%w", err)
	}
	return at, nil
}

// text places a string with a zero behind it.
func (b *builder) text(name, s string) (addr.GPA, error) {
	return b.structure(name, append([]byte(s), 0))
}

// modules places the modules behind each other in RAM below limit, as high as they fit, each
// at a page.
func (b *builder) modules(limit addr.GPA) ([]addr.GPA, error) {
	top := min(limit, b.o.Layout.lowEnd())
	at := make([]addr.GPA, len(b.o.Modules))
	for i, m := range b.o.Modules {
		size := uint64(len(m.Data))
		gpa, ok := b.below(top, size)
		if !ok {
			return nil, b.refuse("there is no room for module %q, %d bytes, below 0x%x", m.Name, size, uint64(top))
		}
		if err := b.place(Segment{Name: fmt.Sprintf("module %d", i), GPA: gpa, Size: size, Data: m.Data}); err != nil {
			return nil, b.refuse("%w", err)
		}
		at[i], top = gpa, gpa
	}
	return at, nil
}

// below returns the highest page below top, in RAM above HighBase, that has size free bytes from there on.
func (b *builder) below(top addr.GPA, size uint64) (addr.GPA, bool) {
	for i := len(b.plan.Segments); ; i-- {
		for i > 0 && b.plan.Segments[i-1].GPA >= top {
			i--
		}
		floor := HighBase
		if i > 0 {
			floor = max(floor, b.plan.Segments[i-1].End())
		}
		if floor < top && uint64(top-floor) >= size {
			if gpa := (top - addr.GPA(size)) &^ addr.PageMask; gpa >= floor {
				return gpa, true
			}
		}
		if i == 0 || floor == HighBase {
			return 0, false
		}
		top = min(top, b.plan.Segments[i-1].GPA)
	}
}

func align(gpa addr.GPA, to addr.GPA) addr.GPA { return (gpa + to - 1) &^ (to - 1) }

// file is an image, whose fields are little-endian numbers.
type file []byte

// has reports whether n bytes at offset are in the file.
func (f file) has(offset, n uint64) bool {
	return offset <= uint64(len(f)) && n <= uint64(len(f))-offset
}

// The fields at an offset; 0 if they are not in the file.
func (f file) u8(offset uint64) uint8 {
	if !f.has(offset, 1) {
		return 0
	}
	return f[offset]
}

func (f file) u16(offset uint64) uint16 {
	if !f.has(offset, 2) {
		return 0
	}
	return binary.LittleEndian.Uint16(f[offset:])
}

func (f file) u32(offset uint64) uint32 {
	if !f.has(offset, 4) {
		return 0
	}
	return binary.LittleEndian.Uint32(f[offset:])
}

func (f file) u64(offset uint64) uint64 {
	if !f.has(offset, 8) {
		return 0
	}
	return binary.LittleEndian.Uint64(f[offset:])
}

// words returns the numbers as little-endian words of 4 bytes.
func words(list ...uint32) []byte {
	p := make([]byte, 0, 4*len(list))
	for _, w := range list {
		p = binary.LittleEndian.AppendUint32(p, w)
	}
	return p
}

func quads(p []byte, list ...uint64) []byte {
	for _, q := range list {
		p = binary.LittleEndian.AppendUint64(p, q)
	}
	return p
}
