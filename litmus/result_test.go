package litmus

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"
)

func TestTally(t *testing.T) {
	x := parse(t, "litmus t\npage x\nguest P0\n r0 = load x\nforbidden P0:r0 == 1\nallowed P0:r0 == 2\nrequired P0:r0 == 3\nrequired P0:r0 == 4 && x == 0\n")
	y := newTally(x)
	for _, v := range []uint64{0, 2, 2, 1, 3, 2} {
		if forbidden := y.add([]uint64{v, 0}, v == 2); forbidden != (v == 1) {
			t.Errorf("%d is forbidden: %v", v, forbidden)
		}
	}
	got := y.outcomes()
	want := []Outcome{
		{"P0:r0=1 x=0", 1, 0, Forbidden, true},
		{"P0:r0=2 x=0", 3, 3, Allowed, true},
		{"P0:r0=0 x=0", 1, 0, Allowed, false},
		{"P0:r0=3 x=0", 1, 0, Required, false},
	}
	if len(got) != len(want) {
		t.Fatalf("the outcomes are %v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("outcome %d is %+v, want %+v", i, got[i], want[i])
		}
	}
	if c := y.missing(); c == nil || c.Cond.String() != "P0:r0 == 4 && x == 0" {
		t.Errorf("missing is %v", c)
	}
	y.add([]uint64{4, 0}, true)
	if c := y.missing(); c != nil {
		t.Errorf("missing is %v", c)
	}
}

func TestVerdicts(t *testing.T) {
	text := "litmus t\npage x\nexpect shadow-paging\nguest P0\n r0 = load x\nforbidden P0:r0 == 1\nrequired P0:r0 == 2\nsensitive f\nguest P0\n store x 1\n"
	x := parse(t, text)
	shadow := &Host{root: fstest.MapFS{"sys/module/kvm_pvm/initstate": {Data: []byte("live\n")}}}
	nested := &Host{root: fstest.MapFS{}}
	for name, tt := range map[string]struct {
		t       *Test
		host    *Host
		seen    []uint64
		verdict Verdict
		bad     bool
	}{
		"required seen":          {x, nested, []uint64{0, 2}, OK, false},
		"required missing":       {x, nested, []uint64{0}, Missing, true},
		"forbidden":              {x, nested, []uint64{1, 2}, Violated, true},
		"forbidden and expected": {x, shadow, []uint64{1}, Expected, false},
		"form, seen":             {x.Sensitive[0], nested, []uint64{0, 1}, Seen, false},
		"form, not seen":         {x.Sensitive[0], nested, []uint64{0, 2}, Unseen, true},
	} {
		y, r := newTally(tt.t), &Result{}
		for _, v := range tt.seen {
			if y.add([]uint64{v}, true) {
				r.Sightings = append(r.Sightings, Sighting{})
			}
		}
		(&bed{t: tt.t, c: &Config{Host: tt.host}}).verdict(y, r)
		if r.Verdict != tt.verdict || r.Verdict.Bad() != tt.bad || (r.Text != "") != (len(r.Sightings) > 0) {
			t.Errorf("%s: the verdict is %q, %s", name, r.Verdict, r.Reason)
		}
	}
}

func TestShadowPaging(t *testing.T) {
	const vmx, svm = "flags : fpu vmx de\n", "flags : fpu de svm\n"
	for name, tt := range map[string]struct {
		cpu   string
		files map[string]string
		want  bool
	}{
		"EPT":                       {vmx, map[string]string{"kvm_intel/parameters/ept": "Y"}, false},
		"no EPT":                    {vmx, map[string]string{"kvm_intel/parameters/ept": "N"}, true},
		"NPT":                       {svm, map[string]string{"kvm_amd/parameters/npt": "1"}, false},
		"no NPT":                    {svm, map[string]string{"kvm_amd/parameters/npt": "0"}, true},
		"by page tables":            {"flags : fpu", map[string]string{"kvm_pvm/initstate": "live"}, true},
		"by page tables, and built": {"flags : fpu", map[string]string{"kvm_pvm/initstate": "live", "kvm_intel/parameters/ept": "Y"}, true},
		"either":                    {vmx, map[string]string{"kvm_pvm/initstate": "live", "kvm_intel/parameters/ept": "Y"}, false},
		"nothing":                   {vmx, nil, false},
	} {
		root := fstest.MapFS{"proc/cpuinfo": {Data: []byte(tt.cpu)}}
		for file, text := range tt.files {
			root["sys/module/"+file] = &fstest.MapFile{Data: []byte(text + "\n")}
		}
		if got := (&Host{root: root}).ShadowPaging(); got != tt.want {
			t.Errorf("%s: shadow paging is %v", name, got)
		}
	}
}

func TestLacks(t *testing.T) {
	const swaps = "Filename Type Size Used Priority\n"
	has := fstest.MapFS{
		"proc/swaps":                                 {Data: []byte(swaps + "/dev/zram0 partition 1 0 -2\n")},
		"sys/kernel/mm/ksm/run":                      {Data: []byte("1\n")},
		"sys/devices/system/node/online":             {Data: []byte("0-1\n")},
		"sys/kernel/mm/transparent_hugepage/enabled": {Data: []byte("always [madvise] never\n")},
	}
	lacks := fstest.MapFS{
		"proc/swaps":                     {Data: []byte(swaps)},
		"sys/kernel/mm/ksm/run":          {Data: []byte("0\n")},
		"sys/devices/system/node/online": {Data: []byte("0\n")},
	}
	for _, n := range []Need{NeedSwap, NeedKSM, NeedNUMA, NeedRoot, NeedHugePages} {
		x := &Test{Needs: []Need{n}}
		if err := (&Host{root: has}).Lacks(x); err != nil {
			t.Errorf("%s: %v", n, err)
		}
		var e *NotRunError
		if err := (&Host{root: lacks, uid: 1000}).Lacks(x); !errors.As(err, &e) || e.Need != n || !strings.HasPrefix(err.Error(), "needs "+string(n)+": ") {
			t.Errorf("%s: the error is %v", n, err)
		}
	}
	for err, want := range map[error]bool{
		&NotRunError{Why: "it is so"}:             true,
		errors.Join(errors.New("a"), unix.ENOSYS): true,
		fmt.Errorf("userfaultfd: %w", unix.EPERM): true,
		unix.EINVAL: false,
	} {
		if _, ok := notRun(err); ok != want {
			t.Errorf("%v means not run: %v", err, ok)
		}
	}
}

func TestWriteText(t *testing.T) {
	r := &Result{Test: "t", Verdict: Violated, HostOps: true, Iterations: 32, Effective: 20, Wanted: 100, Instances: 16, Rounds: 2, Seed: 7, Elapsed: 1500 * time.Microsecond,
		Outcomes:  []Outcome{{"x=1", 2, 1, Forbidden, true}, {"x=2", 20, 1, Allowed, true}, {"x=3", 10, 1, Required, false}},
		Sightings: []Sighting{{"x=1", 2, 3, []int{4}, []int{5}, []int{1}, []int{6}}}}
	var b strings.Builder
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	want := `t
         2 ! x=1  forbidden
        20 * x=2
        10   x=3  required
t: forbidden; 32 iterations, 20 effective, 2 rounds (100 effective ones were wanted) in 2ms
  seen: x=1 in round 2, instance 3, seed 7, delays [4], gaps [5] at [1], the host's [6]
  again: gvm litmus run --seed 7 --instances 16 --iterations 100 t
`
	if b.String() != want {
		t.Errorf("the text is\n%s\nwant\n%s", b.String(), want)
	}
	r.Outcomes = make([]Outcome, maxLines+5)
	b.Reset()
	if err := r.WriteText(&b); err != nil || !strings.Contains(b.String(), "in 5 other outcomes") {
		t.Errorf("of many outcomes the text is %v\n%s", err, b.String())
	}
	b.Reset()
	skipped := &Result{Test: "u", Form: "f", Verdict: NotRun, Reason: "needs swap: there is none"}
	if err := WriteSummary(&b, []*Result{r, skipped, {Test: "v", Verdict: OK, Iterations: 3}}); err != nil {
		t.Fatal(err)
	}
	want = `TEST  ITERATIONS  EFFECTIVE  OUTCOMES  FORBIDDEN  TIME  VERDICT
t     32          20         17        0          2ms   forbidden
u/f   -           -          -         -          -     not run: needs swap: there is none
v     3           -          0         0          0s    ok
3 runs: 1 ok, 1 forbidden, 1 not run
`
	if b.String() != want {
		t.Errorf("the summary is\n%s\nwant\n%s", b.String(), want)
	}
}
