/* What the images share: see image.c. */
#ifndef IMAGE_H
#define IMAGE_H

#include <stdint.h>

/* What an interrupt has pushed. */
struct frame {
	uint32_t edi, esi, ebp, esp, ebx, edx, ecx, eax;
	uint32_t vector, error, eip, cs, eflags;
};

/* The multiboot information, as far as it is looked at. */
struct information {
	uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr;
};

/* The image's own. */
int main(uint32_t magic, const struct information *info);
void trap(struct frame *f);

extern uint16_t console; /* the port that print writes to */
void print(const char *format, ...); /* %s, %d, %x and %% */
void quit(int value) __attribute__((noreturn)); /* by isa-debug-exit: status 2 * value + 1 */
void load_idt(void);

static inline void outb(uint16_t port, uint8_t v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outw(uint16_t port, uint16_t v) { __asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outl(uint16_t port, uint32_t v) { __asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(port)); }
static inline uint8_t inb(uint16_t port)
{
	uint8_t v;
	__asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}

#endif
