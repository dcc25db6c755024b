package perf

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Record is one passing of a tracepoint that was recorded, or a number of them that were
// lost.
type Record struct {
	Lost uint64 // how many were lost before this; then nothing else is set
	ID   uint64 // of the tracepoint
	PID  int    // of the process that passed
	TID  int    // and its thread
	Time uint64 // nanoseconds of CLOCK_MONOTONIC
	Raw  []byte // the tracepoint's fields; good until the callback returns
}

// Types of records of the ring: PERF_RECORD_LOST, PERF_RECORD_SAMPLE.
const (
	typeLost   = 2
	typeSample = 9
)

// headerLen is the size of struct perf_event_header: type, flags, and the size of the
// whole record.
const headerLen = 8

// Decode returns the first record in b, which has whole records as the ring has them, and
// its length. One of another type than Record has is returned empty, as is a sample without
// fields. A record that is cut, or contradicts itself, is io.ErrUnexpectedEOF.
func Decode(b []byte) (rec Record, n int, err error) {
	fail := func(what string) (Record, int, error) {
		return Record{}, 0, fmt.Errorf("perf record: %s: %w", what, io.ErrUnexpectedEOF)
	}
	if len(b) < headerLen {
		return fail("no room for the header")
	}
	order := binary.NativeEndian
	n = int(order.Uint16(b[6:]))
	if n < headerLen || n > len(b) {
		return fail(fmt.Sprintf("the size is %d, of %d bytes", n, len(b)))
	}
	body := b[headerLen:n]
	switch order.Uint32(b) {
	case typeLost: // an ID, and the number
		if len(body) < 16 {
			return fail("a loss is too short")
		}
		rec.Lost = order.Uint64(body[8:])
	case typeSample: // as sampleType selects, in the kernel's order
		if len(body) < 20 {
			return fail("a sample is too short")
		}
		size := order.Uint32(body[16:])
		if uint64(size) > uint64(len(body)-20) {
			return fail(fmt.Sprintf("%d bytes of fields in a sample of %d", size, n))
		}
		rec = Record{
			PID: int(int32(order.Uint32(body))), TID: int(int32(order.Uint32(body[4:]))),
			Time: order.Uint64(body[8:]), Raw: body[20 : 20+size],
		}
		if size >= 2 { // all tracepoints have it in the same place, as common_type
			rec.ID = uint64(order.Uint16(rec.Raw))
		}
	}
	return rec, n, nil
}

// recordLen is the length that the record at the start of b says that it has, or 0.
func recordLen(b []byte) int {
	if len(b) < headerLen {
		return 0
	}
	return int(binary.NativeEndian.Uint16(b[6:]))
}
