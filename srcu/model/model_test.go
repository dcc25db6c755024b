package model

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

var long = flag.Bool("long", false, "explore the larger cases too, which takes minutes and ten gigabytes")

func TestMain(m *testing.M) { gvmtest.Main(m) }

type build func(Protocol, Size) *Case

// TestProtocol explores the protocol in both flavours. Nothing must be found.
func TestProtocol(t *testing.T) {
	type tests []struct {
		build build
		sizes []Size
	}
	short := tests{
		{Sections, []Size{{1, 2, 1, 3}, {2, 1, 1, 3}, {2, 2, 1, 2}, {2, 1, 2, 1}, {1, 1, 2, 2}}},
		{LitmusPublish, []Size{{2, 1, 1, 1}, {1, 2, 2, 1}}},
		{LitmusOverlap, []Size{{2, 1, 1, 1}, {1, 2, 2, 1}}},
		{LitmusMutual, []Size{{2, 1, 1, 1}, {1, 2, 2, 1}}},
		{Reclaim, []Size{{1, 2, 1, 3}, {2, 1, 1, 2}}},
		{Nested, []Size{{1, 1, 1, 3}, {2, 1, 1, 1}}},
		{Crossed, []Size{{1, 1, 1, 3}, {2, 1, 1, 1}}},
		{HandOver, []Size{{2, 2, 1, 2}}},
		{Registered, []Size{{1, 1, 1, 3}}},
		{GetState, []Size{{1, 2, 1, 3}, {2, 1, 1, 2}}},
		{StartPoll, []Size{{1, 1, 2, 1}}},
		{Callback, []Size{{1, 2, 1, 1}}},
		{Endless, []Size{{1, 1, 1, 3}}},
	}
	normal := tests{
		{Sections, []Size{{3, 1, 1, 2}, {1, 2, 2, 2}, {2, 2, 1, 3}}},
		{LitmusPublish, []Size{{2, 2, 1, 1}, {2, 1, 2, 1}}},
		{LitmusOverlap, []Size{{2, 2, 1, 1}, {2, 1, 2, 1}, {3, 1, 1, 1}}},
		{LitmusMutual, []Size{{2, 2, 1, 1}, {2, 1, 2, 1}, {3, 1, 1, 1}}},
		{Reclaim, []Size{{2, 1, 1, 3}, {2, 2, 1, 1}}},
		{Nested, []Size{{3, 1, 1, 1}, {2, 1, 1, 3}}},
		{Crossed, []Size{{3, 1, 1, 1}, {2, 1, 1, 3}}},
		{HandOver, []Size{{2, 3, 1, 3}}},
		{Registered, []Size{{1, 2, 1, 2}, {2, 1, 1, 1}}},
		{StartPoll, []Size{{0, 0, 3, 1}, {2, 1, 2, 1}}},
		{Callback, []Size{{2, 1, 1, 1}}},
	}
	larger := tests{
		{Sections, []Size{{2, 2, 2, 1}, {3, 1, 2, 1}, {2, 1, 2, 3}, {3, 1, 1, 3}, {3, 2, 1, 1}, {3, 2, 1, 2}, {2, 2, 2, 2}, {3, 1, 2, 2}}},
		{LitmusOverlap, []Size{{1, 2, 3, 1}, {2, 2, 2, 1}, {3, 1, 2, 1}, {3, 2, 1, 1}}},
		{LitmusMutual, []Size{{2, 2, 2, 1}, {3, 1, 2, 1}}},
		{Reclaim, []Size{{2, 2, 1, 3}, {3, 1, 1, 2}}},
		{GetState, []Size{{2, 2, 1, 2}}},
		{Registered, []Size{{2, 1, 1, 2}, {1, 2, 1, 3}}},
		{StartPoll, []Size{{1, 1, 3, 1}}},
		{Endless, []Size{{2, 1, 1, 2}}},
	}
	list := short
	if !testing.Short() && !race {
		list = append(list, normal...)
	}
	if *long {
		list = append(list, larger...)
	}
	for n, tt := range list {
		for i, size := range tt.sizes {
			for _, p := range []Protocol{{Flavour: Asymmetric}, {Flavour: Fenced}, {Flavour: Asymmetric, From: 0xff}, {Flavour: Fenced, From: 0xff}} {
				if p.From != 0 && (n >= len(short) || i > 0) {
					continue // that counters may wrap need not be seen in every size
				}
				c := tt.build(p, size)
				t.Run(fmt.Sprintf("%v from %d, %s", p, p.From, c.Name), func(t *testing.T) {
					t.Parallel()
					r := Explore(c)
					t.Logf("%d states, %d moves deep, %v", r.States, r.Depth, r.Time.Round(time.Millisecond))
					if r.Broken != Holds {
						t.Errorf("violated: %v\n%s", r.Broken, r.Trace)
					}
				})
			}
		}
	}
}

// TestDefects explores protocols with a defect, in a case that has to show it.
// Where want is Holds, nothing must be found, and why says how that can be.
func TestDefects(t *testing.T) {
	type test struct {
		name   string
		defect Defect
		build  build
		size   Size
		want   Property
		bits   int
		from   uint8
		why    string
	}
	both := []test{
		{name: "SM1", defect: NoFirstScan, build: Sections, size: Size{1, 1, 1, 3}, want: WaitsForOpenSections},
		{name: "SM1", defect: NoFirstScan, build: LitmusOverlap, size: Size{1, 1, 2, 1}, want: Overlap},
		{name: "SM1", defect: NoFirstScan, build: Reclaim, size: Size{1, 1, 1, 3}, want: NoUseAfterFree},
		{name: "SM2", defect: InactiveOnly, build: Sections, size: Size{1, 1, 1, 1}, want: WaitsForOpenSections},
		{name: "SM2", defect: NoFlip, build: Endless, size: Size{1, 1, 1, 1}, want: EveryGracePeriodEnds},
		{name: "SM2", defect: NoFlip, build: Sections, size: Size{2, 2, 1, 2}, why: "the flip is for progress only"},
		{name: "SM3", defect: LocksFirst, build: Sections, size: Size{2, 1, 1, 1}, want: WaitsForOpenSections},
		{name: "SM4", defect: OneCounter, build: HandOver, size: Size{2, 1, 1, 1}, want: WaitsForOpenSections},
		{name: "SM5", defect: UnlockCurrent, build: Sections, size: Size{1, 1, 1, 1}, want: EveryGracePeriodEnds},
		{name: "SM5", defect: UnlockCurrent, build: Sections, size: Size{2, 2, 1, 2}, want: WaitsForOpenSections},
		{name: "SM8", defect: PlainFlip, build: Sections, size: Size{2, 3, 1, 1}, bits: 2, want: WaitsForOpenSections},
		{name: "SM8", defect: PlainFlip, build: Sections, size: Size{2, 3, 1, 1}, why: "a counter has more values than there are sections"},
		{name: "SM9", defect: JoinRunning, build: Sections, size: Size{1, 1, 2, 1}, want: WaitsForOpenSections},
		{name: "SM9", defect: JoinRunning, build: GetState, size: Size{1, 1, 1, 1}, want: WaitsForOpenSections},
		{name: "SM9", defect: JoinRunning, build: LitmusOverlap, size: Size{1, 1, 2, 1}, want: Overlap},
		{name: "SM10", defect: FlipFirst, build: Endless, size: Size{1, 1, 1, 1}, want: EveryGracePeriodEnds},
		{name: "SM10", defect: FlipFirst, build: Sections, size: Size{2, 2, 1, 2}, why: "both ranks are seen empty, only later"},
		{name: "SM10", defect: FlipFirstSameRank, build: Sections, size: Size{1, 1, 1, 3}, want: WaitsForOpenSections},
		{name: "SM11", defect: NoMutex, build: Sections, size: Size{1, 1, 2, 1}, want: WaitsForOpenSections},
		{name: "SM15", defect: CallbacksEarly, build: Callback, size: Size{1, 1, 1, 1}, want: WaitsForOpenSections},
		{name: "SM17", defect: PollExactly, build: GetState, size: Size{0, 0, 1, 2}, want: PollStaysTrue},
		{name: "SM18", defect: ListOnce, build: Registered, size: Size{1, 1, 1, 2}, want: WaitsForOpenSections},
		{name: "SM19", defect: Leftover, build: Sections, size: Size{1, 1, 1, 3}, want: WaitsForOpenSections},
		{name: "SM19", defect: ClearAfter, build: Sections, size: Size{1, 1, 1, 3}, want: WaitsForOpenSections},
		{name: "SM23", defect: AtLeast, build: Sections, size: Size{1, 1, 1, 1}, from: 0xff, want: WaitsForOpenSections},
		{name: "SM23", defect: AtLeast, build: Sections, size: Size{2, 2, 1, 2}, why: "more is never closed than opened, until a counter wraps"},
		{name: "SM24", defect: StaleIdx, build: Endless, size: Size{1, 1, 1, 1}, want: EveryGracePeriodEnds},
		{name: "SM24", defect: StaleIdx, build: Sections, size: Size{2, 2, 1, 2}, why: "both ranks are waited for"},
		{defect: SharedCell, build: OneCell, size: Size{2, 1, 1, 1}, want: WaitsForOpenSections},
		{defect: SnapshotUnfenced, build: LitmusOverlap, size: Size{1, 1, 2, 1}, want: Overlap},
		{defect: NeededOverwritten, build: StartPoll, size: Size{0, 0, 3, 1}, want: EveryGracePeriodEnds},
		{defect: ListPerSum, build: Registered, size: Size{1, 1, 1, 1}, want: WaitsForOpenSections},
	}
	asymmetric := []test{
		{name: "SM6", defect: NoMembarrier, build: Sections, size: Size{1, 1, 1, 1}, want: WaitsForOpenSections},
		{name: "SM6", defect: NoMembarrier, build: LitmusOverlap, size: Size{1, 1, 1, 1}, want: Overlap},
		{name: "SM6", defect: NoMembarrier, build: LitmusMutual, size: Size{1, 1, 1, 1}, want: Mutual},
		{name: "SM21", defect: OwnMembarrier, build: Reclaim, size: Size{1, 1, 1, 1}, want: NoUseAfterFree},
		{defect: MembarrierLate, build: Sections, size: Size{1, 1, 1, 2}, want: WaitsForOpenSections},
		{defect: MembarrierLate, build: LitmusOverlap, size: Size{1, 1, 2, 1}, want: Overlap},
		{defect: MembarrierEarly, build: LitmusOverlap, size: Size{1, 1, 2, 1}, want: Overlap},
		{defect: Sound, build: Sections, size: Size{2, 3, 1, 1}, bits: 2, want: WaitsForOpenSections},
		{defect: Sound, build: Sections, size: Size{2, 3, 1, 1}, bits: 3, why: "a store buffer of 6 stores holds 3 sections, fewer than a counter of 3 bits has values"},
		{defect: TwoMembarriers, build: Sections, size: Size{2, 3, 1, 1}, bits: 2, why: "it empties the store buffers"},
	}
	fenced := []test{
		{name: "SM6", defect: PlainLock, build: Sections, size: Size{1, 1, 1, 1}, want: WaitsForOpenSections},
		{name: "SM6", defect: PlainLock, build: LitmusOverlap, size: Size{1, 1, 1, 1}, want: Overlap},
		{name: "SM6", defect: PlainLock, build: LitmusMutual, size: Size{1, 1, 1, 1}, want: Mutual},
		{name: "SM6", defect: PlainLock, build: Reclaim, size: Size{1, 1, 1, 1}, want: NoUseAfterFree},
		{name: "SM7", defect: PlainUnlock, build: Sections, size: Size{2, 2, 1, 2}, why: "on TSO a store is not reordered with what comes before it"},
		{name: "SM7", defect: PlainUnlock, build: LitmusMutual, size: Size{2, 2, 1, 1}, why: "likewise"},
		{name: "SM7", defect: PlainUnlock, build: Reclaim, size: Size{2, 1, 1, 2}, why: "likewise"},
		{defect: Sound, build: Sections, size: Size{2, 3, 1, 1}, bits: 2, why: "a reader is counted at most once after the flip with the old idx"},
	}
	type row struct {
		p Protocol
		test
		c *Case
		r Result
	}
	var rows []*row
	add := func(flavour Flavour, tests ...test) {
		for _, tt := range tests {
			p := Protocol{Flavour: flavour, Defect: tt.defect, Bits: tt.bits, From: tt.from}
			if !(testing.Short() || race) || tt.size.Readers*tt.size.Sections < 4 {
				rows = append(rows, &row{p: p, test: tt, c: tt.build(p, tt.size)})
			}
		}
	}
	for _, tt := range both {
		add(Asymmetric, tt)
		add(Fenced, tt)
	}
	add(Asymmetric, asymmetric...)
	add(Fenced, fenced...)

	t.Run("all", func(t *testing.T) {
		for _, row := range rows {
			t.Run(fmt.Sprintf("%v, %s", row.p, row.c.Name), func(t *testing.T) {
				t.Parallel()
				row.r = Explore(row.c)
				if row.r.Broken != row.want {
					t.Errorf("violated: %q, want %q\n%s", row.r.Broken, row.want, row.r.Trace)
				}
			})
		}
	})
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tprotocol\tcase\tviolated\tstates\tmoves\ttime\t")
	for _, row := range rows {
		violated := row.r.Broken.String()
		if row.r.Broken == Holds {
			violated = "nothing: " + row.why
		}
		fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%d\t%d\t%v\t\n", row.name, row.p, row.c.Name, violated, row.r.States, row.r.Depth, row.r.Time.Round(time.Millisecond))
	}
	for _, o := range [][2]string{
		{"SM12", "Barrier is not modelled"},
		{"SM13", "Barrier counts no markers: it queues one callback behind all others"},
		{"SM14", "Barrier is not modelled"},
		{"SM16", "a queue is modelled as the set of its callbacks"},
		{"SM20", "Cleanup is not modelled"},
		{"SM22", "nobody is woken: an updater looks again by itself"},
	} {
		fmt.Fprintf(w, "%s\tdoes not apply: %s\n", o[0], o[1])
	}
	w.Flush()
	t.Logf("defects:\n%s", &table)
}
