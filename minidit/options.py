"""What the `minidit` command can be asked: its options, and what each of them has to be."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from minidit import parallel, sizes
from minidit.broadcast import RECIPES, Pyramid
from minidit.config import ModelConfig
from minidit.making import LONGEST
from minidit.presets import PRESETS
from minidit.weights.source import ENDINGS

Command = Callable[[argparse.Namespace], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST = 100_000  # steps or frames: a slip of the finger should not fill the memory with a table
GENERATE = """\
examples:
  minidit generate "a red circle moves to the right" --out red.mp4
  minidit generate "a blue star grows" --pyramid pab-357 --seed 7 --compare
  minidit generate "a sunset" --model opensora-1.2 --weights DIR --resolution 480p --seconds 2
  minidit generate "a sunset" --model DIR --reference first.png --reference last.png@at=-1 --loop 3
"""
PLAN = """\
examples:
  minidit plan --model opensora-1.2 --size 480x854 --frames 51
  minidit plan --pyramid mine.json --steps 50 --json -
"""
CONVERT = """\
examples:
  minidit convert hpcai-tech/OpenSora-STDiT-v3 opensora-1.2 --dtype bfloat16 --verify
  minidit convert ucf101.pt latte --dry-run
  minidit convert opensora-1.2 published --inverse
"""
PYRAMIDS = f"""
pyramids:
{textwrap.fill(", ".join(RECIPES) + ",", 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)}
  or a .json file with a rule for some of spatial, temporal, cross and mlp:
  {{"spatial": {{"every": 2, "window": {{"lo": 450, "hi": 930}}}}}}
"""


class Parser(argparse.ArgumentParser):
    """What it has to complain about is a ValueError, for cli.main to say as it says everything."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def parser(generate: Command, plan: Command, convert: Command) -> Parser:
    """Of the command line. Each command is what takes the arguments that were read for it."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Text to video with Pyramid Attention Broadcast."
    top = Parser(prog="minidit", description=about, epilog=GENERATE, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"minidit {version()}")
    top.set_defaults(command=lambda _: top.print_help())
    commands = top.add_subparsers(metavar="COMMAND", dest="named")

    about = "make a video of a caption"
    make = commands.add_parser(
        "generate", help=about, description=about, epilog=GENERATE + PYRAMIDS, formatter_class=raw
    )
    make.set_defaults(command=generate)
    make.add_argument("caption", nargs="?", help='such as "a red circle moves to the right"')
    make.add_argument("--out", default="video.mp4", metavar="FILE", help=".mp4, .gif, .webp, or .png (%(default)s)")
    make.add_argument("--prompts", metavar="FILE", help="instead: a caption a line; --out: a folder, whose videos stay")
    make.add_argument("--kind", choices=("mp4", "gif", "webp", "png"), help="of the videos of --prompts (mp4)")
    make.add_argument("--model", default="tiny", help="tiny, or a model's folder (%(default)s)")
    make.add_argument("--weights", metavar="DIR", help="the folder of the published model that --model names")
    make.add_argument("--text", metavar="DIR", help="a T5, or org/name on the hub; else text_encoder/ in the folder")
    make.add_argument("--vae", metavar="DIR", help="a video autoencoder, or org/name[/folder] on the hub; else vae/")
    make.add_argument("--negative", metavar="PROMPT", help="what to guide away from, cut to the caption's length")
    make.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="FILE[@at=-1,...]",
        help="an image or a video to make it around, may be given again; numbers: at, start, length, edit, clip",
    )
    add_run(make)
    make.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="another one, another video (0)")
    make.add_argument("--two-calls", action="store_true", help="guidance in two smaller model calls: less memory")
    make.add_argument("--offload", action="store_true", help="a layer is on the GPU only while it runs: less memory")
    make.add_argument("--dtype", choices=tuple(DTYPES), help="of a model; else float32 on a CPU, or as the original")
    make.add_argument(
        "--decoder-memory", type=number(0.001, 1e6), metavar="GIB", help="to decode in; else what is free"
    )
    make.add_argument("--fps", type=number(0.01, 1000), metavar="F", help="frames a second in the file")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make.add_argument("--device", choices=("cpu", "cuda"), default=device, help="%(default)s, if not given")
    make.add_argument("--data", type=whole(1, 4096), default=1, metavar="N", help="torchrun: groups for --prompts")
    add_split(make)
    make.add_argument("--axis", choices=tuple(parallel.TRADED), help="torchrun: what ranks share; else the faster")
    make.add_argument("--compare", action="store_true", help="also without broadcast: side by side, and how alike")

    about = "show what a run would do and cost; nothing is run"
    show = commands.add_parser("plan", help=about, description=about, epilog=PLAN + PYRAMIDS, formatter_class=raw)
    show.set_defaults(command=plan)
    show.add_argument("--model", default="tiny", help=f"tiny, {', '.join(PRESETS)}, or a model's folder (%(default)s)")
    add_run(show)
    show.add_argument("--dtype", choices=tuple(DTYPES), help="as generate would here; of opensora-1.2, bfloat16")
    show.add_argument("--ranks", type=counts, metavar="N[,N]", help="predict runs on so many GPUs, each, too")
    add_split(show)
    show.add_argument("--link", type=number(0.001, 1e6), default=200, metavar="GB/S", help="out of a GPU (%(default)s)")
    show.add_argument("--compute", type=number(0.001, 1e6), default=500, metavar="TFLOP/S", help="of one (%(default)s)")
    show.add_argument("--json", metavar="FILE", help="write the plan there, too; -: print it, and nothing else")

    about = "turn a published checkpoint into a folder for --model"
    turn = commands.add_parser("convert", help=about, description=about, epilog=CONVERT, formatter_class=raw)
    turn.set_defaults(command=convert)
    source = f"a file ({', '.join(ENDINGS)}), a folder of one, or org/name[/path] on the hub"
    turn.add_argument("source", metavar="SOURCE", help=source)
    turn.add_argument("out", metavar="OUT", help="the folder to write")
    turn.add_argument("--model", metavar="NAME", help="whose key map, if names and shapes do not tell")
    turn.add_argument("--config", metavar="FILE", help="a config.json of another shape for the map of --model")
    turn.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the parameters; else as stored")
    turn.add_argument("--verify", action="store_true", help="read all that was written again, and compare it")
    turn.add_argument("--dry-run", action="store_true", help="find and check everything, and write nothing")
    turn.add_argument("--inverse", action="store_true", help="SOURCE is such a folder: back to the published names")
    return top


def add_run(command: argparse.ArgumentParser) -> None:
    """The options of a run. All but the pyramid are as the model was trained unless they are given."""
    command.add_argument("--pyramid", help="what is reused when, see below (the paper's for that model)")
    steps = "of the sampler, a model call each; of pndm, 9 calls more"
    command.add_argument("--steps", type=whole(1, MOST), metavar="N", help=steps)
    command.add_argument("--guidance", type=number(-100, 100), metavar="G", help="the caption's weight; 1: no guidance")
    command.add_argument("--frames", type=whole(1, MOST), metavar="N", help="of the video, or of a clip of a loop")
    command.add_argument(
        "--loop", default="1", metavar="N[@length=5,...]", help="clips, each going on from the last length latents"
    )
    command.add_argument("--size", type=size, metavar="HxW", help="pixels, the height first; or N for a square")
    command.add_argument("--resolution", choices=tuple(sizes.SIZES), help="of Open-Sora 1.2: instead of --size")
    command.add_argument("--ratio", metavar="H:W", help="of --resolution, the height first (9:16)")
    command.add_argument("--seconds", metavar="S", help="of Open-Sora 1.2: 2, 4, 8, 16, 32; instead of --frames")


def add_split(command: argparse.ArgumentParser) -> None:
    """How several ranks divide for guidance. None: as parallel.halves says."""
    split = "torchrun: each half on ranks of its own; else if the ranks divide, mostly the faster"
    command.add_argument("--split-guidance", action=argparse.BooleanOptionalAction, help=split)


def run_options(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    """Those of `add_run` that make a Sampling, None where not given."""
    (height, width), frames = args.size or (None, None), args.frames
    if (args.resolution or args.ratio or args.seconds) and (config.captions or config.told != "fps"):
        raise ValueError("--resolution, --ratio and --seconds are names of Open-Sora 1.2: give --size and --frames")
    if args.size and (args.resolution or args.ratio) or args.frames and args.seconds:
        raise ValueError("--size goes without --resolution and --ratio, and --frames without --seconds: give one")
    if args.ratio and not args.resolution:
        raise ValueError("--ratio is of a --resolution: give both, or --size")
    if args.resolution:
        height, width = sizes.size(args.resolution, args.ratio or "9:16")
    if args.seconds:
        name = f"{args.seconds.removesuffix('s')}s"
        if name not in sizes.FRAMES:
            known = ", ".join(name.removesuffix("s") for name in sizes.FRAMES if name != "image")
            raise ValueError(f"--seconds is one of {known}, got {args.seconds!r}: give --frames for another length")
        frames = sizes.frames(name)
    return dict(steps=args.steps, guidance=args.guidance, frames=frames, height=height, width=width)


def whole(lo: int, hi: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,19}", text) or not lo <= int(text) <= hi:
            raise argparse.ArgumentTypeError(f"expected a whole number from {lo} to {hi}, got {text!r}")
        return int(text)

    return read


def number(lo: float, hi: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not lo <= value <= hi:
            raise argparse.ArgumentTypeError(f"expected a number from {lo:g} to {hi:g}, got {text!r}")
        return value

    return number


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", text)
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not (1 <= height <= LONGEST and 1 <= width <= LONGEST):
        raise argparse.ArgumentTypeError(f"expected HxW or N, of pixels from 1 to {LONGEST}, got {text!r}")
    return height, width


def counts(text: str) -> list[int]:
    return [whole(1, 4096)(count) for count in text.split(",")]


def read_pyramid(name: str) -> Pyramid | None:
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".json"):
        raise ValueError(f"unknown pyramid {name!r}: give one of {', '.join(RECIPES)}, or a .json file")
    try:
        return Pyramid.from_json(Path(name).read_text())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def version() -> str:
    try:
        return metadata.version("minidit")
    except metadata.PackageNotFoundError:
        return "(not installed)"
