package vm

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/arch/x86/x86asm"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/kvm"
)

func TestOperands(t *testing.T) {
	regs := kvm.Regs{
		Rax: 0x1000, Rbx: 0x2000, Rcx: 0x3000, Rdx: 3, Rsi: 0x5000, Rdi: 0x6000, Rsp: 0x7000, Rbp: 0x8000,
		R8: 0x9000, R15: 0xffffffff_00000010, Rip: 0x10000,
	}
	sregs := kvm.Sregs{FS: kvm.Segment{Base: 0x100000}, GS: kvm.Segment{Base: 0x200000}}
	for name, tt := range map[string]struct {
		code []byte
		want []operand
	}{
		"mov (%rax), %rcx":         {[]byte{0x48, 0x8b, 0x08}, []operand{{0x1000, 8, addr.Read}}},
		"mov %ecx, -8(%rbx)":       {[]byte{0x89, 0x4b, 0xf8}, []operand{{0x1ff8, 4, addr.Write}}},
		"movb $1, 4(%rax,%rdx,8)":  {[]byte{0xc6, 0x44, 0xd0, 0x04, 1}, []operand{{0x1000 + 3*8 + 4, 1, addr.Write}}},
		"incq (%rax)":              {[]byte{0x48, 0xff, 0x00}, []operand{{0x1000, 8, addr.ReadWrite}}},
		"lock xadd %rcx, (%rbx)":   {[]byte{0xf0, 0x48, 0x0f, 0xc1, 0x0b}, []operand{{0x2000, 8, addr.ReadWrite}}},
		"mov 0x10(%rip), %rax":     {[]byte{0x48, 0x8b, 0x05, 0x10, 0, 0, 0}, []operand{{0x10000 + 7 + 0x10, 8, addr.Read}}},
		"mov %fs:0x28, %rax":       {[]byte{0x64, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0}, []operand{{0x100028, 8, addr.Read}}},
		"mov %gs:(%rbx), %al":      {[]byte{0x65, 0x8a, 0x03}, []operand{{0x202000, 1, addr.Read}}},
		"mov (%r15d), %eax":        {[]byte{0x67, 0x41, 0x8b, 0x07}, []operand{{0x10, 4, addr.Read}}},
		"push %rax":                {[]byte{0x50}, []operand{{0x6ff8, 8, addr.Write}}},
		"push (%rbx)":              {[]byte{0xff, 0x33}, []operand{{0x2000, 8, addr.Read}, {0x6ff8, 8, addr.Write}}},
		"pop %rax":                 {[]byte{0x58}, []operand{{0x7000, 8, addr.Read}}},
		"ret":                      {[]byte{0xc3}, []operand{{0x7000, 8, addr.Read}}},
		"call":                     {[]byte{0xe8, 0, 0, 0, 0}, []operand{{0x6ff8, 8, addr.Write}}},
		"leave":                    {[]byte{0xc9}, []operand{{0x8000, 8, addr.Read}}},
		"stosq":                    {[]byte{0x48, 0xab}, []operand{{0x6000, 8, addr.Write}}},
		"rep movsb":                {[]byte{0xf3, 0xa4}, []operand{{0x6000, 1, addr.Write}, {0x5000, 1, addr.Read}}},
		"lea (%rax), %rcx":         {[]byte{0x48, 0x8d, 0x08}, nil},
		"nopw (%rax)":              {[]byte{0x66, 0x0f, 0x1f, 0x00}, nil},
		"mov %rax, %rcx":           {[]byte{0x48, 0x89, 0xc1}, nil},
		"movdqu (%rax), %xmm0":     {[]byte{0xf3, 0x0f, 0x6f, 0x00}, []operand{{0x1000, 16, addr.Read}}},
		"movups %xmm0, (%rax)":     {[]byte{0x0f, 0x11, 0x00}, []operand{{0x1000, 16, addr.Write}}},
		"cmp %rax, (%rbx)":         {[]byte{0x48, 0x39, 0x03}, []operand{{0x2000, 8, addr.Read}}},
		"repe cmpsb":               {[]byte{0xf3, 0xa6}, []operand{{0x5000, 1, addr.Read}, {0x6000, 1, addr.Read}}},
		"lodsb":                    {[]byte{0xac}, []operand{{0x5000, 1, addr.Read}}},
		"call *(%rbx)":             {[]byte{0xff, 0x13}, []operand{{0x2000, 8, addr.Read}, {0x6ff8, 8, addr.Write}}},
		"pop (%rbx)":               {[]byte{0x8f, 0x03}, []operand{{0x2000, 8, addr.Write}, {0x7000, 8, addr.Read}}},
		"divq (%rbx)":              {[]byte{0x48, 0xf7, 0x33}, []operand{{0x2000, 8, addr.Read}}},
		"lock cmpxchg %rcx,(%rbx)": {[]byte{0xf0, 0x48, 0x0f, 0xb1, 0x0b}, []operand{{0x2000, 8, addr.ReadWrite}}},
		"sete (%rbx)":              {[]byte{0x0f, 0x94, 0x03}, []operand{{0x2000, 1, addr.Write}}},
		"faddl (%rbx)":             {[]byte{0xdc, 0x03}, []operand{{0x2000, 8, addr.Read}}},
		"fstpl (%rbx)":             {[]byte{0xdd, 0x1b}, []operand{{0x2000, 8, addr.Write}}},
		"prefetcht0 (%rbx)":        {[]byte{0x0f, 0x18, 0x0b}, []operand{{0x2000, 1, addr.Read}}},
	} {
		t.Run(name, func(t *testing.T) {
			inst, err := x86asm.Decode(tt.code, 64)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, operands(&inst, &regs, &sregs), cmp.AllowUnexported(operand{})); diff != "" {
				t.Errorf("operands of %s (-want +got):\n%s", inst, diff)
			}
		})
	}
}

// TestOperandsOfOtherModes is TestOperands for 16-bit and 32-bit code, whose segments have bases.
func TestOperandsOfOtherModes(t *testing.T) {
	regs := kvm.Regs{Rbx: 0x2000, Rsi: 0xf000, Rdi: 0x6000, Rsp: 0x17000, Rbp: 0x8000}
	sregs := kvm.Sregs{
		CS: kvm.Segment{Base: 0x10000}, DS: kvm.Segment{Base: 0x20000}, ES: kvm.Segment{Base: 0x30000},
		SS: kvm.Segment{Base: 0x40000}, FS: kvm.Segment{Base: 0xfffff000},
	}
	for name, tt := range map[string]struct {
		mode int
		code []byte
		want []operand
	}{
		"mov (%bx,%si), %ax":   {16, []byte{0x8b, 0x00}, []operand{{0x21000, 2, addr.Read}}}, // an offset has 16 bits
		"mov 2(%bp), %ax":      {16, []byte{0x8b, 0x46, 2}, []operand{{0x48002, 2, addr.Read}}},
		"mov %al, %es:(%bx)":   {16, []byte{0x26, 0x88, 0x07}, []operand{{0x32000, 1, addr.Write}}},
		"mov %al, %cs:(%bx)":   {16, []byte{0x2e, 0x88, 0x07}, []operand{{0x12000, 1, addr.Write}}},
		"push %ax":             {16, []byte{0x50}, []operand{{0x40000 + 0x6ffe, 2, addr.Write}}},
		"movsb":                {16, []byte{0xa4}, []operand{{0x36000, 1, addr.Write}, {0x2f000, 1, addr.Read}}},
		"mov (%ebx), %eax":     {32, []byte{0x8b, 0x03}, []operand{{0x22000, 4, addr.Read}}},
		"mov %eax, (%ebp)":     {32, []byte{0x89, 0x45, 0}, []operand{{0x48000, 4, addr.Write}}},
		"mov %fs:(%ebx), %eax": {32, []byte{0x64, 0x8b, 0x03}, []operand{{0x1000, 4, addr.Read}}},
		"call":                 {32, []byte{0xe8, 0, 0, 0, 0}, []operand{{0x40000 + 0x6ffc, 4, addr.Write}}},
		"ret":                  {32, []byte{0xc3}, []operand{{0x47000, 4, addr.Read}}},
		"pusha":                {32, []byte{0x60}, []operand{{0x40000 + 0x6fe0, 32, addr.Write}}},
		"popa":                 {32, []byte{0x61}, []operand{{0x47000, 32, addr.Read}}},
	} {
		t.Run(name, func(t *testing.T) {
			inst, err := x86asm.Decode(tt.code, tt.mode)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, operands(&inst, &regs, &sregs), cmp.AllowUnexported(operand{})); diff != "" {
				t.Errorf("operands of %s (-want +got):\n%s", inst, diff)
			}
		})
	}
}

func TestCodeMode(t *testing.T) {
	long := kvm.Segment{L: 1, Base: 0x1000}
	for name, tt := range map[string]struct {
		sregs kvm.Sregs
		bits  int
		at    addr.GVA
	}{
		"64": {kvm.Sregs{EFER: eferLMA, CS: long}, 64, 0x1_0000_0010},
		"32": {kvm.Sregs{CS: kvm.Segment{DB: 1, Base: 0x1000}}, 32, 0x1010},
		"16": {kvm.Sregs{CS: kvm.Segment{Base: 0xf0000}}, 16, 0xf0010},
	} {
		if bits, at := codeMode(&tt.sregs, 0x1_0000_0010); bits != tt.bits || at != tt.at {
			t.Errorf("%s: %d bits at %v, want %d at %v", name, bits, at, tt.bits, tt.at)
		}
	}
}

// FuzzOperands decodes any bytes with any registers: at worst nothing is found.
func FuzzOperands(f *testing.F) {
	f.Add([]byte{0x48, 0x8b, 0x08}, uint64(1))
	f.Fuzz(func(t *testing.T, code []byte, v uint64) {
		inst, err := x86asm.Decode(code, []int{16, 32, 64, 64}[v%4])
		if err != nil {
			return
		}
		regs := kvm.Regs{Rax: v, Rbx: v, Rcx: v, Rdx: v, Rsi: v, Rdi: v, Rsp: v, Rbp: v, R8: v, R9: v, R12: v, R13: v, Rip: v}
		for _, op := range operands(&inst, &regs, &kvm.Sregs{}) {
			if op.n <= 0 || op.n > addr.PageSize {
				t.Errorf("%v has an operand of %d bytes", inst, op.n)
			}
		}
	})
}
