"""A machine whose kernel lets no process look into another's memory files: put this folder first into PYTHONPATH.

Every Python process gives up what would let it look into those of others (CAP_SYS_PTRACE), and closes its own to them
(`PR_SET_DUMPABLE`), as hardened hosts and containers do. Nothing of ours is replaced: the kernel refuses.
"""

import ctypes

_PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 4, 24
_CAP_SYS_PTRACE, _CAPABILITY_VERSION_3 = 19, 0x20080522


def _close() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_CAPBSET_DROP, _CAP_SYS_PTRACE, 0, 0, 0)  # without the right to, there is nothing to give up
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, for 64 of them
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):
        sets[place] &= ~(1 << _CAP_SYS_PTRACE)
    if libc.capset(header, sets) or libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "capset")


_close()
