"""Train the embedded text-to-video model from scratch, on videos that are drawn as they are needed.

    python scripts/train.py --steps 10000                          # one GPU
    torchrun --nproc-per-node 8 scripts/train.py --steps 10000     # as many as there are
    python scripts/train.py --steps 10000                          # after an interruption: goes on where it was

Rectified flow: z = (1 - t) data + t noise, the network predicts the data, the loss is that of the velocity, more or
less important by t. Everything random in a step is a function of the seed and the step's number. An interrupted run
(Ctrl-C, SIGTERM) ends the step in hand, saves its state, and goes on from there exactly as it would have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import judge
import shapes
from minidit import checkpoint, parallel, samplers, video
from minidit.config import CaptionConfig, ModelConfig, Positions, Sampling
from minidit.model import DiT
from minidit.pipeline import generate

TINY = ModelConfig(
    depth=3,
    blocks=(("spatial", "cross", "mlp"), ("temporal", "cross", "mlp")),
    dim=288,
    heads=4,  # of 72 channels, as in STDiT3-XL/2
    mlp_ratio=2.0,
    patch=(1, 8, 8),
    odd="pad",
    in_channels=3,
    out_channels=3,
    qk_norm=True,
    modulation="shared",
    bare_temporal=False,
    told="fps",
    classes=None,
    positions=Positions(space="area", base=shapes.SIZE, scale=1.0, time="rope-after-norm", pace=1.0, frames=None),
    caption_dim=128,
    caption_length=24,
    null_caption=True,
    rounds_time=True,
    sampling=Sampling(
        method="rectified-flow",
        prediction="sample",
        guided=3,
        shift=10.0,  # place and motion are decided where a frame of large flat shapes is nearly all noise
        steps=30,
        guidance=3.0,
        frames=shapes.FRAMES,
        height=shapes.SIZE,
        width=shapes.SIZE,
        fps=8,
        space=1,
        chunk=1,
        time=1,
    ),
    captions=CaptionConfig(vocabulary=shapes.VOCABULARY, heads=4, depth=2),
)
EARLIEST = 0.05  # of t in 0..1: the velocity of a predicted sample is divided by t
EVERY = 50  # steps between two points of the loss curve
STATES = ("model", "average", "muon", "adamw")  # of a run that goes on where it was
DROPPED = 0.1  # of the captions, so that guidance has something to move away from
DECIDING, SHARE = (0.92, 0.98), 2 / 3  # of t: where one of several places wins, and how many samples are drawn there
PAIRS = 0.7  # scenes of two actors: what goes wrong is mostly one of those


def draw(rng: random.Random) -> shapes.Scene:
    """A scene to learn from: more often than by chance of what is hard, two actors, and small ones."""
    actors = 2 if rng.random() < PAIRS else 1
    scene = shapes.sample_scene(rng, actors=actors)
    if any(actor.size == "small" for actor in scene.actors):
        return scene
    return shapes.sample_scene(rng, actors=actors)


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Item i is this rank's share of step i's batch: packed scenes (B, 2, 15) and caption tokens (B, L)."""

    def __init__(self, model: DiT, args: argparse.Namespace, share: slice) -> None:
        assert model.encoder is not None
        self.tokenize, self.args, self.share = deepcopy(model.encoder).cpu().tokenize, args, share

    def __len__(self) -> int:
        return int(self.args.steps)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rngs = [random.Random(f"{self.args.seed} {step} {i}") for i in range(self.args.batch)[self.share]]
        scenes = [draw(rng) for rng in rngs]
        captions = [shapes.caption(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
        return shapes.pack(scenes), self.tokenize(captions)


class Objective(nn.Module):
    """The loss of a batch, as one module for DistributedDataParallel."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: Tensor, tokens: Tensor, t: Tensor, noise: Tensor, drop: Tensor) -> Tensor:
        """data, noise: (B, C, T, H, W); tokens: (B, L); t: (B,) in 0..1; drop: (B,) captions to leave out -> ()."""
        model, defaults, wide = self.model, self.model.config.sampling, t[:, None, None, None, None]
        assert model.encoder is not None
        text, lengths = model.encoder(tokens)
        text = torch.where(drop[:, None, None], model.null_caption, text)
        z = torch.lerp(data, noise, wide)
        latent, fps = (data.shape[2], data.shape[3], data.shape[4]), torch.full_like(t, defaults.fps)
        cond = model.prepare(text, lengths, latent=latent, height=defaults.height, width=defaults.width, fps=fps)
        output = model(z, t * samplers.NUM_TIMESTEPS, cond)
        flow = samplers.velocity(output, z, wide * samplers.NUM_TIMESTEPS, "sample")
        return ((flow - (data - noise)).square().mean(dim=(1, 2, 3, 4)) * importance(t)).mean()


def importance(t: Tensor) -> Tensor:
    """What a sample's loss counts by its t (B,) in 0..1.

    Of nearly pure noise only the places and sizes that the caption leaves open can be guessed, and missing them makes
    losses and gradients larger than all that can be learned at smaller t: so those count more, as the root of
    1 + 40 (1 - t). Below 0.3 only edges are left, and count in proportion.
    """
    return (1 + 40 * (1 - t)).sqrt() * (t / 0.3).clamp(max=1)


def initialise(model: DiT) -> None:
    """Xavier everywhere; what writes to the output begins at zero, as in DiT."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.modulation.weight, std=0.02)
    nn.init.zeros_(model.final.linear.weight)


def times(u: Tensor) -> Tensor:
    """Evenly distributed u (B,) in 0..1 -> t (B,): as a run's steps are, but for SHARE of them, which are DECIDING."""
    shift = TINY.sampling.shift or 1.0
    first, last = (samplers.shifted(t, 1 / shift) for t in DECIDING)
    below = (1 - SHARE) * first / (1 - (last - first))  # of the samples
    inside = first + (u - below) / SHARE * (last - first)
    u = torch.where(u < below, u * first / below, inside.where(u < below + SHARE, 1 - (1 - u) * first / below))
    return samplers.shifted(u, shift).clamp(min=EARLIEST)


def random_parts(args: argparse.Namespace, step: int, shape: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """t (B,), noise and dropped captions (B,) of a step's whole batch, which every rank draws alike."""
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
    # one in each of `batch` equal parts of 0..1, so that no batch sees more of the noise than another
    u = torch.rand(args.batch, generator=generator, device=device)
    t = times((u + torch.arange(args.batch, device=device)) / args.batch)
    noise = torch.randn(args.batch, *shape, generator=generator, device=device)
    return t, noise, torch.rand(args.batch, generator=generator, device=device) < DROPPED


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then constant or a cosine down to a hundredth."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    if args.schedule == "constant":
        return float(args.lr)
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return float(args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))))


class Run:
    """Everything an interrupted training needs to go on: weights, their average, the optimizer, the loss curve."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device, self.step = args, device, 0
        self.losses = list[tuple[int, float]]()  # step, mean loss of the EVERY steps up to it
        self.recent = list[Tensor]()  # losses of the steps since
        self.model = DiT(TINY)
        initialise(self.model)
        if args.init:
            self.model.load_state_dict(checkpoint.load(args.init, dtype=torch.float32).state_dict())
        self.model.to(device)
        self.average = deepcopy(self.model).requires_grad_(False).eval()
        # Muon for what maps channels to channels inside of blocks: 700 further steps of a trained model left a loss 1 %
        # lower than AdamW's, and 375 of 400 captions right instead of 365
        matrices = [module.weight for module in self.model.blocks.modules() if isinstance(module, nn.Linear)]
        others = [p for p in self.model.parameters() if all(p is not matrix for matrix in matrices)]
        self.muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(
            others, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
        )

    @property
    def file(self) -> Path:
        return Path(self.args.out) / "state.pt"

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        names = ("batch", "seed", "steps", "lr", "schedule", "warmup", "ema", "clip", "init")
        return {**{name: getattr(self.args, name) for name in names}, "model": self.model.config.to_json()}

    def save(self) -> None:
        """The state, and beside it the model as it is now."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: getattr(self, name).state_dict() for name in STATES}
        curve = {"step": self.step, "losses": self.losses, "recent": self.recent}
        part = self.file.with_suffix(".part")
        torch.save({**parts, **curve, "settings": self.settings}, part)
        os.replace(part, self.file)
        checkpoint.save(self.average, self.args.out, dtype=torch.bfloat16)
        (self.file.parent / "losses.json").write_text(json.dumps(self.losses))

    def resume(self) -> None:
        """Take up the state in the output folder, if any. Raises ValueError if it was trained with other settings."""
        if not self.file.exists():
            return
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"{self.file} was trained with {name} {state['settings'][name]}, not {value}: "
                    "give the same, or another --out"
                )
        for name in STATES:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.losses, self.recent = state["step"], state["losses"], state["recent"]

    def advance(self, objective: nn.Module, packed: Tensor, tokens: Tensor, share: slice) -> Tensor:
        """One optimizer step on one batch. The loss of this rank's share."""
        args, device = self.args, self.device
        data = shapes.draw(packed.to(device, non_blocking=True))
        t, noise, drop = (part[share] for part in random_parts(args, self.step, data.shape[1:], device))
        for group in (*self.muon.param_groups, *self.adamw.param_groups):
            group["lr"] = learning_rate(args, self.step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = objective(data, tokens.to(device, non_blocking=True), t, noise, drop)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        self.muon.step()
        self.adamw.step()
        self.model.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return loss.detach()

    def show(self) -> None:
        """What the averaged weights make now: a sheet of samples, and how many of 64 captions the judge accepts."""
        captions = [caption for caption, _ in shapes.prompts(64, self.args.seed)]
        videos, _ = generate(self.average, captions, pyramid=None)
        right = sum(judge.accepts(v, shapes.parse(c)) for v, c in zip(videos, captions, strict=True))
        sheet = video.sheet(list(videos[:8]), captions[:8])
        sheet.save(Path(self.args.out) / f"step{self.step:06}.png")
        print(f"\nstep {self.step}: the judge accepts {right} of {len(captions)}", flush=True)


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> Run:
    """Run to the last step, or until interrupted, saving on the way. Every rank takes every world-th sample."""
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} does not divide among {world} processes")
    run, share = Run(args, device), slice(rank, args.batch, world)
    run.resume()
    objective: nn.Module = Objective(run.model)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective, [device] if device.type == "cuda" else None)
    if args.compile:
        for sublayer in run.model.sublayers:  # a few kinds to compile, where the whole model would take minutes
            sublayer.compile()
    rest, pinned = range(run.step, args.steps), device.type == "cuda"
    scenes = Scenes(run.model, args, share)
    loader = DataLoader(scenes, batch_size=None, sampler=rest, num_workers=args.workers, pin_memory=pinned)
    start = time.monotonic()
    until = start + 60 * args.minutes if args.minutes else math.inf
    with interruptions() as interrupted:
        for packed, tokens in loader:
            run.recent.append(run.advance(objective, packed, tokens, share))
            if run.step % EVERY == 0:
                run.losses.append((run.step, mean_over_ranks(torch.stack(run.recent).mean(), world)))
                run.recent.clear()
                if rank == 0:
                    progress(run, time.monotonic() - start, len(rest))
            if rank == 0 and args.show and run.step % args.show == 0:
                run.save()
                run.show()
            # several ranks have to stop at the same step, so they ask each other, and not at every step
            stop = interrupted.is_set() or time.monotonic() > until
            if (world == 1 and stop) or (world > 1 and run.step % EVERY == 0 and wanted_by_any(stop, device)):
                break
    if rank == 0:
        run.save()
    if world > 1:
        dist.barrier()  # the group must not lose a member while another still saves
    if interrupted.is_set():
        raise KeyboardInterrupt
    return run


def wanted_by_any(stop: bool, device: torch.device) -> bool:
    """Whether a rank wants to stop: the same answer on all of them."""
    return mean_over_ranks(torch.tensor(float(stop), device=device), dist.get_world_size()) > 0


@contextmanager
def interruptions() -> Iterator[Event]:
    """An event that Ctrl-C and SIGTERM set, instead of breaking off what is going on."""
    interrupted, signals = Event(), (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: interrupted.set()) for number in signals]
    try:
        yield interrupted
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def mean_over_ranks(value: Tensor, world: int) -> float:
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


def progress(run: Run, seconds: float, todo: int) -> None:
    done = todo - (run.args.steps - run.step)
    left = seconds / done * (todo - done)
    if not sys.stdout.isatty() and run.step % (10 * EVERY):
        return
    print(
        f"\rstep {run.step}/{run.args.steps}  loss {run.losses[-1][1]:.4f}  {done / seconds:.2f} steps/s  "
        f"{left / 60:.1f} min left",
        end="" if sys.stdout.isatty() else "\n",
        flush=True,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="checkpoints/tiny", help="folder for state, samples and the model")
    parser.add_argument("--init", help="start from the weights of this model's folder instead of random ones")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--batch", type=int, default=256, help="videos a step, over all ranks")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=2000, help="steps between sample sheets, 0 for none")
    parser.add_argument("--workers", type=int, default=min(12, (os.cpu_count() or 2) - 1), help="data processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    rank, world = parallel.rank(), parallel.world()
    try:
        with parallel.started(args.device) as device:
            run = train(args, rank, world, device)
        if rank == 0 and args.show and run.step == args.steps:
            run.show()
    except KeyboardInterrupt:
        print(f"\ninterrupted; the state is in {args.out}, the same command goes on", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
