package hostops

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// Parse reads a script. Its name is for messages: that of the file. The error is a
// *SyntaxError, about the first thing that is wrong. Whether there are such pages is for
// NewRunner to say.
func Parse(name, text string) (*Script, error) {
	s := &Script{Name: name}
	n := 0
	for line := range strings.Lines(text) {
		n++
		p := newParser(line)
		if len(p.words) == 0 {
			continue
		}
		l := Line{N: n, When: p.when(), Op: p.op()}
		if w := p.take(); w.text != "" {
			p.expected(w, "the end of the line")
		}
		if l.When.Trigger == Then && len(s.Lines) == 0 {
			p.errorf(p.words[0], `"then" follows a line, and there is none before it`)
		}
		if p.err != nil {
			p.err.File, p.err.Line = name, n
			return nil, p.err
		}
		s.Lines = append(s.Lines, l)
	}
	return s, nil
}

// parser reads one line, word by word. After an error it goes on, with words that it
// makes up, and the first error stays.
type parser struct {
	words []word
	next  int  // index of the word that is taken next
	end   int  // column behind the last word
	it    bool // there are pages that "it" can mean
	err   *SyntaxError
}

// word is a part of a line, and the column of its first byte, from 1. With no text it is
// the end of the line.
type word struct {
	text string
	col  int
}

const blanks = " \t\r\n"

// newParser splits a line into its words.
func newParser(line string) *parser {
	line, _, _ = strings.Cut(line, "#")
	p := &parser{end: 1}
	for rest := line; ; {
		rest = strings.TrimLeft(rest, blanks)
		if rest == "" {
			return p
		}
		n := strings.IndexAny(rest, blanks)
		if n < 0 {
			n = len(rest)
		}
		col := len(line) - len(rest) + 1
		p.words = append(p.words, word{rest[:n], col})
		p.end, rest = col+n, rest[n:]
	}
}

// take returns the next word.
func (p *parser) take() word {
	if p.next == len(p.words) {
		return word{"", p.end}
	}
	p.next++
	return p.words[p.next-1]
}

// numbers reports whether the next n words are meant to be numbers.
func (p *parser) numbers(n int) bool {
	if len(p.words)-p.next < n {
		return false
	}
	for _, w := range p.words[p.next : p.next+n] {
		if w.text[0] < '0' || w.text[0] > '9' {
			return false
		}
	}
	return true
}

func (p *parser) errorf(w word, format string, args ...any) {
	if p.err == nil {
		p.err = &SyntaxError{Col: w.col, Msg: fmt.Sprintf(format, args...)}
	}
}

// expected says that something else should have been where w is.
func (p *parser) expected(w word, what string) {
	if w.col == p.end {
		p.errorf(w, "expected %s, and the line ends", what)
		return
	}
	p.errorf(w, "expected %s, not %q", what, w.text)
}

// number returns the value of w, which is a number.
func (p *parser) number(w word, what string, most uint64) uint64 {
	digits, base := w.text, 10
	if hex, ok := strings.CutPrefix(w.text, "0x"); ok {
		digits, base = hex, 16
	}
	n, err := strconv.ParseUint(digits, base, 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange):
		p.expected(w, what)
	case err != nil || n > most:
		p.errorf(w, "%s is too large: the most is %d", w.text, most)
	}
	return n
}

func (p *parser) when() (w When) {
	switch first := p.take(); first.text {
	case "at":
		return When{Trigger: At, D: p.duration(0)}
	case "every":
		return When{Trigger: Every, D: p.duration(1)}
	case "then":
		p.it = true
		return When{Trigger: Then}
	case "on":
		switch event := p.take(); event.text {
		case "fault":
			p.it = true
			return When{Trigger: OnFault}
		case "mark":
			if !p.numbers(1) {
				return When{Trigger: OnMark, Any: true}
			}
			return When{Trigger: OnMark, Mark: uint32(p.number(p.take(), "the number of a mark", math.MaxUint32))}
		default:
			p.expected(event, "mark or fault")
		}
	default:
		p.expected(first, "at, every, on or then")
	}
	return When{}
}

// duration takes a duration of at least least.
func (p *parser) duration(least time.Duration) time.Duration {
	w := p.take()
	d, err := time.ParseDuration(w.text)
	switch {
	case err != nil:
		p.expected(w, "a duration such as 1.5ms")
	case d < least:
		p.errorf(w, "%s is too short: the least is %v", w.text, least)
	}
	return d
}

func (p *parser) op() (o Op) {
	w := p.take()
	o.Kind = Kind(w.text)
	switch o.Kind {
	case Protect:
		o.Pages = p.pages(0)
		o.Access = p.access(addr.NoAccess, addr.Read, addr.ReadWrite)
	case Populate:
		o.Pages = p.pages(0)
		o.Access = p.access(addr.Read, addr.ReadWrite)
	case Remap:
		o.Pages = p.pages(0)
		switch to := p.take(); to.text {
		case "back":
			o.Back = true
		case "to":
			if spare := p.take(); spare.text != "spare" {
				p.expected(spare, "spare")
			}
		default:
			p.expected(to, "to spare, or back")
		}
	case Truncate:
		if n := p.take(); n.text == "all" {
			o.Pages.Which = AllPages
		} else {
			o.Pages.Range.End = p.number(n, "a number of pages, or all", math.MaxUint64)
		}
	case Store:
		o.Pages, o.Offset = p.word()
		o.Value = p.number(p.take(), "the value of 8 bytes", math.MaxUint64)
	case Fill:
		o.Pages = p.pages(1)
		o.Value = p.number(p.take(), "the value of a byte", math.MaxUint8)
	default:
		if w.text == "" {
			p.expected(w, "an operation")
		} else if !slices.Contains(kinds, o.Kind) {
			p.unknown(w)
		}
		o.Pages = p.pages(0)
	}
	return o
}

// unknown says that there is no such operation, and which there are.
func (p *parser) unknown(w word) {
	if name := nearest(w.text, kinds); name != "" {
		p.errorf(w, "there is no operation %q; did you mean %s?", w.text, name)
		return
	}
	var names []string
	for _, k := range kinds {
		names = append(names, string(k))
	}
	p.errorf(w, "there is no operation %q; there are %s", w.text, strings.Join(names, ", "))
}

// access takes what may be done with pages, which is one of some.
func (p *parser) access(of ...addr.Access) addr.Access {
	w := p.take()
	var names []string
	for _, a := range of {
		if accessWords[a] == w.text {
			return a
		}
		names = append(names, accessWords[a])
	}
	last := len(names) - 1
	p.expected(w, strings.Join(names[:last], ", ")+" or "+names[last])
	return addr.NoAccess
}

// pages takes the pages of an operation, which that many numbers follow.
func (p *parser) pages(numbers int) Pages {
	const what = "pages: a number, a range such as 16..20, all, random, or it"
	w := p.take()
	switch first, end, isRange := strings.Cut(w.text, ".."); {
	case w.text == "all":
		return Pages{Which: AllPages}
	case w.text == "random":
		if !p.numbers(1 + numbers) {
			return Pages{Which: RandomPages, N: 1}
		}
		w := p.take()
		n := p.number(w, "a number of pages", math.MaxUint64)
		if n == 0 {
			p.errorf(w, "%s pages are none at all", w.text)
		}
		return Pages{Which: RandomPages, N: n}
	case isRange:
		r := Range{p.number(word{first, w.col}, what, math.MaxUint64), p.number(word{end, w.col + len(first) + len("..")}, "the page behind the last", math.MaxUint64)}
		if r.Len() == 0 {
			p.errorf(w, "%s has no pages: the second number is the page behind the last", w.text)
		}
		return Pages{Range: r}
	}
	return p.page(w, what)
}

// word takes the place of 8 bytes.
func (p *parser) word() (page Pages, offset uint64) {
	w := p.take()
	first, rest, hasOffset := strings.Cut(w.text, "+")
	if hasOffset {
		at := word{rest, w.col + len(first) + len("+")}
		if offset = p.number(at, "an offset in the page", addr.PageSize-8); offset%8 != 0 {
			p.errorf(at, "%s is not a multiple of 8", rest)
		}
	}
	const what = "a page: a number, random, or it, and an offset such as +8"
	if first == "random" {
		return Pages{Which: RandomPages, N: 1}, offset
	}
	return p.page(word{first, w.col}, what), offset
}

// page returns what w says if it is one page, or "it".
func (p *parser) page(w word, what string) Pages {
	if w.text == "it" {
		if !p.it {
			p.errorf(w, `"it" is for lines with "on fault" or "then"; here, name the pages`)
		}
		return Pages{Which: ItPages}
	}
	n := p.number(w, what, math.MaxUint64-1)
	return Pages{Range: Range{n, n + 1}}
}
