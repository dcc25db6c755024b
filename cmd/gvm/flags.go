package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/secondmmu/gvm/addr"
)

// size is a flag: a positive number of bytes that is a multiple of the page
// size. It is written as a number of MiB, or with a suffix.
type size uint64

// units are the suffixes, largest first.
var units = []struct {
	suffix string
	shift  uint
}{{"G", 30}, {"M", 20}, {"K", 10}}

func (s *size) Set(text string) error {
	n, err := parseSize(text)
	if err != nil {
		return err
	}
	*s = size(n)
	return nil
}

// String returns s in the largest unit that it is a multiple of.
func (s *size) String() string {
	for _, u := range units {
		if n := uint64(*s); n != 0 && n&(1<<u.shift-1) == 0 {
			return fmt.Sprintf("%d%s", n>>u.shift, u.suffix)
		}
	}
	return fmt.Sprintf("%d bytes", uint64(*s))
}

func parseSize(text string) (uint64, error) {
	number, shift := text, uint(20)
	for _, u := range units {
		if before, ok := strings.CutSuffix(strings.TrimSuffix(text, "iB"), u.suffix); ok {
			number, shift = before, u.shift
		}
	}
	n, err := strconv.ParseUint(number, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange), n > math.MaxUint64>>shift:
		return 0, errors.New("it is too large")
	case err != nil:
		return 0, errors.New("a size is a number of MiB, or a number with a suffix K, M or G, or KiB, MiB or GiB")
	case n == 0:
		return 0, errors.New("it is nothing")
	}
	n <<= shift
	if n%addr.PageSize != 0 {
		return 0, fmt.Errorf("it is not a multiple of the page size, %d bytes", addr.PageSize)
	}
	return n, nil
}

// choice is a flag whose value is the name of one of some values.
type choice[T fmt.Stringer] struct {
	value *T
	of    []T
}

func (c *choice[T]) Set(name string) error {
	var names []string
	for _, v := range c.of {
		if v.String() == name {
			*c.value = v
			return nil
		}
		names = append(names, v.String())
	}
	return fmt.Errorf("it is not one of %s", strings.Join(names, ", "))
}

func (c *choice[T]) String() string { return (*c.value).String() }
