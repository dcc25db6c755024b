# exits writes to a port that does nothing, over and over: a measure of what an
# exit to the VMM costs.
	.include "abi.inc"
	ARG	0, %rcx			# exits
	movw	$PORT_NOP, %dx
again:
	outb	%al, %dx
	decq	%rcx
	jnz	again
	xorl	%eax, %eax
	EXIT
