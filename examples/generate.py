# %% [markdown]
# # A video with and without broadcast
#
# Runs top to bottom in half a minute on a CPU, with the small model that comes with minidit and knows 101 words: eight
# colours, four shapes, eight motions. `python examples/generate.py`, or cell by cell in an editor that knows `# %%`.

# %%
from pathlib import Path

import minidit
from minidit import PAB_246, PAB_579, Broadcast, Pyramid, Window
from minidit.pipeline import predict

out = Path("out")  # of all that is written here
out.mkdir(exist_ok=True)
caption = "a red circle moves to the right"

# %% [markdown]
# ## Load a model
# A `DiT` is a torch module; what it is, and what it was trained to sample, is its `config`.

# %%
model = minidit.load("tiny")
run = model.config.sampling
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.config.depth} pairs of blocks")
print(f"{run.frames} frames of {run.height}x{run.width} in {run.steps} steps, guidance {run.guidance:g}")

# %% [markdown]
# ## See the plan before the run
# From sizes alone: what each sublayer will do in each model call. `.` computes, `S` computes and keeps, `R` reuses. In
# the table one pair of blocks stands for all. Pyramid Attention Broadcast reuses the outputs of attention: the kind
# that changes least, cross-attention, the longest.

# %%
expected = predict(model.config, model.dtype, PAB_246)
pair = len(expected.plan.sites) // model.config.depth
print("  ".join(f"{site.part:<8}" for site in expected.plan.sites[:pair]))
for row in expected.plan.acts:
    print("  ".join(f"{act.value:<8}" for act in row[:pair]))
print(expected)

# %% [markdown]
# ## Generate
# The same seed is the same noise. A report is the prediction, with the time and the memory as they were.

# %%
plain, before = minidit.generate(model, caption, pyramid=None, seed=7)
video, report = minidit.generate(model, caption, pyramid=PAB_246, seed=7)
print(video.shape, video.dtype)  # (T, H, W, 3) uint8

# %% [markdown]
# ## Compare
# How near the video is to the one without broadcast, and what it saved.


# %%
def compare(name: str, made: minidit.Report, likeness: float) -> None:
    saved = 1 - made.flops / made.flops_without
    print(f"{name:<8} {made.seconds:>5.1f} s, {saved:>5.1%} of the operations saved, PSNR {likeness:.1f} dB")


print(f"none     {before.seconds:>5.1f} s")
compare("pab-246", report, minidit.psnr(plain, video))
print(f"SSIM {minidit.ssim(plain, video):.3f}")

# %% [markdown]
# ## Save
# mp4, gif, webp, or png for a sheet of the frames. 64 pixels are small: each is shown larger.

# %%
print(minidit.save_video(video, out / "circle.mp4", fps=run.fps))
print(minidit.save_video(video, out / "circle.png", fps=run.fps))

# %% [markdown]
# ## A pyramid of one's own
# A rule for each kind of sublayer: compute in every so many calls of a window of timesteps, 1000 being noise, and reuse
# in between. The recipes of the paper are such rules, and `to_json` gives what `minidit generate --pyramid mine.json`
# takes.

# %%
mine = Pyramid(
    spatial=Broadcast(every=3, window=Window(lo=450, hi=930)),
    mlp=Broadcast(every=2, window=Window(lo=0.2, hi=0.7, unit="fraction"), blocks=(0, 1)),
)
(out / "mine.json").write_text(mine.to_json())
for name, pyramid in {"mine": mine, "pab-579": PAB_579}.items():
    other, made = minidit.generate(model, caption, pyramid=pyramid, seed=7)
    compare(name, made, minidit.psnr(plain, other))

# %% [markdown]
# ## A published checkpoint
# Needed are a GPU, `pip install 'minidit[hub]'`, and three downloads. For Open-Sora 1.2: the transformer
# (hpcai-tech/OpenSora-STDiT-v3, 2.4 GB in bfloat16), the T5 that reads captions (DeepFloyd/t5-v1_1-xxl, 19 GB on the
# GPU while it encodes, in float32 as the original) and the video autoencoder (hpcai-tech/OpenSora-VAE-v1.2).
#
# `minidit convert hpcai-tech/OpenSora-STDiT-v3 checkpoints/opensora --dtype bfloat16 --verify` makes a folder of the
# transformer. Then, from Python,
#
#     pipe = minidit.Pipeline.load("checkpoints/opensora", text="DeepFloyd/t5-v1_1-xxl", vae="vae", device="cuda")
#     video, report = minidit.generate(pipe, "a sunset over the sea", frames=51, height=480, width=854)
#     minidit.save_video(video, "sunset.mp4", fps=24, scale=1)
#
# with `vae` the downloaded folder of the autoencoder. `pipe.fit` says beforehand whether it will fit into the memory
# that is free, and in which tiles to decode if that is short. None of this has been run with published weights yet.
