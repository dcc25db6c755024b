package notifier

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/goid"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/srcu"
)

// A property test runs random programs on address spaces, and has a model judge
// what happened, which is recorded event by event.
//
// A program is run by stepping or freely. When it is stepped, one goroutine runs
// at a time, and in each method that is called and between operations it stands
// still until the program's schedule lets it go on; one that blocks is left alone
// until it no longer does. So the same program takes the same course again, a
// failure can be shrunk, and the number of everything can be compared with the
// model's after each step. Freely, the goroutines meet where they meet.

var (
	propCountFlag   = flag.Int("programs", 0, "run this many programs in the property test; 0: for as long as -property says")
	propTimeFlag    = flag.Duration("property", 0, "run the property test for this long; 0: for a fraction of a second")
	propProgramFlag = flag.String("program", "", "run this program in the property test, as it prints them")
)

// propCode says what an operation does.
type propCode uint8

const (
	opUser              propCode = iota // become a user
	opPutUser                           // give back what user took
	opExit                              // give back the user that New made
	opRegister                          // register a subscriber
	opRegisterCancelled                 // try to, with a context that is done
	opRegisterAgain                     // try to, with one that is registered
	opUnregister                        // end the registration of a subscriber
	opDetach                            // end it by UnregisterNoRelease, and free it with Call
	opGet                               // get a shared subscriber
	opPut                               // give it back
	opInsert                            // insert an interval
	opRemove                            // remove it
	opLook                              // look its mappings up, and establish something
	opLock                              // take a mapping lock for writing
	opRLock                             // take it for reading
	opLockMap                           // take the lock of the reverse map, which all address spaces share
	opUnlock                            // give back what was taken
	opStart                             // open a bracket
	opEnd                               // close one
	opAge                               // clear or test accessed bits
	opSynchronize                       // wait for what was passed to Call
	propCodes
)

// propArg is an argument of an operation: a number below mod.
type propArg struct {
	name string
	mod  int
}

const (
	propMaxSpaces  = 3
	propMaxThreads = 4
	propMaxOps     = 64 // of a program that is decoded
	propMaxSteps   = 64
	propPages      = 8 // of an address space
	propChoices    = 5 // see schedule
)

var (
	argSpace = propArg{"space", propMaxSpaces}
	argKind  = propArg{"kind", int(propKinds)}
	argShare = propArg{"kind", 2}
	argWhich = propArg{"which", 4} // of those that the goroutine has
	argAt    = propArg{"page", propPages}
	argLen   = propArg{"more", 3} // pages beyond the first
	argFlag  = propArg{"nonblocking", 2}
	argHow   = propArg{"how", 3}
)

var propOps = [propCodes]struct {
	name string
	args []propArg
}{
	opUser:              {"user", []propArg{argSpace}},
	opPutUser:           {"put-user", []propArg{argSpace}},
	opExit:              {"exit", []propArg{argSpace}},
	opRegister:          {"register", []propArg{argSpace, argKind}},
	opRegisterCancelled: {"register-cancelled", []propArg{argSpace}},
	opRegisterAgain:     {"register-again", []propArg{argSpace, argWhich}},
	opUnregister:        {"unregister", []propArg{argWhich}},
	opDetach:            {"detach", []propArg{argWhich}},
	opGet:               {"get", []propArg{argSpace, argShare}},
	opPut:               {"put", []propArg{argWhich}},
	opInsert:            {"insert", []propArg{argSpace, argAt, argLen, argFlag}},
	opRemove:            {"remove", []propArg{argWhich}},
	opLook:              {"look", []propArg{argWhich}},
	opLock:              {"lock", []propArg{argSpace}},
	opRLock:             {"rlock", []propArg{argSpace}},
	opLockMap:           {"lock-map", nil},
	opUnlock:            {"unlock", nil},
	opStart:             {"start", []propArg{argSpace, argAt, argLen, argFlag}},
	opEnd:               {"end", []propArg{argWhich}},
	opAge:               {"age", []propArg{argSpace, argAt, argHow}},
	opSynchronize:       {"synchronize", nil},
}

// propOp is an operation. One that its goroutine may not do where it comes,
// because of the locks that it holds, or because it has nothing to do it with, is
// passed over: every list of operations is a program.
type propOp struct {
	code propCode
	args [4]uint8
}

func (o propOp) String() string {
	var b strings.Builder
	b.WriteString(propOps[o.code].name)
	for i, a := range propOps[o.code].args {
		if o.args[i] != 0 {
			fmt.Fprintf(&b, " %s=%d", a.name, o.args[i])
		}
	}
	return b.String()
}

func parsePropOp(text string) (o propOp, err error) {
	words := strings.Fields(text)
	if len(words) == 0 {
		return o, errors.New("an operation is empty")
	}
	for ; ; o.code++ {
		if o.code == propCodes {
			return o, fmt.Errorf("there is no operation %q", words[0])
		}
		if propOps[o.code].name == words[0] {
			break
		}
	}
	for _, w := range words[1:] {
		name, value, _ := strings.Cut(w, "=")
		i := slices.IndexFunc(propOps[o.code].args, func(a propArg) bool { return a.name == name })
		if i < 0 {
			return o, fmt.Errorf("%q has no argument %q", words[0], name)
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < 0 || n >= propOps[o.code].args[i].mod {
			return o, fmt.Errorf("%q of %q is not a number below %d", w, words[0], propOps[o.code].args[i].mod)
		}
		o.args[i] = uint8(n)
	}
	return o, nil
}

// program is what a few goroutines do to a few address spaces.
type program struct {
	spaces  int
	threads [][]propOp

	// schedule is who runs, when it is stepped: one choice for each step at
	// which several could. 0 is whoever ran last, or the next that can; others
	// are counted from 1 among those that can. When it is used up, all are 0.
	schedule []uint8
}

func (p program) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "spaces %d", p.spaces)
	for _, ops := range p.threads {
		b.WriteString("; go ")
		for i, o := range ops {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(o.String())
		}
	}
	if len(p.schedule) > 0 {
		b.WriteString("; schedule ")
		for _, c := range p.schedule {
			b.WriteByte('0' + c)
		}
	}
	return b.String()
}

func parseProgram(text string) (p program, err error) {
	for i, clause := range strings.FieldsFunc(text, func(r rune) bool { return r == ';' || r == '\n' }) {
		word, rest, _ := strings.Cut(strings.TrimSpace(clause), " ")
		switch {
		case word == "spaces" && i == 0:
			p.spaces, err = strconv.Atoi(rest)
			if err != nil || p.spaces < 1 || p.spaces > propMaxSpaces {
				return p, fmt.Errorf("%q is not between 1 and %d", rest, propMaxSpaces)
			}
		case word == "go":
			var ops []propOp
			for text := range strings.SplitSeq(rest, ",") {
				if strings.TrimSpace(rest) == "" {
					break // it does nothing
				}
				o, err := parsePropOp(text)
				if err != nil {
					return p, err
				}
				ops = append(ops, o)
			}
			p.threads = append(p.threads, ops)
		case word == "schedule":
			for _, c := range []byte(rest) {
				if c < '0' || c >= '0'+propChoices {
					return p, fmt.Errorf("a schedule does not have %q", c)
				}
				p.schedule = append(p.schedule, c-'0')
			}
		default:
			return p, fmt.Errorf("a program does not have %q here", word)
		}
	}
	if p.spaces == 0 {
		return p, errors.New("a program begins with its spaces")
	}
	return p, nil
}

func (p program) size() (n int) {
	for _, ops := range p.threads {
		n += len(ops)
	}
	return n
}

func (p program) clone() program {
	p.threads = slices.Clone(p.threads)
	for i := range p.threads {
		p.threads[i] = slices.Clone(p.threads[i])
	}
	p.schedule = slices.Clone(p.schedule)
	return p
}

// encode returns p as bytes: spaces, goroutines and the length of the schedule;
// the schedule; and each operation as goroutine and code in one byte and the
// arguments, as digits of one number, in two.
func (p program) encode() []byte {
	data := []byte{byte(p.spaces - 1), byte(len(p.threads) - 1), byte(len(p.schedule))}
	data = append(data, p.schedule...)
	for i, ops := range p.threads {
		for _, o := range ops {
			v, args := 0, propOps[o.code].args
			for j := len(args) - 1; j >= 0; j-- {
				v = v*args[j].mod + int(o.args[j])
			}
			data = append(data, byte(i)<<6|byte(o.code), byte(v), byte(v>>8))
		}
	}
	return data
}

// decodeProgram makes a program of any bytes.
func decodeProgram(data []byte) (p program) {
	next := func() (b byte) {
		if len(data) > 0 {
			b, data = data[0], data[1:]
		}
		return b
	}
	p.spaces = 1 + int(next())%propMaxSpaces
	p.threads = make([][]propOp, 1+int(next())%propMaxThreads)
	for range int(next()) % (propMaxSteps + 1) {
		p.schedule = append(p.schedule, next()%propChoices)
	}
	for n := 0; n < propMaxOps && len(data) > 0; n++ {
		b := next()
		o := propOp{code: propCode(b&(1<<6-1)) % propCodes}
		v := int(next())
		v |= int(next()) << 8
		for i, a := range propOps[o.code].args {
			o.args[i] = uint8(v % a.mod)
			v /= a.mod
		}
		i := int(b>>6) % len(p.threads)
		p.threads[i] = append(p.threads[i], o)
	}
	return p
}

// generateProgram returns a random program. Operations come in an order in which
// few are passed over.
func generateProgram(rng *rand.Rand) program {
	p := program{spaces: max(1, rng.IntN(6)-2)}
	p.threads = make([][]propOp, 2+rng.IntN(propMaxThreads-1))
	for i := range p.threads {
		var has [propCodes]int // by the operation that adds one
		add := func(code propCode) {
			o := propOp{code: code}
			for j, a := range propOps[code].args {
				mod := a.mod
				if a == argSpace {
					mod = p.spaces
				}
				o.args[j] = uint8(rng.IntN(mod))
			}
			has[code]++
			p.threads[i] = append(p.threads[i], o)
		}
		// end adds one that ends what was begun, or, without any, one that begins it.
		end := func(begin, code propCode) {
			if has[begin] == 0 {
				add(begin)
				return
			}
			has[begin]--
			add(code)
		}
		inside := func() {
			switch rng.IntN(8) {
			case 0, 1:
				add(opAge)
			case 2:
				if has[opRegister] > 0 {
					end(opRegister, opDetach)
				}
			case 3:
				if has[opGet] > 0 {
					end(opGet, opPut)
				}
			case 4:
				add(opUser)
			}
		}
		for range 2 + rng.IntN(4) {
			switch rng.IntN(24) {
			case 0, 1, 2, 3, 4, 5:
				add([]propCode{opLock, opRLock, opRLock, opLockMap, opLockMap}[rng.IntN(5)])
				open := 0
				for range 1 + rng.IntN(2) {
					add(opStart)
					open++
					inside()
					if open > 0 && rng.IntN(2) == 0 {
						add(opEnd)
						open--
					}
				}
				for ; open > 0; open-- {
					inside()
					add(opEnd)
				}
				add(opUnlock)
			case 6, 7, 8:
				add(opRegister)
			case 9, 10, 11:
				end(opRegister, opUnregister)
			case 12:
				end(opRegister, opDetach)
			case 13:
				add(opGet)
			case 14, 15:
				end(opGet, opPut)
			case 16:
				add(opInsert)
			case 17:
				end(opInsert, opRemove)
			case 18:
				if has[opInsert] == 0 {
					add(opInsert)
				}
				add(opLook)
			case 19, 20:
				add(opExit)
			case 21:
				end(opUser, opPutUser)
			case 22:
				add([]propCode{opRegisterCancelled, opRegisterAgain, opSynchronize}[rng.IntN(3)])
			case 23:
				add(opAge)
			}
		}
	}
	for range 8 + rng.IntN(propMaxSteps-8) {
		p.schedule = append(p.schedule, uint8(max(0, rng.IntN(2*propChoices)-propChoices)))
	}
	return p
}

// propWhat is what an event is about.
type propWhat uint8

const (
	evUser propWhat = iota
	evPutUser
	evTeardown
	evRegister
	evUnregister
	evDetach
	evGet
	evAlloc
	evPut
	evFree
	evInsert
	evRemove
	evLook
	evEstablish
	evOpen
	evClose
	evAge
	evStats
	evWrong // whatever is wrong by itself

	// Methods of subscribers.
	evRelease
	evStart
	evEnd
	evYoung
	evInvalidate
)

var propWhats = [...]string{
	evUser: "user", evPutUser: "put-user", evTeardown: "teardown", evRegister: "register", evUnregister: "unregister",
	evDetach: "unregister-no-release", evGet: "get", evAlloc: "alloc", evPut: "put", evFree: "free", evInsert: "insert",
	evRemove: "remove", evLook: "look", evEstablish: "establish", evOpen: "open", evClose: "close", evAge: "age", evStats: "stats",
	evWrong: "wrong", evRelease: "  Release", evStart: "  InvalidateRangeStart", evEnd: "  InvalidateRangeEnd", evYoung: "  Young",
	evInvalidate: "  Invalidate",
}

// propEvent is one event of a history. A call, of the package or of a method, is
// two: it is recorded before it begins, and after it has ended.
type propEvent struct {
	what    propWhat
	after   bool
	thread  int // -1: none of the program's
	space   int
	sub     int // number of the registration or of the insertion; 0: none
	bracket int // its number; 0: none, or that of the exit
	kind    int // of subscriber; how, of aging
	r       addr.HVARange
	ok      bool // what was returned; before, a NonBlockable, or an interval that refuses it
	err     error
	stats   Stats
}

func (e propEvent) String() string {
	var b strings.Builder
	if e.thread < 0 {
		b.WriteString("      - ")
	} else {
		fmt.Fprintf(&b, "      %d ", e.thread)
	}
	if e.after {
		b.WriteString("    ")
	}
	fmt.Fprintf(&b, "%s, space %d", propWhats[e.what], e.space)
	if e.sub != 0 {
		fmt.Fprintf(&b, ", subscriber %d", e.sub)
	}
	if e.bracket != 0 {
		fmt.Fprintf(&b, ", bracket %d", e.bracket)
	}
	switch {
	case e.after && e.err != nil:
		fmt.Fprintf(&b, ": %v", e.err)
	case e.after && (e.what == evUser || e.what == evAge || e.what == evYoung || e.what == evInvalidate):
		fmt.Fprintf(&b, ": %v", e.ok)
	case e.after:
		b.WriteString(": done")
	case e.what == evStats:
		fmt.Fprintf(&b, ": %+v", e.stats)
	case e.what == evOpen || e.what == evInsert:
		fmt.Fprintf(&b, ", pages [%d, %d), non-blocking %v", e.r.Start>>addr.PageShift, e.r.End>>addr.PageShift, e.ok)
	case e.what == evRegister:
		fmt.Fprintf(&b, ", %s", propKindNames[e.kind])
	}
	if !e.after && e.err != nil {
		fmt.Fprintf(&b, ": %v", e.err)
	}
	return b.String()
}

// Kinds of subscribers.
const (
	propPlainKind   = iota // start and end
	propRefuserKind        // start, which refuses a bracket that is non-blocking
	propAgerKind           // start, end, and accessed bits
	propLeaverKind         // start and end; ends its own registration in Release when the address space exits
	propKinds
)

var propKindNames = [...]string{"plain", "refuser", "ager", "leaver"}

// propSub is what subscribers have in common.
type propSub struct {
	Notifier
	run   *propRun
	self  propMember // what it is part of
	kind  int
	share int // which of the two kinds that are shared, if it is
	space int
	free  srcu.Head

	// sub is the number of the registration. It is written while the object is
	// nobody's, and is propPoison when it is free. It is a plain word, so that
	// the race detector sees who uses an object while it is freed.
	sub int
	was int // what sub was before it was freed

	// ended is whether somebody ends the registration. It outlives the object,
	// which the exit may free before its goroutine looks.
	ended *atomic.Bool
}

const propPoison = -0x6b6b6b6b

type propMember interface {
	Subscriber
	core() *propSub
}

type (
	propPlain   struct{ propSub }
	propRefuser struct{ propSub }
	propAger    struct{ propSub }
)

func (o *propSub) core() *propSub { return o }

// method runs one method of a subscriber.
func (o *propSub) method(e propEvent, section bool, do func() (ok bool, err error)) (bool, error) {
	x := o.run
	th := x.self()
	e.thread, e.sub = th.id, o.sub
	if e.sub == propPoison {
		x.wrong(e.space, "%s of a subscriber that is free, and was number %d", propWhats[e.what], o.was)
	}
	e.space = o.space
	x.record(e)
	th.pause(section)
	e.after = true
	e.ok, e.err = do()
	if o.sub != e.sub {
		x.wrong(e.space, "subscriber %d was freed while %s ran", e.sub, propWhats[e.what])
	}
	x.record(e)
	return e.ok, e.err
}

func (o *propSub) Release() {
	_, _ = o.method(propEvent{what: evRelease}, true, func() (bool, error) {
		if o.kind == propLeaverKind && o.ended.CompareAndSwap(false, true) {
			o.run.detach(o)
		}
		return true, nil
	})
}

func (o *propSub) start(inv *Invalidation) error {
	o.run.compare(inv)
	_, err := o.method(propEvent{what: evStart, bracket: int(inv.Op)}, true, func() (bool, error) {
		if o.kind == propRefuserKind && inv.NonBlockable {
			return false, syscall.EAGAIN
		}
		return true, nil
	})
	return err
}

func (o *propSub) end(inv *Invalidation) {
	o.run.compare(inv)
	_, _ = o.method(propEvent{what: evEnd, bracket: int(inv.Op)}, true, func() (bool, error) { return true, nil })
}

func (o *propSub) young(r addr.HVARange) bool {
	ok, _ := o.method(propEvent{what: evYoung}, true, func() (bool, error) {
		return (o.sub+int(r.Start>>addr.PageShift))%2 == 0, nil
	})
	return ok
}

func (o *propPlain) InvalidateRangeStart(inv *Invalidation) error   { return o.start(inv) }
func (o *propPlain) InvalidateRangeEnd(inv *Invalidation)           { o.end(inv) }
func (o *propRefuser) InvalidateRangeStart(inv *Invalidation) error { return o.start(inv) }
func (o *propAger) InvalidateRangeStart(inv *Invalidation) error    { return o.start(inv) }
func (o *propAger) InvalidateRangeEnd(inv *Invalidation)            { o.end(inv) }
func (o *propAger) ClearFlushYoung(r addr.HVARange) bool            { return o.young(r) }
func (o *propAger) ClearYoung(r addr.HVARange) bool                 { return o.young(r) }
func (o *propAger) TestYoung(hva addr.HVA) bool                     { return o.young(addr.HVAs(hva, addr.PageSize)) }

// propInterval is an interval, and what was established in it, which nobody
// keeps: that it was is an event.
type propInterval struct {
	Interval
	run     *propRun
	sub     int // as that of propSub
	space   int
	refuses bool
	mu      sync.Mutex
}

func (o *propInterval) Invalidate(inv *Invalidation, seq uint64) bool {
	x := o.run
	th := x.self()
	e := propEvent{what: evInvalidate, thread: th.id, space: o.space, sub: o.sub, bracket: int(inv.Op)}
	if e.sub == propPoison {
		x.wrong(e.space, "Invalidate of an interval that was removed")
	}
	if inv.Event != Released {
		x.compare(inv)
	}
	x.record(e)
	th.pause(false)
	if e.ok = !o.refuses || !inv.NonBlockable; e.ok {
		o.mu.Lock()
		o.SetSeq(seq)
		o.mu.Unlock()
	}
	e.after = true
	x.record(e)
	return e.ok
}

// propBracket is a bracket that was opened, or was not.
type propBracket struct {
	inv   *Invalidation
	space int
	r     addr.HVARange
	is    Event
}

// propSpace is an address space of a run.
type propSpace struct {
	*AddressSpace
	given atomic.Bool // the user that New made
	kinds [2]*Kind[*propPlain]
}

// propRun is a run of a program.
type propRun struct {
	p       program
	spaces  []*propSpace
	pages   *ReverseMap
	threads []*propThread
	step    *propStepper // nil: they run freely
	byID    map[uint64]*propThread

	callbacks atomic.Bool // some may have been passed to Call since the stepper waited for them

	mu        sync.Mutex // protects what follows; a leaf, but for the locks of Stats
	history   []propEvent
	subs      int // registrations and insertions so far
	brackets  []propBracket
	objects   [propKinds][]propMember // that are free
	limbo     []propMember            // that are to be free when the stepper has seen it
	intervals []*propInterval         // that are free
}

// propThread is a goroutine of a run. What it has is its own.
type propThread struct {
	run *propRun
	id  int
	rng *rand.Rand

	lock   propCode // opLock, opRLock, opLockMap, or 0
	space  int      // of the lock
	open   []int    // brackets
	subs   []propHeld
	shared []*propPlain
	ivals  []*propInterval
	users  [propMaxSpaces]int

	goid    uint64
	state   atomic.Uint32 // propRunning and so on
	section atomic.Bool   // it stands in a method of a chain
	waiting bool          // seen in a wait for a grace period, until no section is open
	resume  chan struct{}
}

// propHeld is a registration that a goroutine has to end, unless it was ended.
type propHeld struct {
	propMember
	ended *atomic.Bool
}

const (
	propRunning = iota
	propStanding
	propDone
)

// self returns the goroutine of the caller.
func (x *propRun) self() *propThread {
	if th := x.byID[goid.Get()]; th != nil {
		return th
	}
	return &propThread{run: x, id: -1}
}

func (x *propRun) record(e propEvent) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.history = append(x.history, e)
}

func (x *propRun) wrong(space int, format string, args ...any) {
	x.record(propEvent{what: evWrong, thread: x.self().id, space: space, err: fmt.Errorf(format, args...)})
}

// compare compares what a subscriber is told of a bracket with what it was
// opened with.
func (x *propRun) compare(inv *Invalidation) {
	x.mu.Lock()
	b := x.brackets[inv.Op-1]
	x.mu.Unlock()
	if inv != b.inv || inv.Range != b.r || inv.Event != b.is {
		x.wrong(b.space, "bracket %d of %v, %v, is told as %+v", inv.Op, b.r, b.is, *inv)
	}
}

// take takes an object that is free, and makes it the next registration.
func (x *propRun) take(kind, space int) propMember {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.subs++
	var m propMember
	if free := x.objects[kind]; len(free) > 0 {
		m = free[len(free)-1]
		x.objects[kind] = free[:len(free)-1]
	} else {
		switch kind {
		case propRefuserKind:
			m = new(propRefuser)
		case propAgerKind:
			m = new(propAger)
		default:
			m = new(propPlain)
		}
		m.core().run, m.core().kind, m.core().self = x, kind, m
	}
	o := m.core()
	o.sub, o.space = x.subs, space
	o.ended = new(atomic.Bool)
	return m
}

// give makes an object free that was not passed to Call.
func (x *propRun) give(m propMember) {
	o := m.core()
	o.was, o.sub = o.sub, propPoison
	x.mu.Lock()
	defer x.mu.Unlock()
	x.objects[o.kind] = append(x.objects[o.kind], m)
}

// freed is the function that frees a subscriber.
func (x *propRun) freed(m propMember) {
	o := m.core()
	x.record(propEvent{what: evFree, thread: x.self().id, space: o.space, sub: o.sub})
	if x.step == nil {
		x.give(m)
		return
	}
	// When that is, is not for the schedule to say: others could find the object
	// free in one run of the program and not in the next.
	o.was, o.sub = o.sub, propPoison
	x.mu.Lock()
	defer x.mu.Unlock()
	x.limbo = append(x.limbo, m)
}

// detach ends a registration without release, and frees the subscriber. The
// caller has set o.ended.
func (x *propRun) detach(o *propSub) {
	e := propEvent{what: evDetach, thread: x.self().id, space: o.space, sub: o.sub}
	x.record(e)
	o.UnregisterNoRelease()
	e.after = true
	x.record(e)
	x.callbacks.Store(true)
	Call(&o.free, func(*srcu.Head) { x.freed(o.self) })
}

// tryUser makes a goroutine a user, if there still are some.
func (th *propThread) tryUser(space int) bool {
	ok := th.run.spaces[space].TryGetUser()
	th.run.record(propEvent{what: evUser, after: true, thread: th.id, space: space, ok: ok})
	return ok
}

func (th *propThread) putUser(space int) {
	th.around(propEvent{what: evPutUser, space: space}, func(e *propEvent) { e.err = th.run.spaces[space].PutUser() })
}

// around records a call of the package, which do makes.
func (th *propThread) around(e propEvent, do func(*propEvent)) {
	e.thread = th.id
	th.run.record(e)
	e.after = true
	do(&e)
	th.run.record(e)
}

// take removes and returns one of list, if there are some.
func propPick[E any](list *[]E, which uint8) (e E, ok bool) {
	if len(*list) == 0 {
		return e, false
	}
	i := int(which) % len(*list)
	e = (*list)[i]
	*list = slices.Delete(*list, i, i+1)
	return e, true
}

var (
	propContext   = context.Background()
	propCancelled = func() context.Context {
		ctx, cancel := context.WithCancel(propContext)
		cancel()
		return ctx
	}()
)

// do does an operation, or passes it over.
func (th *propThread) do(o propOp) {
	switch o.code {
	case opDetach, opPut, opUnlock, opStart, opEnd, opAge, opUser:
	default:
		if th.lock != 0 {
			return // it takes a lock, or waits for somebody who may take one
		}
	}
	x := th.run
	space := int(o.args[0]) % len(x.spaces)
	as := x.spaces[space]
	switch o.code {
	case opUser:
		if th.tryUser(space) {
			th.users[space]++
		}
	case opPutUser:
		if th.users[space] > 0 {
			th.users[space]--
			th.putUser(space)
		}
	case opExit:
		if as.given.CompareAndSwap(false, true) {
			th.putUser(space)
		}
	case opRegister:
		user := th.tryUser(space)
		m := x.take(int(o.args[1]), space)
		th.around(propEvent{what: evRegister, space: space, sub: m.core().sub, kind: m.core().kind}, func(e *propEvent) {
			if e.err = as.Register(propContext, m); e.err != nil {
				x.give(m)
			} else {
				th.subs = append(th.subs, propHeld{m, m.core().ended})
			}
		})
		if user {
			th.putUser(space)
		}
	case opRegisterCancelled:
		if th.tryUser(space) {
			m := x.take(propPlainKind, space)
			as.Lock()
			if err := as.RegisterLocked(propCancelled, m); !errors.Is(err, syscall.EINTR) || !errors.Is(err, context.Canceled) {
				x.wrong(space, "Register with a context that is done returned %v", err)
			}
			x.give(m)
			as.Unlock()
			th.putUser(space)
		}
	case opRegisterAgain:
		if len(th.subs) > 0 && th.tryUser(space) {
			m := th.subs[int(o.args[1])%len(th.subs)]
			if m.ended.CompareAndSwap(false, true) { // so that it does not end meanwhile
				if err := as.Register(propContext, m.propMember); !errors.Is(err, syscall.EBUSY) {
					x.wrong(space, "Register of a subscriber that is registered returned %v", err)
				}
				m.ended.Store(false)
			}
			th.putUser(space)
		}
	case opUnregister:
		if m, ok := propPick(&th.subs, o.args[0]); ok && m.ended.CompareAndSwap(false, true) {
			th.around(propEvent{what: evUnregister, space: m.core().space, sub: m.core().sub}, func(*propEvent) { m.core().Unregister() })
			x.give(m.propMember)
		}
	case opDetach:
		if m, ok := propPick(&th.subs, o.args[0]); ok && m.ended.CompareAndSwap(false, true) {
			x.detach(m.core())
		}
	case opGet:
		user := th.tryUser(space)
		th.around(propEvent{what: evGet, space: space, kind: int(o.args[1])}, func(e *propEvent) {
			var m *propPlain
			if m, e.err = as.kinds[o.args[1]].Get(propContext, as.AddressSpace); e.err == nil {
				if e.sub = m.sub; e.sub == propPoison {
					x.wrong(space, "Get returned a subscriber that is free, and was number %d", m.was)
				}
				th.shared = append(th.shared, m)
			}
		})
		if user {
			th.putUser(space)
		}
	case opPut:
		if m, ok := propPick(&th.shared, o.args[0]); ok {
			x.callbacks.Store(true)
			kind := x.spaces[m.space].kinds[m.share]
			th.around(propEvent{what: evPut, space: m.space, sub: m.sub}, func(*propEvent) { kind.Put(m) })
		}
	case opInsert:
		user := th.tryUser(space)
		iv := x.takeInterval(space, o.args[3] != 0)
		r := addr.HVAs(addr.HVA(o.args[1])<<addr.PageShift, (1+uint64(o.args[2]))<<addr.PageShift)
		th.around(propEvent{what: evInsert, space: space, sub: iv.sub, r: r, ok: iv.refuses}, func(e *propEvent) {
			if e.err = as.Insert(propContext, iv, r.Start, r.Bytes()); e.err != nil {
				x.giveInterval(iv)
			} else {
				th.ivals = append(th.ivals, iv)
			}
		})
		if user {
			th.putUser(space)
		}
	case opRemove:
		if iv, ok := propPick(&th.ivals, o.args[0]); ok {
			th.around(propEvent{what: evRemove, space: iv.space, sub: iv.sub}, func(*propEvent) { iv.Remove() })
			x.giveInterval(iv)
		}
	case opLook:
		if len(th.ivals) == 0 {
			break
		}
		iv := th.ivals[int(o.args[0])%len(th.ivals)]
		e := propEvent{what: evLook, space: iv.space, sub: iv.sub}
		th.around(e, func(*propEvent) {
			seq := iv.ReadBegin()
			th.pause(false)
			iv.mu.Lock()
			defer iv.mu.Unlock()
			if !iv.ReadRetry(seq) {
				x.record(propEvent{what: evEstablish, thread: th.id, space: iv.space, sub: iv.sub})
			}
		})
	case opLock:
		as.Lock()
		th.lock, th.space = opLock, space
	case opRLock:
		as.RLock()
		th.lock, th.space = opRLock, space
	case opLockMap:
		x.pages.RLock()
		th.lock = opLockMap
	case opUnlock:
		for len(th.open) > 0 {
			th.close(0)
		}
		switch th.lock {
		case opLock:
			x.spaces[th.space].Unlock()
		case opRLock:
			x.spaces[th.space].RUnlock()
		case opLockMap:
			x.pages.RUnlock()
		}
		th.lock = 0
	case opStart:
		switch {
		case th.lock == 0 || len(th.open) == 3:
		case th.lock == opLockMap:
			th.start(space, o)
		default:
			th.start(th.space, o)
		}
	case opEnd:
		if len(th.open) > 0 {
			th.close(int(o.args[0]) % len(th.open))
		}
	case opAge:
		r := addr.HVAs(addr.HVA(o.args[1])<<addr.PageShift, addr.PageSize)
		th.around(propEvent{what: evAge, space: space, kind: int(o.args[2])}, func(e *propEvent) {
			switch o.args[2] {
			case 0:
				e.ok = as.TestYoung(r.Start)
			case 1:
				e.ok = as.ClearYoung(r)
			case 2:
				e.ok = as.ClearFlushYoung(r)
			}
		})
	case opSynchronize:
		Synchronize()
	}
}

func (th *propThread) start(space int, o propOp) {
	x := th.run
	inv := &Invalidation{
		Range: addr.HVAs(addr.HVA(o.args[1])<<addr.PageShift, (1+uint64(o.args[2]))<<addr.PageShift),
		Event: Unmap + Event(o.args[1])%2, NonBlockable: o.args[3] != 0,
	}
	x.mu.Lock()
	x.brackets = append(x.brackets, propBracket{inv, space, inv.Range, inv.Event})
	id := len(x.brackets)
	x.mu.Unlock()
	inv.Op = uint64(id)
	th.around(propEvent{what: evOpen, space: space, bracket: id, r: inv.Range, ok: inv.NonBlockable}, func(e *propEvent) {
		if e.err = x.spaces[space].InvalidateRangeStart(inv); e.err == nil {
			th.open = append(th.open, id)
		}
	})
}

func (th *propThread) close(i int) {
	id := th.open[i]
	th.open = slices.Delete(th.open, i, i+1)
	th.run.mu.Lock()
	b := th.run.brackets[id-1]
	th.run.mu.Unlock()
	th.around(propEvent{what: evClose, space: b.space, bracket: id}, func(*propEvent) { th.run.spaces[b.space].InvalidateRangeEnd(b.inv) })
}

func (x *propRun) takeInterval(space int, refuses bool) *propInterval {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.subs++
	iv := &propInterval{run: x}
	if n := len(x.intervals); n > 0 {
		iv = x.intervals[n-1]
		x.intervals = x.intervals[:n-1]
	}
	iv.sub, iv.space, iv.refuses = x.subs, space, refuses
	return iv
}

func (x *propRun) giveInterval(iv *propInterval) {
	iv.sub = propPoison
	x.mu.Lock()
	defer x.mu.Unlock()
	x.intervals = append(x.intervals, iv)
}

// finish ends what the program has left, so that nobody waits for it for ever.
func (th *propThread) finish() {
	rest := func(n int, code propCode) {
		for range n {
			th.do(propOp{code: code})
			th.pause(false)
		}
	}
	rest(1, opUnlock)
	rest(len(th.ivals), opRemove)
	rest(len(th.subs), opUnregister)
	rest(len(th.shared), opPut)
	for space, n := range th.users {
		for range n {
			th.do(propOp{code: opPutUser, args: [4]uint8{uint8(space)}})
			th.pause(false)
		}
	}
}

// pause is where a goroutine stands still until it may go on, if it is stepped,
// and where others may overtake it, if not. section says that it is in a method
// that a walk along the chain has called.
func (th *propThread) pause(section bool) {
	switch {
	case th.id < 0 || th.goid == 0:
	case th.run.step != nil:
		th.section.Store(section)
		th.state.Store(propStanding)
		<-th.resume
		th.section.Store(false)
	default:
		for range max(0, th.rng.IntN(8)-4) {
			runtime.Gosched()
		}
	}
}

func (th *propThread) main(ops []propOp) {
	th.pause(false)
	for _, o := range ops {
		th.do(o)
		th.pause(false)
	}
	th.finish()
	th.state.Store(propDone)
}

// propStuck is how long a goroutine may take for what nobody keeps it from.
const propStuck = 30 * time.Second

// newPropRun makes the address spaces and the goroutines of a program.
func newPropRun(p program, defect mutant, stepped bool, seed uint64) *propRun {
	x := &propRun{p: p, pages: NewReverseMap(FileMap), byID: map[uint64]*propThread{}}
	if stepped {
		x.step = &propStepper{x: x}
	}
	for i := range p.spaces {
		s := new(propSpace)
		s.AddressSpace = New(Options{
			Teardown: func() error {
				x.record(propEvent{what: evTeardown, thread: x.self().id, space: i})
				return nil
			},
			Report: func(err error) { x.wrong(i, "reported: %w", err) },
		})
		s.mutant = defect
		s.Grab()
		s.AddRegion(&Region{Range: addr.HVAs(0, propPages<<addr.PageShift), Maps: []*ReverseMap{x.pages}})
		for k := range s.kinds {
			s.kinds[k] = NewKind(func(*AddressSpace) (*propPlain, error) {
				m := x.take(propPlainKind, i).(*propPlain)
				m.share = k
				x.record(propEvent{what: evAlloc, thread: x.self().id, space: i, sub: m.sub, kind: k})
				return m, nil
			}, func(m *propPlain) { x.freed(m) })
		}
		x.spaces = append(x.spaces, s)
	}
	for i := range p.threads {
		x.threads = append(x.threads, &propThread{run: x, id: i, rng: rand.New(rand.NewPCG(seed, uint64(i))), resume: make(chan struct{})})
	}
	return x
}

// execute runs the program, and returns an error if it does not come to its end.
func (x *propRun) execute() error {
	var started, ended sync.WaitGroup
	begin := make(chan struct{})
	for i, th := range x.threads {
		started.Add(1)
		ended.Go(func() {
			th.goid = goid.Get()
			started.Done()
			<-begin
			th.main(x.p.threads[i])
		})
	}
	started.Wait()
	for _, th := range x.threads {
		x.byID[th.goid] = th
	}
	close(begin)
	if x.step != nil {
		if err := x.step.run(); err != nil {
			return err
		}
	}
	done := make(chan struct{})
	go func() {
		ended.Wait()
		close(done)
	}()
	timeout := time.NewTimer(propStuck)
	defer timeout.Stop()
	select {
	case <-done:
	case <-timeout.C:
		return fmt.Errorf("the program does not end:\n%s", propStacks())
	}

	main := &propThread{run: x, id: -1}
	for i := range x.spaces {
		main.do(propOp{code: opExit, args: [4]uint8{uint8(i)}})
	}
	Synchronize()
	for i, s := range x.spaces {
		x.record(propEvent{what: evStats, after: true, thread: -1, space: i, ok: true, stats: s.Stats()})
		s.Drop()
		if s.Stats().Count != 0 || s.subs.Load() != nil {
			x.wrong(i, "after the last Drop the count is %d", s.Stats().Count)
		}
	}
	return nil
}

func propStacks() string {
	buf := make([]byte, 1<<18)
	return string(buf[:runtime.Stack(buf, true)])
}

// propStepper runs the goroutines of a program one at a time.
type propStepper struct {
	x    *propRun
	used int // choices of the schedule
	last int // who ran
	buf  []byte
}

func (s *propStepper) run() error {
	for {
		sections, err := s.settle()
		if err != nil {
			return err
		}
		s.observe(sections)
		var ready []*propThread
		done := 0
		for _, th := range s.x.threads {
			switch {
			case th.state.Load() == propDone:
				done++
			case th.state.Load() == propStanding && !th.waiting:
				ready = append(ready, th)
			}
		}
		switch {
		case done == len(s.x.threads):
			return nil
		case len(ready) == 0:
			return fmt.Errorf("everybody waits for somebody:\n%s", propStacks())
		}
		th := s.choose(ready)
		s.last = th.id
		th.state.Store(propRunning)
		th.resume <- struct{}{}
	}
}

func (s *propStepper) choose(ready []*propThread) *propThread {
	if len(ready) == 1 {
		return ready[0]
	}
	choice := 0
	if s.used < len(s.x.p.schedule) {
		choice = int(s.x.p.schedule[s.used])
		s.used++
	}
	if choice > 0 {
		return ready[(choice-1)%len(ready)]
	}
	for _, th := range ready {
		if th.id >= s.last {
			return th
		}
	}
	return ready[0]
}

// settle returns when every goroutine stands, is done, or is blocked until
// another one goes on; and how many stand in a method that a walk has called, and
// so in a read section.
//
// Of those in a wait for a grace period it is not known which sections they wait
// for. They are taken to wait until there is none.
func (s *propStepper) settle() (sections int, err error) {
	var deadline time.Time
	for n := 0; ; n++ {
		sections = 0
		var moving []*propThread
		for _, th := range s.x.threads {
			switch th.state.Load() {
			case propStanding:
				if th.section.Load() {
					sections++
				}
			case propRunning:
				moving = append(moving, th)
			}
		}
		if sections == 0 {
			for _, th := range s.x.threads {
				th.waiting = false
			}
		}
		moving = slices.DeleteFunc(moving, func(th *propThread) bool { return th.waiting })
		if len(moving) == 0 {
			return sections, nil
		}
		if n%32 == 31 && s.blocked(moving, sections > 0) {
			return sections, nil
		}
		switch {
		case n == 1<<10:
			deadline = time.Now().Add(propStuck)
		case n > 1<<10 && n%(1<<10) == 0 && time.Now().After(deadline):
			return 0, fmt.Errorf("a goroutine does not go on:\n%s", propStacks())
		}
		runtime.Gosched()
	}
}

// blocked reports whether none of the goroutines can go on. It is their stacks
// that tell, because nothing else does where they are.
func (s *propStepper) blocked(threads []*propThread, sections bool) bool {
	if s.buf == nil {
		s.buf = make([]byte, 1<<16)
	}
	text := s.buf[:runtime.Stack(s.buf, true)]
	for len(text) == len(s.buf) {
		s.buf = make([]byte, 2*len(s.buf))
		text = s.buf[:runtime.Stack(s.buf, true)]
	}
	all := string(text)
	for _, th := range threads {
		_, stack, ok := strings.Cut(all, fmt.Sprintf("goroutine %d [", th.goid))
		if !ok {
			return false // it has ended just now
		}
		stack, _, _ = strings.Cut(stack, "\n\n")
		state, _, _ := strings.Cut(stack, "\n")
		switch {
		case strings.Contains(stack, "srcu.(*Domain).synchronize(") || strings.Contains(stack, "srcu.(*Domain).Barrier("):
			if !sections {
				return false
			}
			th.waiting = true
		case strings.HasPrefix(state, "sync.Cond.Wait"):
		case (strings.HasPrefix(state, "select") || strings.HasPrefix(state, "chan receive")) && strings.Contains(stack, "semaphore.(*Weighted).Acquire("):
		default:
			return false
		}
	}
	return true
}

// observe waits for callbacks, if nothing keeps them from running, and records
// the state of the address spaces.
func (s *propStepper) observe(sections int) {
	x := s.x
	if sections == 0 && x.callbacks.Swap(false) {
		Synchronize()
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if sections == 0 {
		for _, m := range x.limbo {
			x.objects[m.core().kind] = append(x.objects[m.core().kind], m)
		}
		x.limbo = x.limbo[:0]
	}
	for i, as := range x.spaces {
		x.history = append(x.history, propEvent{what: evStats, thread: -1, space: i, ok: sections == 0, stats: as.Stats()})
	}
}

// propModel is what the judge knows of a history. It is sequential: an event
// changes it, and is checked against it. Where two calls overlapped it knows no
// more than what their order leaves certain.
type propModel struct {
	spaces   []modelSpace
	subs     map[int]*modelSub
	brackets map[int]*modelBracket
	gets     map[int]*modelGet  // under way, by goroutine
	ages     map[int]*modelWalk // the last, by goroutine
	now      int                // number of the event, from 1
}

// modelSpace is an address space. Its users are those that are certain: who has
// called PutUser is none any more.
type modelSpace struct {
	users            int
	exiting          int // since when there may be no users any more; 0: there are
	tornDown, exited bool
	tornBy           int // the goroutine
	open             int // brackets, that of the exit included, that may not be closed
	used             bool
	exitRuns         int // intervals that are being told of the exit
}

// modelSub is a registration or an insertion.
type modelSub struct {
	id, space, kind int
	shared          bool
	share, by       int           // which of those that are shared, and who allocates it
	r               addr.HVARange // of an interval; otherwise empty

	registered    int  // when that was done; 0: it is not
	ending, ended bool // Unregister or Remove was called, has returned
	detaching     bool // UnregisterNoRelease was called
	detached      bool // and has returned
	gets, puts    int  // that have returned, that were called
	putsDone      int
	mayBeGone     bool // there was an instant at which nobody was certain to share it
	gone          int  // when it certainly was off the chain
	releases      int
	released      int
	frees         int
	runs          int  // methods that are running
	settled       int  // when an interval was certainly in the tree
	toldExit      bool // an interval
}

func (u *modelSub) chained() bool { return u.r.Empty() }
func (u *modelSub) hasEnd() bool  { return u.chained() && u.kind != propRefuserKind }

// bound reports whether u has to be told by a walk that began after called.
func (u *modelSub) bound(called int) bool {
	if !u.chained() {
		return u.settled > 0 && u.settled < called && !u.ending
	}
	return u.registered > 0 && u.registered < called && u.released == 0 && !u.detaching && !u.mayBeGone
}

// linked reports whether u is on the chain, while everybody stands still.
func (u *modelSub) linked() bool {
	return u.chained() && u.registered > 0 && u.released == 0 && !u.detached && (!u.shared || u.putsDone < u.gets)
}

// modelWalk is a walk along a chain: who was told, and whether that has returned.
type modelWalk struct {
	called int
	how    int
	told   map[int]bool
	yes    bool
}

// modelBracket is a bracket, or the attempt to open one.
type modelBracket struct {
	propEvent
	start, end       modelWalk
	returned, opened bool
	closing, closed  bool
	refused          bool
	byInterval       bool // it was an interval that refused it
	undoing          bool
	chain            bool // the chain has been told
}

// modelGet is a Get that is under way.
type modelGet struct {
	called, space, share int
	had                  *modelSub // what was shared for certain, if something was
	allocated            int
}

// judge returns what is wrong with a history, and at which event; 0 is nowhere.
func judge(p program, history []propEvent) (at int, err error) {
	m := &propModel{
		spaces: make([]modelSpace, p.spaces), subs: map[int]*modelSub{}, brackets: map[int]*modelBracket{},
		gets: map[int]*modelGet{}, ages: map[int]*modelWalk{},
	}
	for i := range m.spaces {
		m.spaces[i].users = 1
	}
	for i, e := range history {
		m.now = i + 1
		if err := m.step(e); err != nil {
			return m.now, err
		}
	}
	return 0, nil
}

func (m *propModel) step(e propEvent) error {
	if e.what >= evRelease {
		return m.method(e)
	}
	s := &m.spaces[e.space]
	u := m.subs[e.sub]
	if e.sub != 0 && u == nil && (e.after || e.what != evRegister && e.what != evAlloc && e.what != evInsert) {
		return errors.New("nobody knows the subscriber: it is free")
	}
	switch e.what {
	case evWrong:
		return e.err
	case evUser:
		switch {
		case e.ok && s.tornDown:
			return errors.New("there is a user after the teardown")
		case !e.ok && s.users > 0:
			return fmt.Errorf("TryGetUser found no user, but there are %d", s.users)
		case e.ok:
			s.users++
		}
	case evPutUser:
		if e.after {
			s.exited = s.exited || s.tornDown && s.tornBy == e.thread
			return e.err
		}
		if s.users--; s.users == 0 {
			s.exiting = m.now
			s.open++
		}
	case evTeardown:
		return m.teardown(e)
	case evRegister, evInsert:
		if !e.after {
			m.subs[e.sub] = &modelSub{id: e.sub, space: e.space, kind: e.kind, r: e.r}
			return nil
		}
		if err := s.entered(e.err); err != nil || e.err != nil {
			return err
		}
		u.registered = m.now
		if e.what == evInsert {
			s.used = true
			m.settle(e.space)
		}
	case evUnregister, evRemove:
		u.ending, u.ended = true, e.after
		switch {
		case !e.after:
		case u.runs > 0:
			return errors.New("it returned while a method ran")
		case e.what == evUnregister && u.released != 1:
			return fmt.Errorf("it returned after Release had been called %d times, and had returned %d times", u.releases, u.released)
		}
	case evDetach:
		if u.detaching, u.detached = true, e.after; e.after {
			u.gone = m.now
		}
	case evGet:
		return m.get(e)
	case evAlloc:
		m.subs[e.sub] = &modelSub{id: e.sub, space: e.space, shared: true, share: e.kind, by: e.thread}
		m.gets[e.thread].allocated = e.sub
	case evPut:
		if !e.after {
			u.puts++
			u.mayBeGone = u.mayBeGone || u.gets == u.puts
			return nil
		}
		if u.putsDone++; u.putsDone == u.gets && !m.getting(u) {
			u.gone = m.now
		}
	case evFree:
		u.frees++
		switch {
		case u.frees > 1:
			return errors.New("it is freed twice")
		case u.runs > 0:
			return errors.New("it is freed while a method runs")
		case !u.detached && !(u.shared && u.gets == u.puts):
			return errors.New("it is freed before the end of its registration")
		}
	case evEstablish:
		for _, b := range m.brackets {
			if b.space == e.space && b.opened && !b.closing && b.r.Overlaps(u.r) {
				return fmt.Errorf("something was established inside bracket %d", b.bracket)
			}
		}
	case evOpen:
		return m.open(e)
	case evClose:
		b := m.brackets[e.bracket]
		if b.closing = true; !e.after {
			b.end = modelWalk{called: m.now, told: map[int]bool{}}
			return nil
		}
		b.closed = true
		m.shut(e.space)
		return m.ended(b)
	case evAge:
		if !e.after {
			m.ages[e.thread] = &modelWalk{called: m.now, how: e.kind, told: map[int]bool{}}
			return nil
		}
		w := m.ages[e.thread]
		if e.ok != w.yes {
			return fmt.Errorf("it returned %v, but the subscribers said %v", e.ok, w.yes)
		}
		if w.how == 0 && w.yes {
			return nil // there was no need to ask all
		}
		return m.all(e.space, w, func(u *modelSub) bool { return u.chained() && u.kind == propAgerKind })
	case evStats:
		return m.compare(e)
	}
	return nil
}

// entered checks how a registration ended: it is refused only if there are no
// users, and the goroutine was one if there were some.
func (s *modelSpace) entered(err error) error {
	switch {
	case err == nil && s.users == 0:
		return errors.New("it succeeded, but there are no users")
	case err != nil && s.users > 0:
		return fmt.Errorf("it failed, but there are %d users: %w", s.users, err)
	case err != nil && (!errors.Is(err, ErrExited) || !errors.Is(err, syscall.EINVAL)):
		return fmt.Errorf("it failed with the wrong error: %w", err)
	}
	return nil
}

// settle marks the intervals that now are in the tree for certain: if no bracket
// is open, nothing is put off.
func (m *propModel) settle(space int) {
	if m.spaces[space].open > 0 {
		return
	}
	for _, u := range m.subs {
		if u.space == space && !u.chained() && u.registered > 0 && u.settled == 0 {
			u.settled = m.now
		}
	}
}

// shut counts a bracket that is not open any more.
func (m *propModel) shut(space int) {
	m.spaces[space].open--
	m.settle(space)
}

func (m *propModel) teardown(e propEvent) error {
	s := &m.spaces[e.space]
	switch {
	case s.users > 0:
		return fmt.Errorf("it is torn down with %d users", s.users)
	case s.tornDown:
		return errors.New("it is torn down twice")
	}
	s.tornDown, s.tornBy = true, e.thread
	for _, u := range m.subs {
		switch {
		case u.space != e.space || u.registered == 0:
		case u.chained() && u.runs > 0:
			return fmt.Errorf("it is torn down while a method of subscriber %d runs", u.id)
		case u.chained() && !u.detaching && !u.mayBeGone && u.released != 1:
			return fmt.Errorf("it is torn down, but Release of subscriber %d has returned %d times", u.id, u.released)
		case !u.chained() && u.bound(s.exiting) && !u.toldExit:
			return fmt.Errorf("it is torn down, but interval %d was not told", u.id)
		}
	}
	m.shut(e.space)
	return nil
}

func (m *propModel) get(e propEvent) error {
	if !e.after {
		g := &modelGet{called: m.now, space: e.space, share: e.kind}
		for _, u := range m.subs {
			if u.shared && u.space == e.space && u.share == e.kind && u.gets > u.puts && !u.mayBeGone {
				g.had = u
			}
		}
		m.gets[e.thread] = g
		return nil
	}
	g, u := m.gets[e.thread], m.subs[e.sub]
	delete(m.gets, e.thread)
	if err := m.spaces[e.space].entered(e.err); err != nil || e.err != nil {
		return err
	}
	switch {
	case !u.shared || u.space != e.space || u.share != e.kind:
		return errors.New("it is of another kind")
	case u.frees > 0:
		return errors.New("it is free")
	case g.allocated != 0 && g.allocated != u.id:
		return fmt.Errorf("%d was allocated for it", g.allocated)
	case g.had != nil && !g.had.mayBeGone && g.had != u:
		return fmt.Errorf("%d is shared already", g.had.id)
	case u.gone > 0 && u.gone < g.called:
		return errors.New("its last user has given it back")
	}
	if g.allocated != 0 {
		u.registered = m.now
	}
	u.gets++
	return nil
}

// getting reports whether a Get is under way that may return u.
func (m *propModel) getting(u *modelSub) bool {
	for _, g := range m.gets {
		if g.space == u.space && g.share == u.share {
			return true
		}
	}
	return false
}

func (m *propModel) open(e propEvent) error {
	s := &m.spaces[e.space]
	if !e.after {
		s.open++
		m.brackets[e.bracket] = &modelBracket{propEvent: e, start: modelWalk{called: m.now, told: map[int]bool{}}}
		return nil
	}
	b := m.brackets[e.bracket]
	b.returned, b.opened = true, e.err == nil
	switch {
	case e.err == nil && b.refused:
		return errors.New("it was opened, but somebody has refused")
	case e.err != nil && !b.refused:
		return fmt.Errorf("it was not opened, but nobody has refused: %w", e.err)
	case e.err != nil && (!errors.Is(e.err, ErrWouldBlock) || !errors.Is(e.err, syscall.EAGAIN)):
		return fmt.Errorf("it failed with the wrong error: %w", e.err)
	}
	if e.err != nil {
		m.shut(e.space)
	}
	if b.byInterval {
		return nil // who comes later is not told
	}
	if err := m.all(e.space, &b.start, func(u *modelSub) bool { return u.chained() || u.r.Overlaps(b.r) }); err != nil || e.err == nil {
		return err
	}
	return m.ended(b)
}

// all checks that a walk has told everybody that it had to tell.
func (m *propModel) all(space int, w *modelWalk, who func(*modelSub) bool) error {
	for _, u := range m.subs {
		if u.space == space && u.bound(w.called) && who(u) && !w.told[u.id] {
			return fmt.Errorf("subscriber %d was not told", u.id)
		}
	}
	return nil
}

// ended checks that those who were told the start were told the end.
func (m *propModel) ended(b *modelBracket) error {
	for id := range b.start.told {
		if u := m.subs[id]; u.hasEnd() && u.bound(m.now) && !b.end.told[id] {
			return fmt.Errorf("subscriber %d was told the start, and not the end", id)
		}
	}
	return nil
}

// method is step for a method of a subscriber.
func (m *propModel) method(e propEvent) error {
	s, u := &m.spaces[e.space], m.subs[e.sub]
	if u == nil {
		return errors.New("nobody knows the subscriber: it is free")
	}
	b := m.brackets[e.bracket]
	if e.after {
		u.runs--
		switch e.what {
		case evRelease:
			u.released++
		case evStart:
			b.start.told[u.id] = true
			b.refused = b.refused || e.err != nil
		case evEnd:
			b.end.told[u.id] = true
		case evYoung:
			w := m.ages[e.thread]
			w.told[u.id] = true
			w.yes = w.yes || e.ok
		case evInvalidate:
			if b == nil {
				s.exitRuns--
				u.toldExit = true
				return nil
			}
			b.start.told[u.id] = true
			if !e.ok {
				b.refused, b.byInterval = true, true
			}
		}
		return nil
	}
	u.runs++
	switch {
	case u.space != e.space:
		return fmt.Errorf("it is called for another address space, %d", u.space)
	case u.ended:
		return errors.New("it is called after the registration was ended")
	case u.frees > 0:
		return errors.New("it is called after the subscriber was freed")
	case u.chained() && s.tornDown:
		return errors.New("it is called after the teardown")
	}
	var called int
	switch e.what {
	case evRelease:
		called = m.now
		switch {
		case u.releases > 0:
			return errors.New("it is called for the second time")
		case !u.ending && s.exiting == 0:
			return errors.New("it is called, but nobody calls Unregister and there are users")
		}
		u.releases++
	case evStart, evInvalidate:
		if b == nil {
			switch {
			case s.exiting == 0:
				return errors.New("it is told of an exit, but there are users")
			case u.toldExit:
				return errors.New("it is told of the exit twice")
			}
			s.exitRuns++
			return nil
		}
		called = b.start.called
		_, again := b.start.told[u.id]
		b.start.told[u.id] = false
		switch {
		case b.returned || b.undoing || b.thread != e.thread || b.space != e.space:
			return errors.New("it is called outside of InvalidateRangeStart")
		case again:
			return errors.New("it is told of the bracket twice")
		case b.byInterval:
			return errors.New("it is told of the bracket after an interval has refused it")
		case e.what == evInvalidate && b.chain:
			return errors.New("it is told after the chain")
		case e.what == evInvalidate && !b.r.Overlaps(u.r):
			return errors.New("it is told of a range that does not overlap")
		}
		b.chain = b.chain || e.what == evStart
	case evEnd:
		called = b.end.called
		undo := !b.returned && b.refused && !b.byInterval
		if undo {
			called = b.start.called
			if b.end.told == nil {
				b.end.told = map[int]bool{}
			}
			b.undoing = true
		}
		_, again := b.end.told[u.id]
		if !again && b.end.told != nil {
			b.end.told[u.id] = false
		}
		switch {
		case !undo && (!b.closing || b.closed), b.thread != e.thread, b.space != e.space:
			return errors.New("it is called outside of InvalidateRangeEnd")
		case !b.start.told[u.id]:
			return errors.New("it is told the end, but not the start")
		case again:
			return errors.New("it is told the end twice")
		}
	case evYoung:
		w := m.ages[e.thread]
		called = w.called
		_, again := w.told[u.id]
		w.told[u.id] = false
		switch {
		case again:
			return errors.New("it is asked twice")
		case w.how == 0 && w.yes:
			return errors.New("it is asked although another one has said yes")
		}
	}
	claimed := e.what == evRelease && s.exiting > 0 && s.exiting < u.gone // by the exit, before it was gone
	if u.gone > 0 && u.gone < called && !claimed {
		return errors.New("it is called after it was taken off the chain")
	}
	return nil
}

// compare compares the state of an address space with the model's, which is
// known because everybody stands still; but for the count, if somebody waits for
// a grace period that may have ended.
func (m *propModel) compare(e propEvent) error {
	s := &m.spaces[e.space]
	want := Stats{Users: int64(s.users), Count: 1}
	if !s.exited {
		want.Count++
	}
	var less, more int64
	if s.tornDown && !s.exited {
		less++
	}
	for _, u := range m.subs {
		if u.space != e.space || u.registered == 0 {
			continue
		}
		if e.after && (u.shared && u.frees != 1 || u.detached && u.frees != 1 || !u.shared && !u.detached && !u.ended) {
			return fmt.Errorf("at the end subscriber %d was freed %d times", u.id, u.frees)
		}
		switch {
		case u.linked():
			want.Notifiers++
		case !u.chained() && !u.ended:
			want.Intervals++
		}
		switch {
		case u.ended || u.detached:
		case u.frees > 0:
			more++
		default:
			want.Count++
			if u.ending && u.released > 0 && u.runs == 0 {
				less++
			}
		}
	}
	if s.used {
		for _, b := range m.brackets {
			if b.space == e.space && (b.opened && !b.closing || !b.returned && !b.undoing) {
				want.Invalidating++
			}
		}
		if s.exitRuns > 0 {
			want.Invalidating++
		}
	}
	if e.ok {
		less, more = 0, 0
	}
	got := e.stats
	got.Waits, got.Waited, got.Longest = 0, 0, 0
	if got.Count >= want.Count-less && got.Count <= want.Count+more {
		want.Count = got.Count
	}
	switch {
	case got != want:
		return fmt.Errorf("the state is %+v, want %+v", got, want)
	case e.after && !s.tornDown:
		return errors.New("it was not torn down")
	case e.after && (got != Stats{Count: 1}):
		return fmt.Errorf("at the end the state is %+v", got)
	}
	return nil
}

// propFailure is a program that has failed, and how.
type propFailure struct {
	p       program
	mutant  mutant
	stepped bool
	fatal   bool // it has not ended: goroutines and locks are left behind
	err     error
	at      int
	history []propEvent
}

func (f *propFailure) Error() string {
	var b strings.Builder
	how := "freely"
	if f.stepped {
		how = "stepped"
	}
	fmt.Fprintf(&b, "%v\nrun %s: -program '%v'\n", f.err, how, f.p)
	for i, e := range f.history {
		if f.at > 0 && i >= f.at {
			fmt.Fprintf(&b, "and %d events more\n", len(f.history)-i)
			break
		}
		if e.what != evStats || i+1 == f.at {
			fmt.Fprintf(&b, "%4d%v\n", i+1, e)
		}
	}
	return b.String()
}

// runProgram runs a program once.
func runProgram(p program, defect mutant, stepped bool, seed uint64) *propFailure {
	x := newPropRun(p, defect, stepped, seed)
	err := x.execute()
	x.mu.Lock()
	defer x.mu.Unlock()
	f := &propFailure{p: p, mutant: defect, stepped: stepped, fatal: err != nil, err: err, history: x.history}
	if err == nil {
		if f.at, f.err = judge(p, x.history); f.err == nil {
			return nil
		}
	}
	return f
}

// again runs a program until it fails as another one did, or has had its chances.
// One that is stepped has them with other schedules.
func (f *propFailure) again(p program, rng *rand.Rand) *propFailure {
	tries := 4
	if !f.stepped {
		tries = 50
	}
	for i := range tries {
		if g := runProgram(p, f.mutant, f.stepped, rng.Uint64()); g != nil {
			return g
		}
		if f.stepped && i < tries-1 {
			p.schedule = nil
			for range 2 + rng.IntN(12) {
				p.schedule = append(p.schedule, uint8(max(0, rng.IntN(2*propChoices)-propChoices)))
			}
		}
	}
	return nil
}

// shrink returns a failure of a program that is as small as can be found in a
// time.
func (f *propFailure) shrink(rng *rand.Rand, length time.Duration) *propFailure {
	deadline := time.Now().Add(length)
	if !f.stepped && !f.fatal {
		// One that also fails when it is stepped is easier to understand.
		g := *f
		g.stepped = true
		for range 50 {
			if h := g.again(f.p, rng); h != nil {
				f = h
				break
			}
		}
	}
	for smaller := true; smaller && !f.fatal; {
		smaller = false
		for _, p := range f.p.smaller() {
			if f.fatal || time.Now().After(deadline) {
				return f
			}
			if g := f.again(p, rng); g != nil && (g.p.size() < f.p.size() || len(p.schedule) < len(f.p.schedule) || g.p.weight() < f.p.weight()) {
				f, smaller = g, true
				break
			}
		}
	}
	return f
}

// weight is how much of a program is not 0.
func (p program) weight() (n int) {
	n = p.spaces + len(p.threads)
	for _, ops := range p.threads {
		for _, o := range ops {
			for _, a := range o.args {
				n += int(a)
			}
		}
	}
	for _, c := range p.schedule {
		n += 1 + int(c)
	}
	return n
}

// smaller returns programs that are smaller than p, the smallest first.
func (p program) smaller() (list []program) {
	change := func(f func(q *program)) {
		q := p.clone()
		f(&q)
		list = append(list, q)
	}
	for i := range p.threads {
		if len(p.threads) > 1 {
			change(func(q *program) { q.threads = slices.Delete(q.threads, i, i+1) })
		}
	}
	if p.spaces > 1 {
		change(func(q *program) { q.spaces-- })
	}
	for n := 8; n > 0; n /= 2 {
		for i, ops := range p.threads {
			for j := 0; j+n <= len(ops); j += n {
				change(func(q *program) { q.threads[i] = slices.Delete(q.threads[i], j, j+n) })
			}
		}
	}
	for i, ops := range p.threads {
		for j, o := range ops {
			for k, a := range o.args {
				if a > 0 {
					change(func(q *program) { q.threads[i][j].args[k] = 0 })
				}
			}
		}
	}
	for n := len(p.schedule); n > 0; n /= 2 {
		change(func(q *program) { q.schedule = q.schedule[:len(q.schedule)-n] })
	}
	for i, c := range p.schedule {
		if c > 0 {
			change(func(q *program) { q.schedule[i] = 0 })
		}
		change(func(q *program) { q.schedule = slices.Delete(q.schedule, i, i+1) })
	}
	return list
}

// TestPropertyPrograms runs random programs, and shrinks the one that fails.
func TestPropertyPrograms(t *testing.T) {
	if *propProgramFlag != "" {
		p, err := parseProgram(*propProgramFlag)
		if err != nil {
			t.Fatalf("-program: %v", err)
		}
		propCheck(t, runProgram(p, sound, true, 1), nil)
		for seed := range uint64(200) {
			propCheck(t, runProgram(p, sound, false, seed), nil)
		}
		return
	}
	rng := gvmtest.Rand(t)
	length := 400 * time.Millisecond
	switch {
	case *propTimeFlag > 0:
		length = *propTimeFlag
	case *propCountFlag > 0:
		length = time.Hour
	case testing.Short():
		length /= 4
	}
	var stepped, free, ops int
	for begin := time.Now(); time.Since(begin) < length && (*propCountFlag == 0 || stepped < *propCountFlag); {
		p := generateProgram(rng)
		ops += p.size()
		f := runProgram(p, sound, true, 0)
		if stepped++; f == nil && stepped%4 == 0 {
			for range 4 {
				if f = runProgram(p, sound, false, rng.Uint64()); f != nil {
					break
				}
				free++
			}
		}
		if f != nil {
			propCheck(t, f, rng)
		}
	}
	t.Logf("%d programs of %d operations were stepped; of some there were %d runs that were free", stepped, ops, free)
}

// propCheck fails the test, after shrinking, if there is a failure.
func propCheck(t *testing.T, f *propFailure, rng *rand.Rand) {
	t.Helper()
	if f == nil {
		return
	}
	if rng != nil {
		f = f.shrink(rng, 5*time.Second)
	}
	t.Fatal(f)
}

// propMutants are defects that the property test notices soon. It notices others
// after hundreds of programs, or because everybody waits, which leaves goroutines
// behind; they are in the table of TestMutants only.
var propMutants = []struct {
	name   string
	mutant mutant
}{
	{"countBeforeAllLocks", countBeforeAllLocks},
	{"noAllLocks", noAllLocks},
	{"claimByLink", claimByLink},
	{"unlinkBeforeRelease", unlinkBeforeRelease},
	{"exitUnlinksOutside", exitUnlinksOutside},
	{"exitDoesNotWait", exitDoesNotWait},
	{"dropBeforeWait", dropBeforeWait},
	{"detachReleases", detachReleases},
	{"unlinkClearsNext", unlinkClearsNext},
	{"pinUsers", pinUsers},
	{"putFreesAtOnce", putFreesAtOnce},
	{"putReleases", putReleases},
	{"compareKindsByType", compareKindsByType},
	{"shareUnlinked", shareUnlinked},
	{"undoTellsNobody", undoTellsNobody},
	{"undoTellsEarlier", undoTellsEarlier},
	{"removeDoesNotWait", removeDoesNotWait},
	{"endInclusive", endInclusive},
}

// TestPropertyNoticesMutants runs programs on address spaces with a defect until
// one fails.
func TestPropertyNoticesMutants(t *testing.T) {
	if gvmtest.Race {
		gvmtest.OtherBuild(t, "some of the defects are data races, which the race detector notices first")
	}
	const most = 4000
	for _, tt := range propMutants {
		t.Run(tt.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, uint64(tt.mutant)))
			begin := time.Now()
			for n := 1; n <= most; n++ {
				if f := runProgram(generateProgram(rng), tt.mutant, true, 0); f != nil {
					t.Logf("noticed after %d programs, %v: %v", n, time.Since(begin).Round(time.Millisecond/10), f.err)
					return
				}
			}
			t.Errorf("not noticed by %d programs", most)
		})
	}
}

// TestPropertyShrinks has a failure made small, and the small program written and
// read again fail in the same way.
func TestPropertyShrinks(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var f *propFailure
	for f == nil {
		f = runProgram(generateProgram(rng), detachReleases, true, 0)
	}
	first := f.p.size()
	f = f.shrink(rng, 2*time.Second)
	if n := f.p.size(); n > 4 {
		t.Errorf("a program of %d operations was shrunk to %d, want at most 4:\n%v", first, n, f.p)
	}
	p, err := parseProgram(f.p.String())
	if err != nil {
		t.Fatal(err)
	}
	if runProgram(p, detachReleases, true, 0) == nil {
		t.Errorf("what was written as %q does not fail any more", f.p)
	}
	if f := runProgram(p, sound, true, 0); f != nil {
		t.Errorf("without the defect: %v", f)
	}
	t.Logf("%d operations were shrunk:\n%v", first, f)
}

func FuzzProgram(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 10 {
		f.Add(generateProgram(rng).encode())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if f := runProgram(decodeProgram(data), sound, true, 0); f != nil {
			t.Fatal(f)
		}
	})
}
