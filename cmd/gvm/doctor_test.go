package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/doctor"
)

// TestDoctor examines the machine that the test runs on.
func TestDoctor(t *testing.T) {
	text, doc := gvm(t.Context(), "", "doctor"), gvm(t.Context(), "", "doctor", "--json")
	var r doctor.Report
	d := json.NewDecoder(strings.NewReader(doc.stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil || d.More() {
		t.Fatalf("%v: standard output is not one document:\n%s", err, doc.stdout)
	}
	want := 0
	for _, c := range r.Checks {
		if !strings.Contains(text.stdout, "\n"+c.Name+" ") {
			t.Errorf("check %s is not in the text:\n%s", c.Name, text.stdout)
		}
		if c.Required && c.Status == doctor.Missing {
			want = statusLack
		}
	}
	if text.status != want || doc.status != want {
		t.Errorf("the statuses are %d and %d, want %d", text.status, doc.status, want)
	}
}

func TestDiagnose(t *testing.T) {
	optional := doctor.Check{Name: "optional", Status: doctor.Missing, Detail: "no such thing", Remedy: "get one"}
	required := doctor.Check{Name: "required", Status: doctor.Missing, Required: true, Detail: "no such thing", Remedy: "load it"}
	limited := doctor.Check{Name: "limited", Status: doctor.Limited, Required: true, Detail: "old", Remedy: "update it"}
	for name, tt := range map[string]struct {
		checks []doctor.Check
		remedy string // empty: nothing that is required is missing
	}{
		"nothing examined":     {nil, ""},
		"optional and missing": {[]doctor.Check{optional}, ""},
		"required and limited": {[]doctor.Check{limited}, ""},
		"required and missing": {[]doctor.Check{optional, limited, required}, "load it"},
	} {
		for _, asJSON := range []bool{false, true} {
			var out bytes.Buffer
			err := diagnose(&out, &doctor.Report{Checks: tt.checks}, asJSON)
			lack, ok := errors.AsType[*lackError](err)
			if ok != (tt.remedy != "") || ok && lack.remedy != tt.remedy || !ok && err != nil {
				t.Errorf("%s: the error is %#v, want remedy %q", name, err, tt.remedy)
			}
			if json.Valid(out.Bytes()) != asJSON {
				t.Errorf("%s: JSON %v gives\n%s", name, asJSON, &out)
			}
		}
	}
}
