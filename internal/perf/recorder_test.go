package perf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/internal/tracefs"
)

// encode lays a record out as the kernel does.
func encode(typ uint32, body ...byte) []byte {
	b := make([]byte, headerLen, headerLen+len(body))
	binary.NativeEndian.PutUint32(b, typ)
	binary.NativeEndian.PutUint16(b[6:], uint16(headerLen+len(body)))
	return append(b, body...)
}

// sample is a sample with these fields.
func sample(pid, tid uint32, time uint64, raw ...byte) []byte {
	body := binary.NativeEndian.AppendUint32(nil, pid)
	body = binary.NativeEndian.AppendUint32(body, tid)
	body = binary.NativeEndian.AppendUint64(body, time)
	body = binary.NativeEndian.AppendUint32(body, uint32(len(raw)))
	body = append(body, raw...)
	return encode(typeSample, append(body, make([]byte, -len(body)&7)...)...)
}

func loss(n uint64) []byte {
	return encode(typeLost, binary.NativeEndian.AppendUint64(make([]byte, 8), n)...)
}

func TestDecode(t *testing.T) {
	good := sample(1, 2, 3, 4, 5, 6, 7)
	for name, tt := range map[string]struct {
		b    []byte
		want string // PID, TID, time, fields, losses, length; "": cut
	}{
		"sample":                {good, "1 2 3 04050607 0 32"},
		"another follows":       {append(slices.Clone(good), 9), "1 2 3 04050607 0 32"},
		"loss":                  {loss(7), "0 0 0  7 24"},
		"of another type":       {encode(14, 1, 2, 3, 4, 5, 6, 7, 8), "0 0 0  0 16"},
		"no header":             {good[:7], ""},
		"cut":                   {good[:31], ""},
		"shorter than a header": {[]byte{9, 0, 0, 0, 0, 0, 7, 0}, ""},
		"a loss without number": {encode(typeLost, 1, 2, 3, 4, 5, 6, 7, 8), ""},
		"a sample without size": {encode(typeSample, make([]byte, 16)...), ""},
		"too many fields":       {encode(typeSample, append(make([]byte, 16), 255, 255, 255, 255)...), ""},
	} {
		t.Run(name, func(t *testing.T) {
			rec, n, err := Decode(tt.b)
			got := fmt.Sprintf("%d %d %d %x %d %d", rec.PID, rec.TID, rec.Time, rec.Raw, rec.Lost, n)
			if tt.want == "" {
				if !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("Decode(%x) = %s, %v; want %v", tt.b, got, err, io.ErrUnexpectedEOF)
				}
			} else if err != nil || got != tt.want {
				t.Errorf("Decode(%x) = %s, %v; want %s", tt.b, got, err, tt.want)
			}
		})
	}
}

// FuzzDecode wants an error, or a record that lies in what it was decoded from.
func FuzzDecode(f *testing.F) {
	f.Add(sample(1, 2, 3, 4, 5, 6, 7))
	f.Add(loss(7))
	f.Add(encode(typeSample, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, n, err := Decode(b)
		switch {
		case err != nil && (n != 0 || rec.Raw != nil):
			t.Errorf("an error, %v, and a record", err)
		case err == nil && (n < headerLen || n > len(b) || len(rec.Raw) > n):
			t.Errorf("a record of %d bytes with %d of fields, in %d", n, len(rec.Raw), len(b))
		}
	})
}

// TestWrap has records go over the end of a ring, which holds one and a half.
func TestWrap(t *testing.T) {
	g := &ring{data: make([]byte, 48)}
	var head, told uint64
	for i := range byte(50) {
		rec, tail := sample(1, 2, 3, i, i, i, i), head
		for _, b := range rec {
			g.data[head%48] = b
			head++
		}
		err := g.records(tail, head, func(r Record) {
			told++
			if !slices.Equal(r.Raw, []byte{i, i, i, i}) {
				t.Errorf("record %d has %x", i, r.Raw)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if told != 50 {
		t.Errorf("told of %d records, want 50", told)
	}
	if err := g.records(0, 49, nil); err == nil {
		t.Error("more records than the ring has room for")
	}
}

// faults is a tracepoint that is passed by a fault at an address, and fields of it.
func faults(t *testing.T) tracefs.Tracepoint {
	t.Helper()
	gvmtest.Need(t, gvmtest.Tracepoints)
	tr, err := tracefs.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	tp, err := tr.Tracepoint("exceptions", "page_fault_user")
	if err != nil {
		gvmtest.Lack(t, gvmtest.Tracepoints, err) // other architectures have another one
	}
	return tp
}

// TestRecorder faults pages in, and wants the faults of a part of them recorded, with their
// addresses, times and thread, or told of as lost.
func TestRecorder(t *testing.T) {
	tp := faults(t)
	field, err := tp.Field("address")
	if err != nil {
		t.Fatal(err)
	}
	const npages = 4096
	mem, err := unix.Mmap(-1, 0, npages*addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	first := uint64(addressOf(mem))
	filter := fmt.Sprintf("address >= %#x && address < %#x", first, first+npages/2*addr.PageSize)
	r, err := NewRecorder(RecorderConfig{Tracepoints: []Tracepoint{{tp.ID, filter}}, Pages: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	touch := func(i int) { mem[i*addr.PageSize] = 1 }

	before := monotonic(t)
	touch(npages - 1) // filtered out
	touch(3)
	if err := r.Wait(-1); err != nil {
		t.Fatal(err)
	}
	var got []Record
	if err := r.Read(func(rec Record) {
		if v, ok := field.Uint(rec.Raw); !ok || v&^addr.PageMask != first+3*addr.PageSize {
			t.Errorf("recorded is a fault at %#x, want page 3 of %#x", v, first)
		}
		got = append(got, rec)
	}); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].PID != os.Getpid() || got[0].Time < before || got[0].Time > monotonic(t) {
		t.Errorf("recorded is %+v; want one, of process %d, since %d", got, os.Getpid(), before)
	}

	// More than there is room for: each is recorded, or counted as lost at once.
	for i := 4; i < npages/2; i++ {
		touch(i)
	}
	recorded, lost := uint64(0), uint64(0)
	count := func(rec Record) {
		if lost += rec.Lost; rec.Lost == 0 {
			recorded++
		}
	}
	if err := r.Read(count); err != nil {
		t.Fatal(err)
	}
	if lost == 0 || recorded+lost != npages/2-4 {
		t.Errorf("of %d faults %d were recorded and %d lost", npages/2-4, recorded, lost)
	}
	touch(1) // with the next record, the ring itself tells of the loss
	if err := r.Read(count); err != nil || recorded+lost != npages/2-3 {
		t.Errorf("and after one more, %d and %d: %v", recorded, lost, err)
	}
}

func monotonic(t *testing.T) uint64 {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		t.Fatal(err)
	}
	return uint64(ts.Nano())
}

func TestRecorderEnds(t *testing.T) {
	tp := faults(t)
	r, err := NewRecorder(RecorderConfig{Tracepoints: []Tracepoint{{tp.ID, "address == 1"}}, Pages: 1})
	if err != nil {
		t.Fatal(err)
	}
	var waited error
	done := gvmtest.Background(func() { waited = r.Wait(-1) })
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if !gvmtest.ClosedWithin(done, gvmtest.Limit) || !errors.Is(waited, fs.ErrClosed) {
		t.Errorf("Wait while it was closed: %v, want %v", waited, fs.ErrClosed)
	}
	if err := r.Read(func(Record) {}); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Read after Close: %v, want %v", err, fs.ErrClosed)
	}
	if err := r.Close(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a second Close: %v, want %v", err, fs.ErrClosed)
	}
}

func TestRecorderErrors(t *testing.T) {
	tp := faults(t)
	good := Tracepoint{tp.ID, ""}
	for name, c := range map[string]RecorderConfig{
		"a filter of what is not there":               {Tracepoints: []Tracepoint{{tp.ID, "no_such_field == 1"}}, Pages: 1},
		"a filter of what is not there in the second": {Tracepoints: []Tracepoint{good, {tp.ID, "no_such_field == 1"}}, Pages: 1},
		"3 pages": {Tracepoints: []Tracepoint{good}, Pages: 3},
	} {
		if _, err := NewRecorder(c); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v, want EINVAL", name, err)
		}
	}
	if _, err := NewRecorder(RecorderConfig{Tracepoints: []Tracepoint{{1 << 31, ""}}, Pages: 1}); err == nil {
		t.Error("no such tracepoint, and no error")
	}
}

// TestRecorderOfSeveral has two tracepoints passed in turns: they are told apart, in the order
// in which they were passed, and so are losses of both.
func TestRecorderOfSeveral(t *testing.T) {
	gvmtest.Need(t, gvmtest.Tracepoints)
	tr, err := tracefs.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	// No thread has such a number, and only this test asks for it.
	const none = 1 << 30
	var tps []Tracepoint
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var numbers []tracefs.Field
	for _, name := range []string{"sys_enter_getpgid", "sys_enter_getsid"} {
		tp, err := tr.Tracepoint("syscalls", name)
		if err != nil {
			gvmtest.Lack(t, gvmtest.Tracepoints, err)
		}
		f, err := tp.Field("pid")
		if err != nil {
			t.Fatal(err)
		}
		tps, numbers = append(tps, Tracepoint{tp.ID, fmt.Sprintf("pid >= %d && common_pid == %d", none, unix.Gettid())}), append(numbers, f)
	}
	const each = 8
	r, err := NewRecorder(RecorderConfig{Tracepoints: tps, Pages: 1, Wakeup: each})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer onOneCPU(t)()
	pass := func(n int) {
		for i := range n {
			_, _ = unix.Getpgid(none + 2*i)
			_, _ = unix.Getsid(none + 2*i + 1)
		}
	}
	pass(each/2 - 1)
	if err := r.Wait(time.Millisecond); err != nil { // by the limit
		t.Fatal(err)
	}
	pass(1)
	if err := r.Wait(-1); err != nil { // by the number
		t.Fatal(err)
	}
	n := 0
	if err := r.Read(func(rec Record) {
		which := n % 2
		if v, ok := numbers[which].Uint(rec.Raw); rec.ID != tps[which].ID || !ok || int(v)%2 != which {
			t.Errorf("record %d is of tracepoint %d, number %d; want %d", n, rec.ID, v, tps[which].ID)
		}
		n++
	}); err != nil || n != each {
		t.Errorf("%d records, %v; want %d", n, err, each)
	}
	const many = 500
	pass(many)
	recorded, lost := uint64(0), uint64(0)
	if err := r.Read(func(rec Record) {
		if lost += rec.Lost; rec.Lost == 0 {
			recorded++
		}
	}); err != nil || lost == 0 || recorded+lost != 2*many {
		t.Errorf("of %d passes %d were recorded and %d lost: %v", 2*many, recorded, lost, err)
	}
}

// onOneCPU has the thread stay on one CPU, and returns what lets it go.
func onOneCPU(t *testing.T) func() {
	t.Helper()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.SchedSetaffinity(0, &all); err != nil {
			t.Error(err)
		}
	}
}
