# hello prints a greeting and exits.
	.include "abi.inc"
	leaq	greeting(%rip), %rax
	movw	$PORT_PRINT, %dx
	outl	%eax, %dx
	ARG	0, %rax			# status
	EXIT

greeting:
	.asciz	"Hello from a guest in long mode at CPL 3.\n"
