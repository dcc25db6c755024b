/* Interrupts: from software, from instructions that fail, and from the timer. */
#include "image.h"

static volatile uint32_t ticks;
static volatile uint32_t *const apic = (uint32_t *)0xfee00000;
static volatile uint32_t *const ioapic = (uint32_t *)0xfec00000;

/* Waits for interrupts of the timer. */
static void wait(uint32_t n)
{
	for (ticks = 0; ticks < n;)
		__asm__ volatile("sti; hlt; cli");
}

void trap(struct frame *f)
{
	switch (f->vector) {
	case 0:
		print("divide error\n");
		f->eip += 2; /* behind the div */
		break;
	case 3:
		print("breakpoint\n");
		break;
	case 6:
		print("invalid opcode\n");
		f->eip += 2; /* behind the ud2 */
		break;
	case 13:
		print("general protection, error 0x%x\n", f->error);
		f->eip += 2; /* behind the int */
		break;
	case 32:
		ticks++;
		outb(0x20, 0x20);
		break;
	case 48:
		ticks++;
		apic[0xb0 / 4] = 0;
		break;
	case 64:
		print("interrupt 64, eax is 0x%x\n", f->eax);
		f->eax = 0x600d;
		break;
	default:
		print("vector %d, error 0x%x, eip 0x%x\n", f->vector, f->error, f->eip);
		quit(1);
	}
}

int main(uint32_t magic, const struct information *info)
{
	uint32_t eax = 0x1234;

	print("multiboot: eax is 0x%x, %d KiB below 1 MiB\n", magic, info->mem_lower);
	load_idt();
	__asm__ volatile("int $64" : "+a"(eax));
	print("it returns 0x%x\n", eax);
	__asm__ volatile("int3");
	__asm__ volatile("ud2");
	__asm__ volatile("xorl %%ecx, %%ecx; divl %%ecx" : : "a"(1), "d"(0) : "ecx");
	__asm__ volatile("int $100"); /* which the IDT does not have */

	/* The interrupt controllers: from vector 32, the timer and nobody else. */
	outb(0x20, 0x11), outb(0xa0, 0x11);
	outb(0x21, 32), outb(0xa1, 40);
	outb(0x21, 4), outb(0xa1, 2);
	outb(0x21, 1), outb(0xa1, 1);
	outb(0x21, 0xfe), outb(0xa1, 0xff);
	outb(0x43, 0x34); /* channel 0, a rate of 200 Hz */
	outb(0x40, 5966 & 0xff), outb(0x40, 5966 >> 8);
	wait(5);
	outb(0x21, 0xff);
	print("the timer ticks\n");

	/* And by way of the APICs: the timer is the third input, for this processor, as vector 48. */
	apic[0xf0 / 4] |= 0x100;
	ioapic[0] = 0x10 + 2 * 2 + 1;
	ioapic[4] = apic[0x20 / 4] & 0xff000000;
	ioapic[0] = 0x10 + 2 * 2;
	ioapic[4] = 48;
	wait(5);
	print("the timer ticks by way of the IOAPIC\n");
	return 0;
}
