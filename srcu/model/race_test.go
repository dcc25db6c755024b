//go:build race

package model

// race says that the race detector slows everything down, although there is
// nothing for it to find: an exploration is sequential.
const race = true
