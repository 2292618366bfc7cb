"""Hosts with another kernel: Debian's, in qemu, on this machine's own file tree.

::

    with Guest() as guest:                                  # up in 5 to 15 s, without /dev/kvm
        done = guest.run([sys.executable, "-m", "tests.guest.checks"], cwd=CHECKOUT)
        done.returncode, done.stdout, done.stderr

The root is this machine's ``/`` by virtiofs, below an overlay in the guest's memory: the same programs and libraries at
the same paths, and nothing that the guest writes reaches this machine.  ``/tmp``, ``/run`` and ``/dev/shm`` are the
guest's own.  It is emulated and runs at a tenth to a thirtieth of the machine's speed: correctness only, no timings
(TCPMIG_GUEST_KVM=1 takes /dev/kvm).
"""

from tests.guest.guest import Guest, Nic

__all__ = ["Guest", "Nic"]
