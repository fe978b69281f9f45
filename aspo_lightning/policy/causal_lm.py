"""A Hugging Face causal LM that scores the response tokens of packed rows.

Axes: T tokens of a packed row, N response tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aspo_lightning.errors import ConfigError
from aspo_lightning.policy import attention
from aspo_lightning.policy.attention import Packing, segments
from aspo_lightning.policy.fast_linears import use_fast_linears
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.policy.weights import add_lora
from aspo_lightning.scorer import token_logprobs
from aspo_lightning.types import MicroBatch


@torch.no_grad()
def score_batches(
    model: nn.Module, batches: Sequence[MicroBatch], *, temperature: float, device: torch.device, description: str
) -> list[Tensor]:
    """Log-probs[N] of each micro-batch's response tokens, on the CPU; with a progress bar."""
    bar = tqdm(batches, desc=description, leave=False, disable=None)
    return [model(batch.to(device), temperature=temperature)[0].cpu() for batch in bar]


class ScoredCausalLM(nn.Module):
    """A Hugging Face causal LM whose forward scores the response tokens of a packed micro-batch.

    The unit that FSDP shards, and used for policy and reference alike. ``lm`` is the plain Hugging Face model.
    """

    def __init__(self, lm: PreTrainedModel, *, chunk_size: int | None = None) -> None:
        super().__init__()
        use_fast_linears(lm)
        self.lm = lm
        self.chunk_size = chunk_size
        self.softcap: float | None = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
        self._own_attention = lm.config._attn_implementation
        self.packs = True
        self._check_forward()

    @property
    def packs(self) -> bool:
        """Whether a micro-batch is one packed row, under packed attention; or padded, under the model's own."""
        return self._packs

    @packs.setter
    def packs(self, packs: bool) -> None:
        self._packs = packs
        self.lm.set_attn_implementation(attention.NAME if packs else self._own_attention)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        settings: ModelSettings = ModelSettings(),
        *,
        dtype: torch.dtype | None = None,
        weights: bool = True,
    ) -> "ScoredCausalLM":
        """Loads a hub name or a local folder, with every dropout switched off.

        Dropout would make the policy differ from itself between rollout, old log-probs and update.

        Args:
            model_name_or_path: where from.
            settings: of the model.
            dtype: of the weights, in place of that of ``settings``.
            weights: whether to load them. Otherwise the model is on the meta device, where it takes no memory.
        """
        dtype = dtype or settings.torch_dtype
        config = AutoConfig.from_pretrained(model_name_or_path)
        for part in (config, config.get_text_config()):
            for key, value in part.to_dict().items():
                if key.endswith(("dropout", "_pdrop")) and isinstance(value, float):
                    setattr(part, key, 0.0)
        if weights:
            lm = AutoModelForCausalLM.from_pretrained(model_name_or_path, config=config, dtype=dtype)
        else:
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with lm.device:
            if settings.lora_rank:
                add_lora(lm, settings.lora_rank, settings.lora_alpha)
        if dtype == torch.float64:
            lm.set_experts_implementation("eager")  # the grouped product of experts takes no float64
        if settings.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(lm.train(), chunk_size=settings.chunk_size)

    def freeze(self, dtype: torch.dtype) -> "ScoredCausalLM":
        """Never trained. The weights of linear layers become what autocast to ``dtype`` would make of them."""
        for layer in self.layers():
            if layer.weight.dtype != dtype:
                layer.to(dtype)
        return self.eval().requires_grad_(False)

    def layers(self) -> Iterator[nn.Linear]:
        """The linear layers; the head isn't one of them."""
        head = self.lm.get_output_embeddings()
        yield from (m for m in self.modules() if type(m) is nn.Linear and m is not head)

    def forward(
        self, batch: MicroBatch, *, temperature: float = 1.0, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(logprobs[N], entropy[N]) of the micro-batch's response tokens, in float32 (float64 for a float64 model)."""
        hidden = self._hidden_packed(batch) if self.packs else self._hidden_padded(batch)  # [T, H]
        head = self.lm.get_output_embeddings()
        return token_logprobs(
            hidden[batch.response_index],
            head.weight,
            batch.targets,
            temperature=temperature,
            chunk_size=self.chunk_size,
            bias=getattr(head, "bias", None),
            softcap=self.softcap,
            entropy_grad=entropy_grad,
        )

    def _hidden(self, input_ids: Tensor, **inputs: Tensor | Packing) -> Tensor:
        return self.lm.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state

    def _hidden_packed(self, batch: MicroBatch) -> Tensor:
        device = batch.input_ids.device
        return self._hidden(
            batch.input_ids[None],
            position_ids=batch.position_ids[None],
            packing=Packing.of(batch.row_lengths, device),
            attention_mask=torch.empty(1, 1, 0, 0, device=device),  # in four dimensions: transformers makes no other
        )[0]

    def _hidden_padded(self, batch: MicroBatch) -> Tensor:
        """The same [T, H] by one padded row a segment, for models whose layers see across packed sequences."""
        parts = segments(batch.row_lengths)
        seen = [torch.tensor(part.keys, device=batch.input_ids.device) for part in parts]
        ids = pad_sequence([batch.input_ids[keys] for keys in seen], batch_first=True)
        mask = pad_sequence([torch.ones_like(keys) for keys in seen], batch_first=True)
        hidden = self._hidden(ids, attention_mask=mask)
        ends = [row[len(keys) - part.length : len(keys)] for row, keys, part in zip(hidden, seen, parts, strict=True)]
        return torch.cat(ends)

    @torch.no_grad()
    def _check_forward(self) -> None:
        """Scores three tiny sequences, two of one prompt, and compares with the model's own logits, one at a time.

        Finds what no config says: whether this architecture can be packed (then ``packs``; otherwise it is padded), and
        whether its logits are more than a linear head of its last hidden states. Both are a matter of structure, so
        they are looked at in the weights' own dtype.
        """
        config = self.lm.config.get_text_config()
        if any(p.is_meta for p in self.lm.parameters()):
            return
        self.packs = False  # for the model's own logits
        training = self.lm.training
        self.lm.eval()
        device = next(self.lm.parameters()).device
        ids = [i * 37 % config.vocab_size for i in range(2, 13)]
        sequences = [(ids[:3], ids[3:7]), (ids[:3], ids[7:10]), (ids[4:5], ids[5:])]
        batch = MicroBatch.from_sequences(sequences).to(device)
        tolerance = 1e-3 if next(self.lm.parameters()).dtype in (torch.float32, torch.float64) else 0.3
        with torch.autocast(device.type, enabled=False):
            logits = [
                self.lm(input_ids=torch.tensor([[*prompt, *completion[:-1]]], device=device)).logits[
                    0, len(prompt) - 1 :
                ]
                for prompt, completion in sequences
            ]
            expected = torch.cat(logits).float().log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
            # Layers that attend in chunks are only seen in longer sequences than these.
            for self.packs in (False,) if getattr(config, "attention_chunk_size", None) else (True, False):
                with suppress(NotImplementedError, TypeError):  # it can't, or doesn't take our attention
                    if torch.allclose(self.forward(batch)[0].float(), expected, rtol=0, atol=tolerance):
                        self.lm.train(training)
                        return
        raise ConfigError(
            f"{type(self.lm).__name__} computes its logits in a way this scorer doesn't know (a linear head, an "
            "optional bias and final_logit_softcapping are supported). Choose a model of another architecture."
        )
