"""LatteT2V with broadcast inside of diffusers' own LattePipeline, which stays as it is.

    pipe = LattePipeline.from_pretrained("maxin-cn/Latte-1")
    pipe.transformer = LatteTransformer.from_diffusers(pipe.transformer, pipe.scheduler)

The pipeline tells its transformer one timestep a call and hands nothing from one call to the next, so here, and nowhere
else in minidit, a module keeps a run: its plan, made of the scheduler's timesteps at its first call, and its cache.
Written for huggingface/diffusers v0.42.1, pipelines/latte/pipeline_latte.py: LattePipeline.__call__, and
models/transformers/latte_transformer_3d.py: LatteTransformer3DModel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from minidit.broadcast import RECIPES, Plan, Pyramid, plan
from minidit.cache import Cache
from minidit.config import ModelConfig
from minidit.model import Conditioning, DiT
from minidit.presets import PRESETS
from minidit.tensors import told
from minidit.weights.families import PUBLISHED, misfit
from minidit.weights.rules import apply

LATTE_T2V = PRESETS["latte-t2v"]
# fields that may differ between one LatteT2V and another
SIZES = {"depth", "dim", "heads", "mlp_ratio", "patch", "in_channels", "out_channels", "caption_dim", "caption_length"}
FREE = {*SIZES, "positions", "sampling"}
# what a LatteTransformer3DModel has to be beside the shapes of its tensors
FIXED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_eps": 1e-6}


@dataclass
class Run:
    """What the calls of one run share."""

    model: DiT
    temporal: bool
    timesteps: Tensor  # the scheduler's own: another run has another one, be it equal
    plan: Plan
    cache: Cache
    next: int = 0  # the call that is due
    text: Tensor | None = None  # what cond was prepared of
    cond: Conditioning | None = None

    def __call__(self, x: Tensor, text: Tensor, t: float) -> Tensor:
        if self.cond is None or text is not self.text:
            latent, fps = (x.shape[2], x.shape[3], x.shape[4]), torch.zeros(len(x), device=x.device)
            # LatteT2V is told neither the size in pixels nor the rate
            self.text, self.cond = text, self.model.prepare(text, None, latent=latent, height=1, width=1, fps=fps)
        out: Tensor = self.model(x, t, self.cond, self.plan[self.next], self.cache)
        self.next += 1
        return out


class LatteTransformer(nn.Module):
    """A LatteT2V as LattePipeline's `transformer`, each of the pipeline's runs by a plan of its own.

    pyramid: rules of broadcast, if nothing is said those that VideoSys runs Latte with; None: all calls compute all.
    scheduler: the pipeline's, whose timesteps the plan is made of; a pipeline that is given another one needs it set
    here, too: `pipe.transformer.scheduler = pipe.scheduler`. A run begins when the scheduler has set new timesteps, as
    it does whenever the pipeline is called, or is at its first one again; a run left half way is forgotten then.
    """

    def __init__(self, dit: DiT, scheduler: Any, *, pyramid: Pyramid | None = RECIPES["latte-236"]) -> None:
        """Raises ValueError for a dit that is not a LatteT2V, of whatever size."""
        super().__init__()
        _check_latte(dit.config)
        self.dit, self.scheduler, self.pyramid = dit, scheduler, pyramid
        size, run = dit.config, dit.config.sampling
        # what the pipeline reads of its transformer's config
        self.config = SimpleNamespace(
            in_channels=size.in_channels, out_channels=size.out_channels, sample_size=run.height // run.space
        )
        self._run: Run | None = None

    @classmethod
    def from_diffusers(
        cls, transformer: nn.Module, scheduler: Any, *, pyramid: Pyramid | None = RECIPES["latte-236"]
    ) -> LatteTransformer:
        """Of a LatteTransformer3DModel's weights, where they are; all but those of queries, keys and values are shared.

        Raises ValueError for one that is not of LatteT2V's architecture.
        """
        config, state = latte_config(transformer.config), transformer.state_dict()
        if wrong := told(misfit("latte-t2v", config, state)):
            raise ValueError(f"this transformer's tensors are not those of LatteT2V: {wrong}")
        with torch.device("meta"):
            dit = DiT(config)
        dit.load_state_dict(apply(PUBLISHED["latte-t2v"].rules(config), state), assign=True)
        return cls(dit.eval().requires_grad_(False), scheduler, pyramid=pyramid)

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.dtype

    @property
    def device(self) -> torch.device:
        return self.dit.patch.weight.device

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """(B, C, T, H, W) -> (B, out_channels, T, H, W), as LatteTransformer3DModel.forward.

        timestep: (B,), all equal; encoder_hidden_states: (B, L, caption_dim), all attended. Without temporal attention
        each frame is an image.
        Raises ValueError for a timestep that is not the due one of the scheduler's.
        """
        times = set(timestep.tolist())  # waits for the device, as the step of diffusers' DDIM before it does
        if len(times) != 1:
            raise ValueError(f"a call has one timestep for the whole batch, got {sorted(times)}")
        (t,) = times
        run = self._run = self._run_of(t, enable_temporal_attentions)
        out = run(hidden_states, encoder_hidden_states, t)
        if run.next == len(run.plan):
            self._run = None
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _run_of(self, t: float, temporal: bool) -> Run:
        """The run that a call at t belongs to: the one that is on, or a new one."""
        run, timesteps = self._run, self.scheduler.timesteps
        if run and run.timesteps is timesteps and run.temporal == temporal:
            first, due = run.plan.timesteps[0], run.plan.timesteps[run.next]
            if t != first or t == due:
                return run
        if timesteps is None or getattr(self.scheduler, "num_inference_steps", 0) is None:
            raise ValueError("the scheduler has no timesteps to plan with: call scheduler.set_timesteps(steps) first")
        times = timesteps.tolist()
        if t != times[0]:
            raise ValueError(
                f"a run begins at the scheduler's first timestep, {times[0]}, got {t}: "
                "LatteTransformer's scheduler has to be the pipeline's"
            )
        model = self.dit if temporal else self.dit.spatial()
        table = plan(self.pyramid, times, model.sites)
        return Run(model, temporal, timesteps, table, Cache(table))

    def _reset_stateful_cache(self) -> None:
        """Called by diffusers at a pipeline's end, where an interrupted run would otherwise be kept."""
        self._run = None


def latte_config(theirs: Any) -> ModelConfig:
    """The shape of a LatteTransformer3DModel, from its config. Raises ValueError for another architecture."""
    for name, value in FIXED.items():
        if theirs[name] != value:
            raise ValueError(f"LatteT2V is a LatteTransformer3DModel of {name}={value!r}, got {theirs[name]!r}")
    patch, size, sampling = theirs["patch_size"], theirs["sample_size"], LATTE_T2V.sampling
    return replace(
        LATTE_T2V,
        depth=theirs["num_layers"],
        dim=theirs["num_attention_heads"] * theirs["attention_head_dim"],
        heads=theirs["num_attention_heads"],
        patch=(1, patch, patch),
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"] or theirs["in_channels"],
        caption_dim=theirs["caption_channels"],
        positions=replace(LATTE_T2V.positions, base=size // patch, scale=max(size // 64, 1)),
        sampling=replace(
            sampling,
            guided=theirs["in_channels"],
            frames=theirs["video_length"],
            height=size * sampling.space,
            width=size * sampling.space,
        ),
    )


def _check_latte(config: ModelConfig) -> None:
    names = [field.name for field in fields(ModelConfig) if field.name not in FREE]
    for name in (*names, "positions.space", "positions.time"):
        value, found = attrgetter(name)(LATTE_T2V), attrgetter(name)(config)
        if found != value:
            raise ValueError(f"LattePipeline runs models like the preset 'latte-t2v', {name}={value!r}, got {found!r}")
