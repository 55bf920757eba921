"""Reference cases: inputs and outputs of tiny models, computed by the original code (tests/data/parity)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

CASES = Path(__file__).parent / "data" / "parity"


def parity_case(name):
    """(case, tensors): configs, seeds and sums; inputs and the original's outputs."""
    return json.loads((CASES / name / "case.json").read_text()), load_file(CASES / name / "io.safetensors")


def fill_by_formula(model, seed):
    """The reference cases' weights: seeded normal values scaled by fan-in, around 1 for norms. Returns their sum."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(parameters):
            parameter = parameters[name]
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values * (0.8 / parameter[0].numel() ** 0.5))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * values)
            else:
                parameter.copy_(0.1 * values)
            total += parameter.double().abs().sum().item()
    return total
