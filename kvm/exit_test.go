package kvm

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Offsets in a run area, from the kernel's header.
const (
	reasonAt  = 8
	unionAt   = 32
	ioDataAt  = 0x1000
	areaBytes = 0x3000
)

// area builds a run area: an exit reason, and the union as words.
func area(reason ExitReason, union ...uint64) []byte {
	a := alignedBytes(areaBytes)
	binary.LittleEndian.PutUint32(a[reasonAt:], uint32(reason))
	for i, w := range union {
		binary.LittleEndian.PutUint64(a[unionAt+8*i:], w)
	}
	return a
}

// ioArea builds the run area of an I/O exit with data.
func ioArea(direction, size uint8, port uint16, count uint32, offset uint64, data ...byte) []byte {
	a := area(ReasonIO, uint64(direction)|uint64(size)<<8|uint64(port)<<16|uint64(count)<<32, offset)
	copy(a[ioDataAt:], data)
	return a
}

// u64 packs bytes as memory has them.
func u64(b ...byte) uint64 { return binary.LittleEndian.Uint64(append(b, make([]byte, 8)...)) }

func TestDecode(t *testing.T) {
	const out = 1
	for name, tt := range map[string]struct {
		area []byte
		want Exit
		text string
	}{
		"out": {
			ioArea(out, 1, 0x3f8, 1, ioDataAt, 'h'),
			&IOExit{Port: 0x3f8, Size: 1, Count: 1, Data: []byte("h")},
			"KVM_EXIT_IO: out port 0x3f8, 1 of 1 bytes, data 68",
		},
		"rep outs": {
			ioArea(out, 4, 0x80, 2, ioDataAt, 1, 2, 3, 4, 5, 6, 7, 8, 9),
			&IOExit{Port: 0x80, Size: 4, Count: 2, Data: []byte{1, 2, 3, 4, 5, 6, 7, 8}},
			"KVM_EXIT_IO: out port 0x80, 2 of 4 bytes, data 0102030405060708",
		},
		"in does not see what the area has": {
			ioArea(exitIOIn, 2, 0x60, 1, ioDataAt, 0x5a, 0x5a),
			&IOExit{In: true, Port: 0x60, Size: 2, Count: 1, Data: []byte{0xff, 0xff}},
			"KVM_EXIT_IO: in port 0x60, 1 of 2 bytes",
		},
		"out of the area's last bytes": {
			ioArea(out, 4, 1, 1, areaBytes-4),
			&IOExit{Port: 1, Size: 4, Count: 1, Data: make([]byte, 4)},
			"KVM_EXIT_IO: out port 0x1, 1 of 4 bytes, data 00000000",
		},
		"MMIO write": {
			area(ReasonMMIO, 0xfee00000, u64(1, 2, 3, 4), 4|1<<32),
			&MMIOExit{GPA: 0xfee00000, Write: true, Data: []byte{1, 2, 3, 4}},
			"KVM_EXIT_MMIO: write gpa 0xfee00000, 4 bytes, data 01020304",
		},
		"MMIO read does not see what the area has": {
			area(ReasonMMIO, 0x8000, u64(0x5a, 0x5a), 2),
			&MMIOExit{GPA: 0x8000, Data: []byte{0xff, 0xff}},
			"KVM_EXIT_MMIO: read gpa 0x8000, 2 bytes",
		},
		"hlt":             {area(ReasonHLT), &HLTExit{}, "KVM_EXIT_HLT"},
		"shutdown":        {area(ReasonShutdown), &ShutdownExit{}, "KVM_EXIT_SHUTDOWN"},
		"intr":            {area(ReasonIntr), &IntrExit{}, "KVM_EXIT_INTR"},
		"irq window":      {area(ReasonIRQWindowOpen), &IRQWindowExit{}, "KVM_EXIT_IRQ_WINDOW_OPEN"},
		"dirty ring full": {area(ReasonDirtyRingFull), &DirtyRingFullExit{}, "KVM_EXIT_DIRTY_RING_FULL"},
		"fail entry": {
			area(ReasonFailEntry, 0x80000021, 3),
			&FailEntryExit{HardwareReason: 0x80000021, CPU: 3},
			"KVM_EXIT_FAIL_ENTRY: hardware reason 0x80000021 on CPU 3",
		},
		"internal error": {
			area(ReasonInternalError, SuberrorDeliveryEv|2<<32, 0xa, 0xb, 0xc),
			&InternalErrorExit{Suberror: SuberrorDeliveryEv, Data: []uint64{0xa, 0xb}},
			"KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_DELIVERY_EV, data [0xa 0xb]",
		},
		"emulation failure": {
			area(ReasonInternalError, SuberrorEmulation|3<<32, emulationInsnIsValid, u64(2, 0x0f, 0x0b, 0x90)),
			&InternalErrorExit{Suberror: SuberrorEmulation, Data: []uint64{1, u64(2, 0x0f, 0x0b, 0x90), 0}, Instruction: []byte{0x0f, 0x0b}},
			"KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_EMULATION, instruction 0f 0b",
		},
		"emulation failure without the flag": {
			area(ReasonInternalError, SuberrorEmulation|3<<32, 0, u64(2, 0x0f, 0x0b)),
			&InternalErrorExit{Suberror: SuberrorEmulation, Data: []uint64{0, u64(2, 0x0f, 0x0b), 0}},
			"KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_EMULATION, data [0x0 0xb0f02 0x0]",
		},
		"emulation failure of an old kernel": {
			area(ReasonInternalError, SuberrorEmulation, emulationInsnIsValid, u64(2, 0x0f, 0x0b)),
			&InternalErrorExit{Suberror: SuberrorEmulation, Data: []uint64{}},
			"KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_EMULATION, data []",
		},
		"emulation failure that claims 255 bytes": {
			area(ReasonInternalError, SuberrorEmulation|3<<32, emulationInsnIsValid, u64(255)),
			&InternalErrorExit{Suberror: SuberrorEmulation, Data: []uint64{1, 255, 0}, Instruction: make([]byte, 15)},
			"KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_EMULATION, instruction 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
		},
		"unnamed internal error": {
			area(ReasonInternalError, 77),
			&InternalErrorExit{Suberror: 77, Data: []uint64{}},
			"KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR(77), data []",
		},
		"system event": {
			area(ReasonSystemEvent, uint64(SystemEventReset)|1<<32, 0x55),
			&SystemEventExit{Type: SystemEventReset, Data: []uint64{0x55}},
			"KVM_EXIT_SYSTEM_EVENT: KVM_SYSTEM_EVENT_RESET, data [0x55]",
		},
		"system event that claims 2^32-1 words": {
			area(ReasonSystemEvent, 9|0xffffffff<<32, 0x55),
			&SystemEventExit{Type: 9, Data: append([]uint64{0x55}, make([]uint64, 15)...)},
			"KVM_EXIT_SYSTEM_EVENT: KVM_SYSTEM_EVENT(9), data [0x55 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0]",
		},
		"memory fault": {
			area(ReasonMemoryFault, MemoryFaultPrivate, 0x3000, 0x1000),
			&MemoryFaultExit{Flags: MemoryFaultPrivate, GPA: 0x3000, Size: 0x1000},
			"KVM_EXIT_MEMORY_FAULT: gpa 0x3000, 0x1000 bytes, flags 0x8",
		},
		"debug": {
			area(ReasonDebug, 1, 0x1234, 0x4000, 0x400),
			&DebugExit{Exception: 1, PC: 0x1234, DR6: 0x4000, DR7: 0x400},
			"KVM_EXIT_DEBUG: exception 1 at gva 0x1234, dr6 0x4000, dr7 0x400",
		},
		"unknown to KVM": {
			area(ReasonUnknown, 0x30),
			&UnknownExit{HardwareReason: 0x30},
			"KVM_EXIT_UNKNOWN: hardware reason 0x30",
		},
		"known by name only": {area(29), &UnknownExit{Number: 29}, "KVM_EXIT_X86_RDMSR"},
		"unknown to us":      {area(1000, 0x30), &UnknownExit{Number: 1000}, "KVM_EXIT(1000)"},
		"of another arch":    {area(13), &UnknownExit{Number: 13}, "KVM_EXIT(13)"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newVCPU(-1, tt.area)
			got, err := c.decode(tt.area)
			if err != nil {
				t.Fatal(err)
			}
			opts := cmpopts.IgnoreUnexported(MMIOExit{}, InternalErrorExit{}, SystemEventExit{})
			if diff := cmp.Diff(tt.want, got, opts); diff != "" {
				t.Errorf("decode (-want +got):\n%s", diff)
			}
			if got.Reason() != runAreaOf(tt.area).exitReason || got.String() != tt.text {
				t.Errorf("decoded as %d %q, want %d %q", got.Reason(), got, runAreaOf(tt.area).exitReason, tt.text)
			}
			if n := testing.AllocsPerRun(10, func() { _, _ = c.decode(tt.area) }); n != 0 {
				t.Errorf("decode allocates %v times", n)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, area := range map[string][]byte{
		"I/O data past the area":            ioArea(1, 1, 1, 1, areaBytes+1),
		"I/O data across the area's end":    ioArea(1, 4, 1, 1, areaBytes-3),
		"I/O data that wraps":               ioArea(1, 4, 1, 1, ^uint64(3)),
		"I/O count without bound":           ioArea(1, 255, 1, 0xffffffff, ioDataAt),
		"I/O data in struct kvm_run":        ioArea(0, 1, 1, 1, 1),
		"I/O data that begins there":        ioArea(0, 4, 1, 1, uint64(sizeofRunArea)-1),
		"MMIO of more bytes than there are": area(ReasonMMIO, 0, 0, 9),
	} {
		t.Run(name, func(t *testing.T) {
			c := newVCPU(-1, area)
			if exit, err := c.decode(area); err == nil || exit != nil {
				t.Errorf("decode = %v, %v; want no exit and an error", exit, err)
			}
			if c.reply != nil {
				t.Errorf("the next Run would write %d bytes to the run area", len(c.reply))
			}
		})
	}
}

// FuzzDecodeExit puts arbitrary bytes in the place of a run area. Decoding gives
// an exit or an error, never both; what the exit holds is memory of the vCPU,
// and what the next Run will write lies in the area behind its control fields.
func FuzzDecodeExit(f *testing.F) {
	f.Add(ioArea(0, 4, 0x60, 3, ioDataAt))
	f.Add(ioArea(1, 1, 0x3f8, 2, areaBytes-1))
	f.Add(area(ReasonMMIO, 0xfee00000, 0, 8))
	f.Add(area(ReasonInternalError, SuberrorEmulation|3<<32, 1, u64(15)))
	f.Add(area(ReasonSystemEvent, 1|16<<32))
	f.Fuzz(func(t *testing.T, b []byte) {
		a := alignedBytes(max(len(b), int(sizeofRunArea)))
		copy(a, b)
		before := bytes.Clone(a)
		c := newVCPU(-1, a)
		exit, err := c.decode(a)
		if (exit == nil) == (err == nil) {
			t.Fatalf("decode = %v, %v", exit, err)
		}
		if !bytes.Equal(a, before) {
			t.Error("decode changed the run area")
		}
		if exit == nil {
			return
		}
		if exit.Reason() != runAreaOf(a).exitReason || exit.String() == "" {
			t.Errorf("reason %d decoded as %d, %q", runAreaOf(a).exitReason, exit.Reason(), exit)
		}
		var data []byte
		switch e := exit.(type) {
		case *IOExit:
			data = e.Data
			if len(data) != e.Size*e.Count || len(data) > len(a) {
				t.Errorf("%d bytes of data for %d of %d bytes", len(data), e.Count, e.Size)
			}
		case *MMIOExit:
			data = e.Data
			if len(data) > 8 {
				t.Errorf("%d bytes of MMIO", len(data))
			}
		}
		for i := range data {
			data[i] = 0x77
		}
		if !bytes.Equal(a, before) {
			t.Error("the exit's data is in the run area")
		}
		end := c.replyAt + uintptr(len(c.reply))
		if c.reply != nil && (c.replyAt < unionAt || end > uintptr(len(a))) {
			t.Errorf("the next Run would write [%d, %d) of %d bytes", c.replyAt, end, len(a))
		}
	})
}
