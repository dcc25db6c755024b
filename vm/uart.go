package vm

import (
	"fmt"
	"os"
	"sync"
)

// uart is a 16550 on a line of any speed: characters go out at once, and characters that
// came in wait on the line until the guest reads them, so that emptying the FIFO loses
// none. It interrupts where there is somebody to interrupt.
type uart struct {
	line func(level bool) // sets the interrupt line, inside mu; nil: there is none

	mu      sync.Mutex // protects what follows; a leaf
	read    sync.Cond  // signalled when input is read, and when the line is closed
	closed  bool       // nothing more comes in
	input   []byte     // received and not read yet
	sent    bool       // the guest has not been told that what it sent is gone
	level   bool       // of the interrupt line
	ier     byte
	fifo    bool // the guest has turned the FIFOs on
	lcr     byte
	mcr     byte
	scr     byte
	divisor [2]byte // low, high; kept for whoever reads it back
}

const uartPorts = 8

// Registers, by their distance from the first port.
const (
	uartData = iota // RBR and THR, or the divisor's low byte if DLAB is set
	uartIER         // or the divisor's high byte
	uartIIR         // reading; FCR when written
	uartLCR
	uartMCR
	uartLSR
	uartMSR
	uartSCR
)

const (
	lcrDLAB = 1 << 7 // data and IER are the divisor

	lsrReady = 1 << 0 // a character has come in
	lsrEmpty = 3 << 5 // what was sent is gone

	ierData = 1 << 0 // interrupt when a character has come in
	ierSent = 1 << 1 // interrupt when what was sent is gone

	iirNone  = 1 // no interrupt is pending
	iirSent  = 2
	iirData  = 4
	iirFIFOs = 0xc0

	fcrEnable = 1 << 0

	mcrLoop = 1 << 4 // what is sent comes in

	msrConnected = 0xb0 // carrier, ready, and clear to send

	// maxInput bounds what is kept for a guest that does not read.
	maxInput = 1 << 16
)

func (u *uart) init() { u.read.L = &u.mu }

// Write gives the guest characters to receive. It blocks while too many wait to
// be read, and fails with os.ErrClosed once close was called.
func (u *uart) Write(p []byte) (n int, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(p) > 0 {
		for len(u.input) == maxInput && !u.closed {
			u.read.Wait()
		}
		if u.closed {
			return n, fmt.Errorf("write to the serial port: %w", os.ErrClosed)
		}
		part := p[:min(len(p), maxInput-len(u.input))]
		u.input = append(u.input, part...)
		p, n = p[len(part):], n+len(part)
		u.interruptLocked()
	}
	return n, nil
}

// close makes writers that wait, and those to come, fail.
func (u *uart) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	u.read.Broadcast()
}

// causeLocked returns what the guest is to be interrupted for, as IIR has it.
//
// Preconditions: u.mu is held.
func (u *uart) causeLocked() byte {
	switch {
	case u.ier&ierData != 0 && len(u.input) > 0:
		return iirData
	case u.ier&ierSent != 0 && u.sent:
		return iirSent
	}
	return iirNone
}

// interruptLocked sets the interrupt line to what the registers say.
//
// Preconditions: u.mu is held.
func (u *uart) interruptLocked() {
	level := u.causeLocked() != iirNone
	if level != u.level && u.line != nil {
		u.line(level)
	}
	u.level = level
}

// in reads a register.
func (u *uart) in(reg uint16) byte {
	u.mu.Lock()
	defer u.mu.Unlock()
	latch := u.lcr&lcrDLAB != 0
	switch reg {
	case uartData:
		if latch {
			return u.divisor[0]
		}
		if len(u.input) == 0 {
			return 0
		}
		c := u.input[0]
		u.input = u.input[1:]
		u.read.Broadcast()
		u.interruptLocked()
		return c
	case uartIER:
		if latch {
			return u.divisor[1]
		}
		return u.ier
	case uartIIR:
		iir := u.causeLocked()
		if iir == iirSent {
			u.sent = false
			u.interruptLocked()
		}
		if u.fifo {
			iir |= iirFIFOs
		}
		return iir
	case uartLCR:
		return u.lcr
	case uartMCR:
		return u.mcr
	case uartLSR:
		lsr := byte(lsrEmpty)
		if len(u.input) > 0 {
			lsr |= lsrReady
		}
		return lsr
	case uartMSR:
		if u.mcr&mcrLoop == 0 {
			return msrConnected
		}
		// Its outputs are its inputs: RTS is CTS, DTR is DSR, and the two others follow.
		return (u.mcr&1<<1 | u.mcr&2>>1 | u.mcr&0xc) << 4
	}
	return u.scr
}

// out writes a register. It returns the character that was sent, if one was.
func (u *uart) out(reg uint16, b byte) (c byte, sent bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	latch := u.lcr&lcrDLAB != 0
	switch reg {
	case uartData:
		switch {
		case latch:
			u.divisor[0] = b
		case u.mcr&mcrLoop != 0:
			if len(u.input) < maxInput { // more is lost, as on a line
				u.input = append(u.input, b)
			}
			u.interruptLocked()
		default:
			// It is gone at once: an interrupt that was asked for ends, and the next begins.
			u.sent = false
			u.interruptLocked()
			u.sent = true
			u.interruptLocked()
			return b, true
		}
	case uartIER:
		if latch {
			u.divisor[1] = b
		} else {
			u.sent = u.sent || b&^u.ier&ierSent != 0
			u.ier = b & 0xf
			u.interruptLocked()
		}
	case uartIIR:
		u.fifo = b&fcrEnable != 0
	case uartLCR:
		u.lcr = b
	case uartMCR:
		u.mcr = b & 0x1f
	case uartSCR:
		u.scr = b
	}
	return 0, false
}
