// SPDX-License-Identifier: GPL-2.0
// A kernel that hangs: its processor spins with interrupts off and answers nobody, while the hypervisor
// sees a domain that runs. Debian's kernel has no module that does so.
#include <linux/irqflags.h>
#include <linux/module.h>

static int __init spin(void)
{
	local_irq_disable();
	for (;;)
		cpu_relax();
	return 0;
}

module_init(spin);
MODULE_LICENSE("GPL");
