"""LoRA files in each trainer's layout, with random weights for a given pipeline, and invalid or unfit files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

RANK, ALPHA = 2, 1.0
NOTES = "lora_adapter_metadata"
Tensors = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def pairs(module: Any, endings: tuple[str, ...], seed: int = 0, size: float = 0.4) -> Pairs:
    """Down (rank × in) and up (out × rank) of each linear layer whose name ends with one of these."""
    chance = torch.Generator().manual_seed(seed)
    layers = ((n.removesuffix(".base_layer"), m) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear))
    found = [(name, layer) for name, layer in layers if name.endswith(endings)]
    return {
        name: (
            torch.randn(RANK, layer.in_features, generator=chance) * size / layer.in_features**0.5,
            torch.randn(layer.out_features, RANK, generator=chance) * size,
        )
        for name, layer in found
    }


def unet_pairs(pipeline: Any) -> Pairs:
    """Of the UNet's attention."""
    return pairs(pipeline.unet, ("to_q", "to_k", "to_v", "to_out.0"))


def flux_pairs(pipeline: Any) -> Pairs:
    """Of the transformer's attention and feed-forward layers."""
    return pairs(pipeline.transformer, ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_mlp"))


def encoder_pairs(encoder: Any, seed: int = 1) -> Pairs:
    """Of a text encoder, with trainers' layer names."""
    found = pairs(encoder, _ENCODER, seed)
    return {name if name.startswith("text_model") else f"text_model.{name}": pair for name, pair in found.items()}


def kohya(prefix: str, found: Pairs, alpha: float | None = ALPHA) -> Tensors:
    """The layout of kohya's scripts."""
    tensors: Tensors = {}
    for name, (down, up) in found.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def peft(prefix: str, found: Pairs, halves: str = "AB", scale: float = ALPHA / RANK) -> Tensors:
    """The layout of diffusers' trainers, already scaled."""
    given = {"A": 0, "B": 1}
    return {
        f"{prefix}.{name}.lora_{half}.weight": pair[given[half]] * (scale if half == "B" else 1)
        for name, pair in found.items()
        for half in halves
    }


def processors(found: Pairs) -> Tensors:
    """The layout of diffusers' oldest trainer."""
    tensors: Tensors = {}
    for name, (down, up) in found.items():
        head, _, tail = name.rpartition(".attn")
        number, _, what = tail.partition(".")
        key = f"unet.{head}.attn{number}.processor.{what.replace('to_out.0', 'to_out')}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return tensors


def xlabs(pipeline: Any) -> Tensors:
    """The layout of XLabs's trainer: attention of the double blocks, with fused projections."""
    width, chance = pipeline.transformer.inner_dim, torch.Generator().manual_seed(2)
    sizes = {"qkv_lora1": 3, "qkv_lora2": 3, "proj_lora1": 1, "proj_lora2": 1}
    return {
        f"double_blocks.0.processor.{name}.{half}.weight": torch.randn(*shape, generator=chance) * 0.05
        for name, times in sizes.items()
        for half, shape in (("down", (RANK, width)), ("up", (times * width, RANK)))
    }


def flux_originals(pipeline: Any) -> Pairs:
    """Layers of the first double block by Black Forest Labs' names."""
    width, chance = pipeline.transformer.inner_dim, torch.Generator().manual_seed(3)
    shapes = {"img_attn.qkv": 3 * width, "img_attn.proj": width, "txt_attn.qkv": 3 * width, "txt_attn.proj": width}
    return {
        f"double_blocks.0.{name}": (
            torch.randn(RANK, width, generator=chance) * 0.05,
            torch.randn(out, RANK, generator=chance) * 0.3,
        )
        for name, out in shapes.items()
    }


def dora(found: Pairs, module: Any) -> Tensors:
    """With PEFT's magnitudes."""
    sizes = {
        f"unet.{name}.lora_magnitude_vector": module.get_submodule(name).weight.norm(dim=1) * 1.2 for name in found
    }
    return {**peft("unet", found), **sizes}


def noted(part: str, **more: Any) -> dict[str, str]:
    """File metadata: the PEFT configuration."""
    notes = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1, "bias": "none", "init_lora_weights": True, **more}
    return {NOTES: json.dumps({f"{part}.{name}": value for name, value in notes.items()})}


def write(file: Path, tensors: Tensors, notes: dict[str, str] | None = None) -> Path:
    """Write a LoRA file."""
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, file, metadata={"format": "pt", **(notes or {})})
    return file


# Valid files, by family: tensors, and metadata where the trainer writes them.
FITTING: dict[str, dict[str, Callable[[Any], tuple[Tensors, dict[str, str] | None]]]] = {
    "sdxl": {
        "kohya": lambda p: (kohya("lora_unet", unet_pairs(p)), None),
        "kohya in bf16, no alpha": lambda p: (
            {k: v.bfloat16() for k, v in kohya("lora_unet", unet_pairs(p), None).items()},
            None,
        ),
        "kohya, both text encoders": lambda p: (
            kohya("lora_unet", unet_pairs(p))
            | kohya("lora_te1", encoder_pairs(p.text_encoder))
            | kohya("lora_te2", encoder_pairs(p.text_encoder_2, 2)),
            None,
        ),
        "kohya, text encoders alone": lambda p: (
            kohya("lora_te1", encoder_pairs(p.text_encoder)) | kohya("lora_te2", encoder_pairs(p.text_encoder_2, 2)),
            None,
        ),
        "peft": lambda p: (peft("unet", unet_pairs(p)), None),
        "peft, both text encoders": lambda p: (
            peft("unet", unet_pairs(p))
            | peft("text_encoder", encoder_pairs(p.text_encoder))
            | peft("text_encoder_2", encoder_pairs(p.text_encoder_2, 2)),
            None,
        ),
        "peft with notes": lambda p: (
            peft("unet", unet_pairs(p), scale=1.0),
            noted("unet", lora_dropout=0.0, target_modules=sorted(unet_pairs(p))),
        ),
        "old processors": lambda p: (processors(unet_pairs(p)), None),
        "DoRA": lambda p: (dora(unet_pairs(p), p.unet), None),
    },
    "flux": {
        "diffusers": lambda p: (peft("transformer", flux_pairs(p)), None),
        "diffusers, text encoder": lambda p: (
            peft("transformer", flux_pairs(p)) | peft("text_encoder", encoder_pairs(p.text_encoder)),
            None,
        ),
        "kohya": lambda p: (kohya("lora_unet", flux_originals(p)), None),
        "xlabs": lambda p: (xlabs(p), None),
    },
}


def with_one(tensors: Tensors, value: float, ending: str = "weight") -> Tensors:
    """The tensors with one number of one of them replaced."""
    name = [name for name in tensors if name.endswith(ending)][-1]
    spoilt = tensors[name].clone()
    spoilt.reshape(-1)[0] = value
    return {**tensors, name: spoilt}


def renamed_by_half(tensors: Tensors) -> Tensors:
    """The tensors, every second layer renamed to an unknown one."""
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    wrong = {layer: layer.replace("attn1", "attn9").replace("attn.", "attm.") for layer in layers[::2]}
    return {
        name.replace(layer := name.rpartition(".lora_")[0], wrong.get(layer, layer)): t for name, t in tensors.items()
    }


def _sd15() -> Tensors:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{key}.lora_down.weight": torch.ones(4, 768), f"{key}.lora_up.weight": torch.ones(320, 4)}


_QUERY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def _lycoris(kind: str, key: str = _QUERY, **sides: int) -> Tensors:
    """A file of one layer of the embedded SDXL, 64 × 64, or of other `sides`."""
    out, inner = sides.get("out", 64), sides.get("inner", 64)
    if kind == "LoHa":
        return {
            f"{key}.hada_w{number}_{half}": torch.ones(*((out, 4) if half == "a" else (4, inner)))
            for number in (1, 2)
            for half in "ab"
        }
    if kind == "LoKr":
        return {f"{key}.lokr_w1": torch.ones(4, 4), f"{key}.lokr_w2": torch.ones(out // 4, inner // 4)}
    pair = {f"{key}.lora_down.weight": torch.ones(4, inner), f"{key}.lora_up.weight": torch.ones(out, 4)}
    return {**pair, f"{key}.dora_scale": torch.ones(out, 1)} if kind == "DoRA" else pair


# Methods beside LoRA, what is wrong with their files, and what is said.
_SPOILT = [
    *((kind, "of another width", "another model") for kind in ("LoHa", "LoKr", "DoRA")),
    *((kind, "of an unknown layer", "another model") for kind in ("LoHa", "LoKr", "DoRA")),
    *((kind, "with NaN", "not finite") for kind in ("LoHa", "LoKr", "DoRA")),
    *((kind, "without a half", "lacks") for kind in ("LoHa", "LoKr")),
    ("LoHa", "of a huge rank", "a rank of 70000"),
    ("LoKr", "of a huge rank", "a rank of 70000"),
    ("LoHa", "of one side", "another model"),
    ("LoKr", "of one side", "another model"),
    ("DoRA", "with few magnitudes", "another model"),
]


def _spoilt(kind: str, fault: str, pipeline: Any) -> bytes:
    tensors = _lycoris(kind)
    if fault == "of another width":
        tensors = _lycoris(kind, inner=48)
    elif fault == "of an unknown layer":
        tensors = _lycoris(kind, "lora_unet_down_blocks_7_attentions_0_proj_in")
    elif fault == "with NaN":
        tensors = with_one(tensors, float("nan"), "")
    elif fault == "without a half":
        tensors.pop(f"{_QUERY}.{'hada_w2_a' if kind == 'LoHa' else 'lokr_w2'}")
    elif fault == "of a huge rank":
        second = "hada_w2_b" if kind == "LoHa" else "lokr_w2_b"
        tensors |= {f"{_QUERY}.{second}": torch.ones(70_000, 1), f"{_QUERY}.lokr_w2_a": torch.ones(16, 1)}
        tensors.pop(f"{_QUERY}.lokr_w2", None)
    elif fault == "of one side":
        tensors |= {f"{_QUERY}.{'hada_w2_a' if kind == 'LoHa' else 'lokr_w1'}": torch.ones(64)}
    else:
        tensors[f"{_QUERY}.dora_scale"] = torch.ones(3, 1)
    return _bytes(tensors)


def _all(prefix: str, found: Pairs, kind: torch.dtype) -> Tensors:
    return {name: tensor.to(kind) for name, tensor in peft(prefix, found).items()}


def _bytes(tensors: Tensors, notes: dict[str, str] | None = None) -> bytes:
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return save(own, {"format": "pt", **(notes or {})})


def _headed(length: int, header: bytes) -> bytes:
    return length.to_bytes(8, "little") + header


def _of_dimensions(name: str, number: int) -> bytes:
    """A file of one tensor with that many dimensions: safetensors accepts any number, PyTorch does not."""
    facts = {"dtype": "F32", "shape": [1] * (number - 2) + [4, 4], "data_offsets": [0, 64]}
    header = json.dumps({name: facts}).encode()
    return _headed(len(header), header) + bytes(64)


# Files that are no LoRA of a model, by family: the file's bytes, and the expected message.
UNFIT: dict[str, dict[str, tuple[Callable[[Any], bytes], str]]] = {
    "sdxl": {
        "of Flux": (
            lambda p: _bytes(peft("transformer", {"blocks.0": (torch.ones(2, 4), torch.ones(4, 2))})),
            "family",
        ),
        "of Flux, kohya": (
            lambda p: _bytes(
                kohya("lora_unet", {"double_blocks.0.img_attn.proj": (torch.ones(2, 4), torch.ones(4, 2))})
            ),
            "family",
        ),
        "of SD 1.5": (lambda p: _bytes(_sd15()), "another model"),
        "half of it matches": (lambda p: _bytes(renamed_by_half(peft("unet", unet_pairs(p)))), "in part"),
        "half in names that are dropped": (
            lambda p: _bytes(
                kohya("lora_unet", unet_pairs(p))
                | kohya("lora_unet", {"input_blocks.4.1.proj_in": (torch.ones(2, 4), torch.ones(4, 2))})
            ),
            "in part",
        ),
        "layers of no text encoder": (
            lambda p: _bytes(
                peft("unet", unet_pairs(p))
                | peft(
                    "text_encoder",
                    encoder_pairs(p.text_encoder)
                    | {"text_model.encoder.layers.99.mlp.fc1": (torch.ones(2, 4), torch.ones(4, 2))},
                )
            ),
            "layers are not there",
        ),
        "a part there is none of": (
            lambda p: _bytes(peft("unet", unet_pairs(p)) | peft("prior", unet_pairs(p))),
            "in part",
        ),
        **{f"{kind}, {fault}": (partial(_spoilt, kind, fault), said) for kind, fault, said in _SPOILT},
        "OFT": (lambda p: _bytes({f"{_QUERY}.oft_blocks": torch.ones(4, 4, 4)}), "is a OFT|is an OFT"),
        "a tensor in two ways of writing": (
            lambda p: _bytes(peft("unet", unet_pairs(p)) | peft("diffusion_model", unet_pairs(p))),
            "two ways of writing",
        ),
        "no lora_B": (lambda p: _bytes(peft("unet", unet_pairs(p), "A")), "lacks .*lora_B"),
        "names with line breaks and escapes": (
            lambda p: _bytes(peft("unet", {"mid\n\x1b[2J\x85.x": (torch.ones(2, 4), torch.ones(4, 2))})),
            r"\\n\\x1b\[2J\\x85",
        ),
        "no lora_B in a text encoder": (
            lambda p: _bytes(peft("unet", unet_pairs(p)) | peft("text_encoder", encoder_pairs(p.text_encoder), "A")),
            "lacks .*lora_B",
        ),
        "no lora_up": (
            lambda p: _bytes({k: v for k, v in kohya("lora_unet", unet_pairs(p)).items() if "lora_up" not in k}),
            "lacks .*lora_B",
        ),
        **{
            f"{number} dimensions": (
                partial(lambda number, p: _of_dimensions("unet.mid_block.proj_in.lora_A.weight", number), number),
                "dimensions",
            )
            for number in (9, 65, 9_000)
        },
        "NaN": (lambda p: _bytes(with_one(peft("unet", unet_pairs(p)), float("nan"))), "not finite"),
        "infinity in a text encoder": (
            lambda p: _bytes(with_one(kohya("lora_te1", encoder_pairs(p.text_encoder)), float("inf"))),
            "not finite",
        ),
        "a scale of NaN": (
            lambda p: _bytes(kohya("lora_unet", unet_pairs(p), float("nan"))),
            "a scale that is none",
        ),
        "whole numbers": (lambda p: _bytes(_all("unet", unet_pairs(p), torch.int32)), "a tensor of int32"),
        "tensors without numbers": (
            lambda p: _bytes(peft("unet", {n: (a[:0], b[:, :0]) for n, (a, b) in unet_pairs(p).items()})),
            "a tensor of",
        ),
        "a layer within an adapter": (
            lambda p: _bytes(
                peft("unet", unet_pairs(p) | {f"{n}.base_layer": pair for n, pair in unet_pairs(p).items()})
            ),
            "in part",
        ),
        "notes that change the model below": (
            lambda p: _bytes(
                peft("unet", unet_pairs(p)),
                noted("unet", init_lora_weights="pissa", target_modules=sorted(unet_pairs(p))),
            ),
            "init_lora_weights=pissa",
        ),
        "notes that train biases": (
            lambda p: _bytes(
                peft("unet", unet_pairs(p)), noted("unet", bias="all", target_modules=sorted(unet_pairs(p)))
            ),
            "bias=all",
        ),
        "notes with a pattern": (
            lambda p: _bytes(peft("unet", unet_pairs(p)), noted("unet", target_modules="(a+)+$")),
            "target_modules",
        ),
        "notes that are none": (lambda p: _bytes(peft("unet", unet_pairs(p)), {NOTES: "["}), "notes that are none"),
        "an embedding": (lambda p: _bytes({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 8)}), "no LoRA"),
        "a ControlNet": (lambda p: _bytes({"controlnet_cond_embedding.conv_in.weight": torch.ones(4, 3)}), "no LoRA"),
        "a VAE": (lambda p: _bytes({"decoder.conv_in.weight": torch.ones(4, 3)}), "no LoRA"),
        "nothing": (lambda p: b"", "not a safetensors file"),
        "no tensors": (lambda p: _bytes({}), "no LoRA"),
        "HTML": (lambda p: b"<!DOCTYPE html><title>404</title>" * 9, "not a safetensors file"),
        "a pointer of git-lfs": (
            lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "pointer of git-lfs",
        ),
        "truncated": (lambda p: _bytes(peft("unet", unet_pairs(p)))[:-9], "truncated"),
        "a huge header": (lambda p: _headed(9 * 2**20, b" " * (9 * 2**20 + 64)), "header of"),
        "a header longer than the file": (lambda p: _headed(2**62, b"{}"), "not a safetensors file"),
        "a deep header": (lambda p: _headed(200_000, b"[" * 200_000), "not a safetensors file"),
        "offsets that overlap": (
            lambda p: _headed(
                len(
                    header := json.dumps(
                        {
                            f"unet.mid.lora_{half}.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
                            for half in "AB"
                        }
                    ).encode()
                ),
                header + b"\0" * 16,
            ),
            "cannot be read as safetensors",
        ),
    },
    "flux": {
        "of SDXL": (lambda p: _bytes(_sd15()), "family"),
        "half of it matches": (lambda p: _bytes(renamed_by_half(peft("transformer", flux_pairs(p)))), "in part"),
        "too many blocks": (
            lambda p: _bytes(
                peft("transformer", {"single_transformer_blocks.77.attn.to_q": (torch.ones(2, 4), torch.ones(4, 2))})
            ),
            "another model",
        ),
        "a scale below nothing": (
            lambda p: _bytes(kohya("lora_unet", flux_originals(p), -1.0)),
            "a scale that is none",
        ),
        "differences of biases": (
            lambda p: _bytes(
                kohya("lora_unet", flux_originals(p)) | {"lora_unet_double_blocks_0_img_mod_lin.diff_b": torch.ones(8)}
            ),
            "another model",
        ),
        "LoHa of SDXL": (lambda p: _bytes(_lycoris("LoHa")), "family"),
        "no lora_B": (lambda p: _bytes(peft("transformer", flux_pairs(p), "A")), "lacks .*lora_B"),
        "NaN": (lambda p: _bytes(with_one(peft("transformer", flux_pairs(p)), float("nan"))), "not finite"),
        "a control LoRA": (
            lambda p: _bytes({"transformer.x_embedder.lora_A.weight": torch.ones(2, 4)}),
            "control LoRA",
        ),
    },
}
