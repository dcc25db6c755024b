package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/notifier"
	"github.com/secondmmu/gvm/vm"
)

// watchFlag is --watch.
func watchFlag(w *vm.Watch) cli.Flag {
	return &cli.GenericFlag{Name: "watch", Value: &choice[vm.Watch]{w, []vm.Watch{0, vm.WatchEvents, vm.WatchTrace, vm.WatchEvents | vm.WatchTrace}},
		Usage: "follow changes to RAM that other code makes, by `MEANS`: none, events (userfaultfd), trace (KVM's tracepoint) or events+trace"}
}

// lackWatch returns what to do about a watch that the machine does not have.
func lackWatch(e *vm.WatchError) string {
	const tell = `; "gvm doctor" tells more`
	denied := errors.Is(e, fs.ErrPermission)
	switch {
	case e.Watch == vm.WatchTrace && denied:
		return "run as root, or do without --watch trace" + tell
	case e.Watch == vm.WatchTrace:
		return "use a kernel built with CONFIG_FTRACE=y whose KVM has the tracepoint, or do without --watch trace" + tell
	case denied:
		return "allow userfaultfd (sysctl vm.unprivileged_userfaultfd=1; in a container, by its seccomp profile), or run as root" + tell
	case errors.Is(e, unix.EBUSY):
		return "do without --watch events where the dirty source is wp"
	}
	return "use Linux 6.7 or later, built with CONFIG_USERFAULTFD=y and CONFIG_PTE_MARKER_UFFD_WP=y" + tell
}

// strayWarnings warns of changes that others have made, one line each. There may be
// thousands of them, so it is content with the first few, and the number of the rest; and
// where content and mapping have stayed, it was the kernel, at its work.
type strayWarnings struct {
	w     io.Writer
	quiet bool // warn only of what went wrong in following one

	mu    sync.Mutex // protects what follows
	ram   addr.HVARange
	n     uint64
	shown uint64
}

// name has changes of ram named by its pages, from 0, as a script names them.
func (s *strayWarnings) name(ram addr.HVARange) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ram = ram
}

// manyStrays is how many changes are shown.
const manyStrays = 10

// add is told of a change.
func (s *strayWarnings) add(stray mm.Stray) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	stays := stray.Fate == mm.Stays && stray.Content == notifier.Kept
	if stray.Err == nil && (s.quiet || stays) {
		return
	}
	if s.shown++; s.shown > manyStrays {
		return
	}
	what := "guest memory"
	if r := stray.Range; s.ram.Contains(r) && !r.Empty() {
		first := uint64(r.Start-s.ram.Start) >> addr.PageShift
		what = fmt.Sprintf("page %d of RAM", first)
		if n := r.NPages(); n > 1 {
			what = fmt.Sprintf("pages %d..%d of RAM", first, first+n)
		}
	}
	have := "have"
	if stray.Evidence == mm.Trace && !stray.Hazard() {
		have = "may have" // or the kernel has moved or copied a page
	}
	fmt.Fprintf(s.w, "gvm: warning: others %s changed %s: %v\n", have, what, stray)
}

// count returns how many changes there have been.
func (s *strayWarnings) count() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

// end says how many were not shown. There are no more.
func (s *strayWarnings) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shown > manyStrays {
		fmt.Fprintf(s.w, "gvm: warning: there were %d more changes of guest memory\n", s.shown-manyStrays)
	}
}

// lockedWriter is a writer for several goroutines.
type lockedWriter struct {
	mu sync.Mutex // held while w is written to
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
