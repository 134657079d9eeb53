"""`training.volumetric_rendering`, EG3D's renderer, by render_triplane and sample_triplane.

A decoder of two linear layers with a softplus between them, over the mean of the planes, as EG3D's own, goes
through the fused renderer: layers of `torch.nn`, or with EG3D's `weight_gain` and `bias_gain`. Whether it is
one is tried out on random features and weights. Any other decoder, one with hooks, a subclass that overrides
a step, or density noise goes through the same steps one by one. Random depths are drawn as the original does.

Where the repository has a renderer of its own, that file runs first, and the rest of what is in it stays, its
`generate_planes` too: it decides where the planes lie.
"""

import weakref
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._march import coarse_depths, composite, importance_depths, ray_limits
from ._shared import named

PREFIXES = ("training.volumetric_rendering",)


def adapt(module: ModuleType, names: dict) -> dict:
    """The names for a repository's own module, which has run: its planes stay where they are."""
    own = vars(module).get("generate_planes")
    if "ImportanceRenderer" not in names or own is None:
        return names
    names = {name: value for name, value in names.items() if name != "generate_planes"}
    kept = {"generate_planes": staticmethod(own), "__module__": module.__name__}
    return names | {"ImportanceRenderer": type("ImportanceRenderer", (ImportanceRenderer,), kept)}


def generate_planes() -> Tensor:
    """The axes of EG3D's three planes [3, 3, 3]."""
    return torch.tensor(
        [
            [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            [[1, 0, 0], [0, 0, 1], [0, 1, 0]],
            [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
        ],
        dtype=torch.float32,
    )


def project_onto_planes(
    planes: Tensor,  # [P, 3, 3] axes
    coordinates: Tensor,  # [N, M, 3]
) -> Tensor:
    """Columns and rows of points on the planes [N P, M, 2]."""
    inverse = torch.linalg.inv(planes.cpu().double()).to(coordinates)
    return (coordinates[:, None] @ inverse)[..., :2].flatten(0, 1)


def sample_from_planes(
    plane_axes: Tensor,  # [P, 3, 3]
    plane_features: Tensor,  # [N, P, C, H, W]
    coordinates: Tensor,  # [N, M, 3] world units
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    box_warp: float = 1.0,
) -> Tensor:
    """Features at points [N, P, M, C]; what sample_triplane does not do by torch's grid_sample."""
    count = plane_features.shape[1]
    if (mode, padding_mode, count) == ("bilinear", "zeros", 3):
        return ops.sample_triplane(plane_features, coordinates, box_warp, plane_axes.tolist())
    grid = project_onto_planes(plane_axes, coordinates * (2 / box_warp))[:, None]
    out = F.grid_sample(plane_features.flatten(0, 1), grid, mode, padding_mode, align_corners=False)
    return out[:, :, 0].mT.unflatten(0, (-1, count))


class MipRayMarcher2(nn.Module):
    """Composites samples along rays by the midpoint rule."""

    def run_forward(self, colors, densities, depths, rendering_options):
        if rendering_options["clamp_mode"] != "softplus":
            raise ValueError(
                f"MipRayMarcher2: clamp_mode must be 'softplus', got {rendering_options['clamp_mode']!r}"
            )
        white_back = rendering_options.get("white_back", False)
        features, depth, w = composite(densities[..., 0], colors, depths[..., 0], white_back)
        return features, depth, w[..., None]

    def forward(
        self,
        colors: Tensor,  # [N, R, S, C]
        densities: Tensor,  # [N, R, S, 1]
        depths: Tensor,  # [N, R, S, 1] ascending
        rendering_options: dict,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns: image [N, R, C] in [-1, 1], depth [N, R, 1], weights [N, R, S - 1, 1]."""
        return self.run_forward(colors, densities, depths, rendering_options)


class ImportanceRenderer(nn.Module):
    """EG3D's renderer in two passes, by fastgen.ops.render_triplane where the decoder is EG3D's."""

    generate_planes = staticmethod(generate_planes)

    def __init__(self):
        super().__init__()
        self.ray_marcher = MipRayMarcher2()
        self.plane_axes = type(self).generate_planes()

    def forward(
        self,
        planes: Tensor,  # [N, 3, F, H, W]
        decoder: nn.Module,  # features [N, 3, M, F], directions [N, M, 3]; to {"rgb": [N, M, C], "sigma"}
        ray_origins: Tensor,  # [N, R, 3]
        ray_directions: Tensor,  # [N, R, 3]
        rendering_options: dict,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns: features [N, R, C] in [-1, 1], depth [N, R, 1], weight [N, R, 1]."""
        n, r, _ = ray_origins.shape
        samples, fine = (rendering_options[f"depth_resolution{end}"] for end in ("", "_importance"))
        if (
            self._is_plain(planes, rendering_options)
            and (layers := decoder_layers(decoder, planes)) is not None
        ):
            u_coarse = torch.rand(n, r, samples, 1, device=ray_origins.device, dtype=ray_origins.dtype)
            u_fine = torch.rand(n * r, fine, device=ray_origins.device).view(n, r, fine) if fine else None
            options = {**rendering_options, "plane_axes": self.plane_axes.tolist()}
            return tuple(
                ops.render_triplane(planes, layers, ray_origins, ray_directions, options, u_coarse, u_fine)
            )

        def evaluate(depths):
            points = ray_origins[:, :, None] + depths * ray_directions[:, :, None]
            directions = ray_directions[:, :, None].expand_as(points)
            out = self.run_model(
                planes, decoder, points.flatten(1, 2), directions.flatten(1, 2), rendering_options
            )
            return tuple(out[name].unflatten(1, depths.shape[1:3]) for name in ("rgb", "sigma"))

        start, end = rendering_options["ray_start"], rendering_options["ray_end"]
        if start == end == "auto":
            start, end = ray_limits(ray_origins, ray_directions, rendering_options["box_warp"])
        disparity = rendering_options.get("disparity_space_sampling", False)
        depths = self.sample_stratified(ray_origins, start, end, samples, disparity)
        colors, densities = evaluate(depths)
        if fine:
            weights = self.ray_marcher(colors, densities, depths, rendering_options)[2]
            more = self.sample_importance(depths, weights, fine)
            depths, colors, densities = self.unify_samples(depths, colors, densities, more, *evaluate(more))
        features, depth, weights = self.ray_marcher(colors, densities, depths, rendering_options)
        return features, depth, weights.sum(2)

    def _is_plain(self, planes: Tensor, options: dict) -> bool:
        """Is every step the one that render_triplane takes?"""
        steps = ("run_model", "sample_stratified", "sample_importance", "unify_samples", "sort_samples")
        return (
            all(getattr(type(self), step) is getattr(ImportanceRenderer, step) for step in steps)
            and type(self.ray_marcher) is MipRayMarcher2
            and not options.get("density_noise")
            and planes.shape[1] == 3
        )

    def run_model(self, planes, decoder, sample_coordinates, sample_directions, options) -> dict[str, Tensor]:
        """What the decoder says of points [N, M, 3]."""
        features = sample_from_planes(
            self.plane_axes, planes, sample_coordinates, padding_mode="zeros", box_warp=options["box_warp"]
        )
        out = decoder(features, sample_directions)
        if noise := options.get("density_noise"):
            out["sigma"] = out["sigma"] + torch.randn_like(out["sigma"]) * noise
        return out

    def sample_stratified(
        self, ray_origins, ray_start, ray_end, depth_resolution, disparity_space_sampling=False
    ) -> Tensor:
        """Random depths [N, R, S, 1], one in each of S intervals."""
        shape = *ray_origins.shape[:2], depth_resolution
        u = torch.rand(*shape, 1, device=ray_origins.device, dtype=ray_origins.dtype)[..., 0]
        return coarse_depths(ray_start, ray_end, u, disparity_space_sampling)[..., None]

    @torch.no_grad()
    def sample_importance(self, z_vals, weights, N_importance) -> Tensor:
        """Random depths [N, R, N_importance, 1] where weights [N, R, S - 1, 1] are large."""
        n, r = z_vals.shape[:2]
        u = torch.rand(n * r, N_importance, device=z_vals.device, dtype=z_vals.dtype)
        return importance_depths(weights[..., 0], z_vals[..., 0], u.view(n, r, -1))[..., None]

    def unify_samples(self, depths1, colors1, densities1, depths2, colors2, densities2):
        """Both, sorted by depth."""
        pairs = (depths1, depths2), (colors1, colors2), (densities1, densities2)
        return self.sort_samples(*(torch.cat(pair, 2) for pair in pairs))

    def sort_samples(self, all_depths, all_colors, all_densities):
        """Depths, colours and densities [N, R, T, ...], sorted by depth."""
        order = all_depths.argsort(2)
        rest = (x.gather(2, order.expand_as(x)) for x in (all_colors, all_densities))
        return all_depths.gather(2, order), *rest


# Of each decoder, by what may change how it computes, whether it does as render_triplane.
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()


def decoder_layers(decoder: nn.Module, planes: Tensor) -> tuple[Tensor, ...] | None:
    """w1, b1, w2, b2 of a decoder that render_triplane has, None of any other."""
    net = getattr(decoder, "net", None)
    if not (
        isinstance(net, nn.Sequential)
        and len(net) == 3
        and all(isinstance(getattr(x, k, None), Tensor) for x in net[::2] for k in ("weight", "bias"))
        and all(getattr(layer, "activation", "linear") == "linear" for layer in net[::2])
        and isinstance(net[1], nn.Softplus)
        and net[0].weight.shape[1] == planes.shape[2]
        and len(list(decoder.parameters())) == 4
        and not list(decoder.buffers())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
    ):
        return None
    plain = (bool, int, float, str)
    state = decoder.training, *((k, v) for k, v in vars(decoder).items() if isinstance(v, plain))
    answers = _known.setdefault(decoder, {})
    if state not in answers:
        answers[state] = _does_as_the_renderer(decoder)
    return tuple(_effective(net, dict(net.named_parameters()))) if answers[state] else None


def _effective(net: nn.Sequential, parameters: dict[str, Tensor]) -> list[Tensor]:
    names = [(i, name) for i in (0, 2) for name in ("weight", "bias")]
    return [parameters[f"{i}.{name}"] * getattr(net[i], f"{name}_gain", 1) for i, name in names]


@torch.no_grad()
def _does_as_the_renderer(decoder: nn.Module) -> bool:
    """Tried out on random features with random weights, for its own may yet be zero."""
    random = torch.Generator().manual_seed(0)
    net, first = decoder.net, decoder.net[0].weight

    def draw(*shape):
        return torch.randn(shape, generator=random).to(first)

    weights = {}
    for name, x in net.named_parameters():
        layer, _, kind = name.partition(".")
        spread = x.shape[1] ** -0.5 if kind == "weight" else 0.5
        weights[name] = draw(*x.shape) * spread / getattr(net[int(layer)], f"{kind}_gain", 1)
    features, directions = draw(1, 3, 64, first.shape[1]), F.normalize(draw(1, 64, 3), dim=-1)
    w1, b1, w2, b2 = _effective(net, weights)
    y = F.linear(F.softplus(F.linear(features.mean(1), w1, b1)), w2, b2)
    wanted = {"rgb": y[..., 1:].sigmoid() * 1.002 - 0.001, "sigma": y[..., :1]}
    inside = {f"net.{name}": x for name, x in weights.items()}
    try:
        got = torch.func.functional_call(decoder, inside, (features, directions))
        return all(torch.allclose(got[k].to(v), v, rtol=1e-3, atol=1e-3) for k, v in wanted.items())
    except Exception:  # whatever keeps it from being called so
        return False


MODULES = {
    "renderer": named(ImportanceRenderer, sample_from_planes, generate_planes, project_onto_planes),
    "ray_marcher": named(MipRayMarcher2),
}
EXPORTS = {}
