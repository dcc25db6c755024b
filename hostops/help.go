package hostops

import (
	_ "embed"

	"github.com/secondmmu/gvm/internal/doctext"
)

//go:embed doc.go
var docSource string

// Help returns what the package comment says of scripts, as text for a terminal.
func Help() string { return doctext.After(docSource, "Scripts") }
