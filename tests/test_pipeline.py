"""Every family from its published layout to a video, at tiny size; what does not fit together is one line."""

import re
import shutil
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import diffusers
import pytest
import torch
from transformers import T5Config, T5EncoderModel

import minidit
import test_decoders as made
from families import FAMILIES
from minidit import checkpoint, cli, fitting, pipeline, sampling, stages
from minidit.broadcast import RECIPES
from minidit.decoders import Decoder
from minidit.fitting import Run, fit
from minidit.pipeline import Pipeline, draws, recipe
from minidit.presets import PRESETS
from minidit.references import Loop, Reference, fitted
from minidit.stages import Pixels
from minidit.text import T5Text, rules_of
from minidit.tiling import Tile
from minidit.video import load_video, save_video
from minidit.weights import decoders
from minidit.weights.decoders import load_decoder
from test_cli import SMALL
from test_opensora_vae import TINY as OPENSORA_VAE
from test_plan_vae import TINY as PLAN_VAE
from test_text import spiece  # noqa: F401, a fixture
from weights.test_decoders import CAUSAL, PIPELINE, folder

# of each family: its decoder, a caption, frames, height, width, steps
RUNS = {
    "opensora-1.2": ("opensora", "a red fox", 17, 32, 48, 3),
    "opensora-1.1": ("frames", "a red fox", 3, 32, 48, 3),
    "latte-t2v": ("temporal", "a red fox", 3, 32, 48, 3),
    "latte-ucf101": ("frames", "3", 5, 48, 48, 3),
    "latte": ("frames", "", 5, 48, 48, 3),
    "opensora-plan-1.1-65x512x512": ("causal", "a red fox", 5, 32, 48, 4),
}
families = pytest.mark.parametrize("name", RUNS)


def save_vae(path, kind):
    torch.manual_seed(0)
    four = {"block_out_channels": (32,) * 4, "latent_channels": 4, "layers_per_block": 1}
    down = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    match kind:
        case "frames":
            diffusers.AutoencoderKL(**four, **down, up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(path)
        case "temporal":
            diffusers.AutoencoderKLTemporalDecoder(**four, **down).save_pretrained(path)
        case "opensora":
            folder(path, PIPELINE, made.weights("opensora_vae12_a"), "model.safetensors")
        case "causal":
            folder(path, CAUSAL, made.weights("osp_causalvae110_a"))


@pytest.fixture(scope="module")
def published(tmp_path_factory, spiece):  # noqa: F811
    """A folder a family: the transformer as `minidit convert` makes it of the original's names, T5 and decoder."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 128}
    encoder = T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu", relative_attention_num_buckets=8))
    for name, (kind, *_) in RUNS.items():
        family = next(family for family in FAMILIES if family.preset == name)
        torch.save(family.upstream(), root / "published.pt")
        checkpoint.write_config(root, family.config)
        at = ["--model", name, "--config", str(root / "config.json")]
        assert cli.main(["convert", str(root / "published.pt"), str(root / name), *at]) == 0
        if family.config.caption_dim:
            encoder.save_pretrained(root / name / "text_encoder")
            (root / name / "tokenizer").mkdir()
            (root / name / "tokenizer" / "spiece.model").write_bytes(spiece)
        save_vae(root / name / "vae", kind)
    return root


@pytest.fixture(autouse=True)
def tiny_vaes(monkeypatch):
    """The shapes that are written in code, or that have 32 groups there."""
    monkeypatch.setattr(decoders, "OPENSORA_VAE_12", OPENSORA_VAE)
    monkeypatch.setattr(decoders, "causal_config", lambda *_: PLAN_VAE)


def options(name):
    _, _, frames, height, width, steps = RUNS[name]
    return ["--frames", f"{frames}", "--size", f"{height}x{width}", "--steps", f"{steps}", "--device", "cpu"]


def asked(name):
    return dict(zip(("frames", "height", "width", "steps"), RUNS[name][2:], strict=True))


@families
def test_a_caption_becomes_a_file_of_as_many_frames_and_pixels(published, tmp_path, capsys, name):
    _, caption, frames, height, width, _ = RUNS[name]
    command = ["generate", caption, "--model", name, "--weights", str(published / name), *options(name)]
    assert cli.main([*command, "--out", str(tmp_path / "a.mp4")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("predicted memory, one after the other: ") and f"({frames} frames of {height}x{width}," in out
    video = load_video(tmp_path / "a.mp4")
    scale = video.shape[1] // height
    assert video.shape == (frames, scale * height, scale * width, 3)


@pytest.mark.parametrize("more", [[], ["--compare"], ["--loop", "2", "--frames", "34"], ["--prompts"]])
def test_of_several_videos_all_weights_stay_on_a_gpu_that_has_room(published, tmp_path, capsys, monkeypatch, more):
    name, ran, generate = "opensora-1.2", [], pipeline.generate
    caption = RUNS[name][1]
    monkeypatch.setattr(
        pipeline, "generate", lambda pipe, *args, **given: ran.append(pipe) or generate(pipe, *args, **given)
    )
    monkeypatch.setattr(fitting, "together", lambda pipe, peaks, free: min(*peaks.values(), free) > 0)
    command = ["generate", "--model", name, "--weights", str(published / name), *options(name)]
    if more == ["--prompts"]:
        (tmp_path / "captions.txt").write_text(f"{caption}\n{caption}\n")
        command += ["--prompts", str(tmp_path / "captions.txt"), "--out", str(tmp_path / "all")]
    else:
        command += [caption, *more, "--out", str(tmp_path / "a.mp4")]
    assert cli.main(command) == 0
    assert ran and all(pipe.resident == bool(more) for pipe in ran)
    assert ("predicted memory, all at once: " in capsys.readouterr().out) == bool(more)


@families
def test_a_run_is_encoding_sampling_and_decoding_one_after_the_other(published, monkeypatch, name):
    at, (_, caption, *_) = published / name, RUNS[name]
    seen, chunks = [], Decoder.chunks
    monkeypatch.setattr(Decoder, "chunks", lambda self, z, n, **tile: seen.append(z) or chunks(self, z, n, **tile))
    video, report = minidit.generate(Pipeline.load(at), caption, seed=5, **asked(name))

    model = checkpoint.load(at)
    config = pipeline.asked(model.config, **asked(name))
    run, text, lengths, null = config.sampling, None, None, None
    if config.caption_dim:
        t5 = T5Text.load(at, length=config.caption_length, dtype=torch.float32)
        text, lengths = t5.encode([rules_of(config).prompt(caption)])
        null = None if config.null_caption else t5.null()
    elif config.classes:
        text = torch.tensor([3])
    sampler, latent = pipeline.schedule(config, torch.float32)
    generator = torch.Generator().manual_seed(5)
    z = sampling.sample(
        model,
        torch.randn(4, *latent, generator=generator)[None],
        text,
        lengths,
        plan=pipeline.predict(config, torch.float32, RECIPES[recipe(config)]).plan,
        sampler=sampler,
        guidance=run.guidance,
        height=run.height,
        width=run.width,
        fps=run.fps,
        null=null,
        noise=lambda z: torch.randn(z.shape[1:], generator=generator)[None],
    )
    assert torch.equal(seen[0], z[0]) and z.std() > 0.01
    assert torch.equal(video, torch.cat(list(chunks(load_decoder(at / "vae"), z[0], run.frames))))
    assert len(video) == run.frames and len(report.plan) == len(sampler.timesteps)


@pytest.mark.parametrize("name", ["opensora-1.2", "opensora-1.1"])
def test_an_image_is_told_fps_of_its_own(published, monkeypatch, name):
    told, sample = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args, **given: told.append(given["fps"]) or sample(*args, **given))
    pipe = Pipeline.load(published / name)
    for frames in (1, RUNS[name][2]):
        minidit.generate(pipe, RUNS[name][1], seed=1, **{**asked(name), "frames": frames, "steps": 2})
    assert told == [120, pipe.config.sampling.fps] and told[0] != told[1]


@families
def test_a_seed_makes_the_same_frames_twice_alone_and_in_a_batch(published, name):
    pipe, caption = Pipeline.load(published / name), RUNS[name][1]
    both, _ = minidit.generate(pipe, [caption, caption], seed=1, **asked(name))
    for video, seed in zip(both, (1, 2), strict=True):
        alone, again = (minidit.generate(pipe, caption, seed=seed, **asked(name))[0] for _ in range(2))
        assert torch.equal(alone, again)
        assert (alone.int() - video.int()).abs().max() <= 1
    assert not torch.equal(both[0], both[1])


@pytest.fixture
def pieces(monkeypatch):
    """The parts of videos, as they are decoded and as they are written, that somebody holds."""
    alive, chunks, upscale = weakref.WeakSet(), Pixels.chunks, minidit.video.upscale

    def watched(piece):
        alive.add(piece)
        alive.most = max(alive.most, len(alive))
        return piece

    alive.most = 0
    monkeypatch.setattr(Pixels, "chunks", lambda *args, **options: map(watched, chunks(*args, **options)))
    monkeypatch.setattr("minidit.video.upscale", lambda *args: watched(upscale(*args)))
    return alive


def test_a_long_video_goes_to_its_file_in_parts_that_nobody_keeps(pieces, tmp_path):
    torch.manual_seed(0)
    model = minidit.DiT(SMALL)

    def made(frames, name):
        path = tmp_path / name
        saved, _ = minidit.generate(
            model, "a circle", steps=1, frames=frames, into=lambda parts: save_video(parts, path, fps=8)
        )
        assert saved == path and len(load_video(path)) == frames
        most, pieces.most = pieces.most, 0
        return most

    assert made(48, "three.mp4") == made(160, "ten.mp4") <= 4
    assert made(160, "ten.gif") >= 10  # a palette is chosen of all frames
    assert not pieces


def test_what_is_made_of_the_parts_stands_for_the_video(pieces):
    torch.manual_seed(0)
    model, asked = minidit.DiT(SMALL), {"steps": 1, "frames": 33}
    videos, _ = minidit.generate(model, ["a circle", "a red circle"], **asked)
    assert videos.shape == (2, 33, 16, 16, 3)
    parts, _ = minidit.generate(model, ["a circle", "a red circle"], **asked, into=list)
    assert [[len(part) for part in video] for video in parts] == [[16, 16, 1]] * 2
    assert all(torch.equal(torch.cat(own), video) for own, video in zip(parts, videos, strict=True))


@pytest.fixture
def moves(monkeypatch):
    """(module, True) for each that is brought to the device, (module, False) when it is home again."""
    seen, brought = [], stages.brought

    @contextmanager
    def watched(module, device, units):
        with brought(module, device, units):
            seen.append((module, True))
            try:
                yield
            finally:
                seen.append((module, False))

    monkeypatch.setattr(stages, "brought", watched)
    return seen


@pytest.mark.parametrize("how", ["stops", "fails", "is interrupted"])
def test_the_decoder_is_let_go_when_what_takes_the_video(published, tmp_path, moves, how):
    pipe = Pipeline.load(published / "opensora-1.1")
    error = {"fails": OSError(28, "no space"), "is interrupted": KeyboardInterrupt()}.get(how)
    (tmp_path / "a.mp4").write_bytes(b"of yesterday")

    def parts(frames):
        yield next(frames)
        if error:
            raise error

    def into(frames):
        return save_video(parts(frames), tmp_path / "a.mp4", fps=8)

    with pytest.raises(type(error)) if error else nullcontext():
        minidit.generate(pipe, "a fox", into=into, **asked("opensora-1.1"))
    assert [there for module, there in moves if module is pipe.decoder] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert ((tmp_path / "a.mp4").read_bytes() == b"of yesterday") == bool(error)


def test_noise_of_a_step_is_each_seeds_own():
    z, draw = torch.empty(2, 3, 1, 2, 2), draws([7, 8])
    first, second = draw(z), draw(z)
    other = draws([8])
    assert torch.equal(other(z[:1])[0], first[1]) and torch.equal(other(z[:1])[0], second[1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["opensora-1.2", "latte-t2v"])
def test_a_negative_prompt_is_what_a_video_is_guided_away_from(published, name):
    pipe = Pipeline.load(published / name)
    encoded = pipe.text.encode(["a red fox"], "Blurry")
    t5 = T5Text.load(published / name, length=12, dtype=torch.float32)
    assert torch.equal(encoded.null, t5.null("blurry")) and not torch.equal(encoded.null, t5.null())
    one, other = (
        minidit.generate(pipe, "a red fox", negative=words, **asked(name))[0] for words in (None, "two cats, beach")
    )
    assert not torch.equal(one, other)


def fox(frames, height=40, width=48):
    return torch.randint(256, (frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decoded(monkeypatch):
    """The latents (C, T, h, w) that the decoder is given, of one clip after the other."""
    seen, chunks = [], Decoder.chunks
    monkeypatch.setattr(Decoder, "chunks", lambda self, z, n, **tile: seen.append(z) or chunks(self, z, n, **tile))
    return seen


def test_pixels_encode_what_they_decode():
    (video,) = Pixels().chunks(Pixels().encode(fitted(fox(3), 40, 48)), 3)
    assert torch.equal(video, fox(3))


@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_what_is_given_of_a_video_stays_bit_for_bit_unless_it_may_change(published, decoded, edit):
    pipe, image, clip = Pipeline.load(published / "opensora-1.2"), fox(1), fox(22)
    references = [Reference(clip, start=-2, at=4, edit=edit), Reference(image, edit=edit)]
    given = {"frames": 34, "height": 32, "width": 48, "steps": 3}
    minidit.generate(pipe, "a red fox", references=references, **given)
    (z,) = decoded
    first = pipe.decoder.encode(fitted(image, 32, 48))[:, 0]
    assert z.shape == (4, 10, 4, 6) and torch.equal(z[:, 0], first) == (edit == 0)
    # five latents are a piece: from -2 of 7 to 5, and from 4 to 5
    end = pipe.decoder.encode(fitted(clip[17:], 32, 48))
    assert end.shape[1] == 2 and torch.equal(z[:, 5:7], end) == (edit == 0)
    minidit.generate(pipe, "a red fox", **given)
    assert not torch.equal(z, decoded[1])


def test_what_stays_in_open_sora_1_1_moves_a_little_in_the_last_step(published, decoded):
    pipe = Pipeline.load(published / "opensora-1.1")
    given = {"frames": 5, "height": 32, "width": 48, "steps": 10}
    minidit.generate(pipe, "a fox", references=[Reference(fox(1)), Reference(fox(1), at=-1)], guidance=1, **given)
    kept = pipe.decoder.encode(fitted(fox(1), 32, 48))[:, 0]
    for z in (decoded[0][:, 0], decoded[0][:, -1]):
        assert 0 < (z - kept).abs().max() < 0.1 * (decoded[0][:, 2] - kept).abs().max()


# frames of a clip, handed on in latents and in frames
LOOPS = {"opensora-1.2": (34, 5, 17), "opensora-1.1": (5, 2, 2)}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_runs_of_one_plan_each_of_which_begins_with_the_end_of_the_one_before(published, decoded, name):
    frames, length, repeated = LOOPS[name]
    loop, pipe, steps = Loop(3, length=length), Pipeline.load(published / name), []
    given = {**asked(name), "frames": frames, "seed": 5}
    video, report = minidit.generate(
        pipe, "a fox", references=[Reference(fox(1))], loop=loop, on_step=steps.append, **given
    )
    assert len(video) == 3 * frames - 2 * repeated
    _, alone = minidit.generate(pipe, "a fox", **given)
    assert len(steps) == 3 * len(alone.plan) and report.plan == alone.plan and report.flops == 3 * alone.flops
    assert report.peak_bytes == alone.peak_bytes and "clips       3, each a run of this plan" in str(report)

    config = pipeline.asked(pipe.config, frames=frames, height=32, width=48, steps=3)
    run, (sampler, latent), draw = config.sampling, pipe.schedule(config), draws([5])
    told = pipe.text.encode(["a fox"], None)
    by_hand, start, at = [], pipe.decoder.encode(fitted(fox(1), 32, 48)), slice(0, 1)
    for clip in range(3):
        z, mask = draw(torch.empty(1, 4, *latent)), torch.ones(1, latent[0])
        z[0, :, at], mask[0, at] = start, 0
        z = sampling.sample(
            pipe.model,
            z,
            told.text,
            told.lengths,
            plan=report.plan,
            sampler=sampler,
            guidance=run.guidance,
            height=run.height,
            width=run.width,
            fps=run.fps,
            frames=mask,
            noise=draw,
        )
        assert torch.equal(decoded[clip], z[0])
        whole = torch.cat([*pipe.decoder.chunks(z[0], frames)])
        start, at = pipe.decoder.encode(whole[-repeated:].permute(3, 0, 1, 2) / 127.5 - 1), slice(0, length)
        assert start.shape[1] == length
        by_hand.append(whole[repeated:] if clip else whole)
    assert torch.equal(video, torch.cat(by_hand))


@pytest.mark.parametrize("name", LOOPS)
def test_each_video_of_a_batch_goes_on_from_its_own_end_and_begins_as_without_a_loop(published, name):
    frames, length, repeated = LOOPS[name]
    pipe, given = Pipeline.load(published / name), {**asked(name), "frames": frames}
    both, _ = minidit.generate(pipe, ["a fox", "a fox"], seed=1, loop=Loop(2, length=length), **given)
    assert both.shape == (2, 2 * frames - repeated, 32, 48, 3)
    for video, seed in zip(both, (1, 2), strict=True):
        alone, _ = minidit.generate(pipe, "a fox", seed=seed, loop=Loop(2, length=length), **given)
        first, _ = minidit.generate(pipe, "a fox", seed=seed, **given)
        assert torch.equal(alone[:frames], first) and (alone.int() - video.int()).abs().max() <= 2
    assert not torch.equal(both[0, frames:], both[1, frames:])


def test_a_video_between_two_images_and_longer_becomes_a_file(published, tmp_path, capsys):
    save_video(fox(1), tmp_path / "a.png", fps=1, scale=1)
    save_video(fox(34), tmp_path / "b.mp4", fps=24, scale=1)
    command = ["generate", "a fox", "--model", str(published / "opensora-1.2"), *options("opensora-1.2")]
    command += ["--reference", f"{tmp_path / 'a.png'}@at=5", "--reference", f"{tmp_path / 'b.mp4'}@start=-5"]
    command += ["--frames", "34", "--loop", "2", "--compare", "--out", str(tmp_path / "c.mp4")]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "clips       2, each a run of this plan" in out and "(51 frames of 32x48," in out
    assert len(load_video(tmp_path / "c.mp4")) == 51


def test_the_plan_of_a_loop_costs_as_many_runs(capsys):
    costs = []
    for loop in ("1", "3"):
        assert cli.main(["plan", "--model", "opensora-1.2", "--loop", loop]) == 0
        costs.append(float(re.search(r"compute +([\d.]+) TFLOP", capsys.readouterr().out)[1]))
    assert costs[1] == pytest.approx(3 * costs[0], rel=0.01)


def test_the_decoder_takes_tiles_where_memory_is_short(published, monkeypatch, tmp_path, capsys):
    seen, chunks = [], Decoder.chunks
    monkeypatch.setattr(Decoder, "chunks", lambda *args, tile: seen.append(tile) or chunks(*args, tile=tile))
    command = ["generate", "a fox", "--model", str(published / "opensora-1.1"), "--frames", "1", "--size", "256"]
    command += ["--steps", "2", "--device", "cpu", "--out", str(tmp_path / "a.png")]
    pipe = Pipeline.load(published / "opensora-1.1")
    enough = pipe.decoder.peak_bytes((1, 32, 32), tile=Tile(size=20, overlap=8)) / 2**30
    for memory in (1000, enough):
        assert cli.main([*command, "--decoder-memory", f"{memory}"]) == 0
    assert seen[0] is None and 20 <= seen[1].size <= 32
    assert cli.main([*command, "--decoder-memory", "0.001"]) == 2
    assert "bytes with the smallest tiles" in capsys.readouterr().err


def test_what_does_not_fit_into_memory_is_refused_before_it_is_loaded_with_what_would(published):
    pipe = Pipeline.load(published / "opensora-1.2")
    config = pipeline.asked(pipe.config, frames=34, height=64, width=64)
    run = Run(config=config, pyramid=None)
    peaks, tile = fit(pipe, run, 2**40)
    assert tile is None and list(peaks) == ["text", "model", "decoder"] and min(peaks.values()) > 0
    fewer = fitting.peaks(pipe, replace(run, config=pipeline.asked(config, frames=21)))["model"]
    with pytest.raises(ValueError, match=r"the model takes .* free are .*: --frames 21, --size .* would fit"):
        fit(pipe, run, fewer, decoding=2**40)
    with pytest.raises(ValueError, match="the text encoder takes .*: use --device cpu"):
        fit(pipe, run, 1000)
    assert not {"model", "t5"} & {*vars(pipe), *vars(pipe.text)}


def test_only_what_runs_is_on_the_device(published, moves):
    pipe = Pipeline.load(published / "opensora-1.1")
    pipe.load_all()
    names = {pipe.text.module: "text", pipe.model: "model", pipe.decoder: "decoder"}
    minidit.generate(pipe, "a fox", **asked("opensora-1.1"))
    expected = [(name, there) for name in ("text", "model", "decoder") for there in (True, False)]
    assert [(names[module], there) for module, there in moves] == expected


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("opensora-1.2", "pab-246"), ("opensora-1.0-16x512x512", "pab-246"), ("latte", "latte-236")]
    + [("latte-t2v", "latte-236"), ("opensora-plan-1.0-17x256x256", "open-sora-plan-246")],
)
def test_the_recipe_is_the_papers_of_the_family(preset, expected):
    assert recipe(PRESETS[preset]) == expected and recipe(checkpoint.load_config("tiny")) == "pab-246"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--resolution", "480p", "--seconds", "2"], "51 frames of 480x854"),
        (["--resolution", "240p", "--ratio", "1:1", "--seconds", "4s"], "102 frames of 320x320"),
    ],
)
def test_sizes_of_open_sora_go_by_their_names(capsys, argv, said):
    assert cli.main(["plan", "--model", "opensora-1.2", *argv]) == 0
    assert said in capsys.readouterr().out


@pytest.fixture
def refused(published, tmp_path, monkeypatch, capsys):
    """The one line of a generate that fails before it does anything."""

    def run(name, *options, caption="a fox"):
        monkeypatch.chdir(published)
        out = ["--out", str(tmp_path / "a.mp4"), "--device", "cpu"]
        capsys.readouterr()
        assert cli.main(["generate", caption, "--model", name, *out, *options]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("minidit: ") and err.count("\n") == 1 and not list(tmp_path.iterdir())
        return err

    return run


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("text_encoder", "no text_encoder/: put a T5 there, or name its folder or org/name on the hub with --text"),
        ("tokenizer", "holds no T5: expected text_encoder/config.json and tokenizer/spiece.model"),
        ("vae", "has no vae/: put the decoder's folder there, or name it or org/name on the hub with --vae"),
        ("vae/config.json", "config.json does not exist: it is published beside the weights"),
        ("config.json", "config.json does not exist: give a folder with config.json and model.safetensors"),
        ("model.safetensors", "model.safetensors does not exist"),
    ],
)
def test_a_folder_that_lacks_something_says_what(refused, published, tmp_path_factory, missing, said):
    at = shutil.copytree(published / "opensora-1.1", tmp_path_factory.mktemp("lacks") / "model")
    (shutil.rmtree if (at / missing).is_dir() else type(at).unlink)(at / missing)
    assert said in refused(str(at))


@pytest.mark.parametrize(
    ("name", "options", "caption", "said"),
    [
        ("opensora-1.2", ["--frames", "8"], "a fox", "knows 1 frame or at least 17, got 8"),
        ("opensora-1.2", ["--frames", "17", "--size", "4"], "a fox", "at least 1 frame of 8x8 pixels"),
        ("opensora-plan-1.1-65x512x512", ["--frames", "6"], "a fox", "makes 1 + a multiple of 4 frames, got 6"),
        ("latte-ucf101", ["--size", "48"], "3", "this model has positions for 5 frames, got 16"),
        ("latte-ucf101", ["--frames", "5", "--size", "64"], "3", "this model has positions for 9 places"),
        ("latte-ucf101", ["--frames", "5", "--size", "48"], "a fox", "unknown class 'a fox', expected a number from 0"),
        ("latte", ["--frames", "5", "--size", "48"], "a fox", "untold: its caption is"),
        ("latte-ucf101", ["--text", "opensora-1.1"], "3", "reads no text: give no text encoder"),
        ("latte-ucf101", ["--frames", "5", "--size", "48", "--negative", "x"], "3", "reads no text: give no negative"),
        ("opensora-1.1", ["--text", "nowhere"], "a fox", "nowhere does not exist: give a folder with a T5"),
        ("opensora-1.1", ["--vae", "nowhere"], "a fox", "nowhere is no folder"),
        ("opensora-1.1", ["--vae", "opensora-1.1/text_encoder"], "a fox", "is of a T5EncoderModel, known are"),
        ("opensora-1.1", ["--vae", "opensora-1.2/vae"], "a fox", "16 frames are 16 latents to the model"),
        ("opensora-1.1", ["--resolution", "480p"], "a fox", "--seconds are names of Open-Sora 1.2: give --size"),
        ("opensora-1.2", ["--resolution", "480p", "--size", "64"], "a fox", "--size goes without --resolution"),
        ("opensora-1.2", ["--seconds", "2", "--frames", "17"], "a fox", "and --frames without --seconds"),
        ("opensora-1.2", ["--ratio", "1:1"], "a fox", "--ratio is of a --resolution"),
        ("opensora-1.2", ["--resolution", "480p", "--ratio", "1"], "a fox", "unknown ratio '1'"),
        ("opensora-1.2", ["--seconds", "3"], "a fox", "--seconds is one of 2, 4, 8, 16, 32, got '3'"),
        ("opensora-1.2", ["--weights", "latte-t2v"], "a fox", "latte-t2v does not hold opensora-1.2"),
        ("latte-t2v", ["--loop", "2"], "a fox", "was not trained with frame masks"),
        ("tiny", ["--loop", "2"], "a red circle", "was not trained with frame masks"),
        ("opensora-1.2", ["--loop", "two"], "a fox", "a loop is a number of clips from 1 to 9999, got 'two'"),
        ("opensora-1.2", ["--loop", "2", "--frames", "60"], "a fox", "have a multiple of 17 frames, got 60"),
        ("opensora-1.2", ["--reference", "nothing.png"], "a fox", "nothing.png: no such image or video"),
        ("opensora-1.2", ["--reference", "config.json"], "a fox", "config.json: a reference is one of .png"),
        ("tiny", ["--weights", "latte-t2v"], "a fox", "--weights are of a model that --model names"),
        ("tiny", ["--negative", "blurry"], "a red circle", "no words for others: give no negative prompt"),
    ],
)
def test_what_does_not_fit_together_is_one_line(refused, name, options, caption, said):
    line = refused(name, *options, caption=caption)
    assert said in re.sub(r"\s+", " ", line)


def test_a_pyramid_may_be_given_by_its_name():
    model, names = checkpoint.load(), ("paper", "pab-246", "none")
    run = dict(captions="a red circle moves", steps=6, frames=4, height=16, width=16)
    named, given = (
        [pipeline.generate(model, pyramid=it, **run)[1].plan for it in some]
        for some in (names, (RECIPES["pab-246"], RECIPES["pab-246"], None))
    )
    assert named == given and named[0] != named[2]
    with pytest.raises(ValueError, match="unknown pyramid 'pab-247': give a Pyramid, or the name of one of none, pab"):
        pipeline.generate(model, pyramid="pab-247", **run)
