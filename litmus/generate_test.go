package litmus

import (
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/arch/x86/x86asm"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func parse(t testing.TB, text string) *Test {
	t.Helper()
	x, err := Parse("test.litmus", text)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func generate(t testing.TB, x *Test, instances int) *Code {
	t.Helper()
	code, err := Generate(x, instances)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

// everything has a statement of each kind of the guest's.
const everything = `litmus everything
machine ring0
page x = 1
page y = 2 3
alias a of x
guest P0
	r0 = load x[7]
	store x 5
	r1 = add y 2147483647
	r2 = swap y[1] 9
	r3 = await x 5
	store a[2] r3
	fence
	mark
	delay 3
	flush a
	r7 = load a[2]
guest P1
	r4 = add y 1
observe P0:r0 P0:r1 P0:r2 P0:r3 P0:r7 P1:r4 x y y[1] x[2]
allowed x == 5
`

// TestStatements has the interpreter execute each kind of statement.
func TestStatements(t *testing.T) {
	x := parse(t, everything)
	m := newInterpreter(x, generate(t, x, 3), 3)
	rng := gvmtest.Rand(t)
	seen := map[string]int{}
	for n := range uint64(200) {
		outcomes, err := m.round(rng, n+1, func() {})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range outcomes {
			seen[x.outcomeText(o)]++
		}
	}
	if err := m.end(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{ // P1's addition comes after that of P0, or before it
		"P0:r0=0 P0:r1=2 P0:r2=3 P0:r3=5 P0:r7=5 P1:r4=2147483649 x=5 y=2147483650 y[1]=9 x[2]=5",
		"P0:r0=0 P0:r1=3 P0:r2=3 P0:r3=5 P0:r7=5 P1:r4=2 x=5 y=2147483650 y[1]=9 x[2]=5",
	} {
		if seen[want] == 0 {
			t.Errorf("not seen: %s", want)
		}
		delete(seen, want)
	}
	if len(seen) > 0 {
		t.Errorf("seen, too: %v", seen)
	}
}

// TestAwaitEnds has a guest wait for what never comes.
func TestAwaitEnds(t *testing.T) {
	x := parse(t, "litmus t\npage x = 4\nguest P0\n r0 = await x 5\nobserve P0:r0\nallowed x == 4\n")
	m := newInterpreter(x, generate(t, x, 1), 1)
	outcomes, err := m.round(gvmtest.Rand(t), 1, func() {})
	if err != nil || outcomes[0][0] != 4 {
		t.Errorf("the outcome is %v, %v; want 4", outcomes, err)
	}
}

// TestBuiltinInterpreted runs the guests of the built-in tests that have no host, on a
// memory that is sequentially consistent: nothing forbidden is seen, and in each of their
// forms something is.
func TestBuiltinInterpreted(t *testing.T) {
	rng := gvmtest.Rand(t)
	forbidden := func(x *Test, enough int) (n int) {
		const instances = 8
		m := newInterpreter(x, generate(t, x, instances), instances)
		y := newTally(x)
		for round := uint64(1); round < 60 || enough > 0 && round < 1000; round++ {
			outcomes, err := m.round(rng, round, func() {})
			if err != nil {
				t.Fatalf("%s: %v", x.FullName(), err)
			}
			if enough > 0 && n >= enough {
				break
			}
			for _, o := range outcomes {
				if y.add(o, true) {
					n++
				}
			}
		}
		if err := m.end(); err != nil {
			t.Fatalf("%s: %v", x.FullName(), err)
		}
		return n
	}
	for _, x := range All() {
		if x.hasHosts() {
			continue
		}
		if n := forbidden(x, 0); n > 0 {
			t.Errorf("%s: %d forbidden outcomes", x.Name, n)
		}
		for _, f := range x.Sensitive {
			if forbidden(f, 1) == 0 {
				t.Errorf("%s: nothing forbidden is seen", f.FullName())
			}
		}
	}
}

// TestCoherenceInterpreted plays the host of tests of one page: its content changes once,
// for all instances at once. If it changes back, that is seen.
func TestCoherenceInterpreted(t *testing.T) {
	x, err := Lookup("corr-replace")
	if err != nil {
		t.Fatal(err)
	}
	for _, back := range []bool{false, true} {
		const instances = 4
		m := newInterpreter(x, generate(t, x, instances), instances)
		rng := gvmtest.Rand(t)
		n := 0
		for round := range uint64(500) {
			value := uint64(1)
			outcomes, err := m.round(rng, round+1, func() {
				if rng.IntN(20) == 0 && (value == 1 || back) {
					value = 3 - value
				}
				for k := range instances {
					m.memory[uint64(x.address("x"))+offset(Loc{}, k)] = value
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range outcomes {
				if class, _, _ := x.judge(o); class == Forbidden {
					n++
				}
			}
		}
		if (n > 0) != back {
			t.Errorf("the content changing back is %v, and %d forbidden outcomes are seen", back, n)
		}
	}
}

// TestListing looks at the disassembly.
func TestListing(t *testing.T) {
	x := parse(t, everything)
	text := generate(t, x, 16).String()
	for _, want := range []string{"; guest P0\n", "; line 7: r0 = load x[7]\n", "lock xadd qword ptr [rbx+", "mfence\n", "invlpg byte ptr [rbx+", "; an instance, of 16\n", "; no more rounds\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the listing has no %q", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
	for _, x := range All() {
		for _, f := range append(x.Sensitive, x) {
			if text := generate(t, f, MaxInstances).String(); strings.Contains(text, "unrecognized") {
				t.Errorf("%s: the code of the guest cannot be disassembled:\n%s", f.FullName(), text)
			}
		}
	}
}

func TestGenerateLimits(t *testing.T) {
	x := parse(t, everything)
	for _, n := range []int{-1, 0, MaxGuestInstances + 1} {
		if code, err := Generate(x, n); err == nil {
			t.Errorf("code for %d instances has %d bytes", n, len(code.Bytes))
		}
	}
	// The longest test fits.
	var b strings.Builder
	b.WriteString("litmus t\npage x\n")
	for i := range MaxGuests {
		b.WriteString("guest P" + string(rune('0'+i)) + "\n")
		for n := range MaxStatements {
			if n < Words {
				b.WriteString(" r0 = await x 1\n")
			} else {
				b.WriteString(" r0 = add x 1\n")
			}
		}
	}
	b.WriteString("allowed x == 0\n")
	if code := generate(t, parse(t, b.String()), MaxGuestInstances); len(code.Bytes) > int(maxImage)/2 {
		t.Errorf("the longest code, of %d bytes, is near the limit of %d", len(code.Bytes), int(maxImage))
	}
}

// FuzzGenerate has the interpreter run whatever can be parsed: every instruction is one that
// it knows, stays in the code, and uses no memory that is not the test's.
func FuzzGenerate(f *testing.F) {
	for _, x := range All() {
		f.Add(x.Text, uint64(1))
	}
	f.Add(everything, uint64(2))
	f.Fuzz(func(t *testing.T, text string, seed uint64) {
		x, err := Parse("fuzz", text)
		if err != nil {
			return
		}
		rng := rand.New(rand.NewPCG(seed, 0))
		for _, x := range append(x.Sensitive, x) {
			code, err := Generate(x, 2)
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(code.Bytes); {
				inst, err := x86asm.Decode(code.Bytes[i:], 64)
				if err != nil {
					t.Fatalf("at offset %d: %v", i, err)
				}
				i += inst.Len
			}
			if slow(x) {
				continue
			}
			m := newInterpreter(x, code, 2)
			if _, err := m.round(rng, 1, func() {}); err != nil {
				t.Fatal(err)
			}
			if err := m.end(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// slow reports whether a test takes the interpreter long.
func slow(x *Test) bool {
	for _, th := range x.Guests {
		for _, s := range th.Statements {
			if s.Op == Await || s.Op == Delay && s.Value > 1000 {
				return true
			}
		}
	}
	return false
}
