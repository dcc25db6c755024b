// Package vm is a minimal virtual machine whose memory slots follow the host's
// mappings.
//
// A [Machine] has RAM from package mm, a tracker from package shadow that
// subscribes to the notifier of that memory, and vCPUs from package kvm, each on
// an OS thread of its own. Whoever holds the Machine may change the mappings of
// its RAM at any time, through [Machine.Memory]; what the guest makes of it is
// decided by its [Touch] policy.
//
// # Lock order
//
//	gate.mu, in Pause        waits, as a condition, for accesses that are in progress
//	the address space's mapping lock
//	    the tracker's locks  see package shadow
//	        gate.mu          waits, as a condition, for vCPUs to leave the guest
//	Machine.mu               a leaf
//	pc.mu
//	    uart.mu              a leaf, but for KVM's interrupt line
//	devices.mu               a leaf, but for the console's Write
//	rings.mu, idle.mu        leaves, inside the tracker's locks or the mapping lock
//
// A vCPU thread holds none of them while it is in the guest. While it handles an
// exit it may take any of them: it is outside the gate then.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/dirty"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/kvm"
	"github.com/secondmmu/gvm/mm"
	"github.com/secondmmu/gvm/shadow"
	"github.com/secondmmu/gvm/trace"
)

// Touch says what happens when a guest uses RAM that the host has taken away, or
// writes to RAM that the host has made read-only.
type Touch uint8

const (
	// Stop ends the run with an [ExitError].
	Stop Touch = iota

	// Float is an empty bus: reads give all ones, writes are dropped. It takes slots
	// that are precise. While they are coarse, see MaxSlots, it is Stop.
	Float

	// Wait keeps the vCPU out of the guest until the host allows the access
	// again, and completes it then. Where no slot allows the access, a read and a
	// write of one instruction are completed separately: an atomic instruction is
	// not atomic across them. Where a slot does, as with the policy Lazy, the
	// instruction is run again.
	Wait
)

func (t Touch) String() string {
	switch t {
	case Stop:
		return "stop"
	case Float:
		return "float"
	case Wait:
		return "wait"
	}
	return fmt.Sprintf("touch(%d)", uint8(t))
}

// Config describes a machine. The zero value of a field means what its comment
// says.
type Config struct {
	RAM        uint64     // bytes of RAM whose mappings may change; a multiple of the page size; 0 is an error
	VCPUs      int        // 0: one
	Backing    mm.Backing // of the RAM
	File       *os.File   // what Backing mm.File or mm.FilePrivate maps, from its start: see mm.RegionConfig.File
	Spare      uint64     // bytes of host addresses, not mapped, that RAM can be moved to; 0: none
	Overcommit bool       // allow more RAM than the host has memory and swap
	Board      Board
	Touch      Touch
	Policy     shadow.Policy // how slots follow the mappings; Lazy does not go with Float
	Ring0      bool          // start guests at CPL 0, which some hosts emulate, instead of 3

	// MaxSlots is how many memory slots there are at most: 4 or more. If what is mapped is
	// in more pieces than that, the slots are coarse, and precise again once half as
	// many are enough: see [shadow.Tracker.Coarse]. 0, or more than KVM has: as many as
	// KVM has.
	MaxSlots int

	// Watch has changes of the mappings followed that code makes which does not know the
	// machine: see [mm.EventWatch] and [mm.TraceWatch]. WatchEvents does not go with the
	// dirty source WriteProtect, nor does WatchTrace, which would take every page that is
	// protected for one that was changed.
	Watch Watch

	// OnStray is told of each of those changes, as mm.EventConfig.Report is: by each of the
	// two one at a time. nil: they are logged.
	OnStray func(mm.Stray)

	Dirty       DirtySource // who tells what the guest writes, while LogDirty is on
	RingEntries uint32      // of each vCPU's ring, with Ring: a power of two, 256 to 65536 on most hosts; 0: 4096

	// Disconnected leaves the tracker out of the notifier's chain, so that the
	// slots follow nothing: to show, and to test for, what goes wrong then.
	Disconnected bool

	// Console is given what the guest prints: on its debug ports, and on its UART if Serial
	// is nil. Writes come from vCPU threads, one at a time. nil: it is dropped.
	Console io.Writer

	// Serial is given what the guest sends on its UART, as Console is the rest. nil: that
	// is given it too.
	Serial io.Writer

	// OnMark is called on the vCPU's thread when the guest reaches a mark. It
	// may change mappings and must not wait for the machine. With an error the
	// run ends. nil: marks do nothing.
	OnMark func(vcpu int, mark uint32) error

	// OnTouch is called on the vCPU's thread when the guest uses an address that is not
	// there, before the vCPU waits, goes on or stops; and each time that a vCPU that waits has
	// looked, and the memory is not there yet, or has gone again. It must not wait for the
	// machine, and must not change mappings. nil: it is not told.
	OnTouch func(vcpu int, gpa addr.GPA)

	// Log records operations and what follows from them, exits and touches. nil:
	// nothing is recorded.
	Log *trace.Log
}

// Machine is a virtual machine. Its methods may be called from any goroutine.
type Machine struct {
	config  Config
	vm      *kvm.VM
	memory  *mm.Memory
	tracker *shadow.Tracker
	boot    *mm.Region
	ram     *mm.Region
	spare   *mm.Region // or nil
	vcpus   []*vcpu
	gate    gate
	devices devices
	source  source
	idle    idle
	watches []io.Closer
	rings   *rings // source, if that is Ring; otherwise nil

	mu     sync.Mutex         // protects what follows
	cancel context.CancelFunc // ends the run in progress; nil: none is
	done   chan struct{}      // closed when the run in progress has ended
	err    error              // how the run failed first
	off    bool               // the guest has turned the machine off...
	status int                // ...with this status
	closed bool
	booted bool

	shownEnd addr.GPA // behind what Show has shown; protected by mu
}

// New makes a machine with RAM and vCPUs, and nothing in it: see Boot. The
// caller closes it.
func New(c Config) (_ *Machine, err error) {
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.Dirty == Ring && c.RingEntries == 0 {
		c.RingEntries = ringEntries
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("make a machine: %w", err)
	}
	m := &Machine{config: c}
	m.gate.init()
	m.devices.init(m)
	defer func() {
		if err != nil {
			err = fmt.Errorf("make a machine: %w", errors.Join(err, m.free()))
		}
	}()

	sys, err := kvm.Open()
	if err != nil {
		return nil, err
	}
	defer sys.Close() // the VM stays
	if err := sys.Require(Capabilities()...); err != nil {
		return nil, err
	}
	if m.vm, err = sys.CreateVM(); err != nil {
		return nil, err
	}
	if err := exitOnEmulationFailure(m.vm); err != nil {
		return nil, err
	}
	if err := m.addBoard(sys); err != nil {
		return nil, err
	}
	source, err := m.openSource()
	if err != nil {
		return nil, fmt.Errorf("dirty source %v: %w", c.Dirty, err)
	}
	m.source = source
	slots, err := m.vm.CheckExtension(kvm.CapNrMemslots)
	if err != nil {
		return nil, err
	}
	if c.MaxSlots != 0 {
		slots = min(slots, c.MaxSlots)
	}
	m.memory = mm.New(c.Log)
	m.tracker = shadow.NewTracker(m.memory, (*backend)(m), uint32(slots), c.Log)
	m.tracker.SetPolicy(c.Policy)
	if !c.Disconnected {
		if err := m.memory.AddressSpace().Register(context.Background(), m.tracker); err != nil {
			return nil, err
		}
	}
	if err := m.addMemory(); err != nil {
		return nil, err
	}
	if err := m.watch(); err != nil {
		return nil, err
	}
	cpuid, err := sys.SupportedCPUID()
	if err != nil {
		return nil, err
	}
	for id := range c.VCPUs {
		cpu, err := m.vm.CreateVCPU(id)
		if err != nil {
			return nil, err
		}
		m.vcpus = append(m.vcpus, &vcpu{m: m, id: id, cpu: cpu})
		answers := cpuid
		if c.Board != Bare {
			deadline, err := sys.CheckExtension(kvm.CapTSCDeadlineTimer)
			if err != nil {
				return nil, err
			}
			answers = boardCPUID(cpuid, id, c.VCPUs, c.Board == PC, deadline != 0)
		}
		if err := cpu.SetCPUID2(answers); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// Capabilities returns what New requires of KVM. CapSyncMMU is KVM's word that
// the guest follows changes to the host's mappings: everything here rests on it.
func Capabilities() []kvm.Cap {
	return []kvm.Cap{kvm.CapUserMemory, kvm.CapSyncMMU, kvm.CapReadonlyMem, kvm.CapImmediateExit, kvm.CapExtCPUID, kvm.CapNrMemslots}
}

// ErrConfig is what errors.Is finds in the error of New for a Config that could
// work on no machine.
var ErrConfig = errors.New("the configuration is not valid")

// minSlots is the least MaxSlots: RAM and what is below it each have a slot, and for the
// slots to become precise again half have to be enough.
const minSlots = 4

// check reports what is wrong with c on every machine, or on this one.
func (c *Config) check() error {
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", ErrConfig, fmt.Errorf(format, args...))
	}
	if c.Board != Bare {
		if err := c.checkBoard(); err != nil {
			return invalid("%w", err)
		}
	}
	switch {
	case c.RAM == 0:
		return invalid("it has no RAM")
	case c.RAM%addr.PageSize != 0:
		return invalid("%d bytes of RAM are not a multiple of the page size, %d", c.RAM, addr.PageSize)
	case c.Board == Bare && c.RAM > guests.MaxRAM:
		return invalid("%d bytes of RAM are more than the %d that a guest's page tables can map", c.RAM, uint64(guests.MaxRAM))
	case c.Board == Bare && (c.VCPUs < 1 || c.VCPUs > guests.MaxVCPUs):
		return invalid("%d vCPUs are not in 1 to %d", c.VCPUs, guests.MaxVCPUs)
	case c.Spare%addr.PageSize != 0:
		return invalid("%d spare bytes are not a multiple of the page size, %d", c.Spare, addr.PageSize)
	case c.Backing > mm.FilePrivate:
		return invalid("there is no %v", c.Backing)
	case (c.File != nil) != (c.Backing == mm.File || c.Backing == mm.FilePrivate):
		return invalid("a file is needed for RAM of backing %v or %v, and no other", mm.File, mm.FilePrivate)
	case c.Touch > Wait:
		return invalid("there is no %v", c.Touch)
	case c.Policy > shadow.Lazy:
		return invalid("there is no %v", c.Policy)
	case c.Policy == shadow.Lazy && c.Touch == Float:
		return invalid("touches cannot float with slots that are lazy: KVM does not complete an access that a slot allows")
	case c.MaxSlots != 0 && c.MaxSlots < minSlots:
		return invalid("%d memory slots at most: it takes %d", c.MaxSlots, minSlots)
	case int(c.Dirty) >= len(sources):
		return invalid("there is no %v", c.Dirty)
	case c.Watch&^(WatchEvents|WatchTrace) != 0:
		return invalid("there is no %v", c.Watch)
	case c.Watch != 0 && c.Dirty == WriteProtect:
		return invalid("the memory cannot be watched, by %v, while its pages are write-protected for the dirty source %v", c.Watch, c.Dirty)
	case c.Dirty != Ring && c.RingEntries != 0:
		return invalid("%d entries of a ring, and the dirty source is %v", c.RingEntries, c.Dirty)
	case c.RingEntries&(c.RingEntries-1) != 0:
		return invalid("%d entries of a ring are not a power of two", c.RingEntries)
	}
	if c.Overcommit {
		return nil
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("sysinfo: %w", err)
	}
	if has := (info.Totalram + info.Totalswap) * uint64(info.Unit); c.RAM > has {
		return fmt.Errorf("%d bytes of RAM are more than the %d of memory and swap of this host: %w", c.RAM, has, unix.ENOMEM)
	}
	return nil
}

// addMemory makes the regions and promises them to the guest.
func (m *Machine) addMemory() (err error) {
	below := mm.RegionConfig{Name: "boot", Size: guests.BootSize, Pinned: true}
	if m.config.Board != Bare {
		below.Name, below.Size = "firmware", boot.FirmwareSize
	}
	if m.boot, err = m.memory.NewRegion(below); err != nil {
		return err
	}
	if m.ram, err = m.memory.NewRegion(mm.RegionConfig{Name: "ram", Size: m.config.RAM, Backing: m.config.Backing, File: m.config.File}); err != nil {
		if m.config.File != nil && !errors.Is(err, unix.ENOMEM) {
			err = fmt.Errorf("%w: %w", ErrConfig, err)
		}
		return err
	}
	if m.config.Spare != 0 {
		backing := m.config.Backing
		if m.config.File != nil {
			backing = mm.Anonymous // what is moved there is still the file's
		}
		if m.spare, err = m.memory.NewRegion(mm.RegionConfig{Name: "spare", Size: m.config.Spare, Backing: backing, Reserved: true}); err != nil {
			return err
		}
	}
	as := m.memory.AddressSpace()
	as.RLock()
	defer as.RUnlock()
	for _, w := range m.windows() {
		if err := m.tracker.AddWindow(w); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the run in progress and frees everything. A second Close does
// nothing.
func (m *Machine) Close() error {
	m.mu.Lock()
	closed := m.closed
	m.closed = true
	if m.cancel != nil {
		m.cancel()
	}
	done := m.done
	m.mu.Unlock()
	if closed {
		return nil
	}
	m.devices.uart.close()
	if done != nil {
		<-done
	}
	return m.free()
}

// free gives everything back. The slots go first, with the tracker's release,
// then the memory that they were made of.
func (m *Machine) free() error {
	var errs []error
	for _, v := range m.vcpus {
		errs = append(errs, v.cpu.Close())
	}
	for _, w := range m.watches {
		errs = append(errs, w.Close())
	}
	if m.memory != nil {
		errs = append(errs, m.memory.Close())
	}
	if m.source != nil {
		errs = append(errs, m.source.close())
	}
	errs = append(errs, m.idle.close())
	if m.vm != nil {
		errs = append(errs, m.vm.Close())
	}
	return errors.Join(errs...)
}

// Memory returns the host memory of the machine, whose mappings may be changed.
func (m *Machine) Memory() *mm.Memory { return m.memory }

// RAM returns the region that the guest's RAM is mapped in at first: see RAMAddr for where
// its bytes are in guest memory.
func (m *Machine) RAM() *mm.Region { return m.ram }

// Spare returns the region that Config.Spare asked for, or nil.
func (m *Machine) Spare() *mm.Region { return m.spare }

// Slots returns the set of memory slots that KVM has at the moment.
func (m *Machine) Slots() *shadow.Slots { return m.tracker.Slots() }

// SerialInput returns the writer for what the guest's UART receives. What the
// guest has not read yet is kept, up to 64 KiB; a Write of more blocks until the
// guest has read enough, or fails with os.ErrClosed once the machine is closed.
func (m *Machine) SerialInput() io.Writer { return &m.devices.uart }

// Pause returns when no vCPU executes guest code, and none will until Resume. Nor
// will an access be completed that a guest has begun and the machine carries out
// for it, as Wait has it do: no guest reads or writes its memory meanwhile, by
// itself or by proxy. Other exits may still be handled: something is printed,
// OnMark is called. Where memory is missing, a guest may be stopped between the
// read and the write of one instruction.
//
// Pauses nest. Pause is called neither from OnMark nor by a subscriber of the
// address space, and not with the mapping lock held.
func (m *Machine) Pause() {
	m.gate.Pause()
	m.config.Log.Record(trace.Event{Kind: trace.Hold, Name: "pause"})
}

// Resume ends one Pause.
func (m *Machine) Resume() {
	m.config.Log.Record(trace.Event{Kind: trace.Release, Name: "pause"})
	m.gate.Resume()
}

// Pauses returns how long vCPUs have been kept out of the guest so far.
func (m *Machine) Pauses() PauseStats { return m.gate.stats() }

// Table returns the table through which the host's side uses the guest's memory: see
// there for accesses of other kinds, and for the log of what was written.
func (m *Machine) Table() *shadow.Table { return m.tracker.Table() }

// ReadGuest copies guest memory at gpa to p. It blocks while the mapping changes;
// memory that is not there gives a *shadow.AccessError, and p may have been written
// in part.
func (m *Machine) ReadGuest(gpa addr.GPA, p []byte) error {
	_, err := m.tracker.Table().ReadAt(p, int64(gpa))
	return err
}

// WriteGuest copies p to guest memory at gpa, as ReadGuest does the other way round.
func (m *Machine) WriteGuest(gpa addr.GPA, p []byte) error {
	_, err := m.tracker.Table().WriteAt(p, int64(gpa))
	return err
}

// Load64 reads the 8 bytes at gpa, a multiple of 8, as one atomic access.
func (m *Machine) Load64(gpa addr.GPA) (uint64, error) { return m.tracker.Table().Load64(gpa) }

// Store64 writes the 8 bytes at gpa, a multiple of 8, as one atomic access.
func (m *Machine) Store64(gpa addr.GPA, v uint64) error { return m.tracker.Table().Store64(gpa, v) }

// LogDirty has what the guest writes logged from now on, or no more, by Config.Dirty. Each
// page costs the guest a fault at its first write after each Harvest. What the machine itself
// writes, and what changes of mappings do, is logged always.
func (m *Machine) LogDirty(on bool) error { return m.tracker.LogDirty(on) }

// Harvest takes out of the dirty log which pages of guest memory have changed since it
// was last harvested, and from what: see [shadow.Tracker.Harvest]. Vcpus go on. What
// is written by host address is in it if Config.Dirty sees that.
func (m *Machine) Harvest(ctx context.Context) (*dirty.Harvest, error) { return m.tracker.Harvest(ctx) }

// Result reads a result word of a vCPU's guest; word 0 is its progress.
func (m *Machine) Result(vcpu, word int) (uint64, error) {
	return m.Load64(guests.ResultGPA(vcpu, word))
}

// hva returns the host address that gpa is shown from.
func (m *Machine) hva(gpa addr.GPA) (addr.HVA, error) {
	hva, ok := m.tracker.Slots().HVA(gpa)
	if !ok {
		return 0, fmt.Errorf("%v is not guest RAM: %w", gpa, unix.EFAULT)
	}
	return hva, nil
}

// backend installs the tracker's slots in KVM, behind the gate.
type backend Machine

func (b *backend) Hold()    { b.gate.Hold() }
func (b *backend) Release() { b.gate.Release() }

func (b *backend) CreateSlot(s shadow.Slot) error {
	r := kvm.MemoryRegion{Slot: s.ID, GPA: s.GFN.GPA(), Size: s.NPages << addr.PageShift, HVA: s.HVA}
	if s.Access&addr.Write == 0 {
		r.Flags |= kvm.MemReadonly
	}
	if s.LogDirty {
		r.Flags |= b.source.slotFlags()
	}
	return b.vm.SetMemoryRegion(r)
}

// ChangeSlot is the same request: KVM sees what is different.
func (b *backend) ChangeSlot(from, s shadow.Slot) error {
	if err := b.CreateSlot(s); err != nil || from.LogDirty || !s.LogDirty {
		return err
	}
	return b.source.begin(s)
}

func (b *backend) DeleteSlot(s shadow.Slot) error {
	return b.vm.SetMemoryRegion(kvm.MemoryRegion{Slot: s.ID, GPA: s.GFN.GPA()})
}

func (b *backend) DirtyLog(slots []shadow.Slot, written *dirty.Set) error {
	return b.source.collect(slots, written)
}
