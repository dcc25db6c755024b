# echo sends back what the UART receives, until an end of transmission (4).
	.include "abi.inc"
	.set LSR_READY, 1		# a character has arrived
	.set LSR_EMPTY, 0x20		# one can be sent
	movq	%rdx, %r11
again:
	movw	$PORT_UART + 5, %dx
	inb	%dx, %al
	testb	$LSR_READY, %al
	jz	again
	movw	$PORT_UART, %dx
	inb	%dx, %al
	incq	RESULT_PROGRESS(%r11)
	cmpb	$4, %al
	je	done
	movb	%al, %cl
busy:
	movw	$PORT_UART + 5, %dx
	inb	%dx, %al
	testb	$LSR_EMPTY, %al
	jz	busy
	movb	%cl, %al
	movw	$PORT_UART, %dx
	outb	%al, %dx
	jmp	again
done:
	xorl	%eax, %eax
	EXIT
