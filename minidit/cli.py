"""The `minidit` command: make a video of a caption, show what a recipe would do, convert a published checkpoint."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from minidit import checkpoint, fitting, parallel, pipeline, references, sizes
from minidit.broadcast import RECIPES, Pyramid
from minidit.config import ModelConfig
from minidit.jobs import Job, jobs, numbered
from minidit.making import BAR, LONGEST, Making, clip
from minidit.parallel import Layout
from minidit.pipeline import Pipeline, readable
from minidit.presets import PRESETS
from minidit.video import check_output
from minidit.weights.convert import prepare
from minidit.weights.source import ENDINGS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# as in pyproject.toml: packages that only a part of minidit needs
HUB = ("bs4", "diffusers", "ftfy", "huggingface_hub", "sentencepiece", "transformers")
EXTRAS = {**dict.fromkeys(HUB, "hub"), "matplotlib": "plots"}
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


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 after one line on stderr that says what was wrong, or 130 after Ctrl-C or SIGTERM."""
    try:
        # as Ctrl-C, so that nothing half is left; ranks of torchrun wait for each other, and have to end at once
        if parallel.world() == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        args = parser().parse_args(argv)
        args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        return complain(f"{interrupt}" or "interrupted, nothing was written", code=130)
    except BrokenPipeError:
        # whoever read the output, such as head, has enough; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        wanted = f"'minidit[{EXTRAS[package]}]'" if package in EXTRAS else package
        return complain(f"{error}" + (f": pip install {wanted}" if wanted else ""))
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}" if error.filename else f"{error}")
    except ValueError as error:
        return complain(f"{error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and parallel.world() > 1 and parallel.lost(error):
            # torchrun names the rank that ended, and ends the others
            return complain("another rank of the run ended, nothing was written", code=1) if parallel.rank() == 0 else 1
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return complain("out of memory: fewer --frames, a smaller --size, --two-calls or --pyramid none need less")
    return 0


def complain(message: str, *, code: int = 2) -> int:
    print(f"minidit: {' '.join(message.split())}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """What it has to complain about is a ValueError, for `main` to say as it says everything."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    about = "Text to video with Pyramid Attention Broadcast."
    top = Parser(prog="minidit", description=about, epilog=GENERATE, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"minidit {version()}")
    top.set_defaults(command=lambda _: top.print_help())
    commands = top.add_subparsers(metavar="COMMAND")

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
    split = "torchrun: each half on ranks of its own; else if the ranks divide, which is the faster"
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


def asked_for(args: argparse.Namespace) -> list[Job]:
    """The one that is asked for, or those of the lines of a file that are not there yet."""
    if (args.caption is None) == (args.prompts is None):
        raise ValueError("give a caption, or a file of them with --prompts (see minidit generate --help)")
    if args.caption is not None and args.kind:
        raise ValueError("--kind is of --prompts: the ending of --out says what kind of file a single video is")
    if args.caption is not None:
        return [Job(args.caption, Path(args.out), args.seed)]
    folder = Path(args.out)
    if folder.suffix or folder.is_file():
        raise ValueError(f"--prompts makes many videos: name a folder for them with --out, not {folder}")
    return jobs(Path(args.prompts), folder, kind=args.kind or "mp4", seed=args.seed)


def generate(args: argparse.Namespace) -> None:
    """Alone, or as one of the ranks that torchrun started."""
    with parallel.started(args.device) as device:
        problem = None
        try:
            todo = asked_for(args)
            making = checked(args, todo, device)
            making.options["layout"], at = layout(args, making.config, device)
        except (ImportError, OSError, ValueError, MemoryError) as error:
            problem = error
        first = parallel.first_with(problem is not None, device)
        if problem and first == parallel.rank():
            raise problem
        if first is not None:
            sys.exit(2)  # another rank says why
        own = todo[at :: args.data]
        for i, job in enumerate(own):
            try:
                report, lines, shown = making.make(job)
            except KeyboardInterrupt:
                if args.prompts:
                    again = f"{i} of {len(own)} videos made in {args.out}: the same command makes the others"
                    raise KeyboardInterrupt(f"interrupted, {again}") from None
                raise
            if not making.options["layout"].first:
                continue
            if args.prompts:
                print(f"wrote {job.out} in {report.seconds:.1f} s: {job.caption}")
            else:
                print(f"{lines}\n\nwrote {job.out} ({shown})")
        if args.prompts and parallel.rank() == 0:
            there = len(numbered(Path(args.prompts))) - len(todo)
            stay = f", {there} were there already and stay as they are" if there else ""
            here = f", of which {len(own)} here" if parallel.world() > 1 else ""
            print(f"{len(todo)} videos made in {args.out}{here}{stay}")


def layout(args: argparse.Namespace, config: ModelConfig, device: torch.device) -> tuple[Layout, int]:
    """The ranks that make a video with this one, and which group of such they are."""
    if parallel.world() > 1:
        guidance = halves(args, config, ranks_of_a_video(args))
        return parallel.layout(device, guidance=guidance, data=args.data, axis=args.axis)
    if args.split_guidance is not None or args.axis or args.data > 1:
        raise ValueError("--split-guidance, --axis and --data are for several ranks: start them with torchrun")
    return parallel.ALONE, 0


def checked(args: argparse.Namespace, todo: Sequence[Job], device: torch.device) -> Making:
    """The model and what it is asked for. Everything that can be wrong is found here, before the model runs."""
    for job in todo:
        check_output(job.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; give --device cpu")
    if args.offload and args.device == "cpu":
        raise ValueError("--offload is for a GPU, with --device cpu all is in this computer's memory: leave it out")
    trained = checkpoint.load_config(pipeline.model_folder(named(args)))
    options = run_options(args, trained)
    config = pipeline.asked(trained, **options)
    around, loop = [references.read(text) for text in args.reference], references.read_loop(args.loop)
    references.check(around, loop, config)
    pyramid = read_pyramid(args.pyramid or pipeline.recipe(config))
    if args.decoder_memory and config.captions:
        raise ValueError("--decoder-memory is of a published family: this model makes its frames itself")
    if args.compare and pyramid is None:
        raise ValueError("--compare with --pyramid none would set a video beside itself: name another pyramid")
    dtype = DTYPES[args.dtype] if args.dtype else None
    pipe = Pipeline.load(named(args), text=args.text, vae=args.vae, device=device, dtype=dtype, offload=args.offload)
    pipe.schedule(config)
    report = pipeline.predict(config, pipe.dtype, pyramid)
    note_of_reuse(pyramid, report)
    # at least: the cache, the tokens, their queries, keys, values. A system that lends more than it has kills later
    least = report.peak_bytes + 4 * report.cost.update_bytes
    if config.captions and args.device == "cpu" and least > memory():
        raise MemoryError
    pipe.text.check([job.caption for job in todo], args.negative)
    options |= {"negative": args.negative, "two_calls": args.two_calls, "references": around, "loop": loop}
    if config.captions is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()
        decoding = args.decoder_memory and args.decoder_memory * 2**30
        ranks = ranks_of_a_video(args)
        run = fitting.Run(
            config=config,
            pyramid=pyramid,
            two_calls=args.two_calls,
            offload=args.offload,
            ranks=ranks,
            halves=halves(args, config, ranks),
            axis=args.axis,
        )
        peaks, options["tile"] = fitting.fit(pipe, run, free, decoding=decoding)
        if parallel.rank() == 0:
            stages = ", ".join(f"{name} {readable(size, 1024)}B" for name, size in peaks.items())
            print(f"predicted memory, one after the other: {stages}; free: {readable(free, 1024)}B")
        if todo:
            pipe.load_all()
    asked, best = clip(config.sampling), clip(trained.sampling)
    any_size = config.captions is None and config.told in ("fps", "size")
    if asked != best and not any_size and parallel.rank() == 0:
        print(f"minidit: note: trained on {best}; {asked} will run, but expect worse", file=sys.stderr)
    fps = args.fps or config.sampling.fps
    return Making(pipe, config, pyramid, options, fps, args.compare)


def note_of_reuse(pyramid: Pyramid | None, report: pipeline.Prediction) -> None:
    """On stderr, that a pyramid does nothing here: its windows, or its blocks, are others than the run's."""
    if pyramid and report.flops == report.flops_without and parallel.rank() == 0:
        print("minidit: note: this pyramid reuses nothing in this run, see minidit plan", file=sys.stderr)


def ranks_of_a_video(args: argparse.Namespace) -> int:
    return max(1, parallel.world() // args.data)


def halves(args: argparse.Namespace, config: ModelConfig, ranks: int) -> int:
    """The groups, for guidance, of the ranks of a video: as is asked for, or as parallel.halves says."""
    asked: bool | None = args.split_guidance
    if asked and config.sampling.guidance == 1:
        raise ValueError("--split-guidance: with a guidance of 1 there is no second half for other ranks")
    return parallel.halves(ranks, config.sampling.guidance) if asked is None else 1 + asked


def named(args: argparse.Namespace) -> str:
    """The folder of a model, or the name of an embedded one. ValueError for weights that are not what --model names."""
    if args.weights is None:
        known(args.model)
        if args.model in PRESETS and not Path(args.model).exists():
            raise ValueError(
                f"{args.model} is a shape without weights, for `minidit plan`; give them with --weights, or give tiny "
                "or a folder, which `minidit convert` makes of a published checkpoint"
            )
        return str(args.model)
    if args.model not in PRESETS:
        raise ValueError(f"--weights are of a model that --model names: give one of {', '.join(PRESETS)}")
    config, preset = checkpoint.load_config(pipeline.model_folder(args.weights)), PRESETS[args.model]
    if family(config) != family(preset):
        raise ValueError(f"{args.weights} does not hold {args.model}, but a model of another family")
    return str(args.weights)


def known(model: str) -> None:
    """Raises ValueError for what is neither a folder nor the name of a model."""
    if not (Path(model).exists() or model in checkpoint.EMBEDDED or model in PRESETS):
        names = ", ".join((*checkpoint.EMBEDDED, *PRESETS))
        raise ValueError(f"unknown model {model!r}: give a model's folder, or one of {names}")


def family(config: ModelConfig) -> tuple[object, ...]:
    """What models of all sizes of a family have in common."""
    return config.blocks, config.told, config.positions.time, config.sampling.method, config.sampling.time


def plan(args: argparse.Namespace) -> None:
    known(args.model)
    preset = None if Path(args.model).exists() else PRESETS.get(args.model)  # a folder may have a preset's name
    trained = preset or checkpoint.load_config(pipeline.model_folder(args.model))
    config = pipeline.asked(trained, **run_options(args, trained))
    recipe = args.pyramid or pipeline.recipe(config)
    pyramid = read_pyramid(recipe)
    gpu = preset is not None or torch.cuda.is_available()
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    loop = references.read_loop(args.loop)
    references.check([], loop, config)
    groups = {count: halves(args, config, count) for count in args.ranks or ()}
    if odd := [count for count, parts in groups.items() if count % parts]:
        raise ValueError(f"--split-guidance: {odd[0]} ranks do not divide into two halves")
    report = replace(pipeline.predict(config, DTYPES[dtype], pyramid), clips=loop.clips)
    note_of_reuse(pyramid, report)
    if args.json == "-":
        print(report.plan.to_json())
        return
    if args.json:
        Path(args.json).write_text(report.plan.to_json() + "\n")
    print(f"{args.model}, {recipe}: {clip(config.sampling)}, guidance {config.sampling.guidance:g}, {dtype}\n")
    print(report.plan)
    print("'.' compute, S compute and store, R reuse; held: updates in the cache after the call\n")
    print(report)
    run, device = fitting.Run(config=config, pyramid=pyramid), torch.device("cuda" if gpu else "cpu")
    held = {
        ranks: sum(fitting.model(replace(run, ranks=ranks, halves=parts), DTYPES[dtype], device))
        for ranks, parts in {1: 1, **groups}.items()
    }
    print(f"peak memory {readable(held[1], 1024)}B of the model, its weights and cache among it")
    if groups:
        speed = parallel.Speed(args.compute * 1e12, args.link * 1e9)
        _, latent = pipeline.schedule(config, DTYPES[dtype])
        print(f"\npredicted, at {args.compute:g} TFLOP/s and {args.link:g} GB/s of each rank; * is what a run chooses")
        print(parallel.table(report.plan, report.cost, config.tokens(latent), groups, speed, held))
    if args.json:
        print(f"\nwrote {args.json}")


def convert(args: argparse.Namespace) -> None:
    job = prepare(
        args.source,
        args.out,
        model=args.model,
        config=checkpoint.read_config(Path(args.config)) if args.config else None,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        back=args.inverse,
    )
    if not args.dry_run:
        total = job.work(verify=args.verify)
        with tqdm(total=total, desc=args.out, unit_scale=True, bar_format=BAR, dynamic_ncols=True, leave=False) as bar:
            job.run(verify=args.verify, advance=bar.update)
    print(f"{job.model}: {len(job.stored.meta)} tensors of {args.source}, {readable(job.stored.nbytes, 1000)}B")
    if job.stored.container:
        print(f"taken out of {job.stored.container}, without {', '.join(job.stored.ignored) or 'anything beside it'}")
    if job.prefix:
        print(f"{job.prefix} taken off all names")
    for name, why in job.dropped.items():
        print(f"dropped {name}: {why}")
    verb = "would write" if args.dry_run else "wrote and verified" if args.verify else "wrote"
    for name, size in job.files.items():
        print(f"{verb} {Path(args.out) / name}, {readable(size, 1000)}B")


def memory() -> float:
    """Bytes of this computer, as far as it tells."""
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else math.inf


def version() -> str:
    try:
        return metadata.version("minidit")
    except metadata.PackageNotFoundError:
        return "(not installed)"
