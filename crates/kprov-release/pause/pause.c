/*
 * The program of the pause image: holds a pod's namespaces, reaps orphans, exits on SIGTERM or SIGINT.
 *
 * Freestanding, so that the image holds this one file. As process 1 of a PID namespace it would not get signals that
 * have no handler; blocked signals stay pending even then, so it blocks them and takes them one by one.
 */

enum { SIG_BLOCK = 0, WNOHANG = 1 };
enum { SIGINT = 2, SIGTERM = 15, SIGCHLD = 17 };

#if defined(__x86_64__)
enum { SYS_rt_sigprocmask = 14, SYS_wait4 = 61, SYS_rt_sigtimedwait = 128, SYS_exit_group = 231 };

static long syscall4(long number, long a, long b, long c, long d)
{
	long result;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
enum { SYS_rt_sigprocmask = 135, SYS_wait4 = 260, SYS_rt_sigtimedwait = 137, SYS_exit_group = 94 };

static long syscall4(long number, long a, long b, long c, long d)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}
#else
#error "no system calls known for this architecture"
#endif

void _start(void)
{
	static const unsigned long set = 1UL << (SIGINT - 1) | 1UL << (SIGTERM - 1) | 1UL << (SIGCHLD - 1);

	syscall4(SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, 0, sizeof(set));
	for (;;) {
		long got = syscall4(SYS_rt_sigtimedwait, (long)&set, 0, 0, sizeof(set));
		if (got == SIGINT || got == SIGTERM)
			syscall4(SYS_exit_group, 0, 0, 0, 0);
		/* One SIGCHLD may stand for several children. */
		while (syscall4(SYS_wait4, -1, 0, WNOHANG, 0) > 0)
			;
	}
}
