# SPDX-License-Identifier: Apache-2.0
"""What a policy document may say, and every way in which one is rejected."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.controller.policy.document import BUILT_IN, Policy, PolicyMode, built_in, load
from frostline.controller.policy.loader import MAX_DOCUMENT_BYTES, DocumentError
from frostline.controller.policy.quantity import UNLIMITED, Amount

GIB = 1 << 30


def problems(text: str) -> dict[str, str]:
    """Path to reason of a document that has to be rejected."""
    with pytest.raises(DocumentError) as caught:
        load(text)
    assert caught.value.problems
    return dict(caught.value.problems)


def test_new_install_plans() -> None:
    policy = built_in()
    assert policy.version == 0
    assert policy.class_rule("standard") == BUILT_IN["standard"]
    assert BUILT_IN["standard"].mode is PolicyMode.PLAN
    assert all(rule.mode is not PolicyMode.ENFORCE for rule in BUILT_IN.values())


def test_a_whole_document() -> None:
    policy = load(
        """
        version: 1
        default_class: batch
        classes:
          standard: {mode: enforce, min_idle_age: 5m, floor: 1GiB, cap: 50%, rate: 16MiB/s}
          gold: {mode: off}
          batch: {rate: unlimited}
        vms:
          db-1: {exclude: true}
          "17": {class: gold, cap: 0}
        """
    )
    rule = policy.class_rule("standard")
    assert rule is not None
    assert rule.mode is PolicyMode.ENFORCE
    assert rule.min_idle_age_seconds == 300.0
    assert rule.floor == Amount(bytes=GIB)
    assert rule.cap == Amount(percent=50)
    assert rule.rate_bytes_per_second == 16 << 20
    gold = policy.class_rule("gold")
    assert gold is not None
    # `off` is a word here, not YAML 1.1's false; the rest is that of the built-in standard class.
    assert gold.mode is PolicyMode.OFF
    assert gold.cap == BUILT_IN["standard"].cap
    batch = policy.class_rule("batch")
    assert batch is not None
    assert batch.rate_bytes_per_second == UNLIMITED
    assert policy.class_rule("silver") is None
    assert policy.vm_rules("id", "uuid", "db-1")[0].exclude


def test_json_is_taken_too() -> None:
    document = {"version": 1, "vms": {"a": {"class": "batch", "mode": "observe"}}}
    assert load(json.dumps(document, indent="\t")).vm_rules("a", "", "")[0].vm_class == "batch"


def test_every_problem_is_listed_with_its_place() -> None:
    found = problems(
        """
        version: 1
        classes:
          batch: {floor: -5MiB, mode: on, colour: red}
          tight: {floor: 90%, cap: 80%}
        vms:
          a: {class: gold}
          b: {exclude: yes}
        extra: 1
        """
    )
    assert "negative" in found["classes.batch.floor"]
    assert "use off, observe, plan or enforce" in found["classes.batch.mode"]
    assert "unknown field; known here: mode" in found["classes.batch.colour"]
    assert "above cap" in found["classes.tight.floor"]
    assert "unknown class 'gold'; known: batch, guaranteed, standard, tight" in found["vms.a.class"]
    assert "neither true nor false" in found["vms.b.exclude"]
    assert "unknown field; known here: version" in found["extra"]
    assert len(found) == 7


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("", "", "not a mapping"),
        ("[1, 2]", "", "not a mapping"),
        ("classes: {}", "version", "write version: 1"),
        ("version: 2", "version", "write version: 1"),
        ("version: '1'", "version", "write version: 1"),
        ("version: 1\nversion: 1", "line 2", "given twice"),
        ('{"version": 1, "version": 1}', "", "given twice"),
        ("version: 1\ndefault_class: gold", "default_class", "unknown class 'gold'"),
        ("version: 1\nclasses: [a]", "classes", "not a mapping"),
        ("version: 1\nclasses: {'a b': {}}", "classes", "no class name"),
        ("version: 1\nclasses: {batch: {floor: 120%}}", "classes.batch.floor", "100% or less"),
        ("version: 1\nclasses: {batch: {floor: -1%}}", "classes.batch.floor", "negative"),
        ("version: 1\nclasses: {batch: {floor: 5MB}}", "classes.batch.floor", "5MiB"),
        ("version: 1\nclasses: {batch: {cap: .nan}}", "classes.batch.cap", "not a size"),
        ("version: 1\nclasses: {batch: {cap: 2000PiB}}", "classes.batch.cap", "more than 1 EiB"),
        ("version: 1\nclasses: {batch: {min_idle_age: 0s}}", "classes.batch.min_idle_age", "1s to 30d"),
        ("version: 1\nclasses: {batch: {min_idle_age: .inf}}", "classes.batch.min_idle_age", "long"),
        ("version: 1\nclasses: {batch: {min_idle_age: 31d}}", "classes.batch.min_idle_age", "1s to 30d"),
        ("version: 1\nclasses: {batch: {rate: 0MiB/s}}", "classes.batch.rate", "byte a second"),
        ("version: 1\nclasses: {batch: {rate: 0}}", "classes.batch.rate", "evicts nothing"),
        ("version: 1\nclasses: {batch: {rate: 64MiB}}", "classes.batch.rate", "MiB/s"),
        ("version: 1\nclasses: {batch: {floor: 8GiB, cap: 4GiB}}", "classes.batch.floor", "above cap"),
        (
            "version: 1\nclasses: {batch: {floor: 8GiB}}\nvms: {v: {class: batch, cap: 4GiB}}",
            "vms.v.floor",
            "above cap",
        ),
        ("version: 1\nvms: {17: {}}", "vms", "in quotes"),
        ("a: &x 1\nb: *x", "line 2", "aliases"),
        ("version: 1\n---\nversion: 1", "line 2", "second document"),
        ("version: 1\nvms: {a: [}", "line 2, column 11", "not valid YAML"),
        ("version: !!python/object/apply:os.system ['true']", "line 1, column 10", "could not determine a constructor"),
        ("\x00", "", "not valid YAML"),
    ],
)
def test_rejections(text: str, path: str, words: str) -> None:
    assert words in problems(text)[path]


def test_a_written_cap_meets_a_built_in_floor_without_complaint() -> None:
    rule = load("version: 1\nclasses: {standard: {cap: 100%}}").class_rule("standard")
    assert rule is not None
    assert (rule.floor, rule.cap) == (BUILT_IN["standard"].floor, Amount(percent=100))


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nvms: {" + "a: {}, " * MAX_DOCUMENT_BYTES + "}",
        "[" * 5000,
        "{" * 5000,
        '{"a":' * 5000,
        "version: 1\n" + "x: &a [1]\n" + "y: [" + "*a," * 100 + "]",
        "- " * 30000,
    ],
)
def test_hostile_sizes_are_rejected_quickly(text: str) -> None:
    started = time.monotonic()
    problems(text)
    assert time.monotonic() - started < 5.0


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["enforce", "10%", "-1", "64MiB/s", "2m", "gold", "batch"]),
)
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["version", "classes", "vms", "batch", "mode", "floor", "cap", "rate", "class"]),
                st.text(max_size=8),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["version", "default_class", "classes", "vms", "x"]), _values))
@settings(max_examples=300, deadline=None)
def test_any_data_is_either_a_policy_or_rejected(data: dict[str, object]) -> None:
    try:
        assert isinstance(load(yaml.safe_dump({"version": 1, **data})), Policy)
    except DocumentError as error:
        assert all(reason for _, reason in error.problems)


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_is_either_a_policy_or_rejected(text: str) -> None:
    try:
        load(text)
    except DocumentError as error:
        assert str(error)
