package hostops

import (
	"fmt"
	"slices"
)

// SyntaxError is a script that makes no sense, by itself or for a target.
type SyntaxError struct {
	File string // as Parse was told
	Line int    // from 1
	Col  int    // in bytes, from 1; 0: the line as a whole
	Msg  string // what is wrong, and what was expected
}

func (e *SyntaxError) Error() string {
	if e.Col == 0 {
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Msg)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Col, e.Msg)
}

// OpError is an operation of a script or of a random stream that failed. The target
// is what the pieces before the one that failed have made it.
type OpError struct {
	Script string // its name; empty for a random stream
	Record Record
	Err    error
}

func (e *OpError) Error() string {
	if e.Script == "" {
		return fmt.Sprintf("%v: %v", e.Record, e.Err)
	}
	return fmt.Sprintf("%s:%d: %s (op %d): %v", e.Script, e.Record.Line, e.Record.text(), e.Record.N, e.Err)
}

func (e *OpError) Unwrap() error { return e.Err }

// nearest returns the name that somebody who wrote word is likely to have meant, or "".
func nearest[S ~string](word string, names []S) S {
	var best S
	least := min(3, len(word)) // no name is like a word of which not one letter stays
	for _, name := range names {
		if len(word) > len(name)+least {
			continue
		}
		if d := distance(word, string(name)); d < least {
			best, least = name, d
		}
	}
	return best
}

// distance returns how many letters have to be put in, left out, replaced, or exchanged
// with their neighbour to make b of a. It takes time by the product of their lengths.
func distance(a, b string) int {
	rows := [3][]int{make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)}
	older, old, row := rows[0], rows[1], rows[2] // for the letters of a before the last two, before the last, and for all
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		older, old, row = old, row, older
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = slices.Min([]int{old[j+1] + 1, row[j] + 1, old[j] + cost})
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], older[j-1]+1)
			}
		}
	}
	return row[len(b)]
}
