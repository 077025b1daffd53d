# SPDX-License-Identifier: Apache-2.0
"""What came of a command that ran inside the kernel under test."""

from dataclasses import dataclass

from tests.system.guest.errors import GuestError

SKIPPED = 77  # the C tests' exit code for "this kernel lacks what the test needs"
_SHOWN_CHARACTERS = 6000


@dataclass(frozen=True)
class Result:
    """``code``: exit code, or minus the signal. ``over_limit``: it was ended because its time was up."""

    command: tuple[str, ...]
    code: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    seconds: float
    over_limit: bool

    @property
    def stdout(self) -> str:
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode(errors="replace")

    def describe(self) -> str:
        """The command, how it ended and the end of what it said."""
        ended = f"exit {self.code}" if self.code >= 0 else f"ended by signal {-self.code}"
        if self.over_limit:
            ended = "over its limit"
        text = f"{' '.join(self.command)}: {ended} after {self.seconds:.1f} s"
        for name, said in (("stdout", self.stdout), ("stderr", self.stderr)):
            if said:
                text += f"\n--- {name}\n{said[-_SHOWN_CHARACTERS:].rstrip()}"
        return text

    def check(self, *codes: int) -> "Result":
        """Itself if it ended with one of these codes (default 0), else GuestError with all that it said."""
        if self.over_limit or self.code not in (codes or (0,)):
            raise GuestError(self.describe())
        return self
