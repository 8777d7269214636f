"""minidit/broadcast.py: what a broadcast schedule always does, from top to bottom.

A rule says when a sublayer may reuse what it computed before; `plan` makes a table of the rules, with one act for every
model call and site: '.' compute, 'S' compute and store, 'R' reuse. Nothing here needs a model.
"""

import inspect
import json
import re
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from math import lcm
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minidit.broadcast import (
    LATTE_MLP,
    OPEN_SORA,
    OPEN_SORA_MLP,
    OPEN_SORA_PLAN_MLP,
    PAB_246,
    PARTS,
    RECIPES,
    Act,
    Broadcast,
    Plan,
    Pyramid,
    Site,
    TimestepTable,
    Window,
    plan,
)
from minidit.presets import PRESETS
from minidit.samplers import RectifiedFlow, opensora_shift, seen
from strategies import (
    broadcasts,
    fraction_windows,
    periods,
    plans,
    pyramids,
    rectified_flow_runs,
    rules,
    runs,
    sites,
    spoiled,
    tables,
    tables_of_acts,
    times,
    windows,
)

ALWAYS = Window(-1, 1001)  # holds every timestep
SITE = Site(0, "spatial")
OPEN_SORA_SITES = PRESETS["opensora-1.2"].sites
GOLDENS = json.loads((Path(__file__).parent / "goldens" / "pab_decisions.json").read_text())


def acts(rule, run):
    """What a rule does at one site of a run, call for call."""
    rule = rule and replace(rule, blocks=None)
    return [row[0] for row in plan(Pyramid(spatial=rule), run, [SITE]).acts]


def line(rule, run):
    """The same as a line of letters."""
    return "".join(act.value for act in acts(rule, run))


def computed(rule, run):
    """How many calls compute."""
    return len(run) - acts(rule, run).count(Act.REUSE)


def open_sora_run(height, width, frames, steps=30):
    """The timesteps of Open-Sora 1.2, as its bfloat16 model sees them."""
    shift = opensora_shift(height, width, frames, torch.bfloat16)
    return seen(RectifiedFlow(steps, shift, "velocity").timesteps, torch.bfloat16)


OPEN_SORA_480P = open_sora_run(480, 854, 51)


# A run, to begin with: Open-Sora's, 480p, two seconds. The window opens at call 9 and closes after call 25.


def test_spatial_attention_of_pab_246_computes_every_second_call_in_the_window():
    assert line(PAB_246.spatial, OPEN_SORA_480P) == "........SRSRSRSRSRSRSRSRSR...."


def test_temporal_attention_every_fourth():
    assert line(PAB_246.temporal, OPEN_SORA_480P) == "........SRRRSRRRSRRRSRRRSR...."


def test_cross_attention_every_sixth_counted_from_call_0_so_that_the_windows_first_call_reuses_one_before_it():
    assert line(PAB_246.cross, OPEN_SORA_480P) == "........SRRRSRRRRRSRRRRRSR...."


def test_the_mlp_of_some_blocks_in_the_calls_after_three_timesteps():
    assert line(OPEN_SORA_MLP, OPEN_SORA_480P) == ".............SRR.SRR.SRR......"


# What every rule does in every run.


@given(rules, runs)
@example(PAB_246.cross, OPEN_SORA_480P)
def test_what_is_reused_was_stored_fewer_than_every_calls_ago(rule, run):
    age = None  # calls since the kept update was computed; None: nothing is kept
    for act in acts(rule, run):
        age = 0 if act is Act.STORE else None if act is Act.COMPUTE else age + 1  # nothing to reuse: TypeError
        assert age is None or age < rule.every


@given(rules, runs)
def test_what_is_stored_is_reused_in_the_next_call(rule, run):
    table = acts(rule, run)
    for act, then in zip(table, [*table[1:], None], strict=False):
        assert (act is Act.STORE) <= (then is Act.REUSE)


@given(pyramids, runs.filter(len), sites)
def test_the_first_call_computes_everything(pyramid, run, sites):
    assert Act.REUSE not in plan(pyramid, run, sites).acts[0]


@given(broadcasts, runs)
@example(PAB_246.spatial, OPEN_SORA_480P)
def test_nothing_is_reused_outside_of_the_window(rule, run):
    for call, act in enumerate(acts(rule, run)):
        position = run[call] if rule.window.unit == "timestep" else call / len(run)
        assert act is not Act.REUSE or rule.window.lo < position < rule.window.hi


def test_both_ends_of_a_window_are_outside_of_it():
    assert line(Broadcast(9, Window(200, 800)), [1000, 800, 600, 400, 200, 0]) == ".SRR.."
    assert line(Broadcast(9, Window(0.25, 0.75, "fraction")), [1000, 750, 500, 250]) == ".SR."


@given(broadcasts, runs)
def test_in_the_window_exactly_the_calls_that_every_divides_compute(rule, run):
    for call, act in enumerate(acts(rule, run)):
        if rule.window.holds(call, run):
            assert (act is not Act.REUSE) == (call % rule.every == 0)


@given(tables, runs)
def test_a_table_computes_at_its_starts_and_reuses_in_at_most_skip_calls_after_each(rule, run):
    table = acts(rule, run)
    for call, act in enumerate(table):
        if act is Act.REUSE:
            assert run[call] not in rule.starts
            assert any(run[earlier] in rule.starts for earlier in range(max(0, call - rule.skip), call))
    assert table.count(Act.REUSE) <= rule.skip * len(rule.starts)


@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 5), st.integers(0, 9))
def test_a_table_whose_starts_are_skip_and_one_calls_apart_is_an_ordinary_rule(every, before, groups, after):
    run = range(every * (before + groups) + after, 0, -1)
    starts = run[every * before : every * (before + groups) : every]
    # the window holds what the table's last group holds, and nothing after it
    window = Window(run[0] - every * (before + groups) + 0.5, starts[0] + 0.5)
    assert line(TimestepTable(tuple(starts), skip=every - 1), run) == line(Broadcast(every, window), run)


def test_a_start_that_rounding_made_appear_twice_starts_at_its_first_call_and_computes_twice():
    assert line(TimestepTable((800,), skip=3), [1000, 800, 800, 700, 600, 500]) == "..SRR."


@given(pyramids, runs, sites)
def test_each_part_follows_its_own_rule_in_the_rules_blocks_and_computes_elsewhere(pyramid, run, sites):
    whole = plan(pyramid, run, sites)
    for column, site in enumerate(sites):
        rule = getattr(pyramid, site.part)
        applies = rule is not None and (rule.blocks is None or site.block in rule.blocks)
        assert [row[column] for row in whole.acts] == acts(rule if applies else None, run)


# What never changes an act.


@given(pyramids, runs, sites, st.randoms(use_true_random=False))
def test_the_act_of_a_site_does_not_depend_on_which_other_sites_there_are(pyramid, run, sites, random):
    whole, some = plan(pyramid, run, sites), [site for site in sites if random.random() < 0.5]
    columns = [sites.index(site) for site in some]
    assert plan(pyramid, run, some).acts == tuple(tuple(row[column] for column in columns) for row in whole.acts)


def test_batch_guidance_and_the_ranks_of_a_sequence_are_not_asked_for_so_no_act_depends_on_them():
    assert list(inspect.signature(plan).parameters) == ["pyramid", "timesteps", "sites"]


@given(st.builds(Broadcast, periods, fraction_windows), runs, st.data())
def test_a_window_of_fractions_does_not_depend_on_the_timesteps(rule, run, data):
    other = data.draw(st.lists(times, min_size=len(run), max_size=len(run)))
    assert line(rule, run) == line(rule, other)


@given(st.integers(0, 16), st.integers(0, 16), st.integers(1, 100))
def test_a_window_of_fractions_holds_the_same_share_of_the_calls_whatever_the_steps(one, other, steps):
    lo, hi = sorted((one / 16, other / 16))
    held = sum(Window(lo, hi, "fraction").holds(call, [0] * steps) for call in range(steps))
    assert abs(held - (hi - lo) * steps) <= 1


# A window of timesteps does: Open-Sora samples large and long videos at higher timesteps, and fewer of its 30 calls
# fall into 450..930. The MLP's table asks for three timesteps by name, which one size alone has.
SIZES = {
    "240p, 2 s": ((240, 426, 51), 18, (9, 14, 15), 0),
    "480p, 2 s": ((480, 854, 51), 17, (9, 13, 14), 6),
    "480p, 4 s": ((480, 854, 102), 16, (8, 12, 13), 2),
    "480p, 8 s": ((480, 854, 204), 15, (8, 12, 13), 2),
    "480p, 16 s": ((480, 854, 408), 13, (6, 9, 11), 0),
    "720p, 2 s": ((720, 1280, 51), 16, (8, 12, 13), 2),
    "720p, 4 s": ((720, 1280, 102), 14, (7, 11, 12), 2),
    "720p, 16 s": ((720, 1280, 408), 10, (5, 7, 9), 0),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_larger_the_video_the_less_a_window_of_timesteps_reuses(size):
    video, in_window, attention, mlp = SIZES[size]
    run, pyramid = open_sora_run(*video), RECIPES["open-sora-246-mlp"]
    assert sum(OPEN_SORA.holds(call, run) for call in range(30)) == in_window
    reused = {part: acts(getattr(pyramid, part), run).count(Act.REUSE) for part in PARTS}
    assert tuple(reused.values()) == (*attention, mlp)


@given(
    st.builds(Broadcast, periods, st.tuples(times, times).map(sorted).map(lambda ends: Window(*ends))), runs, st.data()
)
def test_a_run_that_is_cut_short_decides_the_same_until_then_but_stores_nothing_at_its_end(rule, run, data):
    cut = data.draw(st.integers(0, len(run)))
    assert line(rule, run[:cut]) == re.sub("S$", ".", line(rule, run)[:cut])


# No broadcast.


@given(pyramids, runs, sites)
def test_every_one_an_empty_window_no_blocks_no_rules_and_no_pyramid_are_the_same_plan(pyramid, run, sites):
    nothing = plan(None, run, sites)
    assert all(act is Act.COMPUTE for row in nothing.acts for act in row)
    for rule in (
        None,
        Broadcast(1, ALWAYS),
        Broadcast(7, Window(500, 500)),
        Broadcast(7, Window(1, 2, "fraction")),
        Broadcast(7, ALWAYS, blocks=()),
        TimestepTable((), skip=7),
        TimestepTable((500,), skip=0),
    ):
        same = plan(Pyramid(**dict.fromkeys(PARTS, rule)), run, sites)
        assert same == nothing
        assert hash(same) == hash(nothing)


# More broadcast never computes more. For windows, blocks and multiples this holds call for call.


def reuses_wherever(more, less, run):
    return all(
        now is Act.REUSE for now, then in zip(acts(more, run), acts(less, run), strict=True) if then is Act.REUSE
    )


@given(broadcasts, runs, st.floats(0, 1000), st.floats(0, 1000))
def test_a_wider_window_reuses_wherever_a_narrower_one_does(rule, run, below, above):
    window = rule.window
    wider = replace(window, lo=window.lo - below, hi=window.hi + above)
    assert reuses_wherever(replace(rule, window=wider), rule, run)


@given(tables, runs, st.integers(0, 5))
def test_a_table_that_skips_more_reuses_wherever_one_that_skips_less_does(rule, run, more):
    assert reuses_wherever(replace(rule, skip=rule.skip + more), rule, run)


@given(broadcasts, runs, st.integers(1, 5))
def test_a_period_reuses_wherever_a_period_that_divides_it_does(rule, run, times):
    assert reuses_wherever(replace(rule, every=times * rule.every), rule, run)


# For other periods it does not. The phase is counted from call 0, and a short window may lie between two multiples of
# the shorter period but on a multiple of the longer one.


def test_a_longer_period_can_compute_more():
    last_call = Window(0, 2)
    assert line(Broadcast(2, last_call), [4, 3, 2, 1]) == "..SR"
    assert line(Broadcast(3, last_call), [4, 3, 2, 1]) == "...."


@st.composite
def spans(draw):
    """A run, a window that holds its calls a..b-1, and their number."""
    a, b, n = sorted(draw(st.lists(st.integers(0, 40), min_size=3, max_size=3)))
    return range(n, 0, -1), Window(n - b + 0.5, n - a + 0.5), b - a


@given(spans(), st.integers(1, 12), st.integers(0, 12))
def test_but_it_never_computes_more_than_one_call_more(span, every, longer):
    run, window, _ = span
    assert computed(Broadcast(every + longer, window), run) <= computed(Broadcast(every, window), run) + 1


@given(spans(), st.integers(1, 12), st.integers(0, 12))
def test_and_none_more_in_a_window_that_holds_whole_periods_of_the_shorter(span, every, longer):
    run, window, held = span
    assume(held % every == 0)
    assert computed(Broadcast(every + longer, window), run) <= computed(Broadcast(every, window), run)


@given(spans(), st.integers(1, 12), st.integers(0, 12))
def test_nor_in_a_window_that_opens_with_the_run(span, every, longer):
    run, window, _ = span
    window = replace(window, hi=1001)
    assert computed(Broadcast(every + longer, window), run) <= computed(Broadcast(every, window), run)


# The original, VideoSys' pab_mgr.py, decides in the middle of a forward pass and counts as it goes. The golden file
# holds what it decided, in real runs and in random ones.


def as_ours(golden):
    """A golden entry's rules. VideoSys counts pairs of a spatial and a temporal block, we count both."""
    attention = {
        part: Broadcast(golden[part]["range"], Window(*golden[part]["window"]))
        for part in ("spatial", "temporal", "cross")
    }
    if "mlp" not in golden:
        return Pyramid(**attention)
    (skip,) = {rule["skip"] for rule in golden["mlp"].values()}
    (pairs,) = {tuple(rule["blocks"]) for rule in golden["mlp"].values()}
    halves = tuple(half for pair in pairs for half in (2 * pair, 2 * pair + 1))
    return Pyramid(**attention, mlp=TimestepTable(tuple(int(t) for t in golden["mlp"]), skip, halves))


def test_all_160_golden_runs_are_decided_as_the_original_decided_them():
    for golden in GOLDENS:
        ours = plan(as_ours(golden), golden["timesteps"], [Site(0, part) for part in PARTS])
        columns = ["".join(act.value for act in column) for column in zip(*ours.acts, strict=True)]
        # the original stores attention whenever it computes, so only what it reused is a decision
        decided = golden["decisions"]
        assert [column.replace("S", ".") for column in columns[:3]] == [decided[part] for part in PARTS[:3]]
        assert columns[3] == decided.get("mlp_block0", "." * len(ours))
    assert len(GOLDENS) == 160


def test_the_recipes_are_the_originals():
    tables = {"opensora-1.2": OPEN_SORA_MLP, "latte-1": LATTE_MLP, "opensora-plan-1.1": OPEN_SORA_PLAN_MLP}
    named = set()
    for golden in GOLDENS:
        if golden["model"] != "random":
            pyramid = as_ours(golden)
            named.add(replace(pyramid, mlp=None))
            assert set(pyramid.mlp.starts) == set(tables[golden["model"]].starts)
            assert replace(pyramid.mlp, starts=()) == replace(tables[golden["model"]], starts=())
    attention = {replace(recipe, mlp=None) for recipe in RECIPES.values() if recipe}
    assert named | {RECIPES["open-sora-plan-579"]} == attention  # which no golden run has


class OriginalCounter:
    """VideoSys' decision for one kind of attention, videosys/core/pab/pab_mgr.py: if_broadcast_spatial and its like."""

    def __init__(self, rule, steps):
        self.rule, self.steps, self.count = rule, steps, 0

    def broadcasts(self, timestep):
        inside = self.rule.window.lo < int(timestep) < self.rule.window.hi
        decision = self.count % self.rule.every != 0 and inside
        self.count = (self.count + 1) % self.steps
        return decision


def reused(rule, run):
    return [act is Act.REUSE for act in acts(rule, run)]


whole_windows = st.tuples(st.integers(-1, 1001), st.integers(-1, 1001)).map(sorted).map(lambda ends: Window(*ends))
whole_rules = st.builds(Broadcast, st.integers(1, 12), whole_windows)
whole_runs = st.lists(st.integers(0, 1000), min_size=1, max_size=60).map(lambda run: sorted(run, reverse=True))


@given(whole_rules, whole_runs)
def test_the_originals_counters_decide_the_same_in_run_after_run(rule, run):
    original = OriginalCounter(rule, steps=len(run))
    for _ in range(3):
        assert [original.broadcasts(t) for t in run] == reused(rule, run)


@given(st.builds(Broadcast, st.integers(1, 12), whole_windows.filter(lambda window: window.lo >= 128)), st.data())
def test_they_do_so_for_timesteps_in_bfloat16_which_are_whole_from_128_on(rule, data):
    steps, shift = data.draw(st.integers(1, 60)), data.draw(st.floats(0.25, 20))
    run = seen(RectifiedFlow(steps, shift, "velocity").timesteps, torch.bfloat16)
    original = OriginalCounter(rule, steps=len(run))
    assert [original.broadcasts(t) for t in run] == reused(rule, run)


@given(whole_rules, rectified_flow_runs)
def test_other_timesteps_the_original_cuts_to_whole_numbers_so_that_its_windows_open_one_timestep_above_lo(rule, run):
    original = OriginalCounter(rule, steps=len(run))
    decided = [original.broadcasts(t) for t in run]
    assert decided == reused(rule, [int(t) for t in run])
    for t, theirs, ours in zip(run, decided, reused(rule, run), strict=True):
        assert theirs == ours or (ours and rule.window.lo < t < rule.window.lo + 1)


def test_where_a_sampler_calls_more_often_than_it_steps_the_original_is_out_of_phase_in_its_second_run():
    rule, run = Broadcast(4, ALWAYS), range(159, 0, -1)  # PNDM's 150 steps are 159 calls
    original = OriginalCounter(rule, steps=150)
    assert [original.broadcasts(t) for t in run][:150] == reused(rule, run)[:150]
    second = [original.broadcasts(t) for t in run]
    assert second[0]  # of what the first run left behind
    assert second != reused(rule, run)


def original_mlp(rule, timestep, all_timesteps):
    """VideoSys' decision for one MLP, videosys/core/pab/pab_mgr.py: if_skip_mlp. Times are found by their value."""
    if timestep in rule.starts:
        return False
    for start in rule.starts:
        if start in all_timesteps:
            index = all_timesteps.index(start)
            if timestep in all_timesteps[index : index + 1 + rule.skip]:
                return True
    return False


# distinct times: where one appears twice the original takes the one for the other, and has by then dropped what it kept
@given(tables, st.lists(times, unique=True, max_size=40).map(lambda run: sorted(run, reverse=True)))
@example(OPEN_SORA_MLP, OPEN_SORA_480P)
def test_the_originals_table_lookup_decides_the_same(rule, run):
    assert [original_mlp(rule, t, run) for t in run] == reused(rule, run)


# Few rows are distinct, and equal rows do equal work: a graph can be kept for each.


def test_a_run_of_pab_246_has_6_distinct_rows_and_9_with_mlp_broadcast():
    assert len(set(plan(PAB_246, OPEN_SORA_480P, OPEN_SORA_SITES).acts)) == 6
    assert len(set(plan(RECIPES["open-sora-246-mlp"], OPEN_SORA_480P, OPEN_SORA_SITES).acts)) == 9


def test_no_real_run_of_a_published_recipe_has_more_than_22_distinct_rows():
    real = [golden for golden in GOLDENS if golden["model"] != "random"]
    distinct = [len(set(plan(as_ours(golden), golden["timesteps"], OPEN_SORA_SITES).acts)) for golden in real]
    assert max(distinct) == 22  # MLP broadcast in 159 calls


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), runs)
def test_distinct_rows_are_at_most_one_a_phase_and_three_for_the_ends_of_the_window(a, b, c, run):
    rules = {part: Broadcast(every, OPEN_SORA) for part, every in zip(PARTS, (a, b, c), strict=False)}
    rows = plan(Pyramid(**rules), run, [Site(0, part) for part in PARTS]).acts
    # outside; the last call before the window; inside, by the phase; the last call inside
    assert len(set(rows)) <= 1 + 1 + lcm(a, b, c) + 1


# A plan is a value, and only what can be run is one.


@given(tables_of_acts())
def test_a_plan_can_be_built_if_and_only_if_every_column_is_a_word_of_compute_and_store_reuse_reuse(table):
    run, sites, rows = table
    columns = ["".join(row[i].value for row in rows) for i in range(len(sites))]
    if all(re.fullmatch(r"(\.|SR+)*", column) for column in columns):
        assert Plan(run, sites, rows).acts == rows
    else:
        with pytest.raises(ValueError, match=r"call \d+ (reuses|stores) Site"):
            Plan(run, sites, rows)


def test_a_plan_that_reuses_what_was_never_stored_says_where():
    with pytest.raises(ValueError, match=r"call 1 reuses Site\(block=0, part='spatial'\), which was not stored"):
        Plan((2, 1), (SITE,), ((Act.COMPUTE,), (Act.REUSE,)))
    with pytest.raises(ValueError, match=r"call 1 stores Site\(block=0, part='spatial'\), which is not reused"):
        Plan((2, 1), (SITE,), ((Act.COMPUTE,), (Act.STORE,)))


def test_a_plan_has_an_act_for_every_call_and_site():
    with pytest.raises(ValueError, match="2 calls and 1 sites needs as many acts"):
        Plan((2, 1), (SITE,), ((Act.COMPUTE,),))
    with pytest.raises(ValueError, match="1 calls and 1 sites needs as many acts"):
        Plan((1,), (SITE,), ((),))


@given(pyramids, runs, sites)
def test_plans_of_equal_rules_times_and_sites_are_equal(pyramid, run, sites):
    one, other = plan(pyramid, run, sites), plan(Pyramid.from_json(pyramid.to_json()), list(run), list(sites))
    assert one == other
    assert hash(one) == hash(other)


def test_nothing_writes_to_a_plan():
    with pytest.raises(FrozenInstanceError):
        plan(PAB_246, OPEN_SORA_480P, OPEN_SORA_SITES).acts = ()


@given(plans)
def test_a_call_of_a_plan_knows_its_time_its_acts_and_which_reuses_are_the_last(plan):
    assert [plan[i].acts for i in range(len(plan))] == list(plan.acts)
    assert [(plan[i].index, plan[i].timestep) for i in range(len(plan))] == list(enumerate(plan.timesteps))
    for column in range(len(plan.sites)):
        letters = "".join(row[column].value for row in plan.acts)
        ends = [match.end() - 1 for match in re.finditer("R+", letters)]
        assert [i for i in range(len(plan)) if plan[i].last[column]] == ends


# What a plan says of its run, before it.


@given(plans)
def test_every_act_is_counted_under_its_part(plan):
    counts = plan.counts()
    assert set(counts) == {site.part for site in plan.sites}
    for part, count in counts.items():
        mine = [act for row in plan.acts for site, act in zip(plan.sites, row, strict=True) if site.part == part]
        assert count == Counter(mine)


@given(plans)
def test_held_after_a_call_is_what_the_next_call_reuses(plan):
    rows = [*plan.acts, (Act.COMPUTE,) * len(plan.sites)]
    assert [after for _, after in plan.held()] == [row.count(Act.REUSE) for row in rows[1:]]


@given(plans)
def test_held_at_most_in_a_call_is_between_two_of_its_sites(plan):
    rows = [*plan.acts, (Act.COMPUTE,) * len(plan.sites)]
    for (most, _), row, then in zip(plan.held(), rows, rows[1:], strict=False):
        # the sites up to a point hold already what the next call reuses, those behind it still what this one does
        points = range(len(plan.sites) + 1)
        assert most == max(then[:k].count(Act.REUSE) + row[k:].count(Act.REUSE) for k in points)


def test_pab_246_holds_at_most_one_update_for_each_of_open_soras_112_attentions():
    assert max(most for most, _ in plan(PAB_246, OPEN_SORA_480P, OPEN_SORA_SITES).held()) == 112


@given(plans, st.tuples(*[st.integers(0, 9**9)] * 5))
def test_operations_are_those_of_the_computed_sites_and_of_every_calls_rest(plan, prices):
    parts, rest = dict(zip(PARTS, prices, strict=False)), prices[-1]
    total = 0
    for row in plan.acts:
        total += rest
        for site, act in zip(plan.sites, row, strict=True):
            if act is not Act.REUSE:
                total += parts[site.part]
    assert plan.flops(parts, rest) == total


def test_a_plan_prints_one_line_a_call():
    mlp = Broadcast(3, ALWAYS, blocks=(0,))
    pyramid = Pyramid(spatial=Broadcast(2, ALWAYS), cross=Broadcast(3, ALWAYS), mlp=mlp)
    sites = replace(PRESETS["opensora-1.2"], depth=1).sites
    assert [text.rstrip() for text in str(plan(pyramid, [1000, 750, 500, 62.5], sites)).splitlines()] == [
        "call  timestep  spatial   temporal  cross     mlp       held",
        "   0    1000.0  S         .         S         .1 S1        4",
        "   1     750.0  R         .         R         .1 R1        3",
        "   2     500.0  S         .         R         .1 R1        1",
        "   3      62.5  R         .         .         .            0",
    ]


@given(pyramids, runs, sites)
def test_and_each_line_can_be_read_back(pyramid, run, sites):
    table = plan(pyramid, run, sites)
    header, *lines = str(table).splitlines()
    assert header.split() == ["call", "timestep", *(p for p in PARTS if any(s.part == p for s in sites)), "held"]
    for i, (text, row) in enumerate(zip(lines, table.acts, strict=True)):
        cells = [text[16 + 10 * k : 26 + 10 * k].split() for k in range(len(header.split()) - 3)]
        told = Counter()
        for part, cell in zip(header.split()[2:-1], cells, strict=True):
            for word in cell:
                told[part, word[0]] = int(word[1:] or sum(site.part == part for site in sites))
        assert told == Counter((site.part, act.value) for site, act in zip(sites, row, strict=True))
        assert text.split()[:2] == [str(i), f"{run[i]:.1f}"]
        assert text.split()[-1] == str(table.held()[i][1])


# Plans and pyramids are saved as JSON.


@given(plans)
def test_a_plan_read_from_its_json_is_the_plan(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)


@given(pyramids)
def test_a_pyramid_read_from_its_json_is_the_pyramid(pyramid):
    assert Pyramid.from_json(pyramid.to_json()) == pyramid


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe])
def test_so_is_every_recipe(name):
    assert Pyramid.from_json(RECIPES[name].to_json()) == RECIPES[name]


@given(plans, pyramids)
def test_the_json_is_what_the_standard_calls_json(plan, pyramid):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(plan.to_json(), parse_constant=refuse)
    json.loads(pyramid.to_json(), parse_constant=refuse)


@given(spoiled(pyramids.map(Pyramid.to_json)), runs, sites)
def test_whatever_is_wrong_with_a_pyramids_json_is_a_value_error_or_else_it_is_a_pyramid(text, run, sites):
    try:
        pyramid = Pyramid.from_json(text)
    except ValueError:
        return
    assert Pyramid.from_json(pyramid.to_json()) == pyramid
    plan(pyramid, run, sites)


@given(spoiled(plans.map(Plan.to_json)))
def test_whatever_is_wrong_with_a_plans_json_is_a_value_error_or_else_it_is_a_plan(text):
    try:
        plan = Plan.from_json(text)
    except ValueError:
        return
    assert Plan.from_json(plan.to_json()) == plan
    str(plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value at line 1, column 1"),
        ('{"spatial": null,\n "cross": }', "not JSON: Expecting value at line 2, column 11"),
        ("[]", r"a pyramid is a JSON object, got \[\]"),
        ('{"spatail": null}', "unknown part 'spatail'; known: spatial, temporal, cross, mlp"),
        ('{"spatial": 0}', "spatial: a rule is a JSON object or null, got 0"),
        ('{"cross": "every"}', "cross: a rule is a JSON object or null, got 'every'"),
    ],
)
def test_an_error_in_a_pyramids_json_names_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        Pyramid.from_json(text)


OK = {"lo": 450, "hi": 930}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"every": 2}, "'window' is missing"),
        ({"every": 2, "window": {}}, "window: 'lo' is missing; known: lo, hi, unit"),
        ({"window": OK}, "'every' is missing; known: every, window, blocks"),
        ({"every": 2, "window": OK, "evry": 3}, "unknown 'evry'; known: every, window, blocks"),
        ({"every": "2", "window": OK}, "Broadcast.every must be a whole number from 1, got '2'"),
        ({"every": 2.0, "window": OK}, "Broadcast.every must be a whole number from 1, got 2.0"),
        ({"every": True, "window": OK}, "Broadcast.every must be a whole number from 1, got True"),
        ({"every": 0, "window": OK}, "Broadcast.every must be a whole number from 1, got 0"),
        ({"every": 2, "window": [450, 930]}, "window is a JSON object, got .450, 930."),
        ({"every": 2, "window": {"lo": 450}}, "window: 'hi' is missing; known: lo, hi, unit"),
        ({"every": 2, "window": {"lo": "450", "hi": "930"}}, "Window.lo and hi must be finite numbers, got .*'450'"),
        ({"every": 2, "window": {"lo": False, "hi": True}}, "Window.lo and hi must be finite numbers, got .*False"),
        ({"every": 2, "window": {"lo": float("nan"), "hi": 1}}, "Window.lo and hi must be finite numbers, got .*nan"),
        ({"every": 2, "window": {"lo": 0, "hi": float("inf")}}, "Window.lo and hi must be finite numbers, got .*inf"),
        ({"every": 2, "window": {"lo": 930, "hi": 450}}, "Window.lo must not be above Window.hi, got 930 and 450"),
        ({"every": 2, "window": {**OK, "unit": "steps"}}, "Window.unit must be 'timestep' or 'fraction', got 'steps'"),
        ({"every": 2, "window": OK, "blocks": 3}, "Broadcast.blocks must be whole numbers from 0, got 3"),
        ({"every": 2, "window": OK, "blocks": [0, -1]}, "Broadcast.blocks must be whole numbers from 0, got .*-1"),
        ({"every": 2, "window": OK, "blocks": [True]}, "Broadcast.blocks must be whole numbers from 0, got .*True"),
        ({"starts": [676]}, "'skip' is missing; known: starts, skip, blocks"),
        ({"starts": [676], "skip": -1}, "TimestepTable.skip must be a whole number from 0, got -1"),
        ({"starts": "676", "skip": 2}, "TimestepTable.starts must be finite numbers, got '676'"),
        ({"starts": [None], "skip": 2}, "TimestepTable.starts must be finite numbers, got .*None"),
    ],
)
def test_an_error_in_a_rules_json_names_the_part_and_the_field(rule, message):
    with pytest.raises(ValueError, match=f"^cross: .*{message}"):
        Pyramid.from_json(json.dumps({"spatial": None, "cross": rule}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "a plan of version 2 cannot be read, expected 1"),
        ({"timesteps": [2]}, "a plan of 1 calls and 1 sites needs as many acts"),
        ({"timesteps": [2, "1"]}, "Plan.timesteps must be finite numbers"),
        ({"sites": [[0, "spatail"]]}, "a site is a block from 0 and one of spatial, .* got 0 and 'spatail'"),
        ({"sites": [[-1, "spatial"]]}, "a site is a block from 0 and one of spatial, .* got -1 and 'spatial'"),
        ({"sites": [3]}, "not a plan: "),
        ({"acts": ["S", "X"]}, "'X' is not a valid Act"),
        ({"acts": [".", "R"]}, "call 1 reuses .*, which was not stored"),
        ({"acts": None}, "not a plan: "),
    ],
)
def test_an_error_in_a_plans_json_says_what_is_wrong(change, message):
    data = json.loads(plan(Pyramid(spatial=Broadcast(2, ALWAYS)), [2, 1], [SITE]).to_json())
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps({**data, **change}))


@pytest.mark.parametrize("missing", ["timesteps", "sites", "acts"])
def test_a_plans_json_without_a_field_says_which(missing):
    data = json.loads(plan(None, [2, 1], [SITE]).to_json())
    del data[missing]
    with pytest.raises(ValueError, match=f"a plan's '{missing}' is missing"):
        Plan.from_json(json.dumps(data))


@given(windows)
def test_a_window_is_checked_when_it_is_made(window):
    if window.lo < window.hi:
        with pytest.raises(ValueError, match="Window.lo must not be above Window.hi"):
            replace(window, lo=window.hi, hi=window.lo)
    for wrong in (float("nan"), float("inf"), None, "1", True):
        with pytest.raises(ValueError, match="Window.lo and hi must be finite numbers"):
            replace(window, hi=wrong)


def test_a_huge_number_of_skipped_calls_costs_nothing():
    assert line(TimestepTable((2,), skip=10**12), [3, 2, 1, 0]) == ".SRR"
