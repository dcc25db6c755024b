package vm

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/kvm"
)

// devices are what guests find behind ports. A port without a device reads all
// ones, and what is written to it is dropped.
type devices struct {
	mu      sync.Mutex // protects what is written to: one write at a time
	console io.Writer  // or nil
	serial  io.Writer  // or nil: console
	uart    uart
	pc      pc
}

func (d *devices) init(m *Machine) {
	d.console, d.serial = m.config.Console, m.config.Serial
	d.uart.init()
	d.pc.init(m)
	if m.config.Board == PC {
		// The lines exist as long as the VM, which outlives the UART's last use of one.
		d.uart.line = func(level bool) { _ = m.vm.SetIRQLine(irqUART, level) }
	}
}

// print writes to the console.
func (d *devices) print(p []byte) error { return d.write(d.console, "the console", p) }

// send writes what the UART has sent.
func (d *devices) send(c byte) error {
	if d.serial != nil {
		return d.write(d.serial, "the serial port's output", []byte{c})
	}
	return d.print([]byte{c})
}

func (d *devices) write(w io.Writer, name string, p []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w == nil {
		return nil
	}
	if _, err := w.Write(p); err != nil {
		return fmt.Errorf("write to %s: %w", name, err)
	}
	return nil
}

// print writes the string at gpa to the console.
func (v *vcpu) print(gpa addr.GPA) error {
	text := make([]byte, guests.MaxPrint)
	n := int(addr.PageSize - gpa.Offset()) // what follows this page may not be there, nor needed
	for read := 0; read < len(text); n = len(text) {
		if err := v.m.ReadGuest(gpa+addr.GPA(read), text[read:n]); err != nil {
			return fmt.Errorf("vCPU %d: the guest prints a string that is not in its memory: %w", v.id, err)
		}
		if end := bytes.IndexByte(text[read:n], 0); end >= 0 {
			return v.m.devices.print(text[:read+end])
		}
		read = n
	}
	return v.m.devices.print(text)
}

// portIO carries out an access to a port, one element after the other.
func (v *vcpu) portIO(e *kvm.IOExit) error {
	d := &v.m.devices
	if v.m.config.Board != Bare {
		return d.pc.portIO(e)
	}
	if e.Port == guests.PortConsole && !e.In && e.Size == 1 {
		return d.print(e.Data) // all elements at once
	}
	for i := range e.Count {
		element := e.Data[i*e.Size : (i+1)*e.Size]
		var err error
		switch port := e.Port; {
		case guests.PortUART <= port && port < guests.PortUART+uartPorts && e.In:
			fill(element)
			element[0] = d.uart.in(port - guests.PortUART)
		case guests.PortUART <= port && port < guests.PortUART+uartPorts:
			if c, ok := d.uart.out(port-guests.PortUART, element[0]); ok {
				err = d.send(c)
			}
		case port == guests.PortPrint && !e.In:
			err = v.print(addr.GPA(le(element)))
		case port == guests.PortExit && !e.In:
			v.exited, v.status = true, int(le(element)&0xff)
			return nil
		case port == guests.PortMark && !e.In:
			if v.m.config.OnMark != nil {
				err = v.m.config.OnMark(v.id, le(element))
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}
