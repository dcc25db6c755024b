package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/demo"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestDemo(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	if r := gvm(t.Context(), "", "demo"); r.status != 0 || r.stderr != "" || !strings.Contains(r.stdout, "munmap") {
		t.Errorf("status %d, standard error %q, standard output\n%s", r.status, r.stderr, r.stdout)
	}

	var report demo.Report
	r := gvm(t.Context(), "", "demo", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		t.Fatal(err)
	}
	if r.status != 0 || r.stderr != "" || !report.OK() {
		t.Errorf("status %d, standard error %q, report %+v", r.status, r.stderr, report)
	}
}

func TestDemoInterrupted(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := gvm(ctx, "", "demo")
	if r.status != statusFailed || !strings.HasPrefix(r.stderr, "gvm: interrupted: ") {
		t.Errorf("status %d, standard error %q; want %d and a message", r.status, r.stderr, statusFailed)
	}
}
