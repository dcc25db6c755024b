package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
)

// Kind is what a [Message] tells of, by the kernel's number.
type Kind uint8

// The kinds of messages.
const (
	Pagefault Kind = iota + 0x12 // a thread waits in a fault
	Fork                         // the process was forked
	Remap                        // mremap(2) has moved pages
	Remove                       // madvise(2) is about to drop pages
	Unmap                        // munmap(2) has unmapped pages, or mmap(2) replaced them
)

var kindNames = [...]string{"pagefault", "fork", "remap", "remove", "unmap"}

func (k Kind) String() string {
	if i := int(k) - int(Pagefault); i >= 0 && i < len(kindNames) {
		return kindNames[i]
	}
	return fmt.Sprintf("kind(%#x)", uint8(k))
}

// Message is what the kernel says through a userfaultfd. The thread that a message is
// about waits until it has been read, or the descriptor is closed.
//
// What a Remove tells of has not happened yet when the message is read, and may not
// happen: nobody tells when it has. The others tell of what has been done.
type Message struct {
	Kind  Kind
	Range addr.HVARange // Remap, Remove, Unmap: of what; as it was asked for, so an Unmap may be larger than what is registered. Pagefault: where
	To    addr.HVA      // Remap: where Range.Start went
	Child int           // Fork: a userfaultfd of the child process, which the reader owns and closes; otherwise -1
}

func (m Message) String() string {
	switch m.Kind {
	case Remap:
		return fmt.Sprintf("%v of %v to %v", m.Kind, m.Range, m.To)
	case Pagefault, Remove, Unmap:
		return fmt.Sprintf("%v of %v", m.Kind, m.Range)
	}
	return m.Kind.String()
}

// MessageBytes is the size of a message as it is read: struct uffd_msg.
const MessageBytes = 32

// Decode returns the first message in b. A kind that is not known is returned with its
// number alone. The error is io.ErrUnexpectedEOF if b is shorter than a message.
func Decode(b []byte) (Message, error) {
	if len(b) < MessageBytes {
		return Message{}, fmt.Errorf("%d bytes of a message of %d: %w", len(b), MessageBytes, io.ErrUnexpectedEOF)
	}
	word := func(i int) addr.HVA { return addr.HVA(binary.NativeEndian.Uint64(b[8+8*i:])) }
	m := Message{Kind: Kind(b[0]), Child: -1}
	switch m.Kind {
	case Pagefault:
		m.Range = addr.HVAs(word(1)&^addr.PageMask, addr.PageSize)
	case Fork:
		m.Child = int(int32(binary.NativeEndian.Uint32(b[8:])))
	case Remap:
		m.Range, m.To = addr.HVAs(word(0), uint64(word(2))), word(1)
	case Remove, Unmap:
		m.Range = addr.HVARange{Start: word(0), End: word(1)}
	}
	return m, nil
}

// Wait blocks until there is a message, and does not read it. Nobody else need read it
// in the meantime: Wait returns then, too. The error is os.ErrClosed once u is closed.
func (u *FD) Wait() error {
	var failed error
	if u.conn.Read(func(raw uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(raw), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(fds, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			failed = err
			return n > 0 || err != nil
		}
	}) != nil {
		return os.ErrClosed // Read fails for no other reason
	}
	if failed != nil {
		return fmt.Errorf("poll a userfaultfd: %w", failed)
	}
	return nil
}

// Read reads as many messages as there are and fit, and returns how many, which may be 0:
// it does not block. With an error there are none.
func (u *FD) Read(messages []Message) (n int, err error) {
	b := make([]byte, len(messages)*MessageBytes)
	got := 0
	if u.conn.Control(func(raw uintptr) {
		for {
			if got, err = unix.Read(int(raw), b); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}) != nil {
		return 0, os.ErrClosed // Control fails for no other reason
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("read a userfaultfd: %w", err)
	}
	for b = b[:got]; len(b) > 0; b = b[MessageBytes:] {
		if messages[n], err = Decode(b); err != nil {
			return 0, err
		}
		n++
	}
	return n, nil
}
