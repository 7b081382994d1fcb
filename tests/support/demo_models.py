"""Small models for tests of the demo."""

from __future__ import annotations

import argparse

import torch

from cute_ssm.demo import cli
from cute_ssm.demo.model import LanguageModel, ModelConfig


def small_model(dtype=torch.float64, **sizes):
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(**{"vocab": 50, "layers": 2, "width": 32, "headdim": 16, "dstate": 16, **sizes}))
    model.reset_parameters()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("norm", "conv_bias", "D")):
                value.add_(0.3 * torch.randn_like(value))
    return model.to(dtype).eval().requires_grad_(False)


def arguments(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)
