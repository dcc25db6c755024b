// Package litmus asks, with small tests that are run very often, what a guest may
// observe while its memory changes: what litmus tests are for memory models, for the
// coherence of a guest's memory with the mappings of its host.
//
// A test has pages of guest memory, threads of the guest, threads of the host, and says
// which outcomes are forbidden. The threads of the guest become machine code that runs on
// vCPUs, all iterations in one KVM_RUN. Those of the host change the mappings meanwhile.
// Every outcome is counted.
//
// # A test
//
//	litmus corr-replace
//	about Two loads of one word, while another page takes the place of its page. Once a
//	about load has returned what the new page has, no later one may return the old.
//
//	page x = 1
//
//	guest P0
//		r0 = load x
//		r1 = load x
//
//	host H0
//		replace x 2
//
//	forbidden P0:r0 == 2 && P0:r1 == 1
//
// A test is a file of lines; blanks at the beginning of a line mean nothing, and what
// follows a # is a comment. Its grammar, in the notation of the Go specification:
//
//	test      = "litmus" name { "about" text } { line } { form } .
//	line      = page | alias | table | machine | "instances" number | "needs" need
//	          | thread | clause | "observe" ref { ref } | "expect" "shadow-paging" .
//	page      = "page" name [ backing ] [ "huge" | "pages" number ] [ "=" number { number } ] .
//	backing   = "anonymous" | "memfd" | "shared-anonymous" | "memfd-private" | "file" | "file-private" .
//	alias     = "alias" name "of" name .
//	table     = "table" name "maps" name "to" name .
//	machine   = "machine" { "lazy" | "ring0" | "disconnected" | "dirty" source } .
//	source    = "bitmap" | "manual" | "manual-all-set" | "ring" | "wp" .
//	need      = "swap" | "ksm" | "numa" | "idle" | "root" | "hugepages" .
//	thread    = "guest" name { guest } | "host" name { host } | "setup" { host } .
//	guest     = reg "=" ( "load" | "add" | "swap" | "await" ) loc [ number ]
//	          | "store" loc ( number | reg ) | "flush" loc | "fence" | "mark" | "delay" number .
//	host      = reg "=" "load" loc [ by ] | "store" loc number [ by ]
//	          | reg "=" ( "dirty" | "discarded" | "used" ) name
//	          | [ "raw" | "late" ] change | "point" name name
//	          | "wait" ( "guests" | name ) | "delay" number | "log" ( "on" | "off" )
//	          | "harvest" | "abort" | "working-set" | "pause" | "resume" | "fork" | "reap" | "compact" .
//	by        = "hva" | "held" | "child" .
//	change    = plain name | "replace" name number | "move" name
//	          | "protect" name ( "none" | "read" | "write" ) | "populate" name ( "read" | "write" ) .
//	plain     = "unmap" | "map" | "discard" | "punch" | "remove" | "free" | "pageout" | "collapse" | "guard"
//	          | "unguard" | "mergeable" | "unmergeable" | "remap-keep" | "migrate" .
//	clause    = ( "forbidden" | "allowed" | "required" ) cond .
//	cond      = and { "||" and } .
//	and       = not { "&&" not } .
//	not       = "!" not | "(" cond ")" | operand ( "==" | "!=" | "<" | "<=" | ">" | ">=" ) operand .
//	operand   = number | ref .
//	ref       = name ":" reg | loc .
//	loc       = name [ "[" number "]" ] .
//	form      = "sensitive" name { "about" text } { machine | thread } .
//
// A name is letters, digits, - and _, and begins with a letter. A number is decimal, or
// hexadecimal after 0x, and below 2^31. A reg is r0 to r7; each thread has its own.
//
// # Memory
//
// A page is a region of guest memory by itself, of one page, or of as many as it says;
// huge is 2 MiB that a huge page can be collapsed from. Its words have 8 bytes: x is the
// first of page x, and x[1] the next, up to x[7]. They begin with the numbers given, or 0.
// An alias shows the same memory at another guest address. A table is a page that
// is a guest page table: it maps an address to a page, which the host's "point" changes.
//
// # Iterations
//
// A test runs in rounds. In a round each thread of the host runs once, and each of the
// guest as many times as the test has instances: 16, or 512 if there is no thread of the
// host. Every instance has words of its own, on the same pages: x of one and x of the
// next are 64 bytes apart. So a change of a page's mapping meets the threads of the guest at
// 16 points. What a host's statement does to words it does to those of all
// instances, before the next statement. An outcome is that of one instance, and so is an
// iteration. It is effective if it overlapped the change: the guest has noted that the
// host had not ended its first to last change before the instance began, nor begun it after
// the instance ended.
//
// Before each round, while the guest waits, everything is as the test describes it: pages
// that are missing are mapped, those that have moved are at home, words are what they were
// at first, and the statements of "setup" are carried out. When all host threads have ended
// a round, what is missing is mapped anew, so that a guest which waits for it goes on.
//
// Both sides begin a round after a delay by chance, and the instances are spread by
// chance over the time that the change takes: by a delay between them, or between two
// statements of each, so that the change comes in the middle. With two threads of the guest or
// more, all begin each instance together.
//
// # Threads of the guest
//
//	r0 = load x     8 bytes
//	store x 1       8 bytes, also from a register
//	r0 = add x 1    lock xadd: r0 is what was there
//	r0 = swap x 1   xchg
//	r0 = await x 1  load until it is 1, and no more than 200,000 times
//	fence           mfence
//	mark            tell the host that this point was reached: see wait
//	flush x         invlpg, for machines with ring0
//	delay 100       that many turns of an empty loop
//
// # Threads of the host
//
//	r0 = load x      by the machine's table of translations, as a device does; also store
//	r0 = load x hva  by the host address that x has now
//	r0 = load x held by the host address that x had when the round began
//	r0 = load x child, in the process that fork has made
//	unmap x, ...     the operation of package mm of that name, on all pages of x
//	replace x 2      a page whose words are all 2 is moved over x by mremap
//	move x           x is moved to another host address, and slots follow
//	remap-keep x     the pages of x are moved away, and x has fresh ones
//	migrate x        ask the kernel to move x to the next NUMA node
//	compact          ask the kernel to compact its memory
//	raw ...          the system call of the operation alone: nobody is told
//	late ...         the system call first; subscribers are told when it is done
//	harvest          take and commit what is dirty; "abort" takes it and puts it back
//	r0 = dirty x     1 if x was dirty in the last harvest; also "discarded"
//	working-set      take which pages were used; r0 = used x tells of the last
//	log off          switch dirty logging, with machines that have a dirty source
//	point v y        store an entry in the table: v is y from now on
//	wait P0          until guest thread P0 has reached its mark in this round
//	wait guests      until all of them have ended the round
//	pause, resume    keep vCPUs out of the guest
//	fork, reap       make a process that has a copy of the memory, and end it
//
// A load by "held" or "child" of memory that is not there returns 0xdead, and a store does
// nothing.
//
// # Outcomes
//
// An outcome is what the clauses and "observe" mention: registers, and words of pages as
// they are in the end. Whatever satisfies a forbidden clause must not be seen. What
// satisfies an allowed one is starred as interesting; what satisfies none is allowed too.
// Something must be seen that satisfies a required one.
//
// # Sensitivity
//
// A form "sensitive" is the test with other threads, or another machine, in which a
// forbidden outcome must be seen: it breaks a rule. Threads of the same name take the
// place of the test's. A test whose forms show nothing has shown nothing itself.
package litmus
