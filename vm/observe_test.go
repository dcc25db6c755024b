package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/trace"
)

// The words that the page under test can have.
const (
	wordStored = 0x5a5a_5a5a_5a5a_5a5a // what the guest has stored there
	wordFile   = 0xf11e_f11e_f11e_f11e // what its file has there
	wordOther  = 0x0dd0_0dd0_0dd0_0dd0 // what the page has that takes its place
	wordAgain  = 0xa9a1_a9a1_a9a1_a9a1 // what the guest stores afterwards
)

var wordNames = map[uint64]string{wordStored: "kept", wordFile: "file", wordOther: "new", wordAgain: "again", 0: "zero"}

// observed is a machine whose guest has stored a word in a page. It has 2 MiB of RAM, which
// can be one huge page, and each operation is carried out on a page of its own.
type observed struct {
	*Machine
	mem   *mm.Memory
	guest *Probe
	n     uint64 // of the page
	gpa   addr.GPA
	page  addr.HVARange
	child *mm.Child // or nil
}

func newObserved(t *testing.T, backing mm.Backing) *observed {
	t.Helper()
	c := Config{RAM: addr.HugeSize, Backing: backing, Spare: addr.PageSize, Log: trace.NewLog(1000)}
	if backing == mm.File || backing == mm.FilePrivate {
		f, err := os.Create(filepath.Join(t.TempDir(), "ram"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() // the machine has its own
		if err := f.Truncate(addr.HugeSize); err != nil {
			t.Fatal(err)
		}
		c.File = f
	}
	m := newMachine(t, c, "probe", nil)
	if f := m.RAM().File(); f != nil {
		for i := range uint64(len(observations) + 1) {
			if _, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, wordFile), int64(i*addr.PageSize)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := m.LogDirty(true); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return &observed{Machine: m, mem: m.Memory(), guest: m.Probe(0)}
}

// next goes on to the next page, and has the guest store to it.
func (o *observed) next(ctx context.Context, t *testing.T) {
	t.Helper()
	o.n++
	o.gpa, o.page = gpaOf(o.n), o.hvas(o.n, 1)
	if err := o.guest.Store(ctx, o.gpa, wordStored); err != nil {
		t.Fatal(err)
	}
	if v, err := o.guest.Load(ctx, o.gpa); v != wordStored || err != nil {
		t.Fatalf("the guest loads %#x, %v; want what it has stored", v, err)
	}
	if v := o.mustLoad(t, o.gpa); v != wordStored { // and now the table has a translation
		t.Fatalf("the machine loads %#x, want what the guest has stored", v)
	}
	if dirty := o.harvested(ctx, t); dirty != "dirty" {
		t.Errorf("a page that the guest has stored to is %q in the dirty log", dirty)
	}
}

// close ends the machine, and the child if there is one.
func (o *observed) close(t *testing.T) {
	t.Helper()
	err := o.Machine.Close()
	if o.child != nil {
		err = errors.Join(err, o.child.Close())
	}
	if err != nil {
		t.Error(err)
	}
}

// observations is every operation, and what is observed after it on each backing, in
// four words:
//
//	guest  what a load of the guest gives: "kept", what it had stored; "zero"; "file",
//	       what the file has there; "new", what the page has that took its place; "exit",
//	       when the run ends with an error that names the address
//	store  what a store of the guest does then: "ok", and a load gives it, or "exit"
//	dirty  what the operation itself has Harvest report of the page: "-", "dirty" or
//	       "discarded"; with "+" both
//	slots  what shows the page: "same", KVM was not asked to change a slot; "anew", it was,
//	       and what they show is as before; "cut", no slot; "read-only"; "moved", to the
//	       new address
//
// What a load of the machine's own gives, through its table, is what the guest's does.
// "refused" is EINVAL, and nothing has happened. By backing: anonymous, memfd,
// shared-anonymous and memfd-private. A file is as a memfd, and a private mapping of one as
// memfd-private.
var observations = []struct {
	op    string
	do    func(o *observed) error
	want  [4]string
	needs int  // advice that the kernel may not have
	last  bool // what it leaves behind is in the way of others
}{
	{op: "unmap", do: func(o *observed) error { return o.mem.Unmap(o.page) }, want: [4]string{
		"exit exit discarded cut", "exit exit discarded cut", "exit exit discarded cut", "exit exit discarded cut"}},
	{op: "unmap, map", do: func(o *observed) error { return errors.Join(o.mem.Unmap(o.page), o.mem.Map(o.page)) }, want: [4]string{
		"zero ok discarded anew", "kept ok dirty+discarded anew", "zero ok discarded anew", "file ok dirty+discarded anew"}},
	{op: "map over", do: func(o *observed) error { return o.mem.Map(o.page) }, want: [4]string{
		"zero ok discarded same", "kept ok dirty same", "zero ok discarded same", "file ok dirty same"}},
	{op: "protect read", do: func(o *observed) error { return o.mem.Protect(o.page, addr.Read) }, want: [4]string{
		"kept exit - read-only", "kept exit - read-only", "kept exit - read-only", "kept exit - read-only"}},
	{op: "protect none", do: func(o *observed) error { return o.mem.Protect(o.page, addr.NoAccess) }, want: [4]string{
		"exit exit - cut", "exit exit - cut", "exit exit - cut", "exit exit - cut"}},
	{op: "discard", do: func(o *observed) error { return o.mem.Discard(o.page) }, want: [4]string{
		"zero ok discarded same", "kept ok - same", "kept ok - same", "file ok dirty same"}},
	{op: "free", do: func(o *observed) error { return o.mem.Free(o.page) }, want: [4]string{
		"kept|zero ok dirty same", "refused", "refused", "refused"}},
	{op: "punch", do: func(o *observed) error { return o.mem.Punch(o.page) }, want: [4]string{
		"refused", "zero ok discarded same", "refused", "kept ok dirty same"}},
	{op: "remove", do: func(o *observed) error { return o.mem.Remove(o.page) }, want: [4]string{
		"refused", "zero ok discarded same", "zero ok discarded same", "refused"}},
	{op: "truncate", last: true, do: func(o *observed) error { return o.mem.Truncate(o.RAM(), o.n*addr.PageSize) }, want: [4]string{
		"refused", "exit exit discarded cut", "refused", "exit exit discarded cut"}},
	{op: "truncate, grow", last: true, do: func(o *observed) error {
		if err := o.mem.Truncate(o.RAM(), o.n*addr.PageSize); err != nil {
			return err
		}
		return o.mem.Truncate(o.RAM(), addr.HugeSize)
	}, want: [4]string{"refused", "zero ok discarded anew", "refused", "zero ok discarded anew"}},
	{op: "remap", last: true, do: func(o *observed) error { return o.mem.Remap(o.page, o.Spare().Range.Start) }, want: [4]string{
		"kept ok - moved", "kept ok - moved", "kept ok - moved", "kept ok - moved"}},
	{op: "remap over", last: true, do: func(o *observed) error {
		spare := o.Spare().Range
		return errors.Join(o.mem.Map(spare), o.mem.Store64(spare.Start, wordOther), o.mem.Remap(spare, o.page.Start))
	}, want: [4]string{"new ok dirty same", "new ok dirty same", "new ok dirty same", "new ok dirty same"}},
	{op: "remap-keep", last: true, do: func(o *observed) error { return o.mem.RemapKeep(o.page, o.Spare().Range.Start) }, want: [4]string{
		"zero ok discarded same", "kept ok - same", "kept ok - same", "file ok dirty same"}},
	{op: "populate", do: func(o *observed) error { return o.mem.Populate(o.page, true) }, want: [4]string{
		"kept ok - same", "kept ok - same", "kept ok - same", "kept ok - same"}},
	{op: "pageout", do: func(o *observed) error { return o.mem.PageOut(o.page) }, want: [4]string{
		"kept ok - same", "kept ok - same", "kept ok - same", "kept ok - same"}},
	{op: "collapse", do: func(o *observed) error { // which memory it takes is for the kernel to say
		if err := o.mem.Collapse(o.RAM().Range); !errors.Is(err, unix.EINVAL) {
			return err
		}
		return nil
	}, want: [4]string{"kept ok - same", "kept ok - same", "kept ok - same", "kept ok - same"}},
	{op: "mergeable", do: func(o *observed) error { return o.mem.Mergeable(o.page) }, needs: unix.MADV_MERGEABLE, want: [4]string{
		"kept ok - same", "kept ok - same", "kept ok - same", "kept ok - same"}},
	{op: "unmergeable", do: func(o *observed) error { return errors.Join(o.mem.Mergeable(o.page), o.mem.Unmergeable(o.page)) }, needs: unix.MADV_MERGEABLE, want: [4]string{
		"kept ok - same", "kept ok - same", "kept ok - same", "kept ok - same"}},
	{op: "guard", do: func(o *observed) error { return o.mem.Guard(o.page) }, needs: unix.MADV_GUARD_INSTALL, want: [4]string{
		"exit exit discarded cut", "exit exit - cut", "exit exit - cut", "exit exit discarded cut"}},
	{op: "guard, unguard", do: func(o *observed) error { return errors.Join(o.mem.Guard(o.page), o.mem.Unguard(o.page)) }, needs: unix.MADV_GUARD_INSTALL, want: [4]string{
		"zero ok discarded anew", "kept ok dirty anew", "kept ok dirty anew", "file ok dirty+discarded anew"}},
	{op: "fork", last: true, do: func(o *observed) (err error) { o.child, err = o.mem.Fork(); return err }, want: [4]string{
		"kept ok - same", "kept ok - same", "kept ok - same", "kept ok - same"}},
}

// column is where observations has what is observed on a backing.
func column(b mm.Backing) int {
	switch b {
	case mm.File:
		return int(mm.Memfd)
	case mm.FilePrivate:
		return int(mm.MemfdPrivate)
	}
	return int(b)
}

// TestObserve has a guest store to a page, carries an operation out on it, and compares
// what the guest, the machine's own threads, the dirty log and the slots make of it with
// the table above. It prints what it has seen as a table.
func TestObserve(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "operation\tbacking\tguest loads\tguest stores\tdirty log\tslots\n")
	for backing := mm.Anonymous; backing <= mm.FilePrivate; backing++ {
		var o *observed
		for _, tt := range observations {
			t.Run(fmt.Sprintf("%v/%s", backing, strings.ReplaceAll(tt.op, ", ", "+")), func(sub *testing.T) {
				if o == nil {
					o = newObserved(t, backing)
				}
				if tt.needs != 0 {
					o.needAdvice(sub, tt.needs)
				}
				got := o.observe(sub, tt.do)
				fmt.Fprintf(w, "%s\t%v\t%s\n", tt.op, backing, strings.ReplaceAll(got, " ", "\t"))
				want := strings.Fields(tt.want[column(backing)])
				loads := strings.Split(want[0], "|")
				if fields := strings.Fields(got); !slices.Contains(loads, fields[0]) || !slices.Equal(fields[1:], want[1:]) {
					sub.Errorf("observed is %q, want %q", got, strings.Join(want, " "))
				}
				if tt.last || strings.Contains(got, "exit") {
					o.close(sub)
					o = nil
				}
			})
		}
		if o != nil {
			o.close(t)
		}
	}
	w.Flush()
	t.Logf("\n%s", &table)
}

// needAdvice skips the test if the kernel does not take the advice.
func (o *observed) needAdvice(t *testing.T, advice int) {
	t.Helper()
	r := o.Spare().Range // a private reservation, which suits each kind
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), uintptr(advice)); errno != 0 {
		gvmtest.Lack(t, gvmtest.Advice, fmt.Errorf("advice %d: %w", advice, errno))
	}
	if advice == unix.MADV_GUARD_INSTALL {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(r.Start), uintptr(r.Bytes()), unix.MADV_GUARD_REMOVE); errno != 0 {
			t.Fatal(errno)
		}
	}
}

// observe carries an operation out under the guest, and returns what is observed of it.
func (o *observed) observe(t *testing.T, do func(*observed) error) string {
	t.Helper()
	ctx := testContext(t)
	o.next(ctx, t)
	seen, shown := o.config.Log.Len(), o.shown()

	switch err := do(o); {
	case errors.Is(err, unix.EINVAL):
		if v, err := o.guest.Load(ctx, o.gpa); v != wordStored || err != nil || o.slotsChanged(seen) || o.harvested(ctx, t) != "-" {
			t.Errorf("after a refusal the guest loads %#x, %v, or slots or the dirty log have changed", v, err)
		}
		return "refused"
	case errors.Is(err, unix.EOPNOTSUPP):
		t.Skipf("the file system of this test cannot do it: %v", err)
	case err != nil:
		t.Fatal(err)
	}

	slots := "same"
	switch s, ok := o.Slots().Lookup(o.gpa.GFN()); {
	case !ok:
		slots = "cut"
	case s.Access&addr.Write == 0:
		slots = "read-only"
	case o.shown() != shown:
		slots = "moved"
	case o.slotsChanged(seen):
		slots = "anew"
	}
	dirty := o.harvested(ctx, t)

	own, ownErr := o.Load64(o.gpa)
	v, err := o.guest.Load(ctx, o.gpa)
	if err != nil {
		o.mustNameAddress(t, addr.Read)
		if !errors.Is(ownErr, unix.EFAULT) {
			t.Errorf("the guest has no memory there, and the machine loads %#x, %v; want EFAULT", own, ownErr)
		}
		return fmt.Sprintf("exit exit %s %s", dirty, slots)
	}
	if own != v || ownErr != nil {
		t.Errorf("the guest loads %#x, and the machine %#x, %v", v, own, ownErr)
	}
	loads, ok := wordNames[v]
	if !ok {
		loads = fmt.Sprintf("%#x", v)
	}

	store := "ok"
	if err := o.guest.Store(ctx, o.gpa, wordAgain); err != nil {
		o.mustNameAddress(t, addr.Write)
		store = "exit"
	} else if v, err := o.guest.Load(ctx, o.gpa); v != wordAgain || err != nil || o.mustLoad(t, o.gpa) != wordAgain {
		t.Errorf("the guest stores %#x and loads %#x, %v; the machine loads %#x", uint64(wordAgain), v, err, o.mustLoad(t, o.gpa))
	}
	o.checkChild(t)
	return fmt.Sprintf("%s %s %s %s", loads, store, dirty, slots)
}

// shown returns the host address that the page is shown from, or 0.
func (o *observed) shown() addr.HVA {
	hva, _ := o.Slots().HVA(o.gpa)
	return hva
}

// slotsChanged reports whether a slot has been made or taken away after event seq.
func (o *observed) slotsChanged(seq uint64) bool {
	events, _ := o.config.Log.Since(seq)
	return slices.ContainsFunc(events, func(e trace.Event) bool { return e.Kind == trace.SlotCreate || e.Kind == trace.SlotDelete })
}

// harvested takes what the dirty log has, and returns what it says of the page.
func (o *observed) harvested(ctx context.Context, t *testing.T) string {
	t.Helper()
	h, err := o.Harvest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Commit(); err != nil {
			t.Error(err)
		}
	}()
	gfn := o.gpa.GFN()
	var says []string
	if h.Dirty().Contains(gfn) {
		says = append(says, "dirty")
	}
	if h.Discarded().Contains(gfn) {
		says = append(says, "discarded")
	}
	if says == nil {
		return "-"
	}
	return strings.Join(says, "+")
}

// mustNameAddress fails the test unless the run has ended because the guest used the page.
func (o *observed) mustNameAddress(t *testing.T, access addr.Access) {
	t.Helper()
	_, err := o.Wait()
	var exit *ExitError
	if !errors.As(err, &exit) || exit.GPA != o.gpa || exit.Access&access == 0 {
		t.Errorf("the run has ended with %v; want an access of %v to %v", err, access, o.gpa)
	}
}

// checkChild compares what a child has of the page, if there is one, with what it was at
// the fork, or for shared memory, what it is.
func (o *observed) checkChild(t *testing.T) {
	t.Helper()
	if o.child == nil {
		return
	}
	want := uint64(wordAgain)
	switch o.RAM().Backing {
	case mm.Anonymous, mm.MemfdPrivate, mm.FilePrivate:
		want = wordStored
	}
	var b [8]byte
	if err := o.child.ReadAt(b[:], o.page.Start); err != nil || binary.LittleEndian.Uint64(b[:]) != want {
		t.Errorf("the child has %#x, %v; want %#x", binary.LittleEndian.Uint64(b[:]), err, want)
	}
	code := o.boot.Range.Start + addr.HVA(guests.Image)
	if err := o.child.ReadAt(b[:], code); err != nil || binary.LittleEndian.Uint64(b[:]) != o.mustLoad(t, guests.Image) {
		t.Errorf("the child has %#x, %v where the guest's code is", binary.LittleEndian.Uint64(b[:]), err)
	}
}

// TestFileAndBackingGoTogether: a file without a backing that maps it is a mistake, and so
// is the backing without a file.
func TestFileAndBackingGoTogether(t *testing.T) {
	for _, c := range []Config{{Backing: mm.File}, {Backing: mm.FilePrivate}, {Backing: mm.Memfd, File: os.Stdin}, {File: os.Stdin}} {
		c.RAM = addr.PageSize
		if _, err := New(c); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "file") {
			t.Errorf("New with backing %v and file %v returned %v, want ErrConfig", c.Backing, c.File != nil, err)
		}
	}
}
