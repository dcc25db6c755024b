package kvm

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/secondmmu/gvm/internal/gvmtest"
)

// kernelStruct is a struct that crosses the boundary, as the kernel lays it out.
type kernelStruct struct {
	goType any
	cType  string
	newer  bool // than headers that may still be installed
	size   uintptr
	fields []kernelField // in order, without padding
}

type kernelField struct {
	goName string
	cName  string
	offset uintptr
}

var kernelStructs = []kernelStruct{
	{goType: Regs{}, cType: "struct kvm_regs", size: 144, fields: []kernelField{
		{"Rax", "rax", 0}, {"Rbx", "rbx", 8}, {"Rcx", "rcx", 16}, {"Rdx", "rdx", 24},
		{"Rsi", "rsi", 32}, {"Rdi", "rdi", 40}, {"Rsp", "rsp", 48}, {"Rbp", "rbp", 56},
		{"R8", "r8", 64}, {"R9", "r9", 72}, {"R10", "r10", 80}, {"R11", "r11", 88},
		{"R12", "r12", 96}, {"R13", "r13", 104}, {"R14", "r14", 112}, {"R15", "r15", 120},
		{"Rip", "rip", 128}, {"Rflags", "rflags", 136},
	}},
	{goType: Segment{}, cType: "struct kvm_segment", size: 24, fields: []kernelField{
		{"Base", "base", 0}, {"Limit", "limit", 8}, {"Selector", "selector", 12}, {"Type", "type", 14},
		{"Present", "present", 15}, {"DPL", "dpl", 16}, {"DB", "db", 17}, {"S", "s", 18},
		{"L", "l", 19}, {"G", "g", 20}, {"AVL", "avl", 21}, {"Unusable", "unusable", 22},
	}},
	{goType: DTable{}, cType: "struct kvm_dtable", size: 16, fields: []kernelField{
		{"Base", "base", 0}, {"Limit", "limit", 8},
	}},
	{goType: Sregs{}, cType: "struct kvm_sregs", size: 312, fields: []kernelField{
		{"CS", "cs", 0}, {"DS", "ds", 24}, {"ES", "es", 48}, {"FS", "fs", 72}, {"GS", "gs", 96}, {"SS", "ss", 120},
		{"TR", "tr", 144}, {"LDT", "ldt", 168}, {"GDT", "gdt", 192}, {"IDT", "idt", 208},
		{"CR0", "cr0", 224}, {"CR2", "cr2", 232}, {"CR3", "cr3", 240}, {"CR4", "cr4", 248}, {"CR8", "cr8", 256},
		{"EFER", "efer", 264}, {"APICBase", "apic_base", 272}, {"InterruptBitmap", "interrupt_bitmap", 280},
	}},
	{goType: FPU{}, cType: "struct kvm_fpu", size: 416, fields: []kernelField{
		{"FPR", "fpr", 0}, {"FCW", "fcw", 128}, {"FSW", "fsw", 130}, {"FTWX", "ftwx", 132}, {"LastOpcode", "last_opcode", 134},
		{"LastIP", "last_ip", 136}, {"LastDP", "last_dp", 144}, {"XMM", "xmm", 152}, {"MXCSR", "mxcsr", 408},
	}},
	{goType: MSREntry{}, cType: "struct kvm_msr_entry", size: 16, fields: []kernelField{
		{"Index", "index", 0}, {"Data", "data", 8},
	}},
	{goType: CPUIDEntry{}, cType: "struct kvm_cpuid_entry2", size: 40, fields: []kernelField{
		{"Function", "function", 0}, {"Index", "index", 4}, {"Flags", "flags", 8},
		{"EAX", "eax", 12}, {"EBX", "ebx", 16}, {"ECX", "ecx", 20}, {"EDX", "edx", 24},
	}},
	{goType: LAPIC{}, cType: "struct kvm_lapic_state", size: 1024, fields: []kernelField{{"Regs", "regs", 0}}},
	{goType: VCPUEvents{}, cType: "struct kvm_vcpu_events", size: 64, fields: []kernelField{
		{"Exception", "exception", 0}, {"Exception.Injected", "exception.injected", 0}, {"Exception.Nr", "exception.nr", 1},
		{"Exception.HasErrorCode", "exception.has_error_code", 2}, {"Exception.Pending", "exception.pending", 3},
		{"Exception.ErrorCode", "exception.error_code", 4},
		{"Interrupt", "interrupt", 8}, {"Interrupt.Injected", "interrupt.injected", 8}, {"Interrupt.Nr", "interrupt.nr", 9},
		{"Interrupt.Soft", "interrupt.soft", 10}, {"Interrupt.Shadow", "interrupt.shadow", 11},
		{"NMI", "nmi", 12}, {"NMI.Injected", "nmi.injected", 12}, {"NMI.Pending", "nmi.pending", 13}, {"NMI.Masked", "nmi.masked", 14},
		{"SIPIVector", "sipi_vector", 16}, {"Flags", "flags", 20},
		{"SMI", "smi", 24}, {"SMI.SMM", "smi.smm", 24}, {"SMI.Pending", "smi.pending", 25},
		{"SMI.SMMInsideNMI", "smi.smm_inside_nmi", 26}, {"SMI.LatchedInit", "smi.latched_init", 27},
		{"TripleFault", "triple_fault", 28}, {"TripleFault.Pending", "triple_fault.pending", 28},
		{"ExceptionHasPayload", "exception_has_payload", 55}, {"ExceptionPayload", "exception_payload", 56},
	}},
	{goType: GuestDebug{}, cType: "struct kvm_guest_debug", size: 72, fields: []kernelField{
		{"Control", "control", 0}, {"DebugReg", "arch.debugreg", 8},
	}},
	{goType: MPState(0), cType: "struct kvm_mp_state", size: 4},
	{goType: msrListHeader{}, cType: "struct kvm_msr_list", size: 4, fields: []kernelField{{"nmsrs", "nmsrs", 0}}},
	{goType: msrsHeader{}, cType: "struct kvm_msrs", size: 8, fields: []kernelField{{"nmsrs", "nmsrs", 0}}},
	{goType: cpuidHeader{}, cType: "struct kvm_cpuid2", size: 8, fields: []kernelField{{"nent", "nent", 0}}},
	{goType: signalMaskHeader{}, cType: "struct kvm_signal_mask", size: 4, fields: []kernelField{{"len", "len", 0}}},
	{goType: translation{}, cType: "struct kvm_translation", size: 24, fields: []kernelField{
		{"linearAddress", "linear_address", 0}, {"physicalAddress", "physical_address", 8},
		{"valid", "valid", 16}, {"writeable", "writeable", 17}, {"usermode", "usermode", 18},
	}},
	{goType: interrupt{}, cType: "struct kvm_interrupt", size: 4, fields: []kernelField{{"irq", "irq", 0}}},
	{goType: enableCap{}, cType: "struct kvm_enable_cap", size: 104, fields: []kernelField{
		{"cap", "cap", 0}, {"flags", "flags", 4}, {"args", "args", 8},
	}},
	{goType: userspaceMemoryRegion{}, cType: "struct kvm_userspace_memory_region", size: 32, fields: []kernelField{
		{"slot", "slot", 0}, {"flags", "flags", 4}, {"guestPhysAddr", "guest_phys_addr", 8},
		{"memorySize", "memory_size", 16}, {"userspaceAddr", "userspace_addr", 24},
	}},
	{goType: userspaceMemoryRegion2{}, cType: "struct kvm_userspace_memory_region2", newer: true, size: 160, fields: []kernelField{
		{"slot", "slot", 0}, {"flags", "flags", 4}, {"guestPhysAddr", "guest_phys_addr", 8},
		{"memorySize", "memory_size", 16}, {"userspaceAddr", "userspace_addr", 24},
		{"guestMemfdOffset", "guest_memfd_offset", 32}, {"guestMemfd", "guest_memfd", 40},
	}},
	{goType: createGuestMemfd{}, cType: "struct kvm_create_guest_memfd", newer: true, size: 64, fields: []kernelField{
		{"size", "size", 0}, {"flags", "flags", 8},
	}},
	{goType: dirtyLog{}, cType: "struct kvm_dirty_log", size: 16, fields: []kernelField{
		{"slot", "slot", 0}, {"bitmap", "dirty_bitmap", 8},
	}},
	{goType: clearDirtyLog{}, cType: "struct kvm_clear_dirty_log", size: 24, fields: []kernelField{
		{"slot", "slot", 0}, {"numPages", "num_pages", 4}, {"firstPage", "first_page", 8}, {"bitmap", "dirty_bitmap", 16},
	}},
	{goType: dirtyGfn{}, cType: "struct kvm_dirty_gfn", size: 16, fields: []kernelField{
		{"flags", "flags", 0}, {"slot", "slot", 4}, {"offset", "offset", 8},
	}},
	{goType: irqLevel{}, cType: "struct kvm_irq_level", size: 8, fields: []kernelField{{"irq", "irq", 0}, {"level", "level", 4}}},
	{goType: routingHeader{}, cType: "struct kvm_irq_routing", size: 8, fields: []kernelField{{"nr", "nr", 0}}},
	{goType: routingEntry{}, cType: "struct kvm_irq_routing_entry", size: 48, fields: []kernelField{
		{"gsi", "gsi", 0}, {"typ", "type", 4}, {"irqchip", "u.irqchip.irqchip", 16}, {"pin", "u.irqchip.pin", 20},
	}},
	{goType: pitConfig{}, cType: "struct kvm_pit_config", size: 64, fields: []kernelField{{"flags", "flags", 0}}},
	{goType: statsHeader{}, cType: "struct kvm_stats_header", size: 24, fields: []kernelField{
		{"Flags", "flags", 0}, {"NameSize", "name_size", 4}, {"NumDesc", "num_desc", 8},
		{"IDOffset", "id_offset", 12}, {"DescOffset", "desc_offset", 16}, {"DataOffset", "data_offset", 20},
	}},
	{goType: statsDesc{}, cType: "struct kvm_stats_desc", size: 16, fields: []kernelField{
		{"Flags", "flags", 0}, {"Exponent", "exponent", 4}, {"Size", "size", 6}, {"Offset", "offset", 8}, {"BucketSize", "bucket_size", 12},
	}},
	{goType: runArea{}, cType: "struct kvm_run", size: 2352, fields: []kernelField{
		{"requestInterruptWindow", "request_interrupt_window", 0}, {"immediateExit", "immediate_exit", 1},
		{"exitReason", "exit_reason", 8}, {"readyForInterruptInjection", "ready_for_interrupt_injection", 12},
		{"ifFlag", "if_flag", 13}, {"flags", "flags", 14}, {"cr8", "cr8", 16}, {"apicBase", "apic_base", 24},
		{"exit", "hw", 32}, {"validRegs", "kvm_valid_regs", 288}, {"dirtyRegs", "kvm_dirty_regs", 296}, {"syncRegs", "s", 304},
	}},
}

// kernelPayloads are the members of the union in struct kvm_run, with offsets
// from the start of the union.
var kernelPayloads = []kernelStruct{
	{goType: runUnknown{}, cType: "hw", size: 8, fields: []kernelField{{"hardwareExitReason", "hardware_exit_reason", 0}}},
	{goType: runFailEntry{}, cType: "fail_entry", size: 16, fields: []kernelField{
		{"hardwareEntryFailureReason", "hardware_entry_failure_reason", 0}, {"cpu", "cpu", 8},
	}},
	{goType: runIO{}, cType: "io", size: 16, fields: []kernelField{
		{"direction", "direction", 0}, {"size", "size", 1}, {"port", "port", 2}, {"count", "count", 4}, {"dataOffset", "data_offset", 8},
	}},
	{goType: runDebug{}, cType: "debug", size: 32, fields: []kernelField{
		{"exception", "arch.exception", 0}, {"pc", "arch.pc", 8}, {"dr6", "arch.dr6", 16}, {"dr7", "arch.dr7", 24},
	}},
	{goType: runMMIO{}, cType: "mmio", size: 24, fields: []kernelField{
		{"physAddr", "phys_addr", 0}, {"data", "data", 8}, {"len", "len", 16}, {"isWrite", "is_write", 20},
	}},
	{goType: runInternal{}, cType: "internal", size: 136, fields: []kernelField{
		{"suberror", "suberror", 0}, {"ndata", "ndata", 4}, {"data", "data", 8},
	}},
	{goType: runEmulationFailure{}, cType: "emulation_failure", size: 32, fields: []kernelField{
		{"flags", "flags", 8}, {"insnSize", "insn_size", 16}, {"insnBytes", "insn_bytes", 17},
	}},
	{goType: runSystemEvent{}, cType: "system_event", size: 136, fields: []kernelField{
		{"typ", "type", 0}, {"ndata", "ndata", 4}, {"data", "data", 8},
	}},
	{goType: runMemoryFault{}, cType: "memory_fault", newer: true, size: 24, fields: []kernelField{
		{"flags", "flags", 0}, {"gpa", "gpa", 8}, {"size", "size", 16},
	}},
}

// kernelRequests are the request numbers as the kernel's header makes them.
var kernelRequests = map[string]struct{ got, want uintptr }{
	reqGetAPIVersion.name:          {reqGetAPIVersion.nr, 0xae00},
	reqCreateVM.name:               {reqCreateVM.nr, 0xae01},
	reqGetMSRIndexList.name:        {reqGetMSRIndexList.nr, 0xc004ae02},
	reqCheckExtension.name:         {reqCheckExtension.nr, 0xae03},
	reqGetVCPUMmapSize.name:        {reqGetVCPUMmapSize.nr, 0xae04},
	reqGetSupportedCPUID.name:      {reqGetSupportedCPUID.nr, 0xc008ae05},
	reqGetMSRFeatureIndexList.name: {reqGetMSRFeatureIndexList.nr, 0xc004ae0a},
	reqCreateVCPU.name:             {reqCreateVCPU.nr, 0xae41},
	reqGetDirtyLog.name:            {reqGetDirtyLog.nr, 0x4010ae42},
	reqSetUserMemoryRegion.name:    {reqSetUserMemoryRegion.nr, 0x4020ae46},
	reqSetTSSAddr.name:             {reqSetTSSAddr.nr, 0xae47},
	reqSetIdentityMapAddr.name:     {reqSetIdentityMapAddr.nr, 0x4008ae48},
	reqSetUserMemoryRegion2.name:   {reqSetUserMemoryRegion2.nr, 0x40a0ae49},
	reqCreateIRQChip.name:          {reqCreateIRQChip.nr, 0xae60},
	reqIRQLine.name:                {reqIRQLine.nr, 0x4008ae61},
	reqSetGSIRouting.name:          {reqSetGSIRouting.nr, 0x4008ae6a},
	reqCreatePIT2.name:             {reqCreatePIT2.nr, 0x4040ae77},
	reqClearDirtyLog.name:          {reqClearDirtyLog.nr, 0xc018aec0},
	reqResetDirtyRings.name:        {reqResetDirtyRings.nr, 0xaec7},
	reqCreateGuestMemfd.name:       {reqCreateGuestMemfd.nr, 0xc040aed4},
	reqEnableCap.name:              {reqEnableCap.nr, 0x4068aea3},
	reqGetStatsFD.name:             {reqGetStatsFD.nr, 0xaece},
	reqRun.name:                    {reqRun.nr, 0xae80},
	reqGetRegs.name:                {reqGetRegs.nr, 0x8090ae81},
	reqSetRegs.name:                {reqSetRegs.nr, 0x4090ae82},
	reqGetSregs.name:               {reqGetSregs.nr, 0x8138ae83},
	reqSetSregs.name:               {reqSetSregs.nr, 0x4138ae84},
	reqTranslate.name:              {reqTranslate.nr, 0xc018ae85},
	reqInterrupt.name:              {reqInterrupt.nr, 0x4004ae86},
	reqGetMSRs.name:                {reqGetMSRs.nr, 0xc008ae88},
	reqSetMSRs.name:                {reqSetMSRs.nr, 0x4008ae89},
	reqSetSignalMask.name:          {reqSetSignalMask.nr, 0x4004ae8b},
	reqGetFPU.name:                 {reqGetFPU.nr, 0x81a0ae8c},
	reqSetFPU.name:                 {reqSetFPU.nr, 0x41a0ae8d},
	reqGetLAPIC.name:               {reqGetLAPIC.nr, 0x8400ae8e},
	reqSetLAPIC.name:               {reqSetLAPIC.nr, 0x4400ae8f},
	reqSetCPUID2.name:              {reqSetCPUID2.nr, 0x4008ae90},
	reqGetCPUID2.name:              {reqGetCPUID2.nr, 0xc008ae91},
	reqGetMPState.name:             {reqGetMPState.nr, 0x8004ae98},
	reqSetMPState.name:             {reqSetMPState.nr, 0x4004ae99},
	reqSetGuestDebug.name:          {reqSetGuestDebug.nr, 0x4048ae9b},
	reqGetVCPUEvents.name:          {reqGetVCPUEvents.nr, 0x8040ae9f},
	reqSetVCPUEvents.name:          {reqSetVCPUEvents.nr, 0x4040aea0},
}

// kernelConsts are the other numbers, except those that have a name in the
// package: they are taken from capNames and exitNames.
var kernelConsts = map[string]uint64{
	"KVM_API_VERSION":         APIVersion,
	"KVM_MEM_LOG_DIRTY_PAGES": uint64(MemLogDirtyPages),
	"KVM_MEM_READONLY":        uint64(MemReadonly),
	"KVM_MEM_GUEST_MEMFD":     uint64(MemGuestMemfd),

	"GUEST_MEMFD_FLAG_MMAP":        uint64(GuestMemfdMmap),
	"GUEST_MEMFD_FLAG_INIT_SHARED": uint64(GuestMemfdInitShared),

	"KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE": uint64(DirtyLogManualProtect),
	"KVM_DIRTY_LOG_INITIALLY_SET":         uint64(DirtyLogInitiallySet),
	"KVM_DIRTY_LOG_PAGE_OFFSET":           dirtyLogPageOffset,
	"KVM_DIRTY_GFN_F_DIRTY":               gfnDirty,
	"KVM_DIRTY_GFN_F_RESET":               gfnReset,

	"KVM_IRQCHIP_PIC_MASTER":  uint64(PICMaster),
	"KVM_IRQCHIP_PIC_SLAVE":   uint64(PICSlave),
	"KVM_IRQCHIP_IOAPIC":      uint64(IOAPIC),
	"KVM_IRQ_ROUTING_IRQCHIP": routeToChip,

	"KVM_MP_STATE_RUNNABLE":      uint64(MPStateRunnable),
	"KVM_MP_STATE_UNINITIALIZED": uint64(MPStateUninitialized),
	"KVM_MP_STATE_INIT_RECEIVED": uint64(MPStateInitReceived),
	"KVM_MP_STATE_HALTED":        uint64(MPStateHalted),
	"KVM_MP_STATE_SIPI_RECEIVED": uint64(MPStateSIPIReceived),

	"KVM_EXIT_IO_IN":                                      exitIOIn,
	"KVM_INTERNAL_ERROR_EMULATION":                        SuberrorEmulation,
	"KVM_INTERNAL_ERROR_SIMUL_EX":                         SuberrorSimulEx,
	"KVM_INTERNAL_ERROR_DELIVERY_EV":                      SuberrorDeliveryEv,
	"KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON":           SuberrorUnexpectedExitReason,
	"KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES": emulationInsnIsValid,
	"KVM_SYSTEM_EVENT_SHUTDOWN":                           uint64(SystemEventShutdown),
	"KVM_SYSTEM_EVENT_RESET":                              uint64(SystemEventReset),
	"KVM_SYSTEM_EVENT_CRASH":                              uint64(SystemEventCrash),
	"KVM_MEMORY_EXIT_FLAG_PRIVATE":                        MemoryFaultPrivate,

	"KVM_CPUID_FLAG_SIGNIFCANT_INDEX":  CPUIDSignificantIndex, // the kernel's spelling
	"KVM_VCPUEVENT_VALID_NMI_PENDING":  uint64(EventNMIPending),
	"KVM_VCPUEVENT_VALID_SIPI_VECTOR":  uint64(EventSIPIVector),
	"KVM_VCPUEVENT_VALID_SHADOW":       uint64(EventShadow),
	"KVM_VCPUEVENT_VALID_SMM":          uint64(EventSMM),
	"KVM_VCPUEVENT_VALID_PAYLOAD":      uint64(EventPayload),
	"KVM_VCPUEVENT_VALID_TRIPLE_FAULT": uint64(EventTripleFault),
	"KVM_GUESTDBG_ENABLE":              uint64(GuestDebugEnable),
	"KVM_GUESTDBG_SINGLESTEP":          uint64(GuestDebugSingleStep),
	"KVM_GUESTDBG_USE_SW_BP":           uint64(GuestDebugSWBreakpoints),
	"KVM_GUESTDBG_USE_HW_BP":           uint64(GuestDebugHWBreakpoints),
	"KVM_GUESTDBG_INJECT_DB":           uint64(GuestDebugInjectDB),
	"KVM_GUESTDBG_INJECT_BP":           uint64(GuestDebugInjectBP),
	"KVM_GUESTDBG_BLOCKIRQ":            uint64(GuestDebugBlockIRQ),
	"KVM_STATS_TYPE_CUMULATIVE":        uint64(StatCumulative),
	"KVM_STATS_TYPE_INSTANT":           uint64(StatInstant),
	"KVM_STATS_TYPE_PEAK":              uint64(StatPeak),
	"KVM_STATS_TYPE_LINEAR_HIST":       uint64(StatLinearHist),
	"KVM_STATS_TYPE_LOG_HIST":          uint64(StatLogHist),
	"KVM_STATS_UNIT_NONE >> 4":         uint64(StatNoUnit),
	"KVM_STATS_UNIT_BYTES >> 4":        uint64(StatBytes),
	"KVM_STATS_UNIT_SECONDS >> 4":      uint64(StatSeconds),
	"KVM_STATS_UNIT_CYCLES >> 4":       uint64(StatCycles),
	"KVM_STATS_UNIT_BOOLEAN >> 4":      uint64(StatBoolean),
}

// goLayout returns the offsets of all fields of typ, nested structs that have no
// name of their own included.
func goLayout(typ reflect.Type, prefix string, base uintptr, into map[string]uintptr) {
	for f := range typ.Fields() {
		if f.Name == "_" {
			continue
		}
		into[prefix+f.Name] = base + f.Offset
		if f.Type.Kind() == reflect.Struct && f.Type.Name() == "" {
			goLayout(f.Type, prefix+f.Name+".", base+f.Offset, into)
		}
	}
}

func TestLayout(t *testing.T) {
	for _, s := range append(kernelStructs, kernelPayloads...) {
		typ := reflect.TypeOf(s.goType)
		if typ.Size() != s.size {
			t.Errorf("%v has %d bytes, %s %d", typ, typ.Size(), s.cType, s.size)
		}
		if typ.Kind() != reflect.Struct {
			continue
		}
		got := map[string]uintptr{}
		goLayout(typ, "", 0, got)
		for _, f := range s.fields {
			if offset, ok := got[f.goName]; !ok || offset != f.offset {
				t.Errorf("%v.%s is at %d (%v), %s.%s at %d", typ, f.goName, offset, ok, s.cType, f.cName, f.offset)
			}
			delete(got, f.goName)
		}
		if len(got) != 0 {
			t.Errorf("%v has fields that this test does not: %v", typ, got)
		}
	}
	if got := mmioDataOffset; got != 40 {
		t.Errorf("the data of an MMIO exit is at %d of the run area, want 40", got)
	}
}

func TestRequestNumbers(t *testing.T) {
	for name, nr := range kernelRequests {
		if nr.got != nr.want {
			t.Errorf("%s is %#x, want %#x", name, nr.got, nr.want)
		}
	}
}

// TestLayoutAgainstHeader has a C compiler say what the installed kernel headers
// make of every struct, request and constant. What headers older than this
// package lack is logged: TestLayout has it still.
func TestLayoutAgainstHeader(t *testing.T) {
	gvmtest.Need(t, gvmtest.CC)
	want := map[string]uint64{}
	var src strings.Builder
	src.WriteString("#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n")
	ask := func(guard, expr string, value uint64) {
		want[expr] = value
		if guard != "" {
			fmt.Fprintf(&src, "#ifdef %s\n", guard)
		}
		fmt.Fprintf(&src, "printf(\"%%s = %%llu\\n\", %q, (unsigned long long)(%s));\n", expr, expr)
		if guard != "" {
			src.WriteString("#endif\n")
		}
	}
	guard := func(s kernelStruct) string {
		if s.newer {
			return "KVM_SET_USER_MEMORY_REGION2" // came with all of these
		}
		return ""
	}
	for _, s := range kernelStructs {
		ask(guard(s), fmt.Sprintf("sizeof(%s)", s.cType), uint64(s.size))
		for _, f := range s.fields {
			ask(guard(s), fmt.Sprintf("offsetof(%s, %s)", s.cType, f.cName), uint64(f.offset))
		}
	}
	for _, s := range kernelPayloads {
		ask(guard(s), fmt.Sprintf("sizeof(((struct kvm_run *)0)->%s)", s.cType), uint64(s.size))
		for _, f := range s.fields {
			ask(guard(s), fmt.Sprintf("offsetof(struct kvm_run, %s.%s)", s.cType, f.cName), uint64(unionAt+f.offset))
		}
	}
	for name, nr := range kernelRequests {
		ask(name, name, uint64(nr.got))
	}
	for c, name := range capNames {
		ask(name, name, uint64(c))
	}
	for n, name := range exitNames {
		if name != "" {
			ask(name, name, uint64(n))
		}
	}
	for expr, value := range kernelConsts {
		name, _, _ := strings.Cut(expr, " ")
		ask(name, expr, value)
	}
	src.WriteString("return 0; }\n")

	dir := t.TempDir()
	file, bin := filepath.Join(dir, "layout.c"), filepath.Join(dir, "layout")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cc", "-o", bin, file).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		expr, text, _ := strings.Cut(strings.TrimSpace(line), " = ")
		if ours := fmt.Sprint(want[expr]); text != ours {
			t.Errorf("%s is %s to the header, %s to us", expr, text, ours)
		}
		delete(want, expr)
	}
	if len(want) != 0 {
		t.Logf("not in the installed header: %s", strings.Join(slices.Sorted(maps.Keys(want)), ", "))
	}
}
