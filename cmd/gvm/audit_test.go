package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestAudit(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	r := gvm(t.Context(), "", "audit", "--duration", "1s", "--seed", "5")
	t.Log("\n" + r.stdout)
	if r.status != 0 || r.stderr != "" || !strings.HasPrefix(r.stdout, "VIEW") || !strings.Contains(r.stdout, "seed 5: ") {
		t.Errorf("status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}

	r = gvm(t.Context(), "", "audit", "--ops", "1", "--duration", "0", "--json")
	lines := strings.SplitAfter(strings.TrimSuffix(r.stdout, "\n"), "\n")
	if r.status != 0 || r.stderr != "" || len(lines) != 2 {
		t.Fatalf("status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}
	var round auditRound
	var result auditResult
	for i, to := range []any{&round, &result} {
		d := json.NewDecoder(strings.NewReader(lines[i]))
		d.DisallowUnknownFields()
		if err := d.Decode(to); err != nil {
			t.Fatalf("line %d: %v", i, err)
		}
	}
	if round.Kind != "round" || result.Kind != "result" || round.Ops == 0 || result.Ops != round.Ops || result.Rounds != 1 || result.Seed == 0 {
		t.Errorf("the round is %+v, the result %+v", round, result)
	}
}

func TestAuditUsage(t *testing.T) {
	for line, want := range map[string]string{
		"--duration 0":   "it would never end",
		"--vcpus 0":      "0 vCPUs",
		"--round -1":     "round -1",
		"--duration -1s": "-1s",
		"all":            `takes no argument "all"`,
	} {
		if r := gvm(t.Context(), "", append([]string{"audit"}, strings.Fields(line)...)...); r.status != statusUsage || !strings.Contains(r.stderr, want) {
			t.Errorf("gvm audit %s: status %d, standard error %q; want %q", line, r.status, r.stderr, want)
		}
	}
}
