package uffd

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

// message is a message as the kernel lays it out.
func message(kind Kind, words ...uint64) []byte {
	b := make([]byte, MessageBytes)
	b[0] = byte(kind)
	for i, w := range words {
		binary.NativeEndian.PutUint64(b[8+8*i:], w)
	}
	return b
}

func TestDecode(t *testing.T) {
	for name, tt := range map[string]struct {
		b    []byte
		want Message
		text string
	}{
		"remove":             {message(Remove, 0x1000, 0x3000), Message{Kind: Remove, Range: addr.HVARange{Start: 0x1000, End: 0x3000}, Child: -1}, "remove of hva [0x1000, 0x3000)"},
		"unmap":              {message(Unmap, 0x1000, 0x3000), Message{Kind: Unmap, Range: addr.HVARange{Start: 0x1000, End: 0x3000}, Child: -1}, "unmap of hva [0x1000, 0x3000)"},
		"remap":              {message(Remap, 0x1000, 0x9000, 0x2000), Message{Kind: Remap, Range: addr.HVARange{Start: 0x1000, End: 0x3000}, To: 0x9000, Child: -1}, "remap of hva [0x1000, 0x3000) to hva 0x9000"},
		"fork":               {message(Fork, 7), Message{Kind: Fork, Child: 7}, "fork"},
		"pagefault":          {message(Pagefault, 1, 0x1008), Message{Kind: Pagefault, Range: addr.HVARange{Start: 0x1000, End: 0x2000}, Child: -1}, "pagefault of hva [0x1000, 0x2000)"},
		"a kind of tomorrow": {message(0x17, 1, 2), Message{Kind: 0x17, Child: -1}, "kind(0x17)"},
		"more follows":       {append(message(Fork, 7), 1, 2), Message{Kind: Fork, Child: 7}, "fork"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Decode(tt.b)
			if err != nil || got != tt.want || got.String() != tt.text {
				t.Errorf("Decode(%x) = %v, %v; want %v, as %q", tt.b, got, err, tt.want, tt.text)
			}
		})
	}
	if m, err := Decode(message(Unmap, 1, 2)[:MessageBytes-1]); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("of a message that is cut: %v, %v; want %v", m, err, io.ErrUnexpectedEOF)
	}
}

// FuzzDecode wants an error or a message, and of a message that its fields are those of
// its kind.
func FuzzDecode(f *testing.F) {
	f.Add(message(Remove, 0x1000, 0x3000))
	f.Add(message(Remap, 0x1000, 0x9000, 0x2000))
	f.Add(message(0xff, ^uint64(0), ^uint64(0), ^uint64(0)))
	f.Add([]byte{byte(Unmap)})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Decode(b)
		switch {
		case (err != nil) != (len(b) < MessageBytes):
			t.Errorf("Decode of %d bytes: %v", len(b), err)
		case err != nil && m != Message{}:
			t.Errorf("an error, %v, and a message, %v", err, m)
		case err == nil && m.Kind != Kind(b[0]):
			t.Errorf("kind is %v, want %#x", m.Kind, b[0])
		case m.Kind != Remap && m.To != 0, m.Kind == Fork && m.Range != addr.HVARange{}:
			t.Errorf("%v has fields of another kind", m)
		}
	})
}

// TestRead has threads change mappings, waits for the messages without reading them, and
// wants each thread to wait until its message is read.
func TestRead(t *testing.T) {
	gvmtest.Need(t, gvmtest.UFFD)
	u, err := Open(EventRemap | EventRemove | EventUnmap | PagefaultFlagWP)
	if err != nil {
		gvmtest.Lack(t, gvmtest.UFFD, err)
	}
	defer u.Close()
	r := mapPages(t, 4)
	if err := u.Register(r, ModeWP); err != nil {
		t.Fatal(err)
	}
	var messages [4]Message
	if n, err := u.Read(messages[:]); n != 0 || err != nil {
		t.Errorf("nothing has happened: Read = %d, %v", n, err)
	}
	for _, tt := range []struct {
		kind   Kind
		number uintptr
		arg    uintptr
	}{
		{Remove, unix.SYS_MADVISE, unix.MADV_DONTNEED},
		{Unmap, unix.SYS_MUNMAP, 0},
	} {
		t.Run(tt.kind.String(), func(t *testing.T) {
			var failed error
			done := gvmtest.Background(func() { failed = syscallOf(tt.number, r, tt.arg) })
			if err := u.Wait(); err != nil {
				t.Fatal(err)
			}
			if gvmtest.ClosedWithin(done, gvmtest.Grace) {
				t.Error("the thread goes on before its message was read")
			}
			want := Message{Kind: tt.kind, Range: r, Child: -1}
			if n, err := u.Read(messages[:]); n != 1 || err != nil || messages[0] != want {
				t.Errorf("Read = %d, %v: %v; want %v", n, err, messages[:n], want)
			}
			if !gvmtest.ClosedWithin(done, gvmtest.Limit) || failed != nil {
				t.Errorf("the thread does not go on, or with %v", failed)
			}
		})
	}
}

func syscallOf(number uintptr, r addr.HVARange, arg uintptr) error {
	if _, _, errno := unix.Syscall(number, uintptr(r.Start), uintptr(r.Bytes()), arg); errno != 0 {
		return errno
	}
	return nil
}

func TestWaitEnds(t *testing.T) {
	gvmtest.Need(t, gvmtest.UFFD)
	u, err := Open(0)
	if err != nil {
		t.Fatal(err)
	}
	var waited error
	done := gvmtest.Background(func() { waited = u.Wait() })
	if err := u.Close(); err != nil {
		t.Error(err)
	}
	if !gvmtest.ClosedWithin(done, gvmtest.Limit) || !errors.Is(waited, fs.ErrClosed) {
		t.Errorf("Wait while u was closed: %v, want %v", waited, fs.ErrClosed)
	}
	if _, err := u.Read(make([]Message, 1)); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Read after Close: %v, want %v", err, fs.ErrClosed)
	}
}
