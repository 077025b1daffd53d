# SPDX-License-Identifier: Apache-2.0
"""A test is run again only when it ended without a verdict, at most twice, and it is said. Boots nothing."""

from typing import cast

import pytest

from tests.system.guest.errors import GuestError

from .boot import Kernel
from .left_out import PROPERTY, check_passed
from .result import SKIPPED, Result
from .verdict import NO_VERDICT, run_test

LOST = "no verdict: worker 0: the guest shut down"


HALTED = "CPU 0 of the emulated machine is halted"
HANG = GuestError("the guest does not answer any more")


class Scripted:
    """Commands end with these codes, one after the other; or the kernel itself hangs."""

    def __init__(self, *ends: int | GuestError, over_limit: bool = False, halted: int = 0) -> None:
        """``halted``: how many hangs can be shown to be the emulator's."""
        self.ends = list(ends)
        self.over_limit = over_limit
        self.halted = halted
        self.booted = 0

    def __call__(self) -> Kernel:
        self.booted += 1
        return cast(Kernel, self)

    def run(self, command: list[str], timeout: float, environment: None) -> Result:
        end = self.ends.pop(0)
        if isinstance(end, GuestError):
            raise end
        said = f"seed 7\n{LOST}\n".encode() if end == NO_VERDICT else b"seed 7\n"
        return Result(tuple(command), end, said, b"", timeout / 2, self.over_limit and end != 0)

    def stopped(self) -> str | None:
        self.halted -= 1
        return HALTED if self.halted >= 0 else None


def run(kernels: Scripted, request: pytest.FixtureRequest) -> tuple[Result, list[tuple[str, object]]]:
    result = run_test(kernels, "test_x", 10.0, request)
    said = list(request.node.user_properties)
    request.node.user_properties.clear()
    return result, said


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_it_is_run_again_until_there_is_a_verdict(lost: int, request: pytest.FixtureRequest) -> None:
    result, said = run(Scripted(*[NO_VERDICT] * lost, 0), request)
    assert result.code == 0
    assert said == [(PROPERTY, f"run again, {LOST}")] * lost


def test_three_times_without_a_verdict_is_a_failure(request: pytest.FixtureRequest) -> None:
    kernel = Scripted(*[NO_VERDICT] * 4)
    result, _ = run(kernel, request)
    assert len(kernel.ends) == 1
    with pytest.raises(AssertionError, match="exit 75"):
        check_passed(result, [], request)


@pytest.mark.parametrize("code", [1, SKIPPED, -11, 124])
def test_whatever_else_is_not_run_again(code: int, request: pytest.FixtureRequest) -> None:
    kernel = Scripted(code, 0)
    result, said = run(kernel, request)
    assert (result.code, said, kernel.ends) == (code, [], [0])


def test_one_that_is_over_its_limit_is_not_run_again(request: pytest.FixtureRequest) -> None:
    kernel = Scripted(NO_VERDICT, 0, over_limit=True)
    result, _ = run(kernel, request)
    assert result.over_limit and kernel.ends == [0]


@pytest.mark.parametrize("end", [124, HANG])
def test_it_is_run_again_in_another_kernel_when_the_emulator_has_stopped(
    end: int | GuestError, request: pytest.FixtureRequest
) -> None:
    kernel = Scripted(end, end, 0, over_limit=True, halted=2)
    result, said = run(kernel, request)
    assert (result.code, kernel.booted) == (0, 3)
    assert said == [(PROPERTY, f"run again, {HALTED}")] * 2


def test_three_times_stopped_is_a_failure(request: pytest.FixtureRequest) -> None:
    kernel = Scripted(HANG, HANG, HANG, 0, halted=9)
    with pytest.raises(GuestError, match="does not answer"):
        run(kernel, request)
    assert kernel.ends == [0]
    request.node.user_properties.clear()


def test_a_kernel_that_hangs_by_itself_is_a_failure(request: pytest.FixtureRequest) -> None:
    kernel = Scripted(HANG, 0)
    with pytest.raises(GuestError, match="does not answer"):
        run(kernel, request)
    assert kernel.ends == [0]
