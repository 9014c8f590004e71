"""An image's identity includes its weights: a digest of their files, computed during loading."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drawing import MODELS_DIR, draw, job_for
from safetensors.torch import load_file, save_file

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.catalog import MODELS, with_weights, without_identity
from stable_diffusion_server.pipelines.loading import loader
from stable_diffusion_server.pipelines.loading.model_files import control_files, model_files
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.registry import LoadOptions, load

pytestmark = pytest.mark.slow

REAL = replace(MODELS["flux"], folder="my-flux", revision="flux.1-schnell", weights="", control_folder=None)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder with custom weights under a known name."""
    shutil.copytree(MODELS_DIR / "embedded-flux", tmp_path / "models" / "my-flux")
    return tmp_path / "models"


def later() -> float:
    """A clock at which every file has been unchanged for a while."""
    return 1e12


def scaled(file: Path) -> None:
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def appended(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


def same_size_and_time(file: Path) -> None:
    """Other bytes of the same number, with the modification time restored, as rsync and tar do."""
    facts, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "the transformer": ("transformer/diffusion_pytorch_model.safetensors", scaled),
    "a text encoder": ("text_encoder_2/model.safetensors", scaled),
    "the VAE, its time put back": ("vae/diffusion_pytorch_model.safetensors", same_size_and_time),
    "a tokenizer": ("tokenizer_2/tokenizer.json", appended),
    "the scheduler": ("scheduler/scheduler_config.json", appended),
    "a configuration": ("transformer/config.json", appended),
}


@pytest.mark.fault(167)
@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_pixels_decides_the_digest(what: str, models: Path) -> None:
    """A file replaced under its name is another model, also with cached digests."""
    name, change = CHANGES[what]
    digests = WeightDigests(clock=later)
    before = digests.of(model_files(REAL, models))
    change(models / "my-flux" / name)
    after = digests.of(model_files(REAL, models))
    assert before != after == WeightDigests().of(model_files(REAL, models))


@pytest.mark.fault(167)
def test_what_does_not_decide_pixels_may_come_and_go(models: Path, tmp_path: Path) -> None:
    """Notes, images, other variants, link targets, the folder's name: the same weights are the same model."""
    folder, digests = models / "my-flux", WeightDigests()
    before = digests.of(model_files(REAL, models))
    (folder / "README.md").write_text("mine")
    (folder / "transformer" / "flax_model.msgpack").write_text("other")
    plain = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, plain.with_suffix(".fp16.safetensors"))
    moved = shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(moved)
    assert digests.of(model_files(REAL, models)) == before


@pytest.mark.fault(167)
def test_a_second_start_reads_no_weights_again(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are cached by device, inode, size and times; recently changed files are not trusted."""
    files, kept = model_files(REAL, models), tmp_path / "data" / "weights.json"
    first = WeightDigests(kept, clock=later).of(files)
    assert WeightDigests(kept).remembered(files) == first
    read: list[object] = []
    monkeypatch.setattr("hashlib.file_digest", lambda *arguments: read.append(arguments))
    assert WeightDigests(kept).of(files) == first
    assert not read
    fresh = tmp_path / "data" / "fresh.json"
    monkeypatch.undo()
    WeightDigests(fresh).of(files)
    assert WeightDigests(fresh).remembered(files) is None


@pytest.mark.fault(167)
@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\x00", json.dumps({"1:2:3:4:5": "f" * 64})])
def test_a_broken_memory_of_digests_only_costs_time(content: str, models: Path, tmp_path: Path) -> None:
    """It is ignored, and rewritten."""
    kept, files = tmp_path / "weights.json", model_files(REAL, models)
    kept.write_text(content)
    assert WeightDigests(kept, clock=later).of(files) == WeightDigests().of(files)
    assert WeightDigests(kept).remembered(files) is not None


@pytest.mark.fault(167)
def test_weights_that_change_while_they_are_loaded_are_not_drawn_with(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that were hashed must be the bytes in use."""
    true = loader.load_pipeline

    def loading(*arguments: object, **more: object) -> object:
        pipeline = true(*arguments, **more)  # type: ignore[arg-type]  # arguments are passed through
        appended(models / "my-flux" / "vae" / "config.json")
        return pipeline

    monkeypatch.setattr(loader, "load_pipeline", loading)
    with pytest.raises(ModelLoadError, match="changed while they were loaded"):
        load(models, "cpu", 1, LoadOptions(models={"flux": REAL}))


@pytest.mark.parametrize("model", MODELS)
def test_the_embedded_models_keep_the_revision_their_pictures_are_stored_under(model: str) -> None:
    """The catalogue's digests equal those of the files, so the loader does not change the revision.

    For other weights it appends the digest.
    """
    facts, digests = MODELS[model], WeightDigests()
    weights = digests.of(model_files(facts, MODELS_DIR))
    control = digests.of(control_files(facts, MODELS_DIR))
    assert (weights, control) == (facts.weights, facts.control_weights)
    assert with_weights(facts, weights, control) == facts == without_identity(facts)
    other = with_weights(facts, "a" * 64, "b" * 64)
    assert other.revision == f"{facts.revision}-{'a' * 16}"
    assert other.revision_for(edges=False) == other.revision
    assert other.revision_for(edges=True) == f"{other.revision}+edges-{'b' * 16}"


@pytest.mark.fault(167)
def test_the_loaded_revision_is_that_of_the_files(models: Path, one_thread: None) -> None:
    """Two folders of one name with different weights load as two revisions, neither of which is the catalogue's."""
    first = load(models, "cpu", 1, LoadOptions(models={"flux": REAL}))
    scaled(models / "my-flux" / "transformer" / "diffusion_pytorch_model.safetensors")
    second = load(models, "cpu", 1, LoadOptions(models={"flux": REAL}))
    revisions = {drawing.models["flux"].revision for drawing in (first, second)}
    assert len(revisions | {REAL.revision, without_identity(REAL).revision}) == 4
    assert all(revision.startswith("flux.1-schnell-") for revision in revisions)
    assert {first.loaded[0].revision, second.loaded[0].revision} == revisions


_WRITTEN_OVER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from dataclasses import replace
from pathlib import Path
from drawing import draw, job_for
from stable_diffusion_server.pipelines.catalog import (MODELS)
from stable_diffusion_server.pipelines.registry import LoadOptions, load
facts = replace(MODELS["flux"], folder="my-flux", control_folder=None)
drawing = load(Path({models!r}), "cpu", 1, LoadOptions(models={{"flux": facts}}))
before = draw(drawing, job_for("flux"))
for file in Path({models!r}).rglob("*.safetensors"):
    with file.open("r+b") as source:
        source.truncate(9)
draw(drawing, replace(job_for("flux"), prompt="another prompt", seed=2))
assert (draw(drawing, job_for("flux")) == before).all()
print("drawn")
"""


@pytest.mark.fault(167)
def test_weights_written_over_in_place_change_nothing_that_is_loaded(models: Path) -> None:
    """Each file truncated in a running process: mapped files would end it by SIGBUS."""
    root = MODELS_DIR.parent
    code = _WRITTEN_OVER.format(tests=str(root / "tests" / "pipelines"), root=str(root), models=str(models))
    done = subprocess.run(  # noqa: S603  # our own code
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert (done.returncode, done.stdout.strip()[-5:]) == (0, "drawn"), done.stderr[-500:]


def test_mapped_weights_are_a_choice(models: Path, one_thread: None) -> None:
    """MMAP_WEIGHTS=1 gives the same image; tied weights stay tied when they are copied."""
    mapped = load(models, "cpu", 1, LoadOptions(models={"flux": REAL}, mapped=True))
    copied = load(models, "cpu", 1, LoadOptions(models={"flux": REAL}))
    assert (draw(mapped, job_for("flux")) == draw(copied, job_for("flux"))).all()
    assert mapped.loaded[0].bytes == copied.loaded[0].bytes
    encoder = copied.residents["flux"].family.pipeline.text_encoder_2
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()
    assert isinstance(encoder.shared.weight, torch.nn.Parameter)
