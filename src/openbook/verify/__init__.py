"""Checks of a release that need no trust in whoever made it.

`openbook.verify` is a public function, and Python puts this package in its place as soon as anything imports it. So the
package can be called, and is the function.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openbook.verify.verification import Verification


class _Verify(ModuleType):
    def __call__(
        self,
        release: str | Path,
        *,
        replay: int = 0,
        rebuild: bool = False,
        seed: int | None = None,
        threads: int | None = None,
    ) -> Verification:
        """See `openbook.verify.verification.verify`."""
        from openbook.verify.verification import verify

        return verify(release, replay=replay, rebuild=rebuild, seed=seed, threads=threads)


sys.modules[__name__].__class__ = _Verify
