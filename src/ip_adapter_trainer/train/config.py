"""Settings of the training run, part by part. Field names are flag names; published and diffusers' names are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ip_adapter_trainer.core.settings import Part, Resume, alias
from ip_adapter_trainer.diffusion import ObjectiveConfig
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.loading.config import FrozenConfig
from ip_adapter_trainer.nn.choices import Compile, Storage
from ip_adapter_trainer.prepare.config import SetConfig

# Defaults of the published scripts, which the scripts of the same names here take too.
PUBLISHED: dict[str, Any] = {
    "optimizer": "adamw", "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0,
    "timestep_density": "uniform",
}  # fmt: skip
_PROJECTOR_BY_MUON = 10  # its rate over that of the layers (docs/recipes.md)


class ModelConfig(FrozenConfig):
    """Settings of the frozen models and of the adapter."""

    resume = Resume(of_state="adapter_layers layout", free="pretrained_ip_adapter_path")

    pretrained_ip_adapter_path: str | None = Field(
        None,
        description="Adapter file (.bin or .safetensors) or checkpoint to start from; every shape is checked. "
        "Not read on resuming.",
    )
    adapter_layers: tuple[str, ...] = Field(
        ("all",),
        min_length=1,
        description="Layers that carry an adapter: all, up, for SDXL style or layout, or beginnings of layers' names.",
    )
    layout: str | None = Field(
        None,
        description="Where the adapter sits in the denoiser: unet; unet_lora, with low-rank deltas on every attention "
        "layer too, which only diffusers reads; None: the first that variant and base model list.",
    )


class MemoryConfig(Part):
    """Settings that fit a run into a card's memory."""

    group = "Memory and speed"
    resume = Resume(may_change="quantize gradient_checkpointing", free="low_memory")

    low_memory: Literal[8, 12, 24] | None = Field(
        None, description="GB of a small card: settings that fit it become the defaults of other flags."
    )
    quantize: Storage = Field(
        "none", description="How the frozen denoiser keeps its weights: as loaded, int8, or nf4 (4 bits; extra bnb)."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute the denoiser's activations: less memory, slower."
    )


class SourceConfig(SetConfig):
    """Settings of the source of latents and image features."""

    resume = Resume(may_change="prepare")

    prepare: Literal["off", "auto"] | None = Field(
        None,
        description="auto: prepare the set first where that pays, in prepared_dir or output_dir/prepared; "
        "None: auto, unless prepared_dir is given.",
    )


class LeanConfig(Part):
    """Settings of the frozen denoiser's computation; they change its results by rounding only."""

    group = "Memory and speed"
    resume = Resume(may_change="compile lean_layers product_convolutions channels_last")

    compile: Compile = Field(
        "off",
        description="Compile the denoiser's blocks by torch.compile, in place of lean_layers; reduce-overhead: "
        "replayed as CUDA graphs, for small batches.",
    )
    lean_layers: bool = Field(
        True, description="Frozen layers keep for the backward pass only what their input's gradient needs."
    )
    product_convolutions: bool = Field(
        True,
        description="Lean layers on a CPU, channels-last: convolutions over few positions as matrix products.",
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        "auto", description="Channels-last weights in the denoiser; auto: where the frozen weights are bf16 or fp16."
    )


class OptimConfig(Part):
    """Settings of the optimizer, and the length of the run."""

    group = "Optimizer"
    resume = Resume(
        must_match="seed",
        of_state="optimizer use_8bit_adam use_ema",
        may_change="learning_rate projector_learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon "
        "fused_optimizer max_grad_norm gradient_accumulation_steps num_train_epochs max_train_steps lr_scheduler "
        "lr_warmup_steps lr_num_cycles lr_power ema_decay",
    )

    optimizer: Literal["adamw", "muon", "muon_all"] | None = Field(
        None,
        description="muon: the projector's matrices by Muon, all else by AdamW; muon_all: the layers' matrices too, "
        "which costs time where few images make a step; None: muon, on resuming the run's own.",
    )
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate.")
    projector_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the projector; None: ten times learning_rate by Muon, else learning_rate.",
    )
    weight_decay: float = Field(1e-2, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    use_8bit_adam: bool = Field(False, description="8-bit AdamW of bitsandbytes (pip install ip_adapter_trainer[bnb]).")
    fused_optimizer: bool = Field(
        True, description="AdamW in one kernel; off: as PyTorch chooses, and a GPU is waited for before each update."
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro batches summed for one optimizer step.")
    num_train_epochs: int = Field(100, ge=1, description="Passes over the rows, unless max_train_steps is given.")
    max_train_steps: int | None = Field(None, ge=1, description="Optimizer steps to train, whatever the epochs.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant_with_warmup", description="Shape of the learning rate over the run.")
    lr_warmup_steps: int | None = Field(
        None,
        ge=0,
        description="Steps of linear warm-up; needs a schedule that warms up. None: a tenth of the run, 500 at most; "
        "on resuming, as many as before.",
    )
    lr_num_cycles: int = Field(1, ge=1, description="Restarts of cosine_with_restarts.")
    lr_power: float = Field(1.0, gt=0, description="Power of the polynomial schedule.")
    use_ema: bool = Field(False, description="Keep an exponential moving average; checkpoints then publish it.")
    ema_decay: float = Field(0.9999, gt=0, lt=1, description="Decay of the average.")
    seed: int = Field(0, description="Seed of every random draw: order, crops, drops, noise, timesteps, first weights.")

    @property
    def projector_rate(self) -> float:
        """The projector's peak learning rate."""
        factor = 1 if self.optimizer == "adamw" else _PROJECTOR_BY_MUON
        return self.projector_learning_rate or factor * self.learning_rate


class CheckpointConfig(Part):
    """Settings of saving and resuming the run."""

    group = "Checkpoint"
    resume = Resume(free="output_dir save_steps checkpoints_total_limit resume_from_checkpoint accept_changed")

    output_dir: str = Field(
        "sd-ip_adapter", description="Folder for checkpoints, metrics, grids and the resolved config."
    )
    save_steps: Annotated[int, alias("checkpointing_steps")] = Field(
        2000, ge=1, description="Optimizer steps between checkpoints; one is always written at the end and on a stop."
    )
    checkpoints_total_limit: int | None = Field(
        None, ge=1, description="Keep this many whole ones; those in set-aside folders are not counted and stay."
    )
    resume_from_checkpoint: Annotated[str | None, alias("resume")] = Field(
        None,
        description="'latest' (start afresh if there is none), the path of a checkpoint-N folder, or its name in "
        "output_dir. Checkpoints there that do not lead to it are set aside, not removed.",
    )
    accept_changed: tuple[str, ...] = Field(
        (),
        description="On resuming, what must match and may differ nevertheless: names of settings, 'rows', 'models'. "
        "Each difference is told and kept in the checkpoints.",
    )

    @field_validator("accept_changed")
    @classmethod
    def _current(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Return the settings' present names; earlier ones may be given."""
        return tuple(cls.current_names(dict.fromkeys(value)))


class TrackConfig(Part):
    """Settings of logs and trackers."""

    resume = Resume(free="logging_dir report_to tracker_project_name logging_steps local_rank dry_run")

    logging_dir: str = Field("logs", description="Folder for tracker files, under output_dir.")
    report_to: str = Field(
        "tensorboard",
        description="Trackers by accelerate's names, as tensorboard,wandb; all: those that are installed; or none.",
    )
    tracker_project_name: str = Field("ip_adapter", description="Project name given to the tracker.")
    logging_steps: int = Field(10, ge=1, description="Steps between reports to tracker, progress bar and metrics file.")
    local_rank: int = Field(-1, description="Process number for launchers that pass a flag instead of LOCAL_RANK.")
    dry_run: bool = Field(False, description="Print parameters, steps and sizes on disk; train nothing.")


class TrainConfig(
    TrackConfig,
    ValidationConfig,
    CheckpointConfig,
    OptimConfig,
    ObjectiveConfig,
    SourceConfig,
    DataConfig,
    LeanConfig,
    MemoryConfig,
    ModelConfig,
):
    """Every setting of a run but those of its variant and family, which `config.compose` adds.

    Fields come in the order of the bases from the last to the first: in the help, what a user must give stands first.
    """

    def images_per_step(self, world: int) -> int:
        """Return the number of images of one optimizer step, over `world` processes and all micro-batches."""
        return self.micro_images * world * self.gradient_accumulation_steps
