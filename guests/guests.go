// Package guests has the tiny guests that gvm boots: assembly sources in src,
// and the images that were built from them, embedded.
//
// A guest runs in long mode at CPL 3, which is native on every host: hosts
// whose KVM is based on page tables alone emulate CPL 0 instruction by
// instruction. What a guest finds when it starts, and the ports it can use, is
// in src/abi.inc and, for the host, in this package's constants.
//
// To add a guest, write src/NAME.S, add a row to the table in this file, and run
// go generate.
package guests

import (
	"embed"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/secondmmu/gvm/addr"
)

//go:generate go test -run TestImages -update

//go:embed images/*.bin
var images embed.FS

// Guest is a built-in guest.
type Guest struct {
	Name    string  `json:"name"`
	Summary string  `json:"summary"`
	Params  []Param `json:"params"`  // in the order of the guest's parameter words
	Endless bool    `json:"endless"` // it runs until it is stopped, unless a parameter says otherwise
}

// Param is a parameter of a guest.
type Param struct {
	Name    string   `json:"name"`
	Default uint64   `json:"default"`
	Usage   string   `json:"usage"`
	Max     uint64   `json:"max,omitempty"`   // largest value allowed; 0: any
	Min     uint64   `json:"min,omitempty"`   // smallest value allowed
	Names   []string `json:"names,omitempty"` // names for the values 0, 1, ...
	Pages   bool     `json:"pages"`           // it is a number of pages of RAM, and RAM bounds it
}

var pagesParam = Param{Name: "pages", Default: 16, Min: 1, Usage: "pages of RAM to use", Pages: true}
var seedParam = Param{Name: "seed", Default: 1, Min: 1, Max: 1<<63 - 1, Usage: "where the pseudo-random order begins"}

var table = []Guest{
	{Name: "hello", Summary: "prints a greeting and exits", Params: []Param{
		{Name: "status", Max: 255, Usage: "exit with this status"},
	}},
	{Name: "counter", Summary: "adds 1 to a word in each of its pages, round after round", Params: []Param{
		pagesParam,
		{Name: "rounds", Default: 1000, Usage: "how often to go round"},
		{Name: "mark", Usage: "tell the host after every so many rounds; 0: never"},
	}},
	{Name: "touch", Summary: "reads or writes a working set in a chosen order", Params: []Param{
		pagesParam,
		{Name: "accesses", Default: 1000, Usage: "how many pages to touch"},
		{Name: "order", Names: []string{"sequential", "random", "strided"}, Usage: "which page comes next"},
		{Name: "write", Names: []string{"no", "yes"}, Usage: "write the number of the access, do not read"},
		seedParam,
		{Name: "stride", Default: 7, Min: 1, Max: 1 << 32, Usage: "pages from one access to the next, if strided"},
	}},
	{Name: "spin", Summary: "runs until it is stopped", Endless: true},
	{Name: "stamp", Summary: "writes 1, 2, 3, ... to pages in a pseudo-random order", Endless: true, Params: []Param{
		pagesParam,
		seedParam,
		{Name: "limit", Usage: "exit after so many; 0: never"},
	}},
	{Name: "probe", Summary: "loads and stores what the host asks it to, through its result words", Endless: true},
	{Name: "echo", Summary: "sends back what its serial port receives, up to an end of transmission (Ctrl-D)"},
	{Name: "loop", Summary: "executes two instructions over and over, to measure their speed", Params: []Param{
		{Name: "iterations", Default: 1000000, Min: 1, Usage: "how often"},
	}},
	{Name: "exits", Summary: "leaves the guest over and over, to measure what that costs", Params: []Param{
		{Name: "exits", Default: 1000, Min: 1, Usage: "how often"},
	}},
}

// All returns the built-in guests. Their Params are not nil.
func All() []Guest {
	all := slices.Clone(table)
	for i := range all {
		all[i].Params = append([]Param{}, all[i].Params...)
	}
	return all
}

// Lookup returns the guest of that name.
func Lookup(name string) (Guest, error) {
	for _, g := range table {
		if g.Name == name {
			return g, nil
		}
	}
	var names []string
	for _, g := range table {
		names = append(names, g.Name)
	}
	return Guest{}, fmt.Errorf("there is no guest %q; there are %s", name, strings.Join(names, ", "))
}

// Image returns the guest's code, to be placed at the address Image.
func (g Guest) Image() ([]byte, error) { return images.ReadFile("images/" + g.Name + ".bin") }

// Args are values for parameters of a guest, by name.
type Args map[string]uint64

// Parse reads "name=value", where value is a number as Go writes them, or one of
// the parameter's names, into args.
func (g Guest) Parse(args Args, s string) error {
	name, value, ok := strings.Cut(s, "=")
	if !ok {
		return fmt.Errorf("parameter %q is not of the form NAME=VALUE", s)
	}
	p, err := g.param(name)
	if err != nil {
		return err
	}
	if i := slices.Index(p.Names, value); i >= 0 {
		args[name] = uint64(i)
		return nil
	}
	v, err := strconv.ParseUint(value, 0, 64)
	if err != nil {
		want := "a number"
		if p.Names != nil {
			want = strings.Join(p.Names, ", ")
		}
		return fmt.Errorf("parameter %s of %s: %q is not %s", name, g.Name, value, want)
	}
	args[name] = v
	return p.check(g, v)
}

func (g Guest) param(name string) (Param, error) {
	var names []string
	for _, p := range g.Params {
		if p.Name == name {
			return p, nil
		}
		names = append(names, p.Name)
	}
	if names == nil {
		return Param{}, fmt.Errorf("guest %s has no parameters, so no %q", g.Name, name)
	}
	return Param{}, fmt.Errorf("guest %s has no parameter %q; it has %s", g.Name, name, strings.Join(names, ", "))
}

func (p Param) check(g Guest, v uint64) error {
	limit := p.Max
	if p.Names != nil {
		limit = uint64(len(p.Names) - 1)
	}
	if v < p.Min || limit != 0 && v > limit {
		if limit == 0 {
			return fmt.Errorf("parameter %s of %s: %d is below %d", p.Name, g.Name, v, p.Min)
		}
		return fmt.Errorf("parameter %s of %s: %d is not in %d to %d", p.Name, g.Name, v, p.Min, limit)
	}
	return nil
}

// ParamPage returns the start of the parameter page for a machine with vcpus
// vCPUs and ram bytes of RAM. Parameters that args does not name have their
// defaults.
func (g Guest) ParamPage(args Args, vcpus int, ram uint64) ([]byte, error) {
	for name := range args {
		if _, err := g.param(name); err != nil {
			return nil, err
		}
	}
	page := make([]byte, ParamArgs+8*len(g.Params))
	put := func(offset int, v uint64) { binary.LittleEndian.PutUint64(page[offset:], v) }
	put(ParamVCPUs, uint64(vcpus))
	put(ParamRAM, uint64(RAMBase))
	put(ParamRAMSize, ram)
	for i, p := range g.Params {
		v, ok := args[p.Name]
		if !ok {
			v = p.Default
		}
		if err := p.check(g, v); err != nil {
			return nil, err
		}
		if p.Pages && v > ram>>addr.PageShift {
			return nil, fmt.Errorf("parameter %s of %s: %d pages are more than the %d of RAM", p.Name, g.Name, v, ram>>addr.PageShift)
		}
		put(ParamArgs+8*i, v)
	}
	return page, nil
}
