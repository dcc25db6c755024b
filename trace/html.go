package trace

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"io"
)

// timelinePage is the page but for its data.
//
//go:embed timeline.html
var timelinePage []byte

// timelineData is what the page is given. Each event has an element in each of the
// arrays, which takes a third of the space of an object for each.
type timelineData struct {
	Header Header   `json:"header"`
	Tracks []string `json:"tracks"`
	Slots  Lane     `json:"slots"` // index of the track of memory slots
	VCPU   Lane     `json:"vcpu"`  // index of the first vCPU's
	Kinds  []string `json:"kinds"` // by number
	Depth  []int    `json:"depth"` // by kind
	Lost   uint64   `json:"lost"`

	Seq   []uint64 `json:"seq"`
	Time  []int64  `json:"t"` // since the event before, in nanoseconds
	Lasts []int64  `json:"d"` // nanoseconds
	Kind  []int    `json:"k"`
	Track []int    `json:"l"`
	Op    []uint64 `json:"op"`
	GFN   []uint64 `json:"g"`
	Pages []uint64 `json:"n"` // frames from GFN on

	// Strings are indices.
	What    []int    `json:"what"`
	Where   []int    `json:"where"`
	Name    []int    `json:"name"`
	Err     []int    `json:"err"`
	Strings []string `json:"strings"`
}

func writeHTML(w io.Writer, rec *Recording) error {
	d := newTimelineData(rec)
	data, err := json.Marshal(d) // <, > and & are escaped: it cannot end the script
	if err != nil {
		return err
	}
	before, after, ok := bytes.Cut(timelinePage, []byte("{{data}}"))
	if !ok {
		return errors.New("trace: the page has no place for its data")
	}
	for _, part := range [][]byte{before, data, after} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

func newTimelineData(rec *Recording) *timelineData {
	d := &timelineData{
		Header: rec.Header, Tracks: rec.tracks(), Slots: LaneSlots, VCPU: LaneVCPU,
		Seq: []uint64{}, Time: []int64{}, Lasts: []int64{}, Kind: []int{}, Track: []int{}, Op: []uint64{}, // null is no array
		GFN: []uint64{}, Pages: []uint64{}, What: []int{}, Where: []int{}, Name: []int{}, Err: []int{}, Strings: []string{},
	}
	for _, k := range kinds {
		d.Kinds, d.Depth = append(d.Kinds, k.name), append(d.Depth, k.depth)
	}
	numbers := map[string]int{}
	number := func(s string) int {
		n, ok := numbers[s]
		if !ok {
			n = len(d.Strings)
			numbers[s], d.Strings = n, append(d.Strings, s)
		}
		return n
	}
	rec = rec.byWhen()
	lasts := spans(rec.Events)
	before := int64(0)
	for i := range rec.Events {
		e := &rec.Events[i]
		if e.Kind == Lost {
			d.Lost += e.Pages
		}
		d.Seq = append(d.Seq, e.Seq)
		d.Time = append(d.Time, int64(e.When())-before)
		before = int64(e.When())
		d.Lasts = append(d.Lasts, int64(lasts[i]))
		d.Kind = append(d.Kind, int(e.Kind))
		d.Track = append(d.Track, e.track())
		d.Op = append(d.Op, e.Op)
		d.GFN = append(d.GFN, uint64(e.GFN.Start))
		d.Pages = append(d.Pages, e.GFN.NPages())
		d.What = append(d.What, number(e.What()))
		d.Where = append(d.Where, number(e.Where()))
		d.Name = append(d.Name, number(e.Name))
		d.Err = append(d.Err, number(e.Err))
	}
	return d
}
