"""Grouped stitches: all linear maps of one geometry class applied at once.

Shape suffixes used here and in the engine:
    K stitches, B images of the mini-batch, N images in memory, S sender positions of one shape,
    H W C sender height, width, channels; P Q D receiver height, width, channels;
    F features of a stitch's GEMM: C for equal sizes and upsampling, k*k*C, ordered (ky, kx, c), for
    downsampling by k;  M rows of that GEMM.

Three names carry a stitch's geometry: ``down`` = k (conv k x k, stride k), ``up`` = u (nearest upsample by u,
then conv 1x1); both are 1 for equal sizes and at most one of them is larger.
"""

from typing import Any

if __name__ == "kernels":
    # in a checkout other libraries find this folder when they look for a package of that name, and ask its version
    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "this folder is the package fastsitch.kernels; a bare 'kernels' is another project's name: "
            "import fastsitch.kernels instead"
        )

else:
    from fastsitch.kernels.dispatch import KERNELS, resolve_kernel
    from fastsitch.kernels.ops import grouped_stitch, stitch_functions, stitch_grad, stitch_out
    from fastsitch.kernels.reference import grouped_stitch_reference
    from fastsitch.kernels.torch_path import space_to_depth

__all__ = [
    "KERNELS",
    "grouped_stitch",
    "grouped_stitch_reference",
    "resolve_kernel",
    "space_to_depth",
    "stitch_functions",
    "stitch_grad",
    "stitch_out",
]
