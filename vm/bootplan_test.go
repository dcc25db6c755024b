package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/kvm"
)

// newPC returns a machine with an image in it that is closed with the test.
func newPC(t testing.TB, c Config, image []byte, o boot.Options) *Machine {
	t.Helper()
	gvmtest.Need(t, gvmtest.KVM)
	if c.RAM == 0 {
		c.RAM = 64 << 20
	}
	if c.Board == Bare {
		c.Board = PC
	}
	o.Layout, o.VCPUs = boot.Layout{RAM: c.RAM}, c.VCPUs
	plan, err := boot.Load(image, o)
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := m.BootPlan(plan); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestImages runs the images of package boot, whose tests have compared with QEMU what they
// are said to do.
func TestImages(t *testing.T) {
	texts, err := filepath.Glob("../boot/images/*.txt")
	if err != nil || len(texts) < 3 {
		t.Fatalf("there are %d images, %v", len(texts), err)
	}
	for _, text := range texts {
		name := strings.TrimSuffix(text, ".txt")
		t.Run(filepath.Base(name), func(t *testing.T) {
			image, err := os.ReadFile(name + ".elf")
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(text)
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			m := newPC(t, Config{VCPUs: 2, Console: &out}, image, boot.Options{})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			status, err := m.Run(ctx)
			if err != nil {
				t.Errorf("the image printed %q, then: %v", out.String(), err)
			}
			if diff := cmp.Diff(string(want), fmt.Sprintf("%sexit status %d\n", out.String(), status)); diff != "" {
				t.Errorf("(-QEMU +gvm):\n%s", diff)
			}
			if err := m.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "turned it off") {
				t.Errorf("a machine that is off was started again: %v", err)
			}
		})
	}
}

// exitPort is code that writes al to the port of isa-debug-exit.
var exitPort = []byte{0xe6, 0xf4}

// TestModes has a few instructions in each mode.
func TestModes(t *testing.T) {
	for mode, code := range map[boot.Mode][]byte{
		boot.Real:      {0xb8, 0x34, 0x12, 0x88, 0xe0, 0xe6, 0xe9},                      // mov $0x1234, %ax; mov %ah, %al; out %al, $0xe9
		boot.Protected: {0xb8, 0x12, 0, 0, 0, 0x50, 0x58, 0xe6, 0xe9},                   // mov $0x12, %eax; push %eax; pop %eax; out
		boot.Long:      {0x48, 0xb8, 0x12, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x58, 0xe6, 0xe9}, // mov $0x12, %rax; push; pop; out
		boot.User:      {0x66, 0x8c, 0xc8, 0x04, 0xff, 0xe6, 0xe9},                      // mov %cs, %ax; add $-1, %al: 0x12; out
	} {
		t.Run(mode.String(), func(t *testing.T) {
			var out bytes.Buffer
			code := append(append(slices.Clone(code), 0xb0, 5), exitPort...)
			m := newPC(t, Config{Board: Polled, Console: &out}, code, boot.Options{Mode: mode})
			if status, err := m.Run(t.Context()); status != 11 || err != nil || out.String() != "\x12" {
				t.Errorf("printed %q, status %d, %v", out.String(), status, err)
			}
		})
	}
}

// TestHLT has a flat image end by HLT, and one wait for an interrupt that does not come.
func TestHLT(t *testing.T) {
	m := newPC(t, Config{Board: Polled}, []byte{0xf4}, boot.Options{})
	if status, err := m.Run(t.Context()); status != 0 || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
	m = newPC(t, Config{VCPUs: 2}, []byte{0xfa, 0xf4}, boot.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := m.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a guest that waits: %v", err)
	}
}

// TestHoles has a guest use memory where there is no RAM, and RAM on both sides of it, which
// is unmapped meanwhile.
func TestHoles(t *testing.T) {
	code := []byte{
		0xa1, 0x00, 0x80, 0x0b, 0x00, // mov 0xb8000, %eax: video memory, which there is not
		0xa3, 0x00, 0x90, 0x0b, 0x00, // mov %eax, 0xb9000
		0xa3, 0xfc, 0xff, 0x09, 0x00, // mov %eax, 0x9fffc
		0xa3, 0x00, 0x00, 0x20, 0x00, // mov %eax, 0x200000
		0x40, 0xe6, 0xf4, // inc %eax; out %al, $0xf4: 1 if it was all ones
	}
	m := newPC(t, Config{Touch: Stop}, code, boot.Options{Mode: boot.Protected, At: 0x100000})
	if status, err := m.Run(t.Context()); status != 1 || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
	for _, gpa := range []addr.GPA{0x9fff8, 0x200000} {
		if v, err := m.Load64(gpa &^ 7); err != nil || v>>32 != 0xffffffff && uint32(v) != 0xffffffff {
			t.Errorf("the 8 bytes at %v are 0x%x, %v", gpa, v, err)
		}
	}

	m = newPC(t, Config{Touch: Stop}, code, boot.Options{Mode: boot.Protected, At: 0x100000})
	page := addr.HVAs(m.RAM().Range.Start+0x200000, addr.PageSize)
	if err := m.Memory().Unmap(page); err != nil {
		t.Fatal(err)
	}
	_, err := m.Run(t.Context())
	var failed *ExitError
	if !errors.As(err, &failed) || failed.GPA != 0x200000 || failed.Change == nil {
		t.Errorf("a guest that uses what was unmapped: %v", err)
	}
}

// TestRAMAddr goes from RAM to guest addresses and back.
func TestRAMAddr(t *testing.T) {
	pc := &Machine{config: Config{Board: PC, RAM: 4 << 30}}
	bare := &Machine{config: Config{RAM: 1 << 20}}
	for _, tt := range []struct {
		m      *Machine
		offset uint64
		gpa    addr.GPA
		ok     bool
	}{
		{pc, 0, 0, true},
		{pc, 0xa0000, 0, false},
		{pc, 0x100000, 0x100000, true},
		{pc, 3 << 30, 4 << 30, true},
		{pc, 4 << 30, 0, false},
		{bare, 0, guests.RAMBase, true},
		{bare, 0xfffff, guests.RAMBase + 0xfffff, true},
	} {
		gpa, ok := tt.m.RAMAddr(tt.offset)
		if gpa != tt.gpa || ok != tt.ok {
			t.Errorf("%v: byte 0x%x of RAM is at %v, %v; want %v, %v", tt.m.config.Board, tt.offset, gpa, ok, tt.gpa, tt.ok)
		}
		if offset, ok := tt.m.RAMOffset(gpa); tt.ok && (offset != tt.offset || !ok) {
			t.Errorf("%v: at %v there is byte 0x%x of RAM, %v; want 0x%x", tt.m.config.Board, gpa, offset, ok, tt.offset)
		}
	}
	for _, gpa := range []addr.GPA{0xa0000, 0xf0000, 3 << 30, 5 << 30} {
		if offset, ok := pc.RAMOffset(gpa); ok {
			t.Errorf("at %v there is byte 0x%x of RAM", gpa, offset)
		}
	}
}

func TestBoardConfig(t *testing.T) {
	for says, c := range map[string]Config{
		"has one vCPU, not 2":                 {Board: Polled, RAM: 2 << 20, VCPUs: 2},
		"are not what a PC can have":          {Board: PC, RAM: 1 << 20},
		"there is no board(9)":                {Board: 9, RAM: 2 << 20},
		"the board pc has no ring":            {Board: PC, RAM: 2 << 20, Ring0: true},
		"65 vCPUs are not in 1 to 64":         {Board: PC, RAM: 2 << 20, VCPUs: 65},
		"257 vCPUs are not in 1 to":           {RAM: 2 << 20, VCPUs: 257},
		"are more than the 274875809792 that": {RAM: 1 << 40},
	} {
		if _, err := New(c); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), says) {
			t.Errorf("New(%+v) returned %v, want %q in it", c, err, says)
		}
	}
}

// TestWrongBoard has a machine booted with what is not for its board.
func TestWrongBoard(t *testing.T) {
	m := &Machine{config: Config{Board: PC}}
	if err := m.BootImage("x", []byte{0x90}); err == nil || !strings.Contains(err.Error(), "board is pc") {
		t.Errorf("a built-in guest on a PC: %v", err)
	}
	m = &Machine{}
	if err := m.BootPlan(&boot.Plan{}); err == nil || !strings.Contains(err.Error(), "board is bare") {
		t.Errorf("an image on a bare board: %v", err)
	}
}

// TestBoardCPUID checks that each vCPU is told its own number, and how many there are.
func TestBoardCPUID(t *testing.T) {
	supported := []kvm.CPUIDEntry{
		{Function: 0, EAX: 0x20}, {Function: 1, EBX: 0x00800, ECX: ecxX2APIC, EDX: edxAPIC},
		{Function: 4, Index: 0, EAX: 0x121}, {Function: 4, Index: 3}, {Function: 7, ECX: ecxLA57 | 1}, {Function: 7, Index: 1, ECX: ecxLA57}, {Function: 0xb}, {Function: 0x1f},
		{Function: 0x80000008, EAX: 0x3928}, {Function: 0x8000001e},
	}
	before := slices.Clone(supported)
	got := boardCPUID(supported, 2, 3, true, true)
	want := []kvm.CPUIDEntry{
		{Function: 0, EAX: 0x20}, {Function: 1, EBX: 0x2030800, ECX: ecxX2APIC | ecxTSCDeadline | ecxHypervisor, EDX: edxAPIC | edxHTT},
		{Function: 4, Index: 0, EAX: 2<<26 | 0x121}, {Function: 4, Index: 3}, {Function: 7, ECX: 1}, {Function: 7, Index: 1, ECX: ecxLA57},
		{Function: 0x80000008, EAX: 0x3028, ECX: 2<<12 | 2}, {Function: 0x8000001e, EAX: 2, EBX: 2},
		{Function: 0xb, Index: 0, Flags: 1, EBX: 1, ECX: 0x100, EDX: 2},
		{Function: 0xb, Index: 1, Flags: 1, EAX: 2, EBX: 3, ECX: 0x201, EDX: 2},
		{Function: 0xb, Index: 2, Flags: 1, ECX: 2, EDX: 2},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(kvm.CPUIDEntry{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !slices.Equal(before, supported) {
		t.Error("what KVM supports was changed")
	}
	if got := boardCPUID(supported, 0, 1, false, true)[1]; got.EBX != 0x10800 || got.ECX != ecxHypervisor || got.EDX != 0 {
		t.Errorf("without interrupt controllers, function 1 is %+v", got)
	}
}

// TestImageIsTracked runs an image on two processors, with each source of dirty pages: all that
// it has changed, on both sides of the hole, is in the harvest.
func TestImageIsTracked(t *testing.T) {
	image, err := os.ReadFile("../boot/images/processors.elf")
	if err != nil {
		t.Fatal(err)
	}
	for s := range sources {
		source := DirtySource(s)
		t.Run(source.String(), func(t *testing.T) {
			if source == WriteProtect {
				gvmtest.Need(t, gvmtest.UFFD)
			}
			c := Config{RAM: 2 << 20, VCPUs: 2, Dirty: source}
			m := newPC(t, c, image, boot.Options{})
			if err := m.LogDirty(true); err != nil {
				t.Fatal(err)
			}
			harvest := func() *dirty.Harvest {
				h, err := m.Harvest(t.Context())
				if err == nil {
					err = h.Commit()
				}
				if err != nil {
					t.Fatal(err)
				}
				return h
			}
			read := func() []byte {
				p := make([]byte, c.RAM)
				for _, w := range m.config.layout().Windows() {
					if err := m.ReadGuest(w.Start, p[w.Start:w.End]); err != nil {
						t.Fatal(err)
					}
				}
				return p
			}
			harvest()
			before := read()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if status, err := m.Run(ctx); status != 1 || err != nil {
				t.Fatalf("status %d, %v", status, err)
			}
			after, changed := read(), 0
			set := harvest().Dirty()
			for at := 0; at < len(after); at += addr.PageSize {
				if bytes.Equal(before[at:at+addr.PageSize], after[at:at+addr.PageSize]) {
					continue
				}
				changed++
				if gfn := addr.GPA(at).GFN(); !set.Contains(gfn) {
					t.Errorf("%v has changed, and is not in the harvest", gfn)
				}
			}
			if changed < 3 || !set.Contains(0x8) {
				t.Errorf("%d pages have changed, the one that the second processor began in: %v", changed, set.Contains(0x8))
			}
		})
	}
}

// TestLinux starts the kernel of the distribution, if there is one, has it print its banner and
// the memory map that it was given, and run an init of a few instructions, which says so and
// turns the machine off. Meanwhile pages of its RAM are moved away and back, wherever they are.
// With -short the memory map is enough.
func TestLinux(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	kernels, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(kernels) == 0 {
		gvmtest.Lack(t, gvmtest.Kernel, fmt.Errorf("there is no /boot/vmlinuz-*-cloud-amd64, which Debian's package linux-image-cloud-amd64 has"))
	}
	image, err := os.ReadFile(kernels[0])
	if err != nil {
		t.Fatal(err)
	}
	const greeting, mapped = "init is here", "BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable"
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	enough := errors.New("the memory map has been printed")
	out := untilSeen{f: func() {}}
	if testing.Short() {
		out.text, out.f = mapped, func() { stop(enough) }
	}
	const moved = 16 * addr.PageSize
	m := newPC(t, Config{RAM: 256 << 20, Spare: moved, VCPUs: 2, Console: &out}, image, boot.Options{
		// The order is of importance: what there is to say before "quiet" is said.
		CmdLine: "earlyprintk=ttyS0 quiet console=ttyS0 panic=-1 mitigations=off",
		Modules: []boot.Module{{Name: "initrd", Data: initrd(greeting)}},
	})
	lack, limit := kernelLack(t), 100*time.Second
	if lack != nil {
		limit = 5 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	begin := time.Now()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	rng, moves := gvmtest.Rand(t), 0
	for running := true; running; {
		select {
		case <-m.Done():
			running = false
			continue
		case <-time.After(500 * time.Millisecond): // KVM forgets all of its mappings each time
		}
		offset := 1<<20 + addr.HVA(rng.Uint64N(m.RAM().Range.NPages()-256-16))*addr.PageSize
		pages := addr.HVAs(m.RAM().Range.Start+offset, moved)
		if err := m.Memory().Remap(pages, m.Spare().Range.Start); err != nil {
			t.Fatal(err)
		}
		if err := m.Memory().Remap(m.Spare().Range, pages.Start); err != nil {
			t.Fatal(err)
		}
		moves++
	}
	status, err := m.Wait()
	text := out.String()
	if lack != nil && err != nil {
		gvmtest.Lack(t, gvmtest.KVMCaps, fmt.Errorf("%w; the kernel got as far as %q, then: %w", lack, text, err))
	}
	t.Logf("in %v, with %d moves, the kernel has printed\n%s", time.Since(begin), moves, text)
	wants := []string{"Linux version ", mapped, greeting}
	if testing.Short() && errors.Is(err, enough) {
		wants, err = wants[:2], nil
	}
	if status != 0 || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("it has not printed %q", want)
		}
	}
	if strings.Contains(text, "CPU1") {
		t.Error("its second processor did not start")
	}
}

// elfCode is where the code of elf64 is in memory.
const elfCode = 0x400078

// elf64 returns an ELF file of one segment, which begins with its code.
func elf64(code []byte) []byte {
	le := binary.LittleEndian
	file := append(make([]byte, 0x78), code...)
	copy(file, "\x7fELF\x02\x01\x01")
	le.PutUint16(file[0x10:], 2)
	le.PutUint16(file[0x12:], 62)
	le.PutUint32(file[0x14:], 1)
	le.PutUint64(file[0x18:], elfCode)
	le.PutUint64(file[0x20:], 0x40)
	for i, v := range []uint16{0x40, 0x38, 1} {
		le.PutUint16(file[0x34+2*i:], v)
	}
	le.PutUint32(file[0x40:], 1)
	le.PutUint32(file[0x44:], 5)
	for i, v := range []uint64{elfCode &^ addr.PageMask, elfCode &^ addr.PageMask, uint64(len(file)), uint64(len(file)), addr.PageSize} {
		le.PutUint64(file[0x50+8*i:], v)
	}
	return file
}

// TestELF64 has an image find what it is told.
func TestELF64(t *testing.T) {
	code := []byte{
		0x8b, 0x07, 0x3d, 0x78, 0xc5, 0x6e, 0x33, // mov (%rdi), %eax; cmp start information's magic, %eax
		0x0f, 0x94, 0xc0, 0xe6, 0xf4, // sete %al; out %al, $0xf4
	}
	for _, mode := range []boot.Mode{boot.Default, boot.User} {
		if status, err := newPC(t, Config{}, elf64(code), boot.Options{Mode: mode}).Run(t.Context()); status != 3 || err != nil {
			t.Errorf("in mode %v: status %d, %v", mode, status, err)
		}
	}
}

// untilSeen is a console that calls f when a text, if there is one, has been printed.
type untilSeen struct {
	bytes.Buffer
	text string
	f    func()
}

func (u *untilSeen) Write(p []byte) (int, error) {
	n, err := u.Buffer.Write(p)
	if u.text != "" && bytes.Contains(u.Bytes(), []byte(u.text)) {
		u.f()
	}
	return n, err
}

// kernelLack returns why the host cannot run a kernel to its end; nil: it can.
func kernelLack(t *testing.T) error {
	// mov %cr3, %rcx; mov %rcx, %rax; shr $12, %rax; out %al, $0xf4
	m := newPC(t, Config{}, []byte{0x0f, 0x20, 0xd9, 0x48, 0x89, 0xc8, 0x48, 0xc1, 0xe8, 0x0c, 0xe6, 0xf4}, boot.Options{Mode: boot.Long})
	status, err := m.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := int(boot.PageTables>>12<<1|1) & 0xff; status != want {
		return errors.New("a guest that reads CR3 is given another one: KVM shadows its page tables, and the processor, which may be emulated, does not tell KVM of the read")
	}
	var took [2]time.Duration
	for i := range took {
		m := newMachine(t, Config{Ring0: i == 1}, "loop", guests.Args{"iterations": 20000})
		begin := time.Now()
		mustRun(t, m)
		took[i] = time.Since(begin)
	}
	if took[1] > 100*took[0] {
		return fmt.Errorf("ring 0 is emulated: what takes %v in ring 3 takes %v", took[0], took[1])
	}
	return nil
}

// initrd returns an archive, as cpio makes it, that has nothing but an init, which prints a text and
// turns the machine off.
func initrd(text string) []byte {
	code := []byte{
		0xbf, 1, 0, 0, 0, 0xbe, 0, 0, 0, 0, 0xba, byte(len(text) + 1), 0, 0, 0, // mov $1, %edi; mov text, %esi; mov length, %edx
		0xb8, 1, 0, 0, 0, 0x0f, 0x05, // mov write, %eax; syscall
		0xbf, 0xad, 0xde, 0xe1, 0xfe, 0xbe, 0x69, 0x19, 0x12, 0x28, 0xba, 0xdc, 0xfe, 0x21, 0x43, // its magic, its other magic, off
		0xb8, 169, 0, 0, 0, 0x0f, 0x05, // mov reboot, %eax; syscall
		0xeb, 0xfe,
	}
	binary.LittleEndian.PutUint32(code[6:], uint32(elfCode+len(code)))
	file := elf64(append(code, text+"\n"...))

	var archive []byte
	pad := func() {
		for len(archive)%4 != 0 {
			archive = append(archive, 0)
		}
	}
	for _, f := range []struct {
		name string
		mode int
		data []byte
	}{{"init", 0o100755, file}, {"TRAILER!!!", 0, nil}} {
		// inode, mode, owner, group, links, time, size, four numbers of devices, length of the name, checksum
		archive = fmt.Appendf(archive, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 0, f.mode, 0, 0, 1, 0, len(f.data), 0, 0, 0, 0, len(f.name)+1, 0)
		archive = append(append(archive, f.name...), 0)
		pad()
		archive = append(archive, f.data...)
		pad()
	}
	return archive
}

// TestRandomPorts has a guest write random values to random ports and memory: it ends nothing
// but itself.
func TestRandomPorts(t *testing.T) {
	rng := gvmtest.Rand(t)
	ends := time.Now().Add(gvmtest.StormLasts(2 * time.Second))
	for round := 0; time.Now().Before(ends); round++ {
		m := newPC(t, Config{VCPUs: 1 + rng.IntN(2), Console: io.Discard}, randomCode(rng), boot.Options{Mode: boot.Protected})
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		status, err := m.Run(ctx)
		cancel()
		var failed *ExitError
		if err != nil && !errors.As(err, &failed) && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("round %d: status %d, %v", round, status, err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// randomCode returns 32-bit code that uses ports and memory that may not be there, for ever.
func randomCode(rng *rand.Rand) []byte {
	var code []byte
	word := func(v uint32) { code = append(code, byte(v), byte(v>>8), byte(v>>16), byte(v>>24)) }
	for range 200 {
		port := uint32(rng.IntN(1 << 16))
		if rng.IntN(2) == 0 {
			port = []uint32{0x20, 0x40, 0x60, 0x70, 0xa0, 0xe0, 0xe4, 0x3f8, 0x510, 0x600, 0xcf8, 0x2000}[rng.IntN(12)] + uint32(rng.IntN(8))
		}
		code = append(code, 0xba) // mov port, %edx
		word(port)
		code = append(code, 0xb8) // mov value, %eax
		word(rng.Uint32())
		switch rng.IntN(8) {
		case 0:
			code = append(code, 0xec) // in %dx, %al
		case 1:
			code = append(code, 0x66, 0xed) // in %dx, %ax
		case 2:
			code = append(code, 0xed) // in %dx, %eax
		case 3:
			code = append(code, 0x66, 0xef) // out %ax, %dx
		case 4:
			code = append(code, 0xef) // out %eax, %dx
		case 5:
			code = append(code, 0xa3) // mov %eax, memory
			word(0x80000000 | rng.Uint32())
		case 6:
			code = append(code, 0xa1) // mov memory, %eax
			word(0x80000000 | rng.Uint32())
		default:
			code = append(code, 0xee) // out %al, %dx
		}
	}
	code = append(code, 0xe9) // jmp to the first
	word(-uint32(len(code) + 4))
	return code
}
