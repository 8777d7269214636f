"""What a run holds at most on its device, stage after stage; and where that is more than is free, what would fit."""

from __future__ import annotations

import importlib.util
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minidit import memory
from minidit.broadcast import Pyramid
from minidit.config import ModelConfig
from minidit.decoders import Decoder
from minidit.parallel import Axis, choose_axis, halves, shares
from minidit.pipeline import Pipeline, asked, predict, readable, schedule
from minidit.stages import Prompts
from minidit.tiling import Tile

RANKS = (2, 4, 8)  # to try, as hosts have so many GPUs
STEP = 8  # pixels of the height, of smaller videos to try


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides how much memory a run takes."""

    config: ModelConfig  # with the sampling that is asked for
    pyramid: Pyramid | None
    captions: int = 1  # of a batch
    two_calls: bool = False
    offload: bool = False
    ranks: int = 1  # that make the video together
    halves: int = 1  # into which they are divided for guidance
    axis: Axis | None = None  # that they share, None: the faster


def peaks(pipe: Pipeline, run: Run) -> dict[str, int]:
    """Bytes that each stage will hold at most, weights among them, of what the embedded model does not do itself.

    Of a T5 that is still on the hub, nothing is known yet. The decoder's are of whole frames, see Decoder.fit.
    """
    found = {}
    if isinstance(pipe.text, Prompts) and Path(pipe.text.source).is_dir():
        found["text"] = text(pipe.text, run, pipe.device)
    found["model"] = sum(model(run, pipe.dtype, pipe.device))
    if isinstance(pipe.decoder, Decoder):
        found["decoder"] = decoder(pipe.decoder, pipe.device)
        found["decoder"] += pipe.decoder.peak_bytes(pipe.schedule(run.config)[1])
    return found


def text(prompts: Prompts, run: Run, device: torch.device) -> int:
    """Bytes of encoding."""
    folder, length = Path(prompts.source), prompts.length
    bytes = memory.of_text(folder, captions=run.captions, length=length, dtype=prompts.dtype, offload=run.offload)
    return bytes + libraries(device)


def decoder(part: Decoder, device: torch.device) -> int:
    """Bytes of decoding, beside what it holds of the video."""
    return memory.weights(part) + libraries(device)


def libraries(device: torch.device) -> int:
    """Bytes that are taken beside all tensors."""
    return memory.LIBRARIES if device.type == "cuda" else 0


def model(run: Run, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Bytes of sampling, of each rank, without what broadcast keeps, and those. dtype, device: of the model."""
    _, latent = schedule(run.config, dtype)
    expected = predict(run.config, dtype, run.pyramid, captions=run.captions)
    tokens, sharing = run.config.tokens(latent), run.ranks // run.halves
    axis = run.axis or choose_axis(expected.plan, expected.cost.share(run.halves), tokens, ranks=sharing)
    frames, places = (shares(size, sharing) for size in tokens)
    part, size = (frames[0], tokens[0]) if axis == "frames" else (places[0], tokens[1])
    apart = run.two_calls or run.halves > 1 or run.config.sampling.guidance == 1
    bytes = memory.of_model(
        run.config,
        dtype,
        latent=latent,
        batch=run.captions * (1 if apart else 2),
        cache_bytes=0,
        offload=run.offload,
        shares=memory.Alone(axis, frames, places) if sharing > 1 else None,
        kernels=device.type == "cuda" and importlib.util.find_spec("triton") is not None,
        calls=2 if run.two_calls else 1,
    )
    return bytes + libraries(device), expected.peak_bytes // run.halves * part // size


def fit(pipe: Pipeline, run: Run, free: float, *, decoding: float | None = None) -> tuple[dict[str, int], Tile | None]:
    """The peaks of a run that holds at most so many bytes at a time, and the tile to decode with.

    decoding: bytes for the decoder beside its weights, None: what its weights leave of free. Raises ValueError for
    what cannot be, with what can.
    """
    found, tile = peaks(pipe, run), None
    if found.get("text", 0) > free:
        assert isinstance(pipe.text, Prompts)
        less = not run.offload and text(pipe.text, replace(run, offload=True), pipe.device) <= free
        raise ValueError(
            f"the text encoder takes {_bytes(found['text'])}, free are {_bytes(free)}: use "
            f"{'--offload or ' if less else ''}--device cpu"
        )
    if isinstance(pipe.decoder, Decoder):
        bytes, (_, latent) = decoder(pipe.decoder, pipe.device), pipe.schedule(run.config)
        tile = pipe.decoder.fit(latent, free - bytes if decoding is None else decoding)
        found["decoder"] = bytes + pipe.decoder.peak_bytes(latent, tile=tile)
    if found["model"] > free:
        fitting, (_, kept) = [*others(pipe, run, free)], model(run, pipe.dtype, pipe.device)
        listed = " or ".join(filter(None, (", ".join(fitting[:-1]), *fitting[-1:])))
        raise ValueError(
            f"the model takes {_bytes(found['model'])}, of which {_bytes(kept)} are kept by broadcast, "
            f"free are {_bytes(free)}: {listed or 'only --device cpu'} would fit"
        )
    return found, tile


def together(pipe: Pipeline, peaks: Mapping[str, int], free: float) -> bool:
    """Whether the weights of all stages may stay on a GPU: if it has room for the peaks of all at once."""
    unknown = isinstance(pipe.text, Prompts) and "text" not in peaks
    return pipe.device.type != "cpu" and not pipe.offload and not unknown and sum(peaks.values()) <= free


def others(pipe: Pipeline, run: Run, free: float) -> Iterator[str]:
    """What else would fit, one change each; or all that take nothing from the video together."""

    def fits(**changes: Any) -> bool:
        return sum(model(replace(run, **changes), pipe.dtype, pipe.device)) <= free

    sampling = run.config.sampling
    some = [fewer for n in range(1, sampling.frames) if _makes(pipe, fewer := asked(run.config, frames=n))]
    if most := bisect(some, False, key=lambda fewer: not fits(config=fewer)):
        yield f"--frames {some[most - 1].sampling.frames}"
    sizes = [(h, sampling.width * h // sampling.height // STEP * STEP) for h in range(STEP, sampling.height, STEP)]
    smaller = [asked(run.config, height=h, width=w) for h, w in sizes if w]
    smaller = [config for config in smaller if _makes(pipe, config)]
    if most := bisect(smaller, False, key=lambda config: not fits(config=config)):
        yield "--size {0.height}x{0.width}".format(smaller[most - 1].sampling)
    alike: dict[str, dict[str, Any]] = {}
    if run.pyramid:
        alike["--pyramid none"] = {"pyramid": None}
    if not run.two_calls and sampling.guidance != 1:
        alike["--two-calls"] = {"two_calls": True}
    if not run.offload:
        alike["--offload"] = {"offload": True}
    one = [name for name, changes in alike.items() if fits(**changes)]
    yield from one
    if not one and len(alike) > 1 and fits(**{key: value for part in alike.values() for key, value in part.items()}):
        yield f"{' '.join(alike)} together"
    more = (n for n in RANKS if n > run.ranks and fits(ranks=n, halves=halves(n, sampling.guidance)))
    if (ranks := next(more, None)) is not None:
        yield f"torchrun with {ranks} ranks"


def _makes(pipe: Pipeline, config: ModelConfig) -> bool:
    try:
        pipe.schedule(config)
    except ValueError:
        return False
    return True


def _bytes(size: float) -> str:
    return f"{readable(size, 1024)}B"
