package kvm

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestStats(t *testing.T) {
	m := newMachine(t, 0xa1, 0x00, 0x80, 0xf4) // mov mmio, %ax; hlt
	if n, err := m.CheckExtension(CapBinaryStatsFD); err != nil || n == 0 {
		gvmtest.Lack(t, gvmtest.KVMCaps, fmt.Errorf("%v: %d, %v", CapBinaryStatsFD, n, err))
	}
	vm, err := m.Stats()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	vcpu, err := m.vcpu.Stats()
	if err != nil {
		t.Fatal(err)
	}
	defer vcpu.Close()

	if !strings.HasPrefix(vm.ID(), "kvm-") || !strings.HasSuffix(vcpu.ID(), "/vcpu-0") {
		t.Errorf("ids %q and %q", vm.ID(), vcpu.ID())
	}
	before, err := vcpu.Read("exits")
	if err != nil {
		t.Fatal(err)
	}
	run(t, m.vcpu)
	after, err := vcpu.Read("exits")
	if err != nil || after <= before {
		t.Errorf("exits went from %d to %d, %v", before, after, err)
	}
	if n, err := vcpu.Read("mmio_exits"); err != nil || n != 1 {
		t.Errorf("mmio_exits = %d, %v; want 1", n, err)
	}
	if _, err := vm.Read("exits"); !errors.Is(err, ErrNoStat) {
		t.Errorf("exits of a VM: %v, want ErrNoStat", err)
	}
	for _, st := range []*Stats{vm, vcpu} {
		checkReadAll(t, st)
	}
	if n := testing.AllocsPerRun(20, func() { _, _ = vcpu.Read("exits") }); n != 0 && !gvmtest.Race { // unix.Pread tells the race detector
		t.Errorf("Read allocates %v times", n)
	}
}

// checkReadAll compares ReadAll with Read and Descs. Nothing runs meanwhile.
func checkReadAll(t *testing.T, st *Stats) {
	t.Helper()
	all, err := st.ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	descs := st.Descs()
	if len(all) == 0 || len(all) != len(descs) {
		t.Fatalf("%d values for %d statistics", len(all), len(descs))
	}
	for i, s := range all {
		if s.StatDesc != descs[i] || len(s.Values) != s.Len || s.Name == "" || s.Len == 0 {
			t.Errorf("%+v, described as %+v", s, descs[i])
		}
		histogram := s.Type == StatLinearHist || s.Type == StatLogHist
		if s.Len > 1 != histogram || s.Base != 10 && s.Base != 2 || s.Type > StatLogHist || s.Unit > StatBoolean {
			t.Errorf("%+v makes no sense", s.StatDesc)
		}
		var sum uint64
		for _, v := range s.Values {
			sum += v
		}
		if got, err := st.Read(s.Name); err != nil || got != sum {
			t.Errorf("Read(%s) = %d, %v; want %d", s.Name, got, err, sum)
		}
	}
}

func TestStatNames(t *testing.T) {
	got := fmt.Sprint(StatCumulative, StatLogHist, StatType(9), StatNoUnit, StatBoolean, StatUnit(9))
	want := "cumulative logarithmic histogram unknown(9) none boolean unknown(9)"
	if got != want {
		t.Errorf("names are %q, want %q", got, want)
	}
}

// BenchmarkStats times reading one statistic, and all of a vCPU's.
func BenchmarkStats(b *testing.B) {
	st, err := newMachine(b).vcpu.Stats()
	if err != nil {
		b.Skip(err)
	}
	b.Cleanup(func() { st.Close() })
	b.Run("read=one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := st.Read("exits"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read=all", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := st.ReadAll(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
