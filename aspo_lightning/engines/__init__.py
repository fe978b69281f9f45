"""Engines sample completions from a copy of the policy. All of them speak the ``Engine`` protocol."""

from aspo_lightning.engines.base import Engine, SamplingRequest
from aspo_lightning.engines.servers import VLLMServers
from aspo_lightning.engines.transformers import TransformersEngine
from aspo_lightning.engines.vllm import VLLMEngine

__all__ = ["Engine", "SamplingRequest", "TransformersEngine", "VLLMEngine", "VLLMServers"]
