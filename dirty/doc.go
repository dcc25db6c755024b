// Package dirty keeps track of which guest frames were written or discarded since
// somebody last asked.
//
// A [Set] is a set of guest frames. A [Log] is the dirty log of one VM: writers
// mark frames in it from any goroutine, and a [Harvest] takes out what was marked,
// as a transaction that is committed once the pages are safe, or else aborted.
//
// # Structure
//
// Frames are dealt with in chunks of 32768, which a bitmap of 4 KiB stands for. A
// Set is a sorted list of spans: a bitmap, or a run of chunks of which it has all.
// So the whole of a guest of any size is one span of 24 bytes.
//
// A Log is a tree of atomic pointers, because writers do not wait for each other:
//
//	slice of directories     replaced as a whole, when a directory is added
//	    directory            512 chunks: 64 GiB of guest memory
//	        bitmap           4 KiB, from the first mark until a harvest takes it
//
// Beside it are two Sets under a mutex: of frames that were discarded, and of
// dirty frames that came in bulk, from [Log.Merge] and [Log.MarkRange] or from a
// harvest that was aborted.
//
// # Invariants
//
//   - Spans of a set ascend and do not overlap. Runs of whole chunks do not touch.
//   - A span with a bitmap is one chunk, of which some frames are in the set and
//     some are not. It knows how many.
//   - A bitmap is in one place: in one span of one set, or in the tree of a log.
//
// [Set.Check] and [Log.Check] test them.
//
// # Dirty and discarded
//
// A harvest has two sets, and a frame may be in both:
//
//	dirty                    its content has to be copied
//	discarded, not dirty     it reads zero, or as its file; there is nothing to copy
//	neither                  it is what it was
//
// A discard does not take back a dirty mark. The mark may stand for a store that
// is newer than the discard: a writer marks first and stores later, and what the
// log has are the marks. To copy a page that reads zero costs a little, and not to
// copy one that was written costs the guest its data.
//
// # Why nothing is lost
//
// A writer marks a frame before it stores to the page, and does both in one read
// section of the log's [srcu.Domain]. A harvest first swaps every bitmap of the
// tree for nil, and then waits for a grace period. Either the section was open
// when the bitmaps had been swapped, and the harvest waits for it:
//
//	writer                           harvester
//	ReadLock
//	Mark: finds bitmap b
//	                                 Swap(b, nil)
//	Mark: sets the bit in b
//	                                 SynchronizeExpedited: waits
//	store
//	ReadUnlock
//	                                 returns; b has the bit, and the page the store
//	                                 copies the page
//
// or it was opened afterwards, and finds the tree without b:
//
//	writer                           harvester
//	                                 Swap(b, nil), SynchronizeExpedited
//	ReadLock
//	Mark: finds nil, installs c
//	                                 copies the page, with the store or without it
//	store
//	ReadUnlock
//	                                 the next harvest takes c, and copies the page
//
// In both cases nobody changes b any more when SynchronizeExpedited has returned:
// it belongs to the harvest, which reads it without atomics. Each part is needed.
// Without the grace period:
//
//	writer                           harvester
//	ReadLock
//	Mark: sets the bit in b
//	                                 Swap(b, nil)
//	                                 copies the page as it was, commits
//	store                            (lost: no bitmap has a mark for it)
//	ReadUnlock
//
// And with the mark after the store, a harvest that falls between the two does not
// know of a store that had been done before it began. It is in the next one; but
// meanwhile the page differs from its copy, and all say that it is clean.
//
// # Why discards do not lose either
//
// A discard is like a store: it is recorded before the content goes, in a section
// that stays open until it has gone. Outside of a section, a harvest can fall
// between the two. If the record comes first, that harvest has it, but copies the
// page while its content is still there. If it comes last, that harvest may have a
// store to the page that is newer than the discard, and the next one then says that
// the page reads zero. Whoever learns of a discard only when it has happened adds
// the frames with [Log.Merge] instead: they are copied, and seen to be zero.
//
// A harvest takes the discarded frames after the marks. The other way round, a
// discard and a newer store that fall between the two are taken apart: the store
// is in this harvest, and the discard in the next, where it wins.
//
// For the same reason a discard that falls between the taking and the end of the
// grace period is recorded as dirty too. It cannot be told from here whether a
// store, whose mark is in the bitmaps that have been taken, comes before it or
// after:
//
//	writer                 discard                   harvester
//	ReadLock, Mark
//	                                                 takes the mark
//	                       ReadLock, Discard
//	                       the content goes
//	store                  ReadUnlock
//	ReadUnlock
//	                                                 copies the page
//	                                                 the next harvest: discarded
//	                                                 (required: dirty as well)
//
// # Lock order
//
//	srcu read section     writers
//	    Log.mu            a leaf: nothing is waited for with it held
//
// [Log.Begin] waits for read sections, with no lock held.
//
// # Cost
//
// [Log.Mark] of a frame that is marked already is a few loads, and of another one
// an atomic OR more; a bitmap is allocated when its chunk is marked first after a
// harvest. A set takes 24 bytes for each span and 4 KiB for each bitmap: at worst
// that is a little more than one bitmap of the guest up to its last frame, and it
// is less wherever a chunk is all in the set or all out of it. A log takes 4 KiB
// more for each 64 GiB that have ever been marked in, and 8 bytes for each 64 GiB
// below them.
//
// Of a guest of 64 GiB with 1 % of its frames marked at random, which is a bitmap
// for each chunk and 12.5 bytes for each frame, in microseconds but for the first
// line (amd64, Go 1.26, two CPUs of an EPYC that others used too; the best and the
// median of five runs):
//
//	                                                    best  median
//	Mark of a marked frame, on both CPUs, ns             4.2     4.7
//	the same in a map under a RWMutex, ns                 17      17
//	Begin, a loop over all Runs, Commit                 1920    2020
//	the same loop over one flat bitmap                  2210    2270
//	Begin and Commit with nothing marked                 4.5     5.3
//	the same, flat                                        90      98
//	AddBitmap of KVM's bitmap, 2 MiB                     190     200
//	the same, not aligned                                440     470
//	the same, by Add of each frame                      4590    4870
//	Union                                                230     260
//	Subtract                                             370     430
//	either of two flat bitmaps, without counting         115     120
//
// The flat bitmap is no alternative: without a grace period it loses stores. These
// are measured by
//
//	go test -run '^$' -bench . -benchtime 100ms -count 5 ./dirty
package dirty
