"""The forward process and the sampler in the words of diffusers' schedulers, both ways.

Every field of a scheduler's configuration is honoured, or refused by its name: a scheduler that is nearly the same
would make images that are nearly right.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ddpm_fast.config import DiffusionConfig, Prediction, SamplerConfig, SamplerName, Variance
from ddpm_fast.diffusion.schedule import betas, sigmoid_betas
from ddpm_fast.errors import InputError, require

SAMPLERS: dict[str, SamplerName] = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
}
STEPS: dict[SamplerName, int] = {"ddpm": 0, "ddim": 50, "dpm++": 20}
"""How many a sampler takes that comes without a number: all of the paper's, DDIMPipeline's default, and our own."""
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES: dict[str, Variance] = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "thresholding": False,
    "sample_max_value": 1.0,
    "steps_offset": 0,
}
"""Defaults of the fields that all three schedulers have."""
CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}
DEFAULTS: dict[SamplerName, dict[str, Any]] = {
    "ddpm": {**COMMON, **CLIPPING, "timestep_spacing": "leading", "variance_type": "fixed_small"},
    "ddim": {**COMMON, **CLIPPING, "timestep_spacing": "leading"},
    "dpm++": {**COMMON, "timestep_spacing": "linspace"},
}
EVERY = {"rescale_betas_zero_snr": (False,), "predict_epsilon": (True, None), "timestep_values": (None,)}
"""Values that are honoured of any scheduler's other fields; the last two are of old versions."""
ONLY: dict[SamplerName, dict[str, tuple[Any, ...]]] = {
    "ddpm": EVERY,
    "ddim": {**EVERY, "set_alpha_to_one": (True,)},
    "dpm++": {
        **EVERY,
        "solver_order": (2,),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
        "lambda_min_clipped": (-math.inf, "-inf", None),
        "variance_type": (None, "fixed_small", "fixed_large"),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False,),
    },
}
"""Values that are honoured of a scheduler's own fields."""
MEANINGLESS = {"dynamic_thresholding_ratio", "tensor_format", "skip_prk_steps", "clip_sample_range", "clip_sample"}
"""Fields that change nothing where those above are honoured: clipping's are DPM-Solver's no more."""
OF_DPM_SOLVER = {"lower_order_final", "euler_at_final", "flow_shift", "time_shift_type"}
"""As above: to a clean image the last step is of first order anyway, and nothing is shifted."""


FIELDS = {"--timesteps": "num_train_timesteps", "--beta-start": "beta_start", "--beta-end": "beta_end"}


def process_and_sampler(values: Mapping[str, Any], where: str) -> tuple[DiffusionConfig, SamplerConfig]:
    """Translate a scheduler's configuration.

    One thing stays ours: no noise is added in the last step. DDPMScheduler adds some to the image that it ends on where
    trailing timesteps are fewer than T, which is next to none but for fixed_large.

    Args:
        values: the fields of its scheduler_config.json.
        where: the file, for messages.

    Raises:
        InputError: it is another scheduler, or a field's value cannot be honoured; the field is named.
    """
    kind = values.get("_class_name", "DDPMScheduler")
    require(kind in SAMPLERS, f"{where}: {kind} is none of {', '.join(SAMPLERS)}")
    name = SAMPLERS[kind]
    known = {*DEFAULTS[name], *ONLY[name], *MEANINGLESS, *(OF_DPM_SOLVER if name == "dpm++" else ())}
    refuse_others(values, known, ONLY[name], where)
    given = DEFAULTS[name] | dict(values)
    spacing = given["timestep_spacing"]
    require(spacing in ("leading", "trailing", "linspace"), f"{where}: timestep_spacing is {spacing!r}")
    offset = given["steps_offset"]
    message = f"{where}: steps_offset is {offset}: with leading timesteps only 0 can be honoured"
    require(spacing != "leading" or offset == 0, message)
    message = f"{where}: timestep_spacing is 'linspace': DDIMScheduler then skips to timesteps that it never visits"
    require((name, spacing) != ("ddim", "linspace"), f"{message}; set 'leading' or 'trailing'")
    prediction, variance = given["prediction_type"], given.get("variance_type") if name == "ddpm" else "fixed_small"
    known = f"only {', '.join(PREDICTIONS)} can be honoured"
    require(prediction in PREDICTIONS, f"{where}: prediction_type is {prediction!r}: {known}")
    known = f"only {', '.join(VARIANCES)} can be honoured"
    require(variance in VARIANCES, f"{where}: variance_type is {variance!r}: {known}")
    try:
        diffusion = DiffusionConfig(
            timesteps=given["num_train_timesteps"],
            **_schedule(given, where),
            prediction=PREDICTIONS[prediction],
            variance=VARIANCES[str(variance)],
            clip=_clips(name, given, where),
        )
    except InputError as error:
        raise in_their_words(error, FIELDS, where) from None
    return diffusion, SamplerConfig(name, min(STEPS[name], diffusion.timesteps), spacing=spacing)


def refuse_others(values: Mapping[str, Any], known: set[str], only: Mapping[str, Sequence[Any]], where: str) -> None:
    """Refuse fields that are not known, or of other values than the only ones that are honoured."""
    for field, value in values.items():
        require(field.startswith("_") or field in known, f"{where}: {field} is {value!r}: this field is not known here")
        honoured = only.get(field, (value,))
        expected = " or ".join(map(repr, honoured))
        require(value in honoured, f"{where}: {field} is {value!r}: only {expected} can be honoured")


def in_their_words(error: InputError, fields: Mapping[str, str], where: str) -> InputError:
    """Return what our configuration refuses with diffusers' names of the fields in place of our flags'."""
    message = str(error)
    for own, theirs in fields.items():
        message = message.replace(own, theirs)
    return InputError(f"{where}: {message}")


def _clips(name: SamplerName, given: Mapping[str, Any], where: str) -> bool:
    """Return whether x0 is clipped to [-1, 1]: as such, or by a threshold that is never above 1."""
    if given["thresholding"]:
        most = given["sample_max_value"]
        message = f"{where}: thresholding is true with sample_max_value {most}: only 1.0, which clips, can be honoured"
        require(most == 1, message)
        return True
    if name == "dpm++" or not given["clip_sample"]:
        return False
    most = given["clip_sample_range"]
    require(most == 1, f"{where}: clip_sample_range is {most}: only 1.0 can be honoured")
    return True


def _schedule(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    trained, schedule = given["trained_betas"], given["beta_schedule"]
    if trained is not None:
        total = given["num_train_timesteps"]
        numbers = isinstance(trained, list | tuple) and len(trained) == total and {*map(type, trained)} == {float}
        found = torch.tensor(trained if numbers else [0.0], dtype=torch.float64)
        ours = numbers and torch.allclose(found, sigmoid_betas(total), rtol=1e-6, atol=1e-9)
        require(ours, f"{where}: trained_betas are a schedule of their own, of which none can be honoured")
        return {"schedule": "sigmoid"}
    if schedule == "squaredcos_cap_v2":
        return {"schedule": "cosine"}
    message = f"{where}: beta_schedule is {schedule!r}: only 'linear' or 'squaredcos_cap_v2' can be honoured"
    if schedule == "sigmoid":
        message += "; theirs is another sigmoid than ours"
    require(schedule == "linear", message)
    return {"schedule": "linear", "beta_start": given["beta_start"], "beta_end": given["beta_end"]}


def scheduler_fields(diffusion: DiffusionConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """Return the fields of the scheduler that samples so; the number of steps and eta are told to its pipeline.

    Raises:
        InputError: no scheduler visits these timesteps.
    """
    skips = (sampler.sampler, sampler.spacing) == ("ddim", "linspace")
    require(not skips, "DDIMScheduler does not go from one linspace timestep to the next: there is no equal of it")
    cosine, linear = diffusion.schedule == "cosine", diffusion.schedule == "linear"
    prediction = next(theirs for theirs, ours in PREDICTIONS.items() if ours == diffusion.prediction)
    fields: dict[str, Any] = {
        "_class_name": next(theirs for theirs, ours in SAMPLERS.items() if ours == sampler.sampler),
        "num_train_timesteps": diffusion.timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if cosine else "linear",
        "trained_betas": None if linear or cosine else betas(diffusion).tolist(),
        "prediction_type": prediction,
        "timestep_spacing": sampler.spacing,
    }
    if sampler.sampler == "dpm++":  # which knows thresholds only: one that is never above 1 clips
        clipping = {"thresholding": diffusion.clip, "sample_max_value": 1.0}
        return fields | {"algorithm_type": "dpmsolver++", "solver_order": 2, **clipping}
    fields |= {"clip_sample": diffusion.clip, "clip_sample_range": 1.0}
    return fields | ({"variance_type": f"fixed_{diffusion.variance}"} if sampler.sampler == "ddpm" else {})
