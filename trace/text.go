package trace

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/secondmmu/gvm/addr"
)

// textWriter writes a line for each event. What belongs to an operation has its number,
// and is indented by how far inside of it it is.
type textWriter struct {
	w      io.Writer
	header *Header                  // nil: it is written
	begun  map[uint64]time.Duration // operations in progress
}

func (t *textWriter) Write(events []Event) error {
	w := bufio.NewWriter(t.w)
	if h := t.header; h != nil {
		t.header = nil
		fmt.Fprintf(w, "guest %s, %s, RAM %v", h.Guest, count(uint64(h.VCPUs), "vCPU"), h.RAM)
		if h.HostOps != "" {
			fmt.Fprintf(w, ", host operations: %s, seed %d", h.HostOps, h.Seed)
		}
		fmt.Fprintf(w, "\n\n%12s  %6s  %-8s  %-36s  %s\n", "MS", "OP", "WHO", "WHAT", "WHERE")
	}
	for i := range events {
		if _, err := w.WriteString(t.line(&events[i])); err != nil {
			return err
		}
	}
	return w.Flush()
}

func (t *textWriter) Close() error { return t.Write(nil) }

func (t *textWriter) line(e *Event) string {
	op, who := "", e.Kind.Lane().String()
	if e.Op != 0 {
		op = fmt.Sprintf("#%d", e.Op)
	}
	if e.Kind.Lane() == LaneVCPU {
		who = fmt.Sprintf("vcpu %d", e.VCPU)
	}
	what := e.What()
	switch {
	case e.Kind == HostOp:
		if t.begun == nil {
			t.begun = map[uint64]time.Duration{}
		}
		t.begun[e.Op] = e.Time
	case e.Kind == HostOpEnd:
		if begun, ok := t.begun[e.Op]; ok {
			what += fmt.Sprintf(" in %.1f us", float64(e.Time-begun)/1e3)
			delete(t.begun, e.Op)
		}
	case e.At != 0:
		what += fmt.Sprintf(", %.1f us ago", float64(e.Time-e.At)/1e3)
	}
	s := fmt.Sprintf("%12.6f  %6s  %-8s  %-36s  %s", float64(e.Time)/1e6, op, who, strings.Repeat("  ", e.depth())+what, e.Where())
	s = strings.TrimRight(s, " ")
	if e.Err != "" {
		s += ": " + e.Err
	}
	return s + "\n"
}

// What says in a few words what happened.
func (e *Event) What() string {
	switch e.Kind {
	case Kernel:
		if e.Name == KernelLost {
			return count(e.Pages, "event") + " of the kernel lost"
		}
		return e.Name
	case HostOp:
		return e.Name
	case HostOpEnd:
		if e.Err != "" {
			return e.Name + " failed"
		}
		return e.Name + " done"
	case InvalidateStart:
		return e.Name + " {"
	case InvalidateEnd:
		return "} " + e.Name
	case Zap:
		return "zap, " + count(e.Pages, "translation")
	case SlotDelete, SlotCreate:
		sign := "-"
		if e.Kind == SlotCreate {
			sign = "+"
		}
		return fmt.Sprintf("%s slot %d %v", sign, e.Slot, e.Acc)
	case SlotPolicy:
		return "slots are " + e.Name
	case Hold:
		return "hold vCPUs, for " + e.Name
	case Release:
		return "release vCPUs, for " + e.Name
	case Harvest:
		return "harvest, " + count(e.Pages, "dirty page")
	case Exit:
		return "exit " + strings.TrimPrefix(e.Name, "KVM_EXIT_")
	case Complete:
		return use(e.Acc) + " completed"
	case Touch:
		return use(e.Acc) + " " + e.Name
	case Lost:
		return count(e.Pages, "event") + " lost before this"
	}
	return e.Kind.String()
}

func use(a addr.Access) string {
	if a&addr.Write != 0 {
		return "write"
	}
	return "read"
}

func count(n uint64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// Where says which memory e is about: guest frames, host addresses, or both.
func (e *Event) Where() string {
	switch gfn, hva := !e.GFN.Empty(), !e.HVA.Empty(); {
	case gfn && hva:
		return fmt.Sprintf("%v at %v", e.GFN, e.HVA)
	case gfn:
		return e.GFN.String()
	case hva:
		return e.HVA.String()
	}
	return ""
}
