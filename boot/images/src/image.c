/* A console, an exit and an IDT for images in C. */
#include <stdarg.h>

#include "image.h"

uint16_t console = 0x3f8;

static void put(char c)
{
	if (console == 0x3f8)
		while (!(inb(0x3f8 + 5) & 0x20))
			;
	outb(console, c);
}

static void number(uint32_t n, uint32_t base)
{
	if (n >= base)
		number(n / base, base);
	put("0123456789abcdef"[n % base]);
}

void print(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	for (const char *p = format; *p; p++) {
		if (*p != '%') {
			put(*p);
			continue;
		}
		switch (*++p) {
		case 's':
			for (const char *s = va_arg(args, const char *); *s; s++)
				put(*s);
			break;
		case 'd':
			number(va_arg(args, uint32_t), 10);
			break;
		case 'x':
			number(va_arg(args, uint32_t), 16);
			break;
		default:
			put(*p);
		}
	}
	va_end(args);
}

void quit(int value)
{
	outl(0xf4, value);
	for (;;)
		__asm__ volatile("cli; hlt");
}

extern char entries[];

static struct {
	uint16_t low, selector, kind, high;
} idt[80];

void load_idt(void)
{
	struct __attribute__((packed)) {
		uint16_t limit;
		uint32_t base;
	} idtr = { sizeof idt - 1, (uint32_t)idt };

	for (int i = 0; i < 80; i++) {
		uint32_t entry = (uint32_t)entries + 16 * i;
		idt[i].low = entry;
		idt[i].selector = 8;
		idt[i].kind = 0x8e00; /* present, an interrupt gate */
		idt[i].high = entry >> 16;
	}
	__asm__ volatile("lidt %0" : : "m"(idtr));
}
