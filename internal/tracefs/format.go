package tracefs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
)

// Tracepoint is a tracepoint of the running kernel.
type Tracepoint struct {
	ID     uint64  // by which perf_event_open knows it
	Fields []Field // of its records, in the order of their offsets; the first few are common to all tracepoints
}

// Field is one field of a tracepoint's records.
type Field struct {
	Name         string
	Offset, Size int // in bytes
}

// Field returns the field of that name, or fs.ErrNotExist.
func (t Tracepoint) Field(name string) (Field, error) {
	for _, f := range t.Fields {
		if f.Name == name {
			return f, nil
		}
	}
	return Field{}, fmt.Errorf("the tracepoint has no field %q: %w", name, os.ErrNotExist)
}

// Tracepoint looks a tracepoint up. One that the kernel lacks, or whose module is not
// loaded, is fs.ErrNotExist.
func (fs *FS) Tracepoint(system, name string) (Tracepoint, error) {
	text, err := fs.readFile("events/" + system + "/" + name + "/format")
	if err != nil {
		return Tracepoint{}, err
	}
	t, err := ParseFormat(text)
	if err != nil {
		return Tracepoint{}, fmt.Errorf("tracefs: format of %s:%s: %w", system, name, err)
	}
	return t, nil
}

var fieldLine = regexp.MustCompile(`^\s*field:(.*?)([A-Za-z_][A-Za-z0-9_]*)(?:\[[^\]]*\])?;\s*offset:(\d+);\s*size:(\d+);`)

// ParseFormat parses the text of a tracepoint's format file. Lines that it does not know
// are passed over; a text without an ID or without fields is an error.
func ParseFormat(text string) (Tracepoint, error) {
	var t Tracepoint
	hasID := false
	for line := range strings.Lines(text) {
		if id, ok := strings.CutPrefix(line, "ID:"); ok {
			var err error
			if t.ID, err = strconv.ParseUint(strings.TrimSpace(id), 10, 64); err != nil {
				return Tracepoint{}, err
			}
			hasID = true
		}
		found := fieldLine.FindStringSubmatch(line)
		if found == nil {
			continue
		}
		offset, err := strconv.ParseUint(found[3], 10, 16)
		if err != nil {
			return Tracepoint{}, err
		}
		size, err := strconv.ParseUint(found[4], 10, 16)
		if err != nil {
			return Tracepoint{}, err
		}
		t.Fields = append(t.Fields, Field{Name: found[2], Offset: int(offset), Size: int(size)})
	}
	if !hasID || t.Fields == nil {
		return Tracepoint{}, errors.New("it has no ID, or no fields")
	}
	return t, nil
}

// Uint returns the unsigned field f of a record, whose size is 1, 2, 4 or 8 bytes; false
// if the record is too short, or the size another one.
func (f Field) Uint(record []byte) (v uint64, ok bool) {
	if f.Offset < 0 || f.Size < 0 || f.Offset+f.Size > len(record) {
		return 0, false
	}
	b := record[f.Offset : f.Offset+f.Size]
	switch f.Size {
	case 1:
		return uint64(b[0]), true
	case 2:
		return uint64(binary.NativeEndian.Uint16(b)), true
	case 4:
		return uint64(binary.NativeEndian.Uint32(b)), true
	case 8:
		return binary.NativeEndian.Uint64(b), true
	}
	return 0, false
}
