"""Root may read and write everywhere. What follows `give_up_privileges` may not, on a real file system."""

from __future__ import annotations

import ctypes
import os

_PR_CAPBSET_DROP = 24
_OF_FILES = range(4)  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
_VERSION = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def give_up_privileges() -> None:
    """Let the modes of files hold for this process (its only thread) and those that it starts, also if it is root's.

    Another user (setuid) would not do: Python itself may lie in root's home, which that user may not enter.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION, 0), (_Data * 2)()
    for capability in _OF_FILES:
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.capget(ctypes.byref(header), data)
    for capability in _OF_FILES:
        data[0].effective &= ~(1 << capability)
        data[0].permitted &= ~(1 << capability)
    data[0].inheritable = data[1].inheritable = 0
    if libc.capset(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capset")
