# SPDX-License-Identifier: Apache-2.0
"""The policy document: its model, its defaults, and every reason for which one is rejected."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from frostline.controller.policy.loader import DocumentError, parse
from frostline.controller.policy.quantity import Amount, parse_amount, parse_duration, parse_rate

MAX_CLASSES = 64
MAX_VMS = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class PolicyMode(enum.IntEnum):
    """How far Frostline may go; ordered, and numbered like frostline.v1.Mode."""

    OFF = 1
    OBSERVE = 2
    PLAN = 3
    ENFORCE = 4


def _mode(value: object) -> PolicyMode:
    if isinstance(value, PolicyMode):
        return value
    if isinstance(value, str) and value.upper() in PolicyMode.__members__:
        return PolicyMode[value.upper()]
    raise ValueError(f"{value!r} is not a mode; use off, observe, plan or enforce")


def _amount(value: object) -> Amount:
    return value if isinstance(value, Amount) else parse_amount(value)


_Mode = Annotated[PolicyMode, BeforeValidator(_mode)]
_Amount = Annotated[Amount, BeforeValidator(_amount)]
_Rate = Annotated[int, BeforeValidator(parse_rate)]
_Duration = Annotated[float, BeforeValidator(parse_duration)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ClassRule(_Strict):
    """What a document says of a class; what it leaves out comes from the built-in class (else `standard`)."""

    mode: _Mode | None = None
    min_idle_age: _Duration | None = None
    floor: _Amount | None = None
    cap: _Amount | None = None
    rate: _Rate | None = None


class VmRule(ClassRule):
    """What a document says of one VM, by its id, UUID or name."""

    vm_class: str | None = Field(default=None, alias="class")
    exclude: bool = False


class Document(_Strict):
    version: Literal[1]
    default_class: str = "standard"
    classes: dict[str, ClassRule] = Field(default_factory=dict, max_length=MAX_CLASSES)
    vms: dict[str, VmRule] = Field(default_factory=dict, max_length=MAX_VMS)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule with nothing left open. Floor: least that stays in RAM. Cap: most that may be away."""

    mode: PolicyMode
    min_idle_age_seconds: float
    floor: Amount
    cap: Amount
    rate_bytes_per_second: int

    def under(self, rule: ClassRule) -> Rule:
        """This rule with what `rule` gives put over it."""
        return replace(
            self,
            mode=self.mode if rule.mode is None else rule.mode,
            min_idle_age_seconds=self.min_idle_age_seconds if rule.min_idle_age is None else rule.min_idle_age,
            floor=self.floor if rule.floor is None else rule.floor,
            cap=self.cap if rule.cap is None else rule.cap,
            rate_bytes_per_second=self.rate_bytes_per_second if rule.rate is None else rule.rate,
        )


_MIB = 1 << 20
BUILT_IN: Mapping[str, Rule] = {
    # A floor of everything: raising the mode alone takes nothing from a VM of this class.
    "guaranteed": Rule(PolicyMode.OBSERVE, 1800.0, Amount(percent=100), Amount(bytes=0), 16 * _MIB),
    "standard": Rule(PolicyMode.PLAN, 120.0, Amount(percent=20), Amount(percent=80), 64 * _MIB),
    "batch": Rule(PolicyMode.PLAN, 60.0, Amount(percent=10), Amount(percent=90), 256 * _MIB),
}
DEFAULT_DOCUMENT = "# Built in: everything is planned, nothing is evicted.\nversion: 1\ndefault_class: standard\n"


@dataclass(frozen=True, slots=True)
class Policy:
    """A validated document, ready to be asked. Version 0 is the built-in one that no store has seen."""

    document: Document
    text: str
    version: int = 0

    def class_rule(self, name: str) -> Rule | None:
        """The complete rule of a class, or None for a class that neither we nor the document know."""
        base = BUILT_IN.get(name)
        written = self.document.classes.get(name)
        if base is None and written is None:
            return None
        rule = base or BUILT_IN["standard"]
        return rule.under(written) if written is not None else rule

    def vm_rules(self, vm_id: str, uuid: str, name: str) -> list[VmRule]:
        """Rules that name this VM, the most exact first."""
        keys = dict.fromkeys(key for key in (vm_id, uuid, name) if key)
        return [self.document.vms[key] for key in keys if key in self.document.vms]


def load(text: str, version: int = 0) -> Policy:
    """Parse and check a document. DocumentError carries every problem found; nothing is half taken."""
    data = parse(text)
    problems: list[tuple[str, str]] = []
    document: Document | None = None
    try:
        document = Document.model_validate(data)
    except ValidationError as error:
        problems += _explain(error)
    problems += _check_names(data) + _check_class_references(data) + _check_floor_and_cap(data)
    if document is None or problems:
        raise DocumentError(sorted(problems))
    return Policy(document=document, text=text, version=version)


def built_in() -> Policy:
    """What is in force where no document ever was: plan for everybody."""
    return load(DEFAULT_DOCUMENT)


_FIELDS = {
    0: ["version", "default_class", "classes", "vms"],
    "classes": ["mode", "min_idle_age", "floor", "cap", "rate"],
    "vms": ["class", "exclude", "mode", "min_idle_age", "floor", "cap", "rate"],
}


def _explain(error: ValidationError) -> list[tuple[str, str]]:
    problems = []
    for item in error.errors(include_url=False, include_context=False):
        path = ".".join(str(part) for part in item["loc"])
        kind, message = item["type"], str(item["msg"])
        if kind == "extra_forbidden":
            known = _FIELDS[0] if len(item["loc"]) == 1 else _FIELDS.get(str(item["loc"][0]), [])
            message = f"unknown field; known here: {', '.join(known)}"
        elif kind == "missing":
            message = "missing; every document needs it" if path != "version" else "missing; write version: 1"
        elif kind == "literal_error":
            message = f"{item['input']!r} is not a version that is understood; write version: 1"
        elif kind == "bool_type":
            message = f"{item['input']!r} is neither true nor false"
        elif kind in ("dict_type", "model_type"):
            message = "not a mapping; give fields under it, or {} for the defaults"
        problems.append((path, message.removeprefix("Value error, ")))
    return problems


def _section(data: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The mappings of a section that can be looked into; what is not a mapping was reported already."""
    section = data.get(name)
    if not isinstance(section, dict):
        return {}
    return {str(key): value for key, value in section.items() if isinstance(value, dict)}


def _check_names(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems = []
    classes = data.get("classes")
    for name in classes if isinstance(classes, dict) else ():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            problems.append(("classes", f"{name!r} is no class name; use up to 63 letters, digits, '_', '.' and '-'"))
    vms = data.get("vms")
    for key in vms if isinstance(vms, dict) else ():
        if not isinstance(key, str) or not 0 < len(key) <= 256 or not key.isprintable():
            problems.append(("vms", f"{key!r} names no VM; give an id, UUID or name (in quotes if it is a number)"))
    return problems


def _check_class_references(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    classes = data.get("classes")
    known = set(BUILT_IN) | {name for name in (classes if isinstance(classes, dict) else ()) if isinstance(name, str)}
    used = [("default_class", data.get("default_class"))]
    used += [(f"vms.{key}.class", rule.get("class")) for key, rule in _section(data, "vms").items()]
    return [
        (path, f"unknown class {name!r}; known: {', '.join(sorted(known))}")
        for path, name in used
        if isinstance(name, str) and name not in known
    ]


def _written(rule: Mapping[str, Any], field: str) -> Amount | None:
    try:
        return parse_amount(rule[field])
    except (KeyError, ValueError):
        return None


def _check_floor_and_cap(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Judge what the document itself says; a built-in floor under a written cap just stays the tighter limit."""
    problems = []
    classes = _section(data, "classes")
    for name, rule in classes.items():
        problems += _contradiction(f"classes.{name}", _written(rule, "floor"), _written(rule, "cap"))
    for key, rule in _section(data, "vms").items():
        if "floor" not in rule and "cap" not in rule:
            continue
        under = classes.get(str(rule.get("class", data.get("default_class", "standard"))), {})
        floor = _written(rule, "floor") if "floor" in rule else _written(under, "floor")
        cap = _written(rule, "cap") if "cap" in rule else _written(under, "cap")
        problems += _contradiction(f"vms.{key}", floor, cap)
    return problems


def _contradiction(path: str, floor: Amount | None, cap: Amount | None) -> list[tuple[str, str]]:
    if floor is None or cap is None:
        return []
    if floor.percent is not None and cap.percent is not None and floor.percent + cap.percent > 100.0:
        reason = f"{floor} must stay but cap lets {cap} go, together more than 100%; lower one"
        return [(f"{path}.floor", f"above cap: {reason}")]
    if floor.bytes is not None and cap.bytes is not None and floor.bytes > cap.bytes:
        return [(f"{path}.floor", f"floor {floor} is above cap {cap}; lower the floor, or give one of them as a share")]
    return []
