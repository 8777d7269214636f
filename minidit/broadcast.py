"""What every sublayer does at every model call, decided before the run: pure functions, no torch.

Pyramid Attention Broadcast (Zhao et al., arXiv:2408.12588) reuses the outputs of attention at later sampling steps,
because in the middle of a diffusion run they hardly change. Rules say for which calls; `plan` turns them into a table.
Decisions are those of NUS-HPC-AI-Lab/VideoSys 4cce477, videosys/core/pab/pab_mgr.py, quirks included:
the phase is counted from call 0, not from the window's first call; both ends of a window are exclusive; timesteps are
those the model sees, so a bfloat16 model's are rounded to bfloat16; MLP tables match timesteps exactly. VideoSys also
cuts timesteps to whole numbers, which bfloat16 has done already above 128; here they are compared as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from enum import Enum
from math import inf
from typing import Any, Literal, NamedTuple, TypeVar, get_args

Part = Literal["spatial", "temporal", "cross", "mlp"]
PARTS: tuple[Part, ...] = get_args(Part)
Made = TypeVar("Made")


class Site(NamedTuple):
    """One sublayer of a model: the block it is in, counted in the order of the forward, and what it is there."""

    block: int
    part: Part


class Act(Enum):
    """What a sublayer does in one model call."""

    COMPUTE = "."
    STORE = "S"  # compute, and keep the update for the calls that follow
    REUSE = "R"  # add the kept update


@dataclass(frozen=True)
class Window:
    """The calls in which reuse is allowed: lo < position < hi, both ends exclusive as in VideoSys."""

    lo: float
    hi: float
    unit: Literal["timestep", "fraction"] = "timestep"  # 0..1000 of diffusion time, or 0..1 of the calls

    def __post_init__(self) -> None:
        if self.unit not in ("timestep", "fraction"):
            raise ValueError(f"Window.unit must be 'timestep' or 'fraction', got {self.unit!r}")
        _check_numbers("Window.lo and hi", (self.lo, self.hi))
        if self.lo > self.hi:
            raise ValueError(f"Window.lo must not be above Window.hi, got {self.lo} and {self.hi}")

    def holds(self, call: int, timesteps: Sequence[float]) -> bool:
        position = timesteps[call] if self.unit == "timestep" else call / len(timesteps)
        return self.lo < position < self.hi


@dataclass(frozen=True)
class Broadcast:
    """Compute every so many calls, reuse in between, inside a window."""

    every: int
    window: Window
    blocks: tuple[int, ...] | None = None  # None: all

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"Broadcast.every must be a whole number from 1, got {self.every!r}")
        _check_blocks(self)

    def reuses(self, timesteps: Sequence[float]) -> list[bool]:
        return [i % self.every != 0 and self.window.holds(i, timesteps) for i in range(len(timesteps))]


@dataclass(frozen=True)
class TimestepTable:
    """VideoSys' rule for MLPs: compute at exactly these timesteps, reuse in the calls right after.

    Written for one size and step count: where no timestep is equal to a start, nothing is reused. A Broadcast says the
    same for every schedule.
    """

    starts: tuple[float, ...]
    skip: int  # calls that reuse after a start
    blocks: tuple[int, ...] | None = None  # None: all

    def __post_init__(self) -> None:
        if type(self.skip) is not int or self.skip < 0:
            raise ValueError(f"TimestepTable.skip must be a whole number from 0, got {self.skip!r}")
        _check_numbers("TimestepTable.starts", self.starts)
        object.__setattr__(self, "starts", tuple(self.starts))
        _check_blocks(self)

    @property
    def every(self) -> int:
        return self.skip + 1

    def reuses(self, timesteps: Sequence[float]) -> list[bool]:
        # a timestep that rounding made appear twice starts at its first call, as list.index finds it
        starts = [timesteps.index(start) for start in self.starts if start in timesteps]
        after = {call for at in starts for call in range(at + 1, min(at + self.every, len(timesteps)))}
        return [i in after and t not in self.starts for i, t in enumerate(timesteps)]


Rule = Broadcast | TimestepTable


def _check_blocks(rule: Any) -> None:
    blocks = rule.blocks
    if blocks is not None:
        if not isinstance(blocks, tuple | list | range) or any(type(n) is not int or n < 0 for n in blocks):
            raise ValueError(f"{type(rule).__name__}.blocks must be whole numbers from 0, got {blocks!r}")
        object.__setattr__(rule, "blocks", tuple(blocks))


def _check_numbers(name: str, values: Any) -> None:
    # true is a number to Python, and so are NaN and infinity, but none of them is one in JSON
    if not isinstance(values, tuple | list) or any(
        isinstance(x, bool) or not isinstance(x, int | float) or not -inf < x < inf for x in values
    ):
        raise ValueError(f"{name} must be finite numbers, got {values!r}")


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """A rule for each kind of sublayer; None: always compute."""

    spatial: Rule | None = None
    temporal: Rule | None = None
    cross: Rule | None = None
    mlp: Rule | None = None

    def rule(self, site: Site) -> Rule | None:
        rule: Rule | None = getattr(self, site.part)
        return rule if rule is not None and (rule.blocks is None or site.block in rule.blocks) else None

    def to_json(self) -> str:
        return json.dumps({part: rule and asdict(rule) for part, rule in vars(self).items()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Pyramid:
        """Raises ValueError, saying where, for what is not a pyramid."""
        data = _object_from_json("a pyramid", text)
        if unknown := set(data) - set(PARTS):
            raise ValueError(f"unknown part {sorted(unknown)[0]!r}; known: {', '.join(PARTS)}")
        return cls(**{part: None if rule is None else _rule_from_json(part, rule) for part, rule in data.items()})


def _object_from_json(what: str, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{what} is a JSON object, got {data!r}")
    return data


def _rule_from_json(part: str, data: Any) -> Rule:
    if not isinstance(data, dict):
        raise ValueError(f"{part}: a rule is a JSON object or null, got {data!r}")
    try:
        if "starts" in data:
            return _from_json(TimestepTable, data)
        if "window" in data:
            if not isinstance(data["window"], dict):
                raise ValueError(f"window is a JSON object, got {data['window']!r}")
            data = {**data, "window": _from_json(Window, data["window"], "window: ")}
        return _from_json(Broadcast, data)
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error


def _from_json(kind: Callable[..., Made], data: Mapping[str, Any], where: str = "") -> Made:
    """A dataclass of the entries of a JSON object. Raises ValueError for those that it lacks, or does not have."""
    known = {field.name: field.default is MISSING for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in data if name not in known]:
        raise ValueError(f"{where}unknown {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [name for name, needed in known.items() if needed and name not in data]:
        raise ValueError(f"{where}{missing[0]!r} is missing; known: {', '.join(known)}")
    return kind(**data)


@dataclass(frozen=True)
class Call:
    """One row of a plan: what one model call does at each site, in the order of the sites."""

    index: int
    timestep: float
    acts: tuple[Act, ...]  # equal rows do equal work, so a compiled graph can be kept for each
    last: tuple[bool, ...]  # the kept update is reused here for the last time


@dataclass(frozen=True)
class Plan:
    """A whole run's table of acts. One that reuses what was never stored, or stores for nothing, cannot be built."""

    timesteps: tuple[float, ...]
    sites: tuple[Site, ...]
    acts: tuple[tuple[Act, ...], ...]  # a row a call, a column a site

    def __post_init__(self) -> None:
        if len(self.acts) != len(self.timesteps) or any(len(row) != len(self.sites) for row in self.acts):
            raise ValueError(f"a plan of {len(self.timesteps)} calls and {len(self.sites)} sites needs as many acts")
        _check_numbers("Plan.timesteps", self.timesteps)
        for block, part in self.sites:
            if type(block) is not int or block < 0 or part not in PARTS:
                raise ValueError(f"a site is a block from 0 and one of {', '.join(PARTS)}, got {block!r} and {part!r}")
        for site, column in zip(self.sites, zip(*self.acts, strict=True), strict=False):
            for i, (before, act, then) in enumerate(zip((None, *column), column, (*column[1:], None), strict=False)):
                if act is Act.REUSE and before not in (Act.STORE, Act.REUSE):
                    raise ValueError(f"call {i} reuses {site}, which was not stored")
                if act is Act.STORE and then is not Act.REUSE:
                    raise ValueError(f"call {i} stores {site}, which is not reused")

    def __len__(self) -> int:
        return len(self.timesteps)

    def __getitem__(self, index: int) -> Call:
        acts = self.acts[index]
        then = self.acts[index + 1] if index + 1 < len(self) else (None,) * len(acts)
        last = tuple(now is Act.REUSE and after is not Act.REUSE for now, after in zip(acts, then, strict=True))
        return Call(index, self.timesteps[index], acts, last)

    def counts(self) -> dict[Part, Counter[Act]]:
        """How often each part computes, stores and reuses in the whole run."""
        counts: dict[Part, Counter[Act]] = {site.part: Counter() for site in self.sites}
        for row in self.acts:
            for site, act in zip(self.sites, row, strict=True):
                counts[site.part][act] += 1
        return counts

    def held(self) -> tuple[tuple[int, int], ...]:
        """For each call, the updates held at most while it runs and after it."""
        held, calls = 0, []
        for i in range(len(self)):
            most, call = held, self[i]
            for act, last in zip(call.acts, call.last, strict=True):
                held += (act is Act.STORE) - last
                most = max(most, held)
            calls.append((most, held))
        return tuple(calls)

    def flops(self, parts: Mapping[Part, int], rest: int) -> int:
        """Floating-point operations of all calls: parts, of a computed site of each part; rest, of a call's rest."""
        counts = self.counts()
        computed = {part: count.total() - count[Act.REUSE] for part, count in counts.items()}
        return sum(parts[part] * n for part, n in computed.items()) + rest * len(self)

    def to_json(self) -> str:
        rows = ["".join(act.value for act in row) for row in self.acts]
        return json.dumps({"version": 1, "timesteps": self.timesteps, "sites": self.sites, "acts": rows})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises ValueError for what is not a plan, or is one that cannot be run."""
        data = _object_from_json("a plan", text)
        if data.get("version") != 1:
            raise ValueError(f"a plan of version {data.get('version')!r} cannot be read, expected 1")
        try:
            rows = tuple(tuple(Act(letter) for letter in row) for row in data["acts"])
            return cls(tuple(data["timesteps"]), tuple(Site(*site) for site in data["sites"]), rows)
        except KeyError as error:
            raise ValueError(f"a plan's {error} is missing") from error
        except TypeError as error:
            raise ValueError(f"not a plan: {error}") from error

    def __str__(self) -> str:
        """One line a call; '.' compute, S store, R reuse, and how many of a part's sites where they differ."""
        parts = [part for part in PARTS if any(site.part == part for site in self.sites)]
        lines = ["call  timestep  " + "".join(f"{part:<10}" for part in parts) + "held"]
        for i, (t, row, (_, held)) in enumerate(zip(self.timesteps, self.acts, self.held(), strict=True)):
            cells = []
            for part in parts:
                acts = Counter(act for site, act in zip(self.sites, row, strict=True) if site.part == part)
                alike = len(acts) == 1
                cells.append(" ".join(act.value if alike else f"{act.value}{acts[act]}" for act in Act if acts[act]))
            lines.append(f"{i:>4}  {t:>8.1f}  " + "".join(f"{cell:<10}" for cell in cells) + f"{held:>4}")
        return "\n".join(lines)


def plan(pyramid: Pyramid | None, timesteps: Sequence[float], sites: Sequence[Site]) -> Plan:
    """One act for every model call and site. timesteps: in sampling order, as the model sees them, one a call."""
    timesteps, pyramid = tuple(timesteps), pyramid or Pyramid()
    rules = [pyramid.rule(site) for site in sites]
    columns = {rule: _acts(rule.reuses(timesteps) if rule else [False] * len(timesteps)) for rule in set(rules)}
    rows = zip(*(columns[rule] for rule in rules), strict=True) if sites else iter([()] * len(timesteps))
    return Plan(timesteps, tuple(sites), tuple(rows))


def _acts(reuses: Sequence[bool]) -> tuple[Act, ...]:
    then = [*reuses, False][1:]  # does the next call reuse this one's output?
    return tuple(
        Act.REUSE if now else Act.STORE if soon else Act.COMPUTE for now, soon in zip(reuses, then, strict=True)
    )


def _pab(spatial: int, temporal: int, cross: int, window: Window) -> Pyramid:
    return Pyramid(
        spatial=Broadcast(spatial, window), temporal=Broadcast(temporal, window), cross=Broadcast(cross, window)
    )


# The paper's recipes: PAB_abc computes spatial attention every a calls, temporal every b, cross every c.
# Windows and MLP tables: VideoSys, videosys/pipelines/*/pipeline_*.py. Its MLP blocks are pairs, we count both.
OPEN_SORA, LATTE, OPEN_SORA_PLAN = Window(450, 930), Window(100, 800), Window(100, 850)
PAB_246, PAB_357, PAB_579 = (_pab(*abc, OPEN_SORA) for abc in ((2, 4, 6), (3, 5, 7), (5, 7, 9)))
OPEN_SORA_MLP = TimestepTable((676, 788, 864), skip=2, blocks=tuple(range(10)))
LATTE_MLP = TimestepTable((720, 640, 560, 480, 400), skip=2, blocks=tuple(range(10)))
OPEN_SORA_PLAN_MLP = TimestepTable(tuple(range(738, 425, -24)), skip=2, blocks=tuple(range(14)))
RECIPES: dict[str, Pyramid | None] = {
    "none": None,
    "pab-246": PAB_246,
    "pab-357": PAB_357,
    "pab-579": PAB_579,
    "open-sora-246-mlp": replace(PAB_246, mlp=OPEN_SORA_MLP),
    "latte-235": _pab(2, 3, 5, LATTE),
    "latte-236": _pab(2, 3, 6, LATTE),
    "latte-236-mlp": replace(_pab(2, 3, 6, LATTE), mlp=LATTE_MLP),
    "latte-347": _pab(3, 4, 7, LATTE),
    "latte-469": _pab(4, 6, 9, LATTE),
    "open-sora-plan-246": _pab(2, 4, 6, OPEN_SORA_PLAN),
    "open-sora-plan-246-mlp": replace(_pab(2, 4, 6, OPEN_SORA_PLAN), mlp=OPEN_SORA_PLAN_MLP),
    "open-sora-plan-357": _pab(3, 5, 7, OPEN_SORA_PLAN),
    "open-sora-plan-579": _pab(5, 7, 9, OPEN_SORA_PLAN),
}
