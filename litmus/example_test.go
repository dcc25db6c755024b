package litmus_test

import (
	"context"
	"fmt"

	"github.com/secondmmu/gvm/litmus"
)

// A test is a text. What is wrong with one is told with its place.
func ExampleParse() {
	_, err := litmus.Parse("mine.litmus", `litmus mine
page x = 1
guest P0
	r0 = load x
host H0
	discrad x
forbidden P0:r0 == 2
`)
	fmt.Println(err)
	// Output: mine.litmus:6:2: expected a statement of the host, not "discrad"; did you mean discard?
}

// The guest of a test is machine code, which can be looked at.
func ExampleGenerate() {
	t, err := litmus.Lookup("mp")
	if err != nil {
		fmt.Println(err)
		return
	}
	code, err := litmus.Generate(t, t.Instances)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(len(code.Bytes) > 0, len(t.Guests), "vCPUs")
	// Output: true 2 vCPUs
}

// A test is run until it has enough iterations. This takes KVM, so the example is not run.
func ExampleRun() {
	t, err := litmus.Lookup("corr-discard")
	if err != nil {
		fmt.Println(err)
		return
	}
	r, err := litmus.Run(context.Background(), t, litmus.Config{Iterations: 1000, Seed: 1})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(r.Verdict)
}
