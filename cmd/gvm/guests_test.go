package main

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/secondmmu/gvm/guests"
)

func TestGuests(t *testing.T) {
	for name, args := range map[string][]string{
		"guests.txt":  {"guests"},
		"guests.json": {"guests", "--json"},
	} {
		r := gvm(t.Context(), "", args...)
		if r.status != 0 || r.stderr != "" {
			t.Errorf("gvm %v: status %d, standard error %q", args, r.status, r.stderr)
		}
		golden(t, name, r.stdout)
	}
}

func TestGuestsJSON(t *testing.T) {
	var got []guests.Guest
	if err := json.Unmarshal([]byte(gvm(t.Context(), "", "guests", "--json").stdout), &got); err != nil {
		t.Fatal(err)
	}
	for i, want := range guests.All() {
		if want.Params == nil {
			want.Params = []guests.Param{}
		}
		if i >= len(got) || !reflect.DeepEqual(got[i], want) {
			t.Fatalf("guest %d of %d has changed on its way: want %+v", i, len(got), want)
		}
	}
}
