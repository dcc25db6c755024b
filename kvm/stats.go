package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// ErrNoStat is a statistic that this kernel does not keep, or not for this kind
// of object.
var ErrNoStat = errors.New("no such statistic")

// StatType is how a statistic relates to the past.
type StatType uint8

const (
	StatCumulative StatType = iota // a count since the object was made
	StatInstant                    // the value now
	StatPeak                       // the largest value so far
	StatLinearHist                 // buckets of StatDesc.BucketSize each
	StatLogHist                    // bucket 0 counts 0, bucket n counts [2^(n-1), 2^n)
)

func (t StatType) String() string {
	return enumName(int(t), "cumulative", "instant", "peak", "linear histogram", "logarithmic histogram")
}

// StatUnit is what a statistic is measured in.
type StatUnit uint8

const (
	StatNoUnit StatUnit = iota
	StatBytes
	StatSeconds
	StatCycles
	StatBoolean
)

func (u StatUnit) String() string {
	return enumName(int(u), "none", "bytes", "seconds", "cycles", "boolean")
}

func enumName(i int, names ...string) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("unknown(%d)", i)
}

// StatDesc describes a statistic. Its values are multiples of Base to the power
// of Exponent, in Unit: nanoseconds are StatSeconds, 10 and -9.
type StatDesc struct {
	Name       string
	Type       StatType
	Unit       StatUnit
	Base       int // 10 or 2; 0 if the kernel uses one that is not known here
	Exponent   int
	Len        int    // how many values: 1 unless it is a histogram
	BucketSize uint32 // of a StatLinearHist

	offset int // in the block of values, in bytes
}

// Stat is a statistic with its values.
type Stat struct {
	StatDesc
	Values []uint64
}

// Stats are the statistics of a VM or a vCPU. Which ones there are depends on
// the kernel; they do not change while it runs. Its methods may be called from
// any goroutine.
type Stats struct {
	fd fd

	// All of these are immutable.
	id      string
	descs   []StatDesc
	index   map[string]int // from a name to its place in descs
	dataAt  int64          // where in the file the block of values is
	dataLen int            // its length in bytes
}

// statsHeader is struct kvm_stats_header, at the start of the file.
type statsHeader struct {
	Flags      uint32
	NameSize   uint32
	NumDesc    uint32
	IDOffset   uint32
	DescOffset uint32
	DataOffset uint32
}

// statsDesc is struct kvm_stats_desc, without the name that follows it in
// statsHeader.NameSize bytes.
type statsDesc struct {
	Flags      uint32 // type in bits 0 to 3, unit in 4 to 7, base in 8 to 11
	Exponent   int16
	Size       uint16
	Offset     uint32
	BucketSize uint32
}

func openStats(f *fd) (*Stats, error) {
	raw, err := opened(func() (int, error) { return call(f, reqGetStatsFD, 0) })
	if err != nil {
		return nil, err
	}
	s := new(Stats)
	s.fd.init(raw, nil)
	if err := s.parse(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// parse reads all of the file but the values, which are the only part that
// changes.
func (s *Stats) parse() error {
	var h statsHeader
	head := make([]byte, binary.Size(h))
	if err := s.pread(head, 0); err != nil {
		return err
	}
	if _, err := binary.Decode(head, binary.NativeEndian, &h); err != nil {
		return err
	}
	const limit = 1 << 16 // of names and of their number, a hundred times the usual
	if h.NameSize > limit || h.NumDesc > limit {
		return fmt.Errorf("KVM_GET_STATS_FD: implausible header %+v", h)
	}

	id := make([]byte, h.NameSize)
	if err := s.pread(id, int64(h.IDOffset)); err != nil {
		return err
	}
	s.id = cString(id)

	var d statsDesc
	descSize := binary.Size(d)
	stride := descSize + int(h.NameSize)
	block := make([]byte, int(h.NumDesc)*stride)
	if err := s.pread(block, int64(h.DescOffset)); err != nil {
		return err
	}
	s.dataAt = int64(h.DataOffset)
	s.index = make(map[string]int, h.NumDesc)
	for ; len(block) > 0; block = block[stride:] {
		if _, err := binary.Decode(block, binary.NativeEndian, &d); err != nil {
			return err
		}
		desc := StatDesc{
			Name:       cString(block[descSize:stride]),
			Type:       StatType(d.Flags & 0xf),
			Unit:       StatUnit(d.Flags >> 4 & 0xf),
			Exponent:   int(d.Exponent),
			Len:        int(d.Size),
			BucketSize: d.BucketSize,
			offset:     int(d.Offset),
		}
		switch d.Flags >> 8 & 0xf {
		case 0:
			desc.Base = 10
		case 1:
			desc.Base = 2
		}
		s.index[desc.Name] = len(s.descs)
		s.descs = append(s.descs, desc)
		s.dataLen = max(s.dataLen, desc.offset+8*desc.Len)
	}
	if s.dataLen > limit*8 {
		return fmt.Errorf("KVM_GET_STATS_FD: implausible size of the values: %d bytes", s.dataLen)
	}
	return nil
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// Close closes the statistics.
func (s *Stats) Close() error { return s.fd.close() }

// ID returns the kernel's name of the object: "kvm-1234" or "kvm-1235/vcpu-0",
// where the number is the id of the thread that made it.
func (s *Stats) ID() string { return s.id }

// Descs returns the descriptions of all statistics. The caller may not change
// them.
func (s *Stats) Descs() []StatDesc { return s.descs }

// Read returns the value of the statistic called name, or the sum of its buckets
// if it is a histogram. If there is none of that name, errors.Is finds
// [ErrNoStat]. Read allocates nothing.
func (s *Stats) Read(name string) (uint64, error) {
	i, ok := s.index[name]
	if !ok {
		return 0, fmt.Errorf("%s of %s: %w", name, s.id, ErrNoStat)
	}
	var (
		d     = &s.descs[i]
		sum   uint64
		value [8]byte
	)
	for n := range d.Len {
		if err := s.pread(value[:], s.dataAt+int64(d.offset+8*n)); err != nil {
			return 0, err
		}
		sum += binary.NativeEndian.Uint64(value[:])
	}
	return sum, nil
}

// ReadAll returns all statistics, read by one system call.
func (s *Stats) ReadAll() ([]Stat, error) {
	block := make([]byte, s.dataLen)
	if err := s.pread(block, s.dataAt); err != nil {
		return nil, err
	}
	list := make([]Stat, len(s.descs))
	for i, d := range s.descs {
		values := make([]uint64, d.Len)
		for n := range values {
			values[n] = binary.NativeEndian.Uint64(block[d.offset+8*n:])
		}
		list[i] = Stat{StatDesc: d, Values: values}
	}
	return list, nil
}

func (s *Stats) pread(b []byte, at int64) error {
	if !s.fd.acquire() {
		return closedError("pread")
	}
	defer s.fd.release()
	n, err := unix.Pread(s.fd.raw, b, at)
	if err != nil {
		return &Error{Op: "pread", Detail: fmt.Sprintf("statistics of %s at 0x%x", s.id, at), Errno: errnoOf(err)}
	}
	if n < len(b) {
		return fmt.Errorf("statistics of %s at 0x%x: %w", s.id, at, io.ErrUnexpectedEOF)
	}
	return nil
}
