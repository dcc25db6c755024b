# counter adds 1 to a word in each of its pages, round after round. Every vCPU
# has a word of its own.
	.include "abi.inc"
	ARG	0, %r8			# pages
	ARG	1, %r9			# rounds
	ARG	2, %r10			# mark every so many rounds, or never
	movq	%rdx, %r11
	movq	PARAM_RAM(%rdi), %rbx
	leaq	(%rbx,%rsi,8), %rbx	# this vCPU's word in the first page
	xorl	%r12d, %r12d		# rounds done
	movq	%r10, %r13		# rounds until the next mark
	testq	%r9, %r9
	jz	done
round:
	movq	%rbx, %rax
	movq	%r8, %rcx
	testq	%rcx, %rcx
	jz	rounded
word:
	incq	(%rax)
	addq	$PAGE, %rax
	decq	%rcx
	jnz	word
rounded:
	incq	%r12
	movq	%r12, RESULT_PROGRESS(%r11)
	decq	%r13			# from 0 it takes 2^64 rounds to come back: never
	jnz	nomark
	movl	%r12d, %eax
	movw	$PORT_MARK, %dx
	outl	%eax, %dx
	movq	%r10, %r13
nomark:
	cmpq	%r9, %r12
	jne	round
done:
	xorl	%eax, %eax
	EXIT
