"""Known schedulers: which noise a base model was trained with, by its scheduler's class and settings.

All that are known preserve variance and are discrete: x_t = sqrt(a_t) x + sqrt(1 - a_t) e, with a_t the product of
1 - beta up to t (Ho et al. 2006.11239, eq. 4), whatever the betas. Others are refused: an adapter that is trained on
noise which its base model never saw learns nothing, and no error would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ip_adapter_trainer.core.errors import Problem, did_you_mean, first_line
from ip_adapter_trainer.core.settings import Part, Resume

PREDICTIONS = ("epsilon", "v_prediction", "sample")
KNOWN = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
        "UniPCMultistep",
    )
)  # fmt: skip
# Settings that change the noise itself, with the values that leave it as it is; an absent one leaves it too.
_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "use_flow_sigmas": (False,),  # flow matching in the classes of DPM++, UniPC and DEIS
    "timestep_type": ("discrete",),  # continuous: EDM's noise in the class of Euler
    "sigma_data": (),  # EDM
    "snr_shift_scale": (1.0,),  # CogVideoX
    "shift": (1.0,),  # flow matching
    "use_dynamic_shifting": (False,),  # flow matching
    "predict_epsilon": (True,),  # from before `prediction_type`
    "rescale_betas_zero_snr": (True, False),
}
_FLOW = ("flow_prediction", "flow")
_REMEDY = (
    "take a base model whose scheduler is DDPM, DDIM, PNDM, Euler or one of their kind; if this one was trained with "
    "their noise, correct its scheduler/scheduler_config.json and model_index.json"
)


class NoiseConfig(Part):
    """Settings of the base model's noise, where its scheduler does not say it rightly."""

    group = "Objective"
    resume = Resume(must_match="prediction_type rescale_betas_zero_snr")

    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        "auto", description="epsilon, v_prediction or sample; auto: as the base model's scheduler says."
    )
    rescale_betas_zero_snr: bool = Field(
        False,
        description="The base model was trained with zero terminal SNR (arXiv 2305.08891); without the flag: as its "
        "scheduler says.",
    )

    def overrides(self) -> dict[str, Any]:
        """Return the scheduler settings that these stand for; empty where none is overruled."""
        prediction = {} if self.prediction_type == "auto" else {"prediction_type": self.prediction_type}
        return prediction | ({"rescale_betas_zero_snr": True} if self.rescale_betas_zero_snr else {})


def make_scheduler(kind: str, config: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Any:
    """Return the base model's scheduler, of the class that model_index.json names, with settings overruled.

    A zero terminal SNR brings the timesteps that it needs.

    Raises:
        Problem: noise that is not known, or settings that contradict each other.
    """
    import diffusers

    _demand_known(kind, config, where)
    if overrides.get("rescale_betas_zero_snr") and not config.get("rescale_betas_zero_snr"):
        overrides = {**overrides, "timestep_spacing": "trailing"}  # sampling begins at the last timestep (section 3.3)
    settings = {**config, **overrides}
    try:
        scheduler: Any = getattr(diffusers, kind).from_config(settings)
        if not len(scheduler.betas) or not bool(((scheduler.betas >= 0) & (scheduler.betas <= 1)).all()):
            raise ValueError("no betas, or some outside of 0 to 1")
    except ImportError as error:  # a dummy of diffusers, in place of a class whose library is not installed
        what = f"the base model's {kind} needs another library: {first_line(error)}"
        raise Problem(what, where=where, remedy="pip install scipy torchsde") from error
    except (NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        what = f"the base model's {kind} has settings that are not known: {first_line(error)}"
        raise Problem(what, where=where, remedy=_REMEDY) from error
    _demand_prediction(scheduler.config, settings, where)
    return scheduler


def _demand_known(kind: str, config: Mapping[str, Any], where: str) -> None:
    said = config.get("_class_name") or kind
    for name in dict.fromkeys((kind, *(said if isinstance(said, list) else [said]))):
        if name not in KNOWN:
            noise = " (EDM)" if "EDM" in str(name) else " (flow matching)" if "Flow" in str(name) else ""
            what = f"the base model's scheduler is {name}{noise}, which is not trained here"
            raise Problem(what, where=where, remedy=_REMEDY)
    if config.get("prediction_type") in _FLOW:
        what = f"the base model's scheduler has prediction_type {config['prediction_type']} (flow matching)"
        what += ", which is not trained here"
        raise Problem(what, where=where, remedy=_REMEDY)
    for key, harmless in _HARMLESS.items():
        value = config.get(key)
        if value is not None and value not in harmless:
            what = f"the base model's scheduler has {key} {value!r}: another noise process, which is not trained here"
            raise Problem(what, where=where, remedy=_REMEDY)


def _demand_prediction(config: Any, settings: Mapping[str, Any], where: str) -> None:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        remedy = f"give --prediction_type; {did_you_mean(str(prediction), PREDICTIONS)}"
        raise Problem(f"unknown prediction type {prediction!r}", where=where, remedy=remedy)
    if prediction == "epsilon" and settings.get("rescale_betas_zero_snr"):
        what = "with zero terminal SNR the last timestep is noise alone, and predicting it (epsilon) says nothing"
        remedy = "give --prediction_type v_prediction if the base model predicts v, as such models do"
        raise Problem(what, where=where, remedy=remedy)
