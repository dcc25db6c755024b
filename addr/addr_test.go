package addr

import "testing"

func TestHVARange(t *testing.T) {
	r := HVARange{0x1000, 0x3000}
	for name, tt := range map[string]struct {
		s                  HVARange
		overlaps, contains bool
		intersection       HVARange
	}{
		"itself":           {r, true, true, r},
		"inside":           {HVARange{0x1000, 0x2000}, true, true, HVARange{0x1000, 0x2000}},
		"across the start": {HVARange{0, 0x2000}, true, false, HVARange{0x1000, 0x2000}},
		"up to the start":  {HVARange{0, 0x1000}, false, false, HVARange{0x1000, 0x1000}},
		"from the end":     {HVARange{0x3000, 0x4000}, false, false, HVARange{0x3000, 0x3000}},
		"around":           {HVARange{0, 0x4000}, true, false, r},
	} {
		t.Run(name, func(t *testing.T) {
			if got := r.Overlaps(tt.s); got != tt.overlaps {
				t.Errorf("%v overlaps %v: %v, want %v", r, tt.s, got, tt.overlaps)
			}
			if got := r.Contains(tt.s); got != tt.contains {
				t.Errorf("%v contains %v: %v, want %v", r, tt.s, got, tt.contains)
			}
			if got := r.Intersect(tt.s); got != tt.intersection {
				t.Errorf("%v and %v have %v in common, want %v", r, tt.s, got, tt.intersection)
			}
		})
	}
}

func TestHVAsSaturates(t *testing.T) {
	r := HVAs(^HVA(0)-PageMask, 2*PageSize)
	if r.Empty() || r.NPages() == 2 {
		t.Errorf("a range that wraps is %v with %d pages, want it cut at the last address", r, r.NPages())
	}
	if r := (HVARange{0x2000, 0x1000}); !r.Empty() || r.Bytes() != 0 || r.NPages() != 0 {
		t.Errorf("%v is not empty", r)
	}
}

func TestGFN(t *testing.T) {
	gpa := GPA(0x12345)
	if gpa.GFN() != 0x12 || gpa.Offset() != 0x345 || gpa.GFN().GPA() != 0x12000 {
		t.Errorf("%v is in %v at 0x%x", gpa, gpa.GFN(), gpa.Offset())
	}
	r := GFNRange{2, 4}
	if r.Contains(1) || !r.Contains(2) || !r.Contains(3) || r.Contains(4) || r.NPages() != 2 {
		t.Errorf("%v does not hold exactly frames 2 and 3", r)
	}
	if r.Overlaps(GFNRange{4, 5}) || !r.Overlaps(GFNRange{3, 5}) {
		t.Errorf("%v overlaps what it should not, or the reverse", r)
	}
}
