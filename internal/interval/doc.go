// Package interval finds intervals by the numbers they have. A [Tree] holds
// closed intervals [first, last] of uint64, each with a value, and tells which of
// them have a number in common with a given range. Closed, because the range of
// everything, [0, 1<<64-1], has to be one of them.
//
// # Structure
//
// It is a B+ tree. Entries are in the leaves, in the order of first, then of
// last, then of a hash of the value. An inner node keeps, for each child, the key
// of its first entry and the greatest last of all its entries. A lookup does not
// visit a child that begins after the range, nor one that goes up to a number
// before it; of the others only the last on each level can be without a hit.
//
// # Invariants
//
//   - Keys do not descend from entry to entry, through all leaves.
//   - What an inner node says of a child is exact: the key of its first entry and
//     its greatest last are in the child.
//   - All leaves are at the same depth.
//   - A node has 8 to 31 entries or children. Only the root may have fewer, and it
//     has two children at least if it is not a leaf.
//   - Slots of a node that are not in use hold no value and no child.
//
// [Tree.Check] tests them.
//
// # Cost
//
// With n entries, [Tree.Overlaps], [Tree.Insert] and [Tree.Delete] take O(log n),
// whatever the intervals are: nested, of the same first, or all the same. Entries
// of the same interval are told apart by the hash of the value, so that one of a
// million is deleted as fast as any other; only values whose hashes are equal are
// looked at one after the other. [Tree.Overlapping] visits at most (hits+1)*depth
// nodes, when every hit is in a leaf of its own; hits that are neighbours share
// leaves, 8 or more to each. The depth is about 5 for a million entries.
//
// Values of one word take 39 bytes an interval if they were inserted at random and
// 35 if in ascending order, all counted; a tree with a few entries has one leaf,
// of 768 bytes.
//
// # Why it is a B+ tree
//
// A lookup in a large tree waits for memory. A binary tree has a node for each
// interval, and at a million of them waits some twenty times, where this one waits
// at the leaf and a little on the level above it. Keys and greatest lasts are in
// arrays of their own, read from front to back, with a branch that is foreseen but
// for once a node. A stab of one of a million disjoint intervals, at random, takes
// so many nanoseconds (amd64, Go 1.26, two CPUs of a Xeon that others used too; the
// best and the median of five runs or more):
//
//	                                                    best  median
//	this tree, nodes of 31                               295     345
//	the same with nodes of 15                            395     410
//	the same with nodes of 63                            275     310
//	a treap with a node for each interval               1500    1820
//	github.com/google/btree of degree 32                 410     485
//
// The last is no alternative, but a measure: it finds the predecessor of a number
// among the firsts, which is the answer only because the intervals are disjoint.
// Nodes of 63 double what the smallest tree needs, and the treap needs 64 bytes
// for each interval. The tree, the btree and the memory are measured by
//
//	go test -run '^$' -bench 'Stab/n=1e6|Fill' -count 5 ./internal/interval
package interval
