package trace

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// story is a page that is unmapped under a guest, and mapped again, with an event of each kind.
func story() *Recording {
	ram, page := addr.GFNRange{Start: 0x200, End: 0x300}, addr.GFNRange{Start: 0x205, End: 0x206}
	hvas, pageHVA := addr.HVAs(0x7f0000000000, 0x100000), addr.HVAs(0x7f0000005000, addr.PageSize)
	rec := &Recording{Header: Header{
		Version: Version, Start: time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC), Guest: "counter pages=8", VCPUs: 2,
		HostOps: "ops", Seed: 3, RAM: ram,
	}}
	for _, e := range []Event{
		{Kind: SlotCreate, Slot: 1, GFN: ram, HVA: hvas, Acc: addr.ReadWrite},
		{Kind: HostOp, Op: 1, Name: "unmap", HVA: pageHVA},
		{Kind: InvalidateStart, Op: 1, Name: "unmap", HVA: pageHVA},
		{Kind: Zap, Op: 1, GFN: page, HVA: pageHVA, Pages: 1},
		{Kind: Hold, Op: 1, Name: "slots"},
		{Kind: Exit, VCPU: 1, Name: "kick"},
		{Kind: SlotDelete, Op: 1, Slot: 1, GFN: ram, HVA: hvas, Acc: addr.ReadWrite},
		{Kind: SlotCreate, Op: 1, Slot: 0, GFN: page, HVA: pageHVA, Acc: addr.Read, Err: "no space left on device"},
		{Kind: SlotPolicy, Op: 1, Name: "coarse"},
		{Kind: Release, Op: 1, Name: "slots"},
		{Kind: Kernel, Op: 1, Name: "uffd-unmap", HVA: pageHVA},
		{Kind: InvalidateEnd, Op: 1, Name: "unmap", HVA: pageHVA},
		{Kind: HostOpEnd, Op: 1, Name: "unmap", HVA: pageHVA, Err: "no space left on device"},
		{Kind: Kernel, Op: 1, Name: "kvm_unmap_hva_range", HVA: pageHVA, At: 14400}, // while vCPUs are held
		{Kind: Kernel, Name: KernelLost, Pages: 2},
		{Kind: Exit, Op: 1, VCPU: 1, Name: "KVM_EXIT_MMIO", GFN: page, Acc: addr.ReadWrite},
		{Kind: Touch, Op: 1, VCPU: 1, Name: Waits, GFN: page, Acc: addr.ReadWrite},
		{Kind: Harvest, Pages: 7},
		{Kind: HostOp, Op: 2, Name: "map", HVA: pageHVA},
		{Kind: HostOpEnd, Op: 2, Name: "map", HVA: pageHVA},
		{Kind: Touch, Op: 2, VCPU: 1, Name: Resumed, GFN: page, Acc: addr.ReadWrite},
		{Kind: Complete, Op: 2, VCPU: 0, GFN: page, Acc: addr.Read},
		{Kind: Kernel, Op: 2, Name: "kvm_page_fault", GFN: page, At: 31000},
		{Kind: Lost, Pages: 12},
		{Kind: HostOp, Op: 3, Name: "discard", HVA: pageHVA},
	} {
		n := uint64(len(rec.Events) + 1)
		if e.Kind == Lost {
			n += 11
		} else if e.Op == 3 {
			n += 11
		}
		e.Seq, e.Time = n, time.Duration(len(rec.Events))*1500*time.Nanosecond
		rec.Events = append(rec.Events, e)
	}
	return rec
}

func write(t testing.TB, rec *Recording, f Format) string {
	t.Helper()
	var b strings.Builder
	w := NewWriter(&b, f, rec.Header)
	for part := range slices.Chunk(rec.Events, 5) {
		if err := w.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestFormatsOfEveryKind(t *testing.T) {
	rec := story()
	for k := Kind(1); k < numKinds; k++ {
		if !slices.ContainsFunc(rec.Events, func(e Event) bool { return e.Kind == k }) {
			t.Errorf("the story has no %v", k)
		}
	}
	for _, f := range []Format{Text, JSONLines, Chrome} {
		t.Run(f.String(), func(t *testing.T) {
			got := write(t, rec, f)
			file := filepath.Join("testdata", f.String()+".golden")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o666); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", file, diff)
			}
		})
	}
}

func TestReadBack(t *testing.T) {
	for name, rec := range map[string]*Recording{
		"every kind": story(), "many": played(2000), "no events": {Header: story().Header},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Read("file", strings.NewReader(write(t, rec, JSONLines)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(rec, got); diff != "" {
				t.Errorf("read back (-want +got):\n%s", diff)
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	const header = `{"gvm_trace":1,"start":"2026-01-02T03:04:05Z","guest":"g","vcpus":2,"ram":{"start":512,"end":768}}` + "\n"
	for text, want := range map[string]string{
		"": "f:1: it is empty",
		header + `{"seq":1,"t":0,"kind":"host-op"}`: "f:2: the line has no end: the recording was cut off",
		"hello\n":                "f:1: this is not the header of a recording: invalid character",
		`{"seq":1}` + "\n":       `f:1: this is not the header of a recording: unknown field "seq"`,
		`{"guest":"g"}` + "\n":   "f:1: the recording is of version 0, and this reads version 1",
		`{"gvm_trace":2}` + "\n": "f:1: the recording is of version 2",
		`{"gvm_trace":1,"vcpus":1000000000}` + "\n":              "f:1: 1000000000 vCPUs are not in 0 to 4096",
		`{"gvm_trace":1,"ram":{"start":2,"end":1}}` + "\n":       "f:1: RAM, gfn [0x2, 0x1), ends before it begins",
		`{"gvm_trace":1} {}` + "\n":                              "f:1: this is not the header of a recording: there is something behind it",
		header + "\n":                                            "f:2: this is not an event: EOF",
		header + header:                                          `f:2: this is not an event: unknown field "gvm_trace"`,
		header + "[]\n":                                          "f:2: this is not an event: cannot unmarshal array",
		header + "{}\n":                                          `f:2: there is no kind of event ""`,
		header + `{"kind":"nap"}` + "\n":                         `f:2: there is no kind of event "nap"`,
		header + `{"kind":"host-op"}` + "\n":                     "f:2: event 0 comes after event 0",
		header + `{"seq":1,"kind":"host-op","slot":1}` + "\n":    `f:2: host-op has no field "slot"`,
		header + `{"seq":1,"kind":"host-op","error":"e"}` + "\n": `f:2: host-op has no field "error"`,
		header + `{"seq":1,"kind":"zap","name":"z"}` + "\n":      `f:2: zap has no field "name"`,
		header + `{"seq":1,"kind":"host-op","hva":{"start":4096,"end":4096}}` + "\n":                   "f:2: hva [0x1000, 0x1000) is empty",
		header + `{"seq":1,"kind":"zap","gfn":{"start":2,"end":1}}` + "\n":                             "f:2: gfn [0x2, 0x1) is empty",
		header + `{"seq":1,"kind":"zap","gfn":{"start":-2,"end":1}}` + "\n":                            "f:2: this is not an event: cannot unmarshal number -2",
		header + `{"seq":1,"kind":"slot-create"}` + "\n":                                               "f:2: slot-create is of no slot",
		header + `{"seq":1,"kind":"guest-exit"}` + "\n":                                                "f:2: guest-exit is of no vCPU",
		header + `{"seq":1,"kind":"guest-exit","vcpu":2}` + "\n":                                       "f:2: it is of vCPU 2, and the header has 2",
		header + `{"seq":1,"kind":"guest-exit","vcpu":-1}` + "\n":                                      "f:2: it is of vCPU -1",
		header + `{"seq":1,"kind":"guest-exit","vcpu":0,"access":"all"}` + "\n":                        `f:2: there is no access "all"`,
		header + `{"seq":1,"t":-1,"kind":"host-op"}` + "\n":                                            "f:2: the event is at -1ns, and the one before at 0s",
		header + `{"seq":1,"t":9,"at":8,"kind":"host-op"}` + "\n":                                      `f:2: host-op has no field "at"`,
		header + `{"seq":1,"t":9,"at":10,"kind":"kernel"}` + "\n":                                      "f:2: it happened at 10ns, and was recorded at 9ns",
		header + `{"seq":1,"t":9,"at":-1,"kind":"kernel"}` + "\n":                                      "f:2: it happened at -1ns, and was recorded at 9ns",
		header + strings.Repeat(`{"seq":5,"t":9,"kind":"host-op"}`+"\n", 2):                            "f:3: event 5 comes after event 5",
		header + `{"seq":1,"t":9,"kind":"host-op"}` + "\n" + `{"seq":2,"t":8,"kind":"host-op"}` + "\n": "f:3: the event is at 8ns, and the one before at 9ns",
		header + `{"seq":1,"kind":"host-op","name":"` + strings.Repeat("n", maxLine) + `"}` + "\n":     "f:2: the line is longer than 1048576 bytes",
	} {
		name := text
		if len(name) > 200 {
			name = name[:100] + "..."
		}
		t.Run(name, func(t *testing.T) {
			rec, err := Read("f", strings.NewReader(text))
			if _, ok := errors.AsType[*FormatError](err); !ok || rec != nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
	t.Run("unreadable", func(t *testing.T) {
		_, err := Read("f", io.MultiReader(strings.NewReader(header), iotest.ErrReader(os.ErrPermission)))
		if !errors.Is(err, os.ErrPermission) || err.Error() != "read f: permission denied" {
			t.Errorf("got %v", err)
		}
	})
}

// FuzzRead reads anything. What is read is written and read back the same, and all formats
// can write it.
func FuzzRead(f *testing.F) {
	f.Add([]byte(write(f, story(), JSONLines)))
	f.Add([]byte("{\"gvm_trace\":1}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		rec, err := Read("f", bytes.NewReader(text))
		if (rec == nil) == (err == nil) {
			t.Fatalf("got %v and the error %v", rec, err)
		}
		if err != nil {
			return
		}
		for _, format := range Formats() {
			out := write(t, rec, format)
			if format != JSONLines {
				continue
			}
			again, err := Read("f", strings.NewReader(out))
			if err != nil {
				t.Fatalf("what was written cannot be read: %v", err)
			}
			if diff := cmp.Diff(rec, again); diff != "" {
				t.Fatalf("read back (-want +got):\n%s", diff)
			}
		}
	})
}

// TestChrome: the file is one JSON document; all lanes have names; each slice that has a
// duration is inside of the thread's others, and each arrow has two ends.
func TestChrome(t *testing.T) {
	var doc struct {
		TraceEvents []chromeEvent
		OtherData   Header
	}
	rec := played(2000)
	if err := json.Unmarshal([]byte(write(t, rec, Chrome)), &doc); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(rec.Header, doc.OtherData); diff != "" {
		t.Errorf("the header (-want +got):\n%s", diff)
	}
	names := map[int]string{}
	arrows := map[uint64]string{}
	counts := map[string]int{}
	for _, e := range doc.TraceEvents {
		counts[e.Phase]++
		switch e.Phase {
		case phaseMetadata:
			if e.Name == "thread_name" {
				names[e.TID] = e.Args["name"].(string)
			}
		case phaseFlowBegin, phaseFlowEnd:
			arrows[e.ID] += e.Phase
		case phaseComplete, phaseInstant:
			if names[e.TID] == "" || e.Time == nil || (e.Lasts > 0) != (e.Phase == phaseComplete) {
				t.Fatalf("event %+v, in thread %q", e, names[e.TID])
			}
		}
	}
	if got, want := fmt.Sprint(names), "map[1:host operations 2:notifier 3:shadow 4:KVM slots 5:gate 6:kernel 7:vCPU 0 8:vCPU 1]"; got != want {
		t.Errorf("the threads are %s, want %s", got, want)
	}
	for id, ends := range arrows {
		if ends != phaseFlowBegin+phaseFlowEnd {
			t.Errorf("arrow %d has the ends %q", id, ends)
		}
	}
	if counts[phaseComplete] < 100 || counts[phaseInstant] < 100 || len(arrows) < 10 {
		t.Errorf("there are events of the phases %v and %d arrows", counts, len(arrows))
	}
}

func TestSpans(t *testing.T) {
	events := []Event{
		0: {Kind: HostOp, Op: 1}, 1: {Kind: InvalidateStart, Op: 1, Name: "unmap"}, 2: {Kind: InvalidateStart, Op: 1, Name: "map"},
		3: {Kind: Hold, Name: "slots"}, 4: {Kind: Hold, Name: "pause"}, 5: {Kind: Release, Name: "slots"},
		6: {Kind: InvalidateEnd, Op: 1, Name: "map"}, 7: {Kind: InvalidateEnd, Op: 1, Name: "unmap"}, 8: {Kind: HostOpEnd, Op: 1},
		9: {Kind: Touch, VCPU: 1, Name: Waits}, 10: {Kind: Touch, VCPU: 0, Name: Floated}, 11: {Kind: Touch, VCPU: 1, Name: Stopped},
		12: {Kind: HostOpEnd, Op: 7}, 13: {Kind: Release, Name: "slots"}, 14: {Kind: Touch, VCPU: 0, Name: Waits}, 15: {Kind: Zap},
	}
	for i := range events {
		events[i].Time = time.Duration(i)
	}
	want := []time.Duration{0: 8, 1: 6, 2: 4, 3: 2, 4: 11, 9: 2, 14: 1, 15: 0}
	if diff := cmp.Diff(want, spans(events)); diff != "" {
		t.Errorf("the events last (-want +got):\n%s", diff)
	}
}

func TestPageOf(t *testing.T) {
	var got []string
	for _, e := range Page(story().Events, 0x205) {
		got = append(got, fmt.Sprint(e.Op, " ", e.Kind))
	}
	want := []string{"0 slot-create", "1 host-op", "1 invalidate-start", "1 zap", "1 hold", "1 slot-delete", "1 slot-create", "1 slot-policy", "1 release",
		"1 kernel", "1 invalidate-end", "1 host-op-end", "1 kernel", "1 guest-exit", "1 guest-touch", "2 host-op", "2 host-op-end", "2 guest-touch",
		"2 guest-complete", "2 kernel", "0 lost"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("of page 0x205 (-want +got):\n%s", diff)
	}
	// A fault at another page is not of this one, though the operation is.
	op := Event{Kind: Zap, Op: 1, GFN: addr.GFNRange{Start: 1, End: 3}}
	fault := Event{Kind: Kernel, Op: 1, GFN: addr.GFNRange{Start: 2, End: 3}}
	for gfn, want := range map[addr.GFN]int{1: 1, 2: 2} {
		if of := Page([]Event{op, fault}, gfn); len(of) != want {
			t.Errorf("of page %d there are %v", gfn, of)
		}
	}
	got = nil
	for _, e := range Page(story().Events, 0x206) {
		got = append(got, fmt.Sprint(e.Op, " ", e.Kind))
	}
	if diff := cmp.Diff([]string{"0 slot-create", "0 lost"}, got); diff != "" {
		t.Errorf("of page 0x206 (-want +got):\n%s", diff)
	}
}

// TestSpansOfHolds: a hold ends with the release of its operation.
func TestSpansOfHolds(t *testing.T) {
	events := []Event{
		0: {Kind: Hold, Name: "slots", Op: 1}, 1: {Kind: Hold, Name: "slots"}, 2: {Kind: Hold, Name: "slots", Op: 1},
		3: {Kind: Release, Name: "slots", Op: 1}, 4: {Kind: Release, Name: "slots", Op: 1}, 5: {Kind: Release, Name: "slots"},
	}
	for i := range events {
		events[i].Time = time.Duration(i)
	}
	want := []time.Duration{0: 4, 1: 4, 2: 1, 5: 0}
	if diff := cmp.Diff(want, spans(events)); diff != "" {
		t.Errorf("the events last (-want +got):\n%s", diff)
	}
}

// TestWhenItHappened: formats in which an event has a place in time have it at the time when
// it happened, and others at its number.
func TestWhenItHappened(t *testing.T) {
	rec := &Recording{story().Header, []Event{
		{Seq: 1, Time: 1000, Kind: HostOp, Op: 1, Name: "discard"},
		{Seq: 2, Time: 3000, Kind: HostOpEnd, Op: 1, Name: "discard"},
		{Seq: 3, Time: 5000, At: 2000, Kind: Kernel, Op: 1, Name: "zap"},
		{Seq: 4, Time: 5000, Kind: Kernel, Op: 2, Name: "event"},
	}}
	var doc struct{ TraceEvents []chromeEvent }
	if err := json.Unmarshal([]byte(write(t, rec, Chrome)), &doc); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range doc.TraceEvents {
		if e.Time != nil {
			got = append(got, fmt.Sprint(e.Name, " ", *e.Time, " ", e.Lasts, " ", e.Args["recorded"]))
		}
	}
	if diff := cmp.Diff([]string{"discard 1 2 <nil>", "zap 2 0 5", "event 5 0 <nil>"}, got); diff != "" {
		t.Errorf("Chrome's events (-want +got):\n%s", diff)
	}
	d := newTimelineData(rec)
	if diff := cmp.Diff([]int64{1000, 1000, 1000, 2000}, d.Time); diff != "" || !slices.Equal(d.Seq, []uint64{1, 3, 2, 4}) || d.Lasts[0] != 2000 {
		t.Errorf("the page's events %v last %v; their times (-want +got):\n%s", d.Seq, d.Lasts, diff)
	}
	lines := strings.Split(write(t, rec, Text), "\n")
	if got := strings.Join(strings.Fields(lines[5]), " "); got != "0.005000 #1 kernel zap, 3.0 us ago" {
		t.Errorf("the line of the third event is %q", got)
	}
}

// TestWriteSince: what is missing is told of where it is missing.
func TestWriteSince(t *testing.T) {
	l := NewLog(4)
	var got []Event
	w := writerFunc(func(events []Event) error { got = append(got, events...); return nil })
	seq := uint64(0)
	for _, n := range []int{2, 9, 0, 1} {
		for range n {
			l.Record(Event{Kind: Harvest, Pages: uint64(n)})
		}
		var err error
		if seq, err = l.WriteSince(seq, w); err != nil {
			t.Fatal(err)
		}
	}
	var text []string
	for _, e := range got {
		text = append(text, fmt.Sprint(e.Seq, " ", e.What()))
	}
	want := []string{"1 harvest, 2 dirty pages", "2 harvest, 2 dirty pages", "7 5 events lost before this", "8 harvest, 9 dirty pages",
		"9 harvest, 9 dirty pages", "10 harvest, 9 dirty pages", "11 harvest, 9 dirty pages", "12 harvest, 1 dirty page"}
	if diff := cmp.Diff(want, text); diff != "" {
		t.Errorf("written (-want +got):\n%s", diff)
	}
}

type writerFunc func([]Event) error

func (f writerFunc) Write(events []Event) error { return f(events) }
func (f writerFunc) Close() error               { return nil }

// TestWriteFails: the error of what is written to is that of Write or of Close.
func TestWriteFails(t *testing.T) {
	for _, f := range Formats() {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		w := NewWriter(full, f, Header{})
		if err := errors.Join(w.Write(story().Events), w.Close()); err == nil || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("%v: got the error %v", f, err)
		}
		full.Close()
	}
}
