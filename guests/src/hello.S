# hello prints a greeting and exits.
	.include "abi.inc"
	leaq	greeting(%rip), %rsi
	movl	$length, %ecx
	movw	$PORT_CONSOLE, %dx
	rep outsb
	ARG	0, %rax			# status
	EXIT

greeting:
	.ascii	"Hello from a guest in long mode at CPL 3.\n"
	.set length, . - greeting
