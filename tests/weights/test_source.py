import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minidit.weights.source import Place, find, locate

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Files of a test are named as a user names them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder, *names):
    for name in names:
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).touch()


def refusal(source, kind):
    with pytest.raises(kind) as error:
        locate(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json", "a.pt", "a.pth", "a.ckpt"])
def test_a_file_is_taken_as_it_is(name):
    files(".", name, "other.pt")
    assert locate(name) == Place(Path(name))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.safetensors", "config.json", "README.md"], "model.safetensors"),
        (["step.pt"], "step.pt"),
        (["transformer/diffusion_pytorch_model.safetensors", "vae/a.safetensors"], None),
        (["model/ema.pth", "optimizer/a.pt"], "model/ema.pth"),
        (
            ["m.safetensors.index.json", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
            "m.safetensors.index.json",
        ),
    ],
)
def test_the_one_checkpoint_of_a_folder_is_found(names, found):
    files("folder", *names)
    assert find(Path("folder")) == Path("folder", found or names[0])


def test_several_checkpoints_are_told():
    files("folder", "b.pt", "a.safetensors", "transformer/c.safetensors", "vae/d.safetensors")
    assert refusal("folder", ValueError) == (
        "folder holds 3 checkpoints, name one of them: a.safetensors, b.pt, transformer/c.safetensors"
    )


def test_parts_of_another_index_are_checkpoints():
    files("folder", "a.safetensors.index.json", "a-00001-of-00001.safetensors", "b-00001-of-00002.safetensors")
    assert "2 checkpoints, name one of them: a.safetensors.index.json, b-00001-of-" in refusal("folder", ValueError)


def test_a_folder_without_a_checkpoint_is_told():
    files("folder", "config.json", "vae/model.safetensors")
    assert "folder holds no checkpoint, itself or in transformer/, model/: " in refusal("folder", FileNotFoundError)


@pytest.mark.parametrize(
    "source", ["gone", "gone.pt", "gone/model.pt", "./a/b", "/a/b", "here/b", "here/b/c", "a//b", "~no/b"]
)
def test_what_can_be_no_name_on_the_hub_is_not_looked_for_there(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=pytest.fail))
    files("here", "a")
    assert refusal(source, FileNotFoundError) == (
        f"{source} does not exist: expected a file, a folder, or org/name on the hub"
    )


def test_a_file_of_another_kind_is_told():
    files(".", "model.bin")
    assert refusal("model.bin", ValueError).startswith("model.bin: expected a file that ends in one of .safetensors, ")


# on the hub


@pytest.fixture
def hub(monkeypatch, place):
    """A hub with these files: huggingface_hub's own patterns choose among them. Tells what was fetched."""
    chosen = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
    fetched = []

    def serve(repository, *names):
        def snapshot_download(name, **patterns):
            if name != repository:
                raise OSError(f"404 Client Error.\n\nRepository Not Found for url: {name}")
            files("cache", "abc123/.keep")
            for file in chosen(names, **patterns):
                files("cache/abc123", file)
                fetched.append(file)
            return "cache/abc123"

        monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
        return fetched

    return serve


LATTE = ["ffs.pt", "ucf101.pt", "t2v/transformer/a.safetensors", "t2v/text_encoder/b.safetensors", "README.md"]


@pytest.mark.parametrize(
    ("names", "inside", "fetched"),
    [
        (["model.safetensors", "config.json", "vae/v.safetensors"], "", ["model.safetensors"]),
        (["transformer/a.safetensors", "vae/v.safetensors", "text_encoder/t.pt"], "", ["transformer/a.safetensors"]),
        (LATTE, "/ucf101.pt", ["ucf101.pt"]),
        (LATTE, "/t2v", ["t2v/transformer/a.safetensors"]),
        (LATTE, "/t2v/transformer", ["t2v/transformer/a.safetensors"]),
        (
            ["a.safetensors.index.json", "a-00001-of-00001.safetensors"],
            "",
            ["a.safetensors.index.json", "a-00001-of-00001.safetensors"],
        ),
    ],
)
def test_only_the_checkpoint_is_fetched_from_the_hub(hub, names, inside, fetched):
    seen = hub("org/name", *names)
    assert locate(f"org/name{inside}") == Place(Path("cache/abc123", fetched[0]), f"org/name/{fetched[0]}", "abc123")
    assert seen == fetched


def test_several_on_the_hub_are_told_with_how_to_name_one(hub):
    hub("org/name", *LATTE)
    message = refusal("org/name", ValueError)
    assert message.startswith("org/name on the hub: ") and message.endswith(
        "2 checkpoints, name one of them: ffs.pt, ucf101.pt; a file or folder in it is named as org/name/PATH"
    )


def test_what_the_hub_does_not_have_is_told_in_one_line(hub):
    hub("org/name", "README.md")
    assert refusal("org/gone", FileNotFoundError) == (
        "org/gone does not exist, and could not be had from the hub: "
        "404 Client Error. Repository Not Found for url: org/gone"
    )
    assert "org/name on the hub: cache/abc123 holds no checkpoint" in refusal("org/name", ValueError)


@pytest.mark.parametrize("error", [RuntimeError("403\n Forbidden"), type("ProxyError", (Exception,), {})()])
def test_a_connection_that_fails_in_any_way_is_told_in_one_line(monkeypatch, error):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    reason = "403 Forbidden" if str(error) else "ProxyError"
    assert refusal("org/name", FileNotFoundError).endswith(f"could not be had from the hub: {reason}")


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="^org/name does not exist here, and to look for it on the hub") as error:
        locate("org/name")
    assert error.value.name == "huggingface_hub"


OFFLINE = """
import sys
from minidit.weights.source import locate
for source in sys.argv[1:]:
    try:
        print(locate(source))
    except OSError as error:
        print(error)
"""


def test_without_a_network_the_local_cache_is_used(place):
    pytest.importorskip("huggingface_hub")
    home = place / "home/hub/models--org--name"
    files(home / "snapshots/abc123", "model.safetensors")
    files(home, "refs/main")
    (home / "refs/main").write_text("abc123")
    environment = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", OFFLINE, "org/name", "org/gone"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    found, gone = result.stdout.splitlines()
    assert re.fullmatch(r"Place\(path=.*abc123/model.safetensors'\), hub='org/name/model.safetensors', .*", found)
    assert gone.startswith("org/gone does not exist, and could not be had from the hub: ")
