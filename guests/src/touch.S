# touch reads or writes a working set in a chosen order. The value written to
# the first word of a page is the number of the access, from 1.
	.include "abi.inc"
	.set RESULT_SUM, 0x08		# sum of the words read

	ARG	0, %r8			# pages
	ARG	1, %r9			# accesses
	ARG	2, %r10			# order: 0 sequential, 1 random, 2 strided
	ARG	3, %r12			# write, not read
	ARG	4, %r13			# seed
	ARG	5, %r14			# stride in pages
	movq	%rdx, %r11
	movq	PARAM_RAM(%rdi), %rbx
	xorl	%r15d, %r15d		# accesses done
	xorl	%ebp, %ebp		# page to touch next
	testq	%r8, %r8
	jz	done
	cmpq	$2, %r10
	je	next
	movl	$1, %r14d		# sequential: a stride of one page
next:
	cmpq	%r9, %r15
	je	done
	incq	%r15
	cmpq	$1, %r10
	jne	inorder
	RANDOM	%r13, %rax
	movq	%r13, %rax
	xorl	%edx, %edx
	divq	%r8
	movq	%rdx, %rbp
inorder:
	movq	%rbp, %rax
	shlq	$12, %rax
	testq	%r12, %r12
	jnz	write
	movq	(%rbx,%rax), %rax
	addq	%rax, RESULT_SUM(%r11)
	jmp	touched
write:
	movq	%r15, (%rbx,%rax)
touched:
	movq	%r15, RESULT_PROGRESS(%r11)
	movq	%rbp, %rax
	addq	%r14, %rax
	xorl	%edx, %edx
	divq	%r8
	movq	%rdx, %rbp
	jmp	next
done:
	xorl	%eax, %eax
	EXIT
