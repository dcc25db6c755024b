/* Two processors or more: they are started by INIT and SIPI, and count together. */
#include "image.h"

enum { ROUNDS = 1000, MOST = 16, TRAMPOLINE = 0x8000 };

static volatile uint32_t *const apic = (uint32_t *)0xfee00000;
enum { ID = 0x20 / 4, SPURIOUS = 0xf0 / 4, COMMAND = 0x300 / 4 };

extern char trampoline[], trampoline_end[];
volatile uint32_t lock, here, total, done;
volatile uint8_t seen[MOST];
uint8_t stacks[MOST][1024] __attribute__((aligned(16)));

__asm__(".pushsection .text\n"
	".code16\n"
	".globl trampoline, trampoline_end\n"
	"trampoline: cli; xorw %ax, %ax; movw %ax, %ds\n"
	"lgdtl (0x8000 + tgdtr - trampoline)\n"
	"movl %cr0, %eax; orl $1, %eax; movl %eax, %cr0\n"
	"ljmpl $8, $flat\n"
	".balign 8\n"
	"tgdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff\n"
	"tgdtr: .word 23; .long 0x8000 + tgdt - trampoline\n"
	"trampoline_end:\n"
	".code32\n"
	"flat: movw $16, %ax; movw %ax, %ds; movw %ax, %es; movw %ax, %ss\n"
	"movl $1, %eax; lock xaddl %eax, here; incl %eax\n"
	"shll $10, %eax; leal stacks+1024(%eax), %esp\n"
	"call another\n"
	"1: cli; hlt; jmp 1b\n"
	".popsection");

static void count(void)
{
	for (int i = 0; i < ROUNDS; i++) {
		while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			__asm__ volatile("pause");
		total++;
		__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
	}
	seen[(apic[ID] >> 24) % MOST] = 1;
	__atomic_fetch_add(&done, 1, __ATOMIC_SEQ_CST);
}

void another(void)
{
	count();
}

void trap(struct frame *f)
{
	print("vector %d, error 0x%x, eip 0x%x\n", f->vector, f->error, f->eip);
	quit(1);
}

static void command(uint32_t v)
{
	apic[COMMAND] = v;
	while (apic[COMMAND] & 1 << 12)
		__asm__ volatile("pause");
}

/* Waits for about a hundredth of a second, by the timer's third channel. */
static void wait(void)
{
	outb(0x61, (inb(0x61) & ~2) | 1);
	outb(0x43, 0xb0);
	outb(0x42, 11932 & 0xff), outb(0x42, 11932 >> 8);
	while (!(inb(0x61) & 0x20))
		;
}

int main(uint32_t magic, const struct information *info)
{
	uint32_t processors;

	(void)magic, (void)info;
	load_idt();
	outw(0x510, 5); /* fw_cfg: how many processors */
	processors = inb(0x511);
	processors |= inb(0x511) << 8;
	print("%d processors\n", processors);
	for (char *p = trampoline; p < trampoline_end; p++)
		((volatile char *)TRAMPOLINE)[p - trampoline] = *p;
	apic[SPURIOUS] |= 0x100;
	command(0xc4500); /* INIT to all but this one */
	wait();
	command(0xc4600 | TRAMPOLINE >> 12); /* SIPI */
	count();
	while (done < processors)
		__asm__ volatile("pause");
	print("they have counted to %d\n", total);
	for (uint32_t i = 0; i < MOST; i++)
		if (seen[i])
			print("processor %d was here\n", i);
	return total == processors * ROUNDS ? 0 : 2;
}
