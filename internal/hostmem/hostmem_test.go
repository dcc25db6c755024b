package hostmem

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestWords(t *testing.T) {
	page := mapPages(t, 1, unix.PROT_READ|unix.PROT_WRITE)
	if err := errors.Join(Store64(page, 1<<40|7), Store32(page+8, 9)); err != nil {
		t.Fatal(err)
	}
	if v, err := Load64(page); v != 1<<40|7 || err != nil {
		t.Errorf("Load64 gave %#x, %v", v, err)
	}
	if v, err := Load32(page + 8); v != 9 || err != nil {
		t.Errorf("Load32 gave %#x, %v", v, err)
	}
	for _, tt := range []struct {
		old, v uint64
		want   bool
	}{{8, 1, false}, {1<<40 | 7, 2, true}, {2, 3, true}} {
		if ok, err := CompareAndSwap64(page, tt.old, tt.v); ok != tt.want || err != nil {
			t.Errorf("CompareAndSwap64(%#x, %#x) gave %v, %v", tt.old, tt.v, ok, err)
		}
	}
	p := make([]byte, 3)
	if err := errors.Join(WriteAt([]byte("abc"), page+4094-1), ReadAt(p, page+4093)); err != nil || !bytes.Equal(p, []byte("abc")) {
		t.Errorf("what was written is read as %q, %v", p, err)
	}
}

// TestFaultsAreErrors uses memory that is not there in every way.
func TestFaultsAreErrors(t *testing.T) {
	readOnly := mapPages(t, 1, unix.PROT_READ)
	none := mapPages(t, 1, unix.PROT_NONE)
	fd, err := unix.MemfdCreate("empty", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "empty")
	defer file.Close()
	ended := mapFile(t, file, 1)
	for name, tt := range map[string]struct {
		do          func() error
		hva         addr.HVA
		atomicStore bool
	}{
		"load":             {func() error { _, err := Load64(none + 8); return err }, none + 8, false},
		"load 32":          {func() error { _, err := Load32(none + 4); return err }, none + 4, false},
		"store":            {func() error { return Store64(readOnly+16, 1) }, readOnly + 16, true},
		"store 32":         {func() error { return Store32(readOnly+16, 1) }, readOnly + 16, true},
		"compare and swap": {func() error { _, err := CompareAndSwap64(readOnly, 0, 1); return err }, readOnly, true},
		"read":             {func() error { return ReadAt(make([]byte, 1), none) }, none, false},
		"write":            {func() error { return WriteAt(make([]byte, 1), readOnly) }, readOnly, false},
		"past the end":     {func() error { _, err := Load64(ended); return err }, ended, false},
	} {
		t.Run(name, func(t *testing.T) {
			if gvmtest.Race && tt.atomicStore {
				gvmtest.OtherBuild(t, "the race detector's own atomic store faults on a stack that the runtime cannot unwind")
			}
			err := tt.do()
			var f *Fault
			if !errors.As(err, &f) || f.HVA != tt.hva || !errors.Is(err, unix.EFAULT) || !strings.Contains(err.Error(), "hva 0x") {
				t.Errorf("error is %v, want EFAULT at %v", err, tt.hva)
			}
		})
	}
}

// TestOtherPanicsPass panics where a fault is expected, with something else.
func TestOtherPanicsPass(t *testing.T) {
	defer func() {
		if p := recover(); p != "other" {
			t.Errorf("recovered %v, want the panic", p)
		}
	}()
	func() (err error) {
		defer new(guard).catch(&err)
		panic("other")
	}()
}

func TestNothingAllocates(t *testing.T) {
	page := mapPages(t, 1, unix.PROT_READ|unix.PROT_WRITE)
	p := make([]byte, 64)
	if n := testing.AllocsPerRun(100, func() {
		_, _ = Load64(page)
		_ = Store64(page, 1)
		_ = ReadAt(p, page)
		_ = WriteAt(p, page)
	}); n != 0 {
		t.Errorf("four accesses allocate %v times, want 0", n)
	}
}

func BenchmarkLoad64(b *testing.B) {
	page := mapPages(b, 1, unix.PROT_READ|unix.PROT_WRITE)
	for b.Loop() {
		if _, err := Load64(page); err != nil {
			b.Fatal(err)
		}
	}
}

// TestUse: a fault on the memory that was given is an error, any other panic is not.
func TestUse(t *testing.T) {
	page := mapPages(t, 1, unix.PROT_READ|unix.PROT_WRITE)
	none := mapPages(t, 1, unix.PROT_NONE)
	broken := errors.New("broken")
	if err := Use(page, 8, func(p []byte) error { p[7] = 1; return broken }); err != broken {
		t.Errorf("the error of the function comes back as %v", err)
	}
	if v, err := Load64(page); v != 1<<56 || err != nil {
		t.Errorf("what the function has stored is loaded as %#x, %v", v, err)
	}
	var f *Fault
	if err := Use(none, 8, func(p []byte) error { p[5] = 1; return nil }); !errors.As(err, &f) || f.HVA != none+5 || !errors.Is(err, unix.EFAULT) {
		t.Errorf("a fault comes back as %v, want one at %v", err, none+5)
	}
	for name, fn := range map[string]func([]byte) error{
		"a panic":      func([]byte) error { panic("mine") },
		"another page": func([]byte) error { Bytes(none, 1)[0] = 1; return nil },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s is taken for a fault of the memory", name)
				}
			}()
			_ = Use(page, 8, fn)
		}()
	}
}
