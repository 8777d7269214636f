"""Hypothesis strategies for all that a plan is made of: every value that a type allows, shrinking to the smallest."""

import json
from dataclasses import replace

import torch
from hypothesis import strategies as st

from minidit.broadcast import PARTS, Act, Broadcast, Plan, Pyramid, Site, TimestepTable, Window, plan
from minidit.presets import PRESETS
from minidit.samplers import RectifiedFlow, seen

# Diffusion times. Two draws are often equal, so that a time falls on the end of a window or on the start of a table.
times = st.integers(0, 20).map(lambda n: 50.0 * n) | st.integers(0, 1000) | st.floats(0, 1000)

# Runs: the times of the model calls, falling. Any, some of them equal, or those that a model of some dtype sees in a
# run of rectified flow, unevenly spaced by the shift and, in bfloat16, equal where rounding makes them so.
uneven_runs = st.lists(times, max_size=24).map(lambda run: tuple(sorted(run, reverse=True)))
rectified_flow_runs = st.builds(
    lambda steps, shift, dtype: tuple(seen(RectifiedFlow(steps, shift, "velocity").timesteps, dtype)),
    st.integers(1, 40),
    st.floats(0.25, 20),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
runs = uneven_runs | rectified_flow_runs


def intervals(ends, unit):
    return st.tuples(ends, ends).map(sorted).map(lambda ends: Window(*ends, unit))


finite = st.floats(allow_nan=False, allow_infinity=False)
timestep_windows = intervals(times | st.sampled_from([-1, 1001]) | finite, "timestep")
fraction_windows = intervals(st.integers(-1, 9).map(lambda n: n / 8) | finite, "fraction")
windows = timestep_windows | fraction_windows

periods = st.integers(1, 12) | st.integers(min_value=1)
blocks = st.none() | st.lists(st.integers(0, 3) | st.integers(min_value=0), max_size=4).map(tuple)
broadcasts = st.builds(Broadcast, periods, windows, blocks)
tables = st.builds(TimestepTable, st.lists(times, max_size=6).map(tuple), periods.map(lambda n: n - 1), blocks)
rules = broadcasts | tables
pyramids = st.builds(Pyramid, **{part: st.none() | rules for part in PARTS})

# Sites: of Open-Sora's architecture, small; and of any other.
open_sora_sites = st.integers(1, 2).map(lambda depth: replace(PRESETS["opensora-1.2"], depth=depth).sites)
other_sites = st.lists(st.builds(Site, st.integers(0, 3), st.sampled_from(PARTS)), unique=True, max_size=8).map(tuple)
sites = other_sites | open_sora_sites


@st.composite
def tables_of_acts(draw):
    """Times, sites, and an act for each call and site, whatever it is: not always a plan."""
    run, some = draw(st.lists(times, max_size=4).map(tuple)), draw(other_sites)
    row = st.tuples(*[st.sampled_from(Act)] * len(some))
    return run, some, draw(st.tuples(*[row] * len(run)))


@st.composite
def plans_by_hand(draw):
    """Plans of any acts that can follow each other, not only those that a pyramid makes."""
    run, some = draw(runs), draw(other_sites)
    reuses = st.lists(st.booleans(), min_size=len(run), max_size=len(run))
    columns = [_column([False, *draw(reuses)[1:]][: len(run)]) for _ in some]
    return Plan(run, some, tuple(tuple(column[i] for column in columns) for i in range(len(run))))


def _column(reuses):
    pairs = zip(reuses, [*reuses, False][1:], strict=True)
    return [Act.REUSE if now else Act.STORE if soon else Act.COMPUTE for now, soon in pairs]


plans = st.builds(plan, st.none() | pyramids, runs, sites) | plans_by_hand()

# JSON that is not what was asked for.
fields = ["every", "window", "lo", "hi", "unit", "blocks", "starts", "skip", "timesteps", "sites", "acts", "version"]
words = st.sampled_from([*PARTS, *fields])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=3),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(words | st.text(max_size=3), values, max_size=3),
    max_leaves=4,
)


@st.composite
def spoiled(draw, texts):
    """One of the JSON texts with one thing in it, however deep, replaced, removed or added; or the text cut off."""
    text = draw(texts)
    if draw(st.integers(0, 9)) == 9:
        return text[: draw(st.integers(0, len(text) - 1))]
    return json.dumps(_spoil(draw, json.loads(text)))


def _spoil(draw, value):
    here = not isinstance(value, dict | list) or not value or draw(st.integers(0, 4)) == 4
    if here:
        return draw(json_values)
    value = value.copy()
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    match draw(st.sampled_from(["within", "remove", "add"])):
        case "within":
            value[key] = _spoil(draw, value[key])
        case "remove":
            del value[key]
        case "add" if isinstance(value, dict):
            value[draw(words | st.text(max_size=3))] = draw(json_values)
        case "add":
            value.insert(key, draw(json_values))
    return value
