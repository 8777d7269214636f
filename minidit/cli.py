"""The `minidit` command: make a video of a caption, show what a recipe would do, convert a published checkpoint."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minidit import checkpoint, fitting, parallel, pipeline, references
from minidit.broadcast import Pyramid
from minidit.config import ModelConfig
from minidit.jobs import Job, jobs, numbered
from minidit.making import BAR, Making, clip
from minidit.options import DTYPES, parser, read_pyramid, run_options
from minidit.parallel import Layout
from minidit.pipeline import Pipeline, readable
from minidit.presets import PRESETS
from minidit.video import check_output
from minidit.weights.convert import prepare

# as in pyproject.toml: packages that only a part of minidit needs
HUB = ("bs4", "diffusers", "ftfy", "huggingface_hub", "sentencepiece", "transformers")
EXTRAS = {**dict.fromkeys(HUB, "hub"), "matplotlib": "plots"}


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 after one line on stderr that says what was wrong, or 130 after Ctrl-C or SIGTERM."""
    try:
        # as Ctrl-C, so that nothing half is left; ranks of torchrun wait for each other, and have to end at once
        if parallel.world() == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        args, unknown = parser(generate, plan, convert).parse_known_args(argv)
        if unknown:
            about = " ".join(("minidit", *filter(None, [args.named]), "--help"))
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)} (see {about})")
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
            there = len(numbered(Path(args.prompts))) - len(todo) if args.prompts else 0
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
        if (len(todo) > 1 or args.compare or loop.clips > 1) and fitting.together(pipe, peaks, free):
            pipe = replace(pipe, resident=True)
        if parallel.rank() == 0:
            stages = ", ".join(f"{name} {readable(size, 1024)}B" for name, size in peaks.items())
            how = "all at once" if pipe.resident else "one after the other"
            print(f"predicted memory, {how}: {stages}; free: {readable(free, 1024)}B")
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
