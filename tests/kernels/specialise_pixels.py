"""How the presets launch q_sample, noise_mse, reverse_step and timestep_embedding (see `compile_all`)."""

from dataclasses import replace
from itertools import product

import triton
from compile_all import Specialisation

from ddpm_fast.config import PRESETS
from ddpm_fast.kernels.noise_mse import noise_mse_backward_kernel, noise_mse_kernel, noise_mse_mean_kernel
from ddpm_fast.kernels.pixel_tiles import tile_pixels
from ddpm_fast.kernels.q_sample import q_sample_kernel
from ddpm_fast.kernels.reverse_step import reverse_step_kernel
from ddpm_fast.kernels.timestep_embedding import timestep_embedding_kernel

SHAPES = sorted({(p.unet.image_channels, p.unet.height, p.unet.width) for p in PRESETS.values()})
LOOKUPS = {"t_ptr": "*i64", "table_ptr": "*fp32", "key_ptr": "*i64", "sample_index_ptr": "*i64"}
ODD = ("T", "K", "W", "tiles", "elements", "N")
MAX_REGISTERS = 128  # 4 blocks of 4 warps a multiprocessor at the least: enough loads in flight for its bandwidth


def sizes(C: int, H: int, W: int) -> tuple[dict[str, str], dict[str, object], int]:
    """Return the integers of a launch, its constants, and its warps; an integer that is 1 is a constant."""
    BLOCK, warps = tile_pixels(C, H * W)
    tiles = triton.cdiv(H * W, BLOCK)
    constants: dict[str, object] = {"C": C, "BLOCK": BLOCK, **({"tiles": 1} if tiles == 1 else {})}
    return {"HW": "i32", "W": "i32", "T": "i32", "K": "i32", "tiles": "i32"}, constants, warps


def bulk_bytes(C: int, H: int, W: int, element_bytes: int) -> int:
    """Return what a thread's places fill, at most 16 bytes."""
    BLOCK, warps = tile_pixels(C, H * W)
    return min(16, BLOCK * C // (32 * warps) * element_bytes)


def training(C: int, H: int, W: int, dtype: str, images: str, images_nhwc: bool) -> list[Specialisation]:
    """Return the training kernels at one shape."""
    integers, constants, warps = sizes(C, H, W)
    layout = {"MIRROR": C == 3, "NHWC": True, "IMAGES_NHWC": images_nhwc}
    what = f"{C}x{H}x{W} {dtype}, images {images}{' NHWC' if images_nhwc else ' NCHW'}"
    wide = bulk_bytes(C, H, W, 4 if dtype == "fp32" else 2)
    shared = {**LOOKUPS, **integers, "images_ptr": f"*{images}"}
    loss = {**shared, "partial_ptr": "*fp32", "prediction_ptr": f"*{dtype}"}
    gradient = {**loss, "grad_ptr": "*fp32", "grad_prediction_ptr": f"*{dtype}", "elements": "i32"}
    constants = {**constants, **layout}
    return [
        Specialisation(
            f"q_sample {what}", q_sample_kernel, {**shared, "x_t_ptr": f"*{dtype}"}, constants, ODD, warps,
            store_bytes=wide, max_registers=MAX_REGISTERS,
        ),
        Specialisation(
            f"noise_mse {what}", noise_mse_kernel, loss, constants, ODD, warps,
            load_bytes=wide, max_registers=MAX_REGISTERS,
        ),
        Specialisation(
            f"noise_mse_backward {what}", noise_mse_backward_kernel, gradient, constants, ODD, warps,
            load_bytes=wide, store_bytes=wide, max_registers=MAX_REGISTERS,
        ),
    ]  # fmt: skip


def sampling(C: int, H: int, W: int, dtype: str, noisy: bool, multistep: bool) -> Specialisation:
    """Return reverse_step at one shape; in float32 the U-Net reads x itself."""
    integers, constants, warps = sizes(C, H, W)
    pointers = {"x_ptr": "*fp32", "out_ptr": f"*{dtype}", "rows_ptr": "*fp32", "step_ptr": "*i64", **LOOKUPS}
    constants.update({"CLIP": True, "NOISY": noisy, "NHWC": True})
    for name, there, kind in (("x0_ptr", multistep, "fp32"), ("model_input_ptr", dtype != "fp32", dtype)):
        pointers.update({name: f"*{kind}"} if there else {})
        constants.update({} if there else {name: None})
    what = f"{C}x{H}x{W} {dtype}{', noise' if noisy else ''}{', x0' if multistep else ''}"
    wide, narrow = bulk_bytes(C, H, W, 4), bulk_bytes(C, H, W, 4 if dtype == "fp32" else 2)
    return Specialisation(
        f"reverse_step {what}", reverse_step_kernel, {**pointers, **integers}, constants, ODD, warps,
        load_bytes=wide, store_bytes=narrow, max_registers=MAX_REGISTERS,
    )  # fmt: skip


SPECIALISATIONS = [
    *(
        wanted
        for (shape, dtype, nhwc) in product(SHAPES, ("fp32", "bf16"), (True, False))
        if nhwc or shape[0] > 1  # one channel: both layouts are one
        for wanted in training(*shape, dtype, "u8", nhwc)
    ),
    *(
        sampling(*shape, dtype, noisy, multistep)
        for shape, dtype in product(SHAPES, ("fp32", "bf16"))
        for noisy, multistep in ((True, False), (False, True))
    ),
    Specialisation(
        "noise_mse_mean", noise_mse_mean_kernel,
        {"loss_ptr": "*fp32", "partial_ptr": "*fp32", **LOOKUPS, "elements": "i32", "T": "i32", "tiles": "i32"},
        {}, ODD, 1,
    ),
    *(
        Specialisation(
            f"timestep_embedding {t}", timestep_embedding_kernel,
            {"embedding_ptr": "*fp32", "t_ptr": f"*{t}", "N": "i32", "half": "i32"}, {}, ODD,
        )
        for t in ("i64", "fp32")
    ),
]  # fmt: skip

# A kernel that must spill: what finds no spills elsewhere finds these.
PLANTED = [
    replace(wanted, name="planted spill", options={"maxnreg": 24})
    for wanted in SPECIALISATIONS
    if wanted.name == "q_sample 3x32x32 fp32, images u8 NHWC"
]
