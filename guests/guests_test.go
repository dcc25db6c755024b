package guests

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

var update = flag.Bool("update", false, "write the images that the sources give")

// build assembles and links one guest.
func build(t *testing.T, source string) []byte {
	t.Helper()
	dir := t.TempDir()
	object, image := filepath.Join(dir, "guest.o"), filepath.Join(dir, "guest.bin")
	for _, args := range [][]string{
		{"as", "--64", "--fatal-warnings", "-I", "src", "-o", object, source},
		{"ld", "-m", "elf_x86_64", "-nostdlib", "--oformat", "binary", "-Ttext", "0x10000", "-e", "0x10000", "-o", image, object},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	code, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

// TestImages builds every guest from its source and compares the bytes with the
// image that is embedded.
func TestImages(t *testing.T) {
	gvmtest.Need(t, gvmtest.Assembler)
	sources, err := filepath.Glob("src/*.S")
	if err != nil {
		t.Fatal(err)
	}
	if len(sources) != len(table) {
		t.Errorf("there are %d sources, and %d rows in the table", len(sources), len(table))
	}
	for _, g := range table {
		t.Run(g.Name, func(t *testing.T) {
			built := build(t, "src/"+g.Name+".S")
			if *update {
				if err := os.WriteFile("images/"+g.Name+".bin", built, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			image, err := g.Image()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(built, image) {
				t.Errorf("the image has %d bytes %x,\nthe source gives %d bytes %x; go generate brings it up to date", len(image), image, len(built), built)
			}
			if len(image) > int(MaxImage) {
				t.Errorf("the image has %d bytes, there is room for %d", len(image), MaxImage)
			}
		})
	}
}

// TestABI compares the constants of the assembly sources with Go's.
func TestABI(t *testing.T) {
	want := map[string]uint64{
		"PARAM_VCPUS": ParamVCPUs, "PARAM_RAM": ParamRAM, "PARAM_RAM_SIZE": ParamRAMSize, "PARAM_ARGS": ParamArgs,
		"RESULT_WORDS": ResultWords, "RESULT_PROGRESS": 0, "RESULT_SUM": 8 * TouchSum,
		"PORT_CONSOLE": PortConsole, "PORT_NOP": PortNop, "PORT_UART": PortUART, "PORT_EXIT": PortExit, "PORT_MARK": PortMark, "PORT_PRINT": PortPrint,
		"PAGE":         addr.PageSize,
		"PROBE_POSTED": 8 * ProbePosted, "PROBE_OP": 8 * ProbeOp, "PROBE_ADDR": 8 * ProbeAddr, "PROBE_VALUE": 8 * ProbeValue, "PROBE_RESULT": 8 * ProbeResult,
		"PROBE_LOAD": ProbeLoad, "PROBE_STORE": ProbeStore, "PROBE_ADD": ProbeAdd, "PROBE_EXIT": ProbeExit,
	}
	got := map[string]uint64{}
	set := regexp.MustCompile(`^\s*\.set\s+((?:PARAM|RESULT|PORT|PAGE|PROBE)\w*),\s*(\w+)`)
	for _, name := range []string{"src/abi.inc", "src/touch.S", "src/probe.S"} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if m := set.FindStringSubmatch(s.Text()); m != nil {
				v, err := strconv.ParseUint(m[2], 0, 64)
				if err != nil {
					t.Fatalf("%s: %q: %v", name, s.Text(), err)
				}
				got[m[1]] = v
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("constants (-Go +assembly):\n%s", diff)
	}
}

func TestBootLayoutDoesNotOverlap(t *testing.T) {
	parts := []struct {
		name       string
		start, end addr.GPA
	}{
		{"TSS", TSS, TSS + addr.PageSize},
		{"parameters", Params, Params + addr.PageSize},
		{"results", Results, Results + MaxVCPUs*ResultWords*8},
		{"PML4", PML4, PML4 + addr.PageSize},
		{"PDPT", PDPT, PDPT + addr.PageSize},
		{"image", Image, Image + MaxImage},
		{"stacks", StackTop(MaxVCPUs-1) - addr.PageSize, StackTop(0)},
		{"page directories", PageDirs, PageDirs + maxPDs*addr.PageSize},
		{"RAM", RAMBase, RAMBase + MaxRAM},
	}
	for i, p := range parts[1:] {
		if before := parts[i]; before.end > p.start {
			t.Errorf("%s ends at %v, %s begins at %v", before.name, before.end, p.name, p.start)
		}
	}
}

func TestParse(t *testing.T) {
	for name, tt := range map[string]struct {
		guest, arg string
		want       Args
		says       string
	}{
		"a number":          {guest: "counter", arg: "rounds=5", want: Args{"rounds": 5}},
		"hexadecimal":       {guest: "counter", arg: "rounds=0x10", want: Args{"rounds": 16}},
		"a name":            {guest: "touch", arg: "order=strided", want: Args{"order": 2}},
		"no value":          {guest: "counter", arg: "rounds", says: "NAME=VALUE"},
		"not a number":      {guest: "counter", arg: "rounds=many", says: `"many" is not a number`},
		"negative":          {guest: "counter", arg: "rounds=-1", says: "not a number"},
		"unknown parameter": {guest: "counter", arg: "size=1", says: "it has pages, rounds, mark"},
		"no parameters":     {guest: "spin", arg: "size=1", says: "no parameters"},
		"unknown name":      {guest: "touch", arg: "order=up", says: "sequential, random, strided"},
		"above the names":   {guest: "touch", arg: "order=3", says: "not in 0 to 2"},
		"too large":         {guest: "hello", arg: "status=256", says: "not in 0 to 255"},
		"too small":         {guest: "stamp", arg: "seed=0", says: "not in 1 to"},
		"below":             {guest: "loop", arg: "iterations=0", says: "0 is below 1"},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := Lookup(tt.guest)
			if err != nil {
				t.Fatal(err)
			}
			args := Args{}
			err = g.Parse(args, tt.arg)
			if tt.says != "" {
				if err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("Parse(%q) returned %v, want %q in it", tt.arg, err, tt.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, args); diff != "" {
				t.Errorf("Parse(%q) (-want +got):\n%s", tt.arg, diff)
			}
		})
	}
}

func TestParamPage(t *testing.T) {
	g, err := Lookup("counter")
	if err != nil {
		t.Fatal(err)
	}
	page, err := g.ParamPage(Args{"rounds": 7}, 2, 64*addr.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	want := map[int]uint64{ParamVCPUs: 2, ParamRAM: uint64(RAMBase), ParamRAMSize: 64 * addr.PageSize, ParamArgs: 16, ParamArgs + 8: 7, ParamArgs + 16: 0}
	for offset, v := range want {
		if got := binary.LittleEndian.Uint64(page[offset:]); got != v {
			t.Errorf("word at 0x%x is %d, want %d", offset, got, v)
		}
	}
	for name, args := range map[string]Args{"more pages than RAM": {"pages": 65}, "unknown": {"size": 1}, "too small": {"pages": 0}} {
		if _, err := g.ParamPage(args, 1, 64*addr.PageSize); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestLookupNamesWhatThereIs(t *testing.T) {
	_, err := Lookup("hallo")
	if err == nil || !strings.Contains(err.Error(), "hello, counter") {
		t.Errorf("Lookup of an unknown guest returned %v", err)
	}
}

// FuzzParse gives a guest's parameters any text: it is refused, or it gives a
// parameter page.
func FuzzParse(f *testing.F) {
	f.Add("touch", "order=random")
	f.Add("counter", "pages=0x10")
	f.Fuzz(func(t *testing.T, name, arg string) {
		g, err := Lookup(name)
		if err != nil {
			return
		}
		args := Args{}
		if g.Parse(args, arg) != nil {
			return
		}
		if _, err := g.ParamPage(args, 1, MaxRAM); err != nil && args["pages"] <= MaxRAM>>addr.PageShift {
			t.Errorf("Parse took %q, but ParamPage says %v", arg, err)
		}
	})
}
