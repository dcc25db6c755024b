package epoch

import (
	"bytes"
	"image/color"
	"image/png"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
)

func setOf(gfns ...addr.GFN) *dirty.Set {
	s := new(dirty.Set)
	for _, gfn := range gfns {
		s.Add(gfn)
	}
	return s
}

func TestHeatText(t *testing.T) {
	h := NewHeat(addr.GFNRange{Start: 100, End: 108})
	h.Add(setOf(99, 100, 101, 104, 108))
	h.Add(setOf(100, 107))
	h.Add(setOf())
	h.Add(setOf(100, 101, 102, 103, 104, 105, 106, 107))
	text := func(columns, rows int) string {
		var b strings.Builder
		if err := h.WriteText(&b, columns, rows); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	for _, tt := range []struct {
		columns, rows int
		want          string
	}{
		{80, 80, "|██  █   |\n|█      █|\n|        |\n|████████|\n"},
		{4, 4, "|█ ▒ |\n|▒  ▒|\n|    |\n|████|\n"},
		{8, 2, "|█▒  ▒  ▒|\n|▒▒▒▒▒▒▒▒|\n"},
		{1, 1, "|▒|\n"},
	} {
		if diff := cmp.Diff(tt.want, text(tt.columns, tt.rows)); diff != "" {
			t.Errorf("in %d columns and %d rows (-want +got):\n%s", tt.columns, tt.rows, diff)
		}
	}
}

// TestHeatFolds has more epochs and more pages than a map has rows and columns.
func TestHeatFolds(t *testing.T) {
	const pages, epochs = 3000, 5*heatRows + 7
	h := NewHeat(addr.GFNRange{Start: 0, End: pages})
	all := new(dirty.Set)
	all.AddRange(addr.GFNRange{Start: 0, End: pages})
	total := 0
	for range epochs {
		h.Add(all)
	}
	for y := range h.rows {
		for x, n := range h.rows[y] {
			total += int(n)
			if part := h.at(x, x+1, y, y+1); part != 1 {
				t.Fatalf("at %d, %d the part is %v", x, y, part)
			}
		}
	}
	if total != pages*epochs || len(h.rows) > heatRows || h.width > heatColumns {
		t.Errorf("%d pages in %d epochs are %d in %d x %d", pages, epochs, total, h.width, len(h.rows))
	}
}

func TestHeatPNG(t *testing.T) {
	a, b := NewHeat(addr.GFNRange{Start: 0, End: 10}), NewHeat(addr.GFNRange{Start: 0, End: 10})
	a.Add(setOf(0))
	b.Add(setOf(1))
	b.Add(setOf(1))
	var buf bytes.Buffer
	if err := WritePNG(&buf, a, b); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&buf)
	if err != nil {
		t.Fatal(err)
	}
	if got := img.Bounds().Size(); got.X != 10*heatPixel || got.Y != 3*heatPixel+heatGap {
		t.Errorf("the picture is %v", got)
	}
	hot, cold := colour(1), colour(0)
	for _, tt := range []struct {
		x, y int
		hot  bool
	}{
		{0, 0, true}, {heatPixel, 0, false},
		{0, heatPixel + heatGap, false}, {heatPixel, heatPixel + heatGap, true}, {2*heatPixel - 1, 3*heatPixel + heatGap - 1, true},
	} {
		want := cold
		if tt.hot {
			want = hot
		}
		if got := color.RGBAModel.Convert(img.At(tt.x, tt.y)); got != want {
			t.Errorf("at %d, %d is %v, want %v", tt.x, tt.y, got, want)
		}
	}
	if err := WritePNG(&buf, NewHeat(addr.GFNRange{Start: 0, End: 1})); err != nil {
		t.Errorf("of no epoch: %v", err)
	}
}
