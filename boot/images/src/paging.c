/* Paging by tables of the image's own, of two levels. */
#include "image.h"

enum { PRESENT = 1, WRITE = 2, ACCESSED = 0x20, DIRTY = 0x40, PAGE = 4096 };

static uint32_t directory[1024] __attribute__((aligned(4096)));
static uint32_t low[1024] __attribute__((aligned(4096)));  /* the first 4 MiB, as they are */
static uint32_t high[1024] __attribute__((aligned(4096))); /* 4 MiB at 0xc0000000, for trials */
static uint32_t data[2][1024] __attribute__((aligned(4096)));

static volatile uint32_t *const window = (uint32_t *)0xc0000000;

static uint32_t cr2(void)
{
	uint32_t v;
	__asm__ volatile("movl %%cr2, %0" : "=r"(v));
	return v;
}

static void invlpg(volatile void *p) { __asm__ volatile("invlpg (%0)" : : "r"(p) : "memory"); }

void trap(struct frame *f)
{
	if (f->vector != 14) {
		print("vector %d, error 0x%x, eip 0x%x\n", f->vector, f->error, f->eip);
		quit(1);
	}
	print("page fault at 0x%x, error 0x%x\n", cr2(), f->error);
	high[(cr2() >> 12) & 1023] |= PRESENT | WRITE; /* and once more */
	invlpg((void *)cr2());
}

static void bits(const char *when, int page)
{
	print("%s: %s, %s\n", when, high[page] & ACCESSED ? "accessed" : "not accessed", high[page] & DIRTY ? "dirty" : "not dirty");
}

int main(uint32_t magic, const struct information *info)
{
	(void)magic, (void)info;
	console = 0xe9;
	load_idt();
	for (uint32_t i = 0; i < 1024; i++)
		low[i] = i * PAGE | PRESENT | WRITE;
	directory[0] = (uint32_t)low | PRESENT | WRITE;
	directory[0xc0000000 >> 22] = (uint32_t)high | PRESENT | WRITE;
	high[0] = (uint32_t)data[0] | PRESENT | WRITE;
	high[1] = (uint32_t)data[1]; /* not present */
	high[2] = (uint32_t)data[0] | PRESENT; /* read-only */
	__asm__ volatile("movl %0, %%cr3" : : "r"(directory));
	__asm__ volatile("movl %%cr0, %%eax; orl $0x80010000, %%eax; movl %%eax, %%cr0" : : : "eax", "memory");
	print("paging is on\n");

	bits("a page that is not used", 0);
	data[0][0] = 0x1111;
	print("read: 0x%x\n", window[0]);
	bits("a page that was read", 0);
	window[1] = 0x2222;
	bits("a page that was written", 0);
	print("the other way: 0x%x\n", ((volatile uint32_t *)data[0])[1]);

	window[1024] = 0x3333;
	print("after the fault: 0x%x\n", ((volatile uint32_t *)data[1])[0]);
	print("read-only: 0x%x\n", window[2048 + 1]);
	window[2048 + 1] = 0x4444;
	print("after the fault: 0x%x\n", window[1]);

	high[0] = (uint32_t)data[1] | PRESENT | WRITE;
	invlpg(window);
	print("another page: 0x%x\n", window[0]);
	return 3;
}
