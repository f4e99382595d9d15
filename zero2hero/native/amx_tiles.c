/* Answer one question that a hypervisor refuses to answer.

   PyTorch's bf16 products run on AMX tiles where the processor announces them (CPUID leaf 7), and read the tiles'
   size from CPUID leaves 0x1D and 0x1E. Some virtual machines pass the tiles through but hide those two leaves: the size
   reads as zero, the tiles stay unconfigured, and the first product dies with SIGILL although the hardware is whole.

   Between amx_tiles_begin and amx_tiles_end the calling thread's CPUID instructions fault (arch_prctl
   ARCH_SET_CPUID, Linux), and the handler answers them: as the processor does, but with the architecture's only tile
   palette filled in (Intel SDM volume 2, CPUID leaves 1DH and 1EH: 8 tiles of 16 rows by 64 bytes). oneDNN asks once,
   at its first bf16 products, and remembers; so the window is as short as a few small products.

   A thread that starts inside the window inherits the trap. So the caller starts torch's threads beforehand, and the
   handler stays after the window: a thread that is still trapped is answered once more, and freed. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

static struct sigaction previous;
static volatile int window_open, installed;

static void answer(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)reg[REG_RIP];
    if (code[0] != 0x0F || code[1] != 0xA2) { /* a fault of its own: let it happen again under the old handler */
        sigaction(SIGSEGV, &previous, 0);
        return;
    }
    unsigned leaf = (unsigned)reg[REG_RAX], sub = (unsigned)reg[REG_RCX], a, b, c, d;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, sub, a, b, c, d);
    if (window_open) syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 0 && a < 0x1E) a = 0x1E;
    if (leaf == 0x1D && sub == 0) a = 1, b = c = d = 0;
    if (leaf == 0x1D && sub == 1) a = 8192 | 1024u << 16, b = 64 | 8u << 16, c = 16, d = 0;
    if (leaf == 0x1E && sub == 0) a = 0, b = 16 | 64u << 8, c = d = 0;
    reg[REG_RAX] = a, reg[REG_RBX] = b, reg[REG_RCX] = c, reg[REG_RDX] = d;
    reg[REG_RIP] += 2;
}

int amx_tiles_begin(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO;
    if (!installed && sigaction(SIGSEGV, &action, &previous)) return -1;
    installed = window_open = 1;
    return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
}

void amx_tiles_end(void) {
    window_open = 0;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
}
