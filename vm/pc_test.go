package vm

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
)

// noKVM takes a tracker's slots and does nothing with them.
type noKVM struct{ shadow.Backend }

func (noKVM) Hold()                             {}
func (noKVM) Release()                          {}
func (noKVM) CreateSlot(shadow.Slot) error      { return nil }
func (noKVM) ChangeSlot(_, _ shadow.Slot) error { return nil }
func (noKVM) DeleteSlot(shadow.Slot) error      { return nil }

// newBoard returns a machine that has memory and devices, and no VM.
func newBoard(t testing.TB, c Config) *Machine {
	t.Helper()
	c.Board = Polled
	if c.RAM == 0 {
		c.RAM = 2 << 20
	}
	c.VCPUs = max(c.VCPUs, 1)
	m := &Machine{config: c, cancel: func() {}, memory: mm.New(nil)}
	t.Cleanup(func() { m.memory.Close() })
	m.gate.init()
	m.devices.init(m)
	m.tracker = shadow.NewTracker(m.memory, noKVM{}, 16, nil)
	if err := errors.Join(m.memory.AddressSpace().Register(t.Context(), m.tracker), m.addMemory()); err != nil {
		t.Fatal(err)
	}
	return m
}

// access carries out an access to ports, of size bytes, and returns what was read.
func access(t testing.TB, m *Machine, in bool, port uint16, size int, value uint32) uint32 {
	t.Helper()
	data := []byte{byte(value), byte(value >> 8), byte(value >> 16), byte(value >> 24)}[:size]
	if in {
		fill(data)
	}
	if err := m.devices.pc.portIO(&kvm.IOExit{In: in, Port: port, Size: size, Count: 1, Data: data}); err != nil {
		t.Fatal(err)
	}
	return le(data)
}

// TestPorts reads and writes ports of a PC, a step after the other.
func TestPorts(t *testing.T) {
	type step struct {
		port  uint16
		size  int
		out   bool
		value uint32 // written, or wanted
	}
	read := func(port uint16, size int, want uint32) step { return step{port, size, false, want} }
	write := func(port uint16, size int, v uint32) step { return step{port, size, true, v} }
	now := time.Date(2026, 11, 28, 23, 59, 58, 0, time.UTC)
	for name, tt := range map[string]struct {
		steps   []step
		printed string
		off     bool
		status  int
	}{
		"nothing there":     {steps: []step{read(0x1234, 1, 0xff), read(0x1234, 2, 0xffff), read(0x1234, 4, 0xffffffff), write(0x1234, 4, 1)}},
		"consoles":          {steps: []step{write(0xe9, 1, 'a'), write(0xf1, 1, 'b'), write(0x3f8, 1, 'c'), read(0xe9, 1, 0xe9), read(0x3fd, 1, 0x60)}, printed: "abc"},
		"exit":              {steps: []step{write(0xf4, 4, 0x10)}, off: true, status: 0x21},
		"exit, a byte":      {steps: []step{read(0xf4, 1, 0), write(0xf4, 1, 0xff), write(0xf4, 1, 1)}, off: true, status: 0xff},
		"A20":               {steps: []step{read(0x92, 1, 2), write(0x92, 1, 2)}},
		"reset by A20":      {steps: []step{write(0x92, 1, 3)}, off: true},
		"reset":             {steps: []step{write(0xcf9, 1, 2), write(0xcf9, 1, 6)}, off: true},
		"no PCI":            {steps: []step{write(0xcf8, 4, 0xffffffff), read(0xcf8, 4, 0xffffffff), read(0xcfc, 4, 0xffffffff)}},
		"keyboard reset":    {steps: []step{write(0x64, 1, 0xfe)}, off: true},
		"keyboard lines":    {steps: []step{write(0x64, 1, 0xd1), write(0x60, 1, 0xdf), write(0x64, 1, 0xd1), write(0x60, 1, 0xfe)}, off: true},
		"keyboard":          {steps: []step{read(0x64, 1, 4), write(0x64, 1, 0xaa), read(0x64, 1, 5), read(0x60, 1, 0x55), read(0x64, 1, 4), read(0x60, 1, 0), write(0x64, 1, 0x60), write(0x60, 1, 0x47), write(0x64, 1, 0x20), read(0x60, 1, 0x47), write(0x64, 1, 0xab), write(0x64, 1, 0xa9), write(0x64, 1, 0xd0), read(0x60, 1, 0), read(0x60, 1, 0xff), read(0x60, 1, 3), write(0x60, 1, 0xff)}},
		"clock":             {steps: []step{write(0x70, 1, 0x80), read(0x71, 1, 0x58), write(0x70, 1, 2), read(0x71, 1, 0x59), write(0x70, 1, 4), read(0x71, 1, 0x23), write(0x70, 1, 6), read(0x71, 1, 7), write(0x70, 1, 7), read(0x71, 1, 0x28), write(0x70, 1, 8), read(0x71, 1, 0x11), write(0x70, 1, 9), read(0x71, 1, 0x26), write(0x70, 1, 0x32), read(0x71, 1, 0x20), write(0x70, 1, 0xa), read(0x71, 1, 0x26), write(0x71, 1, 0xff), read(0x71, 1, 0x26)}},
		"memory of CMOS":    {steps: []step{write(0x70, 1, 0xf), write(0x71, 1, 5), read(0x71, 1, 5), write(0x70, 1, 0x31), read(0x71, 1, 0x04), write(0x70, 1, 0x15), read(0x71, 1, 0x80)}},
		"fw_cfg":            {steps: []step{write(0x510, 2, 0), read(0x511, 1, 'Q'), read(0x511, 1, 'E'), read(0x511, 1, 'M'), read(0x511, 1, 'U'), read(0x511, 1, 0), write(0x510, 2, 5), read(0x511, 1, 1), read(0x511, 1, 0), write(0x510, 2, 3), read(0x511, 1, 0), read(0x511, 1, 0), read(0x511, 1, 0x20), write(0x510, 2, 0x1234), read(0x511, 1, 0)}},
		"power management":  {steps: []step{read(0x604, 2, 1), write(0x600, 4, 0x01200000), read(0x602, 2, 0x120), read(0x600, 4, 0x1200000), write(0x602, 2, 0), read(0x602, 2, 0), write(0x604, 2, 1<<13), read(0x608, 4, 0), write(0x604, 2, 5<<10|1<<13)}, off: true},
		"echo":              {steps: []step{write(0xe0, 4, 0x04030201), read(0xe0, 4, 0x04030201), read(0xe1, 2, 0x0302), write(0xe3, 1, 9), read(0xe0, 4, 0x09030201), read(0xe8, 4, 0x09030201), write(0xe9-1, 1, 7), read(0xe0, 1, 7)}},
		"interrupt lines":   {steps: []step{write(0x2000, 1, 1), write(0x2017, 1, 0)}},
		"flush":             {steps: []step{write(0xe4, 4, 0x100123), write(0xe4, 4, 0xb8000), write(0xe4, 4, 0xfffff000), write(0xe4, 4, 0)}},
		"a word for a UART": {steps: []step{write(0x3f8, 2, 0x0041), read(0x3f9, 1, 0)}, printed: "A"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			m := newBoard(t, Config{Console: &out})
			m.devices.pc.now = func() time.Time { return now }
			m.devices.pc.begin = now
			for i, s := range tt.steps {
				if got := access(t, m, !s.out, s.port, s.size, s.value); !s.out && got != s.value {
					t.Errorf("step %d: port 0x%x reads 0x%x, want 0x%x", i, s.port, got, s.value)
				}
			}
			if out.String() != tt.printed || m.off != tt.off || m.status != tt.status {
				t.Errorf("printed %q, off %v with status 0x%x; want %q, %v, 0x%x", out.String(), m.off, m.status, tt.printed, tt.off, tt.status)
			}
		})
	}
}

// TestSerialApart has the UART send to a place of its own.
func TestSerialApart(t *testing.T) {
	var console, serial bytes.Buffer
	m := newBoard(t, Config{Console: &console, Serial: &serial})
	access(t, m, false, 0x3f8, 1, 's')
	access(t, m, false, 0xe9, 1, 'c')
	if console.String() != "c" || serial.String() != "s" {
		t.Errorf("the console has %q, the serial port %q", console.String(), serial.String())
	}
}

// TestPMTimer lets hours pass.
func TestPMTimer(t *testing.T) {
	m := newBoard(t, Config{})
	p := &m.devices.pc
	for d, want := range map[time.Duration]uint32{
		time.Second: boot.PMTimerHz, 10 * time.Second: 10 * boot.PMTimerHz & 0xffffff, 500 * time.Millisecond: boot.PMTimerHz / 2,
		100 * 24 * time.Hour: 100 * 24 * 3600 * boot.PMTimerHz & 0xffffff,
	} {
		p.now = func() time.Time { return p.begin.Add(d) }
		if got := access(t, m, true, boot.PortPMTimer, 4, 0); got != want {
			t.Errorf("after %v it is %d, want %d", d, got, want)
		}
	}
}

// TestFlushIsSeen has the page that is flushed lose its translations.
func TestFlushIsSeen(t *testing.T) {
	m := newBoard(t, Config{})
	if err := m.WriteGuest(0x100000, []byte("kept")); err != nil {
		t.Fatal(err)
	}
	before := m.memory.Changes()
	access(t, m, false, 0xe4, 4, 0x100000)
	got := make([]byte, 4)
	if err := m.ReadGuest(0x100000, got); err != nil || string(got) != "kept" || m.memory.Changes() == before {
		t.Errorf("after a flush the page has %q, %v, and there were %d changes", got, err, m.memory.Changes()-before)
	}
}

// TestMMIO uses memory where there is no RAM.
func TestMMIO(t *testing.T) {
	m := newBoard(t, Config{})
	do := func(gpa addr.GPA, write bool, data ...byte) []byte {
		m.devices.pc.memory(&kvm.MMIOExit{GPA: gpa, Write: write, Data: data})
		return data
	}
	do(0xb8000, true, 1, 2)
	do(testMemory+0xfffe, true, 3, 4)
	do(testMemory+0xffff, true, 5, 6) // its second byte is behind the device
	for i, got := range [][]byte{do(0xb8000, false, 0, 0), do(testMemory, false, 9), do(testMemory+0xfffe, false, 0, 0), do(testMemory+0xffff, false, 0, 0)} {
		if want := [][]byte{{0xff, 0xff}, {0}, {3, 4}, {0xff, 0xff}}[i]; !bytes.Equal(got, want) {
			t.Errorf("read %d: %x, want %x", i, got, want)
		}
	}
}

// TestPlanIsWritten compares the memory of a machine with the plan.
func TestPlanIsWritten(t *testing.T) {
	image := bytes.Repeat([]byte("image"), 1000)
	o := boot.Options{Layout: boot.Layout{RAM: 2 << 20}, Mode: boot.Long, CmdLine: "x"}
	plan, err := boot.Load(image, o)
	if err != nil {
		t.Fatal(err)
	}
	m := newBoard(t, Config{})
	for _, s := range plan.Segments {
		if err := m.fill(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range plan.Segments {
		got := make([]byte, s.Size)
		if err := m.ReadGuest(s.GPA, got); err != nil {
			t.Fatal(err)
		}
		if want := append(bytes.Clone(s.Data), make([]byte, s.Size-uint64(len(s.Data)))...); !bytes.Equal(got, want) {
			t.Errorf("%s is not in memory", s.Name)
		}
	}
	var got []string
	for _, w := range m.windows() {
		got = append(got, w.Name)
	}
	if diff := cmp.Diff([]string{"firmware", "low", "ram"}, got); diff != "" {
		t.Errorf("windows (-want +got):\n%s", diff)
	}
}

// FuzzPorts has a guest do anything at ports and where there is no RAM. Each access is a port or
// an address, a size and a value; nothing but the machine's end comes of it.
func FuzzPorts(f *testing.F) {
	f.Add([]byte{0, 0xe9, 0, 'x', 0, 0, 0, 1, 0x64, 0, 0xfe, 0, 0, 0, 2, 0xf4, 0, 1, 2, 3, 4})
	f.Add([]byte{0x12, 0, 6, 0, 0, 0, 0, 0x80, 0, 0xff, 1, 2, 3, 4})
	f.Add([]byte("\x7f)00000")) // the last port
	ports := []uint16{0x60, 0x64, 0x70, 0x71, 0x92, 0xe0, 0xe4, 0xe8, 0xf4, 0x3f8, 0x3fa, 0x510, 0x511, 0x600, 0x604, 0x608, 0xcf8, 0xcf9, 0x2000, 0x2017, 0xffff}
	f.Fuzz(func(t *testing.T, prog []byte) {
		var out bytes.Buffer
		m := newBoard(t, Config{Console: &out})
		for ; len(prog) >= 7; prog = prog[7:] {
			size, count := 1<<(prog[0]&3%3), 1+int(prog[0]>>2&3)
			data := bytes.Repeat(prog[3:7], count)[:size*count]
			if prog[0]&0x80 != 0 {
				gpa := addr.GPA(le(prog[3:7]))<<8 | addr.GPA(prog[1])
				m.devices.pc.memory(&kvm.MMIOExit{GPA: gpa, Write: prog[0]&0x10 != 0, Data: data[:size]})
				continue
			}
			port := uint16(prog[1]) | uint16(prog[2])<<8
			if prog[0]&0x20 != 0 {
				port = ports[int(prog[1])%len(ports)]
			}
			if err := m.devices.pc.portIO(&kvm.IOExit{In: prog[0]&0x10 != 0, Port: port, Size: size, Count: count, Data: data}); err != nil {
				t.Fatal(err)
			}
		}
		if len(m.devices.pc.keyboard.answers) > maxAnswers || m.status&^0xff != 0 || m.status != 0 && !m.off {
			t.Errorf("the keyboard has %d answers, the status is %d", len(m.devices.pc.keyboard.answers), m.status)
		}
	})
}
