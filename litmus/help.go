package litmus

import (
	_ "embed"
	"go/doc/comment"
	"strings"
)

//go:embed doc.go
var docSource string

// Help returns what the package comment says of tests, as text for a terminal.
func Help() string {
	var text strings.Builder
	for line := range strings.Lines(docSource) {
		if line, ok := strings.CutPrefix(line, "//"); ok {
			text.WriteString(strings.TrimPrefix(line, " "))
		}
	}
	var parser comment.Parser
	_, tests, _ := strings.Cut(text.String(), "# A test\n")
	printer := comment.Printer{TextCodePrefix: "    "}
	return string(printer.Text(parser.Parse(tests)))
}
