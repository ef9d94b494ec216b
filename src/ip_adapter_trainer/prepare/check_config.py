"""Settings of `ip-adapter check`: those of training that decide what is read, and how many faults are too many."""

from __future__ import annotations

from pydantic import Field

from ip_adapter_trainer.cache.config import BucketConfig
from ip_adapter_trainer.images.buckets import Buckets
from ip_adapter_trainer.loading.config import FoundConfig
from ip_adapter_trainer.manifest.config import HELD_OUT_SHARE


class RowsCheckConfig(BucketConfig):
    """Read every row and image of a training set and list the faults, under the data settings of its training."""

    validation_share: float = Field(
        HELD_OUT_SHARE, ge=0, le=0.5, description="As in training: rows that are held out stand in for no faulty one."
    )
    resolution: int = Field(
        0, ge=0, le=16384, description="Count the images that training at this resolution enlarges; 0: do not."
    )
    show_faults: int = Field(20, ge=0, description="Faults printed one by one; the rest are counted.")

    def buckets(self) -> Buckets:
        """Return the sizes that training images are cut to, at training's own resolution where none is given."""
        usual = {} if self.resolution else {"resolution": BucketConfig.model_fields["resolution"].default}
        return BucketConfig.buckets(self.model_copy(update=usual))


class CheckConfig(RowsCheckConfig, FoundConfig):
    """Read every row and image of a training set and list the faults."""

    pretrained_model_name_or_path: str | None = Field(
        None, description="Base model, of which the tokenizers alone are read: captions that it would cut are counted."
    )
