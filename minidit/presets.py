"""The published models as data: one entry a checkpoint that has a shape, a size or a sampler of its own."""

from __future__ import annotations

from dataclasses import replace

from minidit.config import ModelConfig, Positions, Sampling

# hpcaitech/Open-Sora v1.2.0: opensora/models/stdit/stdit3.py STDiT3_XL_2, configs/opensora-v1-2/inference/sample.py
OPENSORA_12 = ModelConfig(
    depth=28,
    blocks=(("spatial", "cross", "mlp"), ("temporal", "cross", "mlp")),
    dim=1152,
    heads=16,
    mlp_ratio=4.0,
    patch=(1, 2, 2),
    odd="pad",
    in_channels=4,
    out_channels=8,
    qk_norm=True,
    modulation="shared",
    bare_temporal=False,
    told="fps",
    classes=None,
    positions=Positions(space="area", base=512, scale=1.0, time="rope-after-norm", pace=1.0, frames=None),
    caption_dim=4096,
    caption_length=300,
    null_caption=True,
    rounds_time=True,
    sampling=Sampling(
        method="rectified-flow",
        prediction="velocity",
        guided=4,
        shift=None,
        steps=30,
        guidance=7.0,
        frames=51,
        height=480,
        width=854,
        fps=24,
        space=8,
        chunk=17,
        time=4,
    ),
)

# hpcaitech/Open-Sora v1.1.0: opensora/models/stdit/stdit2.py STDiT2_XL_2, configs/opensora-v1-1/inference/sample.py
OPENSORA_11 = replace(
    OPENSORA_12,
    blocks=(("spatial", "temporal", "cross", "mlp"),),
    told="size",
    positions=replace(OPENSORA_12.positions, time="rope-before-norm"),
    caption_length=200,
    sampling=Sampling(
        method="iddpm-float32",
        prediction="noise",
        guided=3,  # of 4 latent channels, which its authors trained and sampled with
        shift=None,
        steps=100,
        guidance=7.0,
        frames=16,
        height=240,
        width=426,
        fps=24,
        space=8,
        chunk=1,
        time=1,
    ),
)

# hpcaitech/Open-Sora v1.0.0: opensora/models/stdit/stdit.py STDiT_XL_2, configs/opensora/inference/16x512x512.py
OPENSORA_10 = replace(
    OPENSORA_11,
    odd="refuse",
    qk_norm=False,
    bare_temporal=True,
    told="time",
    positions=Positions(space="grid", base=None, scale=1.0, time="branch", pace=1.0, frames=None),
    caption_length=120,
    sampling=replace(OPENSORA_11.sampling, method="iddpm", height=512, width=512, fps=8),
)

# Vchitect/Latte b27c24a: models/latte.py Latte_XL_2, configs/ffs/ffs_sample.yaml
LATTE = replace(
    OPENSORA_10,
    depth=14,
    blocks=(("spatial", "mlp"), ("temporal", "mlp")),
    modulation="block",
    bare_temporal=False,
    positions=Positions(space="stored", base=256, scale=1.0, time="stored", pace=1.0, frames=16),
    caption_dim=0,
    caption_length=0,
    null_caption=False,
    rounds_time=False,
    sampling=replace(OPENSORA_10.sampling, guided=4, steps=250, guidance=1.0, height=256, width=256),
)

# Vchitect/Latte b27c24a: models/latte_t2v.py LatteT2V, configs/t2v/t2v_sample.yaml
LATTE_T2V = replace(
    OPENSORA_12,
    blocks=(("spatial", "cross", "mlp"), ("temporal", "mlp")),
    odd="cut",
    qk_norm=False,
    told="time",
    positions=Positions(space="grid", base=32, scale=1.0, time="stream", pace=1.0, frames=None),
    caption_length=120,
    null_caption=False,
    rounds_time=False,
    sampling=replace(
        OPENSORA_10.sampling, method="ddim", guided=4, steps=50, guidance=7.5, frames=16, height=512, width=512
    ),
)

# PKU-YuanGroup/Open-Sora-Plan v1.1.0: opensora/models/diffusion/latte/modeling_latte.py, opensora/sample/sample_t2v.py
OPENSORA_PLAN_11 = replace(
    LATTE_T2V,
    caption_length=300,
    sampling=replace(LATTE_T2V.sampling, method="pndm", steps=150, frames=65, fps=24, chunk=None, time=4),
)
# its v1.0.0, of the same files
OPENSORA_PLAN_10 = replace(
    OPENSORA_PLAN_11,
    positions=replace(LATTE_T2V.positions, pace=3.0),
    caption_length=120,
    sampling=replace(OPENSORA_PLAN_11.sampling, steps=250),
)

PRESETS: dict[str, ModelConfig] = {
    "opensora-1.2": OPENSORA_12,
    "opensora-1.1": OPENSORA_11,
    "opensora-1.0-16x512x512": OPENSORA_10,
    "opensora-1.0-16x256x256": replace(
        OPENSORA_10,
        positions=replace(OPENSORA_10.positions, scale=0.5),
        sampling=replace(OPENSORA_10.sampling, height=256, width=256),
    ),
    "latte": LATTE,
    "latte-ucf101": replace(LATTE, told="class", classes=101, sampling=replace(LATTE.sampling, guidance=7.0)),
    "latte-t2v": LATTE_T2V,
    "opensora-plan-1.1-65x512x512": OPENSORA_PLAN_11,
    "opensora-plan-1.1-221x512x512": replace(
        OPENSORA_PLAN_11,
        positions=replace(LATTE_T2V.positions, pace=3.0),
        sampling=replace(OPENSORA_PLAN_11.sampling, frames=221),
    ),
    "opensora-plan-1.0-65x512x512": OPENSORA_PLAN_10,
    "opensora-plan-1.0-65x256x256": replace(
        OPENSORA_PLAN_10,
        positions=replace(OPENSORA_PLAN_10.positions, base=16),
        sampling=replace(OPENSORA_PLAN_10.sampling, height=256, width=256),
    ),
    "opensora-plan-1.0-17x256x256": replace(
        OPENSORA_PLAN_10,
        positions=replace(OPENSORA_PLAN_10.positions, base=16, pace=1.0),
        sampling=replace(OPENSORA_PLAN_10.sampling, frames=17, height=256, width=256),
    ),
}
