"""`models fetch` against a hub and a server on loopback: what it downloads, where it puts it, what it says and pins."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT
from fakes import until
from file_server import FileServer, ServedFile, file_server, serve_files
from hub_server import HubServer, hub_server
from model_files import FILES, flux, write_gguf, write_safetensors

from scripts.documented_commands import blocks
from stable_diffusion_server.cli import main
from stable_diffusion_server.pipelines import LoraFolder, choose_models, read_spec

pytestmark = pytest.mark.slow

__all__ = ["file_server", "hub_server"]

REPO = "owner/merges"
SMALL = flux(double=1, single=1, width=256)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small FLUX.1 transformer whose bytes differ from place to place."""
    data = write_safetensors(tmp_path_factory.mktemp("weights") / "small.safetensors", SMALL).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + (bytes(range(251)) * (len(data) // 251 + 1))[: len(data) - start]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MODELS_DIR, which is not there yet."""
    monkeypatch.setenv("MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("LORA_DIR", raising=False)
    return tmp_path / "models"


@pytest.fixture
def hub(hub_server: HubServer, weights: bytes) -> HubServer:
    """A hub with repositories of one file, of several, of pickled ones, and a diffusers folder."""
    hub_server.repositories[REPO] = {"small.safetensors": weights, "README.md": b"#"}
    hub_server.repositories["owner/many"] = {"a.safetensors": weights, "split/b.safetensors": weights, "c.ckpt": b"p"}
    hub_server.repositories["owner/old"] = {"old.ckpt": b"pickled", "README.md": b"#"}
    hub_server.add("owner/sdxl", ROOT / "models" / "embedded-sdxl")
    return hub_server


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], models: Path) -> Run:
    """Run `models` with arguments: exit status, output and errors."""

    def ran(*arguments: str) -> tuple[int, str, str]:
        status = 0
        try:
            main(["models", *arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return ran


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def visible(folder: Path) -> set[str]:
    return {name for name in names(folder) if not any(part.startswith(".") for part in name.split("/"))}


def listed(run: Run) -> dict[str, dict[str, object]]:
    return {model["name"]: model for model in json.loads(run("list", "--json")[1])["models"]}


def test_the_only_file_of_a_repository_is_fetched_and_its_revision_pinned(
    hub: HubServer, run: Run, models: Path, weights: bytes
) -> None:
    """The model is listed, with what is known of its origin; a second run downloads nothing."""
    status, out, err = run("fetch", REPO)
    size = f"{len(weights) / 1e6:.1f} MB"
    assert status == 0
    assert out == f"models/small.safetensors: denoiser, flux, dev, fp16, {size}, revision {hub.commit(REPO)}\n"
    assert err.splitlines()[-1] == f"small.safetensors: {size} of {size} (100 %)"
    assert names(models) == {"small.safetensors", "small.toml"}
    assert (models / "small.safetensors").read_bytes() == weights
    assert listed(run)["small"]["spec"] == {
        "source": f"{REPO}/small.safetensors",
        "revision": hub.commit(REPO),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert run("verify")[0] == 0
    sent = hub.sent["small.safetensors"]
    status, out, _ = run("fetch", REPO)
    assert (status, "small.safetensors is here already" in out) == (0, True)
    assert hub.sent["small.safetensors"] - sent <= 65_536


def test_files_are_as_readable_as_the_umask_says(hub: HubServer, run: Run, models: Path) -> None:
    """The server may run as another user."""
    before = os.umask(0o027)
    try:
        run("fetch", REPO)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((models / name).stat().st_mode) for name in visible(models)} == {0o640}


def test_a_pinned_revision_is_kept_and_another_is_fetched_when_asked_for(
    hub: HubServer, run: Run, models: Path, weights: bytes
) -> None:
    """Upstream changes: the pin wins, `@main` says that another file is there, `--replace` replaces it and the pin.

    `models verify` compares a file with the pinned digest.
    """
    run("fetch", REPO)
    first = hub.commit(REPO)
    hub.old[first] = dict(hub.repositories[REPO])
    hub.repositories[REPO]["small.safetensors"] = weights[:-1] + b"\x01"
    for arguments in ((REPO, "small.safetensors"), (REPO,)):
        status, out, _ = run("fetch", *arguments)
        assert status == 0
        assert f"small.toml pins the revision {first}; {REPO}@main is the newest." in out
        assert "small.safetensors is here already" in out
    status, _, err = run("fetch", f"{REPO}@main")
    assert (status, "--replace replaces it" in err) == (1, True)
    assert (models / "small.safetensors").read_bytes() == weights
    assert run("fetch", f"{REPO}@main", "--replace")[0] == 0
    pinned = hashlib.sha256((models / "small.safetensors").read_bytes()).hexdigest()
    (models / "small.safetensors").write_bytes(weights)
    status, out, _ = run("verify")
    assert (status, f"is not the file of its spec: its SHA-256 is {hashlib.sha256(weights).hexdigest()}" in out) == (
        1,
        True,
    )
    assert run("fetch", f"{REPO}@main", "--replace")[0] == 0
    assert hashlib.sha256((models / "small.safetensors").read_bytes()).hexdigest() == pinned
    assert (models / "small.safetensors").read_bytes() == weights[:-1] + b"\x01"
    assert read_spec(models / "small.toml").values["revision"] == hub.commit(REPO) != first


def test_the_owners_keys_stay_as_they_are(hub: HubServer, run: Run, models: Path) -> None:
    """Comments, order and a source of his own; also in a spec that is not TOML."""
    models.mkdir()
    spec = models / "small.toml"
    spec.write_text('# mine\nsteps = 4 # quick\nsource = "a friend"\n')
    status, out, _ = run("fetch", REPO)
    assert (status, "small.toml keeps its own source" in out) == (0, True)
    assert spec.read_text().endswith('# mine\nsteps = 4 # quick\nsource = "a friend"\n')
    values = read_spec(spec).values
    assert (values["steps"], values["source"], values["revision"]) == (4, "a friend", hub.commit(REPO))
    (models / "small.safetensors").unlink()
    spec.write_text("steps = = 4\n")
    assert run("fetch", f"{REPO}@main")[0] == 0
    assert spec.read_text() == "steps = = 4\n"


def test_a_diffusers_folder_is_fetched_with_one_variant_of_each_part(hub: HubServer, run: Run, models: Path) -> None:
    """Only what is read, under the repository's name; usable at once, and the spec beside it pins the commit."""
    files = hub.repositories["owner/sdxl"]
    unet = files["unet/diffusion_pytorch_model.safetensors"]
    files |= {"unet/diffusion_pytorch_model.fp16.safetensors": unet, "unet/diffusion_pytorch_model.bin": b"pickle"}
    files |= {"sd_xl.safetensors": unet, "README.md": b"#", "a.png": b"p"}
    status, out, _ = run("fetch", "owner/sdxl", "--name", "my sdxl")
    assert (status, out.startswith("models/my sdxl: pipeline, sdxl, fp16, ")) == (0, True)
    fetched = {name.removeprefix("my sdxl/") for name in visible(models)} - {"my sdxl.toml"}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in fetched
    assert not {name for name in fetched if name.endswith((".bin", ".png", ".md"))} | (fetched - set(files))
    assert "unet/diffusion_pytorch_model.safetensors" not in fetched
    assert all((models / "my sdxl" / name).read_bytes() == files[name] for name in fetched)
    assert listed(run)["my sdxl"]["faults"] == []
    assert run("verify", "my sdxl")[0] == 0
    assert read_spec(models / "my sdxl.toml").values == {"source": "owner/sdxl", "revision": hub.commit("owner/sdxl")}
    assert "my sdxl is here already" in run("fetch", "owner/sdxl", "--name", "my sdxl")[1]
    files["README.md"] = b"# newer"
    status, _, err = run("fetch", "owner/sdxl@main", "--name", "my sdxl")
    assert (status, "is not of this revision" in err) == (1, True)


def test_a_file_goes_to_the_folder_of_its_kind(hub: HubServer, run: Run, models: Path, tmp_path: Path) -> None:
    """Where ComfyUI's or AUTOMATIC1111's folders are; known by the first bytes, before the download."""
    for folder in ("checkpoints", "unet", "VAE", "Lora", "embeddings"):
        (models / folder).mkdir(parents=True)
    kinds = hub.repositories["owner/kinds"] = {}
    for name in ("taesd", "lora-sdxl", "embedding-sdxl"):
        file = write_safetensors(tmp_path / f"{name}.safetensors", FILES[name])
        kinds[file.name] = file.read_bytes()
    kinds["q8.gguf"] = write_gguf(tmp_path / "q8.gguf", SMALL).read_bytes()
    status, _, err = run("fetch", "owner/kinds", *sorted(kinds))
    assert (status, err.count("100 %")) == (0, len(kinds)), err
    assert {name for name in visible(models) if not name.endswith(".toml")} == {
        "unet/q8.gguf",
        "Lora/lora-sdxl.safetensors",
        "embeddings/embedding-sdxl.safetensors",
        "taesd.safetensors",  # there is no vae_approx
    }
    assert run("fetch", "owner/kinds", "q8.gguf", "--folder", "mine/here", "--name", "other")[0] == 0
    assert (models / "mine" / "here" / "other.gguf").is_file()


def test_a_single_network_becomes_a_folder_of_its_kind(hub: HubServer, run: Run, models: Path) -> None:
    """A ControlNet: its configuration and one variant, in the folder for ControlNets. An unknown class is refused."""
    (models / "ControlNet").mkdir(parents=True)
    hub.add("owner/edges", ROOT / "models" / "embedded-controlnet-canny-sdxl")
    files = hub.repositories["owner/edges"]
    files |= {"diffusion_pytorch_model.fp16.safetensors": files["diffusion_pytorch_model.safetensors"], "a.png": b"p"}
    status, out, _ = run("fetch", "owner/edges")
    assert (status, out.startswith("ControlNet/edges: controlnet, ")) == (0, True)
    assert names(models) == {
        "ControlNet/edges.toml",
        "ControlNet/edges/config.json",
        "ControlNet/edges/diffusion_pytorch_model.fp16.safetensors",
    }
    assert run("fetch", "owner/edges", "--variant", "none", "--name", "plain")[0] == 0
    assert (models / "ControlNet" / "plain" / "diffusion_pytorch_model.safetensors").is_file()
    files["config.json"] = b'{"_class_name": "Surprise"}'
    status, _, err = run("fetch", "owner/edges@main", "--name", "third")
    assert (status, "holds a network of the class Surprise, which is not known" in err) == (1, True)


def test_a_tokenizer_is_fetched_into_a_named_folder(hub: HubServer, run: Run, models: Path) -> None:
    """Checked by git's digest; a text gets no spec."""
    hub.repositories["owner/sdxl"]["tokenizer_2/tokenizer.json"] = b'{"model": {}}'
    assert run("fetch", "owner/sdxl", "tokenizer_2/tokenizer.json", "--folder", "t5-tokenizer")[0] == 0
    assert names(models) == {"t5-tokenizer/tokenizer.json"}
    assert "is here already" in run("fetch", "owner/sdxl", "tokenizer_2/tokenizer.json", "--folder", "t5-tokenizer")[1]


@contextmanager
def half_way(hub: HubServer, models: Path, name: str, *arguments: str) -> Iterator[None]:
    """Run the command in a process of its own; half of a file has come meanwhile; then the process is killed."""
    hub.held.add(name)
    size = next(len(files[path]) for files in hub.repositories.values() for path in files if path.endswith(name))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(models.parent / "hf")}
    process = subprocess.Popen(  # noqa: S603  # our own command
        [sys.executable, "-m", "stable_diffusion_server", "models", "fetch", *arguments],
        env=environment,
        cwd=models.parent,
        stderr=subprocess.DEVNULL,
    )

    def half_is_there() -> bool:
        assert process.poll() is None, "it ended by itself"
        with suppress(OSError):
            return size // 2 in [part.stat().st_size for part in models.rglob(".*.part*")]
        return False

    try:
        until(half_is_there, 120)
        yield
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        hub.held.clear()


def test_killed_half_way_it_resumes_with_the_other_half(hub: HubServer, run: Run, models: Path, weights: bytes) -> None:
    """SIGKILL of the process: no file under its name, none in the lists; then only the rest is sent.

    Before, a second fetch of the same file is told of the first one and leaves it alone.
    """
    with half_way(hub, models, "small.safetensors", REPO):
        status, _, err = run("fetch", REPO)
        assert (status, "Another `models fetch` is at small.safetensors" in err) == (1, True)
    assert LoraFolder(models).faults() == {}
    assert visible(models) == set()
    assert listed(run) == {}
    hub.sent.clear()
    assert run("fetch", REPO)[0] == 0
    assert (models / "small.safetensors").read_bytes() == weights
    header = 8 + int.from_bytes(weights[:8], "little")
    assert hub.sent["small.safetensors"] == len(weights) - len(weights) // 2 + max(65_536, header)
    assert names(models) == {"small.safetensors", "small.toml"}


def test_changed_upstream_since_the_kill_it_starts_anew(hub: HubServer, run: Run, models: Path, weights: bytes) -> None:
    """No file of two halves."""
    with half_way(hub, models, "small.safetensors", REPO):
        pass
    new = weights[:-9] + b"different"
    hub.repositories[REPO]["small.safetensors"] = new
    assert run("fetch", REPO)[0] == 0
    assert (models / "small.safetensors").read_bytes() == new


def test_a_folder_that_was_killed_half_way_keeps_its_files(hub: HubServer, run: Run, models: Path) -> None:
    """Whole weight files are not sent again, and the folder appears at once with all of them; stray ones go."""
    with half_way(hub, models, "diffusion_pytorch_model.safetensors", "owner/sdxl"):
        pass
    assert visible(models) == set()
    (models / ".sdxl.part" / "stray.safetensors").write_bytes(b"of an older revision")
    whole = {name for name in names(models / ".sdxl.part") if name.endswith(".safetensors") and "/." not in name}
    hub.sent.clear()
    hub.asked.clear()
    assert run("fetch", "owner/sdxl")[0] == 0
    files = hub.repositories["owner/sdxl"]
    fetched = {name.removeprefix("sdxl/") for name in visible(models)} - {"sdxl.toml"}
    assert "stray.safetensors" not in fetched
    assert all((models / "sdxl" / name).read_bytes() == files[name] for name in fetched)
    again = {path.partition("/resolve/")[2].partition("/")[2] for path in hub.asked}
    assert not again & (whole - {"stray.safetensors"})
    total = sum(len(files[name]) for name in fetched if name.endswith("/diffusion_pytorch_model.safetensors"))
    assert 0 < hub.sent["diffusion_pytorch_model.safetensors"] < total


def test_a_wrong_digest_leaves_nothing(hub: HubServer, run: Run, models: Path) -> None:
    """Ours by --sha256; the damaged partial file is gone too."""
    status, _, err = run("fetch", REPO, "small.safetensors", "--sha256", "0" * 64)
    assert (status, "its digest is" in err) == (1, True)
    assert names(models) == set()


def test_what_the_hub_refuses_is_a_sentence_with_what_to_do(
    hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated, private or missing, no such revision or file, a bad token, no network, offline; each with its way out."""
    hub.gated.add(REPO)
    status, _, err = run("fetch", REPO)
    assert (status, f"Accept its licence at {hub.url}/{REPO} and set HF_TOKEN" in err) == (1, True)
    assert "it is private and HF_TOKEN is not a token" in run("fetch", "owner/nothing")[2]
    assert "it has no revision v9 (owner/many@REVISION names one" in run("fetch", "owner/many@v9")[2]
    assert "did you mean a.safetensors" in run("fetch", "owner/many", "a.safetensor")[2]
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert run("fetch", REPO)[0] == 0
    hub.refused.add("hf_good")
    err = run("fetch", "owner/many", "a.safetensors")[2]
    assert "the hub refuses the token (status 401). Set HF_TOKEN to a token that may read" in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 forbids it" in run("fetch", "owner/many", "a.safetensors")[2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    err = run("fetch", "owner/many", "a.safetensors")[2]
    assert "http://127.0.0.1:9 does not answer (ConnectError" in err
    assert err.count("\n") == 1


def test_the_token_stays_with_the_hub(
    hub: HubServer, run: Run, models: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are elsewhere, at a signed address: the hub's host gets the token, that one does not."""
    hub.gated.add(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve_files() as storage:
        hub.storage = storage.url
        storage.files[f"/{hashlib.sha256(weights).hexdigest()}"] = ServedFile(weights, {"ETag": '"x"'})
        status, _, err = run("fetch", REPO)
        assert (status, "The redirect of 127.0.0.1 does not lead to a public address" in err) == (1, True)
        monkeypatch.setenv("FETCH_ALLOW", storage.url.removeprefix("http://"))
        assert run("fetch", REPO)[0] == 0
        assert storage.asked
        assert not [headers for _, headers in storage.asked if "authorization" in headers]


def test_pickled_files_are_refused_before_the_download(hub: HubServer, file_server: FileServer, run: Run) -> None:
    """With the sentence of the scan, by name alone: of a repository, as its only file, and at an address."""
    told = "is pickled: loading it would run code from the file. Only safetensors and GGUF files are read"
    for arguments in (("owner/many", "c.ckpt"), ("owner/old",), (f"{file_server.url}/old.ckpt",)):
        file_server.files["/old.ckpt"] = ServedFile(b"x" * 1000)
        status, _, err = run("fetch", *arguments)
        assert (status, told in err) == (2, True)
    assert "old.ckpt" not in hub.sent
    assert "c.ckpt" not in hub.sent
    assert file_server.sent["/old.ckpt"] == 1


def test_several_files_are_to_be_named(hub: HubServer, run: Run) -> None:
    """The sentence lists them."""
    status, _, err = run("fetch", "owner/many")
    assert (status, "name one or more of a.safetensors, split/b.safetensors." in err) == (2, True)


def test_a_hostile_listing_writes_nowhere_else(hub: HubServer, run: Run, models: Path, weights: bytes) -> None:
    """Names that lead out of the folder, or are hidden, are none."""
    index = {"_class_name": "StableDiffusionXLPipeline", "../../evil": ["diffusers", "UNet2DConditionModel"]}
    hub.repositories["owner/evil"] = {
        "model_index.json": json.dumps(index).encode(),
        "../../evil/config.json": b"{}",
        "../../evil/diffusion_pytorch_model.safetensors": weights,
        "/etc/x.safetensors": weights,
        ".hidden.safetensors": weights,
        "a\\..\\x.safetensors": weights,
    }
    status, _, err = run("fetch", "owner/evil")
    assert (status, "holds no safetensors files" in err) == (1, True)
    for name in list(hub.repositories["owner/evil"])[1:]:
        assert run("fetch", "owner/evil", name)[0] in (1, 2)
    assert {path.name for path in models.parent.iterdir()} <= {"models", "data", "hub-cache"}
    assert visible(models) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",), ("ftp://x.test/a.safetensors",), ("../../etc/passwd",), ("owner/name/more",),
        (REPO, "--name", "../x"), (REPO, "--name", ".x"), (REPO, "--name", "a/b"), (REPO, "--folder", "/etc"),
        (REPO, "--folder", "a/../../b"), (REPO, "--folder", ".git"), (REPO, "--sha256", "abc"),
        (REPO, "--name", "a\x1b"),
        ("https://x.test/a.safetensors", "b.safetensors"), (REPO, "a", "b", "--name", "c"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_a_connection(hub: HubServer, run: Run, arguments: tuple[str, ...]) -> None:
    """With 2 and one sentence, and no control characters."""
    status, out, err = run("fetch", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.strip().isprintable()
    assert hub.asked == []


def test_a_file_of_an_address_is_named_by_the_server(
    file_server: FileServer, run: Run, models: Path, weights: bytes
) -> None:
    """As CivitAI does; the token of the address is in no file and no message, and the name stays in the folder."""
    file_server.files["/api/download/models/12"] = ServedFile(
        weights, {"Content-Disposition": 'attachment; filename="../../my flux.safetensors"', "ETag": '"1"'}
    )
    address = f"{file_server.url}/api/download/models/12"
    status, out, err = run("fetch", f"{address}?token=secret&type=Model")
    assert (status, out.startswith("models/my flux.safetensors: denoiser, flux")) == (0, True)
    assert visible(models) == {"my flux.safetensors", "my flux.toml"}
    spec = (models / "my flux.toml").read_text()
    assert "secret" not in spec + out + err
    assert read_spec(models / "my flux.toml").values == {
        "source": address,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert "is here already" in run("fetch", f"{address}?token=other")[1]
    (models / "my flux.toml").unlink()
    status, _, err = run("fetch", address)
    assert (status, "is there already, and is another file or of unknown origin" in err) == (1, True)
    digest = hashlib.sha256(weights).hexdigest()
    assert "is here already" in run("fetch", address, "--sha256", digest)[1]


@pytest.mark.parametrize(
    ("data", "headers", "told"),
    [
        (b"<!DOCTYPE html><html>log in", {"Content-Type": "text/html"}, "web page and not a file; the download needs"),
        (b"<!DOCTYPE html><html>log in" * 9, {}, "a.safetensors is a web page and not a model"),
        (b"PK\x03\x04" + bytes(100), {}, "a.safetensors is a pickle under another name"),
        (b'{"error": "login"}' + bytes(100), {}, "a.safetensors is a text in JSON"),
        (b"", {}, "is empty"),
        (None, {}, "a.safetensors is truncated"),
    ],
    ids=["login page", "login page without a type", "pickle", "json", "empty", "truncated"],
)
def test_what_is_no_model_is_not_fetched(
    file_server: FileServer,
    run: Run,
    models: Path,
    weights: bytes,
    data: bytes | None,
    headers: dict[str, str],
    told: str,
) -> None:
    """Known by its first bytes, before the download."""
    file_server.files["/a.safetensors"] = ServedFile(weights[:-100_000] if data is None else data, headers)
    status, _, err = run("fetch", f"{file_server.url}/a.safetensors")
    assert (status, told in err) == (1, True), err
    assert visible(models) == set()


def test_an_address_without_a_models_name_needs_one(file_server: FileServer, run: Run, weights: bytes) -> None:
    """`--name`; the ending decides how it is read."""
    file_server.files["/download"] = ServedFile(weights)
    status, _, err = run("fetch", f"{file_server.url}/download")
    assert (status, "give it a name by --name" in err) == (2, True)
    status, out, _ = run("fetch", f"{file_server.url}/download", "--name", "mine.safetensors")
    assert (status, "models/mine.safetensors: denoiser" in out) == (0, True)


def test_a_page_of_the_hub_is_its_repository(hub: HubServer, run: Run, models: Path) -> None:
    """As people copy it from the browser; the revision and the digest are pinned as of a repository's."""
    for page in (f"{hub.url}/owner/many/blob/main/split/b.safetensors", "https://huggingface.co/owner/merges"):
        assert run("fetch", page)[0] == 0
    assert visible(models) >= {"b.safetensors", "small.safetensors"}
    assert read_spec(models / "b.toml").values["source"] == "owner/many/split/b.safetensors"


def test_the_commands_of_the_pages_fetch_what_they_name(hub: HubServer, run: Run, models: Path, weights: bytes) -> None:
    """As printed, from a hub that has such repositories; the README's model then is `sdxl`."""
    lines = [line for block in blocks() for line in block.text.splitlines() if "models fetch" in line]
    assert len(lines) == 4
    gguf = write_gguf(models.parent / "q8.gguf", SMALL).read_bytes()
    for line in lines:
        command, _, arguments = line.partition("models fetch ")
        assert command == ".venv/bin/python -m stable_diffusion_server "
        repo = arguments.split()[0].partition("@")[0]
        hub.repositories[repo] = dict(hub.repositories["owner/sdxl"])
        hub.repositories[repo] |= {"sd_xl_turbo_1.0_fp16.safetensors": weights, "flux1-schnell-Q8_0.gguf": gguf}
        assert run("fetch", *shlex.split(arguments))[0] == 0
    assert {path.name for path in models.iterdir() if path.is_dir()} == {
        "stable-diffusion-xl-base-1.0",
        "sdxl-turbo",
        "diffusion_models",
    }
    facts = choose_models("local", ["stable-diffusion-xl-base-1.0"])
    assert facts["sdxl"].folder == "stable-diffusion-xl-base-1.0"
