"""Engines sample completions from a copy of the policy. All of them speak the ``Generator`` protocol."""

from aspo_lightning.engines.base import Generator, SamplingRequest
from aspo_lightning.engines.servers import VLLMServers
from aspo_lightning.engines.transformers import TransformersEngine
from aspo_lightning.engines.vllm import VLLMEngine

__all__ = ["Generator", "SamplingRequest", "TransformersEngine", "VLLMEngine", "VLLMServers"]
