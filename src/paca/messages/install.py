"""How to install a package that paca needs for some of what it does."""

from __future__ import annotations


def how_to_install(extra: str | None, *packages: str) -> str:
    """A sentence for the end of a message.

    Args:
        extra: Of paca; None where none brings the packages.
        packages: Their names for pip; the extra's own name if absent.
    """
    pip = f"pip install {' '.join(packages) or extra}"
    if extra is None:
        return f"Install it: {pip}"
    return f'Install paca\'s extra {extra}: pip install "./paca[{extra}]", or: {pip}'
