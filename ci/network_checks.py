"""Checks of a packed bundle's network: shapes and types, TorchScript, ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import package
import torch
from monai.bundle import ConfigParser, ckpt_export, onnx_export, verify_net_in_out
from unpacked import Bundle

TOLERANCE = 1e-4


def example_inputs(metadata: Mapping[str, Any], *, size: int, batch: int) -> dict[str, torch.Tensor]:
    """A tensor for each input that the metadata declare.

    Args:
        metadata: of the bundle.
        size: stands for "*" in `spatial_shape`.
        batch: leading axis.

    Returns:
        Random (B, C, ...) tensors in `value_range`; inputs without spatial shape and of one channel are (B,).
    """
    generator, inputs = torch.Generator().manual_seed(0), {}
    for name, spec in metadata["network_data_format"]["inputs"].items():
        spatial = [size if n == "*" else int(n) for n in spec["spatial_shape"]]
        shape = [batch, spec["num_channels"], *spatial] if spatial else [batch]
        low, high = spec["value_range"] or (0.0, 1.0)
        values = low + (high - low) * torch.rand(shape, generator=generator)
        inputs[name] = values.to(getattr(torch, spec["dtype"]))
    return inputs


def check_network(bundle: Bundle) -> None:
    """The network takes and gives the shapes and types of the metadata, from `image` alone as the zoo asks it."""
    verify_net_in_out(
        net_id="network_def",
        meta_file=bundle.config("metadata.json"),
        config_file=bundle.config("inference.json"),
        device="cpu",
        any=16,
    )


def _network(bundle: Bundle) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(bundle.config("inference.json"))
    return parser.get_parsed_content("network_def").eval()


def _arguments(bundle: Bundle, *, size: int, batch: int) -> list[torch.Tensor]:
    return list(example_inputs(bundle.metadata, size=size, batch=batch).values())


def _weights(bundle: Bundle) -> Path:
    """The weights of a bundle; for one that was packed without, fresh ones that serve as well for an export."""
    if bundle.has_weights():
        return bundle.root / package.WEIGHTS
    fresh = bundle.work / "fresh.pt"
    if not fresh.exists():
        torch.save(_network(bundle).state_dict(), fresh)
    return fresh


def _loaded_network(bundle: Bundle) -> torch.nn.Module:
    network = _network(bundle)
    network.load_state_dict(torch.load(_weights(bundle), map_location="cpu", weights_only=True))
    return network


def _export_arguments(bundle: Bundle, file: str) -> dict[str, Any]:
    return {
        "net_id": "network_def",
        "filepath": str(bundle.work / file),
        "ckpt_file": str(_weights(bundle)),
        "meta_file": bundle.config("metadata.json"),
        "config_file": bundle.config("inference.json"),
    }


def check_torchscript(bundle: Bundle) -> None:
    """`ckpt_export` gives a network that computes the same, also at other sizes and batches than it was made with."""
    ckpt_export(**_export_arguments(bundle, "model.ts"))
    network, exported = _loaded_network(bundle), torch.jit.load(bundle.work / "model.ts", map_location="cpu")
    for size, batch in ((16, 1), (21, 2)):
        arguments = _arguments(bundle, size=size, batch=batch)
        with torch.no_grad():
            _agree(exported(*arguments), network(*arguments), "TorchScript")


def check_onnx(bundle: Bundle) -> None:
    """`onnx_export` gives a network that onnxruntime computes alike; for networks whose only input is `image`."""
    arguments = _arguments(bundle, size=32, batch=1)
    if len(arguments) > 1:  # onnx_export passes one input
        return
    onnx_export(**_export_arguments(bundle, "model.onnx"), input_shape=list(arguments[0].shape))
    session = onnxruntime.InferenceSession(bundle.work / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: arguments[0].numpy()})
    with torch.no_grad():
        _agree(torch.from_numpy(np.asarray(output)), _loaded_network(bundle)(*arguments), "ONNX")


def _agree(exported: torch.Tensor, eager: torch.Tensor, kind: str) -> None:
    difference = float((exported - eager).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(eager.abs().max())):
        raise ValueError(f"{kind} output differs from the network's by {difference:g}")
