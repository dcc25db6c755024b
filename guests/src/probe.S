# probe does what the host posts in its result words, one access at a time, and
# waits for the next without leaving the guest.
	.include "abi.inc"
	.set PROBE_POSTED, 0x08		# host: number of the newest request, from 1
	.set PROBE_OP,     0x10		# host: what to do, see below
	.set PROBE_ADDR,   0x18		# host: where
	.set PROBE_VALUE,  0x20		# host: the value to store, to add, or to exit with
	.set PROBE_RESULT, 0x28		# guest: the value loaded
	.set PROBE_LOAD,  0
	.set PROBE_STORE, 1
	.set PROBE_ADD,   2
	.set PROBE_EXIT,  3

	movq	%rdx, %r11
	xorl	%r12d, %r12d		# requests done
wait:
	pause
	movq	PROBE_POSTED(%r11), %rax
	cmpq	%rax, %r12
	je	wait
	movq	%rax, %r12
	movq	PROBE_OP(%r11), %rcx
	movq	PROBE_ADDR(%r11), %rsi
	movq	PROBE_VALUE(%r11), %rax
	cmpq	$PROBE_EXIT, %rcx
	je	exit
	cmpq	$PROBE_STORE, %rcx
	je	store
	cmpq	$PROBE_ADD, %rcx
	je	add
	movq	(%rsi), %rax
	movq	%rax, PROBE_RESULT(%r11)
	jmp	done
store:
	movq	%rax, (%rsi)
	jmp	done
add:
	addq	%rax, (%rsi)
done:
	movq	%r12, RESULT_PROGRESS(%r11)	# after the access and its result
	jmp	wait
exit:
	EXIT
