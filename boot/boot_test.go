package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

var options = Options{Layout: Layout{RAM: 64 << 20}, Name: "image", CmdLine: "a=1 b"}

// link assembles and links a source, as an ELF file of that emulation.
func link(t *testing.T, emulation, source string) []byte {
	t.Helper()
	gvmtest.Need(t, gvmtest.Assembler)
	dir := t.TempDir()
	text, script, object, image := filepath.Join(dir, "image.S"), filepath.Join(dir, "image.ld"), filepath.Join(dir, "image.o"), filepath.Join(dir, "image.elf")
	const sections = "SECTIONS { . = 0x200000; .text : { *(.text) } .note : { *(.note.*) } .data : { *(.data) } .bss : { *(.bss) } }"
	if err := errors.Join(os.WriteFile(text, []byte(source), 0o644), os.WriteFile(script, []byte(sections), 0o644)); err != nil {
		t.Fatal(err)
	}
	bits := "--32"
	if emulation == "elf_x86_64" {
		bits = "--64"
	}
	for _, args := range [][]string{
		{"as", bits, "-o", object, text},
		{"ld", "-m", emulation, "-nostdlib", "-z", "max-page-size=4096", "-T", script, "-e", "start", "-o", image, object},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	built, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return built
}

// at returns n bytes that the plan has at an address.
func (p *Plan) at(t *testing.T, gpa addr.GPA, n int) []byte {
	t.Helper()
	for _, s := range p.Segments {
		if s.GPA <= gpa && gpa+addr.GPA(n) <= s.End() {
			whole := append(bytes.Clone(s.Data), make([]byte, s.Size-uint64(len(s.Data)))...)
			return whole[gpa-s.GPA:][:n]
		}
	}
	t.Fatalf("the plan has nothing at %v", gpa)
	return nil
}

func (p *Plan) u32(t *testing.T, gpa addr.GPA) uint32 {
	return binary.LittleEndian.Uint32(p.at(t, gpa, 4))
}

func (p *Plan) u64(t *testing.T, gpa addr.GPA) uint64 {
	return binary.LittleEndian.Uint64(p.at(t, gpa, 8))
}

func (p *Plan) text(t *testing.T, gpa addr.GPA) string {
	t.Helper()
	for _, s := range p.Segments {
		if s.GPA <= gpa && gpa < s.End() {
			text, _, ok := bytes.Cut(s.Data[gpa-s.GPA:], []byte{0})
			if !ok {
				t.Errorf("the text at %v does not end", gpa)
			}
			return string(text)
		}
	}
	t.Fatalf("the plan has nothing at %v", gpa)
	return ""
}

// checkPlan reports what no plan may be.
func checkPlan(t *testing.T, o Options, p *Plan) {
	t.Helper()
	b := &builder{o: &o}
	for i, s := range p.Segments {
		if s.Size == 0 || uint64(len(s.Data)) > s.Size || s.End() < s.GPA || !b.inMemory(s.GPA, s.End()) {
			t.Errorf("segment %q at %v has 0x%x bytes, 0x%x of data", s.Name, s.GPA, s.Size, len(s.Data))
		}
		if i > 0 && p.Segments[i-1].End() > s.GPA {
			t.Errorf("segment %q at %v overlaps %q", s.Name, s.GPA, p.Segments[i-1].Name)
		}
	}
	if c := p.CPU; c.Mode == Default || c.Mode > User || c.Entry >= 1<<32 && c.Mode != Long && c.Mode != User {
		t.Errorf("the processor begins as %+v", c)
	}
	if !slices.ContainsFunc(p.Segments, func(s Segment) bool { return uint64(s.GPA) <= p.CPU.Entry && p.CPU.Entry < uint64(s.End()) }) {
		t.Errorf("the entry 0x%x is in no segment", p.CPU.Entry)
	}
}

func load(t *testing.T, image []byte, o Options) *Plan {
	t.Helper()
	p, err := Load(image, o)
	if err != nil {
		t.Fatal(err)
	}
	checkPlan(t, o, p)
	return p
}

// TestFlat has a flat image in each mode.
func TestFlat(t *testing.T) {
	for name, tt := range map[string]struct {
		mode Mode
		at   addr.GPA
		want CPU
	}{
		"as it is":        {Default, 0, CPU{Mode: Real, Entry: 0x1000, SP: 0x1000}},
		"real, elsewhere": {Real, 0x7c00, CPU{Mode: Real, Entry: 0x7c00, SP: 0x7c00}},
		"real, low":       {Real, 0x100, CPU{Mode: Real, Entry: 0x100, SP: 0xfffe}},
		"protected":       {Protected, 0, CPU{Mode: Protected, Entry: 0x100000, SP: 0xf0000}},
		"long":            {Long, 0x200000, CPU{Mode: Long, Entry: 0x200000, SP: 0xf0000}},
		"user":            {User, 0, CPU{Mode: User, Entry: 0x100000, SP: 0xf0000}},
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{Layout: options.Layout, Mode: tt.mode, At: tt.at}
			p := load(t, []byte{0xf4}, o)
			if diff := cmp.Diff(tt.want, p.CPU); diff != "" || p.Format != Flat {
				t.Errorf("format %v, CPU (-want +got):\n%s", p.Format, diff)
			}
			if got := p.at(t, addr.GPA(tt.want.Entry), 1)[0]; got != 0xf4 {
				t.Errorf("the image begins with 0x%x", got)
			}
			if tt.want.Mode == Long {
				checkPageTables(t, p)
			}
		})
	}
}

// checkPageTables walks the tables of a plan.
func checkPageTables(t *testing.T, p *Plan) {
	t.Helper()
	for _, gva := range []uint64{0, 0x1234, 0x200000, 0x3fffffff, 0x40000000, 0xfee00000, 0xffffffff} {
		entry := p.u64(t, PageTables+addr.GPA(gva>>39&511*8))
		for _, shift := range []uint{30, 21} {
			if entry&7 != 7 {
				t.Fatalf("0x%x: an entry is 0x%x", gva, entry)
			}
			entry = p.u64(t, addr.GPA(entry&^0xfff+gva>>shift&511*8))
		}
		if got := entry&^0x1fffff | gva&0x1fffff; entry&0x87 != 0x87 || got != gva {
			t.Errorf("0x%x is mapped by 0x%x, at 0x%x", gva, entry, got)
		}
	}
}

func TestELF64(t *testing.T) {
	image := link(t, "elf_x86_64", ".globl start\n.skip 16\nstart: hlt\n.bss\n.skip 64\n")
	p := load(t, image, options)
	if p.Format != ELF || p.CPU.Mode != Long || p.CPU.Entry != 0x200010 || p.at(t, 0x200010, 1)[0] != 0xf4 {
		t.Errorf("format %v, CPU %+v", p.Format, p.CPU)
	}
	if magic := p.u32(t, addr.GPA(p.CPU.DI)); magic != startMagic {
		t.Errorf("rdi points to 0x%x", magic)
	}
	user := options
	user.Mode = User
	if p := load(t, image, user); p.CPU.Mode != User {
		t.Errorf("CPU %+v, want mode user", p.CPU)
	}
	user.Mode = Real
	if _, err := Load(image, user); !errors.Is(err, ErrOptions) {
		t.Errorf("in real mode: %v", err)
	}
}

func TestELF32(t *testing.T) {
	p := load(t, link(t, "elf_i386", ".globl start\nstart: hlt\n"), options)
	if p.Format != ELF || p.CPU.Mode != Protected || p.CPU.Entry != 0x200000 {
		t.Errorf("format %v, CPU %+v", p.Format, p.CPU)
	}
}

const multibootSource = `
	.globl start
	.long 0x1badb002, 3, -(0x1badb002 + 3)
start:	hlt
	.data
	.long 0x12345678
	.bss
	.skip 8192
`

func TestMultibootELF(t *testing.T) {
	o := options
	o.Modules = []Module{{"one x", []byte("first")}, {"two", make([]byte, 5000)}}
	p := load(t, link(t, "elf_i386", multibootSource), o)
	if p.Format != Multiboot || p.CPU.Mode != Protected || p.CPU.AX != 0x2badb002 || p.CPU.Entry != 0x20000c {
		t.Errorf("format %v, CPU %+v", p.Format, p.CPU)
	}
	mbi := addr.GPA(p.CPU.BX)
	if flags := p.u32(t, mbi); flags != 0x24d {
		t.Errorf("flags 0x%x, want 0x24d", flags)
	}
	if low, high := p.u32(t, mbi+4), p.u32(t, mbi+8); low != 639 || high != 63<<10 {
		t.Errorf("memory %d and %d KiB, want 639 and %d", low, high, 63<<10)
	}
	if got := p.text(t, addr.GPA(p.u32(t, mbi+16))); got != "image a=1 b" {
		t.Errorf("command line %q", got)
	}
	if got := p.text(t, addr.GPA(p.u32(t, mbi+64))); got != "gvm" {
		t.Errorf("loader %q", got)
	}
	if n := p.u32(t, mbi+20); n != 2 {
		t.Fatalf("%d modules, want 2", n)
	}
	for i, m := range o.Modules {
		at := addr.GPA(p.u32(t, mbi+24)) + addr.GPA(16*i)
		start, end := addr.GPA(p.u32(t, at)), addr.GPA(p.u32(t, at+4))
		if start.Offset() != 0 || !bytes.Equal(p.at(t, start, int(end-start)), m.Data) || p.text(t, addr.GPA(p.u32(t, at+8))) != m.Name {
			t.Errorf("module %d is at [%v, %v)", i, start, end)
		}
	}
	checkMap(t, o, func(i int) (MapEntry, bool) {
		length := addr.GPA(p.u32(t, mbi+44))
		at := addr.GPA(24 * i)
		if at >= length {
			return MapEntry{}, false
		}
		at += addr.GPA(p.u32(t, mbi+48))
		if size := p.u32(t, at); size != 20 {
			t.Fatalf("entry %d has %d bytes", i, size)
		}
		start := addr.GPA(p.u64(t, at+4))
		return MapEntry{start, start + addr.GPA(p.u64(t, at+12)), Kind(p.u32(t, at+20))}, true
	})
}

// checkMap compares the memory map that an image is given with that of the layout.
func checkMap(t *testing.T, o Options, entry func(i int) (MapEntry, bool)) {
	t.Helper()
	var got []MapEntry
	for {
		e, ok := entry(len(got))
		if !ok {
			break
		}
		got = append(got, e)
	}
	if diff := cmp.Diff(o.Layout.Map(), got); diff != "" {
		t.Errorf("memory map (-layout +image's):\n%s", diff)
	}
}

// TestMultibootAddresses loads an image that is no ELF file.
func TestMultibootAddresses(t *testing.T) {
	image := kludge()
	p := load(t, image, Options{Layout: options.Layout})
	if p.CPU.Entry != 0x100024 || !bytes.Equal(p.at(t, 0x100000, len(image)-8), image[8:]) {
		t.Errorf("CPU %+v", p.CPU)
	}
	if s := p.Segments[slices.IndexFunc(p.Segments, func(s Segment) bool { return s.GPA == 0x100000 })]; s.Size != 0x2000 {
		t.Errorf("the image has 0x%x bytes of memory, want 0x2000", s.Size)
	}
}

// kludge is an image that says by addresses what to load: all but its first 8 bytes, to 1 MiB.
func kludge() []byte {
	const flags = 0x10003
	image := append(make([]byte, 12), words(multibootMagic, flags, ^uint32(multibootMagic+flags)+1, 0x100004, 0x100000, 0, 0x102000, 0x100024)...)
	return append(image, 0xf4, 0xf4, 0xf4, 0xf4)
}

const pvhSource = `
	.globl start
start:	hlt
entry:	cli
	.section .note.Xen, "a", @note
	.long 4, 4, 18
	.asciz "Xen"
	.long entry
`

func TestPVH(t *testing.T) {
	for _, emulation := range []string{"elf_i386", "elf_x86_64"} {
		o := options
		o.Modules = []Module{{"initrd", []byte("first")}}
		p := load(t, link(t, emulation, pvhSource), o)
		if p.Format != PVH || p.CPU.Mode != Protected || p.CPU.Entry != 0x200001 {
			t.Errorf("%s: format %v, CPU %+v", emulation, p.Format, p.CPU)
		}
		start := addr.GPA(p.CPU.BX)
		if magic, version := p.u32(t, start), p.u32(t, start+4); magic != startMagic || version != 1 {
			t.Errorf("magic 0x%x, version %d", magic, version)
		}
		if got := p.text(t, addr.GPA(p.u64(t, start+24))); got != "a=1 b" {
			t.Errorf("command line %q", got)
		}
		module := addr.GPA(p.u64(t, start+16))
		if n, size := p.u32(t, start+12), p.u64(t, module+8); n != 1 || size != 5 || string(p.at(t, addr.GPA(p.u64(t, module)), 5)) != "first" {
			t.Errorf("%d modules, the first of %d bytes", n, size)
		}
		if got := string(p.at(t, addr.GPA(p.u64(t, start+32)), 8)); got != "RSD PTR " {
			t.Errorf("the root pointer begins with %q", got)
		}
		checkMap(t, o, func(i int) (MapEntry, bool) {
			if uint32(i) == p.u32(t, start+48) {
				return MapEntry{}, false
			}
			at := addr.GPA(p.u64(t, start+40)) + addr.GPA(24*i)
			first := addr.GPA(p.u64(t, at))
			return MapEntry{first, first + addr.GPA(p.u64(t, at+8)), Kind(p.u32(t, at+16))}, true
		})
	}
}

// linux is a kernel that has a header and no more.
func linux() []byte {
	f := make([]byte, 3*sector+0x300)
	le := binary.LittleEndian
	f[hdrSetupSects] = 2
	le.PutUint16(f[hdrBootFlag:], 0xaa55)
	f[0x200], f[hdrJumpLen] = 0xeb, hdrEnd-hdrMagic
	copy(f[hdrMagic:], "HdrS")
	le.PutUint16(f[hdrVersion:], 0x20f)
	f[hdrLoadFlags] = loadedHigh
	le.PutUint32(f[hdrInitrdMax:], 0x7fffffff)
	le.PutUint32(f[hdrAlignment:], 0x200000)
	f[hdrRelocatable] = 1
	le.PutUint16(f[hdrXLoadFlags:], entry64)
	le.PutUint32(f[hdrCmdLineSize:], 2047)
	le.PutUint64(f[hdrPrefAddress:], 0x1000000)
	le.PutUint32(f[hdrInitSize:], 0x800000)
	f[3*sector+entry64At] = 0xf4
	return f
}

func TestBzImage(t *testing.T) {
	o := options
	o.Modules = []Module{{"initrd", bytes.Repeat([]byte("x"), 5001)}}
	p := load(t, linux(), o)
	if p.Format != BzImage || p.CPU.Mode != Long || p.CPU.Entry != 0x1000200 || p.at(t, 0x1000200, 1)[0] != 0xf4 {
		t.Errorf("format %v, CPU %+v", p.Format, p.CPU)
	}
	zero := addr.GPA(p.CPU.SI)
	if got := p.text(t, addr.GPA(p.u32(t, zero+hdrCmdLine))); got != "a=1 b" {
		t.Errorf("command line %q", got)
	}
	initrd, size := addr.GPA(p.u32(t, zero+hdrRamdisk)), p.u32(t, zero+hdrRamdiskSize)
	if size != 5001 || initrd.Offset() != 0 || initrd != 64<<20-2*addr.PageSize || !bytes.Equal(p.at(t, initrd, int(size)), o.Modules[0].Data) {
		t.Errorf("the initrd is at %v and has %d bytes", initrd, size)
	}
	if got := p.at(t, zero+hdrLoader, 1)[0]; got != loaderOther {
		t.Errorf("type of loader 0x%x", got)
	}
	checkMap(t, o, func(i int) (MapEntry, bool) {
		if i == int(p.at(t, zero+zeroMapEntries, 1)[0]) {
			return MapEntry{}, false
		}
		at := zero + zeroMap + addr.GPA(20*i)
		first := addr.GPA(p.u64(t, at))
		return MapEntry{first, first + addr.GPA(p.u64(t, at+8)), Kind(p.u32(t, at+16))}, true
	})
	checkPageTables(t, p)

	o.Layout.RAM, o.Modules = 12<<20, nil // less than it would like
	if p := load(t, linux(), o); p.CPU.Entry != 0x200200 {
		t.Errorf("with little RAM, the entry is 0x%x, want 0x200200", p.CPU.Entry)
	}
}

// with returns a copy of an image with other bytes in one place.
func with(image []byte, at int, b ...byte) []byte {
	image = bytes.Clone(image)
	copy(image[at:], b)
	return image
}

// TestBadImages has an image for each thing that can be wrong, and what is said of it.
func TestBadImages(t *testing.T) {
	elf32, elf64 := handmade(false), handmade(true)
	pvh := handmade(true)
	binary.LittleEndian.PutUint16(pvh[0x38:], 2)
	const ph, note = 0x78, 0x100 // the second program header, and the note
	binary.LittleEndian.PutUint32(pvh[ph:], segmentNote)
	binary.LittleEndian.PutUint64(pvh[ph+0x08:], note)
	binary.LittleEndian.PutUint64(pvh[ph+0x20:], 20)
	copy(pvh[note:], append(words(4, 4, noteEntry), noteName+"\x00\x00\x20\x00"...))
	if p := load(t, pvh, options); p.Format != PVH {
		t.Fatalf("the handmade PVH image is of format %v", p.Format)
	}
	big := bytes.Repeat([]byte{0xff}, 8)
	for name, tt := range map[string]struct {
		image []byte
		o     Options // a zero Layout: options
		says  string
	}{
		"nothing":              {nil, Options{}, "flat image: the file: it is empty"},
		"flat, too large":      {make([]byte, 65<<20), Options{Mode: Long}, "is not in the machine's memory: [0x0, 0xa0000) [0x100000, 0x4000000)"},
		"flat, in the tables":  {make([]byte, 8), Options{Mode: Long, At: 0xe8000}, "is where the machine's tables are: [0xe0000, 0x100000)"},
		"flat, across":         {make([]byte, 8), Options{Mode: Long, At: 0x9fffc}, "not in the machine's memory"},
		"flat, real and high":  {make([]byte, 8), Options{Mode: Real, At: 0x10000}, "above 0xffff"},
		"flat, with modules":   {make([]byte, 8), Options{Modules: []Module{{}}}, "given no modules"},
		"ELF, cut":             {elf64[:0x3f], Options{}, "elf image: e_ident, at offset 0x0: the file ends in the header"},
		"ELF, class":           {with(elf64, 4, 3), Options{}, "EI_CLASS, at offset 0x4: 3 is neither"},
		"ELF, byte order":      {with(elf64, 5, 2), Options{}, "EI_DATA, at offset 0x5"},
		"ELF, object":          {with(elf64, 0x10, 1), Options{}, "e_type, at offset 0x10: 1 is not an executable"},
		"ELF, machine":         {with(elf64, 0x12, 40), Options{}, "e_machine, at offset 0x12: 40 is not x86"},
		"ELF, i386 in 64 bits": {with(elf64, 0x12, 3), Options{}, "e_machine"},
		"ELF, no headers":      {with(elf64, 0x38, 0), Options{}, "e_phnum, at offset 0x38"},
		"ELF, many headers":    {with(elf64, 0x38, 0xff, 0xff), Options{}, "65535 program headers are more than"},
		"ELF, short headers":   {with(elf64, 0x36, 0x37), Options{}, "e_phentsize, at offset 0x36"},
		"ELF, headers outside": {with(elf64, 0x20, big...), Options{}, "e_phoff, at offset 0x20"},
		"ELF32, outside":       {with(elf32, 0x1c, big[:4]...), Options{}, "e_phoff, at offset 0x1c"},
		"ELF, nothing to load": {with(elf64, 0x40, 6), Options{}, "program headers, at offset 0x40: none says what to load"},
		"ELF, file size":       {with(elf64, 0x60, big...), Options{}, "p_filesz, at offset 0x60"},
		"ELF32, file size":     {with(elf32, 0x44, big[:4]...), Options{}, "p_filesz, at offset 0x44"},
		"ELF, memory size":     {with(elf64, 0x68, 0, 0), Options{}, "none says what to load"},
		"ELF, less memory":     {with(elf64, 0x68, 1, 0), Options{}, "p_memsz, at offset 0x68: 0x1 bytes of memory are less"},
		"ELF, wraps":           {with(elf64, 0x68, big...), Options{}, "p_paddr, at offset 0x58: a segment, 0xffffffffffffffff bytes at gpa 0x200000, does not end"},
		"ELF, above RAM":       {with(elf64, 0x58, 0, 0, 0, 0x80), Options{}, "p_paddr, at offset 0x58"},
		"ELF, entry":           {with(elf64, 0x18, big...), Options{}, "e_entry, at offset 0x18: 0xffffffffffffffff is in no segment"},
		"multiboot, flags":     {sum(with(kludge(), 16, 0x08)), Options{}, "multiboot image: flags, at offset 0x10: 0x10008 needs what is not known: 0x8"},
		"multiboot, cut":       {kludge()[:30], Options{}, "multiboot image: header, at offset 0xc: the file ends in it"},
		"multiboot, load":      {with(kludge(), 28, 5), Options{}, "load_addr, at offset 0x1c"},
		"multiboot, load end":  {with(kludge(), 32, 1), Options{}, "load_end_addr, at offset 0x20"},
		"multiboot, bss end":   {with(kludge(), 36, 1, 0, 0x10), Options{}, "bss_end_addr, at offset 0x24"},
		"multiboot, entry":     {with(kludge(), 40, 0xff, 0xff), Options{}, "entry_addr, at offset 0x28: 0x10ffff is not in"},
		"multiboot, no header": {make([]byte, 100), Options{Format: Multiboot}, "the first 8192 bytes have none"},
		"multiboot, no ELF":    {sum(with(kludge(), 18, 0)), Options{}, "e_ident, at offset 0x0: it is not that of an ELF file"},
		"PVH, none":            {elf64, Options{Format: PVH}, "no note of Xen's"},
		"PVH, long":            {with(pvh, note, big[:4]...), Options{Format: PVH}, "n_descsz, at offset 0x100"},
		"PVH, size":            {with(pvh, note+4, 2), Options{Format: PVH}, "an entry of 2 bytes"},
		"PVH, entry":           {with(pvh, note+16, big[:4]...), Options{Format: PVH}, "0xffffffff is in no segment"},
		"Linux, no magic":      {with(linux(), hdrMagic, 'h'), Options{Format: BzImage}, `bzimage image: header, at offset 0x202: it is not "HdrS"`},
		"Linux, old":           {with(linux(), hdrVersion, 4), Options{}, "version 2.4 of the boot protocol"},
		"Linux, 32 bits":       {with(linux(), hdrXLoadFlags, 0), Options{}, "xloadflags, at offset 0x236"},
		"Linux, low":           {with(linux(), hdrLoadFlags, 0), Options{}, "loadflags, at offset 0x211"},
		"Linux, cut":           {linux()[:3*sector+0x200], Options{}, "setup_sects, at offset 0x1f1"},
		"Linux, long header":   {with(linux(), hdrJumpLen, 0xff), Options{}, "jump, at offset 0x201"},
		"Linux, alignment":     {with(linux(), hdrAlignment, 3), Options{}, "kernel_alignment, at offset 0x230: 0x200003"},
		"Linux, too large":     {with(linux(), hdrInitSize, big[:4]...), Options{}, "init_size, at offset 0x260"},
		"Linux, command line":  {with(linux(), hdrCmdLineSize, 1, 0), Options{CmdLine: "ab"}, "longer than the kernel takes: 1, by cmdline_size at offset 0x238"},
		"Linux, two initrds":   {linux(), Options{Modules: make([]Module, 2)}, "takes one initrd"},
		"Linux, large initrd":  {linux(), Options{Modules: []Module{{"big", make([]byte, 60<<20)}}}, `no room for module "big"`},
		"command line":         {linux(), Options{CmdLine: "a\x00"}, "zero byte"},
		"long command line":    {elf64, Options{CmdLine: strings.Repeat("x", 1<<16)}, "more than there is room for"},
		"no RAM":               {elf64, Options{Layout: Layout{RAM: 1 << 20}}, "at least 2097152"},
		"many vCPUs":           {elf64, Options{VCPUs: 65}, "65 vCPUs are not in 1 to 64"},
		"a format":             {elf64, Options{Format: 99}, "there is no format(99)"},
		"a mode":               {elf64, Options{Mode: 99}, "there is no mode(99)"},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.o.Layout.RAM == 0 {
				tt.o.Layout = options.Layout
			}
			p, err := Load(tt.image, tt.o)
			if err == nil || p != nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("Load returned %v, %v; want %q in the error", p, err, tt.says)
			}
		})
	}
}

// sum makes the checksum of kludge's header good again.
func sum(image []byte) []byte {
	le := binary.LittleEndian
	le.PutUint32(image[20:], ^uint32(0)-multibootMagic-le.Uint32(image[16:])+1)
	return image
}

// handmade is an ELF file whose one segment is a page at 2 MiB, and whose entry is its start.
func handmade(wide bool) []byte {
	f := make([]byte, 0x1100)
	copy(f, "\x7fELF\x01\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(f[0x10:], typeExec)
	le.PutUint16(f[0x12:], machine386)
	le.PutUint32(f[0x18:], 0x200000)
	if !wide {
		le.PutUint32(f[0x1c:], 0x34)
		le.PutUint16(f[0x2a:], 0x20)
		le.PutUint16(f[0x2c:], 1)
		copy(f[0x34:], words(segmentLoad, 0x100, 0x200000, 0x200000, 0x1000, 0x1000))
		return f
	}
	f[4] = class64
	le.PutUint16(f[0x12:], machineX64)
	le.PutUint64(f[0x20:], 0x40)
	le.PutUint16(f[0x36:], 0x38)
	le.PutUint16(f[0x38:], 1)
	copy(f[0x40:], quads(words(segmentLoad, 5), 0x100, 0x200000, 0x200000, 0x1000, 0x1000))
	return f
}

// TestVirtualEntry has an entry that is given by its virtual address, as kernels in the
// upper half do.
func TestVirtualEntry(t *testing.T) {
	image := handmade(true)
	binary.LittleEndian.PutUint64(image[0x50:], 0xffffffff80000000)
	binary.LittleEndian.PutUint64(image[0x18:], 0xffffffff80000010)
	if p := load(t, image, options); p.CPU.Entry != 0x200010 {
		t.Errorf("the entry is 0x%x, want 0x200010", p.CPU.Entry)
	}
}

func TestLayout(t *testing.T) {
	l := Layout{RAM: 5 << 30}
	want := []Window{{0, 0xa0000, 0}, {0x100000, 3 << 30, 0x100000}, {4 << 30, 6 << 30, 3 << 30}}
	if diff := cmp.Diff(want, l.Windows()); diff != "" {
		t.Errorf("windows (-want +got):\n%s", diff)
	}
	for offset, want := range map[uint64]addr.GPA{0: 0, 0x9ffff: 0x9ffff, 0x100000: 0x100000, 3<<30 - 1: 3<<30 - 1, 3 << 30: 4 << 30, 5<<30 - 1: 6<<30 - 1} {
		if got, ok := l.GPA(offset); !ok || got != want {
			t.Errorf("byte 0x%x of RAM is at %v, %v; want %v", offset, got, ok, want)
		}
	}
	for _, offset := range []uint64{0xa0000, 0xfffff, 5 << 30} {
		if got, ok := l.GPA(offset); ok {
			t.Errorf("byte 0x%x of RAM is at %v, want nowhere", offset, got)
		}
	}
	for ram, ok := range map[uint64]bool{MinRAM: true, MinRAM - addr.PageSize: false, MinRAM + 1: false, MaxRAM: true, MaxRAM + addr.PageSize: false} {
		if err := (Layout{RAM: ram}).Check(); (err == nil) != ok {
			t.Errorf("Check of %d bytes: %v", ram, err)
		}
	}
}

// TestTables walks the MP tables and ACPI's as an operating system does.
func TestTables(t *testing.T) {
	for _, vcpus := range []int{1, 2, MaxVCPUs} {
		o := options
		o.VCPUs = vcpus
		p := load(t, []byte{0xf4}, o)
		sums := func(what string, gpa addr.GPA, n int) {
			t.Helper()
			var sum byte
			for _, c := range p.at(t, gpa, n) {
				sum += c
			}
			if sum != 0 {
				t.Errorf("%s: the bytes add up to %d", what, sum)
			}
		}
		sums("MP pointer", mpAt, 16)
		table := addr.GPA(p.u32(t, mpAt+4))
		header := p.at(t, table, 44)
		length, entries := int(binary.LittleEndian.Uint16(header[4:])), int(binary.LittleEndian.Uint16(header[34:]))
		sums("MP table", table, length)
		body, kinds := p.at(t, table+44, length-44), map[byte]int{}
		for range entries {
			kinds[body[0]]++
			body = body[map[bool]int{true: 20, false: 8}[body[0] == 0]:]
		}
		if diff := cmp.Diff(map[byte]int{0: vcpus, 1: 1, 2: 1, 3: 15, 4: 2}, kinds); diff != "" || len(body) != 0 {
			t.Errorf("%d vCPUs: entries of the MP table, %d bytes left (-want +got):\n%s", vcpus, len(body), diff)
		}

		sums("RSDP", rsdpAt, 20)
		sums("RSDP, extended", rsdpAt, 36)
		lists := map[string][]string{}
		for _, root := range []struct {
			at   addr.GPA
			wide int
		}{{addr.GPA(p.u32(t, rsdpAt+16)), 4}, {addr.GPA(p.u64(t, rsdpAt+24)), 8}} {
			name, n := string(p.at(t, root.at, 4)), int(p.u32(t, root.at+4))
			sums(name, root.at, n)
			for at := acpiHeader; at < n; at += root.wide {
				child := addr.GPA(p.u32(t, root.at+addr.GPA(at)))
				lists[name] = append(lists[name], string(p.at(t, child, 4)))
				sums(lists[name][len(lists[name])-1], child, int(p.u32(t, child+4)))
			}
		}
		if diff := cmp.Diff(map[string][]string{"RSDT": {"FACP", "APIC"}, "XSDT": {"FACP", "APIC"}}, lists); diff != "" {
			t.Errorf("tables of ACPI (-want +got):\n%s", diff)
		}
		dsdt := addr.GPA(p.u32(t, acpiAt+acpiFADT+40))
		sums("DSDT", dsdt, int(p.u32(t, dsdt+4)))
		if dsdt != addr.GPA(p.u64(t, acpiAt+acpiFADT+140)) {
			t.Error("the FADT has two addresses of the DSDT")
		}
	}
}

func TestNames(t *testing.T) {
	if got := []string{Detect.String(), BzImage.String(), Format(99).String(), Real.String(), User.String(), Mode(99).String()}; !slices.Equal(got, []string{"detect", "bzimage", "format(99)", "real", "user", "mode(99)"}) {
		t.Errorf("names are %q", got)
	}
}

// fuzz gives a loader any file: there is an error that says which field, or a plan that holds.
func fuzz(f *testing.F, format Format, seeds ...[]byte) {
	for _, s := range seeds {
		f.Add(s, "x=1", []byte("initrd"))
	}
	f.Fuzz(func(t *testing.T, image []byte, cmdline string, initrd []byte) {
		o := Options{Layout: Layout{RAM: 16 << 20}, Format: format, CmdLine: cmdline, Name: "fuzz"}
		if len(initrd) > 0 {
			o.Modules = []Module{{"initrd", initrd}}
		}
		p, err := Load(image, o)
		if err != nil {
			var bad *Error
			if !errors.As(err, &bad) && !errors.Is(err, ErrOptions) || p != nil {
				t.Fatalf("Load returned %v, %v", p, err)
			}
			return
		}
		checkPlan(t, o, p)
	})
}

func FuzzFlat(f *testing.F)      { fuzz(f, Flat, []byte{0xf4}) }
func FuzzELF(f *testing.F)       { fuzz(f, ELF, handmade(true), handmade(false)) }
func FuzzPVH(f *testing.F)       { fuzz(f, PVH, handmade(true), handmade(false)) }
func FuzzMultiboot(f *testing.F) { fuzz(f, Multiboot, kludge(), handmade(false)) }
func FuzzBzImage(f *testing.F)   { fuzz(f, BzImage, linux()) }
func FuzzDetect(f *testing.F)    { fuzz(f, Detect, linux(), kludge(), handmade(true)) }
