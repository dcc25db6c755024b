// Package doctext prints a part of a package's comment for a terminal: where the comment
// describes a language, a command's help need not describe it again.
package doctext

import (
	"go/doc/comment"
	"strings"
)

const module = "github.com/secondmmu/gvm/"

// After returns the text of a comment, of which source is the file, that follows a heading.
// Links to packages of the module are printed as their names.
func After(source, heading string) string {
	var text strings.Builder
	for line := range strings.Lines(source) {
		if line, ok := strings.CutPrefix(line, "//"); ok {
			text.WriteString(strings.TrimPrefix(line, " "))
		}
	}
	parser := comment.Parser{
		LookupPackage: func(name string) (path string, ok bool) { return module + name, !strings.Contains(name, ".") },
	}
	_, part, _ := strings.Cut(text.String(), "# "+heading+"\n")
	printer := comment.Printer{TextCodePrefix: "    "}
	return string(printer.Text(parser.Parse(part)))
}
