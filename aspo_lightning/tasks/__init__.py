"""Where prompts come from: procedural tasks, files, Hugging Face datasets, and mixtures of them."""

from aspo_lightning.tasks.base import Task
from aspo_lightning.tasks.dataset import Dataset, MultipleChoice
from aspo_lightning.tasks.mixture import Mixture
from aspo_lightning.tasks.reasoning_gym import ReasoningGym

__all__ = ["Dataset", "Mixture", "MultipleChoice", "ReasoningGym", "Task"]
