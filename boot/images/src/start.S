# The start of an image in C: a multiboot header, a stack, and descriptors of its own.

	.set MAGIC, 0x1badb002
	.set FLAGS, 3			# modules at pages, and the memory fields

	.section .header, "a"
	.balign	4
	.long	MAGIC, FLAGS, -(MAGIC + FLAGS)

	.text
	.globl	start
start:	movl	$stack, %esp
	lgdt	gdtr
	ljmp	$8, $1f
1:	movl	$16, %ecx
	movl	%ecx, %ds
	movl	%ecx, %es
	movl	%ecx, %ss
	pushl	%ebx			# the multiboot information
	pushl	%eax			# and the magic
	call	main
	pushl	%eax
	call	quit

# Entries of the IDT, 16 bytes apart. All go to trap(struct frame *) in C.
	.globl	entries
	.balign	16
entries:
	.set vector, 0
	.rept	80
	.balign	16
	.if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17)
	nop				# there is an error code
	nop
	.else
	pushl	$0
	.endif
	pushl	$vector
	jmp	common
	.set vector, vector + 1
	.endr

common:	pushal
	pushl	%esp
	cld
	call	trap
	addl	$4, %esp
	popal
	addl	$8, %esp
	iretl

	.data
	.balign	8
	.globl	gdtr
gdt:	.quad	0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:	.word	gdtr - gdt - 1
	.long	gdt

	.bss
	.balign	16
	.skip	16384
stack:

	.section .note.GNU-stack, "", @progbits
