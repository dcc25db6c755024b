// Package trace is the record of what happened to which page when: the host
// operations on guest memory, the notifications that they raised, the translations
// that were zapped and the memory slots that changed for them, and what the guest
// ran into.
//
// # Recording
//
// A [Log] is written by whoever does something, in the middle of doing it: under
// the mapping lock, on a vCPU's thread. So [Log.Record] takes no lock, waits for
// nobody and allocates nothing. Events go into rings: one for the host's side, one
// for the kernel, one for each vCPU. A ring that is full loses its oldest event,
// and counts it. A reader, in [Log.Since], takes the events out of the rings and
// puts them in one order:
//
//   - Of two events, one of which was recorded before the other was begun to be, on
//     whatever threads, the first has the lower number and no later time.
//   - Numbers have a gap where events were lost, as long as they were many.
//
// # Operations
//
// Each operation of the host has a number, [Event.Op], which all have that belong to it: its
// begin and end, its notifications, the zaps, the slots that follow, for which vCPUs are
// held, and what the kernel tells of it. A change that others have made is followed by an
// operation, whose number what the kernel told of the change has, too. What the guest
// meets afterwards has the number of the operation that last had to do with the
// page, which the reader finds out: the newest zap of the frame tells.
//
// # The kernel
//
// What the kernel tells of, it tells afterwards: some microseconds, or as long as whoever
// reads it is kept waiting. Such an event has two times: [Event.At] is when it happened, and Time
// when it was recorded, by which it is numbered. Formats for people have it at the one time
// (Chrome, HTML) or say how long ago it was (Text).
//
// # Recordings
//
// A recording is a [Header] and events. A [Writer] writes it in one of several
// formats, as it goes: lines of text, lines of JSON, the trace-event format of
// Chrome and Perfetto, or an HTML page. [Read] reads lines of JSON back.
//
// The address of an HTML page may say what it shows, and does so after each zoom and
// click, so that it can be passed on: #t=1.5-2.25 is a time in milliseconds, #page=0x205
// what has to do with a page, #op=12 an operation and what followed from it; parts are
// separated by &.
package trace
