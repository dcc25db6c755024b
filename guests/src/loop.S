# loop executes two instructions over and over: a measure of how fast the host
# runs guest code.
	.include "abi.inc"
	ARG	0, %rcx			# iterations
again:
	decq	%rcx
	jnz	again
	xorl	%eax, %eax
	EXIT
