"""A whole generator as one CUDA graph.

At batch 1 a generator is a hundred or two launches of a few microseconds each; a graph launches them at once.
Nothing in a forward pass waits for the device or depends on values, so all of it can be captured.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import require_shape


def graphed(
    model: nn.Module,  # Teacher or Student, on a CUDA device
    batch: int = 1,
    **options,  # what else model(z, c) takes, such as truncation_psi
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """model(z, c, **options) for one batch size, without gradients, captured in a CUDA graph.

    The graph reads the model's weights where they are now: changing them in place shows, replacing or moving
    them does not. With noise_mode="random" each call has fresh noise. The graph holds the memory of one pass.
    Returns: a function of z [batch, z_dim] and c [batch, 25] (any device and dtype; copied), which gives new
             tensors as the model does.
    Raises:  ValueError where the model is on no CUDA device, on a batch below 1, and, when called, on shapes.
    """
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        raise ValueError(f"graphed: model must be on a CUDA device, got {weight.device}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"graphed: batch must be an int of at least 1, got {batch!r}")
    z = torch.zeros(batch, model.z_dim, dtype=weight.dtype, device=weight.device)
    # A camera that sees something: of zeros alone, rays have no direction.
    c = torch.cat([torch.eye(4).flatten(), torch.eye(3).flatten()]).repeat(batch, 1).to(z)

    with torch.no_grad(), torch.cuda.device(weight.device):
        # What compiles, tunes or plans at first does so before the capture, on a stream of its own.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(z, c, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(z, c, **options)

    @torch.no_grad()
    def run(new_z: Tensor, new_c: Tensor) -> dict[str, Tensor]:
        require_shape("graphed", "z", new_z, (batch, model.z_dim), "[batch, z_dim]")
        require_shape("graphed", "c", new_c, (batch, 25), "[batch, 25]")
        with torch.cuda.device(weight.device):
            z.copy_(new_z)
            c.copy_(new_c)
            graph.replay()
            return {name: x.clone() for name, x in out.items()}

    return run
