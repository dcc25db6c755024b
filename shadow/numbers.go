package shadow

import "math/bits"

// numbers hands out slot numbers below a limit, always the lowest that is free:
// KVM has a limited number of them, and what is taken back is given out again.
type numbers struct {
	limit uint32
	taken []uint64 // a bit for each number
	full  int      // all words before it have all bits set
}

// take takes the lowest free number.
func (n *numbers) take() (id uint32, ok bool) {
	for n.full < len(n.taken) && n.taken[n.full] == ^uint64(0) {
		n.full++
	}
	if n.full == len(n.taken) {
		n.taken = append(n.taken, 0)
	}
	id = uint32(n.full)<<6 + uint32(bits.TrailingZeros64(^n.taken[n.full]))
	return id, n.takeThis(id)
}

// takeThis takes the number id, if it is free.
func (n *numbers) takeThis(id uint32) bool {
	if id >= n.limit {
		return false
	}
	for uint32(len(n.taken)) <= id>>6 {
		n.taken = append(n.taken, 0)
	}
	if n.isTaken(id) {
		return false
	}
	n.taken[id>>6] |= 1 << (id & 63)
	return true
}

// give gives a number back.
func (n *numbers) give(id uint32) {
	n.taken[id>>6] &^= 1 << (id & 63)
	n.full = min(n.full, int(id>>6))
}

func (n *numbers) isTaken(id uint32) bool {
	return id>>6 < uint32(len(n.taken)) && n.taken[id>>6]&(1<<(id&63)) != 0
}
