"""What `data.lag` must come to, as plainly as it can be said: an engine that samples by weights of some syncs ago."""

from aspo_lightning.engines import VLLMEngine


class OldWeights(VLLMEngine):
    """Keeps the weights of all syncs, and takes those of ``lag`` syncs before, or the first."""

    def __init__(self, lag: int, kv_cache_gib: float) -> None:
        super().__init__(kv_cache_gib=kv_cache_gib)
        self.lag, self.kept = lag, []

    def sync_weights(self, named_tensors) -> None:
        self.kept.append([(name, tensor.clone()) for name, tensor in named_tensors])
        super().sync_weights(self.kept[max(0, len(self.kept) - 1 - self.lag)])
