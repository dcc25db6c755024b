package vm

import (
	"strings"
	"testing"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
)

// TestShow boots an image that copies a word by way of two addresses at which the guest is
// shown the same region.
func TestShow(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	m, err := New(Config{RAM: addr.PageSize})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	r, err := m.Memory().NewRegion(mm.RegionConfig{Name: "shown", Size: 2 * addr.PageSize, Backing: mm.Memfd})
	if err != nil {
		t.Fatal(err)
	}
	const at, alias = 0x400000, 0x40600000
	for _, gpa := range []addr.GPA{at, alias} {
		if err := m.Show(r, gpa); err != nil {
			t.Fatal(err)
		}
	}
	for gpa, want := range map[addr.GPA]string{
		at + addr.PageSize:                    "overlaps window",
		at + 1:                                "not page aligned",
		guests.RAMBase:                        "not behind RAM",
		guests.RAMBase + guests.MaxRAM:        "page tables cannot map it",
		addr.GPA(^uint64(0)) &^ addr.PageMask: "page tables cannot map it",
	} {
		if err := m.Show(r, gpa); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Show at %v: %v, want %q", gpa, err, want)
		}
	}
	image := []byte{
		0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00, // mov rax, [0x400000]
		0x48, 0x89, 0x04, 0x25, 0x08, 0x10, 0x60, 0x40, // mov [0x40601008], rax
		0x66, 0xba, 0x00, 0x05, // mov dx, guests.PortExit
		0xb8, 3, 0, 0, 0, // mov eax, 3
		0xef, // out dx, eax
	}
	if err := m.BootImage("copies", image); err != nil {
		t.Fatal(err)
	}
	if err := m.Memory().Store64(r.Range.Start, 7); err != nil {
		t.Fatal(err)
	}
	if status, err := m.Run(t.Context()); status != 3 || err != nil {
		t.Errorf("the guest ends with status %d, %v; want 3", status, err)
	}
	if v, err := m.Load64(at + addr.PageSize + 8); v != 7 || err != nil {
		t.Errorf("the word at the other address is %d, %v; want 7", v, err)
	}
	if err := m.Show(r, alias+addr.HugeSize); err == nil || !strings.Contains(err.Error(), "has been booted") {
		t.Errorf("Show after Boot: %v", err)
	}
}

func TestBootImageSizes(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	for _, n := range []int{0, int(guests.MaxImage) + 1} {
		m, err := New(Config{RAM: addr.PageSize})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.BootImage("none", make([]byte, n)); err == nil || !strings.Contains(err.Error(), "boot guest none: an image of") {
			t.Errorf("an image of %d bytes: %v", n, err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}
