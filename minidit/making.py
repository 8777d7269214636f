"""One video of the command: from a caption to its file, behind a progress bar, and what there is to tell of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from minidit import metrics, parallel, pipeline
from minidit.broadcast import Act, Pyramid
from minidit.config import ModelConfig, Sampling
from minidit.jobs import Job
from minidit.pipeline import Pipeline, Report, readable
from minidit.references import ONCE, repeated
from minidit.sampling import Step
from minidit.video import WATCHABLE, save_video, side_by_side

LONGEST = 8000  # pixels of a side: twice that, of two videos side by side, fits into every kind of file
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} gone, {remaining} left{postfix}"


@dataclass(frozen=True)
class Making:
    """What all videos of a command have in common."""

    pipe: Pipeline
    config: ModelConfig  # with the sampling that is asked for
    pyramid: Pyramid | None
    options: dict[str, Any]  # of pipeline.generate
    fps: float  # of the file
    compare: bool

    def make(self, job: Job) -> tuple[Report, str, str]:
        """Writes the video. What it cost, the same as lines that also compare, and what the file shows.

        Of several ranks that make it, the first one writes.
        """
        run, (sampler, latent) = self.config.sampling, pipeline.schedule(self.config, self.pipe.dtype)
        options, loop = {**self.options, "seed": job.seed}, self.options["loop"]
        calls = loop.clips * len(sampler.timesteps)
        height, width = latent[1] * run.space, latent[2] * run.space  # of whole latents
        scale = min(math.ceil(WATCHABLE / min(height, width)), 2 * LONGEST // max(height, width * (1 + self.compare)))
        frames = run.frames + (loop.clips - 1) * (run.frames - repeated(loop, run))
        shown = [clip(replace(run, frames=frames, height=height, width=width))]

        def save(frames: Tensor | Iterator[Tensor]) -> None:
            save_video(frames, job.out, fps=self.fps, scale=max(1, scale))

        if self.compare:
            # the first model call of a process takes longer, and would be counted on one side
            # four steps, because pndm has no fewer
            first = {"steps": min(run.steps, 4), "references": (), "loop": ONCE}
            pipeline.generate(self.pipe, job.caption, **{**options, **first})
            plain, before = self._generate(job, None, calls, options)
            video, report = self._generate(job, self.pyramid, calls, options)
            lines = f"{report}{compared(plain, before, video, report)}"
            shown += ["left without broadcast, right with"]
            if options["layout"].first:
                save(side_by_side(plain, video))
        else:
            into = save if options["layout"].first else dropped
            _, report = self._generate(job, self.pyramid, calls, {**options, "into": into})
            lines = str(report)
        still = job.out.suffix.lower() == ".png"
        shown += [f"shown {scale}x larger"] * (scale > 1) + [f"{self.fps:g} fps"] * (not still)
        return report, lines, ", ".join(shown)

    def _generate(self, job: Job, pyramid: Pyramid | None, calls: int, options: dict[str, Any]) -> tuple[Any, Report]:
        label = "with broadcast" if pyramid else "without broadcast"
        hidden = {"disable": True} if parallel.rank() else {}
        with tqdm(total=calls, desc=label, bar_format=BAR, dynamic_ncols=True, leave=False, **hidden) as bar:
            return pipeline.generate(self.pipe, job.caption, pyramid=pyramid, on_step=advancing(bar), **options)


def advancing(bar: Any) -> Callable[[Step], None]:
    def advance(step: Step) -> None:
        acts, held = step.call.acts, f"{readable(step.cache_bytes, 1024)}B"
        bar.set_postfix_str(f"reused {acts.count(Act.REUSE)} of {len(acts)}, {held} held", refresh=False)
        bar.update()

    return advance


def dropped(frames: Iterator[Tensor]) -> None:
    """Of a rank that does not write: it decodes as long as the one that does, which else would wait too long for it."""
    for _ in frames:
        pass


def compared(plain: Tensor, before: Report, video: Tensor, report: Report) -> str:
    """How a run with broadcast differs from the one before it without."""
    faster = before.seconds / report.seconds
    text = f"\nwithout     {before.seconds:.1f} s: broadcast is {faster:.2f}x as fast"
    text += f"\nlikeness    PSNR {metrics.psnr(plain, video):.2f} dB"
    if min(video.shape[1:3]) >= metrics.WINDOW:
        text += f", SSIM {metrics.ssim(plain, video):.4f}"
    return text


def clip(run: Sampling) -> str:
    return f"{run.frames} frame{'s' * (run.frames > 1)} of {run.height}x{run.width}"
