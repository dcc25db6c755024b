package hostops_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/secondmmu/gvm/addr"
	"github.com/secondmmu/gvm/hostops"
	"github.com/secondmmu/gvm/mm"
)

// A mistake in a script is an error that says where it is and what was meant.
func ExampleParse() {
	_, err := hostops.Parse("ops.txt", "# A balloon\nevery 5ms  discrad 16..20\n")
	fmt.Println(err)
	var at *hostops.SyntaxError
	if errors.As(err, &at) {
		fmt.Println("line", at.Line, "column", at.Col)
	}
	// Output:
	// ops.txt:2:12: there is no operation "discrad"; did you mean discard?
	// line 2 column 12
}

// A runner carries a script out, knows who took a page, and gives everything back.
func ExampleRunner() {
	memory := mm.New(nil)
	defer memory.Close()
	ram, err := memory.NewRegion(mm.RegionConfig{Name: "ram", Size: 32 * addr.PageSize})
	if err != nil {
		fmt.Println(err)
		return
	}
	script, err := hostops.Parse("ops.txt", `
at 0s   protect 8..24 read
then    unmap 16..20
on fault map it
`)
	if err != nil {
		fmt.Println(err)
		return
	}
	// A machine would say where it shows the pages from, and store through its table.
	hva := func(page uint64) (addr.HVA, bool) { return ram.Range.Start + addr.HVA(page*addr.PageSize), page < 32 }
	runner, err := hostops.NewRunner(hostops.Config{Script: script, Target: hostops.Target{
		Memory: memory, RAM: ram, HVA: hva,
		Store64: func(page, offset, value uint64) error {
			at, _ := hva(page)
			return memory.Store64(at+addr.HVA(offset), value)
		},
		Write: func(page, offset uint64, p []byte) error {
			at, _ := hva(page)
			return memory.WriteAt(p, at+addr.HVA(offset))
		},
	}})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	if err := runner.Step(ctx); err != nil {
		fmt.Println(err)
	}
	runner.Fault(17) // a vCPU has touched the page
	if err := runner.Step(ctx); err != nil {
		fmt.Println(err)
	}
	for _, page := range []uint64{17, 18, 23} {
		if last, ok := runner.Last(page); ok {
			fmt.Println("page", page, "was last changed by", last)
		}
	}
	if err := runner.Restore(ctx); err != nil {
		fmt.Println(err)
	}
	fmt.Println("extents:", len(memory.Extents(ram.Range)))
	// Output:
	// page 17 was last changed by line 4: map 17 (op 3)
	// page 18 was last changed by line 3: unmap 16..20 (op 2)
	// page 23 was last changed by line 2: protect 8..24 read (op 1)
	// extents: 1
}
