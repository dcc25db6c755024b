package kvm_test

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/internal/gvmtest"
	"github.com/secondmmu/gvm/kvm"
)

// A complete machine: one page of memory, one vCPU in real mode, and a guest
// that asks a device for a number, doubles it and prints it on a port.
func Example() {
	code := []byte{
		0xa0, 0x00, 0x80, // mov 0x8000, %al: the device
		0x00, 0xc0, // add %al, %al
		0xe6, 0x80, // out %al, $0x80
		0xf4, // hlt
	}

	// Guest memory is mapped, never of the Go heap, and stays until the VM is gone.
	ram, err := unix.Mmap(-1, 0, addr.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		log.Fatal(err)
	}
	defer unix.Munmap(ram)
	copy(ram, code)

	sys, err := kvm.Open()
	if err != nil {
		log.Fatal(err)
	}
	defer sys.Close()
	vm, err := sys.CreateVM()
	if err != nil {
		log.Fatal(err)
	}
	defer vm.Close()
	hva := addr.HVA(uintptr(unsafe.Pointer(unsafe.SliceData(ram))))
	const start = addr.GPA(0x1000)
	if err := vm.SetMemoryRegion(kvm.MemoryRegion{Slot: 0, GPA: start, Size: addr.PageSize, HVA: hva}); err != nil {
		log.Fatal(err)
	}

	runtime.LockOSThread() // a vCPU belongs to a thread
	defer runtime.UnlockOSThread()
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		log.Fatal(err)
	}
	defer vcpu.Close()
	sregs, err := vcpu.Sregs()
	if err != nil {
		log.Fatal(err)
	}
	sregs.CS.Base, sregs.CS.Selector = 0, 0
	if err := vcpu.SetSregs(sregs); err != nil {
		log.Fatal(err)
	}
	if err := vcpu.SetRegs(kvm.Regs{Rip: uint64(start), Rflags: 2}); err != nil {
		log.Fatal(err)
	}

	for {
		exit, err := vcpu.Run()
		if errors.Is(err, unix.EINTR) {
			continue // a signal of the Go runtime
		}
		if err != nil {
			log.Fatal(err)
		}
		switch e := exit.(type) {
		case *kvm.MMIOExit:
			if !e.Write {
				e.Data[0] = 21
			}
		case *kvm.IOExit:
			fmt.Printf("port 0x%x: %d\n", e.Port, e.Data[0])
		case *kvm.HLTExit:
			return
		default:
			log.Fatalf("unexpected: %v", e)
		}
	}
}

// TestExample runs the machine of the example where there is a KVM to run it.
func TestExample(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	stdout := os.Stdout
	os.Stdout = w
	func() {
		defer func() { os.Stdout = stdout }()
		Example()
	}()
	w.Close()
	got, err := io.ReadAll(r)
	if want := "port 0x80: 42\n"; err != nil || string(got) != want {
		t.Errorf("the example prints %q, %v; want %q", got, err, want)
	}
}
