package vm_test

import (
	"context"
	"log"
	"os"

	"github.com/secondmmu/gvm/addr"
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
