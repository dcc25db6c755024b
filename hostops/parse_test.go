package hostops

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
)

func TestParse(t *testing.T) {
	at := When{Trigger: At}
	pages := func(start, end uint64) Pages { return Pages{Range: Range{start, end}} }
	for text, want := range map[string]Line{
		"at 0s unmap 16":                     {1, at, Op{Kind: Unmap, Pages: pages(16, 17)}},
		"at 1.5ms map 16..32":                {1, When{Trigger: At, D: 1500 * time.Microsecond}, Op{Kind: Map, Pages: pages(16, 32)}},
		"every 10ms discard 0x10..0x1F":      {1, When{Trigger: Every, D: 10 * time.Millisecond}, Op{Kind: Discard, Pages: pages(16, 31)}},
		"on mark 3 punch all":                {1, When{Trigger: OnMark, Mark: 3}, Op{Kind: Punch, Pages: Pages{Which: AllPages}}},
		"on mark 0xffffffff remove random":   {1, When{Trigger: OnMark, Mark: 1<<32 - 1}, Op{Kind: Remove, Pages: Pages{Which: RandomPages, N: 1}}},
		"on mark free random 4":              {1, When{Trigger: OnMark, Any: true}, Op{Kind: Free, Pages: Pages{Which: RandomPages, N: 4}}},
		"on fault map it":                    {1, When{Trigger: OnFault}, Op{Kind: Map, Pages: Pages{Which: ItPages}}},
		"at 0s protect 7 none":               {1, at, Op{Kind: Protect, Pages: pages(7, 8)}},
		"at 0s protect 7 read":               {1, at, Op{Kind: Protect, Pages: pages(7, 8), Access: addr.Read}},
		"at 0s protect random 2 write":       {1, at, Op{Kind: Protect, Pages: Pages{Which: RandomPages, N: 2}, Access: addr.ReadWrite}},
		"at 0s populate all read":            {1, at, Op{Kind: Populate, Pages: Pages{Which: AllPages}, Access: addr.Read}},
		"at 0s populate all write":           {1, at, Op{Kind: Populate, Pages: Pages{Which: AllPages}, Access: addr.ReadWrite}},
		"at 0s remap 3..5 to spare":          {1, at, Op{Kind: Remap, Pages: pages(3, 5)}},
		"at 0s remap random 2 back":          {1, at, Op{Kind: Remap, Pages: Pages{Which: RandomPages, N: 2}, Back: true}},
		"at 0s remap-keep 3":                 {1, at, Op{Kind: RemapKeep, Pages: pages(3, 4)}},
		"at 0s truncate 0":                   {1, at, Op{Kind: Truncate, Pages: pages(0, 0)}},
		"at 0s truncate 0x20":                {1, at, Op{Kind: Truncate, Pages: pages(0, 32)}},
		"at 0s truncate all":                 {1, at, Op{Kind: Truncate, Pages: Pages{Which: AllPages}}},
		"at 0s store 3 0xffffffffffffffff":   {1, at, Op{Kind: Store, Pages: pages(3, 4), Value: 1<<64 - 1}},
		"at 0s store 3+4088 1":               {1, at, Op{Kind: Store, Pages: pages(3, 4), Offset: 4088, Value: 1}},
		"at 0s store random+0x10 1":          {1, at, Op{Kind: Store, Pages: Pages{Which: RandomPages, N: 1}, Offset: 16, Value: 1}},
		"on fault store it 1":                {1, When{Trigger: OnFault}, Op{Kind: Store, Pages: Pages{Which: ItPages}, Value: 1}},
		"at 0s fill 3..5 255":                {1, at, Op{Kind: Fill, Pages: pages(3, 5), Value: 255}},
		"at 0s fill random 7":                {1, at, Op{Kind: Fill, Pages: Pages{Which: RandomPages, N: 1}, Value: 7}},
		"at 0s fill random 2 7":              {1, at, Op{Kind: Fill, Pages: Pages{Which: RandomPages, N: 2}, Value: 7}},
		"\tat  0s\tpageout 1 # a comment":    {1, at, Op{Kind: PageOut, Pages: pages(1, 2)}},
		"\n# a comment\n\nat 0s guard 1\r\n": {4, at, Op{Kind: Guard, Pages: pages(1, 2)}},
	} {
		s, err := Parse("ops.txt", text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if diff := cmp.Diff(&Script{"ops.txt", []Line{want}}, s); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
		roundTrip(t, s)
	}
}

// roundTrip checks that what a script says of itself is the same script.
func roundTrip(t *testing.T, s *Script) {
	t.Helper()
	again, err := Parse(s.Name, s.String())
	if err != nil {
		t.Errorf("%q: %v", s, err)
		return
	}
	if diff := cmp.Diff(s, again); diff != "" {
		t.Errorf("%q is read as (-was +is):\n%s", s, diff)
	}
}

func TestParseThen(t *testing.T) {
	s := mustParse(t, "at 1ms unmap random 4\n\nthen map it\nthen discard it")
	want := []string{"at 1ms unmap random 4", "then map it", "then discard it"}
	for i, l := range s.Lines {
		if l.String() != want[i] {
			t.Errorf("line %d is %q, want %q", l.N, l, want[i])
		}
	}
	if got := s.Lines[1].N; got != 3 {
		t.Errorf("the second operation is in line %d, want 3", got)
	}
	roundTrip(t, s)
}

func TestParseErrors(t *testing.T) {
	for text, want := range map[string]string{
		"discard 1":                          `1:1: expected at, every, on or then, not "discard"`,
		"  at":                               `1:5: expected a duration such as 1.5ms, and the line ends`,
		"at 5 map 1":                         `1:4: expected a duration such as 1.5ms, not "5"`,
		"at -5ms map 1":                      `1:4: -5ms is too short: the least is 0s`,
		"every 0s map 1":                     `1:7: 0s is too short: the least is 1ns`,
		"on":                                 `1:3: expected mark or fault, and the line ends`,
		"on marks map 1":                     `1:4: expected mark or fault, not "marks"`,
		"on mark 4294967296 map 1":           `1:9: 4294967296 is too large: the most is 4294967295`,
		"on mark 1x map 1":                   `1:9: expected the number of a mark, not "1x"`,
		"then map 1":                         `1:1: "then" follows a line, and there is none before it`,
		"at 0s":                              `1:6: expected an operation, and the line ends`,
		"\n\nat 1ms discrad 16":              `3:8: there is no operation "discrad"; did you mean discard?`,
		"at 0s umap 16":                      `1:7: there is no operation "umap"; did you mean unmap?`,
		"at 0s Map 16":                       `1:7: there is no operation "Map"; did you mean map?`,
		"at 0s teleport 16":                  `1:7: there is no operation "teleport"; there are unmap, map, protect, discard, punch, remap, remap-keep, free, remove, populate, pageout, collapse, mergeable, unmergeable, guard, unguard, truncate, store, fill`,
		"at 0s map":                          `1:10: expected pages: a number, a range such as 16..20, all, random, or it, and the line ends`,
		"at 0s map 010x":                     `1:11: expected pages: a number, a range such as 16..20, all, random, or it, not "010x"`,
		"at 0s map 0x":                       `1:11: expected pages: a number, a range such as 16..20, all, random, or it, not "0x"`,
		"at 0s map -1":                       `1:11: expected pages: a number, a range such as 16..20, all, random, or it, not "-1"`,
		"at 0s map 16..16":                   `1:11: 16..16 has no pages: the second number is the page behind the last`,
		"at 0s map 16..2":                    `1:11: 16..2 has no pages: the second number is the page behind the last`,
		"at 0s map 16..":                     `1:15: expected the page behind the last, and the line ends`,
		"at 0s map ..16":                     `1:11: expected pages: a number, a range such as 16..20, all, random, or it, not ""`,
		"at 0s map 1..2..3":                  `1:14: expected the page behind the last, not "2..3"`,
		"at 0s map 18446744073709551615":     `1:11: 18446744073709551615 is too large: the most is 18446744073709551614`,
		"at 0s map random 0":                 `1:18: 0 pages are none at all`,
		"at 0s map it":                       `1:11: "it" is for lines with "on fault" or "then"; here, name the pages`,
		"on mark map it":                     `1:13: "it" is for lines with "on fault" or "then"; here, name the pages`,
		"at 0s map 1 2":                      `1:13: expected the end of the line, not "2"`,
		"at 0s protect 1":                    `1:16: expected none, read or write, and the line ends`,
		"at 0s protect 1 rw":                 `1:17: expected none, read or write, not "rw"`,
		"at 0s populate 1 none":              `1:18: expected read or write, not "none"`,
		"at 0s remap 1":                      `1:14: expected to spare, or back, and the line ends`,
		"at 0s remap 1 to 2":                 `1:18: expected spare, not "2"`,
		"at 0s remap 1 home":                 `1:15: expected to spare, or back, not "home"`,
		"at 0s truncate random":              `1:16: expected a number of pages, or all, not "random"`,
		"at 0s store 1..3 1":                 `1:13: expected a page: a number, random, or it, and an offset such as +8, not "1..3"`,
		"at 0s store 1":                      `1:14: expected the value of 8 bytes, and the line ends`,
		"at 0s store 1+ 1":                   `1:15: expected an offset in the page, not ""`,
		"at 0s store 1+4 1":                  `1:15: 4 is not a multiple of 8`,
		"at 0s store 1+4096 1":               `1:15: 4096 is too large: the most is 4088`,
		"at 0s store 1 18446744073709551616": `1:15: 18446744073709551616 is too large: the most is 18446744073709551615`,
		"at 0s fill 1":                       `1:13: expected the value of a byte, and the line ends`,
		"at 0s fill 1 256":                   `1:14: 256 is too large: the most is 255`,
	} {
		s, err := Parse("ops.txt", text)
		var at *SyntaxError
		if s != nil || !errors.As(err, &at) || err.Error() != "ops.txt:"+want {
			t.Errorf("%q:\n got %v\nwant ops.txt:%s", text, err, want)
		}
	}
}

// TestKindsInDoc: the package comment has all operations.
func TestKindsInDoc(t *testing.T) {
	text, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kinds {
		if !strings.Contains(string(text), `"`+string(k)+`"`) {
			t.Errorf("the grammar does not have %s", k)
		}
	}
}

// FuzzParse: a text is a script or an error with a position in it, and never both; a
// script is what it says of itself.
func FuzzParse(f *testing.F) {
	names, err := filepath.Glob(examples)
	if err != nil || len(names) == 0 {
		f.Fatal(names, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Add("every 10ms fill random 4 0xff\nthen store it+8 1\non fault map it\nat 0s truncate all")
	f.Add("at 1s remap 1..3 to spare\r\non mark 7 remap all back # home\nthen protect it none")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse("ops.txt", text)
		if err != nil {
			var at *SyntaxError
			if s != nil || !errors.As(err, &at) || at.Line < 1 || at.Line > 1+strings.Count(text, "\n") || at.Col < 1 || at.Col > 1+len(text) {
				t.Fatalf("%q: %v and %v", text, s, err)
			}
			return
		}
		roundTrip(t, s)
	})
}
