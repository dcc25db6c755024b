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
		"mov (%rax), %rcx":        {[]byte{0x48, 0x8b, 0x08}, []operand{{0x1000, 8}}},
		"mov %ecx, -8(%rbx)":      {[]byte{0x89, 0x4b, 0xf8}, []operand{{0x1ff8, 4}}},
		"movb $1, 4(%rax,%rdx,8)": {[]byte{0xc6, 0x44, 0xd0, 0x04, 1}, []operand{{0x1000 + 3*8 + 4, 1}}},
		"incq (%rax)":             {[]byte{0x48, 0xff, 0x00}, []operand{{0x1000, 8}}},
		"lock xadd %rcx, (%rbx)":  {[]byte{0xf0, 0x48, 0x0f, 0xc1, 0x0b}, []operand{{0x2000, 8}}},
		"mov 0x10(%rip), %rax":    {[]byte{0x48, 0x8b, 0x05, 0x10, 0, 0, 0}, []operand{{0x10000 + 7 + 0x10, 8}}},
		"mov %fs:0x28, %rax":      {[]byte{0x64, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0}, []operand{{0x100028, 8}}},
		"mov %gs:(%rbx), %al":     {[]byte{0x65, 0x8a, 0x03}, []operand{{0x202000, 1}}},
		"mov (%r15d), %eax":       {[]byte{0x67, 0x41, 0x8b, 0x07}, []operand{{0x10, 4}}},
		"push %rax":               {[]byte{0x50}, []operand{{0x6ff8, 8}}},
		"push (%rbx)":             {[]byte{0xff, 0x33}, []operand{{0x2000, 8}, {0x6ff8, 8}}},
		"pop %rax":                {[]byte{0x58}, []operand{{0x7000, 8}}},
		"ret":                     {[]byte{0xc3}, []operand{{0x7000, 8}}},
		"call":                    {[]byte{0xe8, 0, 0, 0, 0}, []operand{{0x6ff8, 8}}},
		"leave":                   {[]byte{0xc9}, []operand{{0x8000, 8}}},
		"stosq":                   {[]byte{0x48, 0xab}, []operand{{0x6000, 8}}},
		"rep movsb":               {[]byte{0xf3, 0xa4}, []operand{{0x6000, 1}, {0x5000, 1}}},
		"lea (%rax), %rcx":        {[]byte{0x48, 0x8d, 0x08}, nil},
		"nopw (%rax)":             {[]byte{0x66, 0x0f, 0x1f, 0x00}, nil},
		"mov %rax, %rcx":          {[]byte{0x48, 0x89, 0xc1}, nil},
		"movdqu (%rax), %xmm0":    {[]byte{0xf3, 0x0f, 0x6f, 0x00}, []operand{{0x1000, 16}}},
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

// FuzzOperands decodes any bytes with any registers: at worst nothing is found.
func FuzzOperands(f *testing.F) {
	f.Add([]byte{0x48, 0x8b, 0x08}, uint64(1))
	f.Fuzz(func(t *testing.T, code []byte, v uint64) {
		inst, err := x86asm.Decode(code, 64)
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
