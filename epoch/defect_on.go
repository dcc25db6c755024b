//go:build gvm_defects

package epoch

import (
	"fmt"
	"strings"

	"github.com/secondmmu/gvm/vm"
)

// setDefect switches on a defect of the machine; those of the run look at its Config.
func setDefect(m *vm.Machine, name string) error {
	if name == "" || name == CopyBeforeClear || name == NotTransactional || m.SetDefect(name) {
		return nil
	}
	return fmt.Errorf("%w: there is no defect %q, but %s", vm.ErrConfig, name, strings.Join(Defects(), ", "))
}
