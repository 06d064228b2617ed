"""What a topology that was read anew changes of a deployment that runs: decisions from values, without a process."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from sglang_prefillshare.config import Topology
from sglang_prefillshare.errors import ConfigError


def check_reload(before: Topology, after: Topology) -> None:
    """Raise `ConfigError` for a change that those who run cannot take over, naming its key."""
    if before == after:
        return
    if before.is_unified or after.is_unified:
        if before.is_unified and after.is_unified:
            raise _refused("a unified server is one process, and another topology is another one")
        raise _refused(f"unified is {_yaml(after.is_unified)} and was {_yaml(before.is_unified)}")
    for key, was, now in (
        ("router.host", before.router.host, after.router.host),
        ("router.port", before.router.port, after.router.port),
        ("base.model", before.base.model, after.base.model),
    ):
        if was != now:
            raise _refused(f"{key} is {now} and was {was}")
    # Of these only the names are told: some values are secrets.
    if flag := _differing(before.router.args, after.router.args):
        raise _refused(f"router.args.{flag} changed, and the router reads its flags once")
    if before.shared_api_key != after.shared_api_key:
        raise _refused("args.api-key changed, and the router knows one key")


def match(running: Sequence[tuple[str, Hashable]], wanted: Sequence[tuple[str, Hashable]]) -> list[int | None]:
    """For each of `wanted`, given as its name and what it is, which of `running` is just that; `None` is nobody.

    One of the same name comes first, so that what did not change keeps its name.
    """
    free = dict(enumerate(running))
    found: list[int | None] = [None] * len(wanted)
    for same_name in (True, False):
        for place, (name, what) in enumerate(wanted):
            if found[place] is not None:
                continue
            for index, (other, its) in free.items():
                if its == what and (other == name or not same_name):
                    found[place] = index
                    del free[index]
                    break
    return found


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of `coder.0`, `coder.1`, … that nobody has."""
    if name not in taken:
        return name
    stem, _, number = name.rpartition(".")
    stem = stem if number.isdigit() and stem else name
    return next(found for index in range(len(taken) + 1) if (found := f"{stem}.{index}") not in taken)


def summary(*, came: Sequence[str], left: Sequence[str], kept_count: int) -> str:
    """`added tester, replaced coder, removed twin; 2 as they were`."""
    groups = {
        "added": [name for name in came if name not in left],
        "replaced": [name for name in came if name in left],
        "removed": [name for name in left if name not in came],
    }
    told = ", ".join(f"{verb} {' and '.join(names)}" for verb, names in groups.items() if names)
    return f"{told or 'nothing changed'}; {kept_count} as they were"


def _refused(what: str) -> ConfigError:
    return ConfigError(f"{what}. That cannot change while it serves: put it back, or restart `up`.")


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    names = dict.fromkeys([*after, *before])
    return next((name for name in names if before.get(name) != after.get(name)), None)


def _yaml(value: bool) -> str:
    return "true" if value else "false"
