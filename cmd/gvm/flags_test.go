package main

import (
	"math/big"
	"regexp"
	"testing"

	"github.com/secondmmu/gvm/addr"
)

func TestSize(t *testing.T) {
	for text, want := range map[string]string{
		"16":       "16M",
		"16M":      "16M",
		"16MiB":    "16M",
		"1024":     "1G",
		"3G":       "3G",
		"3GiB":     "3G",
		"4K":       "4K",
		"4KiB":     "4K",
		"2048K":    "2M",
		"0016":     "16M",
		"1028K":    "1028K",
		"1048576K": "1G",
	} {
		var s size
		if err := s.Set(text); err != nil || s.String() != want {
			t.Errorf("size %q is %v, %v; want %s", text, &s, err, want)
		}
	}
}

var sizeSyntax = regexp.MustCompile(`^([0-9]+)(?:([KMG])(?:iB)?)?$`)

// FuzzParseSize compares with integers that do not overflow.
func FuzzParseSize(f *testing.F) {
	for _, text := range []string{"", "0", "16", "4K", "5K", "16MiB", "1G", "iB", "16iB", "KiB", "-1", "+1", "1_0", "0x10", "1e3", "1 G", "1T", "1k", "1KB",
		"1KiBiB", "1GK", "17592186044415", "17592186044416", "17179869183G", "17179869184G", "18446744073709551615", "18446744073709551616K"} {
		f.Add(text)
	}
	shifts := map[string]uint{"": 20, "K": 10, "M": 20, "G": 30}
	f.Fuzz(func(t *testing.T, text string) {
		want := new(big.Int)
		if m := sizeSyntax.FindStringSubmatch(text); m != nil {
			want.SetString(m[1], 10)
			want.Lsh(want, shifts[m[2]])
		}
		valid := want.Sign() > 0 && want.IsUint64() && want.Uint64()%addr.PageSize == 0

		got, err := parseSize(text)
		switch {
		case valid != (err == nil):
			t.Fatalf("parseSize(%q) = %d, %v; want %v, valid: %v", text, got, err, want, valid)
		case err != nil && got != 0:
			t.Fatalf("parseSize(%q) = %d and the error %v", text, got, err)
		case err == nil && got != want.Uint64():
			t.Fatalf("parseSize(%q) = %d, want %v", text, got, want)
		case err == nil:
			s := size(got)
			if again, err := parseSize(s.String()); again != got || err != nil {
				t.Fatalf("parseSize(%q) = %d, written as %v, which is %d, %v", text, got, &s, again, err)
			}
		}
	})
}
