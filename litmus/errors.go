package litmus

import (
	"fmt"
	"slices"
	"strings"
)

// SyntaxError is a text that is no litmus test.
type SyntaxError struct {
	File string // as Parse was told
	Line int    // from 1
	Col  int    // in bytes, from 1
	Msg  string // what is wrong, and what was expected
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Col, e.Msg)
}

// NotRunError is why a test cannot run on a machine.
type NotRunError struct {
	Need Need   // what is missing; empty: it was found out by use
	Why  string // what the machine has instead, and what to do about it
	Err  error  // the error under it, or nil
}

func (e *NotRunError) Error() string {
	if e.Need != "" {
		return fmt.Sprintf("needs %s: %s", e.Need, e.Why)
	}
	return e.Why
}

func (e *NotRunError) Unwrap() error { return e.Err }

// nearest returns the name that somebody who wrote word is likely to have meant, or "".
func nearest(word string, names []string) string {
	best, least := "", min(3, len(word)) // no name is like a word of which not one letter stays
	for _, name := range names {
		if d := distance(word, name, least); d < least {
			best, least = name, d
		}
	}
	return best
}

// distance returns how many letters have to be put in, left out or replaced to make b of a;
// limit or more if it is that many.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	old, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range old {
		old[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(old[j+1]+1, row[j]+1, old[j]+cost)
		}
		old, row = row, old
	}
	return old[len(b)]
}

// oneOf lists names for a message.
func oneOf[S ~string](names []S) string {
	var list []string
	for _, n := range names {
		list = append(list, string(n))
	}
	if len(list) < 2 {
		return strings.Join(list, "")
	}
	last := len(list) - 1
	return strings.Join(list[:last], ", ") + " or " + list[last]
}

func strs[S ~string](names []S) []string {
	list := make([]string, len(names))
	for i, n := range slices.All(names) {
		list[i] = string(n)
	}
	return list
}
