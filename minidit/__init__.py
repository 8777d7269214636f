"""minidit: a minimal video diffusion transformer whose forward pass has Pyramid Attention Broadcast built in."""

from minidit.broadcast import (
    PAB_246,
    PAB_357,
    PAB_579,
    RECIPES,
    Act,
    Broadcast,
    Plan,
    Pyramid,
    Site,
    TimestepTable,
    Window,
    plan,
)
from minidit.cache import Cache
from minidit.checkpoint import load, save
from minidit.config import ModelConfig
from minidit.cost import cost
from minidit.jobs import Job, jobs
from minidit.metrics import psnr, ssim
from minidit.model import DiT
from minidit.pipeline import Pipeline, Report, generate
from minidit.presets import PRESETS
from minidit.references import Loop, Reference
from minidit.sampling import sample
from minidit.video import load_video, save_video

__all__ = [
    "PAB_246",
    "PAB_357",
    "PAB_579",
    "PRESETS",
    "RECIPES",
    "Act",
    "Broadcast",
    "Cache",
    "DiT",
    "Job",
    "Loop",
    "ModelConfig",
    "Pipeline",
    "Plan",
    "Pyramid",
    "Reference",
    "Report",
    "Site",
    "TimestepTable",
    "Window",
    "cost",
    "generate",
    "jobs",
    "load",
    "load_video",
    "plan",
    "psnr",
    "sample",
    "save",
    "save_video",
    "ssim",
]
