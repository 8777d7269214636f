"""Captions to files: every stage of Open-Sora 1.2 at its published size, with random weights.

    python scripts/bench_stages.py                                # all cases; writes benchmarks/stages.json
    python scripts/bench_stages.py --cases 480p-2s --recipes none --json stages.json
    python scripts/bench_stages.py table                          # Markdown, from benchmarks/stages.json
    python scripts/bench_stages.py table --into benchmarks/README.md

A T5 of v1.1 XXL's shape, STDiT3-XL/2 and the video autoencoder make up a minidit.Pipeline, and minidit.generate runs
it: each stage is on the GPU alone, else in the computer's memory, and the times of bringing it there and back are told
apart; a part of the video is decoded while the part before it is written. Predicted is what fitting.fit says before;
measured and reserved are PyTorch's peaks in each stage. All weights are bfloat16; the original encodes in float32, with
twice the bytes. Words are cut by a tokenizer that is made here. A short run of each recipe comes first, and is not
timed. What is written is noise, which compresses worst.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bench
import measuring
from bench_parallel import small
from measuring import positive, precision, signed, wait
from minidit import cli, fitting, pipeline
from minidit.broadcast import RECIPES
from minidit.config import ModelConfig
from minidit.decoders import OpenSora
from minidit.model import DiT
from minidit.opensora_vae import OPENSORA_VAE_12, OpenSoraVAE, VAEConfig
from minidit.options import Parser
from minidit.pipeline import Pipeline
from minidit.stages import Prompts, Stages
from minidit.text import CONFIG, WORDS, T5Text, rules_of
from minidit.tiling import Tile
from minidit.video import save_video

RESULT = "benchmarks/stages.json"
CASES = tuple(name for name in bench.CASES if name != "latte")
BY_DEFAULT = ("480p-2s", "720p-2s")
DEFAULT_RECIPES = ("none", "pab-246")
WARM = 10  # steps of a run before the timed ones: broadcast has calls of all kinds in it
STAGES = ("text", "model", "decoder")
CAPTION = (
    "a red fox runs through deep snow at the edge of a forest, its breath white in the cold, "
    "while the first light of a winter morning falls between the trees"
)
# google/t5-v1_1-xxl config.json
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
T5_SMALL = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 128}
VAE_SMALL = replace(
    OPENSORA_VAE_12,
    spatial_dims=(8, 8, 8, 8),
    spatial_depth=1,
    spatial_groups=4,
    temporal_dims=(8, 8, 8, 8),
    temporal_depth=1,
    temporal_groups=4,
)


# What is measured: random weights, built where they are used


def words(lines: Sequence[str], size: int) -> bytes:
    """A sentencepiece model of so many pieces, of a few letters each, with T5's special tokens."""
    model = io.BytesIO()
    import_module("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter([*lines] * 20),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def t5_folder(folder: Path, shape: Mapping[str, int]) -> Path:
    """All that a folder of a T5 v1.1 holds but its weights."""
    (folder / CONFIG).write_text(json.dumps({**shape, "feed_forward_proj": "gated-gelu"}))
    (folder / WORDS).write_bytes(words([CAPTION, "aesthetic score: 0123456789."], 80))
    return folder


@dataclass(frozen=True)
class RandomPrompts(Prompts):
    """With a T5 of its folder's shape and random weights, built on a device."""

    device: torch.device

    @cached_property
    def t5(self) -> T5Text:
        transformers, sentencepiece = import_module("transformers"), import_module("sentencepiece")
        folder = Path(self.source)
        with self.device:
            config = transformers.T5Config(**json.loads((folder / CONFIG).read_text()))
            encoder = transformers.T5EncoderModel(config).to(self.dtype).eval().requires_grad_(False)
        cut = sentencepiece.SentencePieceProcessor(model_file=str(folder / WORDS))
        return T5Text(encoder, cut, self.length)


def build(config: ModelConfig, vae: VAEConfig, folder: Path, device: torch.device) -> Pipeline:
    """Of random weights on the device, none of the model's zero. folder: see t5_folder."""
    torch.manual_seed(0)
    dtype = precision(device)
    text = RandomPrompts(folder, rules_of(config), config.caption_length, config.null_caption, dtype, device)
    with device:
        model = DiT(config).to(dtype).eval().requires_grad_(False)
        decoder = OpenSora(OpenSoraVAE(vae)).eval().requires_grad_(False)
    for parameter in decoder.vae.parameters():  # buffers keep their dtype, as load_decoder's
        parameter.data = parameter.data.to(dtype)
    return Pipeline(config, dtype, text, lambda: model, decoder, device)


def settle(pipe: Pipeline) -> None:
    """All in the computer's memory, from where Pipeline.load would bring it to the device."""
    for module in (pipe.text.module, pipe.model, pipe.decoder):
        assert isinstance(module, nn.Module)
        module.to("cpu")


# How it is measured


@contextmanager
def timed(device: torch.device) -> Iterator[dict[str, dict[str, Any]]]:
    """Of each stage that runs meanwhile: seconds there, seconds of the way there and back, and GiB at most."""
    found, before = dict[str, dict[str, Any]](), Stages.on
    gpu = device.type == "cuda"

    def now() -> float:
        wait(device)
        return time.perf_counter()

    @contextmanager
    def on(stages: Stages, name: str, part: Any) -> Iterator[Any]:
        start = now()
        with before(stages, name, part):
            there = now()
            yield part
            done = now()
        found[name] = {
            "seconds": done - there,
            "moving_s": there - start + now() - done,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if gpu else None,
            "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30 if gpu else None,
        }

    Stages.on = on  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        Stages.on = before  # type: ignore[method-assign]


@contextmanager
def finiteness(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Of each part, whether all that it gives meanwhile are numbers; read it afterwards, so that nothing waits."""
    found = dict[str, Tensor]()

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            values = output if isinstance(output, Tensor) else output[0]
            found[name] = values.isfinite().all() & found.get(name, True)

        return look

    hooks = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def run(
    pipe: Pipeline, config: ModelConfig, recipe: str, tile: Tile | None, into: Callable[[Iterator[Tensor]], Any]
) -> pipeline.Report:
    asked = config.sampling
    _, report = pipeline.generate(
        pipe,
        CAPTION,
        pyramid=RECIPES[recipe],
        steps=asked.steps,
        frames=asked.frames,
        height=asked.height,
        width=asked.width,
        tile=tile,
        into=into,
    )
    return report


def measure(pipe: Pipeline, name: str, config: ModelConfig, recipe: str, file: Path) -> dict[str, Any]:
    """A row: what was predicted of a case by a recipe, and what each stage took. file: for the video."""
    gpu = pipe.device.type == "cuda"
    free = torch.cuda.mem_get_info(pipe.device)[0] if gpu else cli.memory()
    predicted, tile = fitting.fit(pipe, fitting.Run(config=config, pyramid=RECIPES[recipe]), free)
    assert isinstance(pipe.text, Prompts) and isinstance(pipe.decoder, OpenSora)
    parts = {"text": pipe.text.t5.encoder, "model": pipe.model, "decoder": pipe.decoder.vae.spatial.decoder}
    asked, (_, latent) = config.sampling, pipe.schedule(config)
    written = partial(save_video, path=file, fps=asked.fps, scale=1)
    with timed(pipe.device) as stages, finiteness(parts) as finite:
        report = run(pipe, config, recipe, tile, written)
    return {
        "case": name,
        "recipe": recipe,
        "frames": asked.frames,
        "height": latent[1] * asked.space,  # of whole latents
        "width": latent[2] * asked.space,
        "steps": len(report.plan),
        "tokens": len(pipe.text.t5.words.encode(pipe.text.rules.prompt(CAPTION))) + 1,  # and the end's
        "tile": tile and tile.size,
        "free_gib": free / 2**30,
        "cache_gib": report.peak_bytes / 2**30,
        "stages": {
            stage: {**stages[stage], "predicted_gib": predicted[stage] / 2**30, "finite": bool(finite[stage])}
            for stage in STAGES
        },
        "file_bytes": file.stat().st_size,
        "all_s": report.seconds,
    }


# What is shown


def gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def strange(row: Mapping[str, Any]) -> list[str]:
    """The stages that gave what are no finite numbers."""
    return [name for name, stage in row["stages"].items() if not stage["finite"]]


def report(row: Mapping[str, Any]) -> str:
    """What was measured of a row, a line a stage."""
    size = f"{row['frames']} frames of {row['height']}x{row['width']}, {row['steps']} steps, {row['tokens']} tokens"
    lines = [f"{row['case']} {row['recipe']}: {row['all_s']:.1f} s; {size}, tile {row['tile'] or 'none'}"]
    for name, stage in row["stages"].items():
        held = f"{gib(stage['peak_gib'])} GiB, reserved {gib(stage['reserved_gib'])}, predicted"
        times = f"{stage['seconds']:>7.2f} s, moving {stage['moving_s']:>5.2f} s"
        numbers = "" if stage["finite"] else "  NOT FINITE"
        lines.append(f"  {name:<8}{times}  {held} {gib(stage['predicted_gib'])}{numbers}")
    return "\n".join([*lines, f"  {'file':<8}{row['file_bytes'] / 2**20:>7.1f} MiB"])


def table(measured: Mapping[str, Any]) -> str:
    """Markdown: times of all stages, and under them their memory."""
    rows = measured["rows"]
    wrong = [f"{row['case']} {row['recipe']}: {', '.join(strange(row))}" for row in rows if strange(row)]
    about = [
        signed(measured),
        f"Random weights in {measured['dtype']}.",
        "Moving: the stages' weights between the computer's memory and the GPU's.",
        f"Not finite were {'; '.join(wrong)}." if wrong else "All that the stages gave were finite numbers.",
    ]
    return "\n".join([*times(rows), "", *memory(rows), "", " ".join(about)])


def times(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ("case", "recipe", "text, s", "model, s", "decoder and mp4, s", "moving, s", "all, s", "frames / s")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        stages = [row["stages"][name] for name in STAGES]
        moving, all_s = sum(stage["moving_s"] for stage in stages), row["all_s"]
        seconds = *(stage["seconds"] for stage in stages), moving, all_s, row["frames"] / all_s
        lines.append(f"| {' | '.join([row['case'], row['recipe'], *(f'{value:.2f}' for value in seconds)])} |")
    return lines


def memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ("case", "recipe", "stage", "peak, GiB", "predicted", "predicted / peak", "reserved", "tile")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        for name in STAGES:
            stage = row["stages"][name]
            peak, expected = stage["peak_gib"], stage["predicted_gib"]
            over = f"{expected / peak:.2f}" if peak else "-"
            tile = str(row["tile"] or "none") if name == "decoder" else "-"
            cells = [row["case"], row["recipe"], name, gib(peak), gib(expected), over, gib(stage["reserved_gib"]), tile]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def command_line() -> Parser:
    parser = measuring.command_line("bench_stages", __doc__, RESULT)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=BY_DEFAULT, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=DEFAULT_RECIPES, metavar="RECIPE")
    parser.add_argument("--steps", type=positive, metavar="N", help="of a run: 30")
    return parser


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    cases = {name: bench.CASES[name].config for name in dict.fromkeys(args.cases)}
    shape, vae = T5_XXL, OPENSORA_VAE_12
    if device.type == "cpu":
        cases = {name: pipeline.asked(small(config), frames=17) for name, config in cases.items()}
        shape, vae = {**T5_SMALL, "d_model": small(bench.CASES[BY_DEFAULT[0]].config).caption_dim}, VAE_SMALL
    cases = {name: pipeline.asked(config, steps=args.steps) for name, config in cases.items()}
    first, recipes = next(iter(cases.values())), tuple(dict.fromkeys(args.recipes))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        pipe = build(first, vae, t5_folder(Path(folder), shape), device)
        settle(pipe)
        print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
        for recipe in recipes:  # everything is compiled
            run(pipe, pipeline.asked(first, steps=WARM), recipe, None, pipeline.whole)
        for name, config in cases.items():
            for recipe in recipes:
                row = measure(pipe, name, config, recipe, Path(folder) / "video.mp4")
                print(report(row), flush=True)
                yield row


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser.parse_args(argv)
        if args.what == "table":
            file = args.json or Path(RESULT)
            measuring.show(table(measuring.read(file, "rows")), file.stem, args.into)
            return 0
        device = measuring.started(args.device)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    found = measuring.origin(device, "bench_stages", argv)
    usual = (args.cases, args.recipes, args.steps) == (BY_DEFAULT, DEFAULT_RECIPES, None) and device.type == "cuda"
    rows = measuring.gather("stages", measure_all(args, device), args.json, found, RESULT, not usual)
    return int(any(map(strange, rows)))


if __name__ == "__main__":
    sys.exit(main())
