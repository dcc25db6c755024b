package litmus

import (
	"fmt"
	"strconv"
)

// Ref is a part of an outcome: a register of a thread, or a word of a page in the end.
type Ref struct {
	Thread string // empty: Loc is meant
	Reg    int
	Loc    Loc
}

func (r Ref) String() string {
	if r.Thread != "" {
		return fmt.Sprintf("%s:r%d", r.Thread, r.Reg)
	}
	return r.Loc.String()
}

// Cond is a condition over an outcome: a comparison, or others joined by and, or, not.
type Cond struct {
	Op          string // "==", "!=", "<", "<=", ">", ">=", "&&", "||", "!"
	Left, Right *Cond  // of "&&" and "||"; of "!" Left alone
	A, B        Operand
}

// Operand is one side of a comparison.
type Operand struct {
	Index  int // in the outcome; -1: Number is meant
	Ref    Ref
	Number uint64
}

func (o Operand) String() string {
	if o.Index < 0 {
		return strconv.FormatUint(o.Number, 10)
	}
	return o.Ref.String()
}

func (o Operand) value(outcome []uint64) uint64 {
	if o.Index < 0 {
		return o.Number
	}
	return outcome[o.Index]
}

// Holds reports whether an outcome, in the order of Test.Observed, satisfies the condition.
func (c *Cond) Holds(outcome []uint64) bool {
	switch c.Op {
	case "&&":
		return c.Left.Holds(outcome) && c.Right.Holds(outcome)
	case "||":
		return c.Left.Holds(outcome) || c.Right.Holds(outcome)
	case "!":
		return !c.Left.Holds(outcome)
	}
	a, b := c.A.value(outcome), c.B.value(outcome)
	switch c.Op {
	case "==":
		return a == b
	case "!=":
		return a != b
	case "<":
		return a < b
	case "<=":
		return a <= b
	case ">":
		return a > b
	case ">=":
		return a >= b
	}
	panic("litmus: a condition has no operator " + c.Op)
}

var condRank = map[string]int{"||": 1, "&&": 2, "!": 3}

// String returns the condition as it can be parsed again.
func (c *Cond) String() string { return c.text(0) }

func (c *Cond) text(rank int) string {
	var s string
	mine := condRank[c.Op]
	switch c.Op {
	case "&&", "||":
		s = c.Left.text(mine) + " " + c.Op + " " + c.Right.text(mine+1)
	case "!":
		if condRank[c.Left.Op] == 0 {
			return "!(" + c.Left.text(0) + ")"
		}
		return "!" + c.Left.text(mine)
	default:
		return fmt.Sprintf("%v %s %v", c.A, c.Op, c.B)
	}
	if mine < rank {
		return "(" + s + ")"
	}
	return s
}

// outcomeText writes an outcome as it is listed.
func (t *Test) outcomeText(outcome []uint64) string {
	var b []byte
	for i, r := range t.Observed {
		if i > 0 {
			b = append(b, ' ')
		}
		b = append(b, r.String()...)
		b = append(b, '=')
		b = strconv.AppendUint(b, outcome[i], 10)
	}
	return string(b)
}

// judge returns the class of an outcome, whether it is interesting, and which of the
// required clauses it satisfies, as a bit for each clause.
func (t *Test) judge(outcome []uint64) (class Class, interesting bool, required uint) {
	class = Allowed
	for i, c := range t.Clauses {
		if !c.Cond.Holds(outcome) {
			continue
		}
		switch c.Class {
		case Forbidden:
			class, interesting = Forbidden, true
		case Allowed:
			interesting = true
		case Required:
			required |= 1 << i
		}
	}
	if required != 0 && class != Forbidden {
		class = Required
	}
	return class, interesting, required
}
