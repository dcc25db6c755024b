package litmus

import (
	"errors"
	"strings"
	"testing"
)

// smallest is a test with as little as possible.
const smallest = "litmus t\npage x\nguest P0\n r0 = load x\nforbidden P0:r0 == 1\n"

func TestParse(t *testing.T) {
	x := parse(t, `# A comment.
litmus all-of-it
about The first line
about and the second.

machine lazy dirty ring
page x memfd pages 3 = 1 0x10
page y huge
alias a of y
instances 5
needs root

guest P0
	r0 = load x[1]	# and another
	store a 0x7fffffff
host H0
	raw discard x
	late punch x
	r1 = load y held
	protect x read
	wait guests
setup
	harvest
forbidden P0:r0==1&&(H0:r1!=2||!x[1]<=3)
allowed a > 4
observe y
sensitive form-1
about Why.
machine disconnected
host H0
	replace x 3
host H1
	delay 1
sensitive form-2
guest P0
	store x 1
`)
	if x.Name != "all-of-it" || x.About != "The first line and the second." || x.Instances != 5 || !x.Machine.Lazy || !x.Machine.Logged ||
		len(x.Pages) != 2 || x.Pages[0].NPages != 3 || x.Pages[0].Init[1] != 16 || !x.Pages[1].Huge || len(x.Setup) != 1 {
		t.Errorf("the test is %+v", x)
	}
	if got := x.Hosts[0].Statements[0].String() + "; " + x.Hosts[0].Statements[3].String() + "; " + x.Guests[0].Statements[1].String(); got != "raw discard x; protect x read; store a 2147483647" {
		t.Errorf("statements are %s", got)
	}
	if got, want := x.Clauses[0].Cond.String(), "P0:r0 == 1 && (H0:r1 != 2 || !(x[1] <= 3))"; got != want {
		t.Errorf("the condition is %s, want %s", got, want)
	}
	if got := x.outcomeText(make([]uint64, len(x.Observed))); got != "P0:r0=0 H0:r1=0 x[1]=0 a=0 y=0" {
		t.Errorf("an outcome is %s", got)
	}
	if len(x.Sensitive) != 2 {
		t.Fatalf("forms: %v", x.Sensitive)
	}
	f, g := x.Sensitive[0], x.Sensitive[1]
	if f.FullName() != "all-of-it/form-1" || f.About != "Why." || f.Machine != (Machine{Disconnected: true}) || len(f.Hosts) != 2 || f.Hosts[0].Statements[0].Op != Replace || len(f.Setup) != 1 {
		t.Errorf("the first form is %+v", f)
	}
	if g.Machine != x.Machine || len(g.Hosts) != 1 || g.Guests[0].Statements[0].Value != 1 || len(x.Guests[0].Statements) != 2 {
		t.Errorf("the second form is %+v", g)
	}
}

func TestSyntaxErrors(t *testing.T) {
	head := "litmus t\npage x\npage m memfd\npage h huge\n"
	guest := head + "guest P0\n r0 = load x\n"
	for text, want := range map[string]string{
		"":                                      `1:1: the text has no test: it begins with "litmus" and a name`,
		"page x":                                `1:1: expected "litmus" and the name of the test, not "page"`,
		"litmus":                                `1:7: expected the name of the test, and the line ends`,
		"litmus r3":                             `1:8: r3 is a register, and no name`,
		"litmus 3":                              `1:8: expected the name of the test, not "3"`,
		"litmus a b":                            `1:10: expected the end of the line, not "b"`,
		"litmus t\nlitmus u":                    `2:1: a file has one test, and this is another`,
		"litmus t\n ä":                          `2:2: there is no use for 'ä' here`,
		"litmus t\n\tpgae x":                    `2:2: there is no "pgae"; did you mean page?`,
		"litmus t\nload x":                      `2:1: a statement belongs to a thread`,
		head + "page x":                         `5:6: there is a x already`,
		head + "page y warm":                    `5:8: expected the end of the line, not "warm"`,
		head + "page y pages 0":                 `5:14: no page at all is no page`,
		head + "page y pages 513":               `5:14: 513 is too large: the most is 512`,
		head + "page y = -1":                    `5:10: there is no use for '-' here`,
		head + "page y = 1 2 3 4 5 6 7 8 9":     `5:26: a page has 8 words`,
		head + "page y = 0x80000000":            `5:10: 0x80000000 is too large: the most is 2147483647`,
		head + "alias a x":                      `5:9: expected of, not "x"`,
		head + "alias a of z":                   `5:12: expected the name of a page, not "z"`,
		head + "instances 0":                    `5:11: no instance at all`,
		head + "instances 1025":                 `5:11: 1025 is too large: the most is 1024`,
		head + "machine fast":                   `5:9: expected lazy, ring0, disconnected, or dirty and a source, not "fast"`,
		head + "machine dirty rings":            `5:15: expected a dirty source, not "rings"; did you mean ring?`,
		head + "needs money":                    `5:7: expected what is needed, not "money"`,
		guest:                                   `7:1: the test does not say what is forbidden, allowed or required`,
		head + "forbidden x == 1":               `6:1: the test has no guest thread`,
		guest + "guest P0":                      `7:1: there are two of P0`,
		guest + "host P0":                       `7:1: P0 is the name of a thread of the other side`,
		guest + "page y":                        `7:1: pages come before the threads`,
		guest + "about it":                      `7:1: "about" is for the test`,
		guest + " r8 = load x":                  `7:2: expected a statement of the guest, not "r8"`,
		guest + " r0 = laod x":                  `7:7: expected a statement of the guest with a result, not "laod"; did you mean load?`,
		guest + " r0 load x":                    `7:5: expected =, not "load"`,
		guest + " r0 = load z":                  `7:12: expected the name of a page, an alias or a mapped address, not "z"`,
		guest + " r0 = load x[8]":               `7:14: 8 is too large: the most is 7`,
		guest + " r0 = load x[1":                `7:15: expected ], and the line ends`,
		guest + " r0 = load x hva":              `7:14: expected the end of the line, not "hva"`,
		guest + " store x":                      `7:9: expected what is stored, and the line ends`,
		guest + " store x 2147483648":           `7:10: 2147483648 is too large`,
		guest + " store x 99999999999999999999": `7:10: 99999999999999999999 is too large`,
		guest + " store x 0xg":                  `7:10: expected what is stored, not "0xg"`,
		guest + " discard x":                    `7:2: expected a statement of the guest, not "discard"`,
		guest + " flush x\nallowed x == 1":      `7:2: flush takes "machine ring0"`,
		guest + " delay 1048576\n delay 1\nallowed x == 1":                            `8:2: the delays of P0 are more than 1048576 in all`,
		head + "instances 65\nguest P0\n mark\nhost H0\n delay 1\nallowed x == 1":     `11:1: 65 instances are more than the 64 of a test with threads of the host`,
		guest + "host H0\n" + strings.Repeat(" replace x 1\n", 33) + "allowed x == 1": `40:2: there are more than 32 replacements`,
		guest + "host H0\n wait P1\nallowed x == 1":                                   `8:2: there is no guest thread P1 to wait for`,
		guest + "host H0\n wait P0\nallowed x == 1":                                   `8:2: P0 has no mark to wait for`,
		guest + "host H0\n pause\n wait guests\nallowed x == 1":                       `9:2: H0 waits for guests that it has paused`,
		guest + "host H0\n resume\nallowed x == 1":                                    `8:2: H0 resumes what it has not paused`,
		guest + "host H0\n log on\nallowed x == 1":                                    `8:2: log takes a machine with "dirty" and a source`,
		guest + "host H0\n log up":                                                    `8:6: expected on or off, not "up"`,
		guest + "host H0\n raw unmap x":                                               `8:6: expected an operation that can be raw, not "unmap"`,
		guest + "host H0\n late move x":                                               `8:7: expected an operation that can be late, not "move"`,
		guest + "host H0\n collapse x":                                                `8:11: x is not huge, which collapse takes`,
		guest + "host H0\n punch x":                                                   `8:8: punch is not for anonymous memory, which x is`,
		guest + "host H0\n free m":                                                    `8:7: free is for anonymous memory, and m is memfd`,
		guest + "host H0\n protect x all":                                             `8:12: expected what is allowed, not "all"`,
		guest + "host H0\n fence":                                                     `8:2: expected a statement of the host, not "fence"`,
		guest + "setup\n r0 = load x":                                                 `8:2: setup has no registers`,
		guest + "setup\n wait guests\nallowed x == 1":                                 `8:2: setup waits for guests that have not begun`,
		guest + "forbidden P0:r0 = 1":                                                 `7:17: to compare, write ==`,
		guest + "forbidden P0:r1 == 1":                                                `7:14: P0 sets no r1`,
		guest + "forbidden P1:r0 == 1":                                                `7:11: expected the name of a thread, not "P1"`,
		guest + "forbidden r0 == 1":                                                   `7:11: r0 of which thread? write, for example, P0:r0`,
		guest + "forbidden x":                                                         `7:12: expected a comparison: ==, !=, <, <=, > or >=, and the line ends`,
		guest + "forbidden (x == 1":                                                   `7:18: expected ), and the line ends`,
		guest + "forbidden x == 1 &&":                                                 `7:20: expected the name of a page, an alias or a mapped address, and the line ends`,
		guest + "forbidden " + strings.Repeat("!", 40) + "x == 1":                     `: the condition is nested more than 32 deep`,
		guest + "forbidden x == 1" + strings.Repeat(" || x == 1", 70):                 `: the condition is too long`,
		guest + "allowed x == 1\nsensitive f\nguest P0\n store x 1":                   `8:1: a form in which a forbidden outcome must be seen, and the test forbids none`,
		guest + "forbidden x == 1\nsensitive f\n":                                     `8:1: the form f is the test itself`,
		guest + "forbidden x == 1\nsensitive f\npage y":                               `9:1: "page" is for the whole test: it comes before the first form`,
		guest + "forbidden x == 1\nsensitive f\nhost H0\n unmap x\nsensitive f":       `11:11: there are two forms f`,
		head + "table x maps v to m\nguest P0\n store x 1":                            `7:8: x is a page table: it changes by point alone`,
		head + "table x maps v to m\nguest P0\n store v 1\nhost H0\n unmap x":         `9:8: x is a page table: it changes by point alone`,
		head + "table x maps v to m\nguest P0\n store v 1\nhost H0\n store v 1":       `9:2: v is an address of the guest's: the host uses the page`,
		"litmus " + strings.Repeat("a", 41):                                           `1:8: a name of 41 bytes is longer than 40`,
		strings.Repeat("#", MaxText+1):                                                `1:1: a test of 65537 bytes is longer than 65536`,
	} {
		x, err := Parse("f", text)
		var e *SyntaxError
		if !errors.As(err, &e) {
			t.Errorf("%q is %v, %v; want an error with %q", text, x, err, want)
			continue
		}
		if got := strings.TrimPrefix(err.Error(), "f:"); !strings.Contains(got, want) || want[0] != ':' && !strings.HasPrefix(got, want) {
			t.Errorf("%q: the error is %q; want %q", text, got, want)
		}
	}
}

// TestCollection looks at the built-in tests: each says what it asks, and has a form in
// which a forbidden outcome must be seen, unless it forbids none.
func TestCollection(t *testing.T) {
	all := All()
	if len(all) < 30 {
		t.Errorf("there are %d built-in tests", len(all))
	}
	for _, x := range all {
		if x.File != x.Name+".litmus" {
			t.Errorf("%s is in the file %s", x.Name, x.File)
		}
		if len(strings.Fields(x.About)) < 10 {
			t.Errorf("%s: says too little of what it asks: %q", x.Name, x.About)
		}
		forbids := false
		for _, c := range x.Clauses {
			forbids = forbids || c.Class == Forbidden
		}
		if forbids && len(x.Sensitive) == 0 {
			t.Errorf("%s has no sensitive form", x.Name)
		}
		for _, f := range x.Sensitive {
			if f.About == "" {
				t.Errorf("%s does not say which rule it breaks", f.FullName())
			}
		}
	}
}

func TestLookup(t *testing.T) {
	if x, err := Lookup("mp"); err != nil || x.Name != "mp" {
		t.Errorf("mp is %v, %v", x, err)
	}
	if _, err := Lookup("corr-replac"); err == nil || !strings.Contains(err.Error(), "did you mean corr-replace?") {
		t.Errorf("the error is %v", err)
	}
	if _, err := Lookup("something else"); err == nil {
		t.Error("there is a test called something else")
	}
}

// FuzzParse checks that what cannot be parsed is an error with a place, and that what can be
// has conditions that can be parsed again, to the same text.
func FuzzParse(f *testing.F) {
	for _, x := range All() {
		f.Add(x.Text)
	}
	f.Add(everything)
	f.Add(smallest)
	f.Fuzz(func(t *testing.T, text string) {
		x, err := Parse("f", text)
		if err != nil {
			var e *SyntaxError
			if x != nil || !errors.As(err, &e) || e.Line < 1 || e.Col < 1 || e.Line > strings.Count(text, "\n")+2 {
				t.Fatalf("Parse returns %v and the error %#v", x, err)
			}
			return
		}
		for _, c := range x.Clauses {
			again, err := Parse("f", x.Text+"\n# again\n")
			if err != nil || len(again.Clauses) != len(x.Clauses) {
				t.Fatalf("with a comment more it is %v, %v", again, err)
			}
			var b strings.Builder
			lines := strings.Split(x.Text, "\n")
			for i, l := range lines {
				if i == c.Pos.Line-1 {
					l = string(c.Class) + " " + c.Cond.String()
				}
				b.WriteString(l + "\n")
			}
			if b.Len() > MaxText {
				return
			}
			again, err = Parse("f", b.String())
			if err != nil {
				t.Fatalf("the condition %q: %v", c.Cond, err)
			}
			found := false
			for _, o := range again.Clauses {
				found = found || o.Pos.Line == c.Pos.Line && o.Cond.String() == c.Cond.String()
			}
			if !found {
				t.Fatalf("the condition %q is another one when it is read again", c.Cond)
			}
		}
	})
}
