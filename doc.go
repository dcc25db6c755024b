// Package gvm is the root of the gvm module, and has no code: this page says
// where to find what.
//
// gvm boots tiny guests under /dev/kvm and keeps every secondary view of guest
// memory coherent with the mappings of the process that hosts it.
//
//   - To run a guest, or to change its memory under it: package vm.
//   - To use KVM directly: package kvm.
//   - To map guest memory and change it with notice: package mm.
//   - To be told of such changes: package notifier.
//   - How memory slots follow, and how the VMM itself uses guest memory: package
//     shadow.
//   - Which pages were written: package dirty.
//   - To mirror an address space for a device: package hmm.
//   - Readers that sleep and the wait for them: package srcu.
//   - What a machine offers: package doctor, or the command gvm doctor.
//
// ARCHITECTURE.md has the packages in the order of their imports, and the life
// of a fault and of an invalidation.
package gvm
