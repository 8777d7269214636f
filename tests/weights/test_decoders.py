"""Published folders, made here at tiny size, become the decoders they hold; what does not fit is refused by name."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_decoders as made
from families import GOLDENS, error
from minidit.decoders import Causal, Frames, OpenSora, TemporalDecoder
from minidit.opensora_vae import OPENSORA_VAE_12
from minidit.plan_vae import PLAN_1_0, PLAN_1_1, CausalVAE
from minidit.weights.decoders import _here, causal_config, load_decoder
from minidit.weights.plan_vae import causal_vae
from minidit.weights.rules import invert
from test_opensora_vae import TINY as OPENSORA
from test_plan_vae import TINY as PLAN

diffusers = pytest.importorskip("diffusers")
MANIFESTS = GOLDENS.parent / "manifests"
SAFE = "diffusion_pytorch_model.safetensors"
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
# as docs/Train_And_Eval_CausalVideoVAE.md of Open-Sora-Plan prints it
CAUSAL = {
    "_class_name": "CausalVAEModel",
    "attn_resolutions": [],
    "decoder_attention": "AttnBlock3DFix",
    "decoder_conv_in": "CausalConv3d",
    "decoder_conv_out": "CausalConv3d",
    "decoder_mid_resnet": "ResnetBlock3D",
    "decoder_resnet_blocks": ["ResnetBlock3D"] * 4,
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", "SpatialUpsample2x", "SpatialUpsample2x"],
    "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
    "double_z": True,
    "embed_dim": 4,
    "encoder_attention": "AttnBlock3DFix",
    "encoder_conv_in": "Conv2d",
    "encoder_conv_out": "CausalConv3d",
    "encoder_mid_resnet": "ResnetBlock3D",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "encoder_spatial_downsample": ["Downsample", "Downsample", "Downsample", ""],
    "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
    "hidden_size": 128,
    "hidden_size_mult": [1, 2, 4, 4],
    "loss_type": "opensora.models.ae.videobase.losses.LPIPSWithDiscriminator3D",
    "num_res_blocks": 2,
    "q_conv": "CausalConv3d",
    "resolution": 256,
    "z_channels": 4,
}
PIPELINE = {"architectures": ["VideoAutoencoderPipeline"], "model_type": "VideoAutoencoderPipeline"}


def respelled(tensors):
    """With the attention's names as diffusers had them before 0.20."""
    for new, old in OLD.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    return tensors


def folder(path, config, tensors, name=SAFE):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(tensors, path / name)
    else:
        torch.save(tensors if name.endswith(".bin") else {"state_dict": tensors, "epoch": 3}, path / name)
    return path


def published(path, kind):
    """The folder of a tiny one, what loading it needs to be told, and the decoder that is in it."""
    match kind:
        case "frames" | "temporal":
            decoder = made.CASES[kind][0]()
            decoder.vae.save_pretrained(path)
            return path, {}, decoder
        case "opensora":
            tensors = made.weights("opensora_vae12_a")
            return folder(path, PIPELINE, tensors, "model.safetensors"), {"shape": OPENSORA}, made.opensora()
        case "causal":
            return folder(path, CAUSAL, made.weights("osp_causalvae110_a")), {"shape": PLAN}, made.causal()


def same(ours, theirs):
    assert type(ours) is type(theirs) and not ours.training
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys()
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    return all(torch.equal(one[name], other[name]) for name in one)


@made.kinds
def test_a_published_folder_is_the_decoder_it_holds(tmp_path, kind):
    path, told, theirs = published(tmp_path, kind)
    with made.groups_of(4):
        ours = load_decoder(path, **told)
    assert same(ours, theirs)
    _, n, size = made.CASES[kind]
    z = made.latents_of(size)
    assert torch.equal(torch.cat(list(ours.chunks(z, n))), torch.cat(list(theirs.chunks(z, n))))


@made.kinds
def test_tensors_become_of_one_dtype_but_those_that_scale_latents(tmp_path, kind):
    path, told, _ = published(tmp_path, kind)
    with made.groups_of(4):
        ours = load_decoder(path, dtype=torch.bfloat16, **told)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in ours.buffers()} <= {torch.float32}
    assert kind != "opensora" or error(ours.vae.scale[0, :, 0, 0, 0], torch.tensor([3.85, 2.32, 2.33, 3.06])) < 1e-6


@made.kinds
def test_a_config_that_names_no_class_leaves_it_to_the_tensors(tmp_path, kind):
    path, told, theirs = published(tmp_path, kind)
    config = json.loads((path / "config.json").read_text())
    for name in ("_class_name", "architectures", "model_type"):
        config.pop(name, None)
    (path / "config.json").write_text(json.dumps(config))
    with made.groups_of(4):
        assert same(load_decoder(path, **told), theirs)


@pytest.mark.parametrize("kind", ["frames", "temporal", "opensora"])
def test_the_attention_names_of_before_diffusers_020_mean_the_same(tmp_path, kind):
    path, told, theirs = published(tmp_path, kind)
    tensors = made.weights("opensora_vae12_a") if kind == "opensora" else theirs.vae.state_dict()
    old = respelled(tensors)
    assert len(old.keys() - tensors.keys()) == 16
    folder(path, json.loads((path / "config.json").read_text()), old, "model.safetensors" if told else SAFE)
    with made.groups_of(4):
        assert same(load_decoder(path, **told), theirs)


def test_diffusers_itself_reads_old_attention_names_as_we_do(tmp_path):
    path, _, theirs = published(tmp_path, "frames")
    folder(path, json.loads((path / "config.json").read_text()), respelled(theirs.vae.state_dict()))
    assert same(Frames(diffusers.AutoencoderKL.from_pretrained(path)).eval().requires_grad_(False), theirs)


def test_a_checkpoint_of_training_is_read_without_what_it_was_trained_with(tmp_path):
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2)}
    path = folder(tmp_path / "vae", CAUSAL, {**made.weights("osp_causalvae110_a"), **extra}, "checkpoint.ckpt")
    assert same(load_decoder(path, shape=PLAN), made.causal())


def meta(manifest):
    tensors = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    return tensors["config"], {name: tuple(shape) for name, (shape, _) in tensors["tensors"].items()}


@pytest.mark.parametrize(
    ("name", "manifest"),
    [("AutoencoderKL", "sd_vae_autoencoderkl"), ("AutoencoderKLTemporalDecoder", "latte1_vae_temporal_decoder")],
)
def test_diffusers_autoencoders_have_the_names_and_shapes_of_the_published_files(name, manifest):
    config, published = meta(manifest)
    config.setdefault("down_block_types", ["DownEncoderBlock2D"] * 4)
    with torch.device("meta"):
        vae = getattr(diffusers, name).from_config(config)
    assert {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()} == published
    decoder = (Frames if name == "AutoencoderKL" else TemporalDecoder)(vae)
    assert (decoder.channels, decoder.space, decoder.factor) == (4, 8, 0.18215)


def test_a_causal_config_says_the_shape_that_its_weights_have(tmp_path):
    assert causal_config(tmp_path, CAUSAL) == PLAN_1_1
    # what the class has by itself, and the levels of scripts/causalvae/release.json
    first = CAUSAL | {
        "decoder_attention": "AttnBlock3D",
        "encoder_attention": "AttnBlock3D",
        "encoder_conv_in": "CausalConv3d",
        "encoder_resnet_blocks": ["ResnetBlock3D"] * 4,
        "encoder_spatial_downsample": ["SpatialDownsample2x"] * 3 + [""],
        "encoder_temporal_downsample": ["TimeDownsample2x", "TimeDownsample2x", "", ""],
        "decoder_temporal_upsample": ["", "", "TimeUpsample2x", "TimeUpsample2x"],
    }
    assert causal_config(tmp_path, first) == PLAN_1_0


def test_a_causal_folder_needs_no_shape_but_its_config(tmp_path):
    config = CAUSAL | {"hidden_size": 32, "hidden_size_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    vae = CausalVAE(causal_config(tmp_path, config))
    path = folder(tmp_path / "vae", config, invert(causal_vae(vae.config), vae.state_dict()))
    assert same(load_decoder(path), Causal(vae).eval())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"encoder_spatial_downsample": ["Downsample", "Spatial2xTime2x3DDownsample"]},
            "no Spatial2xTime2x3DDownsample",
        ),
        ({"encoder_attention": None}, "not all of a CausalVAEModel's config"),
    ],
)
def test_a_causal_config_of_another_version_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        causal_config(tmp_path, CAUSAL | change)
    incomplete = {name: value for name, value in CAUSAL.items() if name != "hidden_size"}
    with pytest.raises(ValueError, match="KeyError.'hidden_size'.*: give the shape, such as"):
        causal_config(tmp_path, incomplete)


def refused(path, error, **told):
    with pytest.raises(error) as raised:
        load_decoder(path, **told)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_not_there_is_said(tmp_path):
    assert "is no folder" in refused(tmp_path / "absent", FileNotFoundError)
    assert f"expected one of {SAFE}" in refused(tmp_path, FileNotFoundError)
    path = folder(tmp_path, {}, {"a": torch.zeros(1)})
    (path / "config.json").unlink()
    assert "is published beside the weights" in refused(path, FileNotFoundError)


def test_pickled_weights_are_refused_with_where_to_get_others(tmp_path):
    path = folder(tmp_path, CAUSAL, {"a": torch.zeros(1)}, "diffusion_pytorch_model.bin")
    assert f"diffusion_pytorch_model.bin may hold code and is not read: get {SAFE}" in refused(path, ValueError)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "AsymmetricAutoencoderKL"}, r"is of a AsymmetricAutoencoderKL, known are VideoAuto.*Latte\)"),
        ({"model_type": "t5"}, "is of a t5, known are"),
        ({}, "names no class, and the tensors are of none that is known: VideoAuto"),
    ],
)
def test_another_model_is_refused_with_those_that_are_known(tmp_path, config, said):
    path = folder(tmp_path, config, {"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=said):
        load_decoder(path)


def test_a_config_and_weights_of_two_models_are_refused(tmp_path):
    path, _, _ = published(tmp_path, "frames")
    (path / "config.json").write_text(json.dumps(CAUSAL))
    assert "is of a CausalVAEModel, but the tensors are of a AutoencoderKL" in refused(path, ValueError)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_refused(tmp_path, text):
    path = folder(tmp_path, {}, {"a": torch.zeros(1)})
    (path / "config.json").write_text(text)
    refused(path, ValueError)


@made.kinds
def test_tensors_that_do_not_fit_are_named(tmp_path, kind):
    path, told, _ = published(tmp_path, kind)
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("conv_in.weight") or name.endswith("conv_in.conv.weight"))
    del tensors[gone]
    file.unlink()
    save_file(tensors, file)
    with made.groups_of(4):
        said = refused(path, ValueError, **told)
    assert f"1 missing: {gone!r}" in said


def test_a_shape_of_another_kind_is_refused(tmp_path):
    path, _, _ = published(tmp_path, "causal")
    assert "a CausalVAEModel has no VAEConfig" in refused(path, ValueError, shape=OPENSORA_VAE_12)
    path, _, _ = published(tmp_path / "frames", "frames")
    assert "a AutoencoderKL has no CausalVAEConfig" in refused(path, ValueError, shape=PLAN_1_1)


@pytest.mark.parametrize("kind", ["frames", "opensora"])
def test_diffusers_is_asked_for_by_the_extra_it_is_of(tmp_path, monkeypatch, kind):
    path, told, _ = published(tmp_path, kind)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ImportError
    with pytest.raises(ImportError, match="needs the package diffusers, of minidit's extra 'hub'"):
        load_decoder(path, **told)


def test_the_decoder_of_open_sora_is_of_its_published_shape_by_itself(tmp_path):
    path, _, _ = published(tmp_path, "opensora")
    with pytest.raises(ValueError, match="does not fit the VideoAutoencoderPipeline of config.json, tensors are wrong"):
        load_decoder(path)
    assert isinstance(load_decoder(path, shape=OPENSORA), OpenSora)


# on the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A repository org/vaes in the hub's cache, as the hub lays it out, without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    home = tmp_path / "hub" / "models--org--vaes"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    (home / "snapshots").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (home / "snapshots" / "abc123").mkdir()
    return home / "snapshots" / "abc123"


@pytest.mark.parametrize("inside", ["", "/vae_temporal_decoder", "/some/vae/"])
def test_a_name_on_the_hub_is_the_folder_in_its_cache_without_a_network(cache, inside):
    shape = {"block_out_channels": (32,) * 4, "latent_channels": 4, "layers_per_block": 1}
    vae = diffusers.AutoencoderKLTemporalDecoder(**shape, down_block_types=("DownEncoderBlock2D",) * 4)
    vae.save_pretrained(cache / inside.strip("/"))
    found, here = load_decoder(f"org/vaes{inside}"), load_decoder(cache / inside.strip("/"))
    assert isinstance(found, TemporalDecoder)
    assert all(map(torch.equal, found.parameters(), here.parameters()))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gone", "org/gone does not exist, and could not be had from the hub: "),
        ("org/vaes/gone", "org/vaes/gone on the hub: .*gone does not exist; a folder in it is named as org/name/"),
        ("org/vaes", "org/vaes on the hub: .* holds no weights of a decoder: expected one of .*; a folder in it"),
        ("org", "org is no folder: give one with config.json and .*, or org/name or org/name/folder on the hub"),
        ("./org/vaes", "./org/vaes is no folder"),
    ],
)
def test_what_is_not_in_the_cache_is_one_line(cache, name, said):
    with pytest.raises((OSError, ValueError), match=said) as error:
        load_decoder(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [SAFE, "diffusion_pytorch_model.safetensors.index.json", "checkpoint.ckpt"])
def test_from_the_hub_comes_what_is_needed_and_pickled_weights_where_there_are_no_others(
    tmp_path, monkeypatch, weights
):
    chosen = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)] * weights.endswith(".json")
    names = ["README.md", "model.bin", *(f"vae/{name}" for name in ("config.json", weights, "a.bin", *shards))]
    names += ["vae/checkpoint.ckpt"] * (weights != "checkpoint.ckpt")
    fetched = []

    def snapshot_download(repository, *, allow_patterns, ignore_patterns):
        assert repository == "org/name"
        for name in chosen(names, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
            fetched.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert _here("org/name/vae") == tmp_path / "vae"
    assert sorted(fetched) == sorted(f"vae/{name}" for name in ("config.json", weights, *shards))
