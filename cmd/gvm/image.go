package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/vm"
)

// imageRAM is how much RAM an image has if nothing is said.
const imageRAM = 128 << 20

// imageConfig is an image file that is to be run, and what it is given.
type imageConfig struct {
	options boot.Options
	at      string // where a flat image goes; "": where the mode says
	modules cli.StringSlice
	plan    *boot.Plan // made by parse; nil: the guest is a built-in one
}

func (i *imageConfig) flags() []cli.Flag {
	formats := []boot.Format{boot.Detect, boot.Flat, boot.ELF, boot.Multiboot, boot.PVH, boot.BzImage}
	modes := []boot.Mode{boot.Default, boot.Real, boot.Protected, boot.Long, boot.User}
	return []cli.Flag{
		&cli.StringFlag{Name: "append", Destination: &i.options.CmdLine, Usage: "give an image the command line `TEXT`"},
		&cli.StringSliceFlag{Name: "initrd", Destination: &i.modules, Usage: "give an image `FILE`: its initrd, or a module; a multiboot or PVH image may have several, each with text after a space"},
		&cli.GenericFlag{Name: "format", Value: &choice[boot.Format]{&i.options.Format, formats}, Usage: "take an image for `FORMAT`: flat, elf, multiboot, pvh or bzimage"},
		&cli.GenericFlag{Name: "mode", Value: &choice[boot.Mode]{&i.options.Mode, modes}, DefaultText: "the format's", Usage: "begin a flat image in `MODE`: real, protected, long, or user, which is long at CPL 3 and goes for ELF64 too"},
		&cli.StringFlag{Name: "at", Destination: &i.at, DefaultText: "0x1000 in real mode, else 0x100000", Usage: "put a flat image to `ADDRESS`"},
	}
}

// set reports which of the flags is given that only images have; "": none.
func (i *imageConfig) set(c *cli.Context) string {
	for _, f := range i.flags() {
		if name := f.Names()[0]; c.IsSet(name) {
			return name
		}
	}
	return ""
}

// isImage reports whether what is to be run is named as a file: by a path, or by the name
// of a file that no guest has.
func isImage(name string) bool {
	if strings.ContainsRune(name, os.PathSeparator) {
		return true
	}
	if _, err := guests.Lookup(name); err == nil {
		return false
	}
	info, err := os.Stat(name)
	return err == nil && !info.IsDir()
}

// load reads the image and plans how it runs on a machine, whose board it chooses: one without
// interrupt controllers for a flat image on one vCPU, which is done when it halts.
func (i *imageConfig) load(name string, m *vm.Config) error {
	o := &i.options
	o.Layout, o.VCPUs, o.Name = boot.Layout{RAM: m.RAM}, m.VCPUs, name
	if o.VCPUs < 1 {
		return fmt.Errorf("%d vCPUs are too few", o.VCPUs)
	}
	if i.at != "" {
		at, err := strconv.ParseUint(i.at, 0, 64)
		if err != nil || at == 0 {
			return fmt.Errorf("%q is not an address to put an image to, such as 0x7c00", i.at)
		}
		o.At = addr.GPA(at)
	}
	image, err := readImage(name)
	if err != nil {
		return err
	}
	for _, text := range i.modules.Value() {
		file, _, _ := strings.Cut(text, " ")
		data, err := readImage(file)
		if err != nil {
			return err
		}
		o.Modules = append(o.Modules, boot.Module{Name: text, Data: data})
	}
	if i.plan, err = boot.Load(image, *o); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	m.Board = vm.PC
	if i.plan.Format == boot.Flat && m.VCPUs == 1 {
		m.Board = vm.Polled
	}
	return nil
}

// readImage reads a regular file: what has no end is none.
func readImage(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("it is not a regular file")}
	}
	return os.ReadFile(name)
}

// terminal is a guest's serial port on a terminal: what is typed goes to the guest as it is, but for
// an escape, which ends the run.
type terminal struct {
	r       io.Reader
	escaped bool // the last byte was the escape
}

const (
	escape = 1   // Ctrl-A
	leave  = 'x' // after the escape
)

// errLeft is how a run ends that is left by the escape.
var errLeft = errors.New("left with Ctrl-A x")

// Read returns what is typed, without escapes. Ctrl-A twice is Ctrl-A.
func (t *terminal) Read(p []byte) (n int, err error) {
	for n == 0 && err == nil {
		var typed int
		typed, err = t.r.Read(p)
		for _, c := range p[:typed] {
			switch {
			case t.escaped && c == leave:
				return n, errLeft
			case !t.escaped && c == escape:
				t.escaped = true
				continue
			}
			t.escaped = false
			p[n] = c
			n++
		}
		if len(p) == 0 {
			return 0, nil
		}
	}
	return n, err
}

// openTerminal has what is typed on a terminal read as it is typed, until restore is called. Where
// r is no terminal it is returned as it is.
func openTerminal(r io.Reader) (_ io.Reader, restore func(), err error) {
	restore = func() {}
	f, ok := r.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return r, restore, nil
	}
	before, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, restore, fmt.Errorf("terminal: %w", err)
	}
	// The guest's output stays what the terminal makes of lines.
	raw := *before
	raw.Lflag &^= unix.ICANON | unix.ECHO | unix.ECHONL | unix.ISIG | unix.IEXTEN
	raw.Iflag &^= unix.ICRNL | unix.INLCR | unix.IGNCR | unix.IXON
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &raw); err != nil {
		return nil, restore, fmt.Errorf("terminal: %w", err)
	}
	return &terminal{r: f}, func() { _ = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, before) }, nil
}
