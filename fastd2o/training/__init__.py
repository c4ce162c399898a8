"""Training: a configuration, and a Trainer of Hugging Face that knows the objectives of this package."""

from fastd2o.training.checkpoints import check_output_dir
from fastd2o.training.config import PreferenceConfig
from fastd2o.training.objectives import OBJECTIVES, Objective
from fastd2o.training.trainer import PreferenceTrainer

__all__ = ["OBJECTIVES", "Objective", "PreferenceConfig", "PreferenceTrainer", "check_output_dir"]
