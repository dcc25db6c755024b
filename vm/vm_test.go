package vm

import (
	"bytes"
	"context"
	"testing"

	"github.com/secondmmu/gvm/guests"
	"github.com/secondmmu/gvm/internal/gvmtest"
)

func TestMain(m *testing.M) { gvmtest.Main(m) }

func TestHello(t *testing.T) {
	gvmtest.Need(t, gvmtest.KVM)
	var out bytes.Buffer
	m, err := New(Config{RAM: 1 << 20, Console: &out})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	g, _ := guests.Lookup("hello")
	if err := m.Boot(g, guests.Args{"status": 7}); err != nil {
		t.Fatal(err)
	}
	status, err := m.Run(context.Background())
	t.Log(out.String(), status, err)
}
