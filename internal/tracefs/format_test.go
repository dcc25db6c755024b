package tracefs

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

const unmapFormat = `name: kvm_unmap_hva_range
ID: 1845
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:unsigned long start;	offset:8;	size:8;	signed:0;
	field:unsigned long end;	offset:16;	size:8;	signed:0;
	field:char comm[16];	offset:24;	size:16;	signed:0;

print fmt: "mmu notifier unmap range: %#016lx -- %#016lx", REC->start, REC->end
`

func TestParseFormat(t *testing.T) {
	got, err := ParseFormat(unmapFormat)
	want := Tracepoint{ID: 1845, Fields: []Field{
		{"common_type", 0, 2}, {"common_flags", 2, 1}, {"common_pid", 4, 4}, {"start", 8, 8}, {"end", 16, 8}, {"comm", 24, 16},
	}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Fatalf("ParseFormat: %v (-want +got):\n%s", err, diff)
	}
	if _, err := got.Field("hva"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a field that is not there: %v, want %v", err, fs.ErrNotExist)
	}
	record := []byte{1, 2, 3, 0, 4, 0, 0, 0, 0x00, 0x10, 0, 0, 0, 0, 0, 0}
	for name, want := range map[string]uint64{"common_type": 0x201, "common_flags": 3, "common_pid": 4, "start": 0x1000} {
		f, err := got.Field(name)
		if err != nil {
			t.Fatal(err)
		}
		if v, ok := f.Uint(record); v != want || !ok {
			t.Errorf("%s is %#x, %t; want %#x", name, v, ok, want)
		}
	}
	for _, name := range []string{"end", "comm"} { // past the end; no number
		f, _ := got.Field(name)
		if v, ok := f.Uint(record); ok {
			t.Errorf("%s is %#x", name, v)
		}
	}
	for _, text := range []string{"", "ID: 7\n", "ID: x\n", "ID: 7\n\tfield:int a;\toffset:99999;\tsize:4;\n"} {
		if got, err := ParseFormat(text); err == nil {
			t.Errorf("ParseFormat(%q) = %v", text, got)
		}
	}
}

// FuzzParseFormat wants an error or a tracepoint, and fields that can be looked for in any
// record.
func FuzzParseFormat(f *testing.F) {
	f.Add(unmapFormat, []byte("0123456789abcdef"))
	f.Add("ID: 1\n\tfield:u8 x;\toffset:65535;\tsize:65535;\n", []byte{})
	f.Fuzz(func(t *testing.T, text string, record []byte) {
		tp, err := ParseFormat(text)
		if (err == nil) != (tp.Fields != nil) {
			t.Errorf("%v, with error %v", tp, err)
		}
		for _, field := range tp.Fields {
			field.Uint(record)
		}
	})
}

func TestTracepoint(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	tr, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	tp, err := tr.Tracepoint("sched", "sched_switch")
	if err != nil {
		t.Fatal(err)
	}
	if id, err := tr.TracepointID("sched", "sched_switch"); err != nil || id != tp.ID {
		t.Errorf("ID is %d, want %d, %v", tp.ID, id, err)
	}
	if f, err := tp.Field("next_pid"); err != nil || f.Size != 4 {
		t.Errorf("next_pid is %v, %v; want 4 bytes", f, err)
	}
	if _, err := tr.Tracepoint("sched", "no_such_event"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tracepoint that is not there: %v, want %v", err, fs.ErrNotExist)
	}
}
