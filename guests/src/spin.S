# spin runs until it is stopped from outside.
	.include "abi.inc"
again:
	incq	RESULT_PROGRESS(%rdx)
	pause
	jmp	again
