# stamp writes 1, 2, 3, ... to pages in a pseudo-random order, for ever or up to
# a limit. Every vCPU has a word of its own in each page, and its own order.
	.include "abi.inc"
	ARG	0, %r8			# pages
	ARG	1, %r13			# seed
	ARG	2, %r9			# limit, or 0 for none
	movq	%rdx, %r11
	movq	PARAM_RAM(%rdi), %rbx
	leaq	(%rbx,%rsi,8), %rbx
	addq	%rsi, %r13		# vCPU 1 goes another way than vCPU 0
	xorl	%r15d, %r15d		# stamps written
again:
	RANDOM	%r13, %rax
	movq	%r13, %rax
	xorl	%edx, %edx
	divq	%r8
	shlq	$12, %rdx
	incq	%r15
	movq	%r15, (%rbx,%rdx)
	movq	%r15, RESULT_PROGRESS(%r11)	# after the stamp: who reads n knows that n stamps are out
	cmpq	%r9, %r15
	jne	again
	xorl	%eax, %eax
	EXIT
