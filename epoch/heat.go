package epoch

import (
	"image"
	"image/color"
	"image/png"
	"io"
	"strings"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/dirty"
)

// A heat map has at most so many columns and rows: what there is more of shares one.
const (
	heatColumns = 1024
	heatRows    = 512
)

// Heat is where in guest memory, and when, pages were dirty: a picture with frames from
// left to right and epochs from top to bottom.
type Heat struct {
	frames addr.GFNRange
	width  int // columns

	rows    [][]uint32 // how many dirty pages each column had, in the epochs of a row
	perRow  int        // epochs, of all rows but the last
	lastRow int        // epochs, of the last
}

// NewHeat returns an empty heat map of frames, which are not empty.
func NewHeat(frames addr.GFNRange) *Heat {
	return &Heat{frames: frames, width: int(min(frames.NPages(), heatColumns)), perRow: 1}
}

// Add adds an epoch in which the frames of set were dirty.
func (h *Heat) Add(set *dirty.Set) {
	if len(h.rows) == 0 || h.lastRow == h.perRow {
		if len(h.rows) == heatRows {
			h.fold()
		}
		if len(h.rows) == 0 || h.lastRow == h.perRow {
			h.rows = append(h.rows, make([]uint32, h.width))
			h.lastRow = 0
		}
	}
	h.lastRow++
	row := h.rows[len(h.rows)-1]
	for run := range set.RunsIn(h.frames) {
		for gfn := run.Start; gfn < run.End; gfn++ {
			row[uint64(gfn-h.frames.Start)*uint64(h.width)/h.frames.NPages()]++
		}
	}
}

// fold makes one row of each two, of which there is an even number, all full.
func (h *Heat) fold() {
	for i := range len(h.rows) / 2 {
		a, b := h.rows[2*i], h.rows[2*i+1]
		for x := range a {
			a[x] += b[x]
		}
		h.rows[i] = a
	}
	h.rows = h.rows[:len(h.rows)/2]
	h.perRow *= 2
	h.lastRow = h.perRow
}

// at returns which part, from 0 to 1, of the pages in some columns and rows was dirty.
func (h *Heat) at(x0, x1, y0, y1 int) float64 {
	dirty, epochs := uint64(0), 0
	for y := y0; y < y1; y++ {
		epochs += h.perRow
		if y == len(h.rows)-1 {
			epochs += h.lastRow - h.perRow
		}
		for x := x0; x < x1; x++ {
			dirty += uint64(h.rows[y][x])
		}
	}
	// The pages of columns x0 to x1 are those that Add counts there.
	first := (uint64(x0)*h.frames.NPages() + uint64(h.width) - 1) / uint64(h.width)
	end := (uint64(x1)*h.frames.NPages() + uint64(h.width) - 1) / uint64(h.width)
	return float64(dirty) / float64(uint64(epochs)*(end-first))
}

// shades are a fifth of the pages each, from none.
var shades = []rune(" ░▒▓█")

// WriteText writes the heat map with at most columns characters in a line, and rows lines.
func (h *Heat) WriteText(w io.Writer, columns, rows int) error {
	columns, rows = min(columns, h.width), min(rows, len(h.rows))
	var b strings.Builder
	for y := range rows {
		b.WriteByte('|')
		for x := range columns {
			part := h.at(x*h.width/columns, (x+1)*h.width/columns, y*len(h.rows)/rows, (y+1)*len(h.rows)/rows)
			shade := int(part*float64(len(shades)-1) + 0.5)
			if shade == 0 && part > 0 {
				shade = 1
			}
			b.WriteRune(shades[shade])
		}
		b.WriteString("|\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// palette is the colours of parts from 0 to 1, at equal distances.
var palette = []color.RGBA{{0, 0, 16, 255}, {60, 20, 110, 255}, {180, 50, 90, 255}, {250, 140, 40, 255}, {255, 250, 190, 255}}

// colour returns the colour of a part, between those of the palette.
func colour(part float64) color.RGBA {
	at := part * float64(len(palette)-1)
	i := min(int(at), len(palette)-2)
	a, b, f := palette[i], palette[i+1], at-float64(i)
	mix := func(a, b uint8) uint8 { return uint8(float64(a) + f*(float64(b)-float64(a)) + 0.5) }
	return color.RGBA{mix(a.R, b.R), mix(a.G, b.G), mix(a.B, b.B), 255}
}

// Pixels of a picture: a page or an epoch is at most so wide or high, and between two heat
// maps there is a gap.
const (
	heatPixel = 8
	heatGap   = 4
	heatWidth = 1024 // that small maps are scaled up to at most
)

// WritePNG writes heat maps of the same frames as one picture, one below the other.
func WritePNG(w io.Writer, maps ...*Heat) error {
	width, height := 1, 0
	for _, h := range maps {
		width = max(width, h.width*h.scale())
		height += len(h.rows)*h.scale() + heatGap
	}
	img := image.NewRGBA(image.Rect(0, 0, width, max(height-heatGap, 1)))
	top := 0
	for _, h := range maps {
		s := h.scale()
		for y := range h.rows {
			for x := range h.width {
				c := colour(h.at(x, x+1, y, y+1))
				for dy := range s {
					for dx := range s {
						img.SetRGBA(x*s+dx, top+y*s+dy, c)
					}
				}
			}
		}
		top += len(h.rows)*s + heatGap
	}
	return png.Encode(w, img)
}

// scale returns how many pixels wide and high a page in an epoch is.
func (h *Heat) scale() int { return max(1, min(heatPixel, heatWidth/h.width)) }
