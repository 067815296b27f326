"""The U-Net in diffusers' words: which UNet2DModel is ours, and what its parameters were called before.

Parameters are named as diffusers names them. Only the configuration must be translated, and what our U-Net cannot
express is refused by its name: a network that is nearly the same would make images that are nearly right.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.config import Details, UNetConfig
from ddpm_fast.diffusion.convert import in_their_words, refuse_others
from ddpm_fast.errors import InputError, require

DETAILS: dict[Details, dict[str, Any]] = {
    "paper": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "diffusers": {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5},
}
"""The two sets of four that our U-Net knows; the second are the defaults of UNet2DModel."""
DEFAULTS: dict[str, Any] = {
    **DETAILS["diffusers"],
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
"""Of UNet2DModel, where a field may be left out."""
ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Fields of which our U-Net is one value, UNet2DModel's default."""
READ = {"sample_size", "block_out_channels", "down_block_types", "up_block_types", "time_embedding_dim"}
READ |= {"num_class_embeds"}
MEANINGLESS = {"num_train_timesteps"}
"""Fields that change nothing about a positional time embedding."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the attention's layers were called before diffusers 0.14, and are in many a published file."""

FIELDS = {
    "--image-channels": "in_channels",
    "--height": "sample_size",
    "--width": "sample_size",
    "--channel-multipliers": "block_out_channels",
    "--channels": "block_out_channels",
    "--res-blocks": "layers_per_block",
    "--dropout": "dropout",
    "--groups": "norm_num_groups",
    "--head-channels": "attention_head_dim",
    "--num-classes": "num_class_embeds",
}
"""Which field sets which of our flags."""


def unet_config(values: Mapping[str, Any], where: str) -> UNetConfig:
    """Translate a UNet2DModel's configuration.

    Every row of a class embedding is taken for a class: nothing in diffusers' files says that one is "no label".

    Args:
        values: the fields of its config.json.
        where: the file, for messages.

    Raises:
        InputError: our U-Net cannot express a field's value; the field is named.
    """
    refuse_others(values, {*DEFAULTS, *ONLY, *READ, *MEANINGLESS}, ONLY, where)
    given = DEFAULTS | dict(values)
    widths, attends = _widths(given, where), _attends(given, where)
    height, width = _sides(given, where)
    same = given["in_channels"] == given["out_channels"]
    channels = f"in_channels {given['in_channels']} and out_channels {given['out_channels']}"
    require(same, f"{where}: {channels} differ: our U-Net predicts as many channels as an image has")
    embedding = given.get("time_embedding_dim")
    message = f"{where}: time_embedding_dim is {embedding}: our U-Net's is 4 * {widths[0]}"
    require(embedding in (None, 4 * widths[0]), message)
    try:
        return UNetConfig(
            image_channels=given["in_channels"],
            height=height,
            width=width,
            channels=widths[0],
            channel_multipliers=tuple(one // widths[0] for one in widths),
            res_blocks=given["layers_per_block"],
            attention_resolutions=tuple(height >> level for level, attention in enumerate(attends) if attention),
            dropout=given["dropout"],
            groups=given["norm_num_groups"],
            head_channels=given["attention_head_dim"] or 0,
            details=_details(given, where),
            num_classes=_classes(given, where),
        )
    except InputError as error:
        raise in_their_words(error, FIELDS, where) from None


def _sides(given: Mapping[str, Any], where: str) -> tuple[int, int]:
    sides = given.get("sample_size")
    both: list[Any] = list(sides) if isinstance(sides, list | tuple) else [sides, sides]
    numbers = len(both) == 2 and all(type(side) is int and side > 0 for side in both)
    require(numbers, f"{where}: sample_size is {sides!r}: it must say the height and width in pixels")
    return both[0], both[1]


def _classes(given: Mapping[str, Any], where: str) -> int:
    rows = given.get("num_class_embeds")
    whole = rows is None or (type(rows) is int and rows > 0)
    require(whole, f"{where}: num_class_embeds is {rows!r}: it must be a positive whole number, or null")
    return rows or 0


def _widths(given: Mapping[str, Any], where: str) -> list[int]:
    widths = given.get("block_out_channels")
    numbers = isinstance(widths, list | tuple) and len(widths) > 0 and all(type(n) is int and n > 0 for n in widths)
    require(numbers, f"{where}: block_out_channels is {widths!r}: it must be given, as numbers of channels")
    assert widths
    multiples = all(width % widths[0] == 0 for width in widths)
    require(multiples, f"{where}: block_out_channels {widths}: each must be a multiple of the first")
    return list(widths)


def _attends(given: Mapping[str, Any], where: str) -> list[bool]:
    """Return which levels attend, from the blocks' types on both ways."""
    both = []
    for way, kinds in (("down_block_types", ("DownBlock2D", "AttnDownBlock2D")),
                       ("up_block_types", ("UpBlock2D", "AttnUpBlock2D"))):  # fmt: skip
        blocks = given.get(way)
        require(isinstance(blocks, list | tuple), f"{where}: {way} is {blocks!r}: it must be given")
        for block in blocks or ():
            require(block in kinds, f"{where}: {way} has {block!r}: only {' or '.join(kinds)} can be honoured")
        both.append([block == kinds[1] for block in blocks or ()])
    down, up = both
    message = f"{where}: up_block_types attend at other levels than down_block_types: ours attend at the same"
    require(down == up[::-1], message)
    levels = len(given["block_out_channels"])
    require(len(down) == levels, f"{where}: {len(down)} down_block_types for {levels} block_out_channels")
    return down


def _details(given: Mapping[str, Any], where: str) -> Details:
    """Return which of the two sets of small settings it is."""
    for name, settings in DETAILS.items():
        if all(given[field] == value for field, value in settings.items()):
            return name
    near = max(DETAILS.values(), key=lambda settings: sum(given[field] == value for field, value in settings.items()))
    off = [f"{field} is {given[field]!r}, not {value!r}" for field, value in near.items() if given[field] != value]
    rest = [f"{field} {value!r}" for field, value in near.items() if given[field] == value]
    meant = "these four are known as the paper's or as diffusers' defaults"
    raise InputError(f"{where}: {', '.join(off)}, beside {', '.join(rest)}: {meant}")


def unet_fields(config: UNetConfig) -> dict[str, Any]:
    """Return the fields of the UNet2DModel that is this U-Net; all but those with one value only."""
    levels = range(len(config.channel_multipliers))
    attends = [(config.height >> level) in config.attention_resolutions for level in levels]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.height if config.height == config.width else [config.height, config.width],
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "block_out_channels": [config.channels * multiplier for multiplier in config.channel_multipliers],
        "down_block_types": ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "layers_per_block": config.res_blocks,
        "attention_head_dim": config.head_channels or None,
        "norm_num_groups": config.groups,
        "dropout": config.dropout,
        **DETAILS[config.details],
        **({"num_class_embeds": config.classes + 1} if config.classes else {}),  # the last row: no label
    }


def with_no_label(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Append to a class embedding whose rows are all classes a row of zeros for "no label": the time's is left alone.

    It only makes the shape ours: the network was never trained by it, so nothing may be predicted by it.
    """
    found = dict(tensors)
    if (rows := found.get("class_embedding.weight")) is not None:
        found["class_embedding.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])])
    return found


def new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a UNet2DModel's parameters by their names of today, in float32."""
    found = {}
    for name, tensor in tensors.items():
        block, _, rest = name.rpartition(".attentions.")
        number, _, parameter = rest.partition(".")
        layer, _, kind = parameter.rpartition(".")
        if block and layer in OLD_ATTENTION:
            name = f"{block}.attentions.{number}.{OLD_ATTENTION[layer]}.{kind}"
        found[name] = tensor.float()
    return found
