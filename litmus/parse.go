package litmus

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/vm"
)

// Parse reads a test. The file's name is for messages. The error is a *SyntaxError, about
// the first thing that is wrong.
func Parse(file, text string) (*Test, error) {
	p := &parser{file: file, t: &Test{File: file, Text: text}, fresh: map[string]bool{}}
	p.main = p.t
	if len(text) > MaxText {
		p.failAt(Pos{1, 1}, "a test of %d bytes is longer than %d", len(text), MaxText)
		return nil, p.err
	}
	for line := range strings.Lines(text) {
		p.pos.Line++
		p.line(strings.TrimRight(line, "\r\n"))
		if p.err != nil {
			return nil, p.err
		}
	}
	p.pos = Pos{p.pos.Line + 1, 1}
	p.finish()
	if p.err != nil {
		return nil, p.err
	}
	return p.main, nil
}

// parser reads a test, line by line. After an error it goes on to the end of the line, with
// words that it makes up, and the first error stays.
type parser struct {
	file string
	pos  Pos // of what is read next; its column is meaningless between lines
	err  *SyntaxError

	main    *Test
	t       *Test // main, or the form that is being read
	section string
	fresh   map[string]bool // threads and settings of the form that have been read
	thread  *Thread         // that statements are added to; nil: there is none
	host    bool            // it is one of the host, or setup
	refs    map[Ref]int     // of main.Observed
	formPos Pos

	words []word
	next  int
	end   int // column behind the last word
	depth int
}

// word is a part of a line, and the column of its first byte, from 1. With no text it is the
// end of the line.
type word struct {
	text string
	col  int
}

func (p *parser) failAt(pos Pos, format string, args ...any) {
	if p.err == nil {
		p.err = &SyntaxError{p.file, pos.Line, pos.Col, fmt.Sprintf(format, args...)}
	}
}

func (p *parser) fail(w word, format string, args ...any) {
	p.failAt(Pos{p.pos.Line, w.col}, format, args...)
}

// expected says that something else should have been where w is.
func (p *parser) expected(w word, what string) {
	if w.text == "" {
		p.fail(w, "expected %s, and the line ends", what)
		return
	}
	p.fail(w, "expected %s, not %q", what, w.text)
}

func isLetter(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }
func isDigit(c byte) bool  { return '0' <= c && c <= '9' }

// split makes words of a line: names and numbers, and symbols.
func (p *parser) split(line string) {
	p.words, p.next = p.words[:0], 0
	line, _, _ = strings.Cut(line, "#")
	for i := 0; i < len(line); {
		c := line[i]
		if c == ' ' || c == '\t' {
			i++
			continue
		}
		n := i + 1
		switch {
		case isLetter(c) || isDigit(c):
			for n < len(line) && (isLetter(line[n]) || isDigit(line[n]) || line[n] == '_' || line[n] == '-') {
				n++
			}
		case strings.HasPrefix(line[i:], "&&"), strings.HasPrefix(line[i:], "||"), strings.HasPrefix(line[i:], "=="),
			strings.HasPrefix(line[i:], "!="), strings.HasPrefix(line[i:], "<="), strings.HasPrefix(line[i:], ">="):
			n = i + 2
		case strings.IndexByte("=<>!()[]:", c) >= 0:
		default:
			r := []rune(line[i:])[0]
			p.fail(word{col: i + 1}, "there is no use for %q here", r)
			n = i + len(string(r))
		}
		p.words = append(p.words, word{line[i:min(n, len(line))], i + 1})
		i = n
	}
	p.end = len(strings.TrimRight(line, " \t")) + 1
}

// take returns the next word.
func (p *parser) take() word {
	if p.next == len(p.words) {
		return word{"", p.end}
	}
	p.next++
	return p.words[p.next-1]
}

// peek returns the next word, which the next take returns too.
func (p *parser) peek() word {
	w := p.take()
	if w.text != "" {
		p.next--
	}
	return w
}

// accept takes the next word if it is text.
func (p *parser) accept(text string) bool {
	if p.peek().text != text {
		return false
	}
	p.take()
	return true
}

// want takes the next word, which is to be text.
func (p *parser) want(text string) {
	if w := p.take(); w.text != text {
		p.expected(w, text)
	}
}

// number takes a number up to most.
func (p *parser) number(what string, most uint64) uint64 {
	return p.numberOf(p.take(), what, most)
}

func (p *parser) numberOf(w word, what string, most uint64) uint64 {
	digits, base := w.text, 10
	if hex, ok := strings.CutPrefix(w.text, "0x"); ok {
		digits, base = hex, 16
	}
	n, err := strconv.ParseUint(digits, base, 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange):
		p.expected(w, what)
	case err != nil || n > most:
		p.fail(w, "%s is too large: the most is %d", w.text, most)
	}
	return min(n, most)
}

// name takes a name that has no meaning yet.
func (p *parser) name(what string) word {
	w := p.take()
	switch {
	case w.text == "" || !isLetter(w.text[0]):
		p.expected(w, what)
	case len(w.text) > maxName:
		p.fail(w, "a name of %d bytes is longer than %d", len(w.text), maxName)
	case isReg(w.text):
		p.fail(w, "%s is a register, and no name", w.text)
	}
	return w
}

// newName takes the name of a page, an alias or a mapped address.
func (p *parser) newName(what string) string {
	w := p.name(what)
	if slices.Contains(p.main.names(), w.text) {
		p.fail(w, "there is a %s already", w.text)
	}
	if len(p.main.names()) == MaxNames {
		p.fail(w, "there are more than %d pages, aliases and mapped addresses", MaxNames)
	}
	return w.text
}

// known takes one of names.
func (p *parser) known(what string, names []string) string {
	w := p.take()
	if slices.Contains(names, w.text) {
		return w.text
	}
	switch near := nearest(w.text, names); {
	case w.text == "":
		p.expected(w, what)
	case near != "":
		p.fail(w, "expected %s, not %q; did you mean %s?", what, w.text, near)
	case len(names) == 0:
		p.fail(w, "expected %s, not %q; there is none", what, w.text)
	default:
		p.fail(w, "expected %s, not %q; there is %s", what, w.text, oneOf(names))
	}
	return ""
}

func (p *parser) pageNames() (names []string) {
	for _, x := range p.main.Pages {
		names = append(names, x.Name)
	}
	return names
}

func isReg(s string) bool {
	return len(s) == 2 && s[0] == 'r' && '0' <= s[1] && s[1] < '0'+Registers
}

func (p *parser) reg() int {
	w := p.take()
	if !isReg(w.text) {
		p.expected(w, fmt.Sprintf("a register, r0 to r%d", Registers-1))
		return 0
	}
	return int(w.text[1] - '0')
}

// keywords begin lines that are no statements.
var keywords = []string{"litmus", "about", "page", "alias", "table", "machine", "instances", "needs", "guest", "host", "setup",
	"forbidden", "allowed", "required", "observe", "expect", "sensitive"}

// line reads one line.
func (p *parser) line(line string) {
	if text := strings.TrimLeft(line, " \t"); strings.HasPrefix(text, "about") && p.section != "" && p.thread == nil {
		if rest := text[len("about"):]; rest == "" || rest[0] == ' ' || rest[0] == '\t' {
			p.about(strings.TrimSpace(rest))
			return
		}
	}
	p.split(line)
	if p.err != nil || len(p.words) == 0 {
		return
	}
	first := p.peek()
	if p.section == "" && first.text != "litmus" {
		p.expected(first, `"litmus" and the name of the test`)
		return
	}
	if !slices.Contains(keywords, first.text) {
		if p.thread == nil {
			all := slices.Concat(keywords, guestWords, guestRegWords, hostWords, hostRegWords)
			if near := nearest(first.text, all); near != "" && !slices.Contains(all, first.text) {
				p.fail(first, "there is no %q; did you mean %s?", first.text, near)
			} else {
				p.fail(first, `a statement belongs to a thread: begin one with "guest" or "host" and its name`)
			}
			return
		}
		p.statement()
	} else {
		p.take()
		p.directive(first)
	}
	if w := p.take(); w.text != "" {
		p.expected(w, "the end of the line")
	}
}

func (p *parser) about(text string) {
	if p.t.About != "" && text != "" {
		text = " " + text
	}
	p.t.About += text
}

// directive reads what follows a keyword.
func (p *parser) directive(key word) {
	form := p.t != p.main
	switch key.text {
	case "litmus":
		if p.section != "" {
			p.fail(key, "a file has one test, and this is another")
			return
		}
		p.section = "main"
		p.t.Name = p.name("the name of the test").text
		return
	case "sensitive":
		p.endForm()
		p.beginForm(key)
		return
	case "about":
		p.fail(key, `"about" is for the test, or the form, as a whole: it comes before the threads`)
		return
	case "guest", "host", "setup":
		p.begin(key)
		return
	case "machine":
		p.thread = nil
		p.machine(key)
		return
	}
	p.thread = nil
	if form {
		p.fail(key, "%q is for the whole test: it comes before the first form", key.text)
		return
	}
	switch key.text {
	case "page":
		p.page(key)
	case "alias":
		a := Alias{Name: p.newName("the name of an alias")}
		p.want("of")
		a.Of = p.known("the name of a page", p.pageNames())
		p.main.Aliases = append(p.main.Aliases, a)
	case "table":
		p.table(key)
	case "instances":
		w := p.peek()
		if p.main.Instances != 0 {
			p.fail(key, "the number of instances is given twice")
		}
		if p.main.Instances = int(p.number("a number of instances", MaxGuestInstances)); p.main.Instances == 0 {
			p.fail(w, "no instance at all is nothing to run")
		}
	case "needs":
		p.need(Need(p.known("what is needed", strs(needs))))
	case "observe":
		p.operandRef()
		for p.peek().text != "" && p.err == nil {
			p.operandRef()
		}
	case "expect":
		p.want("shadow-paging")
		p.main.ExpectShadow = true
	case "forbidden", "allowed", "required":
		if len(p.main.Clauses) == MaxClauses {
			p.fail(key, "there are more than %d clauses", MaxClauses)
		}
		c := p.cond()
		p.main.Clauses = append(p.main.Clauses, Clause{Pos{p.pos.Line, key.col}, Class(key.text), c})
	}
}

func (p *parser) need(n Need) {
	if !slices.Contains(p.t.Needs, n) {
		p.t.Needs = append(p.t.Needs, n)
	}
}

func (p *parser) page(key word) {
	if len(p.main.Guests)+len(p.main.Hosts) > 0 {
		p.fail(key, "pages come before the threads")
	}
	x := Page{Name: p.newName("the name of a page"), NPages: 1}
	for _, b := range mm.Backings() {
		if p.accept(b.String()) {
			x.Backing = b
		}
	}
	switch {
	case p.accept("huge"):
		x.Huge, x.NPages = true, MaxPages
		huge := 0
		for _, o := range p.main.Pages {
			if o.Huge {
				huge++
			}
		}
		if huge == MaxHuge {
			p.fail(key, "there are more than %d huge pages", MaxHuge)
		}
	case p.accept("pages"):
		w := p.peek()
		if x.NPages = p.number("a number of pages", MaxPages); x.NPages == 0 {
			p.fail(w, "no page at all is no page")
		}
	}
	if p.accept("=") {
		x.Init[0] = p.number("the first word of the page", MaxValue)
		for i := 1; p.peek().text != "" && p.err == nil; i++ {
			if i == Words {
				p.fail(p.peek(), "a page has %d words", Words)
				return
			}
			x.Init[i] = p.number("a word of the page", MaxValue)
		}
	}
	p.main.Pages = append(p.main.Pages, x)
}

func (p *parser) table(key word) {
	var x Table
	x.Name = p.known("the name of a page", p.pageNames())
	if pg, ok := p.main.page(x.Name); ok && (pg.NPages != 1 || pg.Init != [Words]uint64{}) {
		p.fail(key, "a page table is one page, and its words are not given")
	}
	if p.main.isTable(x.Name) {
		p.fail(key, "%s maps another address already", x.Name)
	}
	p.want("maps")
	x.Maps = p.newName("the name of an address")
	p.want("to")
	x.To = p.known("the name of a page", p.pageNames())
	p.main.Tables = append(p.main.Tables, x)
}

func (p *parser) machine(key word) {
	if p.fresh["machine"] {
		p.fail(key, "the machine is described twice")
	}
	p.fresh["machine"] = true
	p.t.Machine = Machine{}
	for first := true; first || p.peek().text != ""; first = false {
		switch w := p.take(); w.text {
		case "lazy":
			p.t.Machine.Lazy = true
		case "ring0":
			p.t.Machine.Ring0 = true
		case "disconnected":
			p.t.Machine.Disconnected = true
		case "dirty":
			p.t.Machine.Logged = true
			var names []string
			for _, s := range vm.DirtySources() {
				names = append(names, s.String())
			}
			if i := slices.Index(names, p.known("a dirty source", names)); i >= 0 {
				p.t.Machine.Dirty = vm.DirtySources()[i]
			}
		default:
			p.expected(w, "lazy, ring0, disconnected, or dirty and a source")
		}
		if p.err != nil {
			return
		}
	}
}

// begin begins a thread, or the setup.
func (p *parser) begin(key word) {
	var x Thread
	if p.host = key.text != "guest"; key.text == "setup" {
		x.Name = "setup"
	} else {
		w := p.name("the name of a thread")
		if x.Name = w.text; x.Name == "setup" || x.Name == "guests" {
			p.fail(w, "%s is no name for a thread", x.Name)
		}
	}
	p.section = x.Name
	again := func() {
		if p.fresh[x.Name] {
			p.fail(key, "there are two of %s", x.Name)
		}
		p.fresh[x.Name] = true
	}
	if key.text == "setup" {
		again()
		p.t.Setup = nil
		p.thread = &x
		return
	}
	list, most, other := &p.t.Guests, MaxGuests, p.t.Hosts
	if p.host {
		list, most, other = &p.t.Hosts, MaxHosts, p.t.Guests
	}
	named := func(t Thread) bool { return t.Name == x.Name }
	if slices.ContainsFunc(other, named) {
		p.fail(key, "%s is the name of a thread of the other side", x.Name)
	}
	again()
	i := slices.IndexFunc(*list, named)
	if i < 0 {
		if len(*list) == most {
			p.fail(key, "there are more than %d threads of the %s", most, key.text)
			return
		}
		*list = append(*list, x)
		i = len(*list) - 1
	}
	(*list)[i] = x
	p.thread = &(*list)[i]
}

func (p *parser) beginForm(key word) {
	p.checkMain(Pos{p.pos.Line, key.col})
	w := p.name("the name of a form")
	for _, f := range p.main.Sensitive {
		if f.Form == w.text {
			p.fail(w, "there are two forms %s", w.text)
		}
	}
	if len(p.main.Sensitive) == MaxClauses {
		p.fail(w, "there are more than %d forms", MaxClauses)
	}
	f := *p.main
	f.Form, f.About, f.Sensitive = w.text, "", nil
	f.Guests, f.Hosts, f.Setup, f.Needs = slices.Clone(f.Guests), slices.Clone(f.Hosts), slices.Clone(f.Setup), slices.Clone(f.Needs)
	p.t, p.thread, p.fresh = &f, nil, map[string]bool{}
	p.formPos = Pos{p.pos.Line, key.col}
}

// endForm checks the form that was read, if one was, and keeps it.
func (p *parser) endForm() {
	if p.t == p.main || p.err != nil {
		return
	}
	if len(p.fresh) == 0 {
		p.failAt(p.formPos, "the form %s is the test itself: it has no thread and no machine of its own", p.t.Form)
	}
	p.t.Instances = min(p.t.Instances, p.t.maxInstances())
	p.check(p.t, p.formPos)
	p.main.Sensitive = append(p.main.Sensitive, p.t)
}

// checkMain checks the test when its last line has been read.
func (p *parser) checkMain(pos Pos) {
	if p.t != p.main || p.err != nil {
		return
	}
	switch {
	case len(p.main.Guests) == 0:
		p.failAt(pos, "the test has no guest thread")
	case len(p.main.Clauses) == 0:
		p.failAt(pos, "the test does not say what is forbidden, allowed or required")
	}
	if p.main.Instances == 0 {
		if p.main.Instances = guestInstances; p.main.hasHosts() {
			p.main.Instances = hostInstances
		}
	}
	p.check(p.main, pos)
}

func (p *parser) finish() {
	if p.section == "" {
		p.failAt(p.pos, "the text has no test: it begins with \"litmus\" and a name")
		return
	}
	p.checkMain(p.pos)
	p.endForm()
	if len(p.main.Sensitive) > 0 && !slices.ContainsFunc(p.main.Clauses, func(c Clause) bool { return c.Class == Forbidden }) {
		p.failAt(p.formPos, "a form in which a forbidden outcome must be seen, and the test forbids none")
	}
}

// check looks at a test, or a form, as a whole.
func (p *parser) check(t *Test, pos Pos) {
	if most := t.maxInstances(); t.Instances > most {
		p.failAt(pos, "%d instances are more than the %d of a test with threads of the host", t.Instances, most)
	}
	replaces := 0
	for _, th := range t.Guests {
		var delays uint64
		awaits := 0
		for _, s := range th.Statements {
			switch s.Op {
			case Flush:
				if !t.Machine.Ring0 {
					p.failAt(s.Pos, `flush takes "machine ring0"`)
				}
			case Delay:
				delays += s.Value
			case Await:
				awaits++
			}
			if delays > MaxDelay {
				p.failAt(s.Pos, "the delays of %s are more than %d in all", th.Name, MaxDelay)
			}
			if awaits > Words {
				p.failAt(s.Pos, "%s has more than %d of await", th.Name, Words)
			}
		}
	}
	for _, th := range append(slices.Clone(t.Hosts), Thread{"setup", t.Setup}) {
		paused := 0
		for _, s := range th.Statements {
			switch s.Op {
			case Replace:
				if replaces++; replaces > MaxReplaces {
					p.failAt(s.Pos, "there are more than %d replacements", MaxReplaces)
				}
			case Pause:
				paused++
			case Resume:
				if paused--; paused < 0 {
					p.failAt(s.Pos, "%s resumes what it has not paused", th.Name)
				}
			case Wait:
				i := slices.IndexFunc(t.Guests, func(g Thread) bool { return g.Name == s.Other })
				switch {
				case paused > 0:
					p.failAt(s.Pos, "%s waits for guests that it has paused", th.Name)
				case th.Name == "setup":
					p.failAt(s.Pos, "setup waits for guests that have not begun")
				case s.Other == "":
				case i < 0:
					p.failAt(s.Pos, "there is no guest thread %s to wait for", s.Other)
				case !slices.ContainsFunc(t.Guests[i].Statements, func(g Statement) bool { return g.Op == Mark }):
					p.failAt(s.Pos, "%s has no mark to wait for", s.Other)
				}
			case LogDirty:
				if !t.Machine.Logged {
					p.failAt(s.Pos, `log takes a machine with "dirty" and a source`)
				}
			}
		}
		if paused > 0 && th.Name == "setup" {
			p.failAt(pos, "setup leaves the machine paused")
		}
	}
	backings := map[mm.Backing]bool{}
	for _, x := range t.Pages {
		backings[x.Backing] = true
	}
	if t.Machine.Logged && t.Machine.Dirty == vm.WriteProtect && len(backings) > 1 {
		p.failAt(pos, "the dirty source wp takes pages of one backing")
	}
	if t.Machine.Ring0 && !t.ExpectShadow && len(t.Tables) > 0 {
		p.failAt(pos, `a page table that changes is not coherent on hosts with shadow paging: say "expect shadow-paging"`)
	}
}

var (
	guestRegWords = []string{"load", "add", "swap", "await"}
	guestWords    = []string{"store", "flush", "fence", "mark", "delay"}
	hostRegWords  = []string{"load", "dirty", "discarded", "used"}
	hostWords     = append([]string{"store", "point", "wait", "delay", "log", "harvest", "abort", "working-set", "pause", "resume", "fork", "reap", "raw", "late"}, strs(changes)...)
)

// statement reads a statement of the thread.
func (p *parser) statement() {
	s := Statement{Pos: Pos{p.pos.Line, p.peek().col}, Reg: -1, From: -1}
	if isReg(p.peek().text) {
		s.Reg = p.reg()
		p.want("=")
		if p.host && p.section == "setup" {
			p.failAt(s.Pos, "setup has no registers")
		}
	}
	words := [2][2][]string{{guestWords, guestRegWords}, {hostWords, hostRegWords}}
	side, result := 0, 0
	what := "a statement of the guest"
	if p.host {
		side, what = 1, "a statement of the host"
	}
	if s.Reg >= 0 {
		result, what = 1, what+" with a result"
	}
	w := p.peek()
	s.Op = Op(p.known(what, words[side][result]))
	if s.Op == Op(Raw) || s.Op == Op(Late) {
		s.How = How(s.Op)
		ops := rawOps
		if s.How == Late {
			ops = lateOps
		}
		s.Op = Op(p.known("an operation that can be "+string(s.How), strs(ops)))
	}
	if p.err != nil {
		return
	}
	p.operands(&s)
	if len(p.thread.Statements) == MaxStatements {
		p.fail(w, "%s has more than %d statements", p.thread.Name, MaxStatements)
		return
	}
	p.thread.Statements = append(p.thread.Statements, s)
	if p.section == "setup" {
		p.t.Setup = p.thread.Statements
	}
}

// operands reads what follows the operation of s.
func (p *parser) operands(s *Statement) {
	switch s.Op {
	case Load:
		s.Loc = p.loc()
		p.via(s)
	case Store:
		s.Loc = p.loc()
		if !p.host && isReg(p.peek().text) {
			s.From = p.reg()
		} else {
			s.Value = p.number("what is stored", MaxValue)
		}
		p.via(s)
	case Add, Swap, Await:
		s.Loc = p.loc()
		s.Value = p.number("a number", MaxValue)
	case Flush:
		s.Loc = p.loc()
	case Delay:
		s.Value = p.number("how many turns the delay takes", MaxDelay)
	case Dirty, Discarded, Used:
		s.Loc.Name = p.frameName()
		if s.Op == Used {
			p.need(NeedIdle)
		}
	case Point:
		s.Loc.Name = p.known("the name of a mapped address", p.mapped())
		s.Other = p.known("the name of a page", p.pageNames())
	case Wait:
		if w := p.name("guests, or the name of a guest thread"); w.text != "guests" {
			s.Other = w.text
		}
	case LogDirty:
		if p.known("on or off", []string{"on", "off"}) == "on" {
			s.Value = 1
		}
	case WorkingSet:
		p.need(NeedIdle)
	case Fence, Mark, Harvest, Abort, Pause, Resume, Fork, Reap:
	case Compact:
		p.need(NeedRoot)
	default:
		p.change(s)
	}
}

// change reads the operands of a change of mappings.
func (p *parser) change(s *Statement) {
	w := p.peek()
	s.Loc.Name = p.known("the name of a page", p.pageNames())
	x, ok := p.main.page(s.Loc.Name)
	if !ok {
		return
	}
	switch private := x.Backing == mm.Anonymous; {
	case p.main.isTable(x.Name):
		p.fail(w, "%s is a page table: it changes by point alone", x.Name)
	case s.Op == Collapse && !x.Huge:
		p.fail(w, "%s is not huge, which collapse takes", x.Name)
	case s.Op == Free && !private, (s.Op == Mergeable || s.Op == Unmergeable) && !private:
		p.fail(w, "%s is for anonymous memory, and %s is %v", s.Op, x.Name, x.Backing)
	case s.Op == Punch && (private || x.Backing == mm.SharedAnonymous), s.Op == Remove && (private || x.Backing == mm.MemfdPrivate || x.Backing == mm.FilePrivate):
		p.fail(w, "%s is not for %v memory, which %s is", s.Op, x.Backing, x.Name)
	}
	switch s.Op {
	case Replace:
		s.Value = p.number("the words of the new page", MaxValue)
	case Protect:
		s.Access = p.access(addr.NoAccess, addr.Read, addr.ReadWrite)
	case Populate:
		s.Access = p.access(addr.Read, addr.ReadWrite)
	case Mergeable:
		p.need(NeedKSM)
	case Migrate:
		p.need(NeedNUMA)
	case PageOut:
		if x.Backing == mm.Anonymous {
			p.need(NeedSwap)
		}
	case Collapse:
		p.need(NeedHugePages)
	}
}

func (p *parser) access(of ...addr.Access) addr.Access {
	var names []string
	for _, a := range of {
		names = append(names, accessWords[a])
	}
	if i := slices.Index(names, p.known("what is allowed", names)); i >= 0 {
		return of[i]
	}
	return addr.NoAccess
}

func (p *parser) via(s *Statement) {
	switch w := p.peek(); Via(w.text) {
	case ByHVA, ByHeld, ByChild:
		if !p.host {
			return // the line was to end here
		}
		p.take()
		s.Via = Via(w.text)
	}
	if _, mapped := p.main.table(s.Loc.Name); mapped && p.host {
		p.failAt(s.Pos, "%s is an address of the guest's: the host uses the page", s.Loc.Name)
	}
}

func (p *parser) mapped() (names []string) {
	for _, x := range p.main.Tables {
		names = append(names, x.Maps)
	}
	return names
}

// frameName takes the name of something that has a guest frame: a page or an alias.
func (p *parser) frameName() string {
	names := p.pageNames()
	for _, a := range p.main.Aliases {
		names = append(names, a.Name)
	}
	return p.known("the name of a page or an alias", names)
}

// loc takes a word of a page.
func (p *parser) loc() Loc {
	l := Loc{Name: p.known("the name of a page, an alias or a mapped address", p.main.names())}
	if p.accept("[") {
		l.Word = int(p.number("the number of a word", Words-1))
		p.want("]")
	}
	if p.main.isTable(l.Name) {
		p.failAt(Pos{p.pos.Line, p.words[max(p.next-1, 0)].col}, "%s is a page table: it changes by point alone", l.Name)
	}
	return l
}

// cond takes a condition.
func (p *parser) cond() *Cond { return p.joined("||", p.and) }
func (p *parser) and() *Cond  { return p.joined("&&", p.not) }

func (p *parser) joined(op string, part func() *Cond) *Cond {
	c := part()
	for n := 0; p.accept(op); n++ {
		if n == MaxStatements {
			p.fail(p.peek(), "the condition is too long")
			return c
		}
		c = &Cond{Op: op, Left: c, Right: part()}
	}
	return c
}

func (p *parser) not() *Cond {
	if p.depth++; p.depth > maxDepth {
		p.fail(p.peek(), "the condition is nested more than %d deep", maxDepth)
		return &Cond{Op: "=="}
	}
	defer func() { p.depth-- }()
	switch {
	case p.accept("!"):
		return &Cond{Op: "!", Left: p.not()}
	case p.accept("("):
		c := p.cond()
		p.want(")")
		return c
	}
	c := &Cond{A: p.operand()}
	switch w := p.take(); w.text {
	case "==", "!=", "<", "<=", ">", ">=":
		c.Op = w.text
	case "=":
		p.fail(w, "to compare, write ==")
	default:
		p.expected(w, "a comparison: ==, !=, <, <=, > or >=")
	}
	c.B = p.operand()
	return c
}

func (p *parser) operand() Operand {
	if w := p.peek(); w.text != "" && isDigit(w.text[0]) {
		return Operand{Index: -1, Number: p.number("a number", 1<<63-1)}
	}
	return p.operandRef()
}

// operandRef takes a part of an outcome, and has it observed.
func (p *parser) operandRef() (o Operand) {
	w := p.peek()
	if p.next+1 < len(p.words) && p.words[p.next+1].text == ":" {
		var names []string
		for _, th := range slices.Concat(p.main.Guests, p.main.Hosts) {
			names = append(names, th.Name)
		}
		o.Ref.Thread = p.known("the name of a thread", names)
		p.want(":")
		at := p.peek()
		o.Ref.Reg = p.reg()
		if p.err == nil && !p.assigned(o.Ref) {
			p.fail(at, "%s sets no r%d", o.Ref.Thread, o.Ref.Reg)
		}
	} else if isReg(w.text) {
		p.fail(w, "%s of which thread? write, for example, P0:%s", w.text, w.text)
	} else {
		o.Ref.Loc = p.loc()
		if _, mapped := p.main.table(o.Ref.Loc.Name); mapped {
			p.fail(w, "%s is an address of the guest's: name the page", o.Ref.Loc.Name)
		}
	}
	if p.refs == nil {
		p.refs = map[Ref]int{}
	}
	i, ok := p.refs[o.Ref]
	if !ok {
		i = len(p.main.Observed)
		p.refs[o.Ref] = i
		p.main.Observed = append(p.main.Observed, o.Ref)
		if i == 2*MaxClauses {
			p.fail(w, "outcomes have more than %d parts", 2*MaxClauses)
		}
	}
	o.Index = i
	return o
}

// assigned reports whether a statement of the thread sets the register.
func (p *parser) assigned(r Ref) bool {
	for _, th := range slices.Concat(p.main.Guests, p.main.Hosts) {
		if th.Name == r.Thread && slices.ContainsFunc(th.Statements, func(s Statement) bool { return s.Reg == r.Reg }) {
			return true
		}
	}
	return false
}
