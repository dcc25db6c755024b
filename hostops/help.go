package hostops

import (
	_ "embed"
	"go/doc/comment"
	"strings"
)

//go:embed doc.go
var docSource string

// Help returns what the package comment says of scripts, as text for a terminal.
func Help() string {
	var text strings.Builder
	for line := range strings.Lines(docSource) {
		if line, ok := strings.CutPrefix(line, "//"); ok {
			text.WriteString(strings.TrimPrefix(line, " "))
		}
	}
	parser := comment.Parser{
		LookupPackage: func(name string) (path string, ok bool) { return "github.com/secondmmu/gvm/" + name, name == "mm" },
	}
	_, scripts, _ := strings.Cut(text.String(), "# Scripts\n")
	printer := comment.Printer{TextCodePrefix: "    "}
	return string(printer.Text(parser.Parse(scripts)))
}
