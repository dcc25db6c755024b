#include "go_asm.h"
#include "textflag.h"

// The child has one thread, in the middle of a Go program all other threads of which have
// gone, with their locks held. So it runs nothing that a compiler has made: a function of
// Go, however small, may be given code that counts, checks or moves it. These instructions
// use no stack and no memory but the plan, and can unmap all else.
//
// One mapping is not theirs to unmap: the area of restartable sequences that a C library
// has registered for the thread (rseq(2)). The kernel writes to it whenever it resumes the
// thread, and a fork inherits it. Who shares the memory of his parent does not. So a helper
// is made first, as vfork(2) makes one; it forks the child for its parent, and exits.

#define SYS_WRITE          1
#define SYS_READ           0
#define SYS_MUNMAP         11
#define SYS_RT_SIGPROCMASK 14
#define SYS_DUP2           33
#define SYS_CLONE          56
#define SYS_PRCTL          157
#define SYS_EXIT_GROUP     231
#define SYS_CLOSE_RANGE    436

#define SIG_SETMASK 2
#define CLONE_VM     0x100
#define CLONE_FILES  0x400
#define CLONE_PIDFD  0x1000
#define CLONE_VFORK  0x4000
#define CLONE_PARENT 0x8000
#define PR_SET_NAME 15

// func cloneAlone(plan unsafe.Pointer) (helper int)
TEXT ·cloneAlone(SB), NOSPLIT, $0-16
	MOVQ plan+0(FP), BX

	// A signal must find no handler in the child, so it is born with all blocked.
	MOVQ $SIG_SETMASK, DI
	LEAQ forkPlan_all(BX), SI
	LEAQ forkPlan_mask(BX), DX
	MOVQ $8, R10
	MOVQ $SYS_RT_SIGPROCMASK, AX
	SYSCALL

	// This thread goes on when the helper has exited. Neither process is to send a
	// signal at its end, or be seen by anybody else's wait.
	MOVQ $(CLONE_VM|CLONE_FILES|CLONE_VFORK), DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVQ $SYS_CLONE, AX
	SYSCALL
	TESTQ AX, AX
	JNE  parent

	MOVQ $(CLONE_PARENT|CLONE_PIDFD), DI
	XORL SI, SI
	LEAQ forkPlan_pidfd(BX), DX
	XORL R10, R10
	XORL R8, R8
	MOVQ $SYS_CLONE, AX
	SYSCALL
	TESTQ AX, AX
	JNE  helper
	JMP  ·alone(SB)

helper:
	MOVQ AX, forkPlan_pid(BX)
	XORL DI, DI
	MOVQ $SYS_EXIT_GROUP, AX
	SYSCALL
	JMP  helper

parent:
	MOVQ AX, helper+8(FP)
	MOVQ $SIG_SETMASK, DI
	LEAQ forkPlan_mask(BX), SI
	XORL DX, DX
	MOVQ $8, R10
	MOVQ $SYS_RT_SIGPROCMASK, AX
	SYSCALL
	RET

// alone is the child, with the plan in BX. It does not return.
TEXT ·alone(SB), NOSPLIT|NOFRAME, $0-0
	// Of the descriptors only the socket stays, as number 0.
	MOVLQSX forkPlan_socket(BX), DI
	XORL SI, SI
	MOVQ $SYS_DUP2, AX
	MOVQ $const_forkDup2, R13
	SYSCALL
	TESTQ AX, AX
	JLT  failed
	MOVQ $1, DI
	MOVL $-1, SI
	XORL DX, DX
	MOVQ $SYS_CLOSE_RANGE, AX
	MOVQ $const_forkCloseRange, R13
	SYSCALL
	TESTQ AX, AX
	JLT  failed

	MOVQ $PR_SET_NAME, DI
	LEAQ forkPlan_name(BX), SI
	MOVQ $SYS_PRCTL, AX
	SYSCALL

	// A mapping of a file holds that as a descriptor does, and a copy of memory that the
	// other side stores to costs it a copy.
	MOVQ $const_forkMunmap, R13
	MOVQ forkPlan_ngaps(BX), R12
	LEAQ forkPlan__size(BX), R8

unmap:
	TESTQ R12, R12
	JEQ  unmapped
	MOVQ 0(R8), DI
	MOVQ 8(R8), SI
	MOVQ $SYS_MUNMAP, AX
	SYSCALL
	TESTQ AX, AX
	JLT  failed
	ADDQ $16, R8
	DECQ R12
	JMP  unmap

unmapped:
	XORL DI, DI
	LEAQ forkPlan_report(BX), SI
	MOVQ $forkReport__size, DX
	MOVQ $SYS_WRITE, AX
	SYSCALL

	// Nothing is ever written to the other end. At its end a read returns 0; it fails
	// for a stop and a continue.
wait:
	XORL DI, DI
	LEAQ forkPlan_report(BX), SI
	MOVQ $1, DX
	MOVQ $SYS_READ, AX
	SYSCALL
	CMPQ AX, $-4 // EINTR
	JEQ  wait
	XORL DI, DI

exit:
	MOVQ $SYS_EXIT_GROUP, AX
	SYSCALL
	JMP  exit

failed:
	MOVQ AX, (forkPlan_report+forkReport_errno)(BX)
	MOVQ R13, (forkPlan_report+forkReport_call)(BX)
	MOVLQSX forkPlan_socket(BX), DI
	CMPQ R13, $const_forkDup2
	JEQ  say
	XORL DI, DI

say:
	LEAQ forkPlan_report(BX), SI
	MOVQ $forkReport__size, DX
	MOVQ $SYS_WRITE, AX
	SYSCALL
	MOVQ $1, DI
	JMP  exit

// func aloneCode() uintptr
TEXT ·aloneCode(SB), NOSPLIT, $0-8
	LEAQ ·alone(SB), AX
	MOVQ AX, ret+0(FP)
	RET
