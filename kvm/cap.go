package kvm

import "fmt"

// Cap is a capability of KVM: an extension of its API, with a number to ask for
// it by and sometimes a quantity as the answer.
type Cap int

// Capabilities of KVM on x86-64. A quantity in a comment is what CheckExtension
// answers; the others answer 0 or 1.
const (
	CapIrqchip                Cap = 0
	CapHLT                    Cap = 1
	CapUserMemory             Cap = 3
	CapSetTSSAddr             Cap = 4
	CapExtCPUID               Cap = 7
	CapNrVCPUs                Cap = 9  // the vCPUs recommended for one VM
	CapNrMemslots             Cap = 10 // slots of one VM
	CapMPState                Cap = 14
	CapCoalescedMMIO          Cap = 15
	CapSyncMMU                Cap = 16 // slots follow changes of the host's mappings
	CapUserNMI                Cap = 22
	CapSetGuestDebug          Cap = 23
	CapIRQRouting             Cap = 25
	CapMCE                    Cap = 31 // MCE banks
	CapIRQFD                  Cap = 32
	CapPIT2                   Cap = 33
	CapPITState2              Cap = 35
	CapIOEventFD              Cap = 36
	CapSetIdentityMapAddr     Cap = 37
	CapAdjustClock            Cap = 39 // flags of KVM_SET_CLOCK
	CapInternalErrorData      Cap = 40
	CapVCPUEvents             Cap = 41
	CapHyperV                 Cap = 44
	CapIntrShadow             Cap = 49
	CapDebugRegs              Cap = 50
	CapEnableCap              Cap = 54
	CapXSave                  Cap = 55
	CapXCRs                   Cap = 56
	CapAsyncPF                Cap = 59
	CapTSCControl             Cap = 60
	CapGetTSCKHz              Cap = 61
	CapMaxVCPUs               Cap = 66 // the most vCPUs of one VM
	CapTSCDeadlineTimer       Cap = 72
	CapSyncRegs               Cap = 74 // register sets in the run area, as bits
	CapKVMClockCtrl           Cap = 76
	CapSignalMSI              Cap = 77
	CapReadonlyMem            Cap = 81
	CapDeviceCtrl             Cap = 89
	CapExtEmulCPUID           Cap = 95
	CapEnableCapVM            Cap = 98
	CapVMAttributes           Cap = 101
	CapCheckExtensionVM       Cap = 105
	CapDisableQuirks          Cap = 116
	CapX86SMM                 Cap = 117
	CapMultiAddressSpace      Cap = 118 // address spaces of one VM
	CapSplitIrqchip           Cap = 121
	CapMaxVCPUID              Cap = 128 // vCPU ids are below it
	CapX2APICAPI              Cap = 129 // flags of KVM_ENABLE_CAP
	CapImmediateExit          Cap = 136
	CapX86DisableExits        Cap = 143 // exits that can be disabled, as bits
	CapGetMSRFeatures         Cap = 153
	CapNestedState            Cap = 157 // size of the state
	CapCoalescedPIO           Cap = 162
	CapExceptionPayload       Cap = 164
	CapManualDirtyLogProtect2 Cap = 168 // flags of KVM_ENABLE_CAP
	CapHaltPoll               Cap = 182
	CapAsyncPFInt             Cap = 183
	CapSmallerMaxPhyAddr      Cap = 185
	CapStealTime              Cap = 187
	CapX86UserSpaceMSR        Cap = 188 // reasons to exit for an MSR, as bits
	CapX86MSRFilter           Cap = 189
	CapDirtyLogRing           Cap = 192 // the largest ring, in bytes
	CapX86BusLockExit         Cap = 193
	CapSetGuestDebug2         Cap = 195 // flags of KVM_SET_GUEST_DEBUG
	CapSregs2                 Cap = 200
	CapBinaryStatsFD          Cap = 203
	CapExitOnEmulationFailure Cap = 204
	CapXSave2                 Cap = 208 // size of the state
	CapSysAttributes          Cap = 209
	CapPMUCapability          Cap = 212
	CapDisableQuirks2         Cap = 213 // quirks that can be disabled, as bits
	CapVMTSCControl           Cap = 214
	CapSystemEventData        Cap = 215
	CapX86TripleFaultEvent    Cap = 218
	CapX86NotifyVMExit        Cap = 219
	CapVMDisableNXHugePages   Cap = 220
	CapDirtyLogRingAcqRel     Cap = 223 // the largest ring, in bytes
	CapDirtyLogRingWithBitmap Cap = 225
	CapPMUEventMaskedEvents   Cap = 226
	CapUserMemory2            Cap = 231
	CapMemoryFaultInfo        Cap = 232
	CapMemoryAttributes       Cap = 233 // attributes, as bits
	CapGuestMemfd             Cap = 234
	CapVMTypes                Cap = 235 // types of VM, as bits
	CapPreFaultMemory         Cap = 236
	CapX86APICBusCyclesNS     Cap = 237
	CapX86GuestMode           Cap = 238
	CapGuestMemfdFlags        Cap = 244 // GuestMemfdFlags, as bits
)

var capNames = map[Cap]string{
	CapIrqchip:                "KVM_CAP_IRQCHIP",
	CapHLT:                    "KVM_CAP_HLT",
	CapUserMemory:             "KVM_CAP_USER_MEMORY",
	CapSetTSSAddr:             "KVM_CAP_SET_TSS_ADDR",
	CapExtCPUID:               "KVM_CAP_EXT_CPUID",
	CapNrVCPUs:                "KVM_CAP_NR_VCPUS",
	CapNrMemslots:             "KVM_CAP_NR_MEMSLOTS",
	CapMPState:                "KVM_CAP_MP_STATE",
	CapCoalescedMMIO:          "KVM_CAP_COALESCED_MMIO",
	CapSyncMMU:                "KVM_CAP_SYNC_MMU",
	CapUserNMI:                "KVM_CAP_USER_NMI",
	CapSetGuestDebug:          "KVM_CAP_SET_GUEST_DEBUG",
	CapIRQRouting:             "KVM_CAP_IRQ_ROUTING",
	CapMCE:                    "KVM_CAP_MCE",
	CapIRQFD:                  "KVM_CAP_IRQFD",
	CapPIT2:                   "KVM_CAP_PIT2",
	CapPITState2:              "KVM_CAP_PIT_STATE2",
	CapIOEventFD:              "KVM_CAP_IOEVENTFD",
	CapSetIdentityMapAddr:     "KVM_CAP_SET_IDENTITY_MAP_ADDR",
	CapAdjustClock:            "KVM_CAP_ADJUST_CLOCK",
	CapInternalErrorData:      "KVM_CAP_INTERNAL_ERROR_DATA",
	CapVCPUEvents:             "KVM_CAP_VCPU_EVENTS",
	CapHyperV:                 "KVM_CAP_HYPERV",
	CapIntrShadow:             "KVM_CAP_INTR_SHADOW",
	CapDebugRegs:              "KVM_CAP_DEBUGREGS",
	CapEnableCap:              "KVM_CAP_ENABLE_CAP",
	CapXSave:                  "KVM_CAP_XSAVE",
	CapXCRs:                   "KVM_CAP_XCRS",
	CapAsyncPF:                "KVM_CAP_ASYNC_PF",
	CapTSCControl:             "KVM_CAP_TSC_CONTROL",
	CapGetTSCKHz:              "KVM_CAP_GET_TSC_KHZ",
	CapMaxVCPUs:               "KVM_CAP_MAX_VCPUS",
	CapTSCDeadlineTimer:       "KVM_CAP_TSC_DEADLINE_TIMER",
	CapSyncRegs:               "KVM_CAP_SYNC_REGS",
	CapKVMClockCtrl:           "KVM_CAP_KVMCLOCK_CTRL",
	CapSignalMSI:              "KVM_CAP_SIGNAL_MSI",
	CapReadonlyMem:            "KVM_CAP_READONLY_MEM",
	CapDeviceCtrl:             "KVM_CAP_DEVICE_CTRL",
	CapExtEmulCPUID:           "KVM_CAP_EXT_EMUL_CPUID",
	CapEnableCapVM:            "KVM_CAP_ENABLE_CAP_VM",
	CapVMAttributes:           "KVM_CAP_VM_ATTRIBUTES",
	CapCheckExtensionVM:       "KVM_CAP_CHECK_EXTENSION_VM",
	CapDisableQuirks:          "KVM_CAP_DISABLE_QUIRKS",
	CapX86SMM:                 "KVM_CAP_X86_SMM",
	CapMultiAddressSpace:      "KVM_CAP_MULTI_ADDRESS_SPACE",
	CapSplitIrqchip:           "KVM_CAP_SPLIT_IRQCHIP",
	CapMaxVCPUID:              "KVM_CAP_MAX_VCPU_ID",
	CapX2APICAPI:              "KVM_CAP_X2APIC_API",
	CapImmediateExit:          "KVM_CAP_IMMEDIATE_EXIT",
	CapX86DisableExits:        "KVM_CAP_X86_DISABLE_EXITS",
	CapGetMSRFeatures:         "KVM_CAP_GET_MSR_FEATURES",
	CapNestedState:            "KVM_CAP_NESTED_STATE",
	CapCoalescedPIO:           "KVM_CAP_COALESCED_PIO",
	CapExceptionPayload:       "KVM_CAP_EXCEPTION_PAYLOAD",
	CapManualDirtyLogProtect2: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
	CapHaltPoll:               "KVM_CAP_HALT_POLL",
	CapAsyncPFInt:             "KVM_CAP_ASYNC_PF_INT",
	CapSmallerMaxPhyAddr:      "KVM_CAP_SMALLER_MAXPHYADDR",
	CapStealTime:              "KVM_CAP_STEAL_TIME",
	CapX86UserSpaceMSR:        "KVM_CAP_X86_USER_SPACE_MSR",
	CapX86MSRFilter:           "KVM_CAP_X86_MSR_FILTER",
	CapDirtyLogRing:           "KVM_CAP_DIRTY_LOG_RING",
	CapX86BusLockExit:         "KVM_CAP_X86_BUS_LOCK_EXIT",
	CapSetGuestDebug2:         "KVM_CAP_SET_GUEST_DEBUG2",
	CapSregs2:                 "KVM_CAP_SREGS2",
	CapBinaryStatsFD:          "KVM_CAP_BINARY_STATS_FD",
	CapExitOnEmulationFailure: "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
	CapXSave2:                 "KVM_CAP_XSAVE2",
	CapSysAttributes:          "KVM_CAP_SYS_ATTRIBUTES",
	CapPMUCapability:          "KVM_CAP_PMU_CAPABILITY",
	CapDisableQuirks2:         "KVM_CAP_DISABLE_QUIRKS2",
	CapVMTSCControl:           "KVM_CAP_VM_TSC_CONTROL",
	CapSystemEventData:        "KVM_CAP_SYSTEM_EVENT_DATA",
	CapX86TripleFaultEvent:    "KVM_CAP_X86_TRIPLE_FAULT_EVENT",
	CapX86NotifyVMExit:        "KVM_CAP_X86_NOTIFY_VMEXIT",
	CapVMDisableNXHugePages:   "KVM_CAP_VM_DISABLE_NX_HUGE_PAGES",
	CapDirtyLogRingAcqRel:     "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
	CapDirtyLogRingWithBitmap: "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP",
	CapPMUEventMaskedEvents:   "KVM_CAP_PMU_EVENT_MASKED_EVENTS",
	CapUserMemory2:            "KVM_CAP_USER_MEMORY2",
	CapMemoryFaultInfo:        "KVM_CAP_MEMORY_FAULT_INFO",
	CapMemoryAttributes:       "KVM_CAP_MEMORY_ATTRIBUTES",
	CapGuestMemfd:             "KVM_CAP_GUEST_MEMFD",
	CapVMTypes:                "KVM_CAP_VM_TYPES",
	CapPreFaultMemory:         "KVM_CAP_PRE_FAULT_MEMORY",
	CapX86APICBusCyclesNS:     "KVM_CAP_X86_APIC_BUS_CYCLES_NS",
	CapX86GuestMode:           "KVM_CAP_X86_GUEST_MODE",
	CapGuestMemfdFlags:        "KVM_CAP_GUEST_MEMFD_FLAGS",
}

// String returns the kernel's name of c: "KVM_CAP_USER_MEMORY".
func (c Cap) String() string {
	if name, ok := capNames[c]; ok {
		return name
	}
	return fmt.Sprintf("KVM_CAP(%d)", int(c))
}
