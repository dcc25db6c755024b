package vm

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"
	"time"
)

func TestUART(t *testing.T) {
	type step struct {
		reg  uint16
		out  int // value to write, or -1 to read
		want byte
	}
	read := func(reg uint16, want byte) step { return step{reg, -1, want} }
	write := func(reg uint16, v byte) step { return step{reg, int(v), 0} }
	for name, tt := range map[string]struct {
		input string
		steps []step
		sent  string
	}{
		"idle":                    {"", []step{read(uartLSR, lsrEmpty), read(uartIIR, iirNone), read(uartMSR, msrConnected), read(uartData, 0)}, ""},
		"send":                    {"", []step{write(uartData, 'h'), write(uartData, 'i')}, "hi"},
		"receive":                 {"ab", []step{read(uartLSR, lsrEmpty|lsrReady), read(uartData, 'a'), read(uartData, 'b'), read(uartLSR, lsrEmpty)}, ""},
		"divisor is not data":     {"a", []step{write(uartLCR, lcrDLAB|3), write(uartData, 1), write(uartIER, 2), read(uartData, 1), read(uartIER, 2), write(uartLCR, 3), read(uartData, 'a'), read(uartIER, 0)}, ""},
		"interrupts can be asked": {"", []step{write(uartIER, 0xff), read(uartIER, 0x0f), read(uartIIR, iirSent), read(uartIIR, iirNone)}, ""},
		"interrupt for input":     {"a", []step{write(uartIER, 3), read(uartIIR, iirData), read(uartIIR, iirData), read(uartData, 'a'), read(uartIIR, iirSent), read(uartIIR, iirNone)}, ""},
		"interrupt when sent":     {"", []step{write(uartData, 'x'), read(uartIIR, iirNone), write(uartIER, 2), read(uartIIR, iirSent), write(uartData, 'y'), read(uartIIR, iirSent), write(uartIER, 0), read(uartIIR, iirNone)}, "xy"},
		"loopback of the modem":   {"", []step{write(uartMCR, mcrLoop|0xa), read(uartMSR, 0x90), write(uartMCR, mcrLoop|5), read(uartMSR, 0x60)}, ""},
		"loopback":                {"", []step{write(uartMCR, mcrLoop), write(uartData, 'x'), read(uartLSR, lsrEmpty|lsrReady), read(uartData, 'x')}, ""},
		"scratch":                 {"", []step{write(uartSCR, 0x5a), read(uartSCR, 0x5a)}, ""},
		"modem bits":              {"", []step{write(uartMCR, 0xff), read(uartMCR, 0x1f)}, ""},
		"FIFO control":            {"", []step{write(uartIIR, 0xc7), read(uartIIR, iirNone|iirFIFOs), write(uartIIR, 0), read(uartIIR, iirNone)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUART()
			if _, err := u.Write([]byte(tt.input)); err != nil {
				t.Fatal(err)
			}
			var sent []byte
			for i, s := range tt.steps {
				if s.out < 0 {
					if got := u.in(s.reg); got != s.want {
						t.Errorf("step %d: register %d reads 0x%x, want 0x%x", i, s.reg, got, s.want)
					}
				} else if c, ok := u.out(s.reg, byte(s.out)); ok {
					sent = append(sent, c)
				}
			}
			if string(sent) != tt.sent {
				t.Errorf("sent %q, want %q", sent, tt.sent)
			}
		})
	}
}

func newUART() *uart {
	u := new(uart)
	u.init()
	return u
}

// TestUARTLine follows the interrupt line, which an edge is made of for each cause.
func TestUARTLine(t *testing.T) {
	u := newUART()
	var got []bool
	u.line = func(level bool) { got = append(got, level) }
	for i, step := range []struct {
		do   func()
		want []bool
	}{
		{func() { u.Write([]byte("ab")) }, nil},
		{func() { u.out(uartIER, ierData) }, []bool{true}},
		{func() { u.in(uartData) }, nil},
		{func() { u.in(uartData) }, []bool{false}},
		{func() { u.out(uartIER, ierSent) }, []bool{true}},
		{func() { u.out(uartData, 'x') }, []bool{false, true}},
		{func() { u.in(uartIIR) }, []bool{false}},
		{func() { u.out(uartData, 'y') }, []bool{true}},
		{func() { u.out(uartIER, 0) }, []bool{false}},
	} {
		got = nil
		step.do()
		if !slices.Equal(got, step.want) {
			t.Errorf("step %d: the line is set to %v, want %v", i, got, step.want)
		}
	}
}

// TestUARTWriteWaits gives a guest more than is kept for it: the writer waits
// until the guest has read enough, and fails when the line is closed.
func TestUARTWriteWaits(t *testing.T) {
	u := newUART()
	const more = 3
	written := make(chan int)
	write := func(n int) {
		n, err := u.Write(make([]byte, n))
		if err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		written <- n
	}
	go write(maxInput + more)
	for range more {
		select {
		case n := <-written:
			t.Fatalf("%d bytes were taken, but only %d are kept", n, maxInput)
		case <-time.After(time.Millisecond):
		}
		for u.in(uartLSR)&lsrReady == 0 {
			time.Sleep(time.Millisecond)
		}
		u.in(uartData)
	}
	if n := <-written; n != maxInput+more {
		t.Errorf("Write took %d bytes, want %d", n, maxInput+more)
	}
	go write(1)
	time.Sleep(time.Millisecond)
	u.close()
	if n := <-written; n != 0 {
		t.Errorf("a write to a closed line took %d bytes", n)
	}
}

// FuzzUART lets a guest do anything to the registers: what it receives is a
// part of what was sent to it, in order.
func FuzzUART(f *testing.F) {
	f.Add([]byte{0x10, 'a', 0x00, 0, 0x83, 0x80})
	f.Fuzz(func(t *testing.T, prog []byte) {
		u := newUART()
		var fed, got []byte
		for ; len(prog) >= 2; prog = prog[2:] {
			reg := uint16(prog[0] % uartPorts)
			switch {
			case prog[0]&0x10 != 0 && len(u.input) < maxInput:
				fed = append(fed, prog[1])
				u.Write(prog[1:2])
			case prog[0]&0x80 != 0:
				loops := u.mcr&mcrLoop != 0 && u.lcr&lcrDLAB == 0 && reg == uartData
				if loops {
					fed = append(fed, prog[1])
				}
				u.out(reg, prog[1])
			case reg == uartData && u.lcr&lcrDLAB == 0 && u.in(uartLSR)&lsrReady != 0:
				got = append(got, u.in(uartData))
			default:
				u.in(reg)
			}
		}
		if !bytes.HasPrefix(fed, got) {
			t.Errorf("received %q, but %q was sent", got, fed)
		}
	})
}
