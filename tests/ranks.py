"""Processes that stand for the ranks of a run, started once for all tests: gloo on this machine's CPUs."""

import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 8
SIZES = (2, 3, 4, 8)  # worlds that a job can have, as groups of the first ranks


def serve(rank, store, pipe):
    """Do jobs until the pipe closes: (function, size of the world, arguments) -> its result or its error."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timeout)
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in SIZES}
    pairs = {pair: dist.new_group(list(pair), timeout=timeout) for pair in PAIRS}
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((job(groups, pairs, *args), None))
        except Exception as error:
            pipe.send((None, (error, traceback.format_exc())))


# groups of the ranks of four that the halves of guidance need: two of a sequence, two that have the same tokens
PAIRS = ((0, 1), (2, 3), (0, 2), (1, 3))


class Ranks:
    """The pool. run(job, size, *args) calls job(groups, pairs, *args) on the first ranks -> their results."""

    def __init__(self, folder):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "minidit", "tests.ranks"])
        ends = [context.Pipe() for _ in range(WORLD)]
        self.pipes = [ours for ours, _ in ends]
        arguments = [(rank, folder / "store", theirs) for rank, (_, theirs) in enumerate(ends)]
        self.processes = [context.Process(target=serve, args=args, daemon=True) for args in arguments]
        environment = os.environ.copy()
        os.environ["OMP_NUM_THREADS"] = "1"
        for process in self.processes:
            process.start()
        os.environ.clear()
        os.environ.update(environment)

    def run(self, job, size, *args):
        for pipe in self.pipes[:size]:
            pipe.send((job, args))
        answers = [pipe.recv() for pipe in self.pipes[:size]]
        failed = [error for _, error in answers if error]
        # a rank that another one has left alone with a collective only says that it timed out
        for error, trace in sorted(failed, key=lambda found: "Gloo" in str(found) or "gloo" in str(found)):
            raise error from RuntimeError(trace)
        return [answer for answer, _ in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
