"""Contents of LoRA files: each trainer's layout works as in the stock pipeline, and invalid files leave no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import MODELS_DIR, Pixels, draw, job_for
from lora_layouts import FITTING, UNFIT, peft, unet_pairs, with_one, write

from stable_diffusion_server.errors import InvalidInput, NotFinite, OutOfMemory
from stable_diffusion_server.pipelines.adapters.lora_changes import change_of
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.conditioning import lora_weights
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_pipeline
from stable_diffusion_server.types import DiffusionRequest

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {"sdxl": Sdxl, "flux": Flux}


def quick(family: str, **changes: Any) -> DiffusionRequest:
    """A job of few pixels and steps: the tests look at weights."""
    return job_for(family, **{"width": 64, "height": 64, "num_inference_steps": 2, **changes})


@dataclass(frozen=True)
class Two:
    """A family with a LoRA folder, one over a stock pipeline, and the image of both without LoRAs."""

    ours: Any
    stock: Any
    folder: Path
    plain: Pixels


@pytest.fixture(scope="module")
def twos(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Two]:
    """Both families."""
    made = {}
    for name, kind in KINDS.items():
        folder, facts = tmp_path_factory.mktemp(name), MODELS[name]
        own, stock = (load_pipeline(facts, MODELS_DIR, CPU) for _ in range(2))
        ours = kind(own, facts, loras=LoraManager(own, folder))
        # Our code does not see changes to the stock pipeline, so the prompt cache must be off.
        made[name] = Two(ours, kind(stock, facts, prompt_cache=PromptCache(0)), folder, draw(ours, quick(name)))
    return made


def traces(family: Any) -> set[str]:
    """What a LoRA may leave: its digest among the loaded ones, its hooks on layers."""
    modules = (part for part in family.pipeline.components.values() if isinstance(part, torch.nn.Module))
    hooked = (name for part in modules for name, layer in part.named_modules() if layer._forward_hooks)
    return {*family.loras._recent, *hooked}


@pytest.mark.parametrize("weight", [1.0, -0.7])
@pytest.mark.parametrize(("family", "layout"), [(family, name) for family in FITTING for name in FITTING[family]])
def test_an_adapter_is_drawn_as_the_stock_pipeline_draws_it(
    family: str, layout: str, weight: float, twos: dict[str, Two]
) -> None:
    """For each trainer, bit-exact, although copied from its file; and it has an effect.

    A DoRA at a weight beside 1 has no one meaning: ours is a share of the way to the changed weights, as in
    `test_adapter_table`.
    """
    two = twos[family]
    tensors, notes = FITTING[family][layout](two.stock.pipeline)
    write(two.folder / "style.safetensors", tensors, notes)
    two.stock.pipeline.load_lora_weights(two.folder, weight_name="style.safetensors", adapter_name="style")
    try:
        two.stock.pipeline.set_adapters(["style"], [weight])
        expected = draw(two.stock, quick(family))
    finally:
        two.stock.pipeline.delete_adapters("style")
    drawn = draw(two.ours, quick(family, loras=(("style", weight),)))
    assert (drawn == expected).all() or (layout == "DoRA" and weight != 1)
    assert (drawn != two.plain).any()


@pytest.mark.fault(160)
@pytest.mark.parametrize(("family", "kind"), [(family, name) for family in UNFIT for name in UNFIT[family]])
def test_a_file_that_does_not_fit_is_refused_in_a_sentence_and_leaves_nothing(
    family: str, kind: str, twos: dict[str, Two]
) -> None:
    """The request fails with that parameter, and no component of the model keeps a trace."""
    two = twos[family]
    made, said = UNFIT[family][kind]
    (two.folder / "bad.safetensors").write_bytes(made(two.stock.pipeline))
    before = traces(two.ours)
    for _ in range(2):  # the cached refusal has the same text
        with pytest.raises(InvalidInput, match=rf"^bad\.safetensors .*({said})") as refused:
            two.ours.prepare(quick(family, loras=(("bad", 1.0),)))
        assert refused.value.field == "lora"
        assert refused.value.detail.endswith(".")
        assert "\n" not in refused.value.detail
    assert traces(two.ours) == before


# Those that fail latest, or would change shared weights.
FAR = {
    "sdxl": (
        "notes that change the model below",
        "no lora_B in a text encoder",
        "NaN",
    ),
    "flux": ("half of it matches", "too many blocks"),
}


@pytest.mark.fault(160)
@pytest.mark.parametrize("family", UNFIT)
def test_after_those_that_come_far_the_model_is_as_it_was(family: str, twos: dict[str, Two]) -> None:
    """Its weights bit for bit, its image, and the same file once it is repaired."""
    two = twos[family]
    weights = {name: tensor.clone() for name, tensor in weights_below(two.ours).items()}
    for made, _ in (UNFIT[family][kind] for kind in FAR[family]):
        (two.folder / "bad.safetensors").write_bytes(made(two.stock.pipeline))
        with pytest.raises(InvalidInput):
            two.ours.prepare(quick(family, loras=(("bad", 1.0),)))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_below(two.ours).items())
    assert (draw(two.ours, quick(family)) == two.plain).all()
    tensors, notes = next(iter(FITTING[family].values()))(two.stock.pipeline)
    write(two.folder / "bad.safetensors", tensors, notes)
    assert (draw(two.ours, quick(family, loras=(("bad", 1.0),))) != two.plain).any()


def weights_below(family: Any) -> dict[str, torch.Tensor]:
    """All weights of a family's components except the LoRAs', by name."""
    return {
        f"{part}.{name}".replace(".base_layer", ""): tensor
        for part, module in family.pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


@pytest.mark.fault(160)
def test_what_stumbles_while_it_is_loaded_leaves_nothing(twos: dict[str, Two], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer fails after all others were read: nothing is on the model, and the next attempt works."""
    two = twos["sdxl"]
    tensors, notes = FITTING["sdxl"]["kohya, both text encoders"](two.stock.pipeline)
    write(two.folder / "late.safetensors", with_one(tensors, 0.5), notes)
    before, read = traces(two.ours), change_of

    def fail(tensors: Any, layer: Any, name: str, *args: Any) -> Any:
        if name.endswith("11_mlp_fc2") or name.endswith("1_mlp_fc2"):
            raise torch.OutOfMemoryError
        return read(tensors, layer, name, *args)

    with monkeypatch.context() as patched:  # memory that ends at this layer
        patched.setattr(lora_weights, "change_of", fail)
        with pytest.raises(OutOfMemory):
            two.ours.prepare(quick("sdxl", loras=(("late", 1.0),)))
    assert traces(two.ours) == before
    assert (draw(two.ours, quick("sdxl")) == two.plain).all()
    assert (draw(two.ours, quick("sdxl", loras=(("late", 1.0),))) != two.plain).any()


@pytest.mark.fault(161)
def test_finite_weights_that_overflow_are_reported_and_leave_nothing_on(twos: dict[str, Two]) -> None:
    """Each number is finite and their product is not: that image is not finite, and the next one is normal."""
    two = twos["sdxl"]
    huge = {name: tensor * 1e25 for name, tensor in peft("unet", unet_pairs(two.stock.pipeline)).items()}
    write(two.folder / "huge.safetensors", huge)
    with pytest.raises(NotFinite):
        draw(two.ours, quick("sdxl", loras=(("huge", 1.0),)))
    assert (draw(two.ours, quick("sdxl")) == two.plain).all()


def test_one_adapter_named_twice_is_on_with_both_weights(twos: dict[str, Two]) -> None:
    """Under one name or two: the content is the identity, and its weights add up."""
    two = twos["sdxl"]
    tensors, _ = FITTING["sdxl"]["peft"](two.stock.pipeline)
    for name in ("one", "other"):
        write(two.folder / f"{name}.safetensors", tensors)
    whole = draw(two.ours, quick("sdxl", loras=(("one", 0.75),)))
    for loras in ((("one", 0.5), ("one", 0.25)), (("one", 0.5), ("other", 0.25))):
        assert (draw(two.ours, quick("sdxl", loras=loras)) == whole).all()


def test_floats_of_one_byte_are_widened(twos: dict[str, Two]) -> None:
    """PyTorch computes nothing in float8, so the same numbers are used in a wider dtype."""
    two = twos["sdxl"]
    small = {k: v.to(torch.float8_e4m3fn) for k, v in peft("unet", unet_pairs(two.stock.pipeline)).items()}
    write(two.folder / "small.safetensors", small)
    write(two.folder / "wide.safetensors", {name: tensor.bfloat16() for name, tensor in small.items()})
    drawn = [draw(two.ours, quick("sdxl", loras=((name, 1.0),))) for name in ("small", "wide")]
    assert (drawn[0] == drawn[1]).all()


def test_the_layouts_written_here_are_read_by_the_stock_pipeline(twos: dict[str, Two]) -> None:
    """File metadata matters: without it the stock pipeline gives another image."""
    two = twos["sdxl"]
    tensors, notes = FITTING["sdxl"]["peft with notes"](two.stock.pipeline)
    assert notes is not None
    assert json.loads(notes["lora_adapter_metadata"])["unet.lora_alpha"] == 1.0
    drawn = []
    for number, metadata in enumerate((notes, None)):
        write(two.folder / f"metadata{number}.safetensors", tensors, metadata)
        drawn.append(draw(two.ours, quick("sdxl", loras=((f"metadata{number}", 1.0),))))
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.fault(162, 164)
@pytest.mark.parametrize("layout", ["peft", "kohya, text encoders alone", "peft, both text encoders"])
def test_a_replaced_adapter_is_drawn_with_its_new_weights(layout: str, twos: dict[str, Two]) -> None:
    """Overwritten in place with the same size: effective at once, in the denoiser and in the encoded prompt."""
    two, job = twos["sdxl"], quick("sdxl", loras=(("ink", 1.0),))
    tensors, _ = FITTING["sdxl"][layout](two.stock.pipeline)
    other = {name: -tensor if "lora_B" in name or "lora_up" in name else tensor for name, tensor in tensors.items()}
    file = write(two.folder / "ink.safetensors", tensors)
    first, size = draw(two.ours, job), file.stat().st_size
    write(two.folder / "new.safetensors", other)
    file.write_bytes((two.folder / "new.safetensors").read_bytes())
    assert file.stat().st_size == size
    second = draw(two.ours, job)
    assert (second == draw(two.ours, quick("sdxl", loras=(("new", 1.0),)))).all()
    assert (second != first).any()


@pytest.mark.fault(162, 164)
def test_a_job_draws_with_the_content_it_means_or_not_at_all(twos: dict[str, Two]) -> None:
    """Replaced while the request waits: the loaded content is used, otherwise the request is refused.

    Never other content.
    """
    two = twos["sdxl"]
    tensors, _ = FITTING["sdxl"]["peft"](two.stock.pipeline)
    file = write(two.folder / "ink.safetensors", tensors)
    before = two.ours.loras._folder.digest("ink")
    meant = quick("sdxl", loras=(("ink", 1.0),), lora_digests=(before,))
    expected = draw(two.ours, meant)
    write(file, {name: 2 * tensor for name, tensor in tensors.items()})
    after = two.ours.loras._folder.digest("ink")
    assert (draw(two.ours, meant) == expected).all()
    assert (draw(two.ours, quick("sdxl", loras=(("ink", 1.0),), lora_digests=(after,))) != expected).any()
    file.unlink()
    assert (draw(two.ours, meant) == expected).all()
    write(file, {name: 3 * tensor for name, tensor in tensors.items()})
    lost = quick("sdxl", loras=(("ink", 1.0),), lora_digests=("0" * 16,))
    with pytest.raises(InvalidInput, match=r"ink\.safetensors was replaced while the order waited") as refused:
        two.ours.prepare(lost)
    assert refused.value.field == "lora"


_IN_USE = """
import sys
from pathlib import Path
from drawing import draw, job_for
from lora_layouts import peft, unet_pairs, write
from stable_diffusion_server.pipelines.catalog import (MODELS)
from stable_diffusion_server.pipelines.registry import LoadOptions, load

folder, how = Path(sys.argv[1]), sys.argv[2]
registry = load(Path(sys.argv[3]), "cpu", 1, LoadOptions(models={"sdxl": MODELS["sdxl"]}, lora_dir=folder))
pipeline = registry.residents["sdxl"].family.pipeline
file = write(folder / "ink.safetensors", peft("unet", unet_pairs(pipeline)))
state = registry.prepare(job_for("sdxl", loras=(("ink", 1.0),)))
registry.step([state])
if how == "truncated":
    with file.open("r+b") as target:
        target.truncate(0)
elif how == "written over":
    file.write_bytes(b"0" * 100)
else:
    file.unlink()
while not state.done:
    registry.step([state])
print("drawn", registry.finish(state).pixels.std() > 5)
"""


@pytest.mark.fault(164)
@pytest.mark.parametrize("how", ["truncated", "written over", "removed"])
def test_a_file_that_goes_while_it_is_in_use_harms_nothing(how: str, tmp_path: Path) -> None:
    """The process lives on, and the running image finishes: the file is not mapped into memory."""
    ours = Path(__file__).parent
    done = subprocess.run(  # noqa: S603  # our own code, in a process that may die of it
        [sys.executable, "-c", _IN_USE, str(tmp_path), how, str(MODELS_DIR)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ours), str(ours.parents[1])])},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "drawn True"), done.stderr[-2000:]
