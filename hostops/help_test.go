package hostops

import (
	"strings"
	"testing"
)

// TestHelp: the help has the grammar, and of each operation what it does; and nothing that
// only godoc understands.
func TestHelp(t *testing.T) {
	text := Help()
	if !strings.HasPrefix(text, "A script has one operation a line") || !strings.Contains(text, "    line      = [ when operation ] .\n") {
		t.Errorf("the help is\n%s", text)
	}
	_, what, _ := strings.Cut(text, "What")
	for _, k := range kinds {
		if !strings.Contains(strings.ReplaceAll(what, ",", " "), " "+string(k)+" ") {
			t.Errorf("it does not say what %s does", k)
		}
	}
	for line := range strings.Lines(text) {
		if len(line) > 120 || strings.ContainsAny(line, "\t") || strings.Contains(line, "mm.Memory]") {
			t.Errorf("not for a terminal: %q", line)
		}
	}
}
