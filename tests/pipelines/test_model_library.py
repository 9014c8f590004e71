"""Models of MODELS_DIR: how they are found, named and asked for, what is kept, and the spec beside a model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from model_files import FILES, LOKR, flux, write_gguf, write_safetensors
from python_steps import steps_of

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines import WeightDigests
from stable_diffusion_server.pipelines.library import LibraryModel, ModelLibrary, read_spec
from stable_diffusion_server.pipelines.library import identity_cache as cache_module
from stable_diffusion_server.pipelines.library.names import split_title

SMALL = flux(double=1, single=1)
UNET = FILES["sdxl-unet-diffusers"]


def library_of(*folders: Path, cache: Path | None = None, digests: WeightDigests | None = None) -> ModelLibrary:
    library = ModelLibrary(folders, cache, digests)
    library.refresh()
    return library


def names_of(library: ModelLibrary) -> dict[str, str]:
    """Name → role."""
    return {model.name: model.role for model in library.models}


def pipeline(folder: Path) -> Path:
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", UNET)
    (folder / "unet" / "config.json").write_text('{"in_channels": 4, "cross_attention_dim": 2048}')
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "X"]}')
    return folder


def test_the_folders_of_comfyui_and_automatic1111_are_understood(tmp_path: Path) -> None:
    """Names are paths below the folder of their role, without the ending."""
    write_safetensors(tmp_path / "checkpoints" / "pony" / "Pony V6 XL.safetensors", UNET)
    write_safetensors(tmp_path / "Stable-diffusion" / "juggernaut.safetensors", UNET)
    write_safetensors(tmp_path / "diffusion_models" / "flux1-dev.safetensors", SMALL)
    write_gguf(tmp_path / "unet" / "flux1-dev-Q8_0.gguf", SMALL)
    write_safetensors(tmp_path / "text_encoders" / "clip_l.safetensors", FILES["clip-l"])
    write_safetensors(tmp_path / "clip" / "t5xxl_fp16.safetensors", FILES["t5xxl"])
    write_safetensors(tmp_path / "VAE" / "sdxl_vae.safetensors", FILES["vae-sd"])
    write_safetensors(tmp_path / "models" / "Lora" / "style" / "ink.safetensors", FILES["lora-sdxl"])
    write_safetensors(tmp_path / "embeddings" / "bad.safetensors", FILES["embedding-sdxl"])
    write_safetensors(tmp_path / "ControlNet" / "canny.safetensors", FILES["controlnet-diffusers"])
    write_safetensors(tmp_path / "ESRGAN" / "4x.safetensors", FILES["esrgan"])
    assert names_of(library_of(tmp_path)) == {
        "pony/Pony V6 XL": "model",
        "juggernaut": "model",
        "flux1-dev": "model",
        "flux1-dev-Q8_0": "model",
        "clip_l": "text-encoder",
        "t5xxl_fp16": "text-encoder",
        "sdxl_vae": "vae",
        "style/ink": "lora",
        "bad": "embedding",
        "canny": "controlnet",
        "4x": "upscaler",
    }


def test_a_pipelines_folder_is_one_model_and_single_files_beside_it_are_others(tmp_path: Path) -> None:
    """As the hub has FLUX.1-dev: the folder and flux1-dev.safetensors in it."""
    write_safetensors(pipeline(tmp_path / "my-juggernaut-xl") / "single.safetensors", UNET)
    write_safetensors(tmp_path / "canny" / "diffusion_pytorch_model.safetensors", FILES["controlnet-diffusers"])
    (tmp_path / "canny" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    library = library_of(tmp_path)
    assert names_of(library) == {
        "my-juggernaut-xl": "model",
        "my-juggernaut-xl/single": "model",
        "canny": "controlnet",
    }
    assert library.names.resolve("my-juggernaut-xl").identity.kind == "pipeline"
    assert library.names.resolve("my-juggernaut-xl").size > 1_000_000


def test_the_hubs_cache_is_read_by_its_current_snapshot(tmp_path: Path) -> None:
    """Snapshots are folders of links into `blobs`; the name is the repository's."""
    repository = tmp_path / "hub" / "models--stabilityai--sdxl"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    for commit in ("aaaa", "bbbb"):
        source = pipeline(tmp_path / f".{commit}")
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            blob = blobs / f"{commit}-{file.name}"
            shutil.copy(file, blob)
            link = repository / "snapshots" / commit / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaaa")
    model = library_of(tmp_path).names.resolve("hub/stabilityai/sdxl")
    assert (model.path.name, model.identity.family, model.faults) == ("aaaa", "sdxl", ())
    for damage in ("../../..", "zzzz", "", "\xff"):
        (repository / "refs" / "main").write_text(damage)
        assert library_of(tmp_path).names.resolve("stabilityai/sdxl".replace("stab", "hub/stab")).path.name in (
            "aaaa",
            "bbbb",
        )


def test_links_are_followed_once_and_depth_is_bounded(tmp_path: Path) -> None:
    """Circular links, links out of the folder, hidden folders, and folders without end."""
    outside = tmp_path / "ComfyUI"
    write_safetensors(outside / "checkpoints" / "shared.safetensors", UNET)
    root = tmp_path / "models"
    root.mkdir()
    (root / "comfy").symlink_to(outside)
    (root / "self").symlink_to(root)
    (outside / "back").symlink_to(root)
    write_safetensors(root / ".hidden" / "no.safetensors", UNET)
    deep = root
    for _ in range(30):
        deep = deep / "d"
    write_safetensors(deep / "deep.safetensors", UNET)
    write_safetensors(root / "_" / "secret.safetensors", UNET).rename(tmp_path / "outside.safetensors")
    library = library_of(root)
    assert names_of(library) == {"shared": "model"}
    for name in ("../outside", "/etc/passwd", "comfy/../../outside", str(tmp_path / "outside.safetensors")):
        with pytest.raises(InvalidInput):
            library.names.resolve(name)


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    """A missing MODELS_DIR, and one of several that is a file."""
    (tmp_path / "file").write_bytes(b"")
    library = library_of(tmp_path / "gone", tmp_path / "file")
    assert library.models == ()
    assert [remark.split(" cannot")[0] for remark in library.remarks] == ["The folder gone", "The folder file"]


@pytest.mark.parametrize(
    "name",
    [
        "n" * 243 + ".safetensors",  # with .toml it is longer than a name may be
        "é" * 121 + ".safetensors",
        "n" * 250 + ".gguf",
        "models--" + "n" * 247,
        "n" * 255,
    ],
)
def test_the_longest_name_hides_no_other_model(tmp_path: Path, name: str) -> None:
    """A name has at most 255 bytes; files and folders with such a name are listed or left out, and others stay."""
    write_safetensors(tmp_path / "a.safetensors", SMALL)
    if "." in name:
        (write_gguf if name.endswith("gguf") else write_safetensors)(tmp_path / name, SMALL)
    else:
        pipeline(tmp_path / name)
    library = library_of(tmp_path)
    assert "a" in names_of(library)
    assert len(library.models) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may search every folder")
def test_a_folder_that_may_not_be_searched_hides_no_other_model(tmp_path: Path) -> None:
    """Its names can be listed, and nothing can be read."""
    write_safetensors(tmp_path / "a.safetensors", SMALL)
    closed = pipeline(tmp_path / "closed")
    closed.chmod(0o600)
    try:
        assert "a" in names_of(library_of(tmp_path))
    finally:
        closed.chmod(0o700)


def test_of_several_files_of_one_name_the_first_keeps_it(tmp_path: Path) -> None:
    """Order: usable, the folders' order, nearer to the top, checkpoints, safetensors; the note says whose it is."""
    first, second = tmp_path / "1", tmp_path / "2"
    write_safetensors(first / "checkpoints" / "flux.safetensors", SMALL)
    write_gguf(first / "unet" / "Flux.gguf", SMALL)
    write_safetensors(second / "flux.safetensors", SMALL)
    (first / "checkpoints" / "flux.ckpt").write_bytes(b"pickled")
    write_safetensors(second / "loras" / "flux.safetensors", FILES["lora-flux"])
    library = library_of(first, second)
    models = {model.name: model for model in library.models if model.role == "model"}
    assert {name: model.path.relative_to(tmp_path).as_posix() for name, model in models.items()} == {
        "flux": "1/checkpoints/flux.safetensors",
        "Flux.gguf": "1/unet/Flux.gguf",
        "flux.safetensors": "2/flux.safetensors",
        "flux.ckpt": "1/checkpoints/flux.ckpt",
    }
    assert models["Flux.gguf"].note == "Flux is the name of checkpoints/flux.safetensors."
    assert (models["flux"].note, library.names.resolve("flux", "lora").role) == ("", "lora")


def model_with(folder: Path, spec: str = "") -> ModelLibrary:
    write_safetensors(folder / "checkpoints" / "sub" / "My Modèl.safetensors", LOKR | SMALL)
    write_safetensors(folder / "checkpoints" / "other.safetensors", SMALL)
    (folder / "checkpoints" / "sub" / "My Modèl.toml").write_text(spec)
    return library_of(folder)


@pytest.mark.parametrize(
    "asked",
    [
        "sub/My Modèl",
        "sub\\My Modèl",
        "sub/My Modèl.safetensors",
        "sub\\my modÈl.safetensors",
        "checkpoints/sub/My Modèl.safetensors",
        "My Modèl",
        "  My Modèl.safetensors ",
        "My Mode\u0300l",
        "sub/My Modèl.safetensors [0123456789]",
        "Best of all",
        "best-1",
    ],
)
def test_a_model_is_found_by_any_of_its_names(tmp_path: Path, asked: str) -> None:
    """With and without ending and folder, backslashes, another case, A1111's titles, the owner's title and aliases."""
    library = model_with(tmp_path, 'title = "Best of all"\naliases = ["best-1"]')
    assert library.names.resolve(asked).name == "sub/My Modèl"


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    """And nothing is taken for a name that only resembles."""
    library = model_with(tmp_path)
    for asked, hint in (
        ("My Model", "did you mean sub/My Modèl"),
        ("othr", "did you mean other"),
        ("zzzzqqq", "here."),
    ):
        with pytest.raises(InvalidInput) as caught:
            library.names.resolve(asked)
        assert hint in str(caught.value.detail)
    for asked in ("", " ", "/", "[0123456789]", "x" * 100_000, "\ud800", "\x00", "sub/"):
        with pytest.raises(InvalidInput):
            library.names.resolve(asked)


def test_a_short_hash_names_a_file_once_it_was_hashed(tmp_path: Path) -> None:
    """The first ten digits of its SHA-256, as A1111 writes them; nothing is hashed to answer."""
    models, digests = tmp_path / "models", WeightDigests(tmp_path / "weights.json")
    file = write_safetensors(models / "a.safetensors", LOKR | {"img_in.weight": (2, 2)})
    write_safetensors(models / "b.safetensors", SMALL)
    library = library_of(models, digests=digests)
    role = library.models[0].role
    model = next(model for model in library.models if model.name == "a")
    assert library.title(model) == "a"
    digest = digests.of_file(file)
    assert library.title(model) == f"a [{digest[:10]}]"
    role = model.role
    for asked in (digest[:10], digest, f"gone [{digest[:10]}]", f"a [{digest[:10]}]", digest[:10].upper()):
        assert library.names.resolve(asked, role).name == "a"
    with pytest.raises(InvalidInput, match="has the hash"):
        library.names.resolve("a [0000000000]", role)
    with pytest.raises(InvalidInput):
        library.names.resolve(digest[:6], role)


def test_a_title_is_a_name_and_a_hash() -> None:
    """Other texts in brackets belong to the name."""
    assert split_title("a [b] [0123abcdef]") == ("a [b]", "0123abcdef")
    assert split_title("a [v2]") == ("a [v2]", "")


# --- what is kept


def test_only_changed_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second scan reads no header; a file that was replaced under its name is read."""
    models, cache = tmp_path / "models", tmp_path / "data" / "library.json"
    file = write_safetensors(models / "a.safetensors", SMALL)
    folder = pipeline(models / "b")
    for path in (file, *(path for path in folder.rglob("*") if path.is_file())):
        os.utime(path, (1, 1))
    monkeypatch.setattr(cache_module, "_UNSETTLED_SECONDS", -1.0)
    first = library_of(models, cache=cache)
    read: list[Path] = []
    original = cache_module.IdentityCache.identity

    def counted(self: cache_module.IdentityCache, path: Path, evidence: object, identify: object) -> object:
        def watched(path: Path) -> object:
            read.append(path)
            return identify(path)  # type: ignore[operator]  # it is the function that the library gives

        return original(self, path, evidence, watched)  # type: ignore[arg-type]  # as above

    monkeypatch.setattr(cache_module.IdentityCache, "identity", counted)
    second = library_of(models, cache=cache)
    assert (read, second.models) == ([], first.models)
    write_safetensors(models / "new", FILES["vae-sd"]).rename(file)
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace("4", "9", 1))
    third = library_of(models, cache=cache)
    assert read == [file, folder]
    assert {model.name: model.identity.kind for model in third.models} == {"a": "vae", "b": "pipeline"}


def test_a_file_that_was_just_written_is_not_kept(tmp_path: Path) -> None:
    """It may change again without a new timestamp."""
    cache = tmp_path / "library.json"
    write_safetensors(tmp_path / "models" / "a.safetensors", SMALL)
    library_of(tmp_path / "models", cache=cache)
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"rules": 1}', b'{"rules": 1, "files": []}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_cache_is_ignored(tmp_path: Path, damage: bytes) -> None:
    """The files are read again."""
    cache = tmp_path / "library.json"
    write_safetensors(tmp_path / "models" / "a.safetensors", SMALL)
    cache.write_bytes(damage)
    assert names_of(library_of(tmp_path / "models", cache=cache)) == {"a": "model"}


def test_a_damaged_entry_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of an entry replaced by one of another type."""
    monkeypatch.setattr(cache_module, "_UNSETTLED_SECONDS", -1.0)
    cache = tmp_path / "library.json"
    write_safetensors(tmp_path / "models" / "a.safetensors", SMALL)
    right = library_of(tmp_path / "models", cache=cache).models
    whole = json.loads(cache.read_text())
    (key,) = whole["files"]
    for name in whole["files"][key][1]:
        for value in (None, 5.5, [1], {"a": 1}, "nonsense-kind" if name in ("kind", "task") else [None]):
            broken = json.loads(json.dumps(whole))
            broken["files"][key][1][name] = value
            cache.write_text(json.dumps(broken))
            assert library_of(tmp_path / "models", cache=cache).models == right


def test_a_file_is_scanned_in_a_few_steps_for_each_tensor_and_its_header_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identifying an SDXL checkpoint, with 2,514 tensors, takes 10 steps for each and about 540 for the file."""
    file = write_safetensors(tmp_path / "models" / "0.safetensors", FILES["sdxl"])
    for number in range(1, 20):
        os.link(file, tmp_path / "models" / f"{number}.safetensors")
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: [parsed.append(len(text)), loads(text, **options)][1])
    library = ModelLibrary((tmp_path / "models",))
    steps = steps_of(library.refresh)
    assert len(library.models) == 20
    with file.open("rb") as source:
        assert parsed == [int.from_bytes(source.read(8), "little")] * 20
    assert steps < 20 * 14 * len(FILES["sdxl"]), steps / 20 / len(FILES["sdxl"])


# --- the spec beside a model


def test_a_spec_is_read_and_checked(tmp_path: Path) -> None:
    """Every key, in its type."""
    file = tmp_path / "a.toml"
    file.write_text("""
title = "Pony"
aliases = ["pony", "p6"]
variant = "krea"
steps = 8
guidance = 1.5
guidance_rescale = 0.7
scheduler = "euler_a"
schedule = "karras"
negative_prompt = "blurry"
clip_skip = 2
prediction_type = "v_prediction"
zero_snr = true
native_size = [832, 1216]
vae = "sdxl_vae"
text_encoders = ["clip_l", "clip_g"]
controlnets = ["canny"]
loras = ["detail:0.6", "ink"]
dtype = "bfloat16"
quantization = "int8"
placement = "model"
preload = true
pin = false
licence = "non-commercial"
""")
    spec = read_spec(file)
    assert spec.faults == ()
    assert (spec.title, spec.aliases, spec.values["steps"]) == ("Pony", ("pony", "p6"), 8)
    assert spec.values["native_size"] == (832, 1216)
    assert spec.values["loras"] == (("detail", 0.6), ("ink", 1.0))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("stpes = 4", "stpes is not a key; did you mean steps?"),
        ("guidence = 4", "did you mean guidance?"),
        ("zzz = 4", "zzz is not a key; there are title, aliases"),
        ("steps = 0", "steps must be a whole number from 1 to 1000."),
        ("steps = 4.5", "steps must be"),
        ("steps = true", "steps must be"),
        ('steps = "4"', "steps must be"),
        ("guidance = nan", "guidance must be a number from 0 to 100."),
        ("guidance = false", "guidance must be"),
        ("title = 5", "title must be a text"),
        ('title = " "', "title must be a text"),
        ('aliases = "one"', "aliases must be a list of names."),
        ("aliases = [1]", "aliases must be a list"),
        ('schedule = "caras"', "schedule must be one of automatic, normal, karras"),
        ("schedule = [1]", "schedule must be one of"),
        ("native_size = [1024]", "native_size must be"),
        ("native_size = 10", "native_size must be"),
        ('loras = ["a:100"]', "loras must be a list of names with weights"),
        ('loras = ["a:b"]', "loras must be"),
        ("pin = 1", "pin must be true or false."),
        ("[steps]\na = 1", "steps must be"),
        ("steps = ", "is not TOML"),
        ("a = " + "[" * 30_000, "is not TOML"),
        ("# " + "x" * 70_000, "bytes, and 65,536 are read"),
        ("\x00", "is not TOML"),
    ],
)
def test_a_wrong_spec_names_key_and_cure(tmp_path: Path, text: str, fault: str) -> None:
    """Each fault is a sentence that begins with the file; the right keys still count."""
    file = tmp_path / "my.toml"
    file.write_text(text)
    spec = read_spec(file)
    assert len(spec.faults) == 1
    assert spec.faults[0].startswith("my.toml")
    assert fault in spec.faults[0]


def test_a_spec_lies_beside_its_file_or_folder(tmp_path: Path) -> None:
    """`NAME.toml`, or with the ending where two files share a name; its faults are the model's."""
    write_safetensors(tmp_path / "a.safetensors", SMALL)
    write_gguf(tmp_path / "a.gguf", SMALL)
    pipeline(tmp_path / "v1.5")
    (tmp_path / "a.toml").write_text("steps = 5")
    (tmp_path / "a.gguf.toml").write_text("steps = 6")
    (tmp_path / "v1.5.toml").write_text("stps = 7")
    models: dict[str, LibraryModel] = {model.name: model for model in library_of(tmp_path).models}
    assert [models[name].spec.values for name in ("a", "a.gguf", "v1.5")] == [{"steps": 5}, {"steps": 6}, {}]
    assert models["v1.5"].faults == ("v1.5.toml: stps is not a key; did you mean steps?",)
