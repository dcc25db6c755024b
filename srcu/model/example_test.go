package model_test

import (
	"fmt"

	"github.com/secondmmu/gvm/srcu/model"
)

// Without a membarrier, an updater misses a reader whose lock is still in the
// store buffer.
func Example() {
	p := model.Protocol{Flavour: model.Asymmetric, Defect: model.NoMembarrier}
	r := model.Explore(model.Reclaim(p, model.Size{Readers: 1, Sections: 1, Updaters: 1, Periods: 1}))
	fmt.Print(r.Trace)
	// Output:
	// reader 1            updater 1
	// lock: idx=0
	// lock: locks0[0]<-1
	// follow: shared=0
	//                     new: poison1<-0
	//                     (poison1=0)
	//                     swap: shared<-1
	//                     (shared=1)
	//                     snapshot: seq=0
	//                     mutex: gp:=1
	//                     ended? seq=0 seq:=1
	//                     scan1: idx=0
	//                     scan1: unlocks0[1]=0
	//                     scan1: locks0[1]=0
	//                     flip: idx:=1
	//                     scan2: idx=1
	//                     scan2: unlocks0[0]=0
	//                     scan2: locks0[0]=0
	//                     idle: seq:=2
	//                     ended? seq=2
	//                     return gp:=0
	//                     free: poison0<-1
	//                     (poison0=1)
	// look: poison0=1
	// broken: no use after free
}
