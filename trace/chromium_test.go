package trace

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

var screenshots = flag.String("screenshots", "", "keep pictures of the HTML page in this directory")

// browser is a headless Chromium, which is spoken to through a pipe: requests and
// answers of its DevTools protocol, each JSON and a NUL.
type browser struct {
	t       *testing.T
	to      *os.File
	from    *bufio.Reader
	id      int
	session string

	requests []string // addresses of what was fetched
	console  []string // what the page complained of
}

// startBrowser starts Chromium with one empty page. It ends with the test.
func startBrowser(t *testing.T) *browser {
	t.Helper()
	gvmtest.Need(t, gvmtest.Chromium)
	path, err := gvmtest.Browser()
	if err != nil {
		t.Fatal(err)
	}
	profile, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	theirs, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, theirAnswers, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
		"--window-size=1400,860", "--user-data-dir="+profile, "--remote-debugging-pipe", "about:blank")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its processes are a group, to be ended as one
	cmd.ExtraFiles = []*os.File{theirs, theirAnswers}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	theirAnswers.Close()
	b := &browser{t: t, to: to, from: bufio.NewReader(from)}
	limit := time.AfterFunc(time.Minute, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }) // a read that waits ends then
	t.Cleanup(func() {
		if !t.Failed() {
			b.session = ""
			b.call("Browser.close", nil, nil)
		}
		limit.Stop()
		to.Close()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		from.Close()
		if !gvmtest.Eventually(func() bool { return os.RemoveAll(profile) == nil }) { // what was killed may still be writing
			t.Errorf("%s cannot be removed", profile)
		}
	})
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// message is an answer or an event.
type message struct {
	ID     int
	Method string
	Params json.RawMessage
	Result json.RawMessage
	Error  *struct{ Message string }
}

func (b *browser) read() message {
	b.t.Helper()
	text, err := b.from.ReadBytes(0)
	if err != nil {
		b.t.Fatalf("the browser says no more: %v", err)
	}
	var m message
	if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
		b.t.Fatal(err)
	}
	switch m.Method {
	case "Network.requestWillBeSent":
		var p struct{ Request struct{ URL string } }
		_ = json.Unmarshal(m.Params, &p)
		b.requests = append(b.requests, p.Request.URL)
	case "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded":
		b.console = append(b.console, string(m.Params))
	}
	return m
}

// call makes a request and waits for the answer.
func (b *browser) call(method string, params map[string]any, result any) {
	b.t.Helper()
	b.id++
	request := map[string]any{"id": b.id, "method": method}
	if params != nil {
		request["params"] = params
	}
	if b.session != "" {
		request["sessionId"] = b.session
	}
	text, err := json.Marshal(request)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.to.Write(append(text, 0)); err != nil {
		b.t.Fatal(err)
	}
	for {
		m := b.read()
		switch {
		case m.ID != b.id:
			continue
		case m.Error != nil:
			b.t.Fatalf("%s: %s", method, m.Error.Message)
		case result != nil:
			if err := json.Unmarshal(m.Result, result); err != nil {
				b.t.Fatal(err)
			}
		}
		return
	}
}

// open opens an address, and returns when it has been loaded.
func (b *browser) open(url string) {
	b.t.Helper()
	for _, url := range []string{"about:blank", url} { // to another part of the same page it would not load it
		b.call("Page.navigate", map[string]any{"url": url}, nil)
		for b.read().Method != "Page.loadEventFired" {
		}
	}
}

// eval returns the value of an expression, as text.
func (b *browser) eval(expression string) string {
	b.t.Helper()
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails any
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &r)
	if r.ExceptionDetails != nil {
		b.t.Fatalf("%s: %v", expression, r.ExceptionDetails)
	}
	return fmt.Sprint(r.Result.Value)
}

// shoot takes a picture, if pictures are kept.
func (b *browser) shoot(name string) {
	b.t.Helper()
	if *screenshots == "" {
		return
	}
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"format": "png"}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(*screenshots, name+".png"), png, 0o666); err != nil {
		b.t.Fatal(err)
	}
}

// number returns a data attribute of the page.
func (b *browser) number(name string) (n float64) {
	b.t.Helper()
	text := b.eval("document.documentElement.dataset." + name)
	if _, err := fmt.Sscan(text, &n); err != nil {
		b.t.Fatalf("the page says that %s is %q", name, text)
	}
	return n
}

// writePage writes a recording as a page, and returns its address.
func writePage(t *testing.T, rec *Recording) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "trace.html")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	w := NewWriter(f, HTML, rec.Header)
	if err := w.Write(rec.Events); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return "file://" + name
}

// TestPage opens the page in a browser: it draws all events, fetches nothing,
// complains of nothing, and shows what an address says.
func TestPage(t *testing.T) {
	b := startBrowser(t)
	rec := played(3000)
	url := writePage(t, rec)
	b.open(url)
	b.shoot("all")
	all := len(rec.Events)
	if b.number("events") != float64(all) || b.number("drawn") != float64(all) {
		t.Errorf("the page has %v events and drew %v, want %d", b.number("events"), b.number("drawn"), all)
	}
	if got, want := b.eval("document.title"), "gvm trace: "+rec.Header.Guest; got != want {
		t.Errorf("the title is %q, want %q", got, want)
	}

	const from, to = 1.5, 2.25 // milliseconds
	inView := func(events []Event) (n int) {
		lasts := spans(events)
		for i, e := range events {
			begin, end := e.When().Seconds()*1e3, (e.When()+lasts[i]).Seconds()*1e3
			if end >= from && begin <= to {
				n++
			}
		}
		return n
	}
	b.open(fmt.Sprintf("%s#t=%v-%v", url, from, to))
	b.shoot("zoomed")
	if got, want := b.number("drawn"), inView(rec.Events); got != float64(want) || want < 10 || want == all {
		t.Errorf("zoomed to %v to %v ms, %v events are drawn, want %d", from, to, got, want)
	}

	const page = 0x203 // which a vCPU waits for
	of := Page(rec.Events, page)
	b.open(fmt.Sprintf("%s#page=%#x", url, page))
	b.shoot("page")
	if got, want := b.number("drawn"), len(of); got != float64(want) || want < 10 || want == all {
		t.Errorf("with page %#x, %v events are drawn, want %d", page, got, want)
	}
	// The field and the wheel do what the address does.
	b.open(url)
	frame := "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
	b.eval(fmt.Sprintf("$('page').value = '%d'; $('filter').requestSubmit(); %s", page, frame))
	if got := b.number("drawn"); got != float64(len(of)) || !strings.HasSuffix(b.eval("location.href"), "#page=0x203") {
		t.Errorf("filtered in the page, %v events are drawn, want %d; the address is %s", got, len(of), b.eval("location.href"))
	}
	b.eval("$('all').click(); lanes.dispatchEvent(new WheelEvent('wheel', {deltaY: -100, clientX: 700, clientY: 150, cancelable: true})); " + frame)
	if from, to, end := b.number("from"), b.number("to"), b.eval("END"); from <= 0 || to-from > 0.7*float64(rec.Events[all-1].Time) {
		t.Errorf("the wheel zoomed to %v to %v of %v", from, to, end)
	}
	op := uint64(0)
	for _, e := range rec.Events {
		if op == 0 && e.Kind == Touch && e.Name == Waits {
			op = e.Op
		}
	}
	b.open(fmt.Sprintf("%s#op=%d", url, op))
	b.shoot("operation")
	lasts, begin, end := spans(rec.Events), time.Duration(0), time.Duration(0)
	for i, e := range rec.Events {
		if e.Op == op {
			if begin == 0 {
				begin = e.When()
			}
			end = max(end, e.When()+lasts[i])
		}
	}
	if from, to := b.number("from"), b.number("to"); op == 0 || from > float64(begin) || to < float64(end) || to-from > 2*float64(end-begin) {
		t.Errorf("operation %d, from %v to %v, is shown in a view from %v to %v ns", op, begin, end, from, to)
	}

	if len(b.console) != 0 || b.eval("document.documentElement.dataset.error === undefined") != "true" {
		t.Errorf("the page complains: %q", b.console)
	}
	for _, address := range b.requests {
		if !strings.HasPrefix(address, url) && !strings.HasPrefix(address, "data:") && address != "about:blank" {
			t.Errorf("the page fetches %s", address)
		}
	}
}

// TestPageIsSafe: what a recording says is text, and a recording without events has a
// page.
func TestPageIsSafe(t *testing.T) {
	b := startBrowser(t)
	evil := `</script><script>document.title = "evil"; //<img src=x onerror=alert(1)>`
	rec := &Recording{Header{Guest: evil, VCPUs: 1}, nil}
	b.open(writePage(t, rec))
	if got := b.eval("document.title"); got != "gvm trace: "+evil {
		t.Errorf("the title is %q", got)
	}
	rec.Events = []Event{{Seq: 1, Kind: HostOp, Op: 1, Name: evil}, {Seq: 2, Time: 1, Kind: HostOpEnd, Op: 1, Name: evil, Err: evil}}
	b.open(writePage(t, rec))
	if got := b.number("drawn"); got != 2 || b.eval("document.images.length + document.scripts.length") != "2" {
		t.Errorf("%v events are drawn, want 2; the page has %s images and scripts", got, b.eval("document.images.length + document.scripts.length"))
	}
	if len(b.console) != 0 {
		t.Errorf("the page complains: %q", b.console)
	}
}

// TestPageIsFast: 100,000 events are on the screen two seconds after the page was asked for.
func TestPageIsFast(t *testing.T) {
	b := startBrowser(t)
	rec := played(100_000)
	url := writePage(t, rec)
	b.open(url)
	t.Logf("%v events: opened in %v ms, drawn in %v ms", b.number("events"), b.number("ms"), b.number("drawMs"))
	b.shoot("many")
	const hopeless = 20_000 // ms: two seconds are what is wanted, on a machine that does nothing else
	if ms := b.number("ms"); ms > hopeless {
		t.Errorf("the page took %v ms to open", ms)
	}
}
