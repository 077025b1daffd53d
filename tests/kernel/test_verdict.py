# SPDX-License-Identifier: Apache-2.0
"""A test is run again only when it ended without a verdict, at most twice, and it is said. Boots nothing."""

from typing import cast

import pytest

from .boot import Kernel
from .left_out import PROPERTY, check_passed
from .result import SKIPPED, Result
from .verdict import NO_VERDICT, run_test

LOST = "no verdict: worker 0: the guest shut down"


class Scripted:
    """Commands end with these codes, one after the other."""

    def __init__(self, *codes: int, over_limit: bool = False) -> None:
        self.codes = list(codes)
        self.over_limit = over_limit

    def run(self, command: list[str], timeout: float, environment: None) -> Result:
        code = self.codes.pop(0)
        said = f"seed 7\n{LOST}\n".encode() if code == NO_VERDICT else b"seed 7\n"
        return Result(tuple(command), code, said, b"", timeout / 2, self.over_limit)


def run(kernel: Scripted, request: pytest.FixtureRequest) -> tuple[Result, list[tuple[str, object]]]:
    result = run_test(cast(Kernel, kernel), "test_x", 10.0, request)
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
    assert len(kernel.codes) == 1
    with pytest.raises(AssertionError, match="exit 75"):
        check_passed(result, [], request)


@pytest.mark.parametrize("code", [1, SKIPPED, -11, 124])
def test_whatever_else_is_not_run_again(code: int, request: pytest.FixtureRequest) -> None:
    kernel = Scripted(code, 0)
    result, said = run(kernel, request)
    assert (result.code, said, kernel.codes) == (code, [], [0])


def test_one_that_is_over_its_limit_is_not_run_again(request: pytest.FixtureRequest) -> None:
    kernel = Scripted(NO_VERDICT, 0, over_limit=True)
    result, _ = run(kernel, request)
    assert result.over_limit and kernel.codes == [0]
