// Package hostops carries out operations of the host on the memory of a guest that
// runs: those that a script asks for, at the times and at the events that it names, or
// those of an endless random stream.
//
// A [Runner] carries them out on a [Target], which is what it has to know of a machine.
// It remembers for every page what was done to it last, and in the end [Runner.Restore]
// gives back whatever is missing.
//
// # Scripts
//
// A script has one operation a line, and says first when it is to be carried out:
//
//	# A balloon that takes a page and gives it back, and a guest that waits for it.
//	at 5ms      unmap 16..20
//	every 10ms  discard 0x20..0x28
//	on mark 3   protect random 4 read
//	on mark     store 7+8 0xff
//	on fault    map it
//	then        populate it write
//
// Its grammar, in the notation of the Go specification. Words are separated by blanks or
// tabs; what follows a # is a comment; empty lines mean nothing.
//
//	line      = [ when operation ] .
//	when      = "at" duration | "every" duration | "on" "mark" [ number ] | "on" "fault" | "then" .
//	operation = plain pages
//	          | "protect" pages ( "none" | "read" | "write" )
//	          | "populate" pages ( "read" | "write" )
//	          | "remap" pages ( "to" "spare" | "back" )
//	          | "truncate" ( number | "all" )
//	          | "store" page [ "+" offset ] number
//	          | "fill" pages number .
//	plain     = "unmap" | "map" | "discard" | "punch" | "remap-keep" | "free" | "remove" | "pageout"
//	          | "collapse" | "mergeable" | "unmergeable" | "guard" | "unguard" .
//	pages     = number [ ".." number ] | "all" | "random" [ number ] | "it" .
//	page      = number | "random" | "it" .
//	offset    = number .
//
// A number is decimal, or hexadecimal after 0x. A duration is one of Go's, such as 1.5ms.
//
// When:
//
//	at 5ms     once, 5 ms after the start
//	every 5ms  5 ms after the start, and again every 5 ms; times that were missed are left out
//	on mark 3  each time that the guest reaches mark 3; without a number, any mark
//	on fault   each time that a vCPU touches a page that is not there
//	then       straight after the line before, each time that this has been carried out
//
// A mark is a number that a guest tells the host: the guest counter, with the parameter
// mark=N, the number of each Nth round.
//
// Pages are those of RAM, counted from 0. The range 16..20 has the pages 16 to 19. A random
// page, or run of N pages, is chosen anew each time. In a line with "on fault", the pages "it"
// are the page that was touched; in one with "then", those of the line before. Where a
// number follows the pages, as in fill, "random" takes one before it for N if there
// are two.
//
// What, which is a method of [mm.Memory] with nearly that name, or a store of the machine:
//
//	unmap                  take the pages away; addresses stay reserved: mmap PROT_NONE, MAP_FIXED
//	map                    pages as they were at first; those that were moved away come home
//	protect                leave no access, loads only, or all: "write" includes reading; mprotect
//	discard                madvise MADV_DONTNEED: private memory reads zero, or as its file
//	punch                  fallocate PUNCH_HOLE, of the file of RAM
//	remove                 madvise MADV_REMOVE: a hole in shared memory
//	free                   madvise MADV_FREE: the kernel may drop what is not written again
//	populate               make pages present, as loads or stores would: MADV_POPULATE_READ, _WRITE
//	pageout                madvise MADV_PAGEOUT: reclaim them, to swap or to their file
//	collapse               madvise MADV_COLLAPSE: into a huge page
//	mergeable, unmergeable madvise: let KSM merge the pages with others that are the same, or not
//	guard, unguard         madvise MADV_GUARD_INSTALL, _REMOVE: no access, without a new mapping; Linux 6.13
//	remap ... to spare     move pages that are not there yet to free addresses of the spare region
//	remap ... back         move pages home that are elsewhere
//	remap-keep             move the pages' content to free addresses of the spare region, and leave it
//	truncate               end the file of RAM behind so many pages of that, or behind all
//	store                  8 bytes, by the host, as the machine does it; the offset, 0 if it is not
//	                       given, is a multiple of 8 below the page size; of several pages, in the first
//	fill                   all bytes of the pages, by the host, as the machine does it
//
// What the kernel refuses ends the run: most operations are for pages that are mapped, and
// only unmap and map are for all.
//
// Scripts to begin with are in the directory examples/host-ops of the module.
//
// # Pieces
//
// A script means pages as the guest sees them. A remap moves them on the host, where two of
// them need not be neighbours then. An operation on pages is carried out in pieces, in
// the order of the pages, each of which is one run of host addresses. If one fails, those
// before it have been carried out, and those after it have not.
package hostops
