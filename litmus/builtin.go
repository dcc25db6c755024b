package litmus

import (
	"embed"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
)

//go:embed tests/*.litmus
var files embed.FS

// All returns the built-in tests, in the order of their names. They are not changed.
func All() []*Test { return slices.Clone(builtin()) }

var builtin = sync.OnceValue(func() []*Test {
	var list []*Test
	entries, err := files.ReadDir("tests")
	if err != nil {
		panic(err) // they are part of the program
	}
	for _, e := range entries {
		text, err := files.ReadFile(path.Join("tests", e.Name()))
		if err != nil {
			panic(err)
		}
		t, err := Parse(e.Name(), string(text))
		if err != nil {
			panic(err)
		}
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b *Test) int { return strings.Compare(a.Name, b.Name) })
	return list
})

// Lookup returns the built-in test of that name.
func Lookup(name string) (*Test, error) {
	var names []string
	for _, t := range builtin() {
		if t.Name == name {
			return t, nil
		}
		names = append(names, t.Name)
	}
	if near := nearest(name, names); near != "" {
		return nil, fmt.Errorf("there is no litmus test %q; did you mean %s?", name, near)
	}
	return nil, fmt.Errorf("there is no litmus test %q among the built-in ones", name)
}
