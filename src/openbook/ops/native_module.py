"""Whether the native core is there, asked before it is needed. Imports no torch."""

from __future__ import annotations

from types import ModuleType

from openbook.core.errors import UserError


def require_native() -> ModuleType:
    """The module `openbook.ops._native`.

    Raises:
        UserError: the package was installed without a compiler, this CPU lacks what the kernels need, or the
            environment variable OPENBOOK_ISA names none of its instruction sets.
    """
    try:
        from openbook.ops import _native
    except ImportError as error:
        raise UserError(
            f"openbook was installed without a C++ compiler, so the exact profile's openbook.ops._native is missing "
            f"({error}): install a C++ compiler (Debian: apt install g++), then pip install openbook again, or use "
            "profile fast"
        ) from error
    try:
        _native.isa()
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    return _native


def has_native() -> bool:
    """Whether this installation and CPU have the native core.

    Raises:
        UserError: the environment variable OPENBOOK_ISA names none of this CPU's instruction sets.
    """
    try:
        from openbook.ops import _native
    except ImportError:
        return False
    if not _native.available_isas():
        return False
    require_native()
    return True
