//go:build !gvm_defects

package epoch

import (
	"fmt"

	"github.com/secondmmu/gvm/vm"
)

// setDefect refuses every defect.
func setDefect(_ *vm.Machine, name string) error {
	if name != "" {
		return fmt.Errorf("%w: the defect %q, in a build without the tag gvm_defects", vm.ErrConfig, name)
	}
	return nil
}
