import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch

import convert_weights
from families import FAMILIES
from minidit import checkpoint, cli, making, pipeline, tensors
from minidit.broadcast import PAB_246, RECIPES, Act, Plan, Pyramid
from minidit.config import CaptionConfig, Method, Sampling
from minidit.model import DiT
from minidit.options import parser
from minidit.pipeline import predict, readable
from minidit.presets import PRESETS
from minidit.video import load_video

CAPTION = "a red circle moves"
SAMPLING = Sampling(
    method="rectified-flow",
    prediction="sample",
    guided=3,
    shift=3.0,
    steps=8,
    guidance=3.0,
    frames=3,
    height=16,
    width=16,
    fps=8,
    space=1,
    chunk=1,
    time=1,
)
SMALL = replace(
    checkpoint.load_config("tiny"),
    depth=1,
    dim=16,
    heads=2,
    caption_dim=8,
    caption_length=8,
    sampling=SAMPLING,
    captions=CaptionConfig(vocabulary=("a", "circle", "moves", "red"), heads=2, depth=1),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of untrained models: small, and one without a caption encoder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    checkpoint.save(DiT(SMALL), folder / "small")
    checkpoint.save(DiT(replace(SMALL, captions=None)), folder / "deaf")
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Files of a test are named as a user names them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def generate(models, capsys):
    """minidit generate CAPTION with the small model: exit code, stdout, and the lines of stderr without the bar."""

    def run(*options, caption=CAPTION):
        code = cli.main(["generate", caption, "--model", str(models / "small"), "--device", "cpu", *options])
        out, err = capsys.readouterr()
        return code, out, [line for line in re.split(r"[\r\n]+", err) if line.startswith("minidit")]

    return run


@pytest.fixture
def complaint(capsys):
    """The one line on stderr of a command that fails before it does anything."""

    def run(*argv, code=2):
        assert cli.main(argv) == code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("minidit: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return run


@pytest.fixture
def refused(models, complaint, place):
    """The one line of a generate that fails before it does anything, and leaves nothing behind."""

    def run(*options, caption=CAPTION, code=2):
        before = set(place.iterdir())
        line = complaint("generate", caption, "--model", str(models / "small"), "--device", "cpu", *options, code=code)
        assert set(place.iterdir()) == before
        return line

    return run


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".webp", ".png"])
def test_a_caption_becomes_a_file_of_each_kind(generate, place, ending):
    code, out, err = generate("--out", f"red{ending}")
    assert (code, err) == (0, [])
    assert [path.name for path in place.iterdir()] == [f"red{ending}"]
    speed = "" if ending == ".png" else ", 8 fps"
    assert out.endswith(f"\nwrote red{ending} (3 frames of 16x16, shown 16x larger{speed})\n")
    if ending != ".png":
        assert load_video(place / f"red{ending}").shape == (3, 256, 256, 3)


def test_the_file_is_video_mp4_unless_it_is_named(generate, place):
    assert generate("--steps", "1")[0] == 0
    assert [path.name for path in place.iterdir()] == ["video.mp4"]


def test_the_file_holds_what_minidit_generate_makes(generate, models, place):
    assert generate("--out", "a.webp", "--seed", "5", "--pyramid", "pab-357", "--steps", "9", "--guidance", "2")[0] == 0
    model = checkpoint.load(models / "small")
    video, _ = pipeline.generate(model, CAPTION, pyramid=RECIPES["pab-357"], seed=5, steps=9, guidance=2.0)
    assert torch.equal(load_video(place / "a.webp")[:, ::16, ::16], video)


def test_a_seed_gives_the_same_file_every_time_and_another_seed_another(generate, place):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        generate("--seed", seed, "--out", f"{name}.webp")
    a, b, c = ((place / f"{name}.webp").read_bytes() for name in "abc")
    assert a == b != c


def test_two_calls_change_the_video_by_rounding_at_most(generate, place):
    generate("--out", "one.webp")
    generate("--out", "two.webp", "--two-calls")
    assert (load_video(place / "one.webp").int() - load_video(place / "two.webp").int()).abs().max() <= 1


def test_the_summary_is_the_prediction_and_the_time(generate):
    predicted = predict(SMALL, torch.float32, caption_length=len(CAPTION.split()))
    _, out, _ = generate()
    assert out.startswith(f"{predicted}\ntime        ")
    assert f"peak cache  {readable(predicted.peak_bytes, 1024)}B\n" in out and predicted.peak_bytes > 0


def test_the_bar_says_what_each_call_reused_and_held(models, monkeypatch, capsys):
    monkeypatch.setattr(making, "tqdm", partial(making.tqdm, mininterval=0))
    cli.main(["generate", CAPTION, "--model", str(models / "small"), "--device", "cpu"])
    err = capsys.readouterr().err
    bars = re.findall(
        r"with broadcast (\d)/8 \|.{10}\| 00:0\d gone, 0\d:\d\d left, reused (\d) of 6, [\d.]+ (?:Ki)?B held", err
    )
    reused = [str(row.count(Act.REUSE)) for row in predict(SMALL, torch.float32).plan.acts]
    assert bars == [(str(i), n) for i, n in enumerate(reused, start=1)]


def test_what_the_model_was_not_trained_for_runs_with_a_note(generate, place):
    code, out, err = generate("--frames", "1", "--size", "8x40", "--fps", "12.5", "--out", "wide.gif")
    assert code == 0 and "(1 frame of 8x40, shown 32x larger, 12.5 fps)" in out
    assert err == ["minidit: note: trained on 3 frames of 16x16; 1 frame of 8x40 will run, but expect worse"]
    assert load_video(place / "wide.gif").shape == (1, 256, 1280, 3)


def test_compare_sets_both_videos_side_by_side_and_says_how_they_differ(generate, place):
    code, out, err = generate("--compare", "--out", "both.webp", "--seed", "2")
    assert (code, err) == (0, [])
    assert re.search(r"\nwithout     [\d.]+ s: broadcast is [\d.]+x as fast\n", out)
    assert re.search(r"\nlikeness    PSNR ([\d.]+|inf) dB, SSIM [01]\.\d+\n", out)
    assert "(3 frames of 16x16, left without broadcast, right with, shown 16x larger, 8 fps)" in out
    generate("--out", "right.webp", "--seed", "2")
    generate("--out", "left.webp", "--seed", "2", "--pyramid", "none")
    both = load_video(place / "both.webp")  # a gap of 2 pixels, 16 times as large
    assert torch.equal(both[:, :, :256], load_video(place / "left.webp"))
    assert torch.equal(both[:, :, 288:], load_video(place / "right.webp"))


def test_compare_of_frames_too_small_for_ssim_gives_psnr_alone(generate):
    code, out, _ = generate("--compare", "--size", "8", "--steps", "1", "--out", "s.png")
    assert code == 0 and "PSNR inf dB\n" in out and "SSIM" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "0"], "--size: expected HxW or N, of pixels from 1 to 8000, got '0'"),
        (["--size", "-64x64"], "--size: expected"),
        (["--size", "64x"], "--size: expected HxW or N, of pixels from 1 to 8000, got '64x'"),
        (["--size", "64x0"], "--size: expected"),
        (["--size", "64x99999999999"], "--size: expected"),
        (["--size", "big"], "--size: expected"),
        (["--steps", "0"], "--steps: expected a whole number from 1 to 100000, got '0'"),
        (["--steps", "-3"], "--steps: expected"),
        (["--steps", "1.5"], "--steps: expected"),
        (["--frames", "0"], "--frames: expected a whole number from 1"),
        (["--seed", "-1"], "--seed: expected a whole number from 0"),
        (["--seed", str(2**63)], "--seed: expected a whole number from 0"),
        (["--guidance", "nan"], "--guidance: expected a number from -100 to 100, got 'nan'"),
        (["--guidance", "much"], "--guidance: invalid number value: 'much'"),
        (["--fps", "0"], "--fps: expected a number from 0.01 to 1000, got '0'"),
        (["--pyramid", "pab-999"], f"unknown pyramid 'pab-999': give one of {', '.join(RECIPES)}, or a .json file"),
        (["--pyramid", "gone.json"], "gone.json: No such file or directory"),
        (["--out", "video.avi"], "video.avi: a video is written as one of .mp4, .gif, .webp, .png"),
        (["--out", "video"], "video: a video is written as one of"),
        (["--out", "nowhere/video.mp4"], "nowhere/video.mp4: the folder nowhere does not exist"),
        (["--model", "gone"], "unknown model 'gone': give a model's folder, or one of tiny, opensora-1.2,"),
        (["--kind", "gif"], "--kind is of --prompts"),
        (["--text", "t5"], "reads captions and makes frames itself: give no text and no vae"),
        (["--decoder-memory", "4"], "--decoder-memory is of a published family"),
        (["--model", "opensora-1.2"], "opensora-1.2 is a shape without weights, for `minidit plan`"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--compare", "--pyramid", "none"], "--compare with --pyramid none"),
        (["--size", "8000", "--frames", "100000"], "out of memory: fewer --frames, a smaller --size, --two-calls or"),
        (["--colour", "red"], "unrecognized arguments: --colour red (see minidit generate --help)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_runs(refused, options, said):
    assert said in refused(*options)


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a red circl moves", "'circl' (did you mean 'circle'?). Known words: a circle moves red\n"),
        ("", "a caption has 1 to 8 words"),
        ("a red red red red red red red circle", "a caption has 1 to 8 words and commas, this one has 9"),
    ],
)
def test_a_caption_the_model_cannot_read_is_refused(refused, caption, said):
    assert said in refused(caption=caption)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"spatial": {\n"every" 2}}', "not JSON: Expecting ':' delimiter at line 2, column 9"),
        ("[]", "a pyramid is "),
        ('{"spacial": null}', "unknown part 'spacial'; known: spatial, temporal, cross, mlp"),
        ('{"cross": {"every": 2}}', "cross: 'window' is missing"),
        (
            '{"cross": {"every": 0, "window": {"lo": 1, "hi": 2}}}',
            "cross: Broadcast.every must be a whole number from 1",
        ),
        ("\udcff", "codec can't decode"),
    ],
)
def test_a_pyramid_file_that_cannot_be_read_is_refused_with_its_name_and_place(refused, place, text, said):
    (place / "mine.json").write_text(text, errors="surrogateescape")
    line = refused("--pyramid", "mine.json")
    assert line.startswith("minidit: mine.json: ") and said in line


def test_a_pyramid_file_is_used(generate, place):
    (place / "mine.json").write_text(PAB_246.to_json())
    assert generate("--pyramid", "mine.json", "--out", "file.webp")[0] == 0
    generate("--out", "name.webp")
    assert (place / "file.webp").read_bytes() == (place / "name.webp").read_bytes()


def test_a_model_folder_that_is_broken_is_refused(refused, models, place):
    for name, config, said in [
        ("text", "not json", "text/config.json: not JSON: Expecting value at line 1, column 1"),
        ("other", "{}", "other/config.json: not a minidit model config: 'patch' is missing"),
    ]:
        (place / name).mkdir()
        (place / name / "config.json").write_text(config)
        (place / name / "model.safetensors").write_bytes((models / "small" / "model.safetensors").read_bytes())
        assert said in refused("--model", name)
    (place / "other" / "config.json").write_text((models / "small" / "config.json").read_text())
    (place / "other" / "model.safetensors").write_bytes(b"short")
    assert "other/model.safetensors: " in refused("--model", "other")
    assert "no caption encoder of its own" in refused("--model", str(models / "deaf"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without a GPU")
def test_a_gpu_that_is_not_there_is_refused(refused):
    assert "--device cuda: torch finds no GPU; give --device cpu" in refused("--device", "cuda")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(refused, place):
    (place / "shut").mkdir(mode=0o500)
    assert "no permission to write" in refused("--out", "shut/video.mp4")


def failing(monkeypatch, error, *, after):
    """The model raises error in the call with that index."""
    forward = DiT.forward

    def forward_or_fail(self, x, t, cond, call=None, cache=None, frame_mask=None):
        if call.index == after:
            raise error
        return forward(self, x, t, cond, call, cache, frame_mask)

    monkeypatch.setattr(DiT, "forward", forward_or_fail)


def test_ctrl_c_leaves_no_file_and_what_was_there_before(monkeypatch, generate, place):
    (place / "video.mp4").write_bytes(b"of yesterday")
    failing(monkeypatch, KeyboardInterrupt(), after=4)
    assert generate() == (130, "", ["minidit: interrupted, nothing was written"])
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {"video.mp4": b"of yesterday"}


def test_ctrl_c_while_the_file_is_written_leaves_no_file(monkeypatch, generate, place):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert generate() == (130, "", ["minidit: interrupted, nothing was written"])
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_running_out_of_memory_says_what_would_help(monkeypatch, generate, place, error):
    failing(monkeypatch, error, after=2)
    help = "fewer --frames, a smaller --size, --two-calls or --pyramid none need less"
    assert generate() == (2, "", [f"minidit: out of memory: {help}"])
    assert list(place.iterdir()) == []


def test_an_error_of_ours_is_not_hidden(monkeypatch, generate):
    failing(monkeypatch, RuntimeError("shapes do not match"), after=2)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate()


def test_a_full_disk_is_one_line(monkeypatch, generate):
    def save(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "video.mp4")

    monkeypatch.setattr(making, "save_video", save)
    assert generate() == (2, "", ["minidit: video.mp4: No space left on device"])


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("matplotlib", "pip install 'minidit[plots]'"),
        ("diffusers", "pip install 'minidit[hub]'"),
        ("huggingface_hub.errors", "pip install 'minidit[hub]'"),
        ("einops.layers", "pip install einops"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, complaint, package, said):
    def missing(*_, **__):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(pipeline, "predict", missing)
    assert complaint("plan", "--model", "opensora-1.2") == f"minidit: No module named {package!r}: {said}\n"


def planned(capsys, *options):
    assert cli.main(["plan", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


OPEN_SORA = ("--model", "opensora-1.2", "--size", "480x854", "--frames", "51", "--steps", "30")


def test_the_plan_of_open_sora_shows_the_figures_of_the_paper(capsys):
    out = planned(capsys, *OPEN_SORA)
    assert "opensora-1.2, pab-246: 51 frames of 480x854, guidance 7, bfloat16" in out
    for line in (
        r"  25     492\.0  R         R         R         \.            0",
        r"spatial      28       588     252   9 of 30",
        r"temporal     28       476     364  13 of 30",
        r"cross        56       896     784  14 of 30",
        r"mlp          56      1680       0   0 of 30",
        r"compute     2733\.8 TFLOP, 19\.2% less than 3385\.2 TFLOP without broadcast",
        r"peak cache  11\.5 GiB",  # 12.3 GB
    ):
        assert re.search(rf"^{line}$", out, re.MULTILINE), line


@pytest.mark.parametrize("method", get_args(Method))
def test_a_plan_of_every_method_has_a_line_for_each_model_call(monkeypatch, capsys, method):
    base = PRESETS["opensora-1.2"]
    prediction = "velocity" if method == "rectified-flow" else "noise"
    run = replace(base.sampling, method=method, prediction=prediction, steps=150)
    monkeypatch.setitem(PRESETS, "other", replace(base, sampling=run))
    out = planned(capsys, "--model", "other", "--dtype", "float32", "--pyramid", "open-sora-plan-246")
    calls = 159 if method == "pndm" else 150
    assert len(re.findall(r"^ +\d+ +\d+\.\d +", out, re.MULTILINE)) == calls
    assert re.search(rf"^temporal +\d+ +\d+ +\d+ +\d+ of {calls}$", out, re.MULTILINE)


def test_a_plan_of_pndm_without_diffusers_says_what_to_install(monkeypatch, complaint):
    base = PRESETS["opensora-1.2"]
    run = replace(base.sampling, method="pndm", prediction="noise")
    monkeypatch.setitem(PRESETS, "other", replace(base, sampling=run))
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ImportError
    said = "sampling by pndm needs the package diffusers, of minidit's extra 'hub': pip install 'minidit[hub]'"
    assert complaint("plan", "--model", "other") == f"minidit: {said}\n"


def test_a_run_of_pndm_is_of_more_calls_than_steps_and_the_bar_counts_them(tmp_path, capsys):
    run = replace(SAMPLING, method="pndm", prediction="noise", shift=None)
    checkpoint.save(DiT(replace(SMALL, sampling=run)), tmp_path / "model")
    options = ("--device", "cpu", "--steps", "6", "--compare", "--out", "both.webp")
    assert cli.main(["generate", CAPTION, "--model", str(tmp_path / "model"), *options]) == 0
    out, err = capsys.readouterr()
    assert "0 of 15" in out and "with broadcast 0/15" in err and "/6" not in err


def test_the_prediction_for_open_sora_is_that_of_its_sizes():
    report = predict(PRESETS["opensora-1.2"], torch.bfloat16)
    assert report.peak_bytes == 112 * 2 * (15 * 1590) * 1152 * 2  # all attention updates of both halves, 12.3 GB
    assert report.flops_without == pytest.approx(3385e12, rel=1e-3)
    with_mlp = predict(PRESETS["opensora-1.2"], torch.bfloat16, RECIPES["open-sora-246-mlp"])
    assert 1 - with_mlp.flops / with_mlp.flops_without == pytest.approx(0.21, abs=0.001)


def test_the_plan_of_a_preset_builds_no_weights_and_tells_the_memory(monkeypatch, capsys):
    built, devices = DiT.__init__, []

    def build(self, config):
        devices.append(torch.get_default_device().type)
        built(self, config)

    monkeypatch.setattr(DiT, "__init__", build)
    out = planned(capsys, *OPEN_SORA)
    assert set(devices) == {"meta"}
    assert "peak memory 14.8 GiB of the model, its weights and cache among it" in out  # measured: 14.81


@pytest.mark.parametrize(
    ("rule", "noted"),
    [
        ({"every": 2, "window": {"lo": 0.2, "hi": 0.7, "unit": "fraction"}}, False),
        ({"every": 2, "window": {"lo": 0.2, "hi": 0.7}}, True),
        ({"every": 2, "window": {"lo": 0, "hi": 1000}, "blocks": [77]}, True),
        ({"every": 1, "window": {"lo": 0, "hi": 1000}}, True),
    ],
)
def test_a_pyramid_that_does_nothing_in_a_run_is_noted(capsys, place, rule, noted):
    (place / "mine.json").write_text(json.dumps({"cross": rule}))
    assert cli.main(["plan", "--pyramid", "mine.json"]) == 0
    said = capsys.readouterr().err
    assert ("this pyramid reuses nothing in this run" in said) == noted == bool(said)
    assert cli.main(["plan", "--pyramid", "none"]) == 0
    assert capsys.readouterr().err == ""


def test_the_plan_tells_the_memory_of_each_of_several_ranks(capsys):
    lines = planned(capsys, *OPEN_SORA, "--ranks", "2,4", "--link", "10").splitlines()
    found = {
        line.split()[0]: line.split()[-1] for line in lines if " apart " in line and ("*" in line or " - " in line)
    }
    assert found == {"2": "8.6", "4": "5.5"}  # measured: 8.59 and 5.48


def test_the_plan_of_a_folder_needs_no_weights(capsys, place):
    (place / "shape").mkdir()
    (place / "shape" / "config.json").write_text(json.dumps(SMALL.to_json()))
    out = planned(capsys, "--model", "shape", "--dtype", "float32", "--guidance", "1")
    assert "shape, pab-246: 3 frames of 16x16, guidance 1, float32" in out
    halved = predict(replace(SMALL, sampling=replace(SAMPLING, guidance=1.0)), torch.float32)
    assert f"\n\n{halved}\n" in out and 2 * halved.peak_bytes == predict(SMALL, torch.float32).peak_bytes


def test_a_folder_with_the_name_of_a_preset_is_the_folder(capsys, place):
    (place / "latte").mkdir()
    (place / "latte" / "config.json").write_text(json.dumps(SMALL.to_json()))
    assert cli.main(["plan", "--model", "latte"]) == 0
    assert "latte, pab-246: 3 frames of 16x16, guidance 3, float32" in capsys.readouterr().out


def test_the_plan_is_the_one_that_generate_follows(capsys, generate, models):
    out = planned(capsys, "--model", str(models / "small"), "--dtype", "float32", "--pyramid", "latte-236")
    sites = out[out.index("part ") : out.index("compute")]  # a plan counts the operations of the longest caption
    made = generate("--pyramid", "latte-236")[1]
    assert made.startswith(sites) and out[out.index("peak cache") : out.index("peak memory")] in made


def test_a_plan_without_broadcast_saves_nothing(capsys):
    out = planned(capsys, *OPEN_SORA, "--pyramid", "none")
    assert "compute     3385.2 TFLOP\npeak cache  0 B\n" in out


def test_the_plan_as_json_is_read_by_plan(capsys, place):
    expected = predict(PRESETS["opensora-1.2"], torch.float32, RECIPES["pab-579"]).plan
    options = (*OPEN_SORA, "--pyramid", "pab-579", "--dtype", "float32", "--json")
    assert Plan.from_json(planned(capsys, *options, "-")) == expected
    assert planned(capsys, *options, "plan.json").endswith("\nwrote plan.json\n")
    assert Plan.from_json((place / "plan.json").read_text()) == expected


def test_a_pyramid_file_is_planned(capsys, place):
    pyramid = Pyramid(temporal=PAB_246.temporal)
    (place / "mine.json").write_text(pyramid.to_json())
    table = Plan.from_json(planned(capsys, *OPEN_SORA, "--pyramid", "mine.json", "--json", "-"))
    assert {part for part, count in table.counts().items() if count[Act.REUSE]} == {"temporal"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--frames", "8"], "knows 1 frame or at least 17, got 8"),
        (["--size", "4"], "a video needs at least 1 frame of 8x8 pixels, got 51 frames of 4x4"),
        (["--model", "gone"], "unknown model 'gone'"),
        (["--ranks", "2", "--split-guidance", "--guidance", "1"], "there is no second half for other ranks"),
        (["--json", "nowhere/plan.json"], "nowhere/plan.json: No such file or directory"),
        (["--pyramid", "pab"], "unknown pyramid 'pab'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(complaint, options, said):
    assert said in complaint("plan", "--model", "opensora-1.2", *options)


@pytest.fixture
def published(place):
    """A small checkpoint with Open-Sora's names, and the shape that it has."""
    family = next(family for family in FAMILIES if family.preset == "opensora-1.2")
    torch.save({"ema": family.upstream(), "epoch": 3}, "published.pt")
    checkpoint.write_config(place, family.config)
    return ("published.pt", "out", "--model", "opensora-1.2", "--config", "config.json")


def test_a_published_checkpoint_becomes_a_folder_and_comes_back(capsys, place, published):
    assert cli.main(["convert", *published, "--dtype", "bfloat16", "--verify"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "opensora-1.2: 89 tensors of published.pt, 1.4 MB",
        "taken out of ema, without epoch",
        "wrote and verified out/model.safetensors, 689.3 KB",
    ]
    assert "out 0.00/" in err and err.splitlines()[-1].strip() == ""  # a bar, and then nothing
    assert checkpoint.load("out").config == checkpoint.load_config(".")
    assert cli.main(["convert", "out", "back", "--inverse", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.endswith("wrote back/model.safetensors, 1.4 MB\n")
    assert sorted(path.name for path in place.iterdir()) == ["back", "config.json", "out", "published.pt"]


def test_a_dry_run_tells_what_would_be_written_and_writes_nothing(capsys, place, published):
    before = sorted(place.iterdir())
    assert cli.main(["convert", *published, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\nwould write out/model.safetensors, 1.4 MB\n") and err == ""
    assert sorted(place.iterdir()) == before


def test_the_script_is_the_command(capsys, published):
    assert convert_weights.main([*published, "--dry-run"]) == 0
    assert "would write out/model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["gone.pt", "out"], "gone.pt does not exist: expected a file, a folder, or org/name on the hub"),
        (["cut.pt", "out"], "cut.pt: not a whole file of torch.save, it is cut off or something else"),
        (["code.pt", "out"], "code.pt: refused, loading it would call "),
        (["published.pt", "out"], "published.pt: not the tensors of a model known here; opensora-1.2 is closest, "),
        (["published.pt", "full"], "full exists: remove it, or name another folder to write"),
        (["published.pt", "out", "--model", "gpt-2"], "unknown model 'gpt-2': give one of opensora-1.2, "),
        (["published.pt", "out", "--config", "gone.json"], "gone.json: No such file or directory"),
        (["published.pt", "out", "--config", "config.json"], "a config needs a key map, give --model"),
        (["published.pt", "out", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["published.pt", "out", "--inverse"], "published.pt/model.safetensors does not exist"),
        (["published.pt"], "the following arguments are required: OUT (see minidit convert --help)"),
    ],
)
def test_a_conversion_that_cannot_be_is_one_line(complaint, place, published, argv, said):
    (place / "cut.pt").write_bytes((place / "published.pt").read_bytes()[:-1])
    torch.save({"a": partial(os.mkdir, "hacked")}, "code.pt")
    (place / "full").mkdir()
    (place / "full" / "file").touch()
    before = sorted(place.rglob("*"))
    assert said in complaint("convert", *argv)
    assert sorted(place.rglob("*")) == before


def test_a_hub_that_is_not_installed_is_named_with_its_extra(monkeypatch, complaint):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert complaint("convert", "org/name", "out").endswith("huggingface_hub: pip install 'minidit[hub]'\n")


def test_ctrl_c_in_a_conversion_leaves_nothing(monkeypatch, capsys, place, published):
    monkeypatch.setattr(tensors, "cast", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = sorted(place.iterdir())
    assert cli.main(["convert", *published]) == 130
    assert capsys.readouterr().err.endswith("minidit: interrupted, nothing was written\n")
    assert sorted(place.iterdir()) == before


def test_a_conversion_that_is_terminated_leaves_nothing(monkeypatch, capsys, place, published):
    monkeypatch.setattr(tensors, "cast", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before, handler = sorted(place.iterdir()), signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["convert", *published]) == 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err.endswith("minidit: interrupted, nothing was written\n")
    assert sorted(place.iterdir()) == before


def test_captions_of_a_file_become_videos_in_a_folder_but_those_that_are_there(models, place, capsys):
    (place / "captions").write_text("a red circle moves\n\n a circle\n")
    command = ["generate", "--prompts", "captions", "--out", "videos", "--kind", "gif"]
    command += ["--model", str(models / "small")]
    assert cli.main(command) == 0
    assert sorted(path.name for path in (place / "videos").iterdir()) == ["0000.gif", "0002.gif"]
    out = capsys.readouterr().out
    assert "0000.gif" in out and out.endswith("2 videos made in videos\n")
    (place / "videos" / "0000.gif").unlink()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.endswith("1 videos made in videos, 1 were there already and stay as they are\n")


def test_a_file_of_captions_that_is_interrupted_is_taken_up_with_the_same_videos(models, place, capsys, monkeypatch):
    (place / "captions").write_text("a red circle moves\na circle\n\na red circle\n")

    def run(folder):
        command = ["generate", "--prompts", "captions", "--out", folder, "--kind", "webp", "--seed", "4"]
        return cli.main([*command, "--model", str(models / "small")]), sorted(os.listdir(folder))

    with monkeypatch.context() as patch:
        saved = making.save_video

        def save(frames, path, **options):
            if path.name == "0001.webp":
                next(frames)
                raise KeyboardInterrupt
            return saved(frames, path, **options)

        patch.setattr(making, "save_video", save)
        assert run("videos") == (130, ["0000.webp"])
    said = "interrupted, 1 of 3 videos made in videos: the same command makes the others"
    assert capsys.readouterr().err.endswith(f"minidit: {said}\n")
    assert run("videos") == run("others") == (0, ["0000.webp", "0001.webp", "0003.webp"])
    for path in (place / "videos").iterdir():
        assert path.read_bytes() == (place / "others" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a circle", "--prompts", "captions"], "give a caption, or a file of them with --prompts"),
        (["--prompts", "captions", "--out", "one.mp4"], "name a folder for them with --out, not one.mp4"),
        (["--prompts", "nowhere", "--out", "videos"], "nowhere: No such file"),
        (["a circle", "--axis", "frames"], "are for several ranks: start them with torchrun"),
        (["a circle", "--data", "2"], "are for several ranks: start them with torchrun"),
        (["a circle", "--no-split-guidance"], "are for several ranks: start them with torchrun"),
    ],
)
def test_what_does_not_go_together_is_one_line(complaint, argv, said):
    assert said in complaint("generate", *argv)


@pytest.mark.parametrize(
    ("ranks", "options", "guidance", "groups"),
    [
        (1, [], 3.0, 1),
        (2, [], 3.0, 2),
        (8, [], 3.0, 2),
        (3, [], 3.0, 1),  # does not divide
        (8, [], 1.0, 1),  # has no halves
        (8, ["--no-split-guidance"], 3.0, 1),
    ],
)
def test_the_halves_of_guidance_are_apart_where_the_ranks_divide(ranks, options, guidance, groups):
    args = parser(cli.generate, cli.plan, cli.convert).parse_args(["generate", "a red circle rises", *options])
    config = pipeline.asked(checkpoint.load_config("tiny"), guidance=guidance)
    assert cli.halves(args, config, ranks) == groups


def test_the_plan_for_several_ranks_is_the_papers_table(capsys):
    options = ("--pyramid", "none", "--ranks", "1,8", "--link", "50", "--no-split-guidance")
    out = planned(capsys, *OPEN_SORA, *options)
    assert "predicted, at 500 TFLOP/s and 50 GB/s of each rank" in out
    one, frames, places = (line.split() for line in out.splitlines() if " together " in line)
    assert one[:7] == ["1", "together", "-", "-", "0.00", "0.00", "0"]
    assert frames[:9] == ["8", "together", "frames", "2", "of", "15", "23.08", "46.16", "1710"]
    assert places[:6] == ["8", "together", "places*", "199", "of", "1590"]


def test_the_plan_for_several_ranks_has_the_halves_of_guidance_apart_as_a_run_has(capsys):
    out = planned(capsys, *OPEN_SORA, "--pyramid", "none", "--ranks", "1,2,3,8")
    rows = [line.split() for line in out.splitlines() if " together " in line or " apart " in line]
    assert [row[:3] for row in rows] == [
        ["1", "together", "-"],
        ["2", "apart", "-"],
        ["3", "together", "frames*"],
        ["3", "together", "places"],
        ["8", "apart", "frames"],
        ["8", "apart", "places*"],
    ]
    assert rows[4][3:7] == ["4", "of", "15", "23.08"]  # half of the batch on half as many ranks
    (one, two) = (float(row[-2]) for row in rows[:2])
    assert two == pytest.approx(one / 2, abs=0.01)
    alone = planned(capsys, *OPEN_SORA, "--ranks", "2", "--guidance", "1")  # no halves
    assert " together " in alone and " apart " not in alone


def test_an_odd_number_of_ranks_has_no_halves_for_guidance(complaint):
    said = "minidit: --split-guidance: 3 ranks do not divide into two halves\n"
    assert complaint("plan", "--ranks", "2,3", "--split-guidance") == said


@pytest.mark.parametrize("argv", [["draw"], ["generate"], ["convert"], ["--model", "tiny"]])
def test_a_command_line_that_makes_no_sense_is_one_line(complaint, argv):
    assert "--help)" in complaint(*argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "plan      "),
        (["--help"], 'minidit generate "a red circle'),
        (["generate", "--help"], ", ".join(list(RECIPES)[:5])),
        (["plan", "--help"], "minidit plan --model opensora-1.2"),
        (["convert", "--help"], "minidit convert hpcai-tech/OpenSora-STDiT-v3"),
        (["--version"], "minidit "),
    ],
)
def test_help_and_version_are_printed(capsys, argv, said):
    try:
        assert cli.main(argv) == 0
    except SystemExit as exit:
        assert exit.code == 0
    out, err = capsys.readouterr()
    assert said in out and err == "" and max(map(len, out.splitlines())) <= 120


def test_python_m_minidit_is_the_command_and_a_closed_pipe_is_no_error():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    argv = [sys.executable, "-m", "minidit", "plan", "--model", "opensora-1.2"]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}, text=True
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)
    process.stderr.close()


@pytest.mark.parametrize(
    ("amount", "base", "text"),
    [(0, 1024, "0 "), (999, 1000, "999 "), (12_300_000, 1024, "11.7 Mi"), (3.385e15, 1000, "3385.0 T")],
)
def test_amounts_are_readable(amount, base, text):
    assert readable(amount, base) == text
