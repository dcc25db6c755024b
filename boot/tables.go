package boot

import (
	"encoding/binary"

	"github.com/secondmmu/gvm/addr"
)

// Where the tables are that tell what the machine has. MP tables and the root of ACPI's are
// looked for between 0xf0000 and 1 MiB, at multiples of 16.
const (
	mpAt   = tables
	rsdpAt = tables + 0x2000
	acpiAt = tables + 0x2100
)

// What the tables say of the machine.
const (
	IOAPIC    = addr.GPA(0xfec00000)
	LocalAPIC = addr.GPA(0xfee00000)

	// TimerPin is the input of the IOAPIC that the timer is at. All other interrupts of the ISA
	// bus are at the input of their number.
	TimerPin = 2

	PortPM1Event   = 0x600 // status and enable, 2 bytes each
	PortPM1Control = 0x604 // 2 bytes
	PortPMTimer    = 0x608 // 4 bytes, of which 24 bits count
	PortReset      = 0xcf9
	ResetValue     = 0x06
	PMTimerHz      = 3579545
	SleepOff       = 5 // SLP_TYP of soft off
	sci            = 9 // the interrupt of power management

	apicVersion   = 0x14
	ioapicVersion = 0x11
)

// machineTables returns the tables for a PC with so many processors, whose local APICs are
// numbered from 0.
func machineTables(vcpus int) []Segment {
	mp, acpi := mpTables(vcpus), acpiTables(vcpus)
	rsdp := rootPointer()
	return []Segment{
		{Name: "MP tables", GPA: mpAt, Size: uint64(len(mp)), Data: mp},
		{Name: "ACPI root pointer", GPA: rsdpAt, Size: uint64(len(rsdp)), Data: rsdp},
		{Name: "ACPI tables", GPA: acpiAt, Size: uint64(len(acpi)), Data: acpi},
	}
}

// pin returns the input of the IOAPIC that an interrupt of the ISA bus goes to.
func pin(irq byte) byte {
	if irq == 0 {
		return TimerPin
	}
	return irq
}

// checksum sets p[at] so that the bytes of p add up to 0.
func checksum(p []byte, at int) {
	p[at] = 0
	var sum byte
	for _, c := range p {
		sum += c
	}
	p[at] = -sum
}

// mpTables returns the floating pointer and the configuration table of Intel's MP
// specification, version 1.4.
func mpTables(vcpus int) []byte {
	le := binary.LittleEndian
	pointer := append([]byte("_MP_"), words(uint32(mpAt)+16)...)
	pointer = append(pointer, 1, 4, 0, 0, 0, 0, 0, 0) // paragraphs, version, checksum, features
	checksum(pointer, 10)

	var entries []byte
	count := uint16(0)
	add := func(p ...byte) {
		entries = append(entries, p...)
		count++
	}
	for id := range vcpus {
		const enabled, boots = 1, 2
		flags := byte(enabled)
		if id == 0 {
			flags |= boots
		}
		add(append([]byte{0, byte(id), apicVersion, flags}, words(0x600, 0x201, 0, 0)...)...) // a family, an FPU and an APIC
	}
	add(append([]byte{1, 0}, "ISA   "...)...)
	ioapic := byte(vcpus)
	add(append([]byte{2, ioapic, ioapicVersion, 1}, words(uint32(IOAPIC))...)...)
	for irq := range byte(16) {
		if irq != TimerPin { // where the PICs are chained
			add(3, 0, 0, 0, 0, irq, ioapic, pin(irq))
		}
	}
	add(4, 3, 0, 0, 0, 0, 0, 0)    // LINT0: from the PICs
	add(4, 1, 0, 0, 0, 0, 0xff, 1) // LINT1: NMI

	table := append([]byte("PCMP"), 0, 0, 4, 0)
	table = append(table, "GVM     PC          "...)
	table = append(table, words(0, 0, uint32(LocalAPIC), 0)...)
	table = append(table, entries...)
	le.PutUint16(table[4:], uint16(len(table)))
	le.PutUint16(table[34:], count)
	checksum(table, 7)
	return append(pointer, table...)
}

// rootPointer returns ACPI's RSDP, of revision 2.
func rootPointer() []byte {
	p := append([]byte("RSD PTR "), 0)
	p = append(p, "GVM   "...)
	p = append(p, 2)
	p = append(p, words(uint32(acpiAt), 36)...)
	p = quads(p, uint64(acpiAt)+acpiXSDT)
	p = append(p, 0, 0, 0, 0)
	checksum(p[:20], 8)
	checksum(p, 32)
	return p
}

// The tables of ACPI, by their offset from acpiAt.
const (
	acpiRSDT = 0
	acpiXSDT = 0x40
	acpiDSDT = 0x80
	acpiFACS = 0xc0
	acpiFADT = 0x100
	acpiMADT = 0x240

	acpiHeader = 36
)

// acpiTable returns a table with its header.
func acpiTable(signature string, revision byte, body []byte) []byte {
	p := append([]byte(signature), words(uint32(acpiHeader+len(body)))...)
	p = append(p, revision, 0)
	p = append(p, "GVM   PC      "...)
	p = append(p, words(1)...)
	p = append(p, "GVM "...)
	p = append(p, words(1)...)
	p = append(p, body...)
	checksum(p, 9)
	return p
}

// acpiTables returns RSDT, XSDT, DSDT, FACS, FADT and MADT.
func acpiTables(vcpus int) []byte {
	fadt, madt := uint64(acpiAt)+acpiFADT, uint64(acpiAt)+acpiMADT
	facs := append([]byte("FACS"), words(64)...)
	var p []byte
	for _, t := range []struct {
		offset int
		table  []byte
	}{
		{acpiRSDT, acpiTable("RSDT", 1, words(uint32(fadt), uint32(madt)))},
		{acpiXSDT, acpiTable("XSDT", 1, quads(nil, fadt, madt))},
		{acpiDSDT, acpiTable("DSDT", 2, differentiated())},
		{acpiFACS, append(facs, make([]byte, 56)...)},
		{acpiFADT, acpiTable("FACP", 3, fixedDescription())},
		{acpiMADT, acpiTable("APIC", 3, apicDescription(vcpus))},
	} {
		p = append(append(p, make([]byte, t.offset-len(p))...), t.table...)
	}
	return p
}

// differentiated returns the code of the DSDT: how the machine is turned off.
//
//	Name (_S5_, Package () { SleepOff, SleepOff, 0, 0 })
func differentiated() []byte {
	const nameOp, packageOp, byteOp = 0x08, 0x12, 0x0a
	p := append([]byte{nameOp}, "_S5_"...)
	return append(p, packageOp, 8, 4, byteOp, SleepOff, byteOp, SleepOff, 0, 0)
}

// fixedDescription returns the body of the FADT, of revision 3.
func fixedDescription() []byte {
	const (
		legacyDevices, noVGA, noMSI          = 1 << 0, 1 << 2, 1 << 3
		wbinvd, c1, powerButton, sleepButton = 1 << 0, 1 << 2, 1 << 4, 1 << 5
		resetRegister                        = 1 << 10
		inPorts, noC2, noC3                  = 1, 101, 1001
	)
	p := make([]byte, 244-acpiHeader)
	le := binary.LittleEndian
	at := func(offset int) []byte { return p[offset-acpiHeader:] }
	le.PutUint32(at(36), uint32(acpiAt)+acpiFACS)
	le.PutUint32(at(40), uint32(acpiAt)+acpiDSDT)
	le.PutUint16(at(46), sci)
	le.PutUint32(at(56), PortPM1Event)
	le.PutUint32(at(64), PortPM1Control)
	le.PutUint32(at(76), PortPMTimer)
	at(88)[0], at(89)[0], at(91)[0] = 4, 2, 4 // bytes of the three
	le.PutUint16(at(96), noC2)
	le.PutUint16(at(98), noC3)
	at(108)[0] = 0x32 // the register of the clock that has the century
	le.PutUint16(at(109), legacyDevices|noVGA|noMSI)
	le.PutUint32(at(112), wbinvd|c1|powerButton|sleepButton|resetRegister)
	register := func(offset int, bits byte, port uint64) {
		r := at(offset)
		r[0], r[1] = inPorts, bits
		le.PutUint64(r[4:], port)
	}
	register(116, 8, PortReset)
	at(128)[0] = ResetValue
	le.PutUint64(at(132), uint64(acpiAt)+acpiFACS)
	le.PutUint64(at(140), uint64(acpiAt)+acpiDSDT)
	register(148, 32, PortPM1Event)
	register(172, 16, PortPM1Control)
	register(208, 32, PortPMTimer)
	return p
}

// apicDescription returns the body of the MADT.
func apicDescription(vcpus int) []byte {
	const hasPICs, enabled = 1, 1
	p := words(uint32(LocalAPIC), hasPICs)
	for id := range vcpus {
		p = append(p, 0, 8, byte(id), byte(id))
		p = append(p, words(enabled)...)
	}
	p = append(p, 1, 12, byte(vcpus), 0)
	p = append(p, words(uint32(IOAPIC), 0)...)
	p = append(append(p, 2, 10, 0, 0), append(words(TimerPin), 0, 0)...)
	const activeHighLevel = 0xd
	p = append(append(p, 2, 10, 0, sci), append(words(sci), activeHighLevel, 0)...)
	return append(p, 4, 6, 0xff, 0, 0, 1) // LINT1 of all is NMI
}
