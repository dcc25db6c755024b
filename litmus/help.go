package litmus

import (
	_ "embed"

	"github.com/secondmmu/gvm/internal/doctext"
)

//go:embed doc.go
var docSource string

// Help returns what the package comment says of tests, as text for a terminal.
func Help() string { return doctext.After(docSource, "A test") }
