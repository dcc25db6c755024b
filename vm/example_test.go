package vm_test

import (
	"context"
	"log"
	"os"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/boot"
	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/vm"
)

// A guest counts in its pages while the host takes one of them away and gives
// it back. The guest's accesses wait meanwhile, and none is lost.
func Example() {
	m, err := vm.New(vm.Config{RAM: 16 << 20, Touch: vm.Wait, Console: os.Stdout})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()

	guest, err := guests.Lookup("counter")
	if err != nil {
		log.Fatal(err)
	}
	if err := m.Boot(guest, guests.Args{"pages": 8, "rounds": 1_000_000}); err != nil {
		log.Fatal(err)
	}
	if err := m.Start(context.Background()); err != nil {
		log.Fatal(err)
	}

	page := addr.HVAs(m.RAM().Range.Start, addr.PageSize)
	if err := m.Memory().Unmap(page); err != nil { // the page's slot is cut, then its mapping goes
		log.Fatal(err)
	}
	if err := m.Memory().Map(page); err != nil { // a new page, and one slot for all of RAM again
		log.Fatal(err)
	}
	if _, err := m.Wait(); err != nil {
		log.Fatal(err)
	}
}

// A kernel of somebody else's runs with its console on standard output.
func ExampleMachine_BootPlan() {
	kernel, err := os.ReadFile("vmlinuz")
	if err != nil {
		log.Fatal(err)
	}
	const ram, vcpus = 256 << 20, 2
	plan, err := boot.Load(kernel, boot.Options{Layout: boot.Layout{RAM: ram}, VCPUs: vcpus, CmdLine: "console=ttyS0"})
	if err != nil {
		log.Fatal(err) // it names the field of the file
	}
	m, err := vm.New(vm.Config{Board: vm.PC, RAM: ram, VCPUs: vcpus, Console: os.Stdout})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	if err := m.BootPlan(plan); err != nil {
		log.Fatal(err)
	}
	status, err := m.Run(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("the kernel has turned the machine off, with status %d", status)
}
