"""minidit/graphs.py: a run whose equal calls are played is the run, bit for bit, whatever its plan."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidit import sampling
from minidit.broadcast import PARTS, Broadcast, Pyramid
from minidit.cache import Cache
from minidit.graphs import OFTEN, Graphs, Played
from strategies import blocks, windows
from tests.test_cache import MIXED, TINY, Run, built, model_of, prepared

rules = st.none() | st.builds(Broadcast, st.integers(1, 4), windows, blocks)
pyramids = st.builds(Pyramid, **dict.fromkeys(PARTS, rules))


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Log(TorchDispatchMode):
    """Every operation, with the tensors it was given and gave, and all else as it was."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result


class Recorder:
    """What a CUDA graph does, on a CPU: the same operations again, on the same places in memory, and no Python."""

    def __init__(self):
        self.recorded = self.played = 0

    def __call__(self, work):
        self.recorded += 1
        with Log() as log:
            result = work()
        return lambda: self.play(log.operations, result)

    def play(self, operations, result):
        self.played += 1
        for operation, args, kwargs, before in operations:
            given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
            now = operation(*args, **kwargs)
            for there, new in zip(tensors(before), tensors(now), strict=True):
                if there.untyped_storage()._cdata not in given:  # neither a view, nor written in place
                    there.copy_(new)
        return result.clone()


def outputs(model, run):
    """Of every call of a run: plain, and played."""
    x, cond = prepared(model, run)
    table, recorder = run.plan(model), Recorder()
    plain, played = Cache(table), Played(model, cond, table, recorder)
    for i in range(len(table)):
        call, z = table[i], x * (1 - i / len(table)) + i  # no two calls are given the same
        yield call, model(z, call.timestep, cond, call, plain), played(z, call), plain, played, recorder


@given(pyramids, st.integers(1, 12))
@settings(max_examples=40)
def test_a_played_run_is_the_run_and_holds_as_much(pyramid, steps):
    model = model_of(replace(TINY, depth=2))
    for _, expected, found, plain, played, _ in outputs(model, Run(pyramid=pyramid, steps=steps)):
        assert expected.equal(found)
        assert (plain.nbytes, plain.peak_bytes) == (played.cache.nbytes, played.cache.peak_bytes)


def test_a_row_is_made_once_recorded_once_and_else_played():
    model, run = model_of(TINY), Run(pyramid=MIXED, steps=20)
    *_, (*_, recorder) = outputs(model, run)
    counts = Counter(run.plan(model).acts)
    often = [count for count in counts.values() if count >= OFTEN]
    assert (recorder.recorded, recorder.played) == (len(often), sum(count - 1 for count in often))
    assert len(often) > 1 and len(often) < len(counts) or len(counts) == len(often) > 1


def test_without_a_recorder_nothing_is_copied():
    model, run = model_of(TINY), Run(pyramid=MIXED, steps=4)
    x, cond = prepared(model, run)
    played = Played(model, cond, run.plan(model), None)
    assert type(played.cache) is Cache


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("two_calls", [False, True], ids=["one batch", "two calls"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_a_recorded_run_is_the_run_bit_for_bit(dtype, two_calls, monkeypatch):
    model = built(replace(TINY, depth=3, dim=144), dtype).to("cuda")  # heads of 72
    run, recorded = Run(pyramid=MIXED, steps=20, batch=2, latent=(4, 9, 10), lengths=(2, 4)), []
    record = Graphs.__call__
    monkeypatch.setattr(Graphs, "__call__", lambda self, work: recorded.append(0) or record(self, work))
    z, text, lengths = (tensor.to("cuda") for tensor in run.tensors(model.config))
    options = dict(plan=run.plan(model), sampler=run.sampler, guidance=3.0, height=32, width=32, fps=8)
    videos = [
        sampling.sample(model, z, text.to(dtype), lengths, **options, two_calls=two_calls, recording=recording)
        for recording in (False, True, True)
    ]
    assert videos[0].isfinite().all() and videos[0].equal(videos[1]) and videos[1].equal(videos[2])
    often = sum(count >= OFTEN for count in Counter(run.plan(model).acts).values())
    assert len(recorded) == 2 * often * (1 + two_calls)  # none of the run that is not recorded
