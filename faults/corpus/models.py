"""What is done to a good pipeline's or encoder's folder, so that loading it would execute or allocate something."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Damage = Callable[[Path], object]
MODULE = "stranger_module"


def pipelines(payload: bytes, marker: Path) -> Iterator[tuple[str, Damage]]:
    """Damage to a pipeline's folder, by name; none of the results may be loaded."""
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        bare = "pytorch_model" if part == "text_encoder" else name
        yield f"{part} of pickles", _replaced(f"{part}/{name}.safetensors", f"{part}/{bare}.bin", payload)
        yield f"{part} of good weights in a pickle", _resaved(f"{part}/{name}.safetensors", f"{part}/{bare}.bin")
        yield (
            f"{part} of a renamed pickle",
            _replaced(f"{part}/{name}.safetensors", f"{part}/{name}.safetensors", payload),
        )
    yield "unet of shards elsewhere", _sharded
    yield "unet whose config claims 10^9 wide text", _json("unet/config.json", cross_attention_dim=10**9)
    yield "unet whose config claims 10^7 channels", _json("unet/config.json", block_out_channels=[10**7] * 2)
    yield "unet whose config is none", lambda f: (f / "unet/config.json").write_text("[" * 100_000)
    yield "text encoder of an unknown function", _json("text_encoder/config.json", hidden_act="x")
    yield "text encoder as wide as a word", _json("text_encoder/config.json", hidden_size="wide")
    yield "index of a part without a class", _json("model_index.json", vae=[])
    yield "index of a module beside", lambda f: _module(f, marker, "model_index.json", unet=[MODULE, "UNet"])
    yield "index of os", _json("model_index.json", vae=["os", "system"])
    yield "index of subprocess", _json("model_index.json", scheduler=["subprocess", "Popen"])
    yield "index nested 100,000 deep", lambda f: (f / "model_index.json").write_text("[" * 100_000)
    yield "index of a list", lambda f: (f / "model_index.json").write_text("[]")
    yield "index of 100 MB", lambda f: (f / "model_index.json").write_text("{" + " " * 10**8 + "}")
    yield "index of a UNet whose class is a path", _json("model_index.json", unet=["diffusers", "../../os.system"])


def encoders(payload: bytes, marker: Path) -> Iterator[tuple[str, Damage]]:
    """Damage to a CLIP model's folder, by name; none of the results may be loaded."""
    yield "weights of pickles", _replaced("model.safetensors", "pytorch_model.bin", payload)
    yield "good weights in a pickle", _resaved("model.safetensors", "pytorch_model.bin")
    yield "weights of a renamed pickle", _replaced("model.safetensors", "model.safetensors", payload)
    yield "weights of TensorFlow", _replaced("model.safetensors", "tf_model.h5", payload)
    yield "config that is none", lambda f: (f / "config.json").write_text("[" * 100_000)
    for name, value in (("hidden_act", "x"), ("hidden_size", "wide"), ("patch_size", None)):
        yield f"config whose {name} is {value}", _encoder_json(name, value)
    yield "no weights", lambda f: (f / "model.safetensors").unlink()


def ignored(marker: Path) -> Iterator[tuple[str, Damage]]:
    """Damage to a CLIP model's folder that may be passed over, and must not be executed."""
    yield "code in auto_map", lambda f: _module(f, marker, "config.json", auto_map={"AutoModel": f"{MODULE}.Model"})


def _replaced(old: str, new: str, payload: bytes) -> Damage:
    def done(folder: Path) -> None:
        (folder / old).unlink()
        (folder / new).write_bytes(payload)

    return done


def _resaved(old: str, new: str) -> Damage:
    def done(folder: Path) -> None:
        torch.save(load_file(folder / old), folder / new)
        (folder / old).unlink()

    return done


def _json(name: str, **values: Any) -> Damage:
    def done(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return done


def _encoder_json(name: str, value: Any) -> Damage:
    """Where the vision model's settings are those of a part, in both."""

    def done(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content[name] = value
        if "vision_config" in content:
            content["vision_config"] = {**content["vision_config"], name: value}
        (folder / "config.json").write_text(json.dumps(content))

    return done


def _module(folder: Path, marker: Path, name: str, **values: Any) -> None:
    """Code in the model's folder, and where the command runs, from where Python imports."""
    code = f"open({str(marker)!r}, 'w').close()\nclass UNet: pass\nModel = UNet\n"
    for place in (folder, folder.parent.parent):
        (place / f"{MODULE}.py").write_text(code)
    _json(name, **values)(folder)


def _sharded(folder: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    (folder / "unet" / name).rename(folder / name)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": f"../{name}", "conv_in.bias": "/dev/zero"}}
    (folder / "unet" / f"{name}.index.json").write_text(json.dumps(index))
