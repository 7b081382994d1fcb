"""The file formats of the demo: weights as safetensors, sizes and merges as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cute_ssm.demo.model import LanguageModel, ModelConfig
from cute_ssm.demo.tokenizer import Tokenizer

__all__ = ["CONFIG_FILE", "DIRECTORY", "WEIGHTS_FILE", "load", "save"]

DIRECTORY = Path(__file__).with_name("weights")
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model.json"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("the demo reads its weights with safetensors: pip install 'cute-ssm[demo]'") from error
    return safetensors.torch


def save(directory: Path, model: LanguageModel, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model and its tokenizer into `directory`, the weights rounded to `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {
        name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()
    }
    # not save_file, whose file only its owner can read
    (directory / WEIGHTS_FILE).write_bytes(_safetensors().save(tensors))
    content = {"model": vars(model.config), "merges": [list(pair) for pair in tokenizer.merges]}
    (directory / CONFIG_FILE).write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def load(
    directory: Path | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[LanguageModel, Tokenizer]:
    """Read a model and its tokenizer.

    Parameters
    ----------
    directory : Path, optional
        Folder with the two files.  Default: the shipped model.
    dtype : torch.dtype
        The weights are converted to this dtype.
    device : torch.device or str
        Device of the model.

    Returns
    -------
    tuple of LanguageModel and Tokenizer
    """
    directory = DIRECTORY if directory is None else directory
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"directory: no {name} in {directory}")
    safetensors = _safetensors()
    try:
        content = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tokenizer = Tokenizer(content["merges"])
        model = LanguageModel(ModelConfig(**content["model"])).to(dtype=dtype, device=device)
        model.load_state_dict(safetensors.load((directory / WEIGHTS_FILE).read_bytes()))
    except Exception as error:  # safetensors, json and torch raise different errors for a damaged file
        raise ValueError(f"directory: the model in {directory} is damaged: {error}") from error
    if model.config.vocab != len(tokenizer):
        raise ValueError(f"directory: the model has {model.config.vocab} tokens, its tokenizer {len(tokenizer)}")
    return model.eval().requires_grad_(False), tokenizer
