"""Lists which pipeline classes of the pinned diffusers are drawn by their own call, and what their calls take.

`python -m scripts.pipeline_classes` writes stable_diffusion_server/pipelines/configs/pipeline_classes.json, which
tests/pipelines/test_pipeline_classes.py compares with this list and with the classes themselves. The ordinary classes
are read from their sources, so that those that need further packages are listed too; modular ones from their blocks.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.call_parameters import SIMPLE, simple_types
from stable_diffusion_server.pipelines.stock_classes import TABLE

SOURCES = Path(importlib.util.find_spec("diffusers").submodule_search_locations[0])  # type: ignore[union-attr,index]  # it is installed, and a package

# Arguments whose defaults are those of a row.
_DEFAULTS = (
    "num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "max_sequence_length", "strength",
)  # fmt: skip
_DENOISERS = ("transformer", "unet", "decoder", "image_unet")
# Keyword of the class that a call returns → what the class makes.
_MAKES = {
    "frames": "video", "video": "video", "videos": "video", "audios": "audio", "audio": "audio", "texts": "text",
    "rgb": "depth", "prediction": "map",
}  # fmt: skip
# Classes that look at pictures in a way that their arguments do not say.
_NEEDS_PICTURE = ("InstructPix2Pix", "QwenImageEdit", "JoyImageEdit", "BriaFiboEdit", "Kandinsky5I2I")
_SPECIAL = {
    "StableDiffusionGLIGENPipeline": "needs:gligen_phrases",  # it counts them, and `None` has no number
    "StableDiffusionGLIGENTextImagePipeline": "needs:gligen_phrases",
    "StableDiffusionParadigmsPipeline": "broken",  # its callback reads beyond the noise levels of its window
    "ChromaInpaintPipeline": "broken",  # it reads `guidance_embeds`, which Chroma's configuration lacks
    "QwenImageLayeredPipeline": "layers",
    "HunyuanImageRefinerPipeline": "upscale",
    "StableUnCLIPImg2ImgPipeline": "variation",
    "StableDiffusionDiffEditPipeline": "stage",
    "StableDiffusionPix2PixZeroPipeline": "stage",
    "ShapEPipeline": "model",
    "ShapEImg2ImgPipeline": "model",
    "RFD4ProteinaPipeline": "model",
    "TextToVideoZeroPipeline": "video",
    "TextToVideoZeroSDXLPipeline": "video",
    "UniDiffuserPipeline": "text",
    "VisualClozePipeline": "layers",
    "VisualClozeGenerationPipeline": "layers",
}


@dataclass(frozen=True)
class _Source:
    """A pipeline class as its source has it."""

    name: str
    folder: str
    call: ast.FunctionDef
    parts: tuple[str, ...]

    @property
    def arguments(self) -> dict[str, tuple[str, Any]]:
        """Annotation and default of each argument; the default of one without is `...`."""
        given = self.call.args
        listed = given.args[1:]
        defaults: list[ast.expr | None] = [None] * (len(listed) - len(given.defaults)) + [*given.defaults]
        pairs = zip([*listed, *given.kwonlyargs], [*defaults, *given.kw_defaults], strict=True)
        return {
            one.arg: (ast.unparse(one.annotation) if one.annotation else "", ... if value is None else _literal(value))
            for one, value in pairs
        }

    @property
    def text(self) -> str:
        """The source of the call."""
        return ast.unparse(self.call)

    @property
    def makes(self) -> str:
        """What the class makes by what its call returns: `image`, `embeddings` for another class, or another thing."""
        outputs = [node for node in ast.walk(self.call) if isinstance(node, ast.Call) and "Output" in _name(node.func)]
        keywords = {keyword.arg for node in outputs for keyword in node.keywords}
        combined = "prior_pipe" in self.text
        if (
            {"images", "image"} & keywords
            or combined
            or any("ImagePipelineOutput" in _name(one.func) for one in outputs)
        ):
            return "image"
        return next((made for keyword, made in _MAKES.items() if keyword in keywords), "embeddings")


def _name(node: ast.expr) -> str:
    return ast.unparse(node)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _sources() -> Iterator[_Source]:
    """The classes that diffusers exports."""
    exported = {
        node.value
        for node in ast.walk(ast.parse((SOURCES / "__init__.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for file in sorted((SOURCES / "pipelines").rglob("pipeline*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef) or node.name not in exported or "Pipeline" not in node.name:
                continue
            methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
            if "__call__" in methods:
                init = methods.get("__init__")
                parts = tuple(one.arg for one in init.args.args[1:]) if init else ()
                yield _Source(node.name, file.relative_to(SOURCES).parts[1], methods["__call__"], parts)


def _types(annotation: str) -> str:
    """The simple types of an annotation, empty if there is another among them."""
    options = re.sub(r"^(?:Optional|Union)\[(.*)\]$", r"\1", annotation).replace("|", ",").split(",")
    types = sorted({one.strip() for one in options} - {"None"})
    return "|".join(types) if types and all(one in {kind.__name__ for kind in SIMPLE} for one in types) else ""


def _own_tasks(found: _Source) -> dict[str, str]:
    """The tasks that the class itself draws."""
    names, name = found.arguments.keys(), found.name
    if "prompt" not in names:
        return {}
    if "mask_image" in names:
        return {"inpaint": name} if "image" in names else {}
    if "image" in names and "strength" in names:
        return {"image_to_image": name}
    if "image" in names:
        only = found.arguments["image"][1] is ... or name.startswith(_NEEDS_PICTURE) or "Instruct" in name
        return {"edit": name} if only else {"text_to_image": name, "edit": name}
    return {"edit": name} if "images" in names and name.startswith(_NEEDS_PICTURE) else {"text_to_image": name}


def _refusal(found: _Source) -> str:
    """Why a class is not drawn; empty if it is."""
    names = found.arguments
    if found.name in _SPECIAL:
        return _SPECIAL[found.name]
    if found.name.startswith("Onnx"):
        return "onnx"
    if found.makes != "image" or "num_frames" in names or "video" in names:
        return found.makes if found.makes != "image" else "video"
    if {"image_embeds", "image_embeddings"} & names.keys() and "prior_pipe" not in found.text:
        return "stage"
    if re.search("Upscale|SuperResolution", found.name):
        return "upscale"
    if "controlnet" in found.parts or "adapter" in found.parts or {"control_image", "hint"} & names.keys():
        return "control"
    if not {"callback_on_step_end", "callback"} & names.keys():
        return "silent"
    if not _own_tasks(found):
        return "promptless"
    needed = [name for name, (_, value) in names.items() if value is ... and name not in _GIVEN]
    return f"needs:{needed[0]}" if needed else ""


_GIVEN = ("prompt", "image", "mask_image")


def _auto_tables() -> dict[str, dict[str, str]]:
    """Key → class of the tables of diffusers' AutoPipelines, by task."""
    named = {
        "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": "text_to_image",
        "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": "image_to_image",
        "AUTO_INPAINT_PIPELINES_MAPPING": "inpaint",
    }
    tables: dict[str, dict[str, str]] = {}
    for node in ast.parse((SOURCES / "pipelines" / "auto_pipeline.py").read_text()).body:
        if isinstance(node, ast.Assign) and (task := named.get(_name(node.targets[0]))):
            pairs = [one.elts for one in ast.walk(node.value) if isinstance(one, ast.Tuple) and len(one.elts) == 2]
            tables[task] = {_literal(key): _name(value) for key, value in pairs if isinstance(key, ast.Constant)}
    return tables


def _beside(name: str, tables: Mapping[str, Mapping[str, str]], drawn: Mapping[str, _Source]) -> dict[str, str]:
    """The classes that draw the other tasks over the same components."""
    found: dict[str, str] = {}
    keys = [key for task in ("text_to_image", "image_to_image") for key, one in tables[task].items() if one == name]
    for task, ending in (("image_to_image", "Img2Img"), ("inpaint", "Inpaint")):
        stem = name.removesuffix("Pipeline")
        combined = f"{stem.removesuffix('Combined')}{ending}CombinedPipeline"
        listed = [*(tables[task].get(key, "") for key in keys), f"{stem}{ending}Pipeline", combined]
        able = (
            one for one in listed if one in drawn and task in _own_tasks(drawn[one]) and _fits(drawn[name], drawn[one])
        )
        if (other := next(able, None)) is not None:
            found[task] = other
    return found


def _fits(one: _Source, other: _Source) -> bool:
    """Whether the other class needs no component that this one lacks."""
    optional = {"image_encoder", "feature_extractor", "text_encoder_3", "tokenizer_3"}
    return {*other.parts} - {*one.parts} - optional <= {"requires_safety_checker", "requires_aesthetics_score"}


def _layout(found: _Source) -> str:
    """`scaled` where the call returns latents and decodes them divided by the VAE's factor."""
    decodes = "/ self.vae.config.scaling_factor" in found.text and "latent" in found.text and "vae" in found.parts
    if "latents = latents.reshape(" in found.text:  # Kandinsky 5 returns latents in another order
        return ""
    return "scaled" if decodes and re.search(r"output_type (==|!=) 'latent'|output_type in", found.text) else ""


def _ordinary() -> tuple[dict[str, Any], dict[str, str]]:
    sources = {found.name: found for found in _sources()}
    refused = {name: why for name, found in sources.items() if (why := _refusal(found))}
    drawn = {name: found for name, found in sources.items() if name not in refused}
    tables = _auto_tables()
    listed: dict[str, Any] = {}
    for name, found in drawn.items():
        arguments = found.arguments
        tasks = _own_tasks(found)
        listed[name] = {
            "calls": "step_end" if "callback_on_step_end" in arguments else "callback",
            "denoiser": next((part for part in _DENOISERS if part in found.parts), ""),
            "layout": _layout(found),
            "tasks": {**_beside(name, tables, drawn), **tasks},
            "defaults": {
                key: value for key in _DEFAULTS if key in arguments and _is_number(value := arguments[key][1])
            },
            "unused": [part for part in _UNUSED if part in found.parts and "requires_safety_checker" in found.parts],
            "parameters": {key: _types(kind) for key, (kind, _) in arguments.items()},
        }
    _join_siblings(listed, drawn)
    return listed, refused


def _join_siblings(listed: Mapping[str, dict[str, Any]], drawn: Mapping[str, _Source]) -> None:
    """Give a class that is beside others the tasks that they draw over the same components."""
    given = {name: dict(facts["tasks"]) for name, facts in listed.items()}
    for name, tasks in given.items():
        parents = [other for other, beside in given.items() if other != name and name in beside.values()]
        for task, kind in ((task, kind) for one in parents for task, kind in given[one].items()):
            if task not in tasks and task not in listed[name]["tasks"] and _fits(drawn[name], drawn[kind]):
                listed[name]["tasks"][task] = kind


# Parts that judge or mark pictures.
_UNUSED = ("safety_checker", "feature_extractor", "watermarker", "requires_safety_checker")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_WORKFLOWS = {
    "text2image": "text_to_image", "img2img": "image_to_image", "image2image": "image_to_image",
    "inpainting": "inpaint", "image_conditioned": "edit",
}  # fmt: skip


def _modular() -> tuple[dict[str, Any], dict[str, str]]:
    import diffusers

    listed: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in sorted(one for one in dir(diffusers) if re.fullmatch(r"\w+ModularPipeline", one)):
        kind: Any = getattr(diffusers, name)
        blocks: Any = getattr(diffusers, kind.default_blocks_name)()
        inputs = {one.name: one for one in blocks.inputs if one.name}
        workflows = blocks.available_workflows if getattr(blocks, "_workflow_map", None) else []
        tasks = [_WORKFLOWS[one] for one in workflows if one in _WORKFLOWS] or [
            "edit" if "image" in inputs else "text_to_image"
        ]
        if "images" not in {one.name for one in blocks.outputs} or "layers" in inputs:
            refused[name] = "layers" if "layers" in inputs else "audio" if "Music" in name else "video"
            continue
        if "strength" not in inputs:
            tasks = [task for task in tasks if task not in ("image_to_image", "inpaint")]
        parts = [one.name for one in blocks.expected_components]
        listed[name] = {
            "calls": "blocks",
            "denoiser": next(part for part in _DENOISERS if part in parts),
            "layout": "",
            "tasks": dict.fromkeys(tasks, name),
            "defaults": {
                key: inputs[key].default for key in _DEFAULTS if key in inputs and _is_number(inputs[key].default)
            },
            "unused": [],
            "parameters": {
                key: "|".join(sorted(kind.__name__ for kind in simple_types(one.type_hint)))
                for key, one in inputs.items()
            },
            "guider": "guider" in parts,
        }
    return listed, refused


def pipeline_classes(*, modular: bool = True) -> dict[str, Any]:
    """The table: the classes that are drawn with what is known of them, and why each other one is not."""
    drawn, refused = _ordinary()
    if modular:
        more, others = _modular()
        drawn, refused = drawn | more, refused | others
    return {
        "diffusers": importlib.metadata.version("diffusers"),
        "drawn": dict(sorted(drawn.items())),
        "refused": dict(sorted(refused.items())),
    }


def main() -> None:
    """Write the table, a class a line."""
    table = pipeline_classes()
    drawn = ",\n".join(f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in table["drawn"].items())
    refused = ",\n".join(f"  {json.dumps(name)}: {json.dumps(why)}" for name, why in table["refused"].items())
    version = json.dumps(table["diffusers"])
    TABLE.write_text(f'{{\n "diffusers": {version},\n "drawn": {{\n{drawn}\n }},\n "refused": {{\n{refused}\n }}\n}}\n')


if __name__ == "__main__":
    main()
