// Package kvm is the KVM API of Linux on x86-64 as Go types: one type for each
// kind of descriptor, one method for each request, and exits as decoded values.
// It holds no policy: nothing is probed, defaulted or kept in step on the
// caller's behalf. What it does see to is that the kernel writes to no memory but
// what it was given.
//
// A [System] is /dev/kvm. It makes a [VM], which is memory slots and interrupt
// controllers; that makes a [VCPU], which runs the guest until it has something
// to say:
//
//	sys, err := kvm.Open()
//	vm, err := sys.CreateVM()
//	err = vm.SetMemoryRegion(kvm.MemoryRegion{Slot: 0, GPA: 0, Size: n, HVA: hva})
//	vcpu, err := vm.CreateVCPU(0)
//	exit, err := vcpu.Run()
//
// The package example is a machine that is complete.
//
// # Lifetime
//
// Each descriptor is closed by its owner and by nothing else. Close never
// blocks and interrupts nobody: calls that are under way finish, and the last
// of them gives the descriptor back. A call that begins after Close, a second
// Close included, does nothing and reports an error that errors.Is finds to be
// [os.ErrClosed]. The kernel keeps what it still needs, so a System may be
// closed before its VMs and a VM before its vCPUs; the guest's memory has to
// stay mapped until the VM and all its vCPUs are closed, or its slot is deleted.
//
// # Threads
//
// Methods of a System, a VM or a [Stats] may be called from any goroutine. Those
// of a VCPU belong to one goroutine at a time, which is locked to its thread
// ([runtime.LockOSThread]): KVM binds a vCPU's state to the thread that uses it,
// and a signal that is to interrupt [VCPU.Run] is sent to a thread. The
// exceptions are [VCPU.SetImmediateExit], [VCPU.DirtyRing] and [VCPU.Close], which
// may be called from anywhere at any time. A [DirtyRing] belongs to one goroutine
// at a time, and to no thread.
//
// # Dirty logging
//
// KVM logs the pages that a guest writes in slots that have MemLogDirtyPages, in
// one of three ways, which are chosen for a VM as a whole:
//
//	classic    GetDirtyLog                            takes and clears a slot's bitmap
//	manual     GetDirtyLog, ClearDirtyLog             read, and clear in parts
//	rings      DirtyRing.Harvest, ResetDirtyRings     page by page, for each vCPU
//
// Each has an order of calls that loses no write, to which its methods hold their
// callers: the pages are copied last. See [VM.GetDirtyLog] and [DirtyRing].
//
// # Errors
//
// What the kernel refuses is an [*Error], which names the request, what it was
// about, and the errno. No request is repeated for EINTR except KVM_CREATE_VM:
// EINTR is how KVM_RUN returns when a vCPU is kicked, and the Go runtime's own
// preemption signal is such a kick.
package kvm
